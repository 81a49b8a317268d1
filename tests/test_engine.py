"""The heart of the project: the engine's logits are those of plain recomputation, whatever the schedule."""

import itertools
import statistics
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from util import (
    ROPES,
    Engine,
    WatchedOracle,
    config,
    configs,
    random_weights,
    relative_difference,
    run,
    schedules,
    step,
    tokens,
)

from minihogwild import Cache, InputError, Layer, LayerKind, forward, model
from minihogwild.backend import PyTorchBackend
from minihogwild.oracle import Oracle
from minihogwild.weights import Dense

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
pages = st.sampled_from([2, 5, 64])  # small pages, so that short texts cross their edges too
many = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class PaddedBackend(PyTorchBackend):
    """Small steps padded, in rows, blocks and pages, as recorded ones are (gpu/recorded.py)."""

    def run(self, forward, tokens, weights, config, cache, plan):
        rows, workers = len(tokens), len(plan.last)
        if rows <= 16:
            plan = plan.padded(rows + 3, len(cache.lengths) + 2, len(cache.page_owner))
            tokens = torch.cat((tokens, tokens[-1:].expand(3)))
        return forward(tokens, weights, config, cache, plan)[:workers]


BACKENDS = {"plain": PyTorchBackend(), "padded": PaddedBackend()}
backends = st.sampled_from(list(BACKENDS.values()))


def compare(shape, weights, blocks, events, page, narrow=0.0, backend=BACKENDS["plain"]) -> float:
    """Passes by schedules in which a token's choice of experts is so narrow that rounding could decide it."""
    ours = list(run(Engine(shape, weights, blocks, page, backend), events))
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if any(kind.experts for kind in shape.layer_kinds):
        assume(oracle.narrowest > narrow)
    assert all(torch.isfinite(logits).all() for logits in ours)
    return max(relative_difference(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@many
@given(data=st.data())
def test_engine_equals_oracle(dtype, data):
    shape, (blocks, events) = data.draw(configs()), data.draw(schedules())
    biases, qk_norms, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 99))
    weights = random_weights(shape, dtype, seed, biases, qk_norms)
    page, backend, tolerance = data.draw(pages), data.draw(backends), TOLERANCE[dtype]
    assert compare(shape, weights, blocks, events, page, 10 * tolerance, backend) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("rope", ROPES)
def test_engine_equals_oracle_over_many_pages_and_moves(rope, backend):
    shape = config(rope)
    weights = random_weights(shape)
    random = torch.Generator().manual_seed(1)

    def some(count: int) -> list[int]:
        return torch.randint(shape.vocab_size, (count,), generator=random).tolist()

    events = [step((["common"], some(150)))]
    for n in range(80):
        views = ["common", "b", "c", "a"], ["common", "c", "a", "b"], ["common", "a", "b", "c"]
        events.append(step(*((view, some(1 + (n + w) % 3 * (n % 2))) for w, view in enumerate(views))))
        if n % 9 == 8:
            events.append({"do": "move", "from": "abc"[n % 3], "to": "common"})
    assert compare(shape, weights, ["common", "a", "b", "c"], events, 64, backend=backend) <= 1e-9


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("what", ["block order", "same-step tokens of others", "a moved paragraph's place"])
def test_what_a_worker_sees_decides_its_logits(rope, what):
    """The tests above could not fail if attention hardly mattered: each of these moves them by over 10 %."""
    shape = config(rope)
    text = [n * 7 % shape.vocab_size for n in range(24)]
    ask = step((["a", "b", "own"], [3]))
    given = [step((["a"], text[:12])), step((["b"], text[12:]))]
    if what == "block order":
        other = [*given, step((["b", "a", "own"], [3]))]
        given = [*given, ask]
    elif what == "same-step tokens of others":
        other = [*given, step((["a", "b", "own"], [3]), (["a", "b"], text[:7]))]
        given = [*given, step((["a", "b", "own"], [3]), (["a", "b"], text[7:14]))]
    else:
        other = [*given, {"do": "move", "from": "a", "to": "b"}, ask]
        given = [*given, {"do": "move", "from": "b", "to": "a"}, ask]
    differences = []
    for seed in range(9):
        weights = random_weights(shape, seed=seed)
        ours, theirs = (
            list(run(Oracle(shape, weights, ["a", "b", "own"]), events))[-1][0] for events in (given, other)
        )
        differences.append(relative_difference(ours, theirs))
    assert statistics.median(differences) >= 0.1


@many
@given(configs(), tokens(st.integers(1, 40)), st.lists(st.integers(1, 40)), pages)
def test_any_chunking_of_a_prompt_gives_the_same_logits(shape, text, cuts, page):
    weights = random_weights(shape)
    cuts = sorted({0, len(text)} | {cut for cut in cuts if cut < len(text)})
    chunks = [step((["p"], text[a:b])) for a, b in itertools.pairwise(cuts)]
    *_, chunked = run(Engine(shape, weights, ["p"], page), chunks)
    [whole] = run(Engine(shape, weights, ["p"], page), [step((["p"], text))])
    assert relative_difference(chunked, whole) <= 1e-9


@many
@given(configs(), tokens(st.integers(2, 40)), st.lists(st.integers(1, 40), max_size=4), pages)
def test_splitting_a_text_over_blocks_of_one_view_changes_nothing(shape, text, cuts, page):
    weights = random_weights(shape)
    cuts = sorted({0, len(text)} | {cut for cut in cuts if cut < len(text)})
    blocks = [f"part {n}" for n in range(len(cuts) - 1)]
    parts = [step((blocks[: n + 1], text[a:b])) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
    *_, split = run(Engine(shape, weights, blocks, page), parts)
    [whole] = run(Engine(shape, weights, ["p"], page), [step((["p"], text))])
    assert relative_difference(split, whole) <= 1e-9


@many
@given(configs(), schedules(), st.randoms(use_true_random=False), pages)
def test_the_order_of_workers_in_a_step_changes_nothing(shape, schedule, random, page):
    blocks, events = schedule
    assume(any(len(event.get("views", [])) > 1 for event in events))
    weights = random_weights(shape)
    shuffled, orders = [], []
    for event in events:
        if event["do"] == "step":
            order = random.sample(range(len(event["views"])), len(event["views"]))
            orders.append(order)
            event = step(*((event["views"][w], event["tokens"][w]) for w in order))
        shuffled.append(event)
    ours = list(run(Engine(shape, weights, blocks, page), events))
    theirs = list(run(Engine(shape, weights, blocks, page), shuffled))
    assert max(relative_difference(b, a[order]) for a, b, order in zip(ours, theirs, orders)) <= 1e-9


@many
@given(configs(), tokens(st.integers(2, 30)), st.integers(1, 29), pages)
def test_a_move_equals_writing_there_in_the_first_place_where_contents_do_not_depend_on_it(shape, text, cut, page):
    """One layer: keys and values depend on the token alone, so a moved text is the text written in one piece."""
    shape = replace(shape, layer_kinds=shape.layer_kinds[:1])
    weights = random_weights(shape)
    cut = min(cut, len(text) - 1)
    events = [
        step((["a"], text[:cut])),
        step((["b"], text[cut:])),
        {"do": "move", "from": "b", "to": "a"},
        step((["a", "c"], [5])),
    ]
    *_, moved = run(Engine(shape, weights, ["a", "b", "c"], page), events)
    *_, whole = run(Engine(shape, weights, ["a", "c"], page), [step((["a"], text)), step((["a", "c"], [5]))])
    assert relative_difference(moved, whole) <= 1e-9


SPARSE = {"kinds": (LayerKind(experts=True),) * 2, "num_experts": 3, "moe_intermediate_size": 9}


@pytest.mark.parametrize(
    ("experts", "allowed"), [({}, 16), (SPARSE | {"num_experts_per_tok": 3}, 24)], ids=["dense", "all experts"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_near(dtype, experts, allowed):
    """16-bit weights are the oracle's own (it upcasts them); what differs is rounding on the way."""
    shape = config("llama3", **experts)
    weights = random_weights(shape, dtype)
    events = [step((["p"], list(range(40)))), step((["p", "b", "a"], [1, 2]), (["p", "a", "b"], [3]))]
    events += [{"do": "move", "from": "a", "to": "p"}, step((["p", "a", "b"], [4]), (["p", "b", "a"], [5]))]
    ours, theirs = (list(run(kind(shape, weights, ["p", "a", "b"]), events)) for kind in (Engine, Oracle))
    epsilon = torch.finfo(dtype).eps
    assert all(logits.dtype == dtype for logits in ours)
    assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= allowed * epsilon


@pytest.mark.parametrize("first", [0, 1])
def test_experts_whose_probabilities_are_one_number_in_sixteen_bits_are_told_apart(first):
    """The router's softmax runs in float32: 0.50025 and 0.49975 would both be 0.5."""
    router = torch.tensor([[2.0], [1.0]] if first == 0 else [[1.0], [2.0]]) * 0.001
    down = torch.tensor([[[1.0]], [[2.0]]])  # so the second gives twice what the first gives
    one = torch.ones(1, dtype=torch.bfloat16)
    gate_up = Dense(torch.ones(2, 2, 1, dtype=torch.bfloat16))
    layer = Layer(one, Dense(one), Dense(one), one, gate_up, Dense(down.bfloat16()), router=router.bfloat16())
    shape = config(**SPARSE | {"num_experts": 2}, num_experts_per_tok=1)
    out = model.mixture_of_experts(one[None], layer, shape, PyTorchBackend()).item()
    assert out == pytest.approx([0.7311, 1.4621][first] * 0.50025, rel=0.01)


# ---- a weight is a type


@dataclass
class RowScaled:
    """Another kind of matrix: whole numbers of 8 bits, and a scale for each row. Nobody but this class knows it."""

    numbers: torch.Tensor  # [..., N, E] int8
    scales: torch.Tensor  # [..., N]

    @property
    def nbytes(self):
        return self.numbers.nbytes + self.scales.nbytes

    def unpacked(self):
        return self.numbers.to(self.scales.dtype) * self.scales[..., None]

    def times(self, x, bias=None):
        return torch.nn.functional.linear(x, self.unpacked(), bias)

    def float64(self):
        return self.unpacked().double()

    def __getitem__(self, expert):
        return RowScaled(self.numbers[expert], self.scales[expert])


def row_scaled(matrix: Dense) -> RowScaled:
    scales = matrix.tensor.abs().amax(-1) / 127
    return RowScaled((matrix.tensor / scales[..., None]).round().to(torch.int8), scales)


@many
@given(data=st.data(), shape=configs(), schedule=schedules(), seed=st.integers(0, 99))
def test_any_type_of_weight_goes_where_a_plain_one_goes(data, shape, schedule, seed):
    """Each matrix of each layer, and the head, may be of a type of its own: engine and oracle ask it, and agree."""
    weights = random_weights(shape, torch.float64, seed)
    for layer in weights.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Dense) and data.draw(st.booleans()):
                setattr(layer, name, row_scaled(value))
    if data.draw(st.booleans()):
        weights.head = row_scaled(weights.head)
    blocks, events = schedule
    assert compare(shape, weights, blocks, events, 5, 1e-8) <= 1e-9


# ---- what fails leaves no trace


class Stop(Exception):
    """Whatever may happen in the middle of a step."""


class FailingBackend(PyTorchBackend):
    """Spoils what it computes, and then fails, in the n-th layer from now on."""

    fails_in = 0

    def attend(self, q, kv, positions, scale):
        self.fails_in -= 1
        if self.fails_in == 0:
            kv.keys[positions.page, :, positions.place] = float("nan")
            kv.values[:, positions.plan.slot] = float("nan")
            raise Stop
        return super().attend(q, kv, positions, scale)


@many
@given(data=st.data(), shape=configs(), schedule=schedules(), page=pages)
def test_a_step_that_fails_half_way_leaves_the_cache_as_it_was(data, shape, schedule, page):
    """Between any two steps another one fails, in whatever layer: those that follow are right all the same."""
    blocks, events = schedule
    weights = random_weights(shape)
    backend = FailingBackend()
    engine, oracle = Engine(shape, weights, blocks, page, backend), WatchedOracle(shape, weights, blocks)
    for event in events:
        if data.draw(st.booleans()):
            own = data.draw(st.sampled_from(blocks))
            others = [block for block in blocks if block != own]
            before = dict(engine.cache.lengths)
            backend.fails_in = data.draw(st.integers(1, len(shape.layer_kinds)))
            with pytest.raises(Stop):
                engine.step([[*others, own]], [data.draw(tokens(st.integers(1, 9)))])
            assert engine.cache.lengths == before
        ours, theirs = list(run(engine, [event])), list(run(oracle, [event]))
        assume(oracle.narrowest > 1e-8)
        for logits, exact in zip(ours, theirs, strict=True):
            assert relative_difference(logits, exact) <= 1e-9


@pytest.mark.parametrize("outside", [-1, 61, 2**40])
def test_an_id_that_the_vocabulary_lacks_is_refused_before_anything_is_written(outside):
    shape = config()
    engine = Engine(shape, random_weights(shape), ["a", "b"])
    engine.step([["a"]], [[1, 2]])
    with pytest.raises(InputError, match=f"token {outside} is outside the vocabulary of 61"):
        engine.step([["a"], ["a", "b"]], [[1], [2, outside]])
    assert engine.cache.lengths == {"a": 2, "b": 0}


def test_a_plan_is_the_same_after_it_has_been_packed():
    shape = config()
    cache = Cache(shape, ["a", "b", "c"], torch.float32, page_size=2)
    cache.extend([["c"]], [5])
    plan = cache.extend([["c", "a"], ["c", "a", "b"]], [3, 4])
    packed = torch.empty(plan.packed_size(), dtype=torch.int64)
    plan.pack(packed)
    unpacked = plan.unpack(packed)
    for name, value in vars(plan).items():
        if torch.is_tensor(value):
            assert torch.equal(value, getattr(unpacked, name)), name
        else:
            assert value == getattr(unpacked, name), name
    padded = plan.padded(rows=9, blocks=5, pages=len(cache.page_owner) + 1)
    at_once = torch.empty(padded.packed_size(), dtype=torch.int64)
    plan.pack(at_once, larger_plan=padded)
    for ours, theirs in zip(padded.unpack(at_once).tensors(), padded.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert forward(torch.arange(7), random_weights(shape, torch.float32), shape, cache, unpacked).isfinite().all()
