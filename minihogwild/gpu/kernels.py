"""The backend for CUDA: Triton kernels in place of PyTorch's operations, which stay below memory's speed.

In each layer a decode step is ten kernels or so, whatever the number of workers; all of them wait for nobody but each
other, so that a step can be recorded (`recorded.py`).
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import LayerCache, Plan, Positions
from ..backend import Chosen, PyTorchBackend
from ..cache import Cache
from ..config import Config
from ..packed import EightBit, FourBit, Stacked
from ..weights import Dense, Layer, Matrix, Weights
from . import pointwise
from .attention import append, attend_to_one_block, attend_to_pages, positions
from .experts import Groups, choose, groups_of, mix
from .products import (
    FEW_ROWS,
    linear_for_few_rows,
    linear_in_four_bit,
    parts_of_product,
    suits_kernel,
    unpack_four_bit,
)
from .recorded import RecordedSteps

MOST_OF_PROMPT = 16384  # tokens that one step takes,
LEAST_OF_PROMPT = 256
FOR_PROMPT = 0.25  # and what part of the free memory they may need
PAIRS_OF_PROMPT = 64  # of a token and an expert, in a group: wide products for many tokens
ROUTER_COLUMNS = 256  # that one program goes through: a router has few rows, so each is cut in many parts


class TritonBackend(PyTorchBackend):
    """Kernels for few rows; PyTorch's products for many. Decode steps are recorded."""

    def __init__(self):
        self.recorded: WeakKeyDictionary[Cache, RecordedSteps] = WeakKeyDictionary()  # they end with their cache

    def prefill_chunk(self, prompt_length: int, config: Config) -> int:
        """The whole prompt, where memory allows: large products are the fastest, and these kernels keep no scores.

        So where a GPU is nearly full, what another program has of it may change the last bits.
        """
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # PyTorch's own store
        chunk = MOST_OF_PROMPT
        while chunk > LEAST_OF_PROMPT and chunk * bytes_of_row(config) > free * FOR_PROMPT:
            chunk //= 2
        return chunk

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Stacked):
            return weight.join([self.linear(x, part) for part in weight.parts], bias)
        few_rows = len(x) <= FEW_ROWS
        half_precision = x.dtype.itemsize == 2
        if half_precision and isinstance(weight, FourBit) and suits_kernel(weight):
            if few_rows:
                return linear_in_four_bit(x, weight, bias)
            return F.linear(x, unpack_four_bit(weight, x.dtype), bias)
        if half_precision and few_rows and isinstance(weight, (Dense, EightBit)):
            return linear_for_few_rows(x, *numbers_and_scale(weight), bias)
        return weight.times(x, bias)

    def linear_and_swiglu(self, x: Tensor, gate_up: Matrix) -> Tensor:
        few_rows = len(x) <= FEW_ROWS and x.dtype.itemsize == 2
        if few_rows and isinstance(gate_up, (Dense, EightBit)):
            numbers, scale = numbers_and_scale(gate_up)
            if len(numbers) % 64 == 0:
                return linear_for_few_rows(x, numbers, scale, None, gated=True)
        return super().linear_and_swiglu(x, gate_up)

    def add_and_norm(self, x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return pointwise.add_and_norm(x, y, weight, epsilon)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return pointwise.swiglu(gate_up)

    # ---- attention

    def positions(self, plan: Plan, frequencies: Tensor, causal_mask: None, dtype: torch.dtype) -> Positions:
        return positions(plan, frequencies, dtype)

    def causal_mask(self, plan: Plan, dtype: torch.dtype) -> None:
        return None  # the kernel compares with `visible` itself

    def append(self, qkv: Tensor, layer: Layer, kv: LayerCache, positions: Positions, config: Config) -> Tensor:
        return append(qkv, layer, kv, positions, config)

    def attend(self, q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
        rows = q.shape[2]
        reads_one_block = positions.plan.lone_block_length > 0
        if reads_one_block and rows > FEW_ROWS and kv.keys.dtype.itemsize == 2:
            return attend_to_one_block(q, kv, positions, scale)
        return attend_to_pages(q, kv, positions, scale)

    # ---- experts

    def choose_experts(self, x: Tensor, router: Tensor, R: int, shares_sum_to_1: bool) -> Chosen:
        if len(x) <= FEW_ROWS and x.dtype.itemsize == 2:
            parts = max(2, x.shape[1] // ROUTER_COLUMNS)
            logits = parts_of_product(x, router, parts)
        else:
            logits = F.linear(x.float(), router.float())[None]
        return choose(logits, R, shares_sum_to_1)

    def linear_of_experts(self, x: Tensor, weight: Matrix, chosen: Chosen) -> Tensor:
        if not has_kernel_for_experts(weight, x.dtype):
            return super().linear_of_experts(x, weight, chosen)
        T, R = chosen.experts.shape
        rows = x.flatten(0, -2)  # [T, E], or [T R, E]
        if isinstance(weight, FourBit):
            groups = groups_once(chosen, len(weight.codes), FEW_ROWS)
            return linear_in_four_bit(rows, weight, None, groups).view(T, R, -1)
        matrices, scale = numbers_and_scale(weight)
        groups = groups_once(chosen, len(matrices), FEW_ROWS if T <= FEW_ROWS else PAIRS_OF_PROMPT)
        return linear_for_few_rows(rows, matrices, scale, None, groups).view(T, R, -1)

    def mix_experts(self, each: Tensor, chosen: Chosen) -> Tensor:
        return mix(each, chosen.shares)

    # ---- a step

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        one_token_each = len(plan.last) == len(plan.offset)
        few_rows = one_token_each or len(tokens) <= FEW_ROWS
        if few_rows and cache.device.type == "cuda" and not waits_for_device(weights, cache.dtype):
            recorded = self.recorded.setdefault(cache, RecordedSteps())
            return recorded.play(forward, tokens, weights, config, cache, plan)
        return forward(tokens, weights, config, cache, plan)


def bytes_of_row(config: Config) -> int:
    """What one token takes within a layer, about, in 16 bits: where it is widest."""
    attention = 2 * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    widths = [config.intermediate_size]
    if config.num_experts:
        widths.append(config.num_experts_per_tok * config.moe_intermediate_size)
    return 2 * (attention + 3 * max(widths) + 4 * config.hidden_size)


def numbers_and_scale(weight: Dense | EightBit) -> tuple[Tensor, Tensor | None]:
    if isinstance(weight, Dense):
        return weight.tensor, None
    return weight.codes, weight.scale


def groups_once(chosen: Chosen, X: int, width: int) -> Groups:
    """A layer's two products with experts share them."""
    if width not in chosen.tables:
        chosen.tables[width] = groups_of(chosen.experts, X, width)
    return chosen.tables[width]


def has_kernel_for_experts(weight: Matrix, dtype: torch.dtype) -> bool:
    if isinstance(weight, FourBit):
        return dtype.itemsize == 2 and suits_kernel(weight)
    return isinstance(weight, (Dense, EightBit))


def waits_for_device(weights: Weights, dtype: torch.dtype) -> bool:
    """Does some layer's mixture of experts ask the device which ones were chosen, as PyTorch's must?"""
    for layer in weights.layers:
        if layer.router is not None:
            for weight in (layer.gate_up, layer.down):
                if not has_kernel_for_experts(weight, dtype):
                    return True
    return False
