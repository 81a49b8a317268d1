"""The block cache against a dict of lists, through any sequence of steps, moves and refused calls."""

import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from util import config

from minihogwild import Cache, InputError, LayerKind
from minihogwild.attention import append, positions_of
from minihogwild.backend import PyTorchBackend
from minihogwild.cache import PAGE, spare_pages
from minihogwild.rope import rotate, rotation

KINDS = LayerKind(), LayerKind(rope=False)
SHAPE = config("llama3", heads=2, kv_heads=1, head_dim=4, kinds=KINDS)
BLOCKS = ["a", "b", "c", "d"]
K, D, L = SHAPE.num_key_value_heads, SHAPE.head_dim, SHAPE.num_hidden_layers


def stored(cache: Cache, layer: int, block: str, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's keys and values as they lie in the pool, [N, K, D] each, page by page."""
    keys, values = torch.zeros(0, K, D, dtype=cache.dtype), torch.zeros(0, K, D, dtype=cache.dtype)
    for number in cache.pages[block]:
        kv = cache.layers[layer]
        keys = torch.cat((keys, kv.keys[number].transpose(0, 1)))
        values = torch.cat((values, kv.values[:, number * page : (number + 1) * page].transpose(0, 1)))
    return keys[: cache.lengths[block]], values[: cache.lengths[block]]


class CacheMachine(RuleBasedStateMachine):
    @initialize(page=st.sampled_from([1, 3, 8]))
    def start(self, page):
        self.page, self.drawn = page, 0
        self.cache = Cache(SHAPE, BLOCKS, torch.float64, page_size=page)
        self.blocks = {block: [] for block in BLOCKS}  # of (keys [L, K, D] before any rotation, values)

    def token(self):
        self.drawn += 1
        random = torch.Generator().manual_seed(self.drawn)
        return torch.randn(2, L, K, D, generator=random, dtype=torch.float64)

    @rule(data=st.data(), owns=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4, unique=True))
    def step(self, data, owns):
        views, counts = [], []
        for own in owns:
            others = [block for block in data.draw(st.permutations(BLOCKS)) if block != own]
            views.append([*others[: data.draw(st.integers(0, 3))], own])
            counts.append(data.draw(st.integers(1, 7)))
        plan = self.cache.extend(views, counts)
        written = [[self.token() for _ in range(count)] for count in counts]
        keys, values = torch.stack([token for tokens in written for token in tokens], 2)  # [L, T, K, D] each
        for layer, kind in enumerate(KINDS):
            positions = positions_of(plan, self.cache.frequencies[kind], None, torch.float64)
            append(self.cache.layers[layer], keys[layer], values[layer], positions)
        for own, tokens in zip(owns, written):
            self.blocks[own] += tokens
        self.check_tables(plan, views, counts)

    def check_tables(self, plan, views, counts):
        """What each new token sees, and from where, told token by token."""
        columns = list(dict.fromkeys(block for view in views for block in view))
        row = 0
        for view, count in zip(views, counts):
            for back in range(count, 0, -1):
                start = 0
                for block in view:
                    length = len(self.blocks[block])
                    column = columns.index(block)
                    assert plan.offset[row, column] == start
                    assert plan.visible[row, column] == (length - back + 1 if block == view[-1] else length)
                    start += length
                for block in set(columns) - set(view):
                    assert plan.visible[row, columns.index(block)] == 0
                row += 1
            assert plan.last[views.index(view)] == row - 1
        assert plan.offset.shape == plan.visible.shape == (row, len(columns))

    @rule(ends=st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)))
    def move(self, ends):
        source, target = ends
        if source == target:
            with pytest.raises(InputError, match="onto itself"):
                self.cache.move(source, target)
            return
        length = self.cache.lengths[target]
        before = [stored(self.cache, layer, target, self.page) for layer in range(L)]
        self.cache.move(source, target)
        self.blocks[target] += self.blocks[source]
        self.blocks[source] = []
        for layer, (keys, values) in enumerate(before):  # what was there is not even rounded again
            now = stored(self.cache, layer, target, self.page)
            assert torch.equal(now[0][:length], keys)
            assert torch.equal(now[1][:length], values)

    @rule(block=st.sampled_from(BLOCKS))
    def drop(self, block):
        self.cache.drop(block)
        self.blocks[block] = []

    @rule(own=st.sampled_from(BLOCKS), count=st.integers(1, 20))
    def failed_step(self, own, count):
        """Whatever has been written by then, the invariants find the blocks as they were."""

        def spoil_and_fail():
            with self.cache.extended([[own]], [count]) as plan:
                for kv in self.cache.layers:
                    kv.values[:, plan.slot] = torch.nan
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            spoil_and_fail()
        for kv in self.cache.layers:
            assert kv.values.isfinite().all()

    @rule(
        bad=st.sampled_from(
            [
                ([], []),
                ([[]], [1]),
                ([["a"]], []),
                ([["a"], ["b"]], [1]),
                ([["a"]], [0]),
                ([["a", "nobody"]], [1]),
                ([["a", "b", "a"]], [1]),
                ([["b", "a"], ["c", "a"]], [1, 1]),
                ([["b"], ["a"]], [2, -1]),
            ]
        )
    )
    def refused_step(self, bad):
        with pytest.raises(InputError):
            self.cache.extend(*bad)  # the invariants below then find nothing changed

    @rule()
    def refused_drop(self):
        with pytest.raises(InputError, match="nobody"):
            self.cache.drop("nobody")

    @rule(ends=st.sampled_from([("a", "nobody"), ("nobody", "a")]))
    def refused_move(self, ends):
        with pytest.raises(InputError, match="nobody"):
            self.cache.move(*ends)

    @invariant()
    def contents(self):
        for block, tokens in self.blocks.items():
            assert self.cache.lengths[block] == len(tokens)
            for layer in range(L):
                keys, values = stored(self.cache, layer, block, self.page)
                for n, token in enumerate(tokens):
                    angles = rotation(torch.tensor(n), self.cache.frequencies[KINDS[layer]], torch.float64)
                    torch.testing.assert_close(keys[n], rotate(token[0, layer], *angles), rtol=0, atol=1e-12)
                    assert torch.equal(values[n], token[1, layer])

    @invariant()
    def pages(self):
        """Each page has one owner or is free, none is lost, and blocks hold no more than they need."""
        owned = [page for pages in self.cache.pages.values() for page in pages]
        capacity = len(self.cache.layers[0].keys)
        assert sorted(owned + self.cache.free) == list(range(capacity))
        for block, tokens in self.blocks.items():
            assert len(self.cache.pages[block]) == -(-len(tokens) // self.page)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_block_names_must_differ():
    with pytest.raises(InputError, match="differ"):
        Cache(SHAPE, ["a", "a"], torch.float32)


def test_the_pool_grows_seldom_and_stays_near_what_is_needed():
    """Growth is the only copy of the whole cache: seldom enough that a token is copied a few times in all."""
    cache, copied, sizes = Cache(SHAPE, ["a", "b"], torch.float32), 0, set()
    for n in range(1, 4001):
        before = cache.layers[0].values.shape[1]
        cache.extend([["a"], ["a", "b"]], [1, 1])
        after = cache.layers[0].values.shape[1]
        copied += before if after != before else 0
        sizes.add(after)
        assert cache.layers[0].keys.numel() == cache.layers[0].values.numel() == after * K * D
        needed = 2 * -(-n // PAGE)
        assert after <= (needed + spare_pages(needed)) * PAGE
    assert len(sizes) <= 12
    assert copied <= 6 * after


def test_padded_plans_keep_their_shapes_while_texts_grow():
    """What a recorded graph reads: tables of one size, new numbers in them, until the pool itself has grown."""
    cache = Cache(SHAPE, BLOCKS, torch.float32)
    cache.extend([["a"]], [1000])
    shapes, sizes = set(), set()
    for n in range(1, 1500):
        plan = cache.extend([["a", "b"], ["b", "a", "c"]], [1, 1]).padded(2, len(BLOCKS), len(cache.page_owner))
        shapes.add((plan.lone_block_length, *(tensor.shape for tensor in plan.tensors())))
        sizes.add(len(cache.layers[0].keys))
        assert plan.visible.tolist() == [[1000, n, 0, 0], [1000, n, n, 0]]
    assert len(shapes) == len(sizes) > 1


def test_a_new_beginning_is_as_a_new_cache():
    """Whatever was there before: which pages are taken, and so the order of sums, and what is refused."""
    used = Cache(SHAPE, BLOCKS, torch.float32)
    used.extend([["a"], ["a", "b"]], [200, 100])
    used.move("b", "c")
    used.drop("a")
    used.begin_anew(["x", "y"])
    new = Cache(SHAPE, ["x", "y"], torch.float32)
    for cache in (used, new):
        cache.extend([["x"], ["x", "y"]], [100, 300])
        cache.move("y", "x")
    assert used.lengths == new.lengths == {"x": 400, "y": 0}
    assert used.pages == new.pages
    assert used.free == [page for page in range(len(used.page_owner)) if page not in used.pages["x"]]
    with pytest.raises(InputError, match="must differ"):
        used.begin_anew(["z", "z"])
    assert used.lengths == new.lengths
    used.extend([["x"]], [1])  # it can still be used


class TellsOfFailure(PyTorchBackend):
    """Of several ranks, one has failed while the cache grew."""

    failed = False

    def tell(self, event: dict) -> None:
        if self.failed and event["do"] == "grown":
            raise InputError("rank 1: no memory")


def test_a_rank_that_fails_while_the_cache_grows_is_told_of():
    """It is no lack of memory here, and the cache is whole."""
    backend = TellsOfFailure()
    cache = Cache(SHAPE, BLOCKS, torch.float32, backend=backend)
    cache.extend([["a"]], [100])
    backend.failed = True
    with pytest.raises(InputError, match="rank 1: no memory"):
        cache.extend([["a"]], [5000])
    backend.failed = False
    assert cache.lengths["a"] == 100
    cache.extend([["a"]], [5000])
    assert cache.lengths["a"] == 5100


# ---- when memory is out


class Machine:
    """A machine with so many bytes free, for as long as a test runs."""

    def __init__(self, monkeypatch):
        self.available = 10**12
        monkeypatch.setattr("psutil.virtual_memory", lambda: self)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def bytes_of(tokens: int) -> int:
    """Of so many more tokens in the pool."""
    return 2 * L * K * D * 4 * tokens


def test_a_step_that_fails_for_memory_says_what_was_asked(machine):
    machine.available = 1000
    with pytest.raises(InputError, match=r"out of memory on cpu: a cache of 64 tokens needs .* GB"):
        Cache(SHAPE, ["a"], torch.float32).extend([["a"]], [1])


def test_a_pool_that_cannot_have_spare_pages_grows_by_what_is_missing(machine):
    cache = Cache(SHAPE, ["a", "b"], torch.float32)
    machine.available = bytes_of(100 * PAGE)
    cache.extend([["a"]], [100 * PAGE])
    machine.available = bytes_of(100 * PAGE) // L + bytes_of(PAGE)  # a layer's old pool is there beside its new one
    for n in range(1, 4):
        cache.extend([["a"]], [PAGE])
        assert len(cache.page_owner) == 100 + n
        machine.available += bytes_of(PAGE)
    assert cache.lengths["a"] == 103 * PAGE


def test_a_step_that_finds_no_memory_leaves_the_lengths_as_they_were(machine):
    """Also where there is room for the first of two workers, and not for the second."""
    cache = Cache(SHAPE, ["a", "b", "c"], torch.float32)
    cache.extend([["a"]], [2 * PAGE])
    cache.drop("a")
    before = {**cache.lengths}, [*cache.free]
    machine.available = 1000
    with pytest.raises(InputError, match="out of memory"):
        cache.extend([["b"], ["b", "c"]], [PAGE, 50 * PAGE])
    assert ({**cache.lengths}, cache.free) == before
    cache.extend([["b"], ["b", "c"]], [PAGE, PAGE])  # for which there is room


@pytest.mark.parametrize("start", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 7])
@pytest.mark.parametrize("count", [1, PAGE, 2 * PAGE + 5])
def test_a_move_needs_no_memory(machine, start, count):
    """Where the pool can't grow, the moved block's own pages are taken over; the tokens are the same ones."""
    moved = []
    for free in (10**12, 0):
        machine.available = 10**12
        cache = Cache(SHAPE, ["a", "b"], torch.float64)
        random = torch.Generator().manual_seed(0)
        for block, length in (("a", start), ("b", count)):
            if length == 0:
                continue
            plan = cache.extend([[block]], [length])
            for kv, kind in zip(cache.layers, KINDS):
                k, v = torch.randn(2, length, K, D, generator=random, dtype=torch.float64)
                append(kv, k, v, positions_of(plan, cache.frequencies[kind], None, torch.float64))
        pages = sum(len(held) for held in cache.pages.values())
        held_back = cache.free[:]
        cache.free.clear()  # as if others had them
        machine.available = free
        cache.move("b", "a")
        assert cache.lengths == {"a": start + count, "b": 0}
        assert len(cache.pages["a"]) == -(-(start + count) // PAGE) <= pages
        assert not set(held_back) & set(cache.pages["a"])
        moved.append([stored(cache, layer, "a", PAGE) for layer in range(L)])
    for ours, theirs in zip(*moved):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_move_that_is_cut_off_half_way_leaves_a_cache_that_says_so(monkeypatch):
    """Half of its layers have been moved, and half not: what it would compute from then on would be wrong."""
    cache = Cache(SHAPE, ["a", "b"], torch.float32)
    cache.extend([["a"], ["b"]], [5, 7])
    kv = cache.layers[1]
    whole = kv.keys
    kv.keys = whole[:0]  # the second layer's pool can't be read
    with pytest.raises(IndexError):
        cache.move("b", "a")
    kv.keys = whole
    line = re.escape("this cache cannot be used any more: a move was cut off half-way")
    for attempt in (lambda: cache.extend([["a"]], [1]), lambda: cache.move("b", "a"), lambda: cache.drop("a")):
        with pytest.raises(InputError, match=line):
            attempt()


def test_whoever_points_into_the_pool_learns_of_new_tensors_also_where_a_resize_fails_half_way(monkeypatch):
    """The first layer has new tensors then: a step recorded on a GPU would read memory that has been given back."""
    cache = Cache(config(layers=2), ["a"], torch.float64)
    cache.extend([["a"]], [1])
    version = cache.pool_version
    cache.extend([["a"]], [PAGE - 1])
    assert cache.pool_version == version  # nothing was resized
    first_layers_keys = cache.layers[0].keys
    zeros, made = torch.Tensor.new_zeros, []

    def no_room_for_a_second_layer(tensor: torch.Tensor, *size: int) -> torch.Tensor:
        made.append(size)
        if len(made) % 3 == 0:  # keys and values of a layer, and then no more
            raise MemoryError
        return zeros(tensor, *size)

    monkeypatch.setattr(torch.Tensor, "new_zeros", no_room_for_a_second_layer)
    with pytest.raises(InputError, match="out of memory"):
        cache.extend([["a"]], [len(cache.free) * PAGE + 1])
    assert cache.layers[0].keys is not first_layers_keys
    assert cache.pool_version != version
