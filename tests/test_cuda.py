"""The fast path is the oracle's too: on a GPU, through the kernels, and in a CUDA graph. Only there."""

import random
from dataclasses import replace
from statistics import mean

import pytest
import torch
import util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_packed import random_four_bit
from util import WatchedOracle, config, configs, random_weights, relative_difference, run, schedules, step

from minihogwild import Cache, Layer, LayerKind, Run, Sampling, Weights, load
from minihogwild import step as engine_step
from minihogwild.backend import PyTorchBackend
from minihogwild.generate import DUET
from minihogwild.gpu import kernels
from minihogwild.oracle import Oracle
from minihogwild.packed import Stacked, empty_eight_bit
from minihogwild.prompts import prompts_of
from minihogwild.weights import Dense
from minihogwild.workers import drive

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
few = settings(max_examples=15, suppress_health_check=list(HealthCheck))


def on_gpu(value):
    """A tensor, a matrix, a layer or all weights."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, Dense):
        return Dense(value.tensor.cuda())
    if isinstance(value, list):
        return [on_gpu(part) for part in value]
    if isinstance(value, (Layer, Weights)):
        return type(value)(**{name: on_gpu(part) for name, part in vars(value).items()})
    return value


class Engine:
    """On the GPU: a decode step is recorded."""

    def __init__(self, config, weights: Weights, blocks: list[str], backend: PyTorchBackend | None = None):
        self.config, self.weights = config, on_gpu(weights)
        self.cache = Cache(config, blocks, weights.embed.dtype, "cuda", backend)
        self.move, self.drop = self.cache.move, self.cache.drop

    def step(self, views: list[list[str]], tokens: list[list[int]]) -> torch.Tensor:
        return engine_step(views, tokens, self.weights, self.config, self.cache)


class Unrecorded(kernels.TritonBackend):
    """To record takes a while for each shape."""

    run = PyTorchBackend.run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@few
@given(configs(), schedules(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_kernels_equal_the_oracle(dtype, shape, schedule, biases, qk_norms, seed):
    weights = random_weights(shape, dtype, seed, biases, qk_norms)
    blocks, events = schedule
    backend = PyTorchBackend() if dtype == torch.float64 else Unrecorded()
    ours = [logits.cpu() for logits in run(Engine(shape, weights, blocks, backend), events)]
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if oracle.narrowest > 10 * TOLERANCE[dtype]:
        assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "N", "E"), [(1, 70, 100), (3, 960, 576), (16, 512, 27648), (17, 960, 576)])
def test_linear_in_sixteen_bits(dtype, T, N, E):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((T, E), (N, E), (N,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ours = kernels.TritonBackend().linear(x.cuda(), Dense(weight.cuda()), bias.cuda()).cpu()
    assert relative_difference(ours, exact) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 8, 9, 16, 17])
def test_linear_in_fewer_bits(dtype, T):
    """Each kernel for packed weights, and the assembly in one of them, which the interpreter can't read."""
    for N, E, group in [(70, 96, 32), (200, 256, 64), (960, 27648, 128), (130, 640, 640), (64, 200, 200)]:
        four_bit = random_four_bit(N, E, group, dtype, device="cuda")
        eight_bit = empty_eight_bit(N, E, dtype, "cuda")
        eight_bit.fill(0, torch.randn(N, E))
        x, bias = torch.randn(T, E, dtype=dtype), torch.randn(N, dtype=dtype)
        for weight in (four_bit, eight_bit, Stacked([four_bit, eight_bit])):
            exact = x.double() @ weight.float64().T
            with_its_bias = bias.repeat(len(exact.T) // N)
            ours = kernels.TritonBackend().linear(x.cuda(), weight, with_its_bias.cuda()).cpu()
            assert relative_difference(ours, exact + with_its_bias.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_equal_the_oracle_while_texts_grow(dtype):
    """In bfloat16, where these weights magnify every rounding: as near to it as PyTorch's own products on the CPU."""
    shape, draw = config("llama3", heads=10, kv_heads=2, head_dim=64), random.Random(0)
    weights, names = random_weights(shape, dtype), ["a", "b", "c"]

    def some(count: int) -> list[int]:
        return [draw.randrange(shape.vocab_size) for _ in range(count)]

    events = [step((["common"], some(70))), step((["common"], some(30)))]
    for n in range(150):
        views = [["common", *draw.sample([name for name in names if name != own], 2), own] for own in names]
        events.append(step(*((view, some(4 if n % 17 == 5 else 1 + (n % 7 == 3))) for view in views)))
        if n % 11 == 10:
            events.append({"do": "move", "from": names[n % 3], "to": "common"})
            events.append(step((["common"], some(20))))  # one block alone, its pages not in order
    engine, plain, oracle = (kind(shape, weights, ["common", *names]) for kind in (Engine, util.Engine, Oracle))
    exact = list(run(oracle, events))
    ours, theirs = (
        [relative_difference(a.cpu(), b) for a, b in zip(run(machine, events), exact)] for machine in (engine, plain)
    )
    assert sorted(engine.cache.backend.recorded[engine.cache].by_size) == [
        (4, 8),
        (8, 8),
        (16, 8),
    ]
    assert mean(ours) <= 1.5 * mean(theirs) if dtype == torch.bfloat16 else max(ours) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_experts(dtype):
    """The tables of groups are made on the device, new ones in each step."""
    shape = config("default", num_experts=40, num_experts_per_tok=3, moe_intermediate_size=96, norm_topk_prob=True)
    shape = replace(shape, layer_kinds=(LayerKind(experts=True),) * 2)
    weights, names, draw = random_weights(shape, dtype), ["a", "b", "c"], random.Random(0)
    views = [[*(name for name in names if name != own), own] for own in names]
    events = [step((["a"], [draw.randrange(shape.vocab_size) for _ in range(60)]))]
    for _ in range(20):
        events.append(step(*((view, [draw.randrange(shape.vocab_size)]) for view in views)))
    engine, plain, oracle = (kind(shape, weights, names) for kind in (Engine, util.Engine, Oracle))
    exact = list(run(oracle, events))
    ours, theirs = (
        [relative_difference(a.cpu(), b) for a, b in zip(run(machine, events), exact)] for machine in (engine, plain)
    )
    assert list(engine.cache.backend.recorded[engine.cache].by_size) == [(4, 8)]
    assert mean(ours) <= 1.5 * mean(theirs) if dtype == torch.bfloat16 else max(ours) <= TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_does_not_wait_tells_what_one_that_waits_does(seed):
    """Sampled on the device, fed before the host has read it; retirements, moves and prefixes come a step late."""
    ahead, waiting = (Run(load(DUET), prompts_of(DUET).problem, 3, sampling=Sampling(1.0), seed=seed) for _ in range(2))
    told = [list(ahead), list(drive(waiting, waiting.new_cache()))]
    assert len(told[0]) > 100
    for ours, theirs in zip(*told, strict=True):
        assert {**ours, "logits": None} == {**theirs, "logits": None}
        assert torch.equal(ours.get("logits", torch.tensor(0)), theirs.get("logits", torch.tensor(0)))


def test_no_step_waits_for_the_device():
    """But for the sampled ids of the step before, which an event tells: else the GPU would wait for the host."""
    run = Run(load(DUET), prompts_of(DUET).problem, 3, sampling=Sampling(0.7, top_k=20, top_p=0.9), max_steps=60)
    try:
        for event in run:
            if event["do"] == "step" and 20 <= run.forward_steps < 40:
                torch.cuda.set_sync_debug_mode("error")
            else:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.forward_steps > 40


def test_the_next_run_plays_what_the_first_recorded():
    model = load(DUET)
    texts = []
    for workers in (2, 3, 2):
        run = Run(model, prompts_of(DUET).problem, workers, max_steps=40)
        texts.append([event["text"] for event in run if event["do"] == "text"])
        recordings = dict(model.backend.recorded[model.idle_cache].by_size)
        if workers == 2 and len(texts) == 1:
            first = recordings
    assert texts[0] == texts[2]
    assert all(recordings[size] is first[size] for size in first)


def test_kernels_can_be_switched_off():
    """The same text, in float32, by plain PyTorch on the GPU."""
    runs = [Run(load(DUET, "float32"), prompts_of(DUET).problem, 2, backend=b) for b in (None, PyTorchBackend())]
    texts = [[event["text"] for event in run if event["do"] == "text"] for run in runs]
    assert texts[0] == texts[1]
    assert isinstance(runs[0].backend, kernels.TritonBackend)
