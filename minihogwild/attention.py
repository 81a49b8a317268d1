"""Attention of all workers' new tokens over the shared pool of pages, each key and value read once; in PyTorch.

`kernels` has the same `linear` and `attend` for CUDA.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate, rotation

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # a CPU without AVX-512


@dataclass(frozen=True)
class Plan:
    """All that one step needs to know about positions: made once by `Cache.extend`, used by every layer.

    B counts the blocks in this step's views, in the order in which these first name them, P the pages from the pool's
    start to the last one in use; in a plan that stays in place, all blocks and all pages, so that one graph serves
    while texts grow. All are int64.
    """

    offset: Tensor  # [T, B]
    visible: Tensor  # [T, B]
    own: Tensor  # [T]: the column b of the block that the token is written to,
    slot: Tensor  # [T]: and where in the pool: page * PAGE + place
    last: Tensor  # [W]: the row of each worker's last token
    page_column: Tensor  # [P]: the column b of the block that owns the page
    page_first: Tensor  # [P]: which of its tokens comes first there; more than any row may see in an unused page
    pages: Tensor  # [1]: how many, from the pool's start to the last one in use
    only: int  # length of the block, where the step's views hold but one; else 0, as in plans that stay in place


@dataclass(frozen=True)
class Sight:
    """What follows from a plan, computed on the device once per step."""

    page: Tensor  # [T]: where in the pool the token goes,
    place: Tensor  # [T]: and where in that page
    key: Tensor  # [2, T, 1, D], cos and sin: by the index in the own block
    query: Tensor  # [2, T, B, 1, D]: by position - offset
    mask: Tensor  # [T, 1, P, PAGE]: 0 where the row may look, -inf elsewhere


def look(plan: Plan, frequencies: Tensor, page: int, dtype: torch.dtype) -> Sight:
    own = plan.own[:, None]
    index = plan.visible.gather(1, own) - 1  # [T, 1]
    distance = plan.offset.gather(1, own) + index - plan.offset  # [T, B]: from a block's start to the row
    place = plan.page_first[:, None] + torch.arange(page, device=own.device)  # [P, PAGE]
    seen = place < plan.visible[:, plan.page_column, None]  # [T, P, PAGE]
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]
    key, query = rotation(index, frequencies, dtype), rotation(distance[..., None], frequencies, dtype)
    return Sight(plan.slot // page, plan.slot % page, key, query, mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, [T, E] to [T, N]."""
    if not (AVX2 and x.device.type == "cpu" and x.dtype == torch.float32):
        return F.linear(x, weight, bias)
    y = (weight @ x.T).T.contiguous()  # four rows cost no more than one so; as x Wᵀ, twice as much
    return y if bias is None else y + bias


def append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, plan: Plan, sight: Sight) -> None:
    """Write the step's keys and values, [T, K, D] each, at the ends of their blocks."""
    keys[sight.page, :, sight.place] = rotate(k.to(sight.key.dtype), *sight.key).to(keys.dtype)
    values[:, plan.slot] = v.transpose(0, 1).to(values.dtype)


def turned(q: Tensor, sight: Sight, K: int) -> Tensor:
    """Queries [T, H, D], as projected, rotated for each block: [B, K, T, G, D]."""
    queries = rotate(q.to(sight.query.dtype)[:, None], *sight.query)  # [T, B, H, D]
    return queries.unflatten(2, (K, -1)).permute(1, 2, 0, 3, 4)


def attend(q: Tensor, keys: Tensor, values: Tensor, plan: Plan, sight: Sight, scale: float,
           see: Callable[[Tensor], None] = lambda weights: None) -> Tensor:  # fmt: skip
    """Attention of the step's queries, [T, H, D] as projected, over all that they see: [T, H, D].

    Runs in float32 for 16-bit caches: the products then round nothing, and a CPU is no slower at it. `see` gets the
    softmax's weights, [K, T, G, P PAGE].
    """
    (T, H, D), (_, K, PAGE, _), (P,) = q.shape, keys.shape, plan.page_column.shape
    exact = sight.mask.dtype
    keys = keys[:P].to(exact).view(P * K, PAGE, D)
    values = values[:, : P * PAGE].to(exact)  # [K, P PAGE, D]
    # Each page's own query: the one that is rotated for the page's block
    queries = turned(q, sight, K).contiguous().index_select(0, plan.page_column)  # [P, K, T, G, D]
    scores = torch.bmm(queries.view(P * K, -1, D), keys.mT)  # [P K, T G, PAGE]
    del queries  # the largest of all where many tokens are prefilled
    scores = scores.view(P, K, T, -1, PAGE).permute(1, 2, 3, 0, 4)  # [K, T, G, P, PAGE]
    # Given where to, since on its own it would keep the pages' order, and softmax copy everything
    scores = torch.add(sight.mask, scores, alpha=scale, out=scores.new_empty(scores.shape))
    weights = scores.flatten(3).softmax(-1)  # [K, T, G, P PAGE]: over all blocks together
    see(weights)
    mixed = torch.bmm(weights.flatten(1, 2), values)  # [K, T G, D]
    return mixed.view(K, T, -1, D).transpose(0, 1).reshape(T, H, D).to(q.dtype)
