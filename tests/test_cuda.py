"""The fast path is the oracle's too: on a GPU, through the kernels, compiled, and in a CUDA graph. Only there."""

import random
from statistics import mean

import pytest
import torch
import util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from util import WatchedOracle, config, configs, random_weights, relative_difference, run, schedules, step

from minihogwild import Cache, Sampling, Weights, kernels, load, model
from minihogwild.config import Layer
from minihogwild.generate import DUET, Run
from minihogwild.oracle import Oracle
from minihogwild.prompts import prompts_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
few = settings(max_examples=15, suppress_health_check=list(HealthCheck))


class Engine:
    """On the GPU: a decode step is recorded, unless layers are sparse."""

    def __init__(self, config, weights: Weights, blocks: list[str]):
        def cuda(tensors) -> dict:
            return {name: tensor.cuda() if isinstance(tensor, torch.Tensor) else tensor for name, tensor in tensors}

        layers = [Layer(**cuda(vars(layer).items())) for layer in weights.layers]
        self.config, self.weights = config, Weights(**cuda(vars(weights).items()) | {"layers": layers})
        self.cache = Cache(config, blocks, weights.embed.dtype, "cuda")

    def step(self, views: list[list[str]], tokens: list[list[int]]) -> torch.Tensor:
        return model.step(views, tokens, self.weights, self.config, self.cache)

    def move(self, source: str, target: str) -> None:
        self.cache.move(source, target)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@few
@given(configs(), schedules(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_kernels_equal_the_oracle(dtype, shape, schedule, biases, qk_norms, seed):
    weights = random_weights(shape, dtype, seed, biases, qk_norms)
    blocks, events = schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "decode", model.forward)  # to compile takes seconds for each shape
        ours = [logits.cpu() for logits in run(Engine(shape, weights, blocks), events)]
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if oracle.narrowest > 10 * TOLERANCE[dtype]:
        assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "N", "E"), [(1, 70, 100), (3, 960, 576), (16, 512, 27648), (17, 960, 576)])
def test_linear_in_sixteen_bits(dtype, T, N, E):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((T, E), (N, E), (N,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ours = kernels.linear(x.cuda(), weight.cuda(), bias.cuda()).cpu()
    assert relative_difference(ours, exact) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("compile_from", [0, model.COMPILE_FROM], ids=["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_equal_the_oracle_while_texts_grow(dtype, compile_from, monkeypatch):
    """In bfloat16, where these weights magnify every rounding: as near to it as PyTorch's own products on the CPU."""
    monkeypatch.setattr(model, "COMPILE_FROM", compile_from)
    shape, draw = config("llama3", heads=10, kv_heads=2, head_dim=64), random.Random(0)
    weights, names = random_weights(shape, dtype), ["a", "b", "c"]

    def some(count: int) -> list[int]:
        return [draw.randrange(shape.vocab_size) for _ in range(count)]

    events = [step((["common"], some(70))), step((["common"], some(30)))]
    for n in range(150):
        views = [["common", *draw.sample([name for name in names if name != own], 2), own] for own in names]
        events.append(step(*((view, some(4 if n % 17 == 5 else 1)) for view in views)))
        if n % 11 == 10:
            events.append({"do": "move", "from": names[n % 3], "to": "common"})
            events.append(step((["common"], some(20))))  # one block alone, its pages not in order
    engine, plain, oracle = (kind(shape, weights, ["common", *names]) for kind in (Engine, util.Engine, Oracle))
    exact = list(run(oracle, events))
    ours, theirs = (
        [relative_difference(a.cpu(), b) for a, b in zip(run(machine, events), exact)] for machine in (engine, plain)
    )
    assert list(engine.cache.graphs) == [3]
    assert mean(ours) <= 1.5 * mean(theirs) if dtype == torch.bfloat16 else max(ours) <= TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_does_not_wait_tells_what_one_that_waits_does(seed):
    """Sampled on the device, fed before the host has read it; retirements, moves and prefixes come a step late."""
    runs = [Run(load(DUET), prompts_of(DUET).problem, 3, sampling=Sampling(1.0), seed=seed) for _ in range(2)]
    runs[1].ahead = False
    told = [list(run) for run in runs]
    assert runs[0].ahead
    assert len(told[0]) > 100
    assert told[0] == told[1]
