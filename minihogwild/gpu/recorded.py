"""Decode steps that are recorded once, as CUDA graphs, and played from then on: the host gives no kernel of its own.

A recording reads and writes fixed places in memory. So what changes from step to step (token ids, the plan) is copied
to the place that the recording reads, and the plan's tables are padded, whatever the views hold. Rows are padded too,
to 1, 2, 4, 8 or multiples of 16: so a few recordings serve all steps, whether a worker feeds one token or several.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..attention import Plan
from ..cache import Cache
from ..config import Config
from ..weights import Weights

LEAST_BLOCKS = 8  # that tables have room for: so runs with more or fewer workers share recordings


@dataclass
class Recording:
    """A forward pass for one number of rows, and of blocks, and one size of the pool."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [T]: what it reads
    packed_plan: Tensor  # what it reads, too: see Plan.pack
    plan: Plan  # the same as a plan, in the shapes that it was recorded with
    logits: Tensor  # [T, V]: what it writes; a row for each worker, and some more


class RecordedSteps:
    """All recordings for one cache.

    They end when the cache's pool gets new tensors, since they point into the old ones.
    """

    def __init__(self):
        # What they read, beside what is copied for each step
        self.pool_version = 0
        self.weights: Weights | None = None
        self.by_size: dict[tuple[int, int], Recording] = {}  # by rows and blocks

    def play(
        self, forward: Callable[..., Tensor], tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan
    ) -> Tensor:
        """`forward`, of a step that is recorded if no earlier one was of its size."""
        if cache.pool_version != self.pool_version or weights is not self.weights:
            self.by_size.clear()
            self.pool_version, self.weights = cache.pool_version, weights
        rows = rows_with_padding(len(tokens))
        blocks = max(LEAST_BLOCKS, next_power_of_2(len(cache.lengths)))
        tokens = padded_tokens(tokens, rows)
        if (rows, blocks) not in self.by_size:
            padded_plan = plan.padded(rows, blocks, pages=len(cache.page_owner))
            self.by_size[rows, blocks] = record(forward, tokens, weights, config, cache, padded_plan)
        recording = self.by_size[rows, blocks]
        recording.tokens.copy_(tokens)
        on_gpu = cache.device.type == "cuda"
        packed = torch.empty(len(recording.packed_plan), dtype=torch.int64, pin_memory=on_gpu)
        plan.pack(packed, larger_plan=recording.plan)
        recording.packed_plan.copy_(packed, non_blocking=True)
        recording.graph.replay()
        workers = len(plan.last)
        return recording.logits[:workers].clone()  # the next step writes its own to the same place


def rows_with_padding(rows: int) -> int:
    """1, 2, 4, 8, or a multiple of 16."""
    return next_power_of_2(rows) if rows <= 16 else cdiv(rows, 16) * 16


def padded_tokens(tokens: Tensor, rows: int) -> Tensor:
    """[T] to [rows]: the last token is repeated, as the last row is by `Plan.padded`."""
    missing = rows - len(tokens)
    if missing == 0:
        return tokens
    return torch.cat((tokens, tokens[-1:].expand(missing)))


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
