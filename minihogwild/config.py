"""The numbers of a model, under the names that its config.json gives them.

Dimension letters, used in every file: T new tokens of a step (all workers together), W workers, B blocks,
N tokens of a block, L layers, H query heads, K key/value heads, G = H / K, D head dim, E hidden size,
F inner size of an MLP, X experts of a layer (each an MLP with an F of its own), V vocabulary.
"""

from dataclasses import dataclass


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
class LayerKind:
    """What may differ from one layer to the next. Layers of one kind share what a step knows about positions."""

    rope: bool = True  # False: neither queries nor keys are rotated ("NoPE")
    experts: bool = False  # True: a router and X experts in place of the one MLP


@dataclass(frozen=True)
class Config:
    """The numbers of one model."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope
    layer_kinds: tuple[LayerKind, ...]  # one for each of the L layers
    longest_view: int | None = None  # `context`, where it is not what follows from the numbers above
    # The next four are about experts, where a layer has them
    num_experts: int = 0  # X
    num_experts_per_tok: int = 0  # how many of them each token takes
    moe_intermediate_size: int = 0  # F of each expert
    norm_topk_prob: bool = False  # the chosen experts' probabilities are scaled to sum to 1

    @property
    def num_hidden_layers(self) -> int:  # L
        return len(self.layer_kinds)

    @property
    def context(self) -> int:
        """Tokens that one view may hold."""
        if self.longest_view is not None:
            return self.longest_view
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        # Some configs leave max_position_embeddings as it was before YaRN stretched it, others give the stretched one.
        stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
        return max(self.max_position_embeddings, stretched)
