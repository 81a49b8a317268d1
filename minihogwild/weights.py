"""The tensors of a model. A weight matrix is a type of its own: how it is stored is nobody else's business.

What multiplies by a matrix asks it (`times`), and so does whoever needs its exact numbers (`float64`). A matrix in
4 bits, or one GPU's share of a matrix, is another class with the same members, and nothing else changes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU without AVX-512, one order of the two factors is far faster than the other: see `Dense.times`
CPU_HAS_ONLY_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


class Matrix(Protocol):
    """A weight matrix [N, E], or a stack of them, [X, N, E], one for each expert of a layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over it reads."""

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: [T, E] to [T, N]."""

    def float64(self) -> Tensor:
        """The very numbers that `times` multiplies by, in float64, on the CPU."""

    def __getitem__(self, expert: int) -> "Matrix":
        """One expert's matrix, of a stack."""


def with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


@dataclass
class Dense:
    """A matrix stored as it is: one number for each entry, in the dtype that the model computes in."""

    tensor: Tensor  # [N, E], or [X, N, E]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        on_cpu = x.device.type == "cpu"
        if on_cpu and CPU_HAS_ONLY_AVX2 and x.dtype == torch.float32:
            # As W xᵀ, four rows of x cost no more than one; as x Wᵀ, twice as much.
            return with_bias((self.tensor @ x.T).T.contiguous(), bias)
        return F.linear(x, self.tensor, bias)

    def float64(self) -> Tensor:
        return self.tensor.to("cpu", torch.float64)

    def __getitem__(self, expert: int) -> "Dense":
        return Dense(self.tensor[expert])


@dataclass
class Layer:
    """One transformer layer. q, k and v are one matrix, as are gate and up: fewer, larger products."""

    attn_norm: Tensor  # [E]
    qkv: Matrix  # [(H + 2K) D, E]: the rows of q, then of k, then of v
    out: Matrix  # [E, H D]
    mlp_norm: Tensor  # [E]
    gate_up: Matrix  # [2F, E]: the rows of gate, then of up; with experts [X, 2F, E]
    down: Matrix  # [E, F]; with experts [X, E, F]
    qkv_bias: Tensor | None = None  # [(H + 2K) D]  (Qwen2)
    out_bias: Tensor | None = None  # [E]  (Seed-OSS)
    q_norm: Tensor | None = None  # [D]  (Qwen3)
    k_norm: Tensor | None = None  # [D]  (Qwen3)
    router: Tensor | None = None  # [X, E]  (Qwen3-MoE)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values() if tensor is not None)


@dataclass
class Weights:
    """Every tensor of one model."""

    embed: Tensor  # [V, E]
    layers: list[Layer]
    norm: Tensor  # [E]
    head: Matrix  # [V, E]; the embedding's tensor once more where config.tie_word_embeddings, and nothing is rounded

    @property
    def nbytes(self) -> int:
        shares_embed = isinstance(self.head, Dense) and self.head.tensor is self.embed
        head = 0 if shares_embed else self.head.nbytes
        return self.embed.nbytes + sum(layer.nbytes for layer in self.layers) + self.norm.nbytes + head


def name_of_dtype(dtype: torch.dtype) -> str:
    """As options and files spell it: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")
