"""What lies between two products: sums and norms, and SwiGLU. Each a kernel, computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OVERLAPPING, wait_for_predecessor


def add_and_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + y, and its root mean square norm over the last dimension. A program for each row."""
    x = x.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    E = x.shape[-1]
    rows = x.numel() // E
    width = triton.next_power_of_2(E)
    warps = min(16, max(1, width // 512))
    _add_and_norm[rows,](x, y, weight, total, normed, epsilon, E, WIDTH=width, num_warps=warps, **OVERLAPPING)
    return total, normed


@triton.jit
def _add_and_norm(x, y, weight, total, normed, epsilon, E, WIDTH: tl.constexpr):
    """One row."""
    wait_for_predecessor()
    e = tl.arange(0, WIDTH)
    inside = e < E
    at = tl.program_id(0).to(tl.int64) * E + e
    row = tl.load(x + at, mask=inside, other=0.0) + tl.load(y + at, mask=inside, other=0.0)
    tl.store(total + at, row, mask=inside)
    row = row.to(tl.float32)
    mean_square = tl.sum(row * row, 0) / E
    scale = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    result = row * tl.rsqrt(mean_square + epsilon) * scale
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up: [..., 2F] to [..., F]."""
    F = gate_up.shape[-1] // 2
    result = gate_up.new_empty(*gate_up.shape[:-1], F)
    _swiglu[result.numel() // F, triton.cdiv(F, 1024)](gate_up, result, F, num_warps=4, **OVERLAPPING)
    return result


@triton.jit
def _swiglu(gate_up, result, F):
    """1024 numbers of one row."""
    wait_for_predecessor()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    inside = f < F
    gate_at = gate_up + row * 2 * F + f
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * F + f, swiglu_of(gate, up).to(result.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_of(gate, up):
    silu = gate / (1 + tl.exp(-gate))
    return silu * up
