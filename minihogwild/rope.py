"""Rotary position embedding: a score depends on how far apart two tokens are, and on nothing else.

Two halves of a head's D numbers form D / 2 pairs; position p turns pair i by the angle p * frequency[i].
Rotations compose, R(a) R(b) = R(a + b), and <R(a) q, R(b) k> depends on a - b alone. So a key can be
moved by rotating it once more, and a query can be rotated in place of every key it meets.
"""

import math

import torch
from torch import Tensor

from .config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair: [D / 2], float64.

    Every rope type lies between two ends: frequencies as trained, and the same divided by `factor`. What
    differs is how much of each pair is kept as trained: all (default), none (linear), or a ramp over the
    turns that the pair makes in the trained context (llama3), or over its index (yarn, arXiv 2309.00071).
    """
    trained = rope.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope.rope_type == "default":
        return trained
    if rope.rope_type == "linear":
        kept = torch.zeros_like(trained)
    elif rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * trained / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        low, high = yarn_ramp(rope, head_dim)
        kept = 1 - (torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)
    kept = kept.clamp(0, 1)
    return trained * kept + trained / rope.factor * (1 - kept)


def yarn_ramp(rope: Rope, head_dim: int) -> tuple[float, float]:
    """The pairs between which yarn passes from 'as trained' to 'divided by factor'."""
    trained = rope.original_max_position_embeddings / (2 * math.pi)
    pairs = head_dim / (2 * math.log(rope.rope_theta))
    low, high = (pairs * math.log(trained / turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


def attention_factor(rope: Rope) -> float:
    """YaRN's m. It scales the scores by m² (Cache.scale), never a rotation: a moved key would get it twice."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    above, below = (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1, 0)
    growth = 0.1 * math.log(max(rope.factor, 1))
    return (above * growth + 1) / (below * growth + 1)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin for `rotate`, [2, *positions.shape, D]; the first half of sin is negated.

    The product is taken in float64: in float32, angles near position 131,072 are off by up to 0.006 rad.
    """
    angles = positions.to(frequencies)[..., None] * frequencies  # where they are: not every device has float64
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(positions.device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[..., i], x[..., i + D / 2]) by the angles of `rotation`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
