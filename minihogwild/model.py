"""The transformer, for Llama, Mistral and Qwen: biases, q/k norms and routers are used where a checkpoint has them."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Plan, Sight, append, look
from .cache import Cache
from .config import Config, Layer, Weights
from .memory import allocating

COMPILE_FROM = 2**30  # bytes of all layers; for a smaller model, compiling takes longer than it saves in a usual run


@torch.no_grad()
def forward(
    tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan, fast: Callable = lambda layer: layer
) -> Tensor:
    """One step of all workers: [T] token ids in, logits [W, V] after each worker's last token out.

    `plan = cache.extend(views, counts)` says whose tokens these are and what each may see. `fast` compiles a function.
    """
    sight = fast(look)(plan, cache.frequencies, cache.keys[0].shape[2], cache.compute_dtype)
    x = F.embedding(tokens, weights.embed)  # [T, E]
    for layer, keys, values in zip(weights.layers, cache.keys, cache.values):
        x = fast(block)(x, layer, config, keys, values, plan, sight, cache.scale, cache.ops)
    return fast(predict)(x, weights.norm, weights.head, config, plan, cache.ops)


def block(x: Tensor, layer: Layer, config: Config, keys: Tensor, values: Tensor, plan: Plan, sight: Sight,
          scale: float, ops) -> Tensor:  # fmt: skip
    """One layer: [T, E] in and out."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = ops.linear(norm(x, layer.attn_norm, config), layer.qkv, layer.qkv_bias)
    q, k, v = qkv.view(-1, H + 2 * K, D).split((H, K, K), dim=1)  # [T, H | K | K, D]
    if layer.q_norm is not None:
        q, k = norm(q, layer.q_norm, config), norm(k, layer.k_norm, config)
    append(keys, values, k, v, plan, sight)  # all workers write before any reads
    mixed = ops.attend(q, keys, values, plan, sight, scale)  # [T, H, D]
    x = x + ops.linear(mixed.flatten(1), layer.out)

    y = norm(x, layer.mlp_norm, config)
    return x + (mlp(y, layer.gate_up, layer.down, ops) if layer.router is None else mixture(y, layer, config, ops))


def predict(x: Tensor, weight: Tensor, head: Tensor, config: Config, plan: Plan, ops) -> Tensor:
    return ops.linear(norm(x[plan.last], weight, config), head)


def norm(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor, ops) -> Tensor:
    """[T, E] in and out."""
    gate, up = ops.linear(x, gate_up).chunk(2, dim=-1)
    return ops.linear(F.silu(gate) * up, down)


def mixture(x: Tensor, layer: Layer, config: Config, ops) -> Tensor:
    """[T, E] in and out: each token takes the MLPs of its most probable experts, times their probabilities."""
    exact = torch.promote_types(x.dtype, torch.float32)
    shares, chosen = F.linear(x, layer.router).softmax(-1, exact).topk(config.num_experts_per_tok)  # [T, k]
    if config.norm_topk_prob:
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = torch.zeros_like(x, dtype=exact)
    for expert in chosen.unique().tolist():  # waits for the device, but reads no expert that nobody chose
        token, rank = (chosen == expert).nonzero(as_tuple=True)  # no token twice
        mixed[token] += shares[token, rank, None] * mlp(x[token], layer.gate_up[expert], layer.down[expert], ops)
    return mixed.to(x.dtype)


def step(views: list[list[str]], tokens: list[list[int]], weights: Weights, config: Config, cache: Cache,
         drawn: Tensor | None = None) -> Tensor:  # fmt: skip
    """`forward` for lists: worker w feeds `tokens[w]` to the last block of `views[w]`. Logits [W, V].

    A negative id, -1 - n, stands for drawn[n], which the device may still be computing: the host need not wait for it.
    """
    counts, given = [len(ids) for ids in tokens], [token for ids in tokens for token in ids]
    # Scores for all heads; with their softmax and the rotated queries (D 128) four times that
    nbytes = 16 * config.num_attention_heads * len(given) * (len(given) + sum(cache.lengths.values()))
    with allocating(nbytes, f"a step of {len(given)} tokens", cache.device):
        plan = cache.extend(views, counts)
        flat = torch.tensor(given).to(cache.device, non_blocking=True)
        if drawn is not None and min(given) < 0:
            flat = flat.where(flat >= 0, drawn[(-1 - flat).clamp_min(0)]).clamp_min(0)  # -1 was drawn from NaN
        decodes = cache.static and max(counts) == 1 and cache.device.type == "cuda" and not config.sparse_layers
        return (decode if decodes else forward)(flat, weights, config, cache, plan)


def decode(tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan) -> Tensor:
    """`forward` in a CUDA graph, recorded once for each number of tokens and size of the pool; compiled if large."""
    if len(tokens) not in cache.graphs:
        parts = [part for layer in weights.layers for part in vars(layer).values() if part is not None]
        fast = compiled if sum(part.nbytes for part in parts) >= COMPILE_FROM else lambda layer: layer
        if fast is compiled:  # for any number of pages
            pools = [(tensor, 0) for tensor in (*cache.keys, plan.page_column, plan.page_first)]
            for tensor, dim in pools + [(tensor, 1) for tensor in cache.values]:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        fed, graph = tokens.clone(), torch.cuda.CUDAGraph()
        forward(fed, weights, config, cache, plan, fast)  # compiles; to write the same keys twice changes nothing
        with torch.cuda.graph(graph):
            logits = forward(fed, weights, config, cache, plan, fast)
        cache.graphs[len(tokens)] = graph, fed, logits
    graph, fed, logits = cache.graphs[len(tokens)]
    fed.copy_(tokens)
    graph.replay()
    return logits.clone()  # the next step writes its own to the same place


@functools.cache
def compiled(function: Callable) -> Callable:
    """One kernel for what lies between two products; made for one number of tokens, and at most four more times."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True)
