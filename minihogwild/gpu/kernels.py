"""The backend for CUDA: two Triton kernels in place of PyTorch's products, which stay below memory's speed.

Both put what is read from memory (weights, keys) on the rows of a matrix product and the step's few tokens on its
columns: up to 16 of them cost what one does.
"""

import math
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
from ..weights import Dense, Matrix
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
        few_rows = len(x) <= COLUMNS
        half_precision = x.dtype.itemsize == 2
        if isinstance(weight, Dense) and few_rows and half_precision:
            return linear_for_few_rows(x, weight.tensor, bias)
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


def linear_for_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, E] to [T, N] for T up to 16, at the speed of memory. A long sum is cut in parts ("split-K")."""
    (T, E), N = x.shape, len(weight)
    parts = max(1, E // 4096)
    length = triton.cdiv(E, parts * 128) * 128
    sums = x.new_empty(parts, T, N, dtype=torch.float32)
    grid = (triton.cdiv(N, 64), parts)
    _linear[grid](x, weight, sums, T, N, E, LENGTH=length, num_warps=4, num_stages=STAGES)
    total = sum(sums.unbind()) if bias is None else sum(sums.unbind(), bias)
    return total.to(x.dtype)


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
        w = tl.load(weight_rows + e, mask=e < E, other=0.0)  # [64, 128]
        y = tl.load(x + t * E + e[:, None], mask=(t < T) & (e[:, None] < E), other=0.0)  # [128, 16]
        total = tl.dot(w, y, total)
    tl.store(sums + (part * T + t) * N + n[:, None], total, mask=(t < T) & (n[:, None] < N))


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
