"""Running out of memory: one line says what for, and how much."""

from __future__ import annotations

import pytest
import torch
from hub_files import free_memory, refusal

from minihogwild.errors import allocating


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
