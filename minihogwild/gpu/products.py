"""Products of a weight matrix and a few rows, at the speed of memory: plain weights, and those in 8 and 4 bits.

What is read from memory, the weights, are the rows of a matrix product, and the step's few tokens its columns: up to 16
of them cost what one does. A long sum is cut in parts, which a kernel of its own adds up ("split-K").

With experts the columns come in groups (see `experts.py`): each group has a matrix of its own.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import FourBit, Tiles
from .experts import Groups, ungrouped
from .launch import OVERLAPPING, wait_for_predecessor
from .pointwise import swiglu_of

SHARED_MEMORY = 0  # bytes that one program may have
if torch.cuda.is_available():
    SHARED_MEMORY = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
FEW_ROWS = 16  # the fewest columns of a tensor core's product
LONG_SUM = 8192  # columns of a plain weight: of each so many, two programs share the sum
FOUR_BIT_PROGRAMS = 1792  # that share one product, about
EIGHT_BIT_PROGRAMS = 512
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which reads no assembly


def linear_for_few_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: Groups | None = None,
    gated: bool = False,
) -> Tensor:
    """x Wᵀ + bias, [T, E] to [T, N] for T up to 16; with groups, a row of the result for each pair.

    `weight` [N, E] is in x's dtype; or in 8 bits, and `scale` [N] is that of its rows. With groups both are stacks.
    With `gated`, the product's SwiGLU: [T, N / 2]; for N / 2 a multiple of 32, and without groups.
    """
    N, E = weight.shape[-2:]
    if groups is not None or gated:
        parts = 1  # there are programs enough
    elif weight.dtype == torch.int8:
        parts = max(1, min(EIGHT_BIT_PROGRAMS // triton.cdiv(N, 64), E // 512))
    else:
        parts = max(1, 2 * (E // LONG_SUM))
    return total_of(parts_of_product(x, weight, parts, scale, bias, groups, gated), scale, bias, x.dtype)


def parts_of_product(
    x: Tensor,
    weight: Tensor,
    parts: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    groups: Groups | None = None,
    gated: bool = False,
) -> Tensor:
    """Of x Wᵀ, the sums over so many parts of the columns: [parts, T, N], in float32.

    Where there is one part, it is the result: with scale and bias, in x's dtype.
    """
    N, E = weight.shape[-2:]
    groups = groups or ungrouped(x, FEW_ROWS)
    sums = room_for_parts(x, parts, groups, N // 2 if gated else N)
    if weight.dtype == torch.int8 and x.dtype == torch.bfloat16:
        # Two warps multiply each for itself (four would do it together): codes stay where they were unpacked.
        tile, warps, stages = 256, 2, 3
    else:
        tile, warps = 128, 4
        bytes_of_tiles = tile * (64 + groups.width) * x.itemsize
        # Tiles on their way, as many as leave room for a second program: so one begins while another ends.
        stages = max((n for n in (2, 3, 4, 5) if 2 * n * bytes_of_tiles < SHARED_MEMORY), default=2)
    _linear[triton.cdiv(N, 64), parts, groups.count](
        x, weight, scale, bias, sums, groups.expert, groups.pair, groups.pairs // len(x), groups.pairs, N, E,
        LENGTH=triton.cdiv(E, parts * tile) * tile, TILE=tile, COLUMNS=groups.width, SPLIT=parts > 1, GATED=gated,
        num_warps=warps, num_stages=stages, **OVERLAPPING,
    )  # fmt: skip
    return sums


def room_for_parts(x: Tensor, parts: int, groups: Groups, N: int) -> Tensor:
    return x.new_empty(parts, groups.pairs, N, dtype=torch.float32 if parts > 1 else x.dtype)


def total_of(sums: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the parts, [parts, T, N], times the scale of its rows, plus bias; one part is that already."""
    parts, T, N = sums.shape
    if parts == 1:
        return sums[0]
    total = sums.new_empty(T, N, dtype=dtype)
    PARTS = triton.next_power_of_2(parts)
    block = max(128, 4096 // PARTS)
    _total[triton.cdiv(T * N, block),](
        sums, scale, bias, total, T * N, N, parts, PARTS=PARTS, BLOCK=block, num_warps=4, **OVERLAPPING
    )
    return total


@triton.jit(do_not_specialize=["TN", "parts"])
def _total(sums, scale, bias, total, TN, N, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers; all parts of them at once, since each waits for memory alike."""
    wait_for_predecessor()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)[:, None]
    several = tl.load(sums + part * TN + at, mask=(part < parts) & (at < TN), other=0.0)  # [PARTS, BLOCK]
    result = tl.sum(several, 0)
    if scale is not None:
        result *= tl.load(scale + at % N).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + at % N).to(tl.float32)
    tl.store(total + at, result.to(total.dtype.element_ty), mask=at < TN)


# ---- plain weights, and 8 bits


@triton.jit(do_not_specialize=["T", "SHARING"])  # else it is compiled anew for 1 and 16
def _linear(
    x, weight, scale, bias, sums, expert_of_group, pair_of_group, SHARING, T, N, E,
    LENGTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """64 rows of the weight, columns [part * LENGTH, (part + 1) * LENGTH) of them, times some rows of x.

    With GATED, 32 of the gate's rows, and behind them the same ones of `up`.
    """
    wait_for_predecessor()
    row = tl.arange(0, 64)
    n = tl.program_id(0) * 64 + row
    if GATED:
        n = tl.program_id(0) * 32 + row % 32 + row // 32 * (N // 2)
    part = tl.program_id(1)
    expert, target, source = rows_of_group(expert_of_group, pair_of_group, SHARING, T, COLUMNS)
    matrix = tl.full([], tl.maximum(expert, 0), tl.int64)
    weight_rows = weight + (matrix * N + tl.minimum(n, N - 1))[:, None] * E
    stop = 0 if expert < 0 else (part + 1) * LENGTH
    total = tl.zeros([64, COLUMNS], tl.float32)
    for start in range(part * LENGTH, stop, TILE):
        e = start + tl.arange(0, TILE)
        w = tl.load(weight_rows + e, mask=e < E, other=0)  # [64, TILE]
        inside = (target >= 0) & (e[:, None] < E)
        y = tl.load(x + source * E + e[:, None], mask=inside, other=0.0)  # [TILE, COLUMNS]
        if w.dtype == tl.int8 and y.dtype == tl.bfloat16 and not INTERPRETED:
            w = bfloat16_of(w)
        total = tl.dot(w.to(y.dtype), y, total, input_precision="ieee")
    if scale is not None and not SPLIT:
        total *= tl.load(scale + matrix * N + n, mask=n < N, other=0).to(tl.float32)[:, None]
    if GATED:
        total = total.to(sums.dtype.element_ty).to(tl.float32)  # as if it had been stored in between
        gate, up = total.reshape(2, 32, COLUMNS).permute(1, 2, 0).split()  # [32, COLUMNS] each
        n = tl.program_id(0) * 32 + tl.arange(0, 32)
        store_product(sums, bias, swiglu_of(gate, up), n, target, target, N // 2, SPLIT)
    else:
        store_product(sums, bias, total, n, part * T + target, target, N, SPLIT)


@triton.jit
def bfloat16_of(code):
    """Whole numbers of 8 bits, four at a time, in two instructions for each. (Triton's own would be six.)

    A code is its lower 7 bits, less 128 if the highest is set. With the exponent of 128 the first become 128 + them,
    the highest bit becomes -128 or -256; the sum is the code. (It is taken as low * 1 + high, for cards before the
    H100 can't add two pairs in bfloat16.)
    """
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 pair, low, high, ones;
            mov.b32 ones, 0x3F803F80;
            prmt.b32 pair, $2, 0, 0x4140;
            lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 high, pair, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $0, low, ones, high;
            prmt.b32 pair, $2, 0, 0x4342;
            lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 high, pair, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $1, low, ones, high;
        }""",
        "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def rows_of_group(expert_of_group, pair_of_group, SHARING, T, COLUMNS: tl.constexpr):
    """(the matrix; for each column the row of the result, -1 for none; and the row of x) of this program's group."""
    t = tl.arange(0, COLUMNS)
    if expert_of_group is None:
        expert = 0
        target = tl.where(t < T, t, -1)
        source = tl.minimum(t, T - 1)
    else:
        group = tl.program_id(2)
        expert = tl.load(expert_of_group + group)
        target = tl.load(pair_of_group + group * COLUMNS + t)
        source = tl.maximum(target, 0) // SHARING
    return expert, target, source


@triton.jit
def store_product(sums, bias, total, n, row, target, N, SPLIT: tl.constexpr):
    if bias is not None and not SPLIT:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    at = sums + row.to(tl.int64) * N + n[:, None]
    tl.store(at, total.to(sums.dtype.element_ty), mask=(target >= 0) & (n[:, None] < N))


# ---- 4 bits

# A number from 0 to 15 becomes one with a fraction by setting the exponent's bits: those of 128 in bfloat16, of 1024 in
# float16. It is then 128 (or 1024) too large; so the zero point is made larger by as much.
EXPONENT_OF = {torch.bfloat16: (0x4300, 128), torch.float16: (0x6400, 1024)}


def suits_kernel(weight: FourBit) -> bool:
    """Does each group begin and end where 32 columns do, or a tile does?"""
    return isinstance(weight.layout, Tiles) and (weight.group % 128 == 0 or weight.group in (32, 64))


def linear_in_four_bit(x: Tensor, weight: FourBit, bias: Tensor | None, groups: Groups | None = None) -> Tensor:
    """As `linear_for_few_rows`."""
    N, E = weight.shape
    down, across = weight.codes.shape[-4:-2]
    parts = 1 if groups is not None else max(1, min(FOUR_BIT_PROGRAMS // down, across // 4))
    groups = groups or ungrouped(x, 8 if len(x) <= 8 else FEW_ROWS)
    sums = room_for_parts(x, parts, groups, N)
    exponent, offset = EXPONENT_OF[x.dtype]
    _linear_in_four_bit[down, parts, groups.count](
        x, weight.codes, weight.scale, weight.zero, bias, sums, groups.expert, groups.pair, groups.pairs // len(x),
        groups.pairs, N, E, weight.scale.shape[-2], across, weight.group, triton.cdiv(across, parts),
        GROUP=min(weight.group, 128), EXPONENT=exponent, OFFSET=offset, COLUMNS=groups.width, SPLIT=parts > 1,
        num_warps=1, num_stages=3, **OVERLAPPING,
    )  # fmt: skip
    return total_of(sums, None, bias, x.dtype)


@triton.jit(do_not_specialize=["T", "TILES", "SHARING"])
def _linear_in_four_bit(
    x, codes, scale, zero, bias, sums, expert_of_group, pair_of_group, SHARING, T, N, E, GROUPS, ACROSS, group, TILES,
    GROUP: tl.constexpr, EXPONENT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """64 rows of the weight, which are a row of ACROSS tiles: TILES tiles of them, times some rows of x.

    Of a group, sum((code - zero) * x) is sum(code * x) - zero * sum(x); the second sum is a product with ones.
    """
    wait_for_predecessor()
    down = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, 64)
    n = down * 64 + row
    i = tl.arange(0, 32)
    room = tl.num_programs(0) * 64  # N, rounded up to whole tiles
    expert, target, source = rows_of_group(expert_of_group, pair_of_group, SHARING, T, COLUMNS)
    matrix = tl.full([], tl.maximum(expert, 0), tl.int64)
    words = codes + (matrix * tl.num_programs(0) + down) * ACROSS * 2048 + row[:, None] * 32 + i
    scale_of_row = scale + matrix * GROUPS * room + n
    zero_of_row = zero + matrix * GROUPS * room + n
    stop = 0 if expert < 0 else tl.minimum((part + 1) * TILES, ACROSS)
    ones = tl.full([64, 32], 1.0, x.dtype.element_ty)
    total = tl.zeros([64, COLUMNS], tl.float32)
    for tile in range(part * TILES, stop):
        word = tl.load(words + tile * 2048)  # [64, 32]
        of_group = tl.zeros([64, COLUMNS], tl.float32)
        sum_of_x = tl.zeros([64, COLUMNS], tl.float32)
        for number in tl.static_range(4):
            e = tile * 128 + number * 32 + i
            y = tl.load(x + source * E + e[:, None], mask=(target >= 0) & (e[:, None] < E), other=0.0)  # [32, COLUMNS]
            code = code_of(word, 4 * number, EXPONENT).to(y.dtype, bitcast=True)
            of_group = tl.dot(code, y, of_group)
            sum_of_x = tl.dot(ones, y, sum_of_x)
            ends_group = (number + 1) * 32 % GROUP == 0
            if ends_group:
                g = tl.minimum((tile * 128 + number * 32) // group, GROUPS - 1)  # past E is no group, and x is 0
                z = tl.load(zero_of_row + g * room).to(tl.float32) + OFFSET
                s = tl.load(scale_of_row + g * room).to(tl.float32)
                total += (of_group - z[:, None] * sum_of_x) * s[:, None]
                of_group = tl.zeros([64, COLUMNS], tl.float32)
                sum_of_x = tl.zeros([64, COLUMNS], tl.float32)
    store_product(sums, bias, total, n, part * T + target, target, N, SPLIT)


@triton.jit
def code_of(word, SHIFT: tl.constexpr, EXPONENT: tl.constexpr):
    """The four bits at SHIFT of each word, with this exponent."""
    if INTERPRETED:
        return word >> SHIFT & 15 | EXPONENT
    # Two words at a time, which lie in one register, by two instructions. (Triton's own would be five.)
    BOTH: tl.constexpr = EXPONENT << 16 | EXPONENT
    AND_THEN_OR: tl.constexpr = 0xEA  # of three numbers a, b, c: (a & b) | c
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 a; shr.u32 a, $1, {SHIFT}; lop3.b32 $0, a, 0x000F000F, {BOTH}, {AND_THEN_OR}; }}",
        "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2,
    )  # fmt: skip


def unpack_four_bit(weight: FourBit, dtype: torch.dtype) -> Tensor:
    """The matrix [N, E], for an ordinary product with many rows."""
    N, E = weight.shape
    matrix = torch.empty(N, E, dtype=dtype, device=weight.codes.device)
    down, across = weight.codes.shape[:2]
    _unpack_four_bit[down, across](
        weight.codes, weight.scale, weight.zero, matrix, N, E, across, weight.group, **OVERLAPPING
    )
    return matrix


@triton.jit
def _unpack_four_bit(codes, scale, zero, matrix, N, E, ACROSS, group):
    """One tile."""
    wait_for_predecessor()
    down = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.arange(0, 64)
    i = tl.arange(0, 32)
    n = down * 64 + row
    room = tl.num_programs(0) * 64
    word = tl.load(codes + (down.to(tl.int64) * ACROSS + tile) * 2048 + row[:, None] * 32 + i)  # [64, 32]
    for number in tl.static_range(4):
        e = tile * 128 + number * 32 + i
        inside = (n[:, None] < N) & (e < E)
        at = e // group * room + n[:, None]
        z = tl.load(zero + at, mask=inside, other=0).to(tl.float32)
        s = tl.load(scale + at, mask=inside, other=0).to(tl.float32)
        w = ((word >> 4 * number & 15).to(tl.float32) - z) * s
        tl.store(matrix + n[:, None].to(tl.int64) * E + e, w.to(matrix.dtype.element_ty), mask=inside)
