"""Who computes: PyTorch anywhere, or kernels of our own on a GPU. `choose_backend` is the one place that decides.

A backend is an object with a few operations. `model.py` calls them and knows nothing else of the device; the kernels'
backend (`gpu/kernels.py`) gives some of them in another way, with the same results.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .attention import LayerCache, Plan, Positions, attend, causal_mask_of
from .config import Config
from .weights import Matrix

PREFILL_CHUNK = 256  # tokens of a prompt in one step, at most,
PREFILL_SCORES = 2**25  # and attention scores in one layer


class PyTorchBackend:
    """Plain PyTorch, for every device and dtype; what the tests hold all others to."""

    def prefill_chunk(self, prompt_length: int, config: Config) -> int:
        """How many of a prompt's tokens one step takes.

        Attention keeps a score for each pair of tokens: the last chunk, whose view is longest, must not have too many.
        """
        scores_of_token = config.num_attention_heads * prompt_length
        return max(1, min(PREFILL_CHUNK, PREFILL_SCORES // scores_of_token))

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: [T, E] to [T, N]."""
        return weight.times(x, bias)

    def causal_mask(self, plan: Plan, dtype: torch.dtype) -> Tensor | None:
        """The mask for `attend`, made once a step; None from a backend that reads the plan's tables instead."""
        return causal_mask_of(plan, dtype)

    def attend(self, q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
        """Attention of queries [T, H, D] over all that they see: [T, H, D]."""
        return attend(q, kv, positions, scale)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all GPUs that share a model, each of which has computed a part of it. Here there is one."""
        return x

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        """One forward pass: `model.forward`, with these arguments.

        (The kernels' backend records decode steps, some of them compiled, and plays the recording from then on.)
        """
        return forward(tokens, weights, config, cache, plan)


def choose_backend(device: torch.device, dtype: torch.dtype, kernels: bool = True) -> PyTorchBackend:
    """Kernels on a CUDA device, unless they are switched off, lack Triton, or the dtype is float64; else PyTorch."""
    on_gpu = device.type == "cuda" and dtype != torch.float64
    if kernels and on_gpu and find_spec("triton") is not None:
        from .gpu.kernels import TritonBackend  # not above: it needs Triton

        return TritonBackend()
    return PyTorchBackend()
