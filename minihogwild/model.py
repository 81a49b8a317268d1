"""The transformer, for Llama, Mistral and Qwen: biases, q/k norms and routers are used where a checkpoint has them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache, Plan
from .config import Config, Layer, Weights
from .memory import allocating


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

        y = norm(x, layer.mlp_norm)
        x = x + (mlp(y, layer.gate_up, layer.down) if layer.router is None else mixture(y, layer, config))
    return F.linear(norm(x[plan.last], weights.norm), weights.head)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, E] in and out."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def mixture(x: Tensor, layer: Layer, config: Config) -> Tensor:
    """[T, E] in and out: each token takes the MLPs of its most probable experts, times their probabilities."""
    exact = torch.promote_types(x.dtype, torch.float32)
    shares, chosen = F.linear(x, layer.router).softmax(-1, exact).topk(config.num_experts_per_tok)  # [T, k]
    if config.norm_topk_prob:
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = torch.zeros_like(x, dtype=exact)
    for expert in chosen.unique().tolist():  # waits for the device, but reads no expert that nobody chose
        token, rank = (chosen == expert).nonzero(as_tuple=True)  # no token twice
        mixed[token] += shares[token, rank, None] * mlp(x[token], layer.gate_up[expert], layer.down[expert])
    return mixed.to(x.dtype)


def step(
    views: list[list[str]],
    tokens: list[list[int]],
    weights: Weights,
    config: Config,
    cache: Cache,
    drawn: Tensor | None = None,
) -> Tensor:
    """`forward` for lists: worker w feeds `tokens[w]` to the last block of `views[w]`. Logits [W, V].

    A negative id, -1 - n, stands for drawn[n], which the device knows and the host need not wait for.
    """
    plan = cache.extend(views, [len(ids) for ids in tokens])
    given = [token for ids in tokens for token in ids]
    flat = torch.tensor(given).to(cache.device, non_blocking=True)
    if min(given) < 0:
        flat = flat.where(flat >= 0, drawn[(-1 - flat).clamp_min(0)]).clamp_min(0)  # -1 was drawn from NaN
    # Scores for all heads; with their softmax and the rotated queries (D 128) four times that
    nbytes = 4 * config.num_attention_heads * plan.mask.nbytes
    with allocating(nbytes, f"a step of {len(flat)} tokens", cache.device):
        return forward(flat, weights, config, cache, plan)
