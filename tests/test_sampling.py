"""Which token is drawn: filters against a slow restatement, frequencies, and a random stream for each worker."""

import math
import time
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from refusals import refused
from torch import Tensor

import minihogwild
from minihogwild import Sampling
from minihogwild.sampling import filtered


def sample(*arguments: object) -> list[int]:
    return minihogwild.sample(*arguments).tolist()


def streams(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7919 * seed + n) for n in range(count)]


def draw(logits: list[float], sampling: Sampling, times: int, seed: int = 0) -> list[int]:
    """`times` tokens from the same logits, each with a stream of its own."""
    return sample(torch.tensor(logits).expand(times, -1), sampling, streams(times, seed))


def of(*probabilities: float) -> list[float]:
    """Logits with these probabilities."""
    return [math.log(p) for p in probabilities]


# ---- greedy


def test_temperature_0_takes_the_likeliest():
    assert Sampling() == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, -1.0, 4.0], [-3.0, -2.0, -1.0]])
    assert sample(logits, Sampling(), streams(3)) == [1, 0, 2]
    assert sample(logits, Sampling(0.0, 2, 0.5, 0.1), streams(3)) == [1, 0, 2]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=1, top_p=0.5, min_p=0.1)])
def test_rows_that_are_no_numbers_give_no_token(sampling):
    rows = [[0.0, math.nan, 9.0], [0.0, math.inf, 9.0], [-math.inf, -math.inf, 9.0], [math.nan] * 3]
    assert sample(torch.tensor(rows), sampling, streams(4)) == [-1, -1, 2, -1]


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0, min_p=1.0)])
def test_each_filter_at_its_tightest_is_greedy(sampling):
    assert set(draw(of(0.2, 0.2, 0.3, 0.3 - 1e-4, 1e-4), sampling, 200)) == {2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300, 5e-324])
def test_ever_lower_temperatures_approach_greedy(temperature):
    assert draw([1.0, 30.0, 29.0, -5.0], Sampling(temperature), 20) == [1] * 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_dtype(dtype):
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]], dtype=dtype)
    assert sample(logits, Sampling(), streams(1)) == [1]
    assert sample(logits, Sampling(0.7, top_k=3, top_p=0.99, min_p=0.5), streams(1)) == [1]
    assert isinstance(sample(logits, Sampling(1.0), streams(1))[0], int)


# ---- the filters, restated


def kept(logits: list[float], sampling: Sampling) -> tuple[dict[int, float], float]:
    """(probability of each token that is left, how close a decision was)."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    weight = {i: math.exp((logits[i] - max(logits)) / sampling.temperature) for i in order}
    if sampling.top_k:
        weight = {i: weight[i] for i in order[: sampling.top_k]}
    total, reached, closeness = sum(weight.values()), 0.0, 1.0
    nucleus = {}
    for i, w in weight.items():
        if sampling.top_p < 1:
            closeness = min(closeness, abs(reached - sampling.top_p))
        if reached >= sampling.top_p:
            break
        nucleus[i] = w
        reached += w / total
    closeness = min([closeness, *(abs(w - sampling.min_p) for w in nucleus.values() if sampling.min_p)])
    left = {i: w for i, w in nucleus.items() if w >= sampling.min_p}  # the likeliest has weight 1
    total = sum(left.values())
    return {i: w / total for i, w in left.items()}, closeness


some_logits = st.lists(st.integers(-24, 24), min_size=1, max_size=9, unique=True).map(lambda ns: [n / 8 for n in ns])
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.5, 4.0])
top_ks, top_ps, min_ps = st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.0, 0.9)


def check_filters(logits: list[float], sampling: Sampling) -> None:
    expected, closeness = kept(logits, sampling)
    assume(closeness > 1e-4)
    times = 300
    drawn = draw(logits, sampling, times)
    assert set(drawn) <= expected.keys()  # a filtered token is never drawn
    for token, probability in expected.items():
        # Five standard deviations and a little more: wrong once in millions
        bound = 5 * math.sqrt(times * probability * (1 - probability)) + 2
        assert abs(drawn.count(token) - times * probability) <= bound


@examples(50)
@given(some_logits, temperatures)
def test_temperature_alone(logits, temperature):
    check_filters(logits, Sampling(temperature))


@examples(50)
@given(some_logits, temperatures, top_ks)
def test_top_k(logits, temperature, top_k):
    check_filters(logits, Sampling(temperature, top_k=top_k))


@examples(50)
@given(some_logits, temperatures, top_ps)
def test_top_p(logits, temperature, top_p):
    check_filters(logits, Sampling(temperature, top_p=top_p))


@examples(50)
@given(some_logits, temperatures, min_ps)
def test_min_p(logits, temperature, min_p):
    check_filters(logits, Sampling(temperature, min_p=min_p))


@examples(50)
@given(some_logits, temperatures, top_ks, top_ps, min_ps)
def test_all_filters_together(logits, temperature, top_k, top_p, min_p):
    check_filters(logits, Sampling(temperature, top_k, top_p, min_p))


def test_temperature_comes_before_every_filter():
    logits = of(0.8, 0.15, 0.05)  # at temperature 4: about 0.45, 0.30, 0.23
    assert set(draw(logits, Sampling(1.0, top_p=0.5), 300)) == {0}
    assert set(draw(logits, Sampling(4.0, top_p=0.5), 300)) == {0, 1}
    assert set(draw(logits, Sampling(1.0, min_p=0.4), 300)) == {0}
    assert set(draw(logits, Sampling(4.0, min_p=0.4), 300)) == {0, 1, 2}


def test_top_k_comes_before_top_p():
    logits = of(0.4, 0.3, 0.2, 0.1)  # of the first two alone, the first has 0.57
    assert set(draw(logits, Sampling(1.0, top_p=0.55), 300)) == {0, 1}
    assert set(draw(logits, Sampling(1.0, top_k=2, top_p=0.55), 300)) == {0}


def test_top_p_comes_before_min_p():
    logits = of(0.5, 0.2, 0.15, 0.15)  # were min-p first, the first would have 0.71
    assert set(draw(logits, Sampling(1.0, top_p=0.65, min_p=0.35), 300)) == {0, 1}


def test_the_token_that_reaches_p_is_kept():
    assert set(draw(of(0.5, 0.3, 0.2), Sampling(1.0, top_p=0.6), 300)) == {0, 1}


def test_top_k_keeps_k_where_logits_tie():
    assert len(set(draw([1.0, 1.0, 1.0, 1.0], Sampling(1.0, top_k=2), 300))) == 2
    assert set(draw([1.0, 1.0, 1.0, 1.0], Sampling(1.0), 300)) == {0, 1, 2, 3}


def test_rows_are_filtered_each_by_itself():
    logits = torch.tensor([of(0.6, 0.3, 0.1), of(0.1, 0.3, 0.6), of(1 / 3, 1 / 3, 1 / 3)]).repeat(200, 1)
    drawn = sample(logits, Sampling(1.0, min_p=0.9), streams(600))
    assert [set(drawn[row::3]) for row in range(3)] == [{0}, {2}, {0, 1, 2}]


def test_impossible_tokens_are_never_drawn():
    assert set(draw([-math.inf, 0.0, -math.inf, 0.0], Sampling(1.0), 300)) == {1, 3}
    assert set(draw([-1e4, 0.0, -1e4, 1e4], Sampling(1.0), 300)) == {3}


@examples(50)
@given(some_logits, top_ks, top_ps, min_ps, st.sampled_from([0.0, 2**-24, 0.5, 1 - 2**-24]))
def test_the_ends_of_the_random_range_give_kept_tokens(logits, top_k, top_p, min_p, number):
    sampling = Sampling(1.0, top_k, top_p, min_p)
    expected, closeness = kept(logits, sampling)
    assume(closeness > 1e-4)
    with patch("minihogwild.sampling.torch.rand", lambda *shape, **_: torch.full(shape, number)):
        assert set(sample(torch.tensor([logits]), sampling, streams(1))) <= expected.keys()


# ---- frequencies


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, top_k=4), Sampling(1.5, 5, 0.9, 0.2)],
    ids=str,
)
def test_frequencies_match_probabilities(sampling):
    logits = of(0.05, 0.3, 0.1, 0.25, 0.02, 0.28)
    expected, _ = kept(logits, sampling)
    times = 20_000
    stream = torch.Generator().manual_seed(3)  # one stream, drawn from again and again
    drawn = sample(torch.tensor(logits).expand(times, -1), sampling, [stream] * times)
    assert set(drawn) == expected.keys()
    chi_square = sum((drawn.count(token) - times * p) ** 2 / (times * p) for token, p in expected.items())
    assert chi_square < 25  # at most 5 degrees of freedom: 1.4 in 10,000 seeds are above


# ---- a large vocabulary

V = 152_064  # Qwen's


def likeliest_first_in_float64(row: Tensor, sampling: Sampling) -> tuple[list[int], Tensor]:
    """(ids, probabilities) of what is left by the filters, the plain way: all is sorted, and all is exact."""
    exact, ids = row.double().sort(descending=True)
    if sampling.top_k:
        exact = exact[: sampling.top_k]
    probabilities = (exact / sampling.temperature).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    left = probabilities >= sampling.min_p * probabilities[0]
    if sampling.top_p < 1:
        left &= before < sampling.top_p
    probabilities = probabilities[left]  # a stretch from the beginning
    return ids[: len(probabilities)].tolist(), probabilities / probabilities.sum()


@examples(60)
@given(
    vocabulary=st.sampled_from([3, 300, 8192, 8193, 20_000]),
    spread=st.sampled_from([0.5, 3.0, 8.0]),
    sampling=st.builds(
        Sampling,
        temperature=temperatures,
        top_k=st.sampled_from([0, 0, 1, 40, 9000]),
        top_p=st.sampled_from([1.0, 0.95, 0.5]),
        min_p=st.sampled_from([0.0, 0.0, 0.02]),
    ),
    seed=st.integers(0, 1000),
)
def test_the_tokens_are_those_of_the_plain_way(vocabulary, spread, sampling, seed):
    """Whoever sorts everything, and walks down from the likeliest with the same random number, gets the same token.

    But where two are nearly even; and the least likely of many tokens may come in another order.
    """
    logits = spread * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(seed))
    drawn = sample(logits, sampling, streams(8, seed))
    for row, token, stream in zip(logits, drawn, streams(8, seed), strict=True):
        ids, probabilities = likeliest_first_in_float64(row, sampling)
        share = torch.rand(1, generator=stream).double()
        reached = probabilities.cumsum(0)
        place = int(torch.searchsorted(reached, share, right=True))
        near = 1e-5 + 2 * probabilities[-1]  # what a filter decides about the last token moves all a little
        clear = (reached - share).abs().min() > near
        if clear and place < 8192:
            assert token == ids[place]
        assert token in ids or probabilities[-1] < 1e-3


def test_nothing_is_left_out_at_top_p_1_though_a_float32_sum_may_be_1_before_the_end():
    probabilities = torch.tensor([0.5, 0.5, *[1e-9] * 5]).expand(2, -1)
    assert (probabilities.cumsum(-1) - probabilities)[0, -1] >= 1  # "all that is before reaches 1"
    assert torch.equal(filtered(probabilities, Sampling(1.0, top_p=1.0)), probabilities)


def test_the_unlikely_are_drawn_though_each_is_lost_in_a_float32_sum():
    count = 200_000
    logits = torch.full((1, 1 + count), math.log(0.005 / count))
    logits[0, 0] = math.log(0.995)
    with patch("minihogwild.sampling.torch.rand", lambda *shape, **_: torch.full(shape, 0.9985)):
        (drawn,) = sample(logits, Sampling(1.0), streams(1))
    assert 0.6 * count < drawn < 0.8 * count  # 0.7 of them: (0.9985 - 0.995) / 0.005


@pytest.mark.parametrize("unlikely", [2.9e-8, 5.3e-8])
def test_nothing_is_left_out_though_a_float32_softmax_may_sum_to_more_than_1(unlikely):
    """One likely token and 150,000 unlikely ones: about 9,500 of these come after the others have reached 1."""
    falling = torch.linspace(0, 1e-3, V)  # so that they have an order: the last is the least likely
    logits = math.log(unlikely) - falling
    logits[0] = 0.0
    assert logits.softmax(0).double().sum() > 1.0002
    with patch("minihogwild.sampling.torch.rand", lambda *shape, **_: torch.full(shape, 1 - 2**-24)):
        (drawn,) = sample(logits[None], Sampling(1.0), streams(1))
    assert V - 1000 < drawn < V


def fastest(action: Callable[[], object], times: int = 7) -> float:
    """Seconds of this process, the best of several: other programs of a busy machine do not count."""
    seconds = []
    for _ in range(times):
        began = time.process_time()
        action()
        seconds.append(time.process_time() - began)
    return min(seconds)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, min_p=0.05), Sampling(1.0, top_k=50)], ids=str)
def test_the_whole_vocabulary_is_not_sorted_where_no_order_is_asked_for(sampling):
    logits = 0.01 * torch.randn(4, V)  # nearly flat: no few tokens hold most of it
    own = streams(4)
    sorting = fastest(lambda: logits.topk(V))
    sampling_takes = fastest(lambda: minihogwild.sample(logits, sampling, own))
    assert sampling_takes <= 0.7 * sorting  # 0.45 to 0.5; with a sort it would be more than 1


# ---- streams


def written(steps: list[Tensor], rows: list[int], seed: int = 0) -> list[list[int]]:
    """What the workers `rows` draw step by step, where only these take part."""
    own = streams(9, seed)
    drawn = [sample(logits[rows], Sampling(1.0, top_p=0.95), [own[row] for row in rows]) for logits in steps]
    return [list(tokens) for tokens in zip(*drawn)]


@examples(40)
@given(
    workers=st.integers(1, 5),
    some=st.sets(st.integers(0, 4), min_size=1),
    vocabulary=st.sampled_from([3, 40]),
    seed=st.integers(0, 50),
)
def test_what_a_worker_draws_does_not_depend_on_the_other_rows(workers, some, vocabulary, seed):
    rows = [row for row in some if row < workers]
    assume(rows)
    random = torch.Generator().manual_seed(seed)
    steps = [torch.randn(workers, vocabulary, generator=random) for _ in range(12)]
    together = written(steps, list(range(workers)), seed)
    assert written(steps, rows, seed) == [together[row] for row in rows]
    assert written(steps, rows[::-1], seed) == [together[row] for row in rows[::-1]]
    assert written(steps, rows, seed) == written(steps, rows, seed)  # same seed, same tokens


def test_streams_differ():
    steps = [torch.zeros(4, 50)] * 20
    texts = written(steps, [0, 1, 2, 3]) + written(steps, [0, 1, 2, 3], seed=1)
    assert len({tuple(text) for text in texts}) == 8


# ---- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", -1e-9),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("min_p", math.nan),
    ],
)
def test_invalid_values_are_refused_by_name(field, value):
    with refused(field, str(value)):
        Sampling(**{field: value})


def test_the_limits_themselves_are_valid():
    assert draw([0.0, 5.0], Sampling(1.0, top_k=0, top_p=1.0, min_p=1.0), 5) == [1] * 5
