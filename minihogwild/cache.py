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
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Plan
from .config import Config, require
from .memory import allocating
from .rope import attention_factor, inverse_frequencies, rotate, rotation

PAGE = 64  # tokens; large enough that a page is a decent matrix, small enough that short blocks waste little


class Cache:
    """Keys and values of all blocks, for all layers."""

    # `static`: the plans of decode steps stay in place, as CUDA graphs need; None: where there are kernels
    def __init__(self, config: Config, blocks: list[str], dtype: torch.dtype, device: torch.device | str = "cpu",
                 static: bool | None = None):  # fmt: skip
        require(len(set(blocks)) == len(blocks), f"cache: block names must differ: {list(blocks)}")
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.compute_dtype = torch.promote_types(dtype, torch.float32)  # of softmax and rotations
        self.scale = attention_factor(config.rope) ** 2 / config.head_dim**0.5
        exact = "cpu" if self.device.type == "mps" else device  # MPS lacks float64
        self.frequencies = inverse_frequencies(config.rope, config.head_dim).to(exact)
        cuda = self.device.type == "cuda"
        fused = cuda and dtype.itemsize <= 4 and find_spec("triton") is not None
        self.static = fused if static is None else static
        self.ops = import_module(".kernels" if fused else ".attention", __package__)  # `linear` and `attend`
        self.buffers: dict[int, Tensor] = {}  # static plans, packed, by T
        self.graphs: dict[int, tuple] = {}  # of recorded steps, by T (`model.decode`); with the pool's size, both end
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
        static = self.static and max(counts) == 1
        blocks = self.lengths if static else dict.fromkeys(block for view in views for block in view)
        columns = {block: b for b, block in enumerate(blocks)}
        starts = [dict(zip(view, accumulate(map(self.lengths.get, view), initial=0))) for view in views]
        offset = torch.tensor([[start.get(block, 0) for block in columns] for start in starts])
        visible = torch.tensor([[self.lengths[block] * (block in start) for block in columns] for start in starts])
        own = torch.tensor([columns[view[-1]] for view in views])

        # From a row for each worker to a row for each token: they differ in the index in the own block.
        repeats = torch.tensor(counts)
        offset, visible, own = (table.repeat_interleave(repeats, 0) for table in (offset, visible, own))
        last = repeats.cumsum(0) - 1
        rows = torch.arange(len(own))
        visible[rows, own] -= last.repeat_interleave(repeats) - rows

        pages = 1 + max(page for block in columns for page in self.pages[block])
        page_column = torch.zeros(len(self.keys[0]) if static else pages, dtype=torch.int64)
        page_first = torch.full_like(page_column, torch.iinfo(torch.int32).max)
        for block, b in columns.items():
            page_column[self.pages[block]] = b
            page_first[self.pages[block]] = torch.arange(len(self.pages[block])) * PAGE
        tables = [offset, visible, own, slot, last, page_column, page_first, torch.tensor([pages])]
        only = 0 if static or len(columns) > 1 else self.lengths[views[0][-1]]
        return Plan(*self._send(tables, static), only)

    def _send(self, tables: list[Tensor], static: bool) -> list[Tensor]:
        """The tables on the cache's device, in one transfer that nothing waits for; static ones always in one place."""
        parts = [F.pad(table.flatten(), (0, table.numel() % 2)) for table in tables]  # each begins at 16 bytes
        packed = torch.cat(parts)
        if self.device.type == "cuda":
            packed = packed.pin_memory()  # a fresh one: the last step's may still be on its way
        if static:
            T = len(tables[0])
            if T not in self.buffers:
                self.buffers[T] = torch.empty_like(packed, device=self.device)
            packed = self.buffers[T].copy_(packed, non_blocking=True)
        packed = packed.to(self.device, non_blocking=True).split([len(part) for part in parts])
        return [part[: table.numel()].view(table.shape) for part, table in zip(packed, tables)]

    @torch.no_grad()
    def move(self, source: str, target: str) -> None:
        """Append the whole of one block to another and empty it: keys turned on, values copied.

        Raises InputError for a block that the cache does not have, or a move onto itself.
        """
        check_move(source, target, self.lengths)
        count, at = self.lengths[source], self.lengths[target]
        tables = self._slots(source, 0, count), self._claim(target, count), torch.tensor(at)
        old, new, at = (table.to(self.device, non_blocking=True) for table in tables)
        turn = rotation(at, self.frequencies, self.compute_dtype)
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
        self.buffers, self.graphs = {}, {}


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
