"""The block cache against a dict of lists, through any sequence of steps, moves and refused calls."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from util import config

from minihogwild import Cache, InputError
from minihogwild.attention import append, look
from minihogwild.rope import rotate, rotation

SHAPE = config("llama3", heads=2, kv_heads=1, head_dim=4, layers=2)
BLOCKS = ["a", "b", "c", "d"]
K, D, L = SHAPE.num_key_value_heads, SHAPE.head_dim, SHAPE.num_hidden_layers


def stored(cache: Cache, layer: int, block: str, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's keys and values as they lie in the pool, [N, K, D] each, page by page."""
    keys, values = torch.zeros(0, K, D, dtype=cache.dtype), torch.zeros(0, K, D, dtype=cache.dtype)
    for number in cache.pages[block]:
        keys = torch.cat((keys, cache.keys[layer][number].transpose(0, 1)))
        values = torch.cat((values, cache.values[layer][:, number * page : (number + 1) * page].transpose(0, 1)))
    return keys[: cache.lengths[block]], values[: cache.lengths[block]]


class CacheMachine(RuleBasedStateMachine):
    @initialize(page=st.sampled_from([1, 3, 8]))
    def start(self, page):
        self.page, self.drawn = page, 0
        self.patch = patch("minihogwild.cache.PAGE", page)
        self.patch.start()
        self.cache = Cache(SHAPE, BLOCKS, torch.float64)
        self.blocks = {block: [] for block in BLOCKS}  # of (keys [L, K, D] before any rotation, values)

    def teardown(self):
        self.patch.stop()

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
        sight = look(plan, self.cache.frequencies, self.page, torch.float64)
        for layer in range(L):
            append(self.cache.keys[layer], self.cache.values[layer], keys[layer], values[layer], plan, sight)
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
                    angles = rotation(torch.tensor(n), self.cache.frequencies, torch.float64)
                    torch.testing.assert_close(keys[n], rotate(token[0, layer], *angles), rtol=0, atol=1e-12)
                    assert torch.equal(values[n], token[1, layer])

    @invariant()
    def pages(self):
        """Each page has one owner or is free, none is lost, and blocks hold no more than they need."""
        owned = [page for pages in self.cache.pages.values() for page in pages]
        capacity = len(self.cache.keys[0])
        assert sorted(owned + self.cache.free) == list(range(capacity))
        for block, tokens in self.blocks.items():
            assert len(self.cache.pages[block]) == -(-len(tokens) // self.page)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_block_names_must_differ():
    with pytest.raises(InputError, match="differ"):
        Cache(SHAPE, ["a", "a"], torch.float32)


def test_the_pool_grows_by_doubling_and_stays_near_what_is_needed():
    """Growth is the only copy of the whole cache: seldom enough that a token is copied about once in all."""
    cache, copied, sizes = Cache(SHAPE, ["a", "b"], torch.float32), 0, set()
    for n in range(1, 4001):
        before = cache.values[0].shape[1]
        cache.extend([["a"], ["a", "b"]], [1, 1])
        after = cache.values[0].shape[1]
        copied += before if after != before else 0
        sizes.add(after)
        assert cache.keys[0].numel() == cache.values[0].numel() == after * K * D
        assert after <= 2.2 * 2 * n or after <= 4 * 64  # two blocks of a page or two, at the start
    assert len(sizes) <= 8
    assert copied <= after


def test_static_plans_stay_in_place_while_texts_grow():
    """What a recorded graph reads: the same addresses and shapes, new numbers, until the pool itself is another."""
    cache = Cache(SHAPE, BLOCKS, torch.float32, static=True)
    cache.extend([["a"]], [1000])
    places, sizes = set(), set()
    for n in range(1, 1500):
        plan = cache.extend([["a", "b"], ["b", "a", "c"]], [1, 1])
        *tables, only = vars(plan).values()
        places.add((only, *((table.data_ptr(), table.shape) for table in tables)))
        sizes.add(len(cache.keys[0]))
        assert plan.visible.tolist() == [[1000, n, 0, 0], [1000, n, n, 0]]
    assert len(places) == len(sizes) > 1


def test_a_step_that_fails_for_memory_says_what_was_asked(monkeypatch):
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(InputError, match=r"out of memory on cpu: a cache of 64 tokens needs .* GB"):
        Cache(SHAPE, ["a"], torch.float32).extend([["a"]], [1])
