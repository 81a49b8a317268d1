"""The Triton kernels are the oracle's too: by Triton's interpreter, without a GPU, in float32 (it has no bfloat16)."""

import gc
from dataclasses import replace

import pytest
import torch
import util
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_packed import random_four_bit
from util import WatchedOracle, config, configs, random_weights, relative_difference, run, schedules, step

if torch.cuda.is_available():
    pytest.skip("test_cuda.py does it in earnest", allow_module_level=True)
# conftest.py has asked for the interpreter
pytest.importorskip("triton", reason="needs: python -m pip install triton 'numpy<2.4'")
from triton import next_power_of_2

from minihogwild import Cache, packed
from minihogwild.attention import Plan
from minihogwild.backend import Chosen, PyTorchBackend
from minihogwild.gpu import attention as gpu_attention
from minihogwild.gpu import kernels, products, recorded
from minihogwild.gpu.experts import choose, groups_of
from minihogwild.gpu.one_shot import BLOCK, LARGEST, MOST_PROGRAMS, _one_shot_sum
from minihogwild.gpu.recorded import RecordedSteps, Recording, padded_tokens
from minihogwild.oracle import Oracle
from minihogwild.weights import Dense

seeds = st.integers(0, 99)
BEHIND = [step((["a"], [*range(9)] * 8)), {"do": "move", "from": "a", "to": "b"}, step((["b"], [*range(9)] * 8))]


class Pages(kernels.TritonBackend):
    """The kernel over pages, whatever is read; tables as a recorded step has them. (In PyTorch: the few-row product,
    which is for 16 bits.)"""

    def attend(self, q, kv, positions, scale):
        return kernels.attend_to_pages(q, kv, positions, scale)

    def run(self, forward, tokens, weights, config, cache, plan):
        rows, workers = next_power_of_2(len(tokens)), len(plan.last)
        plan = plan.padded(rows, len(cache.lengths) + 1, len(cache.page_owner))
        tokens = padded_tokens(tokens, rows)
        return PyTorchBackend.run(self, forward, tokens, weights, config, cache, plan)[:workers]


class OneBlockWhereItCan(kernels.TritonBackend):
    """FlashAttention in float32 and for few rows too, where the engine has no use for it."""

    def attend(self, q, kv, positions, scale):
        alone = positions.plan.lone_block_length > 0
        attend = kernels.attend_to_one_block if alone else kernels.attend_to_pages
        return attend(q, kv, positions, scale)


@pytest.mark.parametrize("backend", [Pages(), OneBlockWhereItCan()], ids=["pages", "one block"])
@pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore:divide by zero")  # an empty share's log2(0)
@settings(max_examples=20)
@example(config("llama3", heads=6, kv_heads=2), (["a", "b"], BEHIND), True, 0)  # a block whose pages are not in order
@given(configs(), schedules(), st.booleans(), st.integers(0, 99))
def test_attention_equals_the_oracle(backend, shape, schedule, qk_norms, seed):
    """Three programs share what 256 do on a GPU: so each has pages to go through."""
    weights, (blocks, events) = random_weights(shape, torch.float32, seed, False, qk_norms), schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_attention, "PROGRAMS", 3 * shape.num_key_value_heads)
        ours = list(run(util.Engine(shape, weights, blocks, backend=backend), events))
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if oracle.narrowest > 2e-3:
        assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= 2e-4


class Player(PyTorchBackend):
    """Records small steps as the kernels' backend does, and plays the recordings, without a GPU."""

    def __init__(self):
        self.recorded = RecordedSteps()
        self.played = 0

    def run(self, forward, tokens, weights, config, cache, plan):
        if len(tokens) > 16:
            return forward(tokens, weights, config, cache, plan)
        self.played += 1
        return self.recorded.play(forward, tokens, weights, config, cache, plan)


def record_on_cpu(forward, tokens, weights, config, cache, plan) -> Recording:
    """What a CUDA graph does: the same reads and writes of the same memory, each time that it is replayed."""
    packed = torch.empty(plan.packed_size(), dtype=torch.int64)
    plan.pack(packed)
    plan, tokens = plan.unpack(packed), tokens.clone()
    logits = forward(tokens, weights, config, cache, plan)

    class Graph:
        def replay(self):
            logits.copy_(forward(tokens, weights, config, cache, plan))

    return Recording(Graph(), tokens, packed, plan, logits)


@settings(max_examples=40)
@given(configs(), schedules(), st.integers(0, 99))
def test_recordings_equal_the_oracle(shape, schedule, seed):
    """Steps of any number of workers and tokens; moves and drops between them; a pool that grows."""
    weights, (blocks, events) = random_weights(shape, torch.float64, seed), schedule
    player = Player()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "record", record_on_cpu)
        ours = list(run(util.Engine(shape, weights, blocks, backend=player), events))
    theirs = list(run(Oracle(shape, weights, blocks), events))
    assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= 1e-9
    assert all(rows in (1, 2, 4, 8, 16) for rows, _ in player.recorded.by_size)


def test_a_recording_serves_steps_of_several_sizes_until_the_pool_grows():
    shape, player = config("default"), Player()
    weights = random_weights(shape, torch.float32)
    recorded_now = []

    def counting(*arguments):
        recorded_now.append(len(arguments[1]))
        return record_on_cpu(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "record", counting)
        engine = util.Engine(shape, weights, ["a", "b", "c"], backend=player)
        for counts in ([1, 1, 1], [1, 2], [4], [1], [2, 3], [3, 4]):
            views = [["a"], ["a", "b"], ["b", "a", "c"]][: len(counts)]
            engine.step(views, [[7] * count for count in counts])
        assert recorded_now == [4, 1, 8]
        engine.step([["a"]], [[1] * 5000])
        engine.step([["a"]], [[1]])
        assert recorded_now == [4, 1, 8, 1]


def test_recordings_end_with_their_cache():
    """They would keep its memory."""
    backend, cache = kernels.TritonBackend(), Cache(config("default"), ["a"], torch.float32)
    backend.recorded.setdefault(cache, RecordedSteps())
    assert len(backend.recorded) == 1
    del cache
    gc.collect()
    assert len(backend.recorded) == 0


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize(("T", "N", "E"), [(1, 70, 100), (3, 96, 576), (16, 130, 8300)])
def test_linear_in_float16(T, N, E):
    """The one 16-bit type that the interpreter has: short and long rows, split or not, ends that fill no tile."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float16) for shape in ((T, E), (N, E), (N,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ours = kernels.linear_for_few_rows(x, weight, None, bias)
    assert relative_difference(ours, exact) <= torch.finfo(torch.float16).eps


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize(("T", "F", "E"), [(1, 32, 100), (3, 70, 576), (16, 96, 8300)])
def test_linear_and_swiglu_in_float16(T, F, E):
    """One kernel for both, where F is a multiple of 32: what it computes in between is rounded as by itself."""
    x, weight = torch.randn(T, E, dtype=torch.float16), torch.randn(2 * F, E, dtype=torch.float16) / E**0.5
    ours = kernels.TritonBackend().linear_and_swiglu(x, Dense(weight))
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    assert ours.shape == (T, F)
    assert relative_difference(ours, exact) <= 2 * torch.finfo(torch.float16).eps

    eight_bit = packed.empty_eight_bit(2 * F, E, torch.float16, "cpu")
    eight_bit.fill(0, weight.float())
    gate, up = (x.double() @ eight_bit.float64().T).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    ours = kernels.TritonBackend().linear_and_swiglu(x, eight_bit)
    assert relative_difference(ours, exact) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("D", [2, 12, 64])
def test_rotations_of_a_step_are_exact_far_out(D):
    """For each block of each row, and for the token's own place; to the last bit of float32, at position 131,072."""
    offset = torch.tensor([[0, 131000, 7], [131072, 0, 131072]])
    visible = torch.tensor([[0, 73, 5], [9, 131072, 0]])
    plan = Plan(offset, visible, torch.tensor([1, 1]), *[torch.zeros(2, dtype=torch.int64)] * 5, 64, 0)
    frequencies = 10000.0 ** -(torch.arange(D // 2) * 2 / D).double()
    ours = kernels.TritonBackend().positions(plan, frequencies, None, torch.float32)
    theirs = PyTorchBackend().positions(plan, frequencies, None, torch.float32)
    for name in ("key_rotation", "query_rotation"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore:divide by zero")
def test_pages_that_no_row_sees_are_not_read(monkeypatch):
    """What lies there may be anything: here it is NaN, which a product with 0 would hand on."""
    monkeypatch.setattr(gpu_attention, "PROGRAMS", 4)
    shape = config("default", heads=4, kv_heads=2, layers=1)
    weights = random_weights(shape, torch.float32)
    blocks = ["a", "b", "c", "d"]
    engines = [util.Engine(shape, weights, blocks, 16, kernels.TritonBackend()) for _ in range(2)]
    for engine in engines:
        engine.step([["a"], ["b"], ["c"], ["d"]], [[7] * 20, [8] * 5, [9] * 17, [3]])
    for page in engines[0].cache.pages["a"] + engines[0].cache.pages["c"]:  # the others lie between them
        for kv in engines[0].cache.layers:
            kv.keys[page] = torch.nan
            kv.values[:, page * 16 : (page + 1) * 16] = torch.nan
    ours, theirs = (engine.step([["d", "b"]], [[1]]) for engine in engines)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gigabytes", [80, 3, 0.5, 0.001])
def test_a_prompt_is_taken_at_once_where_memory_allows(monkeypatch, gigabytes):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gigabytes * 1e9), 80 * 10**9))
    shape = replace(config("default", heads=40, kv_heads=8), hidden_size=5120, intermediate_size=27648)
    chunk = kernels.TritonBackend().prefill_chunk(100_000, shape)
    assert chunk in {16384, 8192, 4096, 2048, 1024, 512, 256}
    widest = 2 * 3 * 27648 * chunk  # gate, up, and the product of both, in 16 bits
    assert chunk == 256 or widest < 0.25e9 * gigabytes
    assert chunk == 16384 or 2 * 2 * widest > 0.25e9 * gigabytes


@pytest.mark.parametrize("numbers", [1, 1024, 3000])
def test_a_sum_over_ranks_in_one_kernel(numbers):
    """Of three ranks, one runs here. The others' part is done beforehand: they have written, and raised their flags."""
    ranks, rank = 3, 1
    buffers = torch.zeros(ranks, 2, LARGEST // 4)  # float32
    flags = torch.zeros(ranks, 2, MOST_PROGRAMS, ranks, dtype=torch.int32)
    programs = -(-numbers // BLOCK)
    for turn in (0, 1, 0):
        parts = torch.randn(ranks, numbers)
        for other in (0, 2):
            buffers[other, turn, :numbers] = parts[other]
            flags[rank, turn, :programs, other] = 1
            flags[other, turn] = 0  # they have lowered ours of two sums ago
        result = torch.zeros(numbers)
        addresses = [torch.tensor([part.data_ptr() for part in memory]) for memory in (buffers, flags)]
        _one_shot_sum[programs,](
            parts[rank].clone(), result, *addresses, rank, numbers, turn,
            RANKS=ranks, BUFFER=LARGEST // 4, MOST_PROGRAMS=MOST_PROGRAMS, BLOCK=BLOCK,
        )  # fmt: skip
        assert torch.allclose(result, parts.sum(0), rtol=1e-6, atol=1e-6)
        assert torch.equal(buffers[rank, turn, :numbers], parts[rank])
        assert flags[rank].sum() == 0  # lowered again
        for other in (0, 2):
            raised = flags[other, turn, :, rank]
            assert raised.tolist() == [1] * programs + [0] * (MOST_PROGRAMS - programs)
        assert not buffers[:, 1 - turn, numbers:].any()


# ---- weights in fewer bits

SHAPES = [
    (1, 70, 96, 32),
    (3, 200, 256, 64),
    (9, 130, 640, 128),
    (16, 64, 512, 256),
    (5, 300, 1280, 32),
    (8, 7, 96, 32),
]


@pytest.fixture
def four_bit(monkeypatch):
    """A function that draws a matrix in the layout of a GPU."""
    monkeypatch.setattr(packed, "layout_for", lambda device: packed.Tiles())
    return random_four_bit


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize(("T", "N", "E", "group"), SHAPES)
def test_linear_in_four_bit(four_bit, T, N, E, group):
    """Groups within a tile and across tiles; rows and columns that fill no tile; long rows, split."""
    weight = four_bit(N, E, group, torch.float16)
    assert kernels.suits_kernel(weight)
    x, bias = torch.randn(T, E, dtype=torch.float16), torch.randn(N, dtype=torch.float16)
    exact = x.double() @ weight.float64().T + bias.double()
    ours = kernels.TritonBackend().linear(x, weight, bias)
    assert relative_difference(ours, exact) <= torch.finfo(torch.float16).eps
    assert torch.equal(kernels.unpack_four_bit(weight, torch.float16), weight.unpack(torch.float16))


@pytest.mark.filterwarnings("ignore:Conversion of an array")
def test_many_programs_share_a_product_in_four_bits(four_bit, monkeypatch):
    monkeypatch.setattr(products, "FOUR_BIT_PROGRAMS", 4)  # of which a part has no tiles left
    weight, x = four_bit(64, 128 * 9, 128, torch.float16), torch.randn(2, 128 * 9, dtype=torch.float16)
    ours = kernels.linear_in_four_bit(x, weight, None)
    assert relative_difference(ours, x.double() @ weight.float64().T) <= torch.finfo(torch.float16).eps


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("T", [2, 20])
def test_every_kind_of_matrix(four_bit, T):
    """Few rows and many; what no kernel takes; experts; several kinds below each other."""
    eight = packed.empty_eight_bit(96, 128, torch.float32, "cpu")
    eight.fill(0, torch.randn(96, 128))
    kinds = [eight, four_bit(96, 128, 32, torch.float16), four_bit(96, 128, 8, torch.float16)]
    kinds.append(four_bit(64, 128, 64, torch.float16, stack=(3,))[2])
    kinds.append(packed.Stacked(kinds[:2]))
    assert not kernels.suits_kernel(kinds[2])
    for weight in kinds:
        x = torch.randn(T, 128, dtype=torch.float16)
        exact = weight.float64()
        bias = torch.randn(len(exact), dtype=torch.float16)
        ours = kernels.TritonBackend().linear(x, weight, bias)
        assert relative_difference(ours, x.double() @ exact.T + bias.double()) <= torch.finfo(torch.float16).eps


# ---- experts


def random_experts(T: int, X: int, R: int, seed: int) -> Chosen:
    random = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(X, generator=random)[:R] for _ in range(T)])
    return Chosen(experts, torch.rand(T, R, generator=random))


@given(T=st.integers(1, 40), X=st.integers(1, 50), R=st.integers(1, 8), width=st.sampled_from([16, 64]), seed=seeds)
@settings(max_examples=60)
def test_groups_hold_each_pair_once_and_pairs_of_one_expert_only(T, X, R, width, seed):
    experts = random_experts(T, X, min(R, X), seed).experts
    R = experts.shape[1]
    groups = groups_of(experts, X, width)
    held = []
    for expert, pairs in zip(groups.expert.tolist(), groups.pair.tolist()):
        here = [pair for pair in pairs if pair >= 0]
        assert bool(here) == (expert >= 0)
        assert all(experts[pair // R, pair % R] == expert for pair in here)
        held += here
    assert sorted(held) == list(range(T * R))
    needed = sum(-(-(experts == expert).sum().item() // width) for expert in range(X))
    assert (groups.expert >= 0).sum() == needed


@given(T=st.integers(1, 20), X=st.integers(2, 40), R=st.integers(1, 4), parts=st.integers(1, 3), seed=seeds)
@settings(max_examples=30)
def test_the_most_probable_experts(T, X, R, parts, seed):
    R = min(R, X)
    logits = torch.randn(parts, T, X, generator=torch.Generator().manual_seed(seed))
    for shares_sum_to_1 in (False, True):
        ours = choose(logits, R, shares_sum_to_1)
        identity = torch.eye(X)
        theirs = PyTorchBackend().choose_experts(logits.sum(0), identity, R, shares_sum_to_1)
        assert torch.equal(ours.experts.long(), theirs.experts)
        assert torch.allclose(ours.shares, theirs.shares, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("kind", ["plain", "8", "4", "no kernel"])
def test_products_of_experts(four_bit, kind, T):
    """Rows that all experts of a token share, and a row for each; groups that one expert fills more than once."""
    X, N, E, R = 6, 70, 96, 3
    matrices = {
        "plain": Dense(torch.randn(X, N, E, dtype=torch.float16)),
        "8": packed.empty_eight_bit(N, E, torch.float16, "cpu", (X,)),
        "4": four_bit(N, E, 32, torch.float16, stack=(X,)),
        "no kernel": four_bit(N, E, 24, torch.float16, stack=(X,)),
    }
    weight = matrices[kind]
    if kind == "8":
        weight.codes.random_(-127, 128)
        weight.scale.uniform_(0.01, 0.02)
    assert kernels.has_kernel_for_experts(weight, torch.float16) == (kind != "no kernel")
    chosen = random_experts(T, X, R, T)
    exact = weight.float64()
    for x in (torch.randn(T, E, dtype=torch.float16), torch.randn(T, R, E, dtype=torch.float16)):
        rows = x.double() if x.dim() == 3 else x.double()[:, None].expand(T, R, E)
        expected = torch.einsum("tre,trne->trn", rows, exact[chosen.experts])
        for backend in (kernels.TritonBackend(), PyTorchBackend()):
            ours = backend.linear_of_experts(x, weight, chosen)
            assert relative_difference(ours, expected) <= torch.finfo(torch.float16).eps
    each = torch.randn(T, R, N, dtype=torch.float16)
    mixed = (chosen.shares[..., None].double() * each.double()).sum(1)
    for backend in (kernels.TritonBackend(), PyTorchBackend()):
        assert relative_difference(backend.mix_experts(each, chosen), mixed) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("E", [1, 100, 576])
def test_what_lies_between_products(E):
    """Norms and SwiGLU, rows that do not fill a kernel's width."""
    x, y, weight = torch.randn(3, E), torch.randn(3, E), torch.randn(E)
    ours, plain = kernels.TritonBackend(), PyTorchBackend()
    for a, b in zip(ours.add_and_norm(x, y, weight, 1e-5), plain.add_and_norm(x, y, weight, 1e-5)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    gate_up = torch.randn(2, 3, 2 * E)
    assert torch.allclose(ours.swiglu(gate_up), plain.swiglu(gate_up), rtol=1e-5, atol=1e-6)
