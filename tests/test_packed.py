"""Matrices in 8 and 4 bits: their products are those with the numbers they stand for, and the engine is the oracle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import TOLERANCE, compare, many
from util import configs, random_weights, relative_difference, schedules

from minihogwild import Weights, packed
from minihogwild.packed import (
    BlocksOfRows,
    FourBit,
    Stacked,
    Tiles,
    empty_eight_bit,
    empty_four_bit,
    layout_of_pytorch,
)
from minihogwild.weights import Dense, Matrix

LAYOUTS = [BlocksOfRows(64), BlocksOfRows(32), Tiles()]
layouts = st.sampled_from(LAYOUTS)


# ---- layouts


@given(layouts, st.integers(1, 150), st.integers(1, 140), st.lists(st.integers(1, 60), max_size=4), st.integers(0, 99))
def test_codes_come_back_from_any_layout_whatever_parts_they_are_filled_in(layout, N, E, parts, seed):
    codes = torch.randint(16, (N, E), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    whole, room = layout.empty(N, E, "cpu", ())
    assert room >= N
    starts = [0]
    for part in parts:
        starts.append(min(N, starts[-1] + part))
    for start, stop in zip(starts, [*starts[1:], N]):
        layout.fill(whole, start, codes[start:stop])
    assert torch.equal(layout.unpack(whole)[:N, :E], codes)


def test_the_order_in_tiles():
    """Number m of word i, counted from the lowest bits, is column 32 m + i: as README and kernels have it."""
    codes = torch.randint(16, (70, 200), dtype=torch.uint8)
    words, _ = Tiles().empty(70, 200, "cpu", ())
    Tiles().fill(words, 0, codes)
    for n, e in ((0, 0), (0, 31), (0, 32), (63, 127), (64, 128), (69, 199), (5, 131)):
        in_tile = e % 128
        word = words[n // 64, e // 128, n % 64, in_tile % 32].item()
        assert word >> 4 * (in_tile // 32) & 15 == codes[n, e]


def test_the_order_in_blocks():
    codes = torch.randint(16, (70, 9), dtype=torch.uint8)
    packed_codes, _ = BlocksOfRows(64).empty(70, 9, "cpu", ())
    BlocksOfRows(64).fill(packed_codes, 0, codes)
    for n, e in ((0, 0), (31, 8), (32, 3), (63, 4), (64, 5), (69, 8)):
        place = n % 64
        byte = packed_codes[n // 64, e, place % 32].item()
        assert (byte >> 4 if place >= 32 else byte & 15) == codes[n, e]


CAPABILITIES = {"default": "Tiles()", "avx2": "BlocksOfRows(R=32)", "avx512": "BlocksOfRows(R=64)"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_pytorchs_order_is_found_out_for_each_kind_of_cpu(capability):
    """And a product by it is right. A capability that this CPU lacks is not granted: then it is that of another row."""
    program = """
import torch
from minihogwild.packed import empty_four_bit, layout_of_pytorch
matrix = empty_four_bit(200, 128, 32, torch.bfloat16, "cpu")
matrix.fill(0, torch.randn(200, 128))
x = torch.randn(3, 128).bfloat16()
right = x.double() @ matrix.float64().T
assert (matrix.times(x).double() - right).abs().max() / right.abs().max() < 0.01
print(torch.backends.cpu.get_cpu_capability().lower(), layout_of_pytorch())
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    granted, layout = done.stdout.split(maxsplit=1)
    assert layout.strip() == CAPABILITIES.get(granted, "Tiles()")


# ---- products

EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.012, torch.float16: 0.0015}


def random_four_bit(
    N: int, E: int, group: int, dtype: torch.dtype, seed: int = 0, stack: tuple = (), device: str = "cpu"
) -> FourBit:
    """Of codes, zero points and scales that are all there."""
    random = torch.Generator().manual_seed(seed)
    matrix = empty_four_bit(N, E, group, dtype, device, stack)
    for part in matrix.experts if stack else [matrix]:
        part.fill_codes(0, torch.randint(16, (N, E), generator=random, dtype=torch.uint8))
        part.zero.copy_(torch.randint(16, part.zero.shape, generator=random))
        part.scale.copy_(0.05 + 0.1 * torch.rand(part.scale.shape, generator=random))
    return matrix


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("group", [4, 16, 32, 64, 96, 192])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("N", [192, 50])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_product_in_four_bits(dtype, group, rows, N, layout, monkeypatch):
    monkeypatch.setattr(packed, "layout_for", lambda device: layout)
    if layout != layout_of_pytorch():
        monkeypatch.setattr(FourBit, "suits_pytorch", lambda self, x: False)
    scale = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    matrix = random_four_bit(N, 192, group, scale)
    x, bias = torch.randn(rows, 192).to(dtype), torch.randn(N).to(dtype)
    right = x.double() @ matrix.float64().T + bias.double()
    assert relative_difference(matrix.times(x, bias), right) < EPSILON[dtype]
    assert relative_difference(matrix.times(x), right - bias.double()) < EPSILON[dtype]


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize(("N", "E"), [(192, 96), (50, 96), (192, 20), (7, 5)])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_product_in_eight_bits(dtype, N, E, rows):
    matrix = empty_eight_bit(N, E, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, "cpu")
    matrix.fill(0, torch.randn(N, E))
    x, bias = torch.randn(rows, E).to(dtype), torch.randn(N).to(dtype)
    right = x.double() @ matrix.float64().T + bias.double()
    assert relative_difference(matrix.times(x, bias), right) < EPSILON[dtype]
    assert relative_difference(matrix.times(x), right - bias.double()) < EPSILON[dtype]


def test_small_rows_keep_their_digits_in_float16():
    """Their scales are below what float16 has digits for."""
    matrix = empty_eight_bit(16, 64, torch.float32, "cpu")
    matrix.fill(0, 5e-4 * torch.randn(16, 64))
    exact = matrix.float64()
    assert relative_difference(torch.cat([*matrix.unpacked(torch.float16)]), exact) < 5e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_of_x_that_do_not_lie_side_by_side(rows, dtype):
    wide = torch.randn(rows, 256).to(dtype)
    four = random_four_bit(64, 128, 64, dtype)
    eight = empty_eight_bit(64, 128, dtype, "cpu")
    eight.fill(0, torch.randn(64, 128))
    for matrix in (four, eight):
        for x in (wide[:, ::2], wide[:, :128]):
            right = x.double() @ matrix.float64().T
            assert relative_difference(matrix.times(x), right) < EPSILON[dtype]


@pytest.mark.parametrize("numbers", [1, 2**13, 2**30])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_some_rows_at_a_time(layout, numbers, monkeypatch):
    """However many: together they are the matrix, and never are more there at once."""
    monkeypatch.setattr(packed, "layout_for", lambda device: layout)
    four = random_four_bit(150, 192, 32, torch.float32)
    eight = empty_eight_bit(150, 192, torch.float32, "cpu")
    eight.fill(0, torch.randn(150, 192))
    x = torch.randn(70, 192)
    whole = [(matrix.float64(), matrix.times(x)) for matrix in (four, eight)]
    monkeypatch.setattr(packed, "NUMBERS_AT_ONCE", numbers)
    for matrix, least, (right, product) in zip((four, eight), (64, 1), whole):
        parts = [*matrix.unpacked(torch.float64)]
        assert torch.equal(torch.cat(parts), right)
        assert max(len(part) for part in parts) * 192 <= max(numbers, least * 192)
        assert relative_difference(matrix.times(x), product) < EPSILON[torch.float32]


def test_pytorchs_products_are_taken(monkeypatch):
    """Where they can be: else all the above would hold, slowly."""
    taken = []
    for name in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
        theirs = getattr(torch.ops.aten, name)
        monkeypatch.setattr(torch.ops.aten, name, lambda *a, theirs=theirs, name=name: taken.append(name) or theirs(*a))
    x = torch.randn(4, 128).bfloat16()
    eight = empty_eight_bit(64, 128, torch.bfloat16, "cpu")
    eight.times(x)
    assert taken == ["_weight_int8pack_mm"]
    eight.times(x.repeat(packed.ROWS_IN_EIGHT_BITS, 1))  # many rows
    eight.times(x.float())
    assert len(taken) == 1
    four = random_four_bit(64, 128, 64, torch.bfloat16)
    four.times(x)
    if isinstance(layout_of_pytorch(), BlocksOfRows):
        assert taken[1:] == ["_weight_int4pack_mm_for_cpu"]


def test_experts_keep_what_pytorchs_product_needs():
    stack = random_four_bit(64, 128, 64, torch.bfloat16, stack=(3,))
    x = torch.randn(2, 128).bfloat16()
    for expert in range(3):
        right = x.double() @ stack.float64()[expert].T
        assert relative_difference(stack[expert].times(x), right) < EPSILON[torch.bfloat16]
    assert stack[1] is stack[1]


# ---- the engine


@st.composite
def stored(draw, dense: Dense, dtype: torch.dtype, seed: int) -> Matrix:
    """The matrix as it is; or near it, in fewer bits; or its rows stored in different ways."""
    *stack, N, E = dense.tensor.shape
    kind = draw(st.sampled_from(["plain", "eight", "four", "stacked"]))
    if kind == "plain":
        return dense
    if kind == "stacked" and not stack and N > 1:
        cut = draw(st.integers(1, N - 1))
        parts = [Dense(dense.tensor[:cut].clone()), Dense(dense.tensor[cut:].clone())]
        return Stacked([draw(stored(part, dtype, seed)) for part in parts])
    if kind == "eight":
        made = empty_eight_bit(N, E, dtype, "cpu", tuple(stack))
    else:
        group = draw(st.sampled_from([group for group in range(1, E + 1) if E % group == 0]))
        made = empty_four_bit(N, E, group, dtype, "cpu", tuple(stack))
    for expert in range(stack[0] if stack else 1):
        part, weight = (made[expert], dense.tensor[expert]) if stack else (made, dense.tensor)
        part.fill(0, weight)
    return made


@st.composite
def packed_weights(draw, shape, dtype: torch.dtype, seed: int) -> Weights:
    weights = random_weights(shape, dtype, seed, out_bias=draw(st.booleans()))
    for layer in weights.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(layer, name, draw(stored(getattr(layer, name), dtype, seed)))
    weights.head = draw(stored(weights.head, dtype, seed))
    return weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@many
@given(data=st.data())
def test_engine_equals_oracle(dtype, data):
    """With weights stored in any way: the oracle takes the very numbers that they stand for."""
    shape = data.draw(configs())
    blocks, events = data.draw(schedules())
    with pytest.MonkeyPatch.context() as patch:
        layout = data.draw(layouts)
        patch.setattr(packed, "layout_for", lambda device: layout)
        weights = data.draw(packed_weights(shape, dtype, data.draw(st.integers(0, 99))))
    narrow = 2e-3 if dtype == torch.float32 else 0.0
    assert compare(shape, weights, blocks, events, 5, narrow) <= TOLERANCE[dtype]
