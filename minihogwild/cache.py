"""The shared cache: blocks that every worker sees in an order of its own, each key stored once.

A *block* is an append-only run of tokens; key n is stored rotated to position n of its block. A *view* is
an ordered list of blocks, the last of which its worker writes to; a block starts where those before it
end. For row t (a new token) and block b two integers then say everything:

    offset[t, b]    where the block starts in that row's view
    visible[t, b]   how many of its tokens the row may see: all; index + 1 of its own block; 0 if not in view

    score(t, b, n) = <R(position[t] - offset[t, b]) q_t, R(n) k_bn>     for n < visible[t, b]

Only the query knows about the view: it is rotated once per block, a key never.

Tokens live in a pool of pages; a page belongs to one block. Attention goes over the pool once for all
rows, whoever they belong to: page by page with the query for that page's block, then one softmax.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .config import Config, require
from .memory import allocating
from .rope import attention_factor, inverse_frequencies, rotate, rotation

PAGE = 64  # tokens; large enough that a page is a decent matrix, small enough that short blocks waste little


@dataclass(frozen=True)
class Plan:
    """All that one step needs to know about positions: made once by `Cache.extend`, used by every layer.

    B counts the blocks in this step's views, P the pages from the pool's start to the last one in use.
    """

    offset: Tensor  # [T, B] int64
    visible: Tensor  # [T, B] int64
    last: Tensor  # [W] int64: the row of each worker's last token
    slot: Tensor  # [T] int64: where in the pool each new token goes: page * PAGE + place
    page: Tensor  # [T] int64
    place: Tensor  # [T] int64
    page_column: Tensor  # [P] int64: the column b of the block that owns the page
    key_rotation: Tensor  # [2, T, 1, D], cos and sin: by the index in the own block
    query_rotation: Tensor  # [2, T, B, 1, D]: by position - offset
    mask: Tensor  # [T, 1, P, PAGE]: 0 where the row may look, -inf elsewhere


class Cache:
    """Keys and values of all blocks, for all layers."""

    def __init__(self, config: Config, blocks: list[str], dtype: torch.dtype, device: torch.device | str = "cpu"):
        require(len(set(blocks)) == len(blocks), f"cache: block names must differ: {list(blocks)}")
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.compute_dtype = torch.promote_types(dtype, torch.float32)  # of softmax and rotations
        self.scale = attention_factor(config.rope) ** 2 / config.head_dim**0.5
        self.frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.lengths = {block: 0 for block in blocks}
        self.pages: dict[str, list[int]] = {block: [] for block in blocks}
        self.free: list[int] = []  # pages, lowest first, so that the pool stays dense at its start
        K, D, L = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        # Keys lie by page, since each page meets a query of its own; values by head, since after the softmax
        # the pool is one long row of weights.
        self.keys = [torch.empty(0, K, PAGE, D, dtype=dtype, device=device) for _ in range(L)]
        self.values = [torch.empty(K, 0, D, dtype=dtype, device=device) for _ in range(L)]

    def extend(self, views: list[list[str]], counts: list[int]) -> Plan:
        """Make room for `counts[w]` new tokens at the end of the last block of `views[w]`, for each worker.

        The blocks' lengths advance at once; `forward` with this plan then writes the keys and values.
        Raises InputError where the views contradict each other; the cache is then as it was.
        """
        check_step(views, counts, self.lengths)
        slot = torch.cat([self._claim(view[-1], count) for view, count in zip(views, counts)])
        columns = {block: b for b, block in enumerate(dict.fromkeys(block for view in views for block in view))}
        starts = [dict(zip(view, accumulate(map(self.lengths.get, view), initial=0))) for view in views]
        offset = torch.tensor([[start.get(block, 0) for block in columns] for start in starts])
        visible = torch.tensor([[self.lengths[block] * (block in start) for block in columns] for start in starts])
        own = torch.tensor([columns[view[-1]] for view in views])

        # From a row for each worker to a row for each token: they differ in the index in the own block.
        repeats = torch.tensor(counts)
        offset, visible, own = (table.repeat_interleave(repeats, 0) for table in (offset, visible, own))
        ends = [self.lengths[view[-1]] for view in views]
        index = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts)])
        rows = torch.arange(len(index))
        visible[rows, own] = index + 1
        distance = offset[rows, own, None] + index[:, None] - offset  # [T, B]: from a block's start to the row

        P = 1 + max(page for block in columns for page in self.pages[block])
        page_column = torch.zeros(P, dtype=torch.int64)
        first = torch.full((P,), torch.iinfo(torch.int32).max)  # of other blocks' pages, more than any row may see
        for block, b in columns.items():
            page_column[self.pages[block]] = b
            first[self.pages[block]] = torch.arange(len(self.pages[block])) * PAGE
        seen = first[:, None] + torch.arange(PAGE) < visible[:, page_column, None]  # [T, P, PAGE]
        plan = Plan(
            offset,
            visible,
            last=repeats.cumsum(0) - 1,
            slot=slot,
            page=slot // PAGE,
            place=slot % PAGE,
            page_column=page_column,
            key_rotation=rotation(index[:, None], self.frequencies, self.compute_dtype),
            query_rotation=rotation(distance[:, :, None], self.frequencies, self.compute_dtype),
            mask=torch.zeros(seen.shape, dtype=self.compute_dtype).masked_fill_(~seen, -torch.inf)[:, None],
        )
        return Plan(*(tensor.to(self.device) for tensor in vars(plan).values()))

    def append(self, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """Write the step's keys and values, [T, K, D] each, at the ends of their blocks."""
        k = rotate(k.to(self.compute_dtype), *plan.key_rotation)
        self.keys[layer][plan.page, :, plan.place] = k.to(self.dtype)
        self.values[layer].index_copy_(1, plan.slot, v.transpose(0, 1).to(self.dtype))

    def attend(self, layer: int, q: Tensor, plan: Plan) -> Tensor:
        """Attention of the step's queries, [T, H, D] as projected, over all that they see: [T, H, D].

        Runs in float32 for 16-bit caches: the products then round nothing, and a CPU is no slower at it.
        """
        T, H, D = q.shape
        P, K = len(plan.page_column), self.config.num_key_value_heads
        keys = self.keys[layer][:P].to(self.compute_dtype).view(P * K, PAGE, D)
        values = self.values[layer][:, : P * PAGE].to(self.compute_dtype)  # [K, P PAGE, D]
        queries = rotate(q.to(self.compute_dtype)[:, None], *plan.query_rotation)  # [T, B, H, D]
        # Each page's own query: the one that is rotated for the page's block
        queries = queries.view(T, -1, K, H // K, D).permute(1, 2, 0, 3, 4)[plan.page_column]  # [P, K, T, G, D]
        scores = torch.bmm(queries.reshape(P * K, -1, D), keys.mT)  # [P K, T G, PAGE]
        del queries  # the largest of all where many tokens are prefilled
        scores = scores.view(P, K, T, -1, PAGE).permute(1, 2, 3, 0, 4)  # [K, T, G, P, PAGE]
        scores = torch.add(plan.mask, scores, alpha=self.scale)
        weights = scores.flatten(3).softmax(-1)  # [K, T, G, P PAGE]: over all blocks together
        mixed = torch.bmm(weights.flatten(1, 2), values)  # [K, T G, D]
        return mixed.view(K, T, -1, D).transpose(0, 1).reshape(T, H, D).to(q.dtype)

    @torch.no_grad()
    def move(self, source: str, target: str) -> None:
        """Append the whole of one block to another and empty it: keys turned on, values copied.

        Raises InputError for a block that the cache does not have, or a move onto itself.
        """
        check_move(source, target, self.lengths)
        count, at = self.lengths[source], self.lengths[target]
        old, new = self._slots(source, 0, count).to(self.device), self._claim(target, count).to(self.device)
        turn = rotation(torch.tensor(at), self.frequencies, self.compute_dtype).to(self.device)
        for keys, values in zip(self.keys, self.values):
            moved = keys[old // PAGE, :, old % PAGE].to(self.compute_dtype)
            keys[new // PAGE, :, new % PAGE] = rotate(moved, *turn).to(self.dtype)
            values[:, new] = values[:, old]
        self.free = sorted(self.free + self.pages[source])
        self.pages[source], self.lengths[source] = [], 0

    def _slots(self, block: str, start: int, stop: int) -> Tensor:
        n = torch.arange(start, stop)
        return torch.tensor(self.pages[block], dtype=torch.int64)[n // PAGE] * PAGE + n % PAGE

    def _claim(self, block: str, count: int) -> Tensor:
        """Lengthen a block by `count` tokens; returns their slots, [count]."""
        stop = self.lengths[block] + count
        missing = -(-stop // PAGE) - len(self.pages[block])
        if missing > len(self.free):
            self._grow(missing - len(self.free))
        self.pages[block] += self.free[:missing]
        del self.free[:missing]
        self.lengths[block] = stop
        return self._slots(block, stop - count, stop)

    def _grow(self, missing: int) -> None:
        """Enlarge the pool by `missing` pages. It at least doubles, so a token is copied about once."""
        old, K, _, D = self.keys[0].shape
        new = max(old, missing)
        nbytes = 2 * (len(self.keys) * new + old) * PAGE * K * D * self.dtype.itemsize  # old layers go one by one
        with allocating(nbytes, f"a cache of {(old + new) * PAGE} tokens", self.device):
            for layer, (keys, values) in enumerate(zip(self.keys, self.values)):
                # Zeros, since a masked slot still takes part in products, and 0 * NaN is NaN.
                self.keys[layer] = torch.cat((keys, keys.new_zeros(new, K, PAGE, D)))
                self.values[layer] = torch.cat((values, values.new_zeros(K, new * PAGE, D)), 1)
        self.free += range(old, old + new)  # higher than all of them


def check_step(views: list[list[str]], counts: list[int], blocks: Collection[str]) -> None:
    """Raise InputError where a step of such views and numbers of tokens contradicts itself."""
    paired = len(views) == len(counts) > 0 and all(views)
    require(paired, "a step needs at least one view, none of them empty, and a token list for each")
    for view in views:
        check_known(view, blocks)
        require(len(set(view)) == len(view), f"a block stands twice in the view {list(view)}")
    own = [view[-1] for view in views]
    require(len(set(own)) == len(own), f"two views of one step end in the same block: {own}")
    require(min(counts) >= 1, f"each worker of a step feeds at least one token, not {min(counts)}")


def check_move(source: str, target: str, blocks: Collection[str]) -> None:
    check_known([source, target], blocks)
    require(source != target, f"block {source!r} cannot be moved onto itself")


def check_known(names: list[str], blocks: Collection[str]) -> None:
    unknown = [name for name in names if name not in blocks]
    require(not unknown, f"unknown block {', '.join(map(repr, unknown))}")
