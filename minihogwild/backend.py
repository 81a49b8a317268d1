"""Who computes: PyTorch anywhere, or kernels of our own on a GPU. `choose_backend` is the one place that decides.

A backend is an object with a few operations. `model.py` calls them and knows nothing else of the device; the kernels'
backend (`gpu/kernels.py`) gives some of them in another way, with the same results.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LayerCache, Plan, Positions, append, attend, causal_mask_of, positions_of
from .config import Config
from .weights import Layer, Matrix

if TYPE_CHECKING:
    from .gpu.several import Ranks

PREFILL_CHUNK = 256  # tokens of a prompt in one step, at most,
PREFILL_SCORES = 2**25  # and attention scores in one layer


@dataclass
class Chosen:
    """Which experts each token has chosen, R of the X that a layer has, and what share each has in the result."""

    experts: Tensor  # [T, R]
    shares: Tensor  # [T, R]
    tables: dict = field(default_factory=dict)  # what a backend has made of these, kept for the next product


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

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root mean square norm over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def add_and_norm(self, x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """x + y, and the norm of it."""
        total = x + y
        return total, self.norm(total, weight, epsilon)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) * up: [..., 2F] to [..., F]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear_and_swiglu(self, x: Tensor, gate_up: Matrix) -> Tensor:
        """The product, and its SwiGLU: [T, E] to [T, F]."""
        return self.swiglu(self.linear(x, gate_up))

    def positions(self, plan: Plan, frequencies: Tensor, causal_mask: Tensor | None, dtype: torch.dtype) -> Positions:
        """What follows from a plan, on the device, for all layers of one kind."""
        return positions_of(plan, frequencies, causal_mask, dtype)

    def append(self, qkv: Tensor, layer: Layer, kv: LayerCache, positions: Positions, config: Config) -> Tensor:
        """Keys and values, of what was projected, [T, (H + 2K) D], go to the ends of their blocks.

        What comes back are the queries, for `attend`: here [T, H, D], not rotated yet.
        """
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, k, v = qkv.view(-1, H + 2 * K, D).split((H, K, K), dim=1)  # [T, H | K | K, D]
        if layer.q_norm is not None:
            q = self.norm(q, layer.q_norm, config.rms_norm_eps)
            k = self.norm(k, layer.k_norm, config.rms_norm_eps)
        append(kv, k, v, positions)  # rotates k to its place in its block
        return q

    def causal_mask(self, plan: Plan, dtype: torch.dtype) -> Tensor | None:
        """The mask for `attend`, made once a step; None from a backend that reads the plan's tables instead."""
        return causal_mask_of(plan, dtype)

    def attend(self, q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
        """Attention of the queries that `append` gave over all that they see: [T, H, D]."""
        return attend(q, kv, positions, scale)  # rotates q, once for each block

    def choose_experts(self, x: Tensor, router: Tensor, R: int, shares_sum_to_1: bool) -> Chosen:
        """The R most probable experts of each token; their probabilities, or those divided by their sum."""
        # In float32: two probabilities may be one number in 16 bits
        probabilities = F.linear(x, router).softmax(-1, torch.promote_types(x.dtype, torch.float32))  # [T, X]
        shares, experts = probabilities.topk(R)
        if shares_sum_to_1:
            shares = shares / shares.sum(-1, keepdim=True)
        return Chosen(experts, shares)

    def linear_of_experts(self, x: Tensor, weight: Matrix, chosen: Chosen) -> Tensor:
        """Each token times the matrices of its experts: [T, E], or [T, R, E] with a row for each, to [T, R, N]."""
        products = None
        for expert in chosen.experts.unique().tolist():  # waits for the device, but reads none that nobody chose
            token, rank = (chosen.experts == expert).nonzero(as_tuple=True)
            rows = x[token] if x.dim() == 2 else x[token, rank]
            of_expert = self.linear(rows, weight[expert])
            if products is None:
                products = x.new_empty(*chosen.experts.shape, of_expert.shape[1])
            products[token, rank] = of_expert
        return products

    def mix_experts(self, each: Tensor, chosen: Chosen) -> Tensor:
        """The sum of the experts' results, by their shares: [T, R, E] to [T, E]."""
        return (chosen.shares[..., None] * each).sum(1).to(each.dtype)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all GPUs that share a model, each of which has computed a part of it. Here there is one."""
        return x

    def tell(self, event: dict) -> None:
        """What happens to the cache, for all GPUs that share a model to do the same. Here there is one."""

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        """One forward pass: `model.forward`, with these arguments.

        (The kernels' backend records decode steps, and plays the recording from then on.)
        """
        return forward(tokens, weights, config, cache, plan)


def choose_backend(
    device: torch.device, dtype: torch.dtype, kernels: bool = True, ranks: "Ranks | None" = None
) -> PyTorchBackend:
    """Kernels on a CUDA device, unless they are switched off, lack Triton, or the dtype is float64; else PyTorch.

    `ranks` are the processes that share the model, each with a GPU of its own; None: there is one.
    """
    backend = fastest_backend(device, dtype, kernels)
    if ranks is None:
        return backend
    from .gpu.several import SharedBackend  # not above: most have one GPU, if any

    return SharedBackend(backend, ranks)


def fastest_backend(device: torch.device, dtype: torch.dtype, kernels: bool) -> PyTorchBackend:
    on_gpu = device.type == "cuda" and dtype != torch.float64
    if kernels and on_gpu and find_spec("triton") is not None:
        from .gpu.kernels import TritonBackend  # not above: it needs Triton

        return TritonBackend()
    return PyTorchBackend()
