"""The transformer, for Llama, Mistral and Qwen: biases and q/k norms are used where the checkpoint has them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache, Plan
from .config import Config, Weights


@torch.no_grad()
def forward(tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan) -> Tensor:
    """One step of all workers: [T] token ids in, logits [W, V] after each worker's last token out.

    `plan = cache.extend(views, counts)` says whose tokens these are and what each may see.
    """
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)

    x = F.embedding(tokens, weights.embed)  # [T, E]
    for i, layer in enumerate(weights.layers):
        qkv = F.linear(norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(-1, H + 2 * K, D).split((H, K, K), dim=1)  # [T, H | K | K, D]
        if layer.q_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        cache.append(i, k, v, plan)  # all workers write before any reads
        mixed = cache.attend(i, q, plan)  # [T, H, D]
        x = x + F.linear(mixed.flatten(1), layer.out)

        gate, up = F.linear(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, layer.down)
    return F.linear(norm(x[plan.last], weights.norm), weights.head)
