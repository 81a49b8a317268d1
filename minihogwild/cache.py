"""The shared KV cache: blocks that every worker sees in an order of its own, each key stored once.

A *block* is an append-only run of tokens; key n is stored rotated to position n of its block. A *view* is an ordered
list of blocks, the last of which its worker writes to; a block starts where those before it end. For row t (a new
token) and block b two integers then say everything:

    offset[t, b]    where b starts in that row's view
    visible[t, b]   how many of b's tokens the row may see: 0 if b is not in its view; all of them if it is; of the
                    block that the row itself is written to, those up to and including itself

With R(p) the rotation to position p, and position[t] = offset in the row's own block + index in that block:

    score(t, b, n) = <R(position[t] - offset[t, b]) q_t, R(n) k_bn>     for n < visible[t, b]

Only the query knows about the view: it is rotated once per block. A key is rotated when it is written and when it is
moved, and never for a view.

Tokens live in a pool of pages, each of which belongs to one block or is free (a "paged" KV cache).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .attention import UNSEEN, LayerCache, Plan
from .backend import PyTorchBackend, choose_backend
from .config import Config
from .errors import InputError, allocating, refusing, require, require_kind
from .rope import frequencies_of, rotate, rotation

LARGEST_PAGE = 2**20
PAGE = 64  # tokens; large enough that a page is a decent matrix, small enough that short blocks waste little
NOBODY = -1  # owns a page that is free
NO_COLUMN = -1  # of a step's tables: the block is in none of its views


class Cache:
    """Keys and values of all blocks, for all layers."""

    def __init__(
        self,
        config: Config,
        blocks: list[str],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        backend: PyTorchBackend | None = None,  # None: the fastest that there is
        page_size: int = PAGE,
    ):
        require_kind(config, Config, "cache: config")
        are_names = isinstance(blocks, (list, tuple)) and all(isinstance(block, str) for block in blocks)
        require(are_names, f"cache: blocks must be a list of names, not {blocks!r}")
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(is_float, f"cache: dtype must be a torch.dtype of numbers with a fraction, not {dtype!r}")
        is_page = type(page_size) is int and 1 <= page_size <= LARGEST_PAGE
        require(is_page, f"cache: page_size must be a whole number from 1 to {LARGEST_PAGE}, not {page_size!r}")
        self.config = config
        self.dtype = dtype
        self.page_size = page_size
        with refusing(f"cache: there is no device {device!r}"):
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        self.compute_dtype = torch.promote_types(dtype, torch.float32)  # of softmax and rotations
        self.backend = choose_backend(self.device, dtype) if backend is None else backend
        # Angles far out need float64, which MPS lacks
        float64_device = "cpu" if self.device.type == "mps" else self.device
        kinds = set(config.layer_kinds)
        self.frequencies = {kind: frequencies_of(kind, config).to(float64_device) for kind in kinds}

        # For each page of the pool: the number of the block that owns it, and the index there of the page's first token
        self.page_owner = np.zeros(0, dtype=np.int64)
        self.page_start = np.zeros(0, dtype=np.int64)
        self._name_blocks(blocks)
        self.pool_version = 0  # another one when layers have got new tensors: what points into the old ones is void
        self.broken_by: str | None = None  # what failed half-way: see `_changing`

        K, D = config.num_key_value_heads, config.head_dim
        # Empty pools, in the shapes that LayerCache explains
        self.layers = [
            LayerCache(
                keys=torch.empty(0, K, self.page_size, D, dtype=dtype, device=self.device),
                values=torch.empty(K, 0, D, dtype=dtype, device=self.device),
            )
            for _ in config.layer_kinds
        ]
        self.backend.tell({"do": "cache", "blocks": list(blocks), "page_size": page_size})

    def _name_blocks(self, blocks: list[str]) -> None:
        """These are the blocks from now on, all of them empty, and all pages are free."""
        require(len(set(blocks)) == len(blocks), f"cache: block names must differ: {list(blocks)}")
        self.lengths = dict.fromkeys(blocks, 0)  # tokens, by block
        self.pages: dict[str, list[int]] = {block: [] for block in blocks}
        self.block_number = {block: number for number, block in enumerate(blocks)}
        self.page_owner.fill(NOBODY)
        self.free = list(range(len(self.page_owner)))  # pages, lowest first, so that the pool stays dense at its start

    def begin_anew(self, blocks: list[str]) -> None:
        """Forget all that the cache holds, for a new run with other blocks; the pool keeps its size.

        Raises InputError for names that do not differ.
        """
        with self._changing("a new beginning"):
            self._name_blocks(blocks)
        self.backend.tell({"do": "begin anew", "blocks": list(blocks)})

    # ---- what a step and a move do to blocks

    def extend(self, views: list[list[str]], counts: list[int]) -> Plan:
        """Make room for `counts[w]` new tokens at the end of the last block of `views[w]`, for each worker.

        The blocks' lengths advance at once; `forward` with this plan then writes the keys and values.
        Raises InputError where the views contradict each other or memory is out; the cache is then as it was.
        """
        check_step(views, counts, self.lengths)
        self.backend.tell({"do": "step", "views": views, "counts": counts})
        own_blocks = [view[-1] for view in views]
        with self._changing("a step"):
            self._make_room_for(own_blocks, counts)
            for block, count in zip(own_blocks, counts):
                self._lengthen(block, count)
            return self._plan(views, counts)

    @contextmanager
    def extended(self, views: list[list[str]], counts: list[int]) -> Iterator[Plan]:
        """`extend`, for a forward pass inside the `with`: where that fails, the blocks are as long as before."""
        plan = self.extend(views, counts)
        try:
            yield plan
        except BaseException:
            with self._changing("the undoing of a step"):
                self._clear(plan.slot)
                for view, count in zip(views, counts):
                    self._shorten(view[-1], count)
            raise

    @torch.no_grad()
    def move(self, source: str, target: str) -> None:
        """Append the whole of one block to another and empty it: keys rotated on, values copied.

        Raises InputError for a block that the cache does not have, or a move onto itself.
        """
        check_move(source, target, self.lengths)
        self.backend.tell({"do": "move", "from": source, "to": target})
        count, start = self.lengths[source], self.lengths[target]
        with self._changing("a move"):
            old_slots = self._slots(source, 0, count)
            try:
                # New pages first. The order of pages is the order in which the softmax adds up, so it decides the last
                # bit; and recorded runs (replay.py) have been made in this one.
                self._make_room_for([target], [count])
                self._lengthen(target, count)
                self._empty(source)
            except InputError:
                # No memory for more pages: then the source's own are taken over. They suffice, since two texts behind
                # each other never need more pages than both had.
                self._empty(source)
                self._lengthen(target, count)
            new_slots = self._slots(target, start, start + count)
            self._move_tokens(old_slots, new_slots, start)

    def drop(self, block: str) -> None:
        """Empty a block: what it held is forgotten. Raises InputError for a block that the cache does not have."""
        check_known([block], self.lengths)
        self.backend.tell({"do": "drop", "block": block})
        with self._changing("a drop"):
            self._empty(block)

    def _move_tokens(self, old_slots: list[int], new_slots: list[int], distance: int) -> None:
        """Copy keys, rotated on by `distance`, and values. Old and new slots may be the same ones in another order."""
        old = self._on_device(old_slots)
        new = self._on_device(new_slots)
        turns = {}
        for kind, frequencies in self.frequencies.items():
            turns[kind] = rotation(self._on_device(distance), frequencies, self.compute_dtype)
        for kind, kv in zip(self.config.layer_kinds, self.layers):
            # Indexing copies: all of a layer's tokens are in hand before the first is written.
            keys = kv.keys[old // self.page_size, :, old % self.page_size].to(self.compute_dtype)  # [N, K, D]
            values = kv.values[:, old]  # [K, N, D]
            kv.keys[new // self.page_size, :, new % self.page_size] = rotate(keys, *turns[kind]).to(self.dtype)
            kv.values[:, new] = values

    def _clear(self, slots: Tensor) -> None:
        """Overwrite what a failed step may have left: slots that nobody sees are multiplied too, and 0 * NaN is NaN."""
        slots = slots.to(self.device)
        for kv in self.layers:
            kv.keys[slots // self.page_size, :, slots % self.page_size] = 0
            kv.values[:, slots] = 0

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Around every change. If it is cut off half-way, `broken_by` stays set, and the cache refuses further use.

        An InputError is raised before any block has changed, and breaks nothing.
        """
        require(self.broken_by is None, f"this cache cannot be used any more: {self.broken_by} was cut off half-way")
        self.broken_by = what
        try:
            yield
        except InputError:
            self.broken_by = None
            raise
        self.broken_by = None

    # ---- the plan of a step

    def _plan(self, views: list[list[str]], counts: list[int]) -> Plan:
        """The tables for a step that has just been given its room, on the host.

        In NumPy, since PyTorch would hand some of these small operations to its thread pool, whose threads a busy
        machine may keep waiting for longer than a GPU needs for the whole step.
        """
        columns: dict[str, int] = {}  # block -> b
        for view in views:
            for block in view:
                columns.setdefault(block, len(columns))

        # For each worker: where each block starts in its view, and how many of its tokens may be seen; 0 and 0 for
        # blocks out of view.
        starts, lengths, own_column, index, slots = [], [], [], [], []
        for view, count in zip(views, counts):
            starts.append([0] * len(columns))
            lengths.append([0] * len(columns))
            start = 0
            for block in view:
                starts[-1][columns[block]] = start
                # This step's tokens are counted already: each worker sees what the others write in this very step.
                lengths[-1][columns[block]] = self.lengths[block]
                start += self.lengths[block]
            own_column.append(columns[view[-1]])
            own_length = self.lengths[view[-1]]
            index += range(own_length - count, own_length)
            slots += self._slots(view[-1], own_length - count, own_length)

        # A row for each token: its worker's. But of its own block it sees itself and what stands before it: that is all
        # there is to a causal mask.
        offset = np.array(starts).repeat(counts, axis=0)
        visible = np.array(lengths).repeat(counts, axis=0)
        own = np.array(own_column).repeat(counts)
        visible[np.arange(len(own)), own] = np.array(index) + 1
        last = np.cumsum(counts) - 1

        # The pages of the pool up to the highest one that any view needs; those of other blocks among them are UNSEEN,
        # which hides all of their tokens from all rows.
        page_count = 1 + max(max(self.pages[block], default=-1) for block in columns)
        column_of_block = np.full(len(self.block_number) + 1, NO_COLUMN)  # one more, which NOBODY, -1, picks: the last
        for block, column in columns.items():
            column_of_block[self.block_number[block]] = column
        page_column = column_of_block[self.page_owner[:page_count]]
        in_a_view = page_column != NO_COLUMN
        page_start = np.where(in_a_view, self.page_start[:page_count], UNSEEN)
        # Where one block is all that there is, as for a prompt, a backend may use ordinary attention.
        lone_block_length = self.lengths[views[0][-1]] if len(columns) == 1 else 0
        return Plan(
            offset=torch.from_numpy(offset),
            visible=torch.from_numpy(visible),
            own=torch.from_numpy(own),
            slot=torch.from_numpy(np.array(slots)),
            last=torch.from_numpy(last),
            page_block=torch.from_numpy(np.where(in_a_view, page_column, 0)),
            page_start=torch.from_numpy(page_start),
            page_count=torch.from_numpy(np.array([page_count])),
            page_size=self.page_size,
            lone_block_length=lone_block_length,
        )

    def _slots(self, block: str, start: int, stop: int) -> list[int]:
        """Where in the pool the tokens [start, stop) of a block lie: page * page_size + place in the page."""
        pages = self.pages[block]
        slots = []
        for n in range(start, stop):
            page, place = divmod(n, self.page_size)
            slots.append(pages[page] * self.page_size + place)
        return slots

    def _on_device(self, numbers: list[int] | int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    # ---- pages

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)  # rounded up

    def _lengthen(self, block: str, count: int) -> None:
        """Add tokens to a block, and the pages for them, lowest first: there must be room."""
        length = self.lengths[block] + count
        held = len(self.pages[block])
        missing = self._pages_for(length) - held
        if missing > 0:
            claimed = self.free[:missing]
            del self.free[:missing]
            self.pages[block] += claimed
            self.page_owner[claimed] = self.block_number[block]
            self.page_start[claimed] = np.arange(held, held + missing) * self.page_size
        self.lengths[block] = length

    def _shorten(self, block: str, count: int) -> None:
        """Take tokens from the end of a block, and give back the pages that it then no longer needs."""
        self.lengths[block] -= count
        needed = self._pages_for(self.lengths[block])
        given_back = self.pages[block][needed:]
        self.pages[block] = self.pages[block][:needed]
        self.page_owner[given_back] = NOBODY
        self.free = sorted(self.free + given_back)

    def _empty(self, block: str) -> None:
        self._shorten(block, self.lengths[block])

    def _make_room_for(self, blocks: list[str], counts: list[int]) -> None:
        """Enlarge the pool if these blocks cannot all grow by these numbers of tokens.

        Raises InputError where there is no memory for that.
        """
        missing = -len(self.free)
        for block, count in zip(blocks, counts):
            missing += self._pages_for(self.lengths[block] + count) - len(self.pages[block])
        if missing <= 0:
            return
        pool = len(self.page_owner)
        try:
            self._resize_pool(pool + missing + spare_pages(pool + missing))
        except InputError:
            self._resize_pool(pool + missing)
        self.backend.tell({"do": "grown", "pool_version": self.pool_version})

    def _resize_pool(self, pages: int) -> None:
        """Give every layer a pool of `pages` pages, and copy into it what the old one held.

        Raises InputError where memory is out. If that is so half-way, the first layers stay larger than the others,
        which is harmless; a second attempt may make them smaller again.
        """
        self.pool_version += 1  # before anything may fail: the first layers have new tensors even then
        K, D = self.config.num_key_value_heads, self.config.head_dim
        bytes_of_page = 2 * self.page_size * K * D * self.dtype.itemsize  # keys and values
        new_layer = pages * bytes_of_page
        old_layer = len(self.page_owner) * bytes_of_page
        # At the most: all layers have grown, and the last one's old pool has not been given back yet.
        nbytes = len(self.layers) * (new_layer - old_layer) + old_layer
        with allocating(nbytes, f"a cache of {pages * self.page_size} tokens", self.device):
            for kv in self.layers:
                # Zeros, since a masked slot still takes part in products, and 0 * NaN is NaN.
                keys = kv.keys.new_zeros(pages, K, self.page_size, D)
                values = kv.values.new_zeros(K, pages * self.page_size, D)
                kept = min(pages, len(kv.keys))
                keys[:kept] = kv.keys[:kept]
                values[:, : kept * self.page_size] = kv.values[:, : kept * self.page_size]
                kv.keys = keys
                kv.values = values
        pool = len(self.page_owner)
        self.free += range(pool, pages)  # higher than those that are free already: so they stay in order
        self.page_owner = np.concatenate((self.page_owner, np.full(pages - pool, NOBODY)))
        self.page_start = np.concatenate((self.page_start, np.zeros(pages - pool, dtype=np.int64)))


def spare_pages(pool: int) -> int:
    """How many pages more than it needs a pool gets when it grows.

    So growth copies each token a few times at the most, and little memory lies idle.
    """
    return max(16, pool // 8)


def check_step(views: list[list[str]], counts: list[int], blocks: Collection[str]) -> None:
    """Raise InputError where a step of such views and numbers of tokens contradicts itself."""
    paired = len(views) == len(counts) > 0 and all(views)
    require(paired, "a step needs at least one view, none of them empty, and a token list for each")
    for view in views:
        require(not isinstance(view, str), f"a view is a list of blocks, not a text: {view!r}")
        check_known(view, blocks)
        require(len(set(view)) == len(view), f"a block stands twice in the view {list(view)}")
    own_blocks = [view[-1] for view in views]
    require(len(set(own_blocks)) == len(own_blocks), f"two views of one step end in the same block: {own_blocks}")
    require(min(counts) >= 1, f"each worker of a step feeds at least one token, not {min(counts)}")


def check_move(source: str, target: str, blocks: Collection[str]) -> None:
    """Raise InputError for a move that can't be."""
    check_known([source, target], blocks)
    require(source != target, f"block {source!r} cannot be moved onto itself")


def check_known(names: list[str], blocks: Collection[str]) -> None:
    """Raise InputError where one of the names is no block."""
    unknown = [name for name in names if not isinstance(name, str) or name not in blocks]
    require(not unknown, f"unknown block {', '.join(map(repr, unknown))}")
