"""What lies between two products: norms, and SwiGLU. Each a kernel, computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OVERLAPPING, wait_for_predecessor


def norm(x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor | None, Tensor]:
    """(x + y, the root mean square norm of it over the last dimension); without y, (None, the norm of x)."""
    x = x.contiguous()
    E = x.shape[-1]
    normed = torch.empty_like(x)
    total = None if y is None else torch.empty_like(x)
    width = triton.next_power_of_2(E)
    warps = min(16, max(1, width // 512))
    _norm[x.numel() // E,](x, y, weight, total, normed, epsilon, E, WIDTH=width, num_warps=warps, **OVERLAPPING)
    return total, normed


@triton.jit
def _norm(x, y, weight, total, normed, epsilon, E, WIDTH: tl.constexpr):
    """One row."""
    wait_for_predecessor()
    e = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * E + e
    row = tl.load(x + at, mask=e < E, other=0.0)
    if y is not None:
        row = row + tl.load(y + at, mask=e < E, other=0.0)
        tl.store(total + at, row, mask=e < E)
    row = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, 0) / E + epsilon)
    result = row * factor * tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=e < E)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up: [..., 2F] to [..., F]."""
    F = gate_up.shape[-1] // 2
    result = gate_up.new_empty(*gate_up.shape[:-1], F)
    _swiglu[result.numel() // F, triton.cdiv(F, 1024)](gate_up, result, F, num_warps=4, **OVERLAPPING)
    return result


@triton.jit
def _swiglu(gate_up, result, F):
    wait_for_predecessor()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    gate = tl.load(gate_up + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(result + row * F + f, (gate / (1 + tl.exp(-gate)) * up).to(result.dtype.element_ty), mask=f < F)
