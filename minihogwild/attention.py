"""Concurrent attention: a step's two tables, `offset` and `visible`, and what PyTorch makes of them.

A row is one new token: T rows over all W workers. H query heads share K key/value heads, G = H / K each.

Keys and values of all blocks lie in one pool of pages; a page belongs to one block. Attention goes over the pool once
for all rows, whichever worker they belong to: page by page, with the query that was rotated for that page's block, then
one softmax. So each key and value is read once a step, and not once a worker. (`gpu/attention.py` does the same in one
pass, as an online softmax.)
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .rope import rotate, rotation

# `page_start` of a page that no row of the step may see: its tokens count as past every token that any row may see.
# (The largest number of 32 bits, in which some kernels may count; ours here have 64.)
UNSEEN = 2**31 - 1

# The fields of Plan that are tensors
TABLES_OF_ROWS = ("offset", "visible", "own", "slot", "last")
TABLES = (*TABLES_OF_ROWS, "page_block", "page_start", "page_count")


@dataclass(frozen=True)
class Plan:
    """Where the new tokens of one step stand, and what each may see: whole numbers, the same for all layers.

    `Cache.extend` makes it, on the host. B counts the blocks in the step's views, in the order in which the views
    first name them; P the pages from the pool's start to the last one that these blocks hold. All tensors are int64.
    """

    offset: Tensor  # [T, B]: where the block starts in that row's view; 0 for a block that is not in it
    visible: Tensor  # [T, B]: how many of the block's tokens the row may see; 0 likewise
    own: Tensor  # [T]: the column b of the block that the row's token is written to
    slot: Tensor  # [T]: where in the pool it is written: page * PAGE + place in the page
    last: Tensor  # [W]: the row of each worker's last token
    page_block: Tensor  # [P]: the column b of the block that owns the page; 0 for UNSEEN pages
    page_start: Tensor  # [P]: which of the block's tokens comes first in the page; UNSEEN for other blocks' pages
    # [1]: P without padding; a tensor, so that a kernel in a CUDA graph (gpu/recorded.py) can read it
    page_count: Tensor
    page_size: int  # tokens of a page, "PAGE" in shapes
    # Where the step's views hold one block alone, as for a prompt, its length: a backend may then use a kernel for
    # ordinary attention (gpu/attention.py). Else 0
    lone_block_length: int

    def padded(self, rows: int, blocks: int, pages: int) -> "Plan":
        """The same plan, on the host, enlarged to so many rows, blocks and pages.

        So steps of different sizes have tables of the same shapes, as a CUDA graph needs. An added row repeats the last
        one, and writes the same once more to the same place; added blocks and pages are seen by nobody. (`page_count`
        still says how many pages there are to look at.) Each row may be the last of a worker: `last` gets `rows` too.
        """
        shapes = {
            "offset": (rows, blocks),
            "visible": (rows, blocks),
            "own": (rows,),
            "slot": (rows,),
            "last": (rows,),
            "page_block": (pages,),
            "page_start": (pages,),
        }
        larger = {name: torch.empty(shape, dtype=torch.int64) for name, shape in shapes.items()}
        for name, table in larger.items():
            fill_larger(name, getattr(self, name), table.numpy())
        return replace(self, **larger, lone_block_length=0)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in TABLES]

    def to(self, device: torch.device) -> "Plan":
        """The same plan on a device, sent in one transfer that the host does not wait for."""
        if self.offset.device.type == device.type:
            return self
        packed = torch.empty(self.packed_size(), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.pack(packed)
        return self.unpack(packed.to(device, non_blocking=True))

    def packed_size(self) -> int:
        return sum(rounded_up(tensor.numel()) for tensor in self.tensors())

    def pack(self, into: Tensor, larger_plan: "Plan | None" = None) -> None:
        """Write all tensors into one, on the host, one behind the other.

        Each is padded, as by `padded`, to the shape that it has in `larger_plan`; to read them again, `unpack` is then
        called on that one. By NumPy: PyTorch may hand even small copies to its thread pool, and a step must not wait
        for threads.
        """
        target = into.numpy()
        larger_tensors = self.tensors() if larger_plan is None else larger_plan.tensors()
        start = 0
        for name, tensor, larger in zip(TABLES, self.tensors(), larger_tensors):
            stop = start + larger.numel()
            region = target[start:stop].reshape(larger.shape)  # a view: what is written to it is written to `into`
            fill_larger(name, tensor, region)
            start = rounded_up(stop)

    def unpack(self, packed: Tensor) -> "Plan":
        """A plan of the numbers that were packed into one tensor, as views of it, in this plan's shapes."""
        found = {}
        start = 0
        for name, tensor in zip(TABLES, self.tensors()):
            stop = start + tensor.numel()
            found[name] = packed[start:stop].view(tensor.shape)
            start = rounded_up(stop)
        return replace(self, **found)


def fill_larger(name: str, table: Tensor, larger: np.ndarray) -> None:
    """Write a plan's table into the corner of one that may be larger; what is left there is filled as `padded` says."""
    if larger.shape != table.shape:
        larger.fill(UNSEEN if name == "page_start" else 0)
    corner = tuple(map(slice, table.shape))
    larger[corner] = table.numpy()
    if name in TABLES_OF_ROWS:
        larger[len(table) :] = larger[len(table) - 1]


def rounded_up(count: int) -> int:
    """Numbers of 8 bytes that a packed tensor takes: each begins at a multiple of 16 bytes, as GPUs like it."""
    return count + count % 2


@dataclass
class LayerCache:
    """The KV cache of one layer: the pool of pages, shared by all blocks.

    Keys lie page by page, since each page meets a query of its own; values head by head, since after the softmax the
    whole pool is one long row of weights. All slots hold finite numbers, also those that nobody has written: masked
    ones are multiplied too, and 0 * NaN is NaN.
    """

    keys: Tensor  # [pages, K, PAGE, D], each rotated to its position in its block
    values: Tensor  # [K, pages * PAGE, D]


@dataclass(frozen=True)
class Positions:
    """What follows from a plan for all layers of one kind, computed on the device, once a step."""

    plan: Plan
    # [T] each: where the new token is written, which page, and where in it; None from kernels' backend
    page: Tensor | None
    place: Tensor | None
    # cos and sin; the 1 stands for all heads, which are turned alike
    key_rotation: Tensor  # [2, T, 1, D]: to the token's index in its own block
    query_rotation: Tensor  # [2, T, B, 1, D]: by the distance from each block's start
    causal_mask: Tensor | None  # [T, 1, P, PAGE]: 0 where the row may look, -inf elsewhere; None from kernels' backend
    pages_in_order: Tensor | None = None  # of a lone block, from kernels' backend: the numbers of its pages


def positions_of(plan: Plan, frequencies: Tensor, causal_mask: Tensor | None, dtype: torch.dtype) -> Positions:
    """`frequencies` [D / 2] are those of a kind of layer, zeros where it has no rope; rotations are made in `dtype`."""
    own = plan.own[:, None]
    index = plan.visible.gather(1, own) - 1  # [T, 1]: a token sees its own block up to and including itself
    position = plan.offset.gather(1, own) + index  # [T, 1]: in its view
    distance = position - plan.offset  # [T, B]
    rotations = rotation(torch.cat((index, distance), 1)[..., None], frequencies, dtype)  # [2, T, 1 + B, 1, D]
    return Positions(
        plan=plan,
        page=plan.slot // plan.page_size,
        place=plan.slot % plan.page_size,
        key_rotation=rotations[:, :, 0],
        query_rotation=rotations[:, :, 1:],
        causal_mask=causal_mask,
    )


def causal_mask_of(plan: Plan, dtype: torch.dtype) -> Tensor:
    """[T, 1, P, PAGE]: 0 for the keys that a row may see, -inf for all others.

    A key is seen when its index in its block is below `visible`: that covers other blocks as well as the own one.
    """
    place = torch.arange(plan.page_size, device=plan.page_start.device)
    index_of_key = plan.page_start[:, None] + place  # [P, PAGE]
    visible = plan.visible[:, plan.page_block, None]  # [T, P, 1]
    seen = index_of_key < visible  # [T, P, PAGE]
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    return mask[:, None]


def append(kv: LayerCache, k: Tensor, v: Tensor, positions: Positions) -> None:
    """Write the step's keys and values, [T, K, D] each, at the ends of their blocks."""
    rotated = rotate(k.to(positions.key_rotation.dtype), *positions.key_rotation)
    # Where a slice stands between two index tensors, PyTorch puts their axis first: the place is [T, K, D].
    kv.keys[positions.page, :, positions.place] = rotated.to(kv.keys.dtype)
    kv.values[:, positions.plan.slot] = v.transpose(0, 1).to(kv.values.dtype)


def rotate_for_each_block(q: Tensor, positions: Positions, K: int) -> Tensor:
    """Queries [T, H, D], as projected, rotated once for each block: [B, K, T, G, D]."""
    q = q.to(positions.query_rotation.dtype)
    rotated = rotate(q[:, None], *positions.query_rotation)  # [T, B, H, D]
    by_head = rotated.unflatten(2, (K, -1))  # [T, B, K, G, D]
    return by_head.permute(1, 2, 0, 3, 4)


def attend(q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """Attention of the step's queries, [T, H, D] as projected, over all that they see: [T, H, D].

    Computed in the dtype of mask and rotations, float32 for 16-bit caches: neither rotated queries nor weights are
    rounded to 16 bits, and a CPU is no slower at it.
    """
    weights = attention_weights(q, kv, positions, scale)
    return mix_values(weights, kv).to(q.dtype)


def attention_weights(q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
    """What each row gives to each slot of the pool, after the softmax: [K, T, G, P * PAGE]."""
    plan = positions.plan
    mask = positions.causal_mask
    T, K, P, PAGE = len(q), kv.keys.shape[1], len(plan.page_block), plan.page_size
    # Each page meets the queries that were rotated for the page's block.
    by_block = rotate_for_each_block(q, positions, K).contiguous()  # [B, K, T, G, D]: or the next line were slow
    of_each_page = by_block.index_select(0, plan.page_block)  # [P, K, T, G, D]
    del by_block
    queries = of_each_page.flatten(0, 1).flatten(1, 2)  # [P K, T G, D]
    keys = kv.keys[:P].to(mask.dtype).flatten(0, 1)  # [P K, PAGE, D]
    products = torch.bmm(queries, keys.mT)  # [P K, T G, PAGE]
    del of_each_page, queries  # the largest tensor of all where many tokens are prefilled
    products = products.view(P, K, T, -1, PAGE).permute(1, 2, 3, 0, 4)  # [K, T, G, P, PAGE]
    # mask + scale * products, into a new, contiguous tensor: by itself the sum would inherit the permuted strides, and
    # the softmax would have to copy it.
    scores = torch.add(mask, products, alpha=scale, out=products.new_empty(products.shape))
    return scores.flatten(3).softmax(-1)  # over all blocks together


def mix_values(weights: Tensor, kv: LayerCache) -> Tensor:
    """The sum of the values by their weights, [K, T, G, P * PAGE]: [T, H, D]."""
    K, T, _, slots = weights.shape
    values = kv.values[:, :slots].to(weights.dtype)
    mixed = torch.bmm(weights.flatten(1, 2), values)  # [K, T G, D]
    return mixed.view(K, T, -1, mixed.shape[-1]).transpose(0, 1).flatten(1, 2)  # [T, K G, D]
