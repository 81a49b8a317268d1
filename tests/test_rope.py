"""Rotary embedding: relative position is all there is, and the angles are exact far out."""

import math
from dataclasses import replace
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from util import ROPES, config

from minihogwild import LayerKind, Rope
from minihogwild.oracle import frequencies_of_pairs, yarn_factor
from minihogwild.rope import attention_factor, frequencies_of, inverse_frequencies, rotate, rotation

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
D = 16
positions = st.integers(0, 200_000)


def turned(x: torch.Tensor, position: int, rope: Rope) -> torch.Tensor:
    return rotate(x, *rotation(torch.tensor(position), inverse_frequencies(rope, D), torch.float64))


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.sampled_from(sorted(ROPES)), positions, positions, positions, st.integers(0, 9))
def test_a_score_depends_on_the_distance_alone(name, a, b, shift, seed):
    q, k, rope = vector(seed), vector(seed + 10), ROPES[name]
    here = turned(q, a, rope) @ turned(k, b, rope)
    there = turned(q, a + shift, rope) @ turned(k, b + shift, rope)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-8)
    # ... and so a query can be turned in the place of a key, also backwards
    torch.testing.assert_close(turned(q, a - b, rope) @ k, here, rtol=0, atol=1e-8)


@given(st.sampled_from(sorted(ROPES)), positions, positions)
def test_rotations_compose(name, a, b):
    rope = ROPES[name]
    twice = turned(turned(vector(0), a, rope), b, rope)
    torch.testing.assert_close(twice, turned(vector(0), a + b, rope), rtol=0, atol=1e-8)


@given(st.sampled_from(sorted(ROPES)), positions)
def test_a_rotation_keeps_the_norm(name, position):
    """Also under YaRN: its factor belongs to the scores."""
    torch.testing.assert_close(turned(vector(1), position, ROPES[name]).norm(), vector(1).norm(), rtol=1e-12, atol=0)


def test_position_zero_changes_nothing_and_one_does():
    assert torch.equal(turned(vector(2), 0, Rope()), vector(2))
    assert not torch.allclose(turned(vector(2), 1, Rope()), vector(2), atol=0.01)


def test_pairs_lie_half_a_head_apart_and_turn_counterclockwise():
    x = torch.zeros(D, dtype=torch.float64)
    x[0] = 1
    out = turned(x, 1, Rope())
    assert out[0].item() == pytest.approx(math.cos(1))
    assert out[D // 2].item() == pytest.approx(math.sin(1))


@pytest.mark.parametrize("position", [131_072, 1_000_003])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-9), (torch.float32, 1e-7)])
def test_angles_are_exact_far_out(position, dtype, exact):
    getcontext().prec = 50
    cos, sin = rotation(torch.tensor(position), inverse_frequencies(Rope(rope_theta=500_000.0), 64), dtype)
    for pair in range(32):
        angle = float(position * Decimal(500_000) ** (Decimal(-2 * pair) / 64) % (2 * PI))
        assert cos[pair].item() == pytest.approx(math.cos(angle), abs=exact)
        assert sin[pair].item() == pytest.approx(-math.sin(angle), abs=exact)  # the first half is negated
        assert sin[pair + 32].item() == pytest.approx(math.sin(angle), abs=exact)


@given(
    st.sampled_from(["default", "linear", "llama3", "yarn"]),
    st.floats(100, 1e7),
    st.floats(1, 64),
    st.integers(8, 40_000),
    st.sampled_from([2, 8, 64, 128]),
    st.booleans(),
)
def test_frequencies_equal_the_oracles(kind, theta, factor, original, head_dim, truncate):
    rope = Rope(kind, theta, factor, original, truncate=truncate)
    shape = replace(config(), rope=rope, head_dim=head_dim)
    theirs = torch.tensor(frequencies_of_pairs(shape), dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ROPES)
def test_attention_factor_equals_the_oracles(name):
    shape = config(name)
    assert attention_factor(shape.rope) == pytest.approx(yarn_factor(shape), rel=1e-15)
    assert (attention_factor(shape.rope) != 1) == name.startswith("yarn")


@pytest.mark.parametrize("name", ROPES)
def test_layers_without_rope_are_rotated_by_nothing_however_far_out(name):
    frequencies = frequencies_of(LayerKind(rope=False), config(name, head_dim=D))
    turns = rotation(torch.tensor(200_000), frequencies, torch.float64)
    assert torch.equal(rotate(vector(3), *turns), vector(3))
    assert torch.equal(frequencies_of(LayerKind(), config(name)), inverse_frequencies(ROPES[name], 8))


def test_known_frequencies():
    """Llama 3.1's published scaling leaves fast pairs alone and divides slow ones by 8."""
    rope = Rope("llama3", 500_000.0, 8.0, 8192, 1.0, 4.0)
    plain = inverse_frequencies(Rope(rope_theta=500_000.0), 128)
    ratio = plain / inverse_frequencies(rope, 128)
    assert torch.equal(ratio[:29], torch.ones(29, dtype=torch.float64))
    assert ratio[29] > 1
    torch.testing.assert_close(ratio[-20:], torch.full((20,), 8.0, dtype=torch.float64))
