"""`attention.linear` and `attend` as two Triton kernels, for CUDA: PyTorch's own products stay below memory's speed.

Both put what is read from memory (weights, keys) on the rows of a matrix product and the step's few tokens on its
columns: up to 16 of them cost what one does.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .attention import Plan, Sight, turned

SHARED = torch.cuda.is_available() and torch.cuda.get_device_properties(0).shared_memory_per_block_optin
STAGES = 6 if SHARED >= 2**17 else 4  # tiles of a weight on their way at once, 20 KB each with x's
COLUMNS = 16  # the fewest of a tensor core's product
PROGRAMS = 256  # that share one attention: about two for each processor of a large GPU


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, [T, E] to [T, N]; for few tokens at the speed of memory. What is short is split along E too."""
    (T, E), N = x.shape, len(weight)
    if T > COLUMNS or x.dtype.itemsize > 2:
        return F.linear(x, weight, bias)
    parts = max(1, E // 4096)
    out = x.new_empty(parts, T, N, dtype=torch.float32)
    grid = triton.cdiv(N, 64), parts
    _linear[grid](x, weight, out, T, N, E, triton.cdiv(E, parts * 128) * 128, num_warps=4, num_stages=STAGES)
    return (sum(out.unbind()) if bias is None else sum(out.unbind(), bias)).to(x.dtype)


@triton.jit(do_not_specialize=["T"])  # else it is compiled anew for 1 and 16
def _linear(x, weight, out, T, N, E, LENGTH: tl.constexpr):
    """Columns [part * LENGTH, (part + 1) * LENGTH) of 64 rows of the weight, times x."""
    n, t = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, 16)
    start = tl.program_id(1) * LENGTH
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * E
    total = tl.zeros([64, 16], tl.float32)
    for at in range(start, start + LENGTH, 128):
        e = at + tl.arange(0, 128)
        w = tl.load(rows + e, mask=e < E, other=0.0)
        y = tl.load(x + t * E + e[:, None], mask=(t < T) & (e[:, None] < E), other=0.0)
        total = tl.dot(w, y, total)
    tl.store(out + (tl.program_id(1) * T + t) * N + n[:, None], total, mask=(t < T) & (n[:, None] < N))


def attend(q: Tensor, keys: Tensor, values: Tensor, plan: Plan, sight: Sight, scale: float) -> Tensor:
    """`attention.attend`: the pool in S shares of as many pages; each gives its own softmax, and their weights."""
    (T, H, D), K = q.shape, keys.shape[1]
    if plan.only and T > COLUMNS and keys.dtype.itemsize == 2:
        return flash(q, keys, values, plan, sight, scale)
    R = T * H // K  # rows that meet the same keys
    # As shared memory allows; by comparisons, so that what is compiled for one T holds for others of the same M
    M = 16 if R <= 16 else 32 if R <= 32 or keys.dtype.itemsize == 4 else 64
    S = max(1, PROGRAMS // (K * triton.cdiv(R, M)))
    queries = turned(q, sight, K) * (scale / math.log(2))  # so that scores are powers of two
    queries = queries.to(keys.dtype).reshape(-1, K, R, D).contiguous()  # where G is 1, reshape copies nothing
    mixed, weight = q.new_empty(S, K, R, D, dtype=torch.float32), q.new_empty(S, K, R, dtype=torch.float32)
    _attend[S, K, triton.cdiv(R, M)](
        *(queries, keys, values, plan.pages, plan.page_column, plan.page_first, plan.visible, mixed, weight),
        *(values.shape[1], R, plan.visible.shape[1], H // K, K),
        *(keys.shape[2], D, max(16, triton.next_power_of_2(D)), M),
        num_warps=4,
        num_stages=2,
    )
    weight = weight[..., None].expand_as(mixed)  # so that all of this is one kernel
    weight = (weight - weight.amax(0)).exp2()
    mixed = (mixed * weight).sum(0) / weight.sum(0)  # [K, R, D]
    return mixed.view(K, T, -1, D).transpose(0, 1).reshape(T, H, D).to(q.dtype)


def flash(q: Tensor, keys: Tensor, values: Tensor, plan: Plan, sight: Sight, scale: float) -> Tensor:
    """`attend` where all rows see one block alone, as when a prompt is prefilled: there PyTorch has the best kernel."""
    (T, H, D), (_, K, PAGE, _), N = q.shape, keys.shape, plan.only
    order = plan.page_first.argsort()[: triton.cdiv(N, PAGE)]
    keys = keys[order].transpose(0, 1).reshape(1, K, -1, D)[:, :, :N]
    values = values.view(K, -1, PAGE, D)[:, order].view(1, K, -1, D)[:, :, :N]
    queries = turned(q, sight, K)[0].transpose(1, 2).reshape(1, H, T, D).to(keys.dtype)
    mask = causal_lower_right(T, N)  # the rows are the block's last
    return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@triton.jit(do_not_specialize=["R", "B"])
def _attend(
    queries, keys, values, pages, column, first, visible, mixed, weight, N, R, B, G, K,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Rows [m, m + M) of head k over the share's pages, each with the queries for the page's block."""
    s, k, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    m, n, d = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, PAGE).to(tl.int64)[:, None], tl.arange(0, WIDTH)
    pages = tl.load(pages)
    each = tl.cdiv(pages, shares)
    top, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([WIDTH, M], tl.float32)
    for page in range(s * each, tl.minimum((s + 1) * each, pages)):
        b = tl.load(column + page)
        seen = tl.load(visible + m // G * B + b, mask=m < R, other=0) - tl.load(first + page)
        query = tl.load(queries + ((b * K + k) * R + m) * D + d[:, None], mask=(m < R) & (d[:, None] < D), other=0.0)
        key = tl.load(keys + ((page * K + k) * PAGE + n) * D + d, mask=d < D, other=0.0)
        value = tl.load(values + (k * N + page * PAGE + n) * D + d, mask=d < D, other=0.0)
        scores = tl.dot(key, query, input_precision="ieee")  # [PAGE, M]
        scores = tl.where(n < seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 0))
        shrink, w = tl.exp2(top - new), tl.exp2(scores - new)
        top, total = new, total * shrink + tl.sum(w, 0)
        acc = tl.dot(value.T, w.to(value.dtype), acc * shrink, input_precision="ieee")
    at = (s * K + k) * R + m
    tl.store(weight + at, tl.log2(total) + top, mask=m < R)
    tl.store(mixed + at * D + d[:, None], acc / tl.maximum(total, 1e-30), mask=(m < R) & (d[:, None] < D))
