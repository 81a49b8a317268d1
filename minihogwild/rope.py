"""Rotary position embedding: a score depends on how far apart two tokens are, and on nothing else.

The two halves of a head's D numbers form D / 2 pairs; position p turns pair i by the angle p * frequency[i].
Rotations compose, R(a) R(b) = R(a + b), and <R(a) q, R(b) k> depends on a - b alone. So a key can be
moved by rotating it once more, and a query can be rotated in place of every key that it meets.
"""

import math

import torch
from torch import Tensor

from .config import Config, LayerKind, Rope


def frequencies_of(kind: LayerKind, config: Config) -> Tensor:
    """Radians per position of each pair, in layers of this kind: [D / 2], float64.

    Where there is no rope all frequencies are 0, and every rotation leaves what it is given as it was.
    """
    if not kind.rope:
        return torch.zeros(config.head_dim // 2, dtype=torch.float64)
    return inverse_frequencies(config.rope, config.head_dim)


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
        # Its "factors" are numbers of turns: at low_freq_factor nothing is kept, at high_freq_factor all
        turns = rope.original_max_position_embeddings * trained / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        low, high = yarn_ramp(rope, head_dim)
        pair = torch.arange(head_dim // 2, dtype=torch.float64)
        kept = 1 - (pair - low) / (high - low)
    kept = kept.clamp(0, 1)
    return trained * kept + trained / rope.factor * (1 - kept)


def yarn_ramp(rope: Rope, head_dim: int) -> tuple[float, float]:
    """The pairs between which yarn passes from 'as trained' to 'divided by factor': indices, perhaps fractions.

    They are those that make beta_fast and beta_slow turns in the trained context.
    """

    def pair_that_makes(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / turns  # in positions
        # A pair's wavelength is 2 pi theta ** (2 pair / D): solved for the pair
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_makes(rope.beta_fast), pair_that_makes(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)  # as transformers has it, though there are only D / 2 pairs
    if low == high:
        high += 0.001  # a ramp without width would divide by zero
    return low, high


def attention_scale(config: Config, kind: LayerKind) -> float:
    """What a layer's scores are multiplied by: m² / √D, or 1 / √D in a layer without rotation.

    YaRN multiplies what is rotated, queries and keys, by m, so their products by m². That belongs here, and never in a
    rotation: a moved key is rotated twice, and would get it twice.
    """
    m = attention_factor(config.rope) if kind.rope else 1.0
    return m**2 / config.head_dim**0.5


def attention_factor(rope: Rope) -> float:
    """YaRN's m; 1 for all other rope types."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    growth = 0.1 * math.log(max(rope.factor, 1))
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * growth + 1) / (rope.mscale_all_dim * growth + 1)
    return growth + 1


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin for `rotate`, [2, *positions.shape, D]; the first half of sin is negated, as `rotate` needs it.

    The product is taken in float64: in float32, angles near position 131,072 are off by up to 0.006 rad.
    """
    # Computed where the frequencies are: not every device has float64
    angles = positions.to(frequencies)[..., None] * frequencies
    cos = angles.cos()
    sin = angles.sin()
    for_both_halves = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    return for_both_halves.to(positions.device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[..., i], x[..., i + D / 2]) by an angle, given as the cos and sin that `rotation` makes."""
    other_half = x.roll(x.shape[-1] // 2, -1)  # beside each number, the other one of its pair
    # First half: a cos - b sin; second half: b cos + a sin. The minus sign is already in `sin`.
    return torch.addcmul(x * cos, other_half, sin)
