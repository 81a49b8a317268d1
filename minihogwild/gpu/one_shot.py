"""The sum of a few rows over all GPUs of a host, in one kernel: each reads what all have written ("one-shot").

NCCL's ways have more steps, for they are made for large sums. This one needs memory that all GPUs can read and write,
which PyTorch calls symmetric: a buffer on each, for its part of the sum, and flags.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from .launch import OVERLAPPING, wait_for_predecessor

LARGEST = 2**18  # bytes of a sum. Beyond, NCCL is faster
BLOCK = 1024  # numbers, of one program
MOST_PROGRAMS = LARGEST // 2 // BLOCK


class OneShot:
    """What a rank needs for such sums. All ranks make one, and begin to use it when all have; then in the same order.

    A forward pass has an even number of them: so recorded ones, in which the turn is fixed, always follow each other in
    turn.
    """

    def __init__(self, rank: int, device: torch.device):
        """Raises RuntimeError, ImportError or AttributeError where this PyTorch, or these GPUs, have no such memory."""
        import torch.distributed._symmetric_memory as symmetric_memory  # not above: PyTorch may have none

        self.rank = rank
        self.ranks = dist.get_world_size()
        self.largest = LARGEST
        # Two buffers, in turn: who writes to one for the next sum but one has heard, in the next, that all have read it
        self.turn = 0
        self.buffer = symmetric_memory.empty(2 * LARGEST, dtype=torch.uint8, device=device)
        self.flags = symmetric_memory.empty(2 * MOST_PROGRAMS * self.ranks, dtype=torch.int32, device=device)
        self.flags.zero_()
        self.buffers = self.addresses(symmetric_memory, self.buffer)
        self.flags_of_ranks = self.addresses(symmetric_memory, self.flags)
        torch.cuda.synchronize()  # the flags are down

    def addresses(self, symmetric_memory, memory: Tensor) -> Tensor:
        """Where each rank's part of this memory is, for our GPU: int64 [ranks]."""
        handle = symmetric_memory.rendezvous(memory, dist.group.WORLD.group_name)
        return torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=memory.device)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, of at most LARGEST bytes: the same on all of them, to the last bit."""
        x = x.contiguous()
        result = torch.empty_like(x)
        _one_shot_sum[triton.cdiv(x.numel(), BLOCK),](
            x, result, self.buffers, self.flags_of_ranks, self.rank, x.numel(), self.turn,
            RANKS=self.ranks, BUFFER=LARGEST // x.itemsize, MOST_PROGRAMS=MOST_PROGRAMS, BLOCK=BLOCK,
            num_warps=4, **OVERLAPPING,
        )  # fmt: skip
        self.turn = 1 - self.turn
        return result


@triton.jit(do_not_specialize=["rank", "numbers", "turn"])
def _one_shot_sum(
    x, result, buffers, flags_of_ranks, rank, numbers, turn,
    RANKS: tl.constexpr, BUFFER: tl.constexpr, MOST_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers: ours into our buffer; when all ranks have written theirs there, the sum of all.

    A rank has a flag for each turn, program and other rank. Who has written raises its own at each of the others, and
    lowers theirs here before it reads.
    """
    wait_for_predecessor()
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < numbers
    number = x.dtype.element_ty
    ours = tl.load(buffers + rank).to(tl.pointer_type(number)) + turn * BUFFER
    tl.store(ours + i, tl.load(x + i, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()  # all of this program's numbers are there
    flag = (turn * MOST_PROGRAMS + program) * RANKS
    for other in range(RANKS):
        theirs = tl.load(flags_of_ranks + other).to(tl.pointer_type(tl.int32)) + flag + rank
        while tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys") != 0:
            pass  # it has not been lowered yet, two sums ago
    our_flags = tl.load(flags_of_ranks + rank).to(tl.pointer_type(tl.int32)) + flag
    for other in range(RANKS):
        while tl.atomic_cas(our_flags + other, 1, 0, sem="acquire", scope="sys") != 1:
            pass
    total = tl.zeros([BLOCK], tl.float32)
    for other in tl.static_range(RANKS):
        theirs = tl.load(buffers + other).to(tl.pointer_type(number)) + turn * BUFFER
        total += tl.load(theirs + i, mask=inside, other=0.0, cache_modifier=".cv").to(tl.float32)
    tl.store(result + i, total.to(number), mask=inside)
