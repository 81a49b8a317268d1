"""Decode steps that are recorded once, as CUDA graphs, and played from then on: the host gives no kernel of its own.

A recording reads and writes fixed places in memory. So what changes from step to step (token ids, the plan) is copied
to the place that the recording reads, and the plan's tables are padded to one size, whatever the views hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Plan
from ..cache import Cache
from ..config import Config
from ..weights import Weights


@dataclass
class Recording:
    """A forward pass for one number of rows, and one size of the pool."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [T]: what it reads
    packed_plan: Tensor  # what it reads, too: see Plan.pack
    plan: Plan  # the same as a plan, in the shapes that it was recorded with
    logits: Tensor  # [W, V]: what it writes


class RecordedSteps:
    """All recordings for one cache. They end when its pool gets new tensors, since they point into the old ones."""

    def __init__(self):
        self.cache: Cache | None = None
        self.pool_version = 0
        self.by_rows: dict[int, Recording] = {}

    def play(
        self, forward: Callable[..., Tensor], tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan
    ) -> Tensor:
        """`forward`, for a plan in which each worker feeds one token."""
        pages = len(cache.page_owner)
        if cache is not self.cache or cache.pool_version != self.pool_version:
            self.cache, self.pool_version, self.by_rows = cache, cache.pool_version, {}
        rows = len(tokens)
        if rows not in self.by_rows:
            padded_plan = plan.padded(blocks=len(cache.lengths), pages=pages)
            self.by_rows[rows] = record(forward, tokens, weights, config, cache, padded_plan)
        recording = self.by_rows[rows]
        recording.tokens.copy_(tokens)
        packed = torch.empty(len(recording.packed_plan), dtype=torch.int64, pin_memory=True)
        plan.pack(packed, larger_plan=recording.plan)
        recording.packed_plan.copy_(packed, non_blocking=True)
        recording.graph.replay()
        return recording.logits.clone()  # the next step writes its own to the same place


def record(
    forward: Callable[..., Tensor], tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan
) -> Recording:
    packed_plan = torch.empty(plan.packed_size(), dtype=torch.int64)
    plan.pack(packed_plan)
    packed_plan = packed_plan.to(cache.device)
    plan = plan.unpack(packed_plan)
    tokens = tokens.clone()
    # Once outside of the recording: kernels are compiled when they first run. That both write the same keys and values
    # changes nothing.
    forward(tokens, weights, config, cache, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(tokens, weights, config, cache, plan)
    return Recording(graph, tokens, packed_plan, plan, logits)
