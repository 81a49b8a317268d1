"""Mixtures of experts on a GPU, without the host: which experts each token takes, and who shares one.

A *pair* is a token and one of its R experts: pair p is expert p % R of token p // R. Pairs of the same expert are put
in *groups* of at most `width`, and a product (`products.py`) takes group after group: it reads an expert's matrix once
for all in a group, and that of no expert that nobody chose. How many groups there will be the host does not know: so
there are always as many as there could be, and those left over are empty.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Chosen
from .launch import OVERLAPPING, wait_for_predecessor

MOST_NUMBERS = 2**15  # pairs times experts, that one program compares at once


@dataclass
class Groups:
    """The tables that kernels read; int32. Without tables: one matrix for all rows."""

    expert: Tensor | None  # [groups]; -1 of an empty one
    pair: Tensor | None  # [groups, width]; -1 where there is none
    pairs: int  # as many as the result has rows
    width: int

    @property
    def count(self) -> int:
        return 1 if self.expert is None else len(self.expert)


def ungrouped(x: Tensor, width: int) -> Groups:
    return Groups(None, None, len(x), width)


def choose(logits: Tensor, R: int, shares_sum_to_1: bool) -> Chosen:
    """The R most probable experts of each token. The logits [T, X] come in parts, [parts, T, X], that are added up."""
    parts, T, X = logits.shape
    experts = torch.empty(T, R, dtype=torch.int32, device=logits.device)
    shares = torch.empty(T, R, dtype=torch.float32, device=logits.device)
    _choose[T,](
        logits, experts, shares, T, X, parts,
        PARTS=triton.next_power_of_2(parts), WIDTH=triton.next_power_of_2(X),
        R=R, RANKS=triton.next_power_of_2(R), SUM_TO_1=shares_sum_to_1, num_warps=1, **OVERLAPPING,
    )  # fmt: skip
    return Chosen(experts, shares)


@triton.jit(do_not_specialize=["T"])
def _choose(
    logits, experts, shares, T, X, parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, SUM_TO_1: tl.constexpr,
):  # fmt: skip
    """One token: the softmax of its logits, then R times the largest that is left."""
    wait_for_predecessor()
    t = tl.program_id(0)
    part = tl.arange(0, PARTS)[:, None]
    x = tl.arange(0, WIDTH)
    several = tl.load(logits + (part * T + t) * X + x, mask=(part < parts) & (x < X), other=0.0).to(tl.float32)
    of_token = tl.where(x < X, tl.sum(several, 0), -float("inf"))
    weights = tl.exp(of_token - tl.max(of_token, 0))
    left = tl.where(x < X, weights / tl.sum(weights, 0), -1.0)
    rank = tl.arange(0, RANKS)
    chosen = tl.zeros([RANKS], tl.int32)
    share = tl.zeros([RANKS], tl.float32)
    for r in tl.static_range(R):
        expert = tl.argmax(left, 0)
        chosen = tl.where(rank == r, expert, chosen)
        share = tl.where(rank == r, tl.max(left, 0), share)
        left = tl.where(x == expert, -1.0, left)
    if SUM_TO_1:
        share /= tl.sum(share, 0)
    tl.store(experts + t * R + rank, chosen, mask=rank < R)
    tl.store(shares + t * R + rank, share, mask=rank < R)


def groups_of(experts: Tensor, X: int, width: int) -> Groups:
    """Of the experts [T, R] that were chosen among X."""
    T, R = experts.shape
    numbers = triton.next_power_of_2(T * R) * triton.next_power_of_2(X)
    one_group_holds_all = width >= T
    if one_group_holds_all and numbers <= MOST_NUMBERS:
        return group_few(experts, X, width)
    return group_many(experts, X, width)


def group_few(experts: Tensor, X: int, width: int) -> Groups:
    """Where no expert can have more than one group, by one small kernel: a decode step has no time for ten."""
    T, R = experts.shape
    count = min(X, T * R)
    expert = torch.empty(count, dtype=torch.int32, device=experts.device)
    pair = torch.empty(count, width, dtype=torch.int32, device=experts.device)
    _group[1,](
        experts, expert, pair, T * R, X, count, R,
        PAIRS=triton.next_power_of_2(T * R), WIDTH=triton.next_power_of_2(X), GROUPS=triton.next_power_of_2(count),
        COLUMNS=width, num_warps=4, **OVERLAPPING,
    )  # fmt: skip
    return Groups(expert, pair, T * R, width)


@triton.jit(do_not_specialize=["pairs", "count"])
def _group(
    experts, expert_of_group, pair_of_group, pairs, X, count, R,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A group for each expert that is chosen, in their order; token t stands in column t."""
    wait_for_predecessor()
    g = tl.arange(0, GROUPS)
    column = tl.arange(0, COLUMNS)
    tl.store(expert_of_group + g, tl.full([GROUPS], -1, tl.int32), mask=g < count)
    table = g[:, None] * COLUMNS + column
    tl.store(pair_of_group + table, tl.full([GROUPS, COLUMNS], -1, tl.int32), mask=g[:, None] < count)
    tl.debug_barrier()  # some of these are now stored once more
    p = tl.arange(0, PAIRS)
    x = tl.arange(0, WIDTH)
    expert = tl.load(experts + p, mask=p < pairs, other=-1)
    is_pair_of = (expert[:, None] == x).to(tl.int32)  # [PAIRS, WIDTH]
    is_chosen = tl.max(is_pair_of, 0)
    group_of_expert = tl.cumsum(is_chosen, 0) - 1
    tl.store(expert_of_group + group_of_expert, x, mask=is_chosen > 0)
    group_of_pair = tl.sum(is_pair_of * group_of_expert[None, :], 1)
    tl.store(pair_of_group + group_of_pair * COLUMNS + p // R, p, mask=p < pairs)


def group_many(experts: Tensor, X: int, width: int) -> Groups:
    """For a prompt: pairs sorted by expert, then cut in groups."""
    flat = experts.flatten().long()
    pairs = len(flat)
    most_groups = min(X, pairs) + pairs // width
    sorted_experts, order = flat.sort(stable=True)
    counts = torch.zeros(X, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    first_pair = counts.cumsum(0) - counts  # of each expert, among the sorted ones
    groups = (counts + width - 1) // width
    first_group = groups.cumsum(0) - groups
    place = torch.arange(pairs, device=flat.device) - first_pair[sorted_experts]
    group = first_group[sorted_experts] + place // width
    pair = torch.full((most_groups, width), -1, dtype=torch.int32, device=flat.device)
    pair[group, place % width] = order.int()
    expert = torch.full((most_groups,), -1, dtype=torch.int32, device=flat.device)
    expert[group] = sorted_experts.int()
    return Groups(expert, pair, pairs, width)


def mix(each: Tensor, shares: Tensor) -> Tensor:
    """The sum of the experts' results by their shares: [T, R, E] to [T, E]."""
    T, R, E = each.shape
    mixed = each.new_empty(T, E)
    _mix[T, triton.cdiv(E, 512)](each, shares, mixed, E, R, RANKS=triton.next_power_of_2(R), num_warps=4, **OVERLAPPING)
    return mixed


@triton.jit
def _mix(each, shares, mixed, E, R, RANKS: tl.constexpr):
    wait_for_predecessor()
    t = tl.program_id(0)
    e = tl.program_id(1) * 512 + tl.arange(0, 512)
    r = tl.arange(0, RANKS)
    share = tl.load(shares + t * R + r, mask=r < R, other=0.0)[:, None]
    inside = (r[:, None] < R) & (e < E)
    of_experts = tl.load(each + (t * R + r[:, None]).to(tl.int64) * E + e, mask=inside, other=0.0)  # [RANKS, 512]
    total = tl.sum(of_experts.to(tl.float32) * share, 0)
    tl.store(mixed + t * E + e, total.to(mixed.dtype.element_ty), mask=e < E)
