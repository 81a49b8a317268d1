"""Running out of memory, and what is of the wrong type: one line says what for, and how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_files import free_memory, refusal
from refusals import refused

from minihogwild import Cache, InputError, Run, Sampling, load, sample, step
from minihogwild.errors import allocating
from minihogwild.files import write_whole
from minihogwild.generate import DUET


def ask(nbytes: float, device: str, error: BaseException | None = None) -> str:
    with allocating(int(nbytes), "the attention cache", torch.device(device)):
        if error:
            raise error
    return "had"


def test_free_memory_is_asked_for_beforehand_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    free_memory(monkeypatch, 3_000_000_000)
    message = refusal(ask, 12.34e9, "cpu")
    for part in ("out of memory", "cpu", "the attention cache", "12.34 GB", "3.00 GB"):
        assert part in message
    assert ask(3_000_000_000, "cpu") == "had"
    assert "3.00 GB" in refusal(ask, 3_000_000_001, "cpu")
    assert ask(12.34e9, "cuda:0") == "had"  # its memory is another's


# An error, and the amount that our line then names: the allocator's own, or else our estimate
OUT_OF_MEMORY = {
    MemoryError(): "9.99 GB",
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 9.3 GiB.\nGPU 0 has a total capacity of ..."
    ): "9.3 GiB",
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."
    ): "9.99 GB",
    RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 80000000000 bytes."
    ): "80000000000 bytes",
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9 GB)."
    ): "9.99 GB",
}


@pytest.mark.parametrize(
    "error",
    OUT_OF_MEMORY,
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_out_of_memory_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, device: str, error: BaseException):
    free_memory(monkeypatch, 10**12)
    message = refusal(ask, 9.99e9, device, error)
    for part in ("out of memory", device, "the attention cache", OUT_OF_MEMORY[error]):
        assert part in message


def test_an_estimate_of_nothing_does_not_hide_what_the_allocator_was_asked_for():
    """A step's own estimate may be 0.00 GB, where what failed is a copy of the weights that nobody counted."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    message = refusal(ask, 1000, "cuda:0", error)
    assert "2.00 GiB" in message
    assert "0.00 GB" not in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        NotImplementedError("no such kernel"),
        ValueError("not enough memory of last summer"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_other_errors_pass_unchanged(error: BaseException):
    with pytest.raises(type(error)) as caught:
        ask(1, "cuda", error)
    assert caught.value is error


# ---- what a program of somebody's own gives to the package


@pytest.fixture(scope="module")
def duet():
    return load(DUET)


WRONG_TO_LOAD = [("device", value) for value in ("xpu", "", 5, [], None, "cuda:7")]
WRONG_TO_LOAD += [("dtype", value) for value in ([], {}, 5, None, "half")]
WRONG_TO_LOAD += [("name", value) for value in (5, None, [], b"x")]
WRONG_TO_LOAD += [("folder", value) for value in (5, [], b"x", "nosuch")]
WRONG_TO_LOAD += [("quantize", value) for value in (3, 0, "8", [], True)]
WRONG_TO_LOAD += [("context", value) for value in (0, -1, "x", 2.5, [])]


@pytest.mark.parametrize(("what", "value"), WRONG_TO_LOAD, ids=repr)
def test_load_refuses_what_is_no_such_thing(what, value):
    with pytest.raises(InputError) as caught:
        load(**{"name": DUET, what: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value) or what in str(caught.value)


WRONG_TO_RUN = [("workers", value) for value in ("2", 2.0, None, [], 0, 17)]
WRONG_TO_RUN += [("problem", value) for value in (5, None, [], b"x")]
WRONG_TO_RUN += [("max_steps", "5"), ("max_steps", -1), ("seed", "x"), ("seed", 0.5), ("layout", 5), ("layout", [])]
WRONG_TO_RUN += [("sampling", 5), ("prompts", 5), ("model", "duet"), ("model", None)]
WRONG_TO_RUN += [("budgets", value) for value in (5, None, "12", ["a"], [None], [1.5], [3, 2])]


@pytest.mark.parametrize(("what", "value"), WRONG_TO_RUN, ids=repr)
def test_a_run_refuses_what_is_no_such_thing(duet, what, value):
    with pytest.raises(InputError, match=what):
        Run(**{"model": duet, "problem": "a = 1", what: value})


WRONG_TO_CACHE = [("config", value) for value in (5, None, "x", {})]
WRONG_TO_CACHE += [("blocks", value) for value in (5, None, "abc", [1], [None], [[]], ["a", "a"])]
WRONG_TO_CACHE += [("dtype", value) for value in (5, None, "float32", [], torch.int8, torch.bool, torch.complex64)]
WRONG_TO_CACHE += [("device", value) for value in (5, None, "xpu", "", [], object())]
WRONG_TO_CACHE += [("page_size", value) for value in (0, -1, "x", 1.5, None, [], True, 10**12)]


@pytest.mark.parametrize(("what", "value"), WRONG_TO_CACHE, ids=str)
def test_a_cache_refuses_what_is_no_such_thing(duet, what, value):
    right = {"config": duet.config, "blocks": ["a", "b"], "dtype": duet.dtype}
    with refused("cache: ", "block" if what == "blocks" else what):
        Cache(**(right | {what: value}))


@pytest.mark.parametrize("wrong", [5, None, [], ["a"]], ids=repr)
def test_what_is_done_to_a_cache_refuses_what_is_no_block(duet, wrong):
    cache = Cache(duet.config, ["a", "b"], duet.dtype)
    for call in (lambda: cache.move(wrong, "b"), lambda: cache.move("a", wrong), lambda: cache.drop(wrong)):
        with refused("unknown block"):
            call()


@pytest.mark.parametrize("what", ["weights", "config", "cache"])
def test_a_step_refuses_what_is_no_part_of_a_model(duet, what):
    right = {"weights": duet.weights, "config": duet.config, "cache": Cache(duet.config, ["a"], duet.dtype)}
    for wrong in (5, None, "x"):
        with refused(what.capitalize(), type(wrong).__name__):
            step([["a"]], [[1]], **(right | {what: wrong}))


ROW = torch.zeros(1, 10)
WRONG_TO_SAMPLE = [("logits", value) for value in (5, None, "x", [[1.0]], ROW[0], ROW[None], ROW[:, :0], ROW.int())]
WRONG_TO_SAMPLE += [("logits", ROW.to(torch.complex64)), ("logits", ROW.bool())]
WRONG_TO_SAMPLE += [("sampling", value) for value in (5, None, "x", {})]
WRONG_TO_SAMPLE += [("streams", value) for value in (5, None, "x", [], [1], [None], torch.Generator())]
WRONG_TO_SAMPLE += [("streams", [torch.Generator(), torch.Generator()])]


@pytest.mark.parametrize(("what", "value"), WRONG_TO_SAMPLE)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)])
def test_sample_refuses_what_is_no_such_thing(what, value, sampling):
    right = {"logits": ROW, "sampling": sampling, "streams": [torch.Generator()]}
    with refused(what):
        sample(**(right | {what: value}))


WRONG_STEPS = [
    ([["a"]], [[[1]]]),
    ([["a"]], [[1.5]]),
    ([["a"]], [["x"]]),
    ([["a"]], [1]),
    ([["a"]], [None]),
    ([["a"]], [[]]),
    (["a"], [[1]]),
    ([[1]], [[1]]),
    ([[["a"]]], [[1]]),
    ([5], [[1]]),
    (None, [[1]]),
    ([["a"]], None),
]


@pytest.mark.parametrize(("views", "tokens"), WRONG_STEPS, ids=repr)
def test_a_step_refuses_what_is_no_such_thing(duet, views, tokens):
    cache = Cache(duet.config, ["a", "b"], duet.dtype)
    with pytest.raises(InputError):
        step(views, tokens, duet.weights, duet.config, cache)
    assert cache.lengths == {"a": 0, "b": 0}


@pytest.mark.parametrize("what", ["temperature", "top_k", "top_p", "min_p"])
def test_sampling_refuses_what_is_no_number(what):
    with pytest.raises(InputError, match=f"{what} is '1'"):
        Sampling(**{what: "1"})


def test_a_full_disk_is_told_by_the_files_name():
    with pytest.raises(OSError, match="/dev/full"):
        write_whole(Path("/dev/full"), [b"x" * 2**16])
