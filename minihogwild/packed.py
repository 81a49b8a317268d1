"""Weight matrices in 8 and in 4 bits: whole numbers ("codes"), and the scales that make weights of them.

A decode step reads every weight once, and that is nearly all of its time: with fewer bytes it takes less. Where codes
meet a few rows, nothing is ever unpacked in memory: PyTorch has products for it on a CPU, `gpu/products.py` on a GPU.
Else some rows are unpacked at a time: on a CPU so few that they stay in its caches.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Dense, Matrix, with_bias

# Up to how many rows of x PyTorch's products are faster than to unpack the matrix. They are made for bfloat16: then the
# 8-bit one has this limit, and the 4-bit one none. Of other dtypes the 4-bit one alone is of use, for one row.
ROWS_IN_EIGHT_BITS = 32
ROWS_OF_OTHER_DTYPES = 1
HIGHEST_CODE_OF_8 = 127
HIGHEST_CODE_OF_4 = 15
SMALLEST = 1e-30  # scale, of a row of zeros
NUMBERS_AT_ONCE = 2**20  # of a matrix, that are rounded, or unpacked on a CPU;
NUMBERS_AT_ONCE_ON_GPU = 2**26  # it is slow at many small things
GROUPS_OF_PYTORCH = (32, 64, 128, 256)  # columns that share a scale: what its 4-bit product takes


def in_few_rows(start: int, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time, and where they go to: so what is computed of them, in float32, is small."""
    rows_at_once = max(1, NUMBERS_AT_ONCE // weight.shape[1])
    for some in weight.split(rows_at_once):
        yield start, some
        start += len(some)


def numbers_at_once(device: torch.device) -> int:
    """How many are unpacked."""
    return NUMBERS_AT_ONCE if device.type == "cpu" else NUMBERS_AT_ONCE_ON_GPU


def times_parts(x: Tensor, parts: Iterator[Tensor], bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, for a matrix that comes some rows at a time."""
    product = torch.cat([Dense(rows).times(x) for rows in parts], -1)
    return with_bias(product, bias)


# ---- 8 bits


@dataclass
class EightBit:
    """w[n, e] = codes[n, e] * scale[n]"""

    codes: Tensor  # int8 [N, E], or [X, N, E]
    scale: Tensor  # [N], or [X, N]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        N, E = self.codes.shape
        # PyTorch's product reads 16 rows and 32 columns at once, and past the end where there are fewer.
        has_whole_tiles = N % 16 == 0 and E % 32 == 0
        is_faster = x.dtype == self.scale.dtype == torch.bfloat16 and len(x) <= ROWS_IN_EIGHT_BITS
        if x.device.type == "cpu" and has_whole_tiles and is_faster:
            product = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scale)
            return with_bias(product, bias)
        return times_parts(x, self.unpacked(x.dtype), bias)

    def float64(self) -> Tensor:
        rows = torch.cat([*self.unpacked(torch.float64)])
        return rows.view(self.codes.shape).cpu()

    def unpacked(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrix, [N, E], some rows at a time; of a stack, [X N, E]."""
        exact_dtype = torch.promote_types(dtype, torch.float32)  # in float16 a small scale would lose its digits
        rows_at_once = max(1, numbers_at_once(self.codes.device) // self.codes.shape[-1])
        all_codes, all_scales = self.codes.flatten(0, -2), self.scale.flatten()
        for codes, scale in zip(all_codes.split(rows_at_once), all_scales.split(rows_at_once)):
            yield (codes.to(exact_dtype) * scale[:, None].to(exact_dtype)).to(dtype)

    def __getitem__(self, expert: int) -> "EightBit":
        return EightBit(self.codes[expert], self.scale[expert])

    def fill(self, start: int, weight: Tensor, largest: Tensor | None = None) -> None:
        """Put these rows, [n, E], at row `start`: each number becomes the nearest of 255 that the row can have.

        `largest` [n] is the largest number of each row, where that is not among these: they are but a part of the row.
        """
        for first, some in in_few_rows(start, weight):
            some = some.to(self.scale.device, torch.float32)
            rows = slice(first, first + len(some))
            if largest is None:
                largest_here = some.abs().amax(1)
            else:
                largest_here = largest[first - start : first - start + len(some)].to(some)
            self.scale[rows] = largest_here.clamp_min(SMALLEST) / HIGHEST_CODE_OF_8
            exact_codes = some / self.scale[rows, None].float()  # by the scale as it has been stored, rounded
            self.codes[rows] = exact_codes.round().clamp(-HIGHEST_CODE_OF_8, HIGHEST_CODE_OF_8).to(torch.int8)


def empty_eight_bit(
    N: int, E: int, dtype: torch.dtype, device: torch.device | str, stack: tuple[int, ...] = ()
) -> EightBit:
    """`dtype` is that of the scale; `stack` is (X,) for a matrix of each expert, else ()."""
    codes = torch.zeros(*stack, N, E, dtype=torch.int8, device=device)
    return EightBit(codes, torch.ones(*stack, N, dtype=dtype, device=device))


# ---- 4 bits: in which order the codes lie


@dataclass(frozen=True)
class BlocksOfRows:
    """The order of codes that PyTorch's product for CPUs wants: [N / R, E, R / 2] bytes, R rows to a block.

    Byte j of a column holds the code of the block's row j in its lower half, and of row j + R / 2 in its upper half.
    """

    R: int

    def empty(self, N: int, E: int, device: torch.device | str, stack: tuple[int, ...]) -> tuple[Tensor, int]:
        """(codes, all 0; how many rows they have room for)."""
        blocks = -(-N // self.R)
        return torch.zeros(*stack, blocks, E, self.R // 2, dtype=torch.uint8, device=device), blocks * self.R

    def fill(self, packed: Tensor, start: int, codes: Tensor) -> None:
        half = self.R // 2
        row, last = start, start + len(codes)
        while row < last:  # run by run of rows that lie in the same half of the same block
            which_half, place = divmod(row, half)
            block, is_upper = divmod(which_half, 2)
            run = min(half - place, last - row)
            columns = codes[row - start : row - start + run].T
            packed[block, :, place : place + run] |= columns << 4 if is_upper else columns
            row += run

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, E], uint8"""
        by_block = torch.cat((packed & 15, packed >> 4), -1)  # [N / R, E, R]
        return by_block.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Tiles:
    """The order that a GPU's kernel wants (gpu/products.py): [N / 64, E / 128, 64, 32] words, 64 x 128 codes to a tile.

    A word of 16 bits holds four codes of a row: counted from the lowest bits, number m of word i is column 32 m + i of
    the tile. So the kernel reads a tile at one stroke, and 32 columns that follow each other come from one shift.
    """

    ROWS = 64
    COLUMNS = 128
    WORDS = 32  # of a row

    def empty(self, N: int, E: int, device: torch.device | str, stack: tuple[int, ...]) -> tuple[Tensor, int]:
        """(codes, all 0; how many rows they have room for)."""
        down, across = -(-N // self.ROWS), -(-E // self.COLUMNS)
        codes = torch.zeros(*stack, down, across, self.ROWS, self.WORDS, dtype=torch.int16, device=device)
        return codes, down * self.ROWS

    def fill(self, packed: Tensor, start: int, codes: Tensor) -> None:
        n, E = codes.shape
        across = packed.shape[1]
        whole_tiles = F.pad(codes.short(), (0, -E % self.COLUMNS))
        words = torch.zeros(n, across, self.WORDS, dtype=torch.int16, device=packed.device)
        for number, columns in enumerate(whole_tiles.view(n, across, 4, self.WORDS).unbind(2)):
            words |= columns << 4 * number
        row = torch.arange(start, start + n, device=packed.device)
        packed[row // self.ROWS, :, row % self.ROWS] = words

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, E], uint8"""
        numbers = [(packed >> 4 * number & 15).to(torch.uint8) for number in range(4)]
        tiles = torch.stack(numbers, 3).flatten(3)  # [N / 64, E / 128, 64, 128]
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


Layout = BlocksOfRows | Tiles


def layout_for(device: torch.device) -> Layout:
    if device.type == "cuda":
        return Tiles()
    return layout_of_pytorch()


@functools.cache
def layout_of_pytorch() -> Layout:
    """The order of codes that PyTorch's product on this CPU wants, if we know it; else any.

    It depends on the width of the CPU's registers, and nothing tells it: so some codes are packed, and looked at.
    """
    codes = torch.randint(16, (64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError):  # PyTorch has none, or not for this CPU
        return Tiles()
    for layout in (BlocksOfRows(64), BlocksOfRows(32)):
        ours, _ = layout.empty(64, 64, "cpu", ())
        layout.fill(ours, 0, codes)
        if torch.equal(ours.flatten(), theirs.flatten()):
            return layout
    return Tiles()


# ---- 4 bits: the matrix


@dataclass
class FourBit:
    """w[n, e] = (code[n, e] - zero[e // group, n]) * scale[e // group, n], for codes from 0 to 15.

    N and E are rounded up to what the layout of the codes holds; nobody reads what is there.
    """

    codes: Tensor  # in the order of `layout`; with one axis more, X, in a stack
    scale: Tensor  # [E / group, N], or [X, E / group, N]
    zero: Tensor  # uint8, of the same shape
    layout: Layout
    shape: tuple[int, int]  # (N, E), not rounded
    scales_and_shifts: Tensor | None = None  # for PyTorch's product, when it has been asked for: see `prepare`

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale.shape[-2]

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type == "cpu" and self.suits_pytorch(x):
            return self.times_by_pytorch(x, bias)
        return times_parts(x, self.unpacked(x.dtype), bias)

    def suits_pytorch(self, x: Tensor) -> bool:
        is_faster = x.dtype == torch.bfloat16 or len(x) <= ROWS_OF_OTHER_DTYPES
        return is_faster and self.can_be_prepared(x.dtype)

    def can_be_prepared(self, dtype: torch.dtype) -> bool:
        """Is there a product of PyTorch's for it, on a CPU?"""
        right_order = isinstance(self.layout, BlocksOfRows) and self.group in GROUPS_OF_PYTORCH
        return right_order and dtype != torch.float64

    def bytes_to_prepare(self, dtype: torch.dtype) -> int:
        """What `prepare` takes, on a CPU."""
        return 2 * self.scale.numel() * dtype.itemsize if self.can_be_prepared(dtype) else 0

    def times_by_pytorch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.prepare(x.dtype)
        blocks, E, half = self.codes.shape
        codes = self.codes.view(blocks * 2 * half, E // 2)  # the shape that it asks for; the same bytes
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, self.group, self.scales_and_shifts)
        product = product[:, : self.shape[0]]
        return with_bias(product, bias)

    def prepare(self, dtype: torch.dtype) -> None:
        """Make what PyTorch's product wants beside the codes: w = (code - 8) * scale + shift, all in one dtype.

        Each is rounded to it by itself: in 16 bits a weight of exactly 0 becomes a fortieth of a scale, at most.
        """
        if self.scales_and_shifts is None or self.scales_and_shifts.dtype != dtype:
            shift = (8 - self.zero.float()) * self.scale.float()
            self.scales_and_shifts = torch.stack((self.scale.to(dtype), shift.to(dtype)), -1)  # [E / group, N, 2]

    def float64(self) -> Tensor:
        is_stack = self.scale.dim() == 3
        if is_stack:
            return torch.stack([expert.float64() for expert in self.experts])
        return self.unpack(torch.float64).cpu()

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, E]."""
        return torch.cat([*self.unpacked(dtype)])

    def unpacked(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same, some rows at a time: whole blocks or tiles."""
        N, E = self.shape
        exact_dtype = torch.promote_types(dtype, torch.float32)
        rows_of_block = self.scale.shape[1] // len(self.codes)
        blocks_at_once = max(1, numbers_at_once(self.codes.device) // (rows_of_block * E))
        start = 0
        for blocks in self.codes.split(blocks_at_once):
            rows = slice(start, min(N, start + len(blocks) * rows_of_block))
            codes = self.layout.unpack(blocks)[: rows.stop - start, :E]
            codes = codes.unflatten(1, (-1, self.group)).to(exact_dtype)  # [rows, E / group, group]
            zero, scale = (part[:, rows].T[..., None].to(exact_dtype) for part in (self.zero, self.scale))
            yield ((codes - zero) * scale).to(dtype).flatten(1)
            start = rows.stop

    def __getitem__(self, expert: int) -> "FourBit":
        return self.experts[expert]

    @functools.cached_property
    def experts(self) -> list["FourBit"]:
        """Of a stack, each matrix: kept, since each keeps what it has prepared."""
        return [FourBit(*parts, self.layout, self.shape) for parts in zip(self.codes, self.scale, self.zero)]

    def fill_codes(self, start: int, codes: Tensor) -> None:
        """Put codes [n, E], uint8, at row `start`. Each row is filled once, after `empty_four_bit`."""
        self.layout.fill(self.codes, start, codes.to(self.codes.device))

    def fill(self, start: int, weight: Tensor) -> None:
        """Put these rows, [n, E], at row `start`: each number becomes the nearest of 16 that its group can have."""
        for first, some in in_few_rows(start, weight):
            some = some.to(self.scale.device, torch.float32).unflatten(1, (-1, self.group))  # [n, E / group, group]
            rows = slice(first, first + len(some))
            lowest = some.amin(2).clamp_max(0)  # so that 0 itself is one of the 16
            highest = some.amax(2).clamp_min(0)
            self.scale[:, rows] = ((highest - lowest) / HIGHEST_CODE_OF_4).clamp_min(SMALLEST).T
            scale = self.scale[:, rows].T.float()  # as it has been stored, rounded
            zero = (-lowest / scale).round().clamp(0, HIGHEST_CODE_OF_4)
            codes = (some / scale[..., None]).round() + zero[..., None]
            self.zero[:, rows] = zero.T.to(torch.uint8)
            self.fill_codes(first, codes.clamp(0, HIGHEST_CODE_OF_4).flatten(1).to(torch.uint8))


def empty_four_bit(
    N: int, E: int, group: int, dtype: torch.dtype, device: torch.device | str, stack: tuple[int, ...] = ()
) -> FourBit:
    """`dtype` is that of the scale; `stack` is (X,) for a matrix of each expert, else ()."""
    layout = layout_for(torch.device(device))
    codes, rows = layout.empty(N, E, device, stack)
    scale = torch.zeros(*stack, E // group, rows, dtype=dtype, device=device)
    return FourBit(codes, scale, torch.zeros_like(scale, dtype=torch.uint8), layout, (N, E))


# ---- matrices of several kinds


@dataclass
class Stacked:
    """Matrices one below the other, each stored in its own way: a checkpoint may pack q, and leave k as it is."""

    parts: list[Matrix]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.join([part.times(x) for part in self.parts], bias)

    def join(self, products: list[Tensor], bias: Tensor | None) -> Tensor:
        """The product, from those with each part."""
        return with_bias(torch.cat(products, -1), bias)

    def float64(self) -> Tensor:
        return torch.cat([part.float64() for part in self.parts])
