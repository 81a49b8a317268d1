"""What a model is: its numbers (Config) and its tensors (Weights). Nothing here computes.

Dimension letters, used in every file: T new tokens of a step (all workers together), W workers,
B blocks, N tokens of a block, L layers, H query heads, K key/value heads, G = H / K, D head dim,
E hidden size, F inner size of the MLP, X experts of a layer (each an MLP of its own F), V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


class InputError(ValueError):
    """Input that cannot be used. The message is one line: the culprit, and what would be right."""


def require(holds: object, otherwise: str) -> None:
    """Raise InputError, with the message `otherwise`, unless `holds`."""
    if not holds:
        raise InputError(otherwise)


@contextmanager
def refusing(what: object):
    """Raise InputError, `what` and the reason, for any error inside: libraries' own share no base class."""
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{what}: {' '.join(why.split())}") from error


@dataclass(frozen=True)
class Rope:
    """How positions become angles: config.json's `rope_parameters` (or `rope_scaling` and `rope_theta`)."""

    rope_type: str = "default"  # default, linear, llama3 or yarn
    rope_theta: float = 10000.0
    factor: float = 1.0  # all but default: how much longer than trained
    original_max_position_embeddings: int = 0  # llama3, yarn: the trained length
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn: m; None: from factor and the two mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole pairs


@dataclass(frozen=True)
class Config:
    """The numbers of one model, under config.json's names."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope
    sparse_layers: tuple[int, ...] = ()  # these have experts in place of the one MLP; the next four are about them
    num_experts: int = 0  # X
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # F of each expert
    norm_topk_prob: bool = False  # the chosen experts' probabilities are scaled to sum to 1

    @property
    def context(self) -> int:
        """Tokens that one view may hold. With YaRN, configs leave max_position_embeddings as trained, or scale it."""
        stretched = self.rope.original_max_position_embeddings * self.rope.factor
        return max(self.max_position_embeddings, int(stretched) if self.rope.rope_type == "yarn" else 0)


@dataclass
class Layer:
    """One transformer layer. q, k and v are one matrix, as are gate and up: fewer, larger products."""

    attn_norm: Tensor  # [E]
    qkv: Tensor  # [(H + 2K) D, E]
    out: Tensor  # [E, H D]
    mlp_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]; [X, 2F, E] in sparse layers
    down: Tensor  # [E, F]; [X, E, F] in sparse layers
    qkv_bias: Tensor | None = None  # [(H + 2K) D]  (Qwen2)
    q_norm: Tensor | None = None  # [D]  (Qwen3)
    k_norm: Tensor | None = None  # [D]  (Qwen3)
    router: Tensor | None = None  # [X, E]  (Qwen3-MoE)


@dataclass
class Weights:
    """Every tensor of one model."""

    embed: Tensor  # [V, E]
    layers: list[Layer]
    norm: Tensor  # [E]
    head: Tensor  # [V, E]; the same tensor as embed where config.tie_word_embeddings
