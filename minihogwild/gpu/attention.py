"""Concurrent attention on a GPU: one kernel rotates and writes, one goes over the pool's pages, one joins.

What is read from memory, keys and values, are the rows of a matrix product, and the queries of the step its columns.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..attention import LayerCache, Plan, Positions
from ..config import Config
from ..weights import Layer
from .launch import OVERLAPPING, wait_for_predecessor

PROGRAMS = 256  # that share one attention: about two for each processor of a large GPU


# ---- once a step


def positions(plan: Plan, frequencies: Tensor, dtype: torch.dtype) -> Positions:
    """`attention.positions_of`, but for the mask: these kernels compare with `visible` themselves."""
    T, B = plan.offset.shape
    D = 2 * len(frequencies)
    pages_in_order = None
    if plan.lone_block_length > 0:
        count = triton.cdiv(plan.lone_block_length, plan.page_size)
        pages_in_order = plan.page_start.argsort()[:count]
    rotations = frequencies.new_empty(2, T, 1 + B, 1, D, dtype=dtype)
    _rotations[T, 1 + B](
        plan.offset, plan.visible, plan.own, frequencies, rotations, HALF=D // 2,
        WIDTH=triton.next_power_of_2(D // 2), num_warps=1, **OVERLAPPING,
    )  # fmt: skip
    return Positions(
        plan=plan,
        page=None,
        place=None,
        key_rotation=rotations[:, :, 0],
        query_rotation=rotations[:, :, 1:],
        causal_mask=None,
        pages_in_order=pages_in_order,
    )


@triton.jit
def _rotations(offset, visible, own, frequencies, rotations, HALF, WIDTH: tl.constexpr):
    """The first program of a token: to its index in its own block; each other one: by the distance from a block."""
    wait_for_predecessor()
    t = tl.program_id(0).to(tl.int64)
    T = tl.num_programs(0)
    number = tl.program_id(1)
    B = tl.num_programs(1) - 1
    own_block = t * B + tl.load(own + t)
    index = tl.load(visible + own_block) - 1  # a token sees its own block up to and including itself
    position = tl.load(offset + own_block) + index
    start = tl.load(offset + t * B + tl.maximum(number - 1, 0))
    turn = tl.where(number == 0, index, position - start)

    pair = tl.arange(0, WIDTH)
    inside = pair < HALF
    angle = turn.to(tl.float64) * tl.load(frequencies + pair, mask=inside, other=0.0)  # in float32 it would be off
    cos = tl.cos(angle).to(rotations.dtype.element_ty)
    sin = tl.sin(angle).to(rotations.dtype.element_ty)
    cos_at = rotations + (t * (1 + B) + number) * 2 * HALF + pair
    sin_at = cos_at + T * (1 + B) * 2 * HALF
    tl.store(cos_at, cos, mask=inside)
    tl.store(cos_at + HALF, cos, mask=inside)
    tl.store(sin_at, -sin, mask=inside)
    tl.store(sin_at + HALF, sin, mask=inside)


# ---- keys and values into the cache; queries, rotated


def append(qkv: Tensor, layer: Layer, kv: LayerCache, positions: Positions, config: Config) -> Tensor:
    """`PyTorchBackend.append`; the queries come back rotated once for each block: [B, K, T, G, D]."""
    T = len(qkv)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B = positions.query_rotation.shape[2]
    G = H // K
    queries = qkv.new_empty(B, K, T, G, D)
    _append[T, K, B](
        qkv.contiguous(), layer.q_norm, layer.k_norm, positions.key_rotation, positions.query_rotation,
        positions.query_rotation.stride(1), positions.plan.slot, queries, kv.keys, kv.values, config.rms_norm_eps,
        SLOTS=kv.values.shape[1], G=G, PAGE=kv.keys.shape[2], D=D,
        HEADS=triton.next_power_of_2(G), WIDTH=triton.next_power_of_2(D), num_warps=1, **OVERLAPPING,
    )  # fmt: skip
    return queries


@triton.jit
def _append(
    qkv, q_norm, k_norm, key_rotation, query_rotation, ROTATIONS, slots, queries, keys, values, epsilon, SLOTS, G,
    PAGE: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token, and one of the K heads: its G queries, rotated for one block; the first program writes key and value.

    A token's rotations, D numbers each, take ROTATIONS numbers.
    """
    wait_for_predecessor()
    t = tl.program_id(0).to(tl.int64)
    T = tl.num_programs(0)
    k = tl.program_id(1)
    K = tl.num_programs(1)
    block = tl.program_id(2)
    d = tl.arange(0, WIDTH)
    of_token = qkv + t * (G + 2) * K * D
    to_sin = T * ROTATIONS

    head = tl.arange(0, HEADS)[:, None]
    query_at = of_token + (k * G + head) * D
    cos = query_rotation + t * ROTATIONS + block * D
    query = rotated_heads(query_at, head < G, q_norm, cos, to_sin, epsilon, D, WIDTH)  # [HEADS, WIDTH]
    query_to = queries + (((block * K + k) * T + t) * G + head) * D
    tl.store(query_to + d, query.to(queries.dtype.element_ty), mask=(head < G) & (d < D))

    if block == 0:
        slot = tl.load(slots + t)
        one = tl.arange(0, 1)[:, None]  # a table of one head, as rotated_heads takes it
        key_at = of_token + (G * K + k + one) * D
        cos = key_rotation + t * ROTATIONS
        key = rotated_heads(key_at, one < 1, k_norm, cos, to_sin, epsilon, D, WIDTH)  # [1, WIDTH]
        key_to = keys + ((slot // PAGE * K + k) * PAGE + slot % PAGE + one) * D
        tl.store(key_to + d, key.to(keys.dtype.element_ty), mask=d < D)
        value_at = of_token + ((G + 1) * K + k) * D
        value = tl.load(value_at + d, mask=d < D, other=0.0)
        value_to = values + (k.to(tl.int64) * SLOTS + slot) * D
        tl.store(value_to + d, value.to(values.dtype.element_ty), mask=d < D)


@triton.jit
def rotated_heads(x, is_head, weight, cos, to_sin, epsilon, D: tl.constexpr, WIDTH: tl.constexpr):
    """`rope.rotate` of some heads, after the norm where there is one. `sin` lies `to_sin` numbers behind `cos`."""
    d = tl.arange(0, WIDTH)
    other_half = (d + D // 2) % D  # beside each number, the other one of its pair
    inside = d < D
    a = tl.load(x + d, mask=is_head & inside, other=0.0).to(tl.float32)
    b = tl.load(x + other_half, mask=is_head & inside, other=0.0).to(tl.float32)
    if weight is not None:
        mean_square = tl.sum(a * a, 1) / D
        factor = tl.rsqrt(mean_square + epsilon)[:, None]
        a *= factor * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        b *= factor * tl.load(weight + other_half, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + d, mask=inside, other=0.0)
    sine = tl.load(cos + to_sin + d, mask=inside, other=0.0)
    return a * cosine + b * sine


# ---- attention


def attend_to_pages(queries: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """`attention.attend` in one pass over the pool, cut into shares of as many pages each ("flash decoding").

    Each share has a softmax of its own; the results are then added up by the weights of the shares.
    """
    _, K, T, G, D = queries.shape
    plan = positions.plan
    rows = T * G  # that meet the same keys
    # As shared memory allows; by comparisons, so that what is compiled for one T holds for others of the same tile
    if rows <= 16:
        tile = 16
    elif rows <= 32 or kv.keys.dtype.itemsize == 4:
        tile = 32
    else:
        tile = 64
    tiles = triton.cdiv(rows, tile)
    shares = max(1, PROGRAMS // (K * tiles))
    mixed = queries.new_empty(shares, K, rows, D, dtype=torch.float32)
    log2_sums = queries.new_empty(shares, K, rows, dtype=torch.float32)
    _attend[shares, K, tiles](
        queries, kv.keys, kv.values, plan.page_count, plan.page_block, plan.page_start, plan.visible, mixed, log2_sums,
        scale / math.log(2),  # scores by the base 2: a GPU has exp2, and makes exp of it
        SLOTS=kv.values.shape[1], R=rows, B=plan.visible.shape[1], G=G, K=K,
        PAGE=kv.keys.shape[2], D=D, WIDTH=max(16, triton.next_power_of_2(D)), TILE=tile,
        num_warps=4, num_stages=2, **OVERLAPPING,
    )  # fmt: skip
    result = queries.new_empty(T, K * G, D)
    _join[rows, K](
        mixed, log2_sums, result, shares, rows, G,
        D=D, SHARES=triton.next_power_of_2(shares), WIDTH=triton.next_power_of_2(D), num_warps=4, **OVERLAPPING,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["R", "B"])
def _attend(
    queries, keys, values, page_count, page_block, page_start, visible, mixed, log2_sums, scale, SLOTS, R, B, G, K,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows [tile * TILE, (tile + 1) * TILE) of one head over one share of the pages: an online softmax."""
    wait_for_predecessor()
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
        # Of a page that no row here may look into, nothing is read
        numbers = tl.where(tl.max(seen, 0) > 0, D, 0)
        query_at = queries + ((block * K + head) * R + row) * D + d[:, None]
        query = tl.load(query_at, mask=(row < R) & (d[:, None] < D), other=0.0)  # [WIDTH, TILE]
        key = tl.load(keys + ((page * K + head) * PAGE + place) * D + d, mask=d < numbers, other=0.0)  # [PAGE, WIDTH]
        value = tl.load(values + (head * SLOTS + page * PAGE + place) * D + d, mask=d < numbers, other=0.0)
        scores = tl.dot(key, query, input_precision="ieee") * scale  # [PAGE, TILE]
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


@triton.jit(do_not_specialize=["R"])
def _join(
    mixed, log2_sums, result, shares, R, G, D: tl.constexpr, SHARES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One row of one head: what the shares have found, by the weights of the shares."""
    wait_for_predecessor()
    row = tl.program_id(0)
    head = tl.program_id(1)
    K = tl.num_programs(1)
    share = tl.arange(0, SHARES)
    d = tl.arange(0, WIDTH)
    at = ((share * K + head) * R + row).to(tl.int64)
    log2_sum = tl.load(log2_sums + at, mask=share < shares, other=-float("inf"))
    weight = tl.exp2(log2_sum - tl.max(log2_sum, 0))
    inside = (share[:, None] < shares) & (d < D)
    of_shares = tl.load(mixed + at[:, None] * D + d, mask=inside, other=0.0)  # [SHARES, WIDTH]
    joined = tl.sum(of_shares * weight[:, None], 0) / tl.sum(weight, 0)
    token = row // G
    to = (token * K + head) * G + row % G
    tl.store(result + to * D + d, joined.to(result.dtype.element_ty), mask=d < D)


def attend_to_one_block(queries: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """`attend` where all rows see one block alone, as when a prompt is prefilled: PyTorch has FlashAttention for it."""
    _, K, T, _, D = queries.shape
    PAGE = kv.keys.shape[2]
    N = positions.plan.lone_block_length
    pages = positions.pages_in_order
    # To that function each of the K heads is a text of its own, with G heads that look at one: so nothing is copied but
    # what lies in pages.
    keys = kv.keys.transpose(0, 1).index_select(1, pages).view(K, 1, -1, D)[:, :, :N]
    values = kv.values.view(K, -1, PAGE, D).index_select(1, pages).view(K, 1, -1, D)[:, :, :N]
    of_heads = queries[0].transpose(1, 2)  # [K, G, T, D]
    mask = None
    is_whole_block = T == N
    if not is_whole_block:  # the rows are its last
        from torch.nn.attention.bias import causal_lower_right  # not above: it loads PyTorch's compiler, for seconds

        mask = causal_lower_right(T, N)
    mixed = F.scaled_dot_product_attention(
        of_heads, keys, values, mask, is_causal=is_whole_block, scale=scale, enable_gqa=True
    )
    return mixed.permute(2, 0, 1, 3).flatten(1, 2)  # [T, H, D]
