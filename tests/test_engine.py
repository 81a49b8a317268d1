"""The heart of the project: the engine's logits are those of plain recomputation, whatever the schedule."""

import itertools
import statistics
from unittest.mock import patch

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

from minihogwild import Cache, attention, model
from minihogwild.config import Layer
from minihogwild.oracle import Oracle

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
pages = st.sampled_from([2, 5, 64])  # small pages, so that short texts cross their edges too
many = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def compare(shape, weights, blocks, events, page, narrow=0.0, static=False) -> float:
    """Passes by schedules in which a token's choice of experts is so narrow that rounding could decide it."""
    with patch("minihogwild.cache.PAGE", page):
        ours = list(run(Engine(shape, weights, blocks, static), events))
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if shape.sparse_layers:
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
    page, static, tolerance = data.draw(pages), data.draw(st.booleans()), TOLERANCE[dtype]
    assert compare(shape, weights, blocks, events, page, 10 * tolerance, static) <= tolerance


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("rope", ROPES)
def test_engine_equals_oracle_over_many_pages_and_moves(rope, static):
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
    assert compare(shape, weights, ["common", "a", "b", "c"], events, 64, static=static) <= 1e-9


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
    with patch("minihogwild.cache.PAGE", page):
        *_, chunked = run(Engine(shape, weights, ["p"]), chunks)
        [whole] = run(Engine(shape, weights, ["p"]), [step((["p"], text))])
    assert relative_difference(chunked, whole) <= 1e-9


@many
@given(configs(), tokens(st.integers(2, 40)), st.lists(st.integers(1, 40), max_size=4), pages)
def test_splitting_a_text_over_blocks_of_one_view_changes_nothing(shape, text, cuts, page):
    weights = random_weights(shape)
    cuts = sorted({0, len(text)} | {cut for cut in cuts if cut < len(text)})
    blocks = [f"part {n}" for n in range(len(cuts) - 1)]
    parts = [step((blocks[: n + 1], text[a:b])) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
    with patch("minihogwild.cache.PAGE", page):
        *_, split = run(Engine(shape, weights, blocks), parts)
        [whole] = run(Engine(shape, weights, ["p"]), [step((["p"], text))])
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
    with patch("minihogwild.cache.PAGE", page):
        ours = list(run(Engine(shape, weights, blocks), events))
        theirs = list(run(Engine(shape, weights, blocks), shuffled))
    assert max(relative_difference(b, a[order]) for a, b, order in zip(ours, theirs, orders)) <= 1e-9


@many
@given(configs(), tokens(st.integers(2, 30)), st.integers(1, 29), pages)
def test_a_move_equals_writing_there_in_the_first_place_where_contents_do_not_depend_on_it(shape, text, cut, page):
    """One layer: keys and values depend on the token alone, so a moved text is the text written in one piece."""
    shape = type(shape)(**{**vars(shape), "num_hidden_layers": 1})
    weights = random_weights(shape)
    cut = min(cut, len(text) - 1)
    events = [
        step((["a"], text[:cut])),
        step((["b"], text[cut:])),
        {"do": "move", "from": "b", "to": "a"},
        step((["a", "c"], [5])),
    ]
    with patch("minihogwild.cache.PAGE", page):
        *_, moved = run(Engine(shape, weights, ["a", "b", "c"]), events)
        *_, whole = run(Engine(shape, weights, ["a", "c"]), [step((["a"], text)), step((["a", "c"], [5]))])
    assert relative_difference(moved, whole) <= 1e-9


@pytest.mark.parametrize("static", [False, True])
def test_tokens_may_be_such_as_only_the_device_knows(static):
    shape, views = config(), [["a", "b"], ["b", "a"]]
    weights, caches = random_weights(shape), [Cache(shape, ["a", "b"], torch.float64, static=static) for _ in range(2)]
    drawn = torch.tensor([6, 3, 5])
    for known, unknown in (([[3], [5]], [[-2], [-3]]), ([[5], [9]], [[-3], [9]]), ([[1, 2], [6]], [[1, 2], [-1]])):
        expected = model.step(views, known, weights, shape, caches[0])
        assert torch.equal(model.step(views, unknown, weights, shape, caches[1], drawn), expected)


SPARSE = {"sparse_layers": (0, 1), "num_experts": 3, "moe_intermediate_size": 9}


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
    ones = torch.ones(1)
    tensors = {"attn_norm": ones, "qkv": ones, "out": ones, "mlp_norm": ones, "gate_up": torch.ones(2, 2, 1)}
    layer = Layer(**tensors, down=down, router=router)
    layer = Layer(**{name: None if tensor is None else tensor.bfloat16() for name, tensor in vars(layer).items()})
    shape = config(**SPARSE | {"num_experts": 2}, num_experts_per_tok=1)
    out = model.mixture(torch.ones(1, 1, dtype=torch.bfloat16), layer, shape, attention).item()
    assert out == pytest.approx([0.7311, 1.4621][first] * 0.50025, rel=0.01)
