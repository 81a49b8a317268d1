"""The backend for CUDA: Triton kernels in place of PyTorch's products, which stay below memory's speed.

Both put what is read from memory (weights, keys) on the rows of a matrix product and the step's few tokens on its
columns: up to 16 of them cost what one does.
"""

import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..attention import LayerCache, Plan, Positions, rotate_for_each_block
from ..backend import PyTorchBackend
from ..config import Config
from ..packed import EightBit, FourBit, Stacked, Tiles
from ..weights import Dense, Matrix, with_bias
from .recorded import RecordedSteps

SHARED_MEMORY = 0  # bytes that one program may have
if torch.cuda.is_available():
    SHARED_MEMORY = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
STAGES = 6 if SHARED_MEMORY >= 2**17 else 4  # tiles of a weight on their way at once, 20 KB each with x's
COLUMNS = 16  # the fewest of a tensor core's product
PROGRAMS = 256  # that share one attention: about two for each processor of a large GPU


class TritonBackend(PyTorchBackend):
    """Kernels for few rows; PyTorch's products for many. Decode steps are recorded."""

    def __init__(self):
        self.recorded = RecordedSteps()

    def prefill_chunk(self, prompt_length: int, config: Config) -> int:
        return 1024  # these kernels keep no scores

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Stacked):
            product = torch.cat([self.linear(x, part) for part in weight.parts], -1)
            return with_bias(product, bias)
        few_rows = len(x) <= COLUMNS
        half_precision = x.dtype.itemsize == 2
        if half_precision and isinstance(weight, FourBit) and suits_kernel(weight):
            if few_rows:
                return linear_in_four_bit(x, weight, bias)
            return F.linear(x, unpack_four_bit(weight, x.dtype), bias)
        if half_precision and few_rows and isinstance(weight, Dense):
            return linear_for_few_rows(x, weight.tensor, None, bias)
        if half_precision and few_rows and isinstance(weight, EightBit):
            return linear_for_few_rows(x, weight.codes, weight.scale, bias)
        return weight.times(x, bias)

    def causal_mask(self, plan: Plan, dtype: torch.dtype) -> None:
        return None  # the kernel compares with `visible` itself

    def attend(self, q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
        reads_one_block = positions.plan.lone_block_length > 0
        if reads_one_block and len(q) > COLUMNS and kv.keys.dtype.itemsize == 2:
            return attend_to_one_block(q, kv, positions, scale)
        return attend_to_pages(q, kv, positions, scale)

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        one_token_each = len(plan.last) == len(plan.offset)
        waits_for_device = any(kind.experts for kind in config.layer_kinds)  # as `mixture_of_experts` does
        if one_token_each and cache.device.type == "cuda" and not waits_for_device:
            return self.recorded.play(forward, tokens, weights, config, cache, plan)
        return forward(tokens, weights, config, cache, plan)


# ---- products of few rows


def linear_for_few_rows(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, E] to [T, N] for T up to 16, at the speed of memory. A long sum is cut in parts ("split-K").

    `weight` [N, E] is in x's dtype; or in 8 bits, and `scale` [N] is that of its rows.
    """
    (T, E), N = x.shape, len(weight)
    parts = max(1, E // 4096)
    length = triton.cdiv(E, parts * 128) * 128
    sums = x.new_empty(parts, T, N, dtype=torch.float32)
    grid = (triton.cdiv(N, 64), parts)
    _linear[grid](x, weight, sums, T, N, E, LENGTH=length, num_warps=4, num_stages=STAGES)
    return total_of(sums, scale, bias, x.dtype)


def total_of(sums: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of the parts, [parts, T, N], all in one; one kernel, where this is compiled."""
    total = sum(sums.unbind())
    if scale is not None:
        total = total * scale
    return with_bias(total, bias).to(dtype)


@triton.jit(do_not_specialize=["T"])  # else it is compiled anew for 1 and 16
def _linear(x, weight, sums, T, N, E, LENGTH: tl.constexpr):
    """64 rows of the weight, columns [part * LENGTH, (part + 1) * LENGTH) of them, times x."""
    n = tl.program_id(0) * 64 + tl.arange(0, 64)
    t = tl.arange(0, 16)
    part = tl.program_id(1)
    weight_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * E
    total = tl.zeros([64, 16], tl.float32)
    for start in range(part * LENGTH, (part + 1) * LENGTH, 128):
        e = start + tl.arange(0, 128)
        w = tl.load(weight_rows + e, mask=e < E, other=0)  # [64, 128]
        y = tl.load(x + t * E + e[:, None], mask=(t < T) & (e[:, None] < E), other=0.0)  # [128, 16]
        total = tl.dot(w.to(y.dtype), y, total)
    tl.store(sums + (part * T + t) * N + n[:, None], total, mask=(t < T) & (n[:, None] < N))


# ---- products with weights in 4 bits

# A number from 0 to 15 becomes one with a fraction by setting the exponent's bits: those of 128 in bfloat16, of 1024 in
# float16. It is then 128 (or 1024) too large; so the zero point is made larger by as much.
EXPONENT_OF = {torch.bfloat16: (0x4300, 128), torch.float16: (0x6400, 1024)}
FOUR_BIT_PROGRAMS = 1024  # that share one product, about
FOUR_BIT_STAGES = 4  # tiles on their way at once
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def suits_kernel(weight: FourBit) -> bool:
    """Does each group begin and end where 32 columns do, or a tile does?"""
    return isinstance(weight.layout, Tiles) and (weight.group % 128 == 0 or weight.group in (32, 64))


def linear_in_four_bit(x: Tensor, weight: FourBit, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, E] to [T, N] for T up to 16. As above, a long sum is cut in parts."""
    T, (N, E) = len(x), weight.shape
    down, across = weight.codes.shape[:2]
    parts = max(1, min(FOUR_BIT_PROGRAMS // down, across // 4))
    tiles_each = triton.cdiv(across, parts)
    exponent, offset = EXPONENT_OF[x.dtype]
    sums = x.new_empty(parts, T, N, dtype=torch.float32)
    _linear_in_four_bit[down, parts](
        x, weight.codes, weight.scale, weight.zero, sums, T, N, E, len(weight.scale), across, weight.group, tiles_each,
        GROUP=min(weight.group, 128), EXPONENT=exponent, OFFSET=offset, COLUMNS=8 if T <= 8 else 16,
        num_warps=1, num_stages=FOUR_BIT_STAGES,
    )  # fmt: skip
    return total_of(sums, None, bias, x.dtype)


@triton.jit(do_not_specialize=["T", "TILES"])
def _linear_in_four_bit(
    x, codes, scale, zero, sums, T, N, E, GROUPS, ACROSS, group, TILES,
    GROUP: tl.constexpr, EXPONENT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """64 rows of the weight, which are a row of ACROSS tiles: TILES tiles of them, times x.

    Of a group, sum((code - zero) * x) is sum(code * x) - zero * sum(x); the second sum is a product with ones.
    """
    down = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, 64)
    n = down * 64 + row
    t = tl.arange(0, COLUMNS)
    i = tl.arange(0, 32)
    room = tl.num_programs(0) * 64  # N, rounded up to whole tiles
    words = codes + down.to(tl.int64) * ACROSS * 2048 + row[:, None] * 32 + i
    ones = tl.full([64, 32], 1.0, x.dtype.element_ty)
    total = tl.zeros([64, COLUMNS], tl.float32)
    for tile in range(part * TILES, tl.minimum((part + 1) * TILES, ACROSS)):
        word = tl.load(words + tile * 2048)  # [64, 32]
        of_group = tl.zeros([64, COLUMNS], tl.float32)
        sum_of_x = tl.zeros([64, COLUMNS], tl.float32)
        for number in tl.static_range(4):
            e = tile * 128 + number * 32 + i
            y = tl.load(x + t * E + e[:, None], mask=(t < T) & (e[:, None] < E), other=0.0)  # [32, COLUMNS]
            code = code_of(word, 4 * number, EXPONENT).to(y.dtype, bitcast=True)
            of_group = tl.dot(code, y, of_group)
            sum_of_x = tl.dot(ones, y, sum_of_x)
            ends_group = (number + 1) * 32 % GROUP == 0
            if ends_group:
                g = tl.minimum((tile * 128 + number * 32) // group, GROUPS - 1)  # past E is no group, and x is 0
                z = tl.load(zero + g * room + n).to(tl.float32) + OFFSET
                s = tl.load(scale + g * room + n).to(tl.float32)
                total += (of_group - z[:, None] * sum_of_x) * s[:, None]
                of_group = tl.zeros([64, COLUMNS], tl.float32)
                sum_of_x = tl.zeros([64, COLUMNS], tl.float32)
    tl.store(sums + (part * T + t) * N + n[:, None], total, mask=(t < T) & (n[:, None] < N))


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
    _unpack_four_bit[down, across](weight.codes, weight.scale, weight.zero, matrix, N, E, across, weight.group)
    return matrix


@triton.jit
def _unpack_four_bit(codes, scale, zero, matrix, N, E, ACROSS, group):
    """One tile."""
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


# ---- attention


def attend_to_pages(q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """`attention.attend` in one pass over the pool, cut into shares of as many pages each ("flash decoding").

    Each share has a softmax of its own; the results are then added up by the weights of the shares.
    """
    (T, H, D), K = q.shape, kv.keys.shape[1]
    plan = positions.plan
    rows = T * H // K  # that meet the same keys
    # As shared memory allows; by comparisons, so that what is compiled for one T holds for others of the same tile
    if rows <= 16:
        tile = 16
    elif rows <= 32 or kv.keys.dtype.itemsize == 4:
        tile = 32
    else:
        tile = 64
    tiles = triton.cdiv(rows, tile)
    shares = max(1, PROGRAMS // (K * tiles))
    # Scores by the base 2: a GPU has exp2, and makes exp of it.
    queries = rotate_for_each_block(q, positions, K) * (scale / math.log(2))  # [B, K, T, G, D]
    # `contiguous` by itself: where G is 1, reshape copies nothing.
    queries = queries.to(kv.keys.dtype).reshape(-1, K, rows, D).contiguous()
    mixed = q.new_empty(shares, K, rows, D, dtype=torch.float32)
    log2_sums = q.new_empty(shares, K, rows, dtype=torch.float32)
    _attend[shares, K, tiles](
        queries, kv.keys, kv.values, plan.page_count, plan.page_block, plan.page_start, plan.visible, mixed, log2_sums,
        SLOTS=kv.values.shape[1], R=rows, B=plan.visible.shape[1], G=H // K, K=K,
        PAGE=kv.keys.shape[2], D=D, WIDTH=max(16, triton.next_power_of_2(D)), TILE=tile,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    log2_sums = log2_sums[..., None].expand_as(mixed)  # so that all of this becomes one kernel
    weight_of_share = (log2_sums - log2_sums.amax(0)).exp2()
    mixed = (mixed * weight_of_share).sum(0) / weight_of_share.sum(0)  # [K, T G, D]
    return mixed.view(K, T, -1, D).transpose(0, 1).reshape(T, H, D).to(q.dtype)


@triton.jit(do_not_specialize=["R", "B"])
def _attend(
    queries, keys, values, page_count, page_block, page_start, visible, mixed, log2_sums, SLOTS, R, B, G, K,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows [tile * TILE, (tile + 1) * TILE) of one head over one share of the pages: an online softmax."""
    share = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, PAGE).to(tl.int64)[:, None]
    d = tl.arange(0, WIDTH)
    pages = tl.load(page_count)
    pages_each = tl.cdiv(pages, tl.num_programs(0))

    highest = tl.full([TILE], -1e30, tl.float32)  # score so far
    total = tl.zeros([TILE], tl.float32)  # of exp2(score - highest)
    mix = tl.zeros([WIDTH, TILE], tl.float32)  # of values, by the same weights
    for page in range(share * pages_each, tl.minimum((share + 1) * pages_each, pages)):
        block = tl.load(page_block + page)
        # How many of this page's tokens the row may see: all from 0 to PAGE, and beyond on both sides
        seen = tl.load(visible + row // G * B + block, mask=row < R, other=0) - tl.load(page_start + page)
        query_at = queries + ((block * K + head) * R + row) * D + d[:, None]
        query = tl.load(query_at, mask=(row < R) & (d[:, None] < D), other=0.0)  # [WIDTH, TILE]
        key = tl.load(keys + ((page * K + head) * PAGE + place) * D + d, mask=d < D, other=0.0)  # [PAGE, WIDTH]
        value = tl.load(values + (head * SLOTS + page * PAGE + place) * D + d, mask=d < D, other=0.0)
        scores = tl.dot(key, query, input_precision="ieee")  # [PAGE, TILE]
        scores = tl.where(place < seen, scores, -float("inf"))  # the causal mask
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        shrink = tl.exp2(highest - new_highest)  # what was added up before, seen from the new highest score
        weight = tl.exp2(scores - new_highest)
        total = total * shrink + tl.sum(weight, 0)
        mix = tl.dot(value.T, weight.to(value.dtype), mix * shrink, input_precision="ieee")
        highest = new_highest

    at = (share * K + head) * R + row
    tl.store(log2_sums + at, tl.log2(total) + highest, mask=row < R)
    tl.store(mixed + at * D + d[:, None], mix / tl.maximum(total, 1e-30), mask=(row < R) & (d[:, None] < D))


def attend_to_one_block(q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """`attend` where all rows see one block alone, as when a prompt is prefilled: PyTorch has FlashAttention for it."""
    (T, H, D), (_, K, PAGE, _) = q.shape, kv.keys.shape
    plan = positions.plan
    N = plan.lone_block_length
    pages_in_order = plan.page_start.argsort()[: triton.cdiv(N, PAGE)]
    keys = kv.keys[pages_in_order].transpose(0, 1).reshape(1, K, -1, D)[:, :, :N]
    values = kv.values.view(K, -1, PAGE, D)[:, pages_in_order].view(1, K, -1, D)[:, :, :N]
    queries = rotate_for_each_block(q, positions, K)[0].transpose(1, 2).reshape(1, H, T, D).to(keys.dtype)
    mask = causal_lower_right(T, N)  # the rows are the block's last
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)
