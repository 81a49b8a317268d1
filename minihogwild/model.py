"""The transformer, for Llama and its relatives: from token ids to logits, for all workers in one pass.

What a family adds follows from which tensors its checkpoint has (biases, q/k norms, a router), and from the config's
table of layer kinds.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LayerCache, Plan, Positions, append, positions_of
from .backend import PyTorchBackend
from .cache import Cache
from .config import Config, LayerKind
from .errors import allocating, require
from .rope import attention_scale
from .weights import Layer, Matrix, Weights


def as_it_is(function: Callable) -> Callable:
    return function


@torch.no_grad()
def forward(
    tokens: Tensor,
    weights: Weights,
    config: Config,
    cache: Cache,
    plan: Plan,
    compiled: Callable[[Callable], Callable] = as_it_is,
) -> Tensor:
    """One step of all workers: [T] token ids in, logits [W, V] after each worker's last token out.

    `plan = cache.extend(views, counts)` says whose tokens these are, where they are written, and what each may see.
    `compiled` may turn a function into a faster one: see gpu/recorded.py.
    """
    backend = cache.backend
    plan = plan.to(cache.device)
    # What a step needs to know about positions is computed once, and not in each layer. Which keys each row may see, in
    # the form that this backend's attention wants, is the same for all layers; with the rotations, for all of a kind.
    causal_mask = backend.causal_mask(plan, cache.compute_dtype)
    positions = {}
    for kind, frequencies in cache.frequencies.items():
        positions[kind] = compiled(positions_of)(plan, frequencies, causal_mask, cache.compute_dtype)

    x = F.embedding(tokens, weights.embed)  # [T, E]
    for kind, layer, kv in zip(config.layer_kinds, weights.layers, cache.layers):
        x = compiled(transformer_layer)(x, layer, kind, kv, positions[kind], config, backend)
    return compiled(output_head)(x, weights.norm, weights.head, plan, config, backend)


def transformer_layer(
    x: Tensor,
    layer: Layer,
    kind: LayerKind,
    kv: LayerCache,
    positions: Positions,
    config: Config,
    backend: PyTorchBackend,
) -> Tensor:
    """[T, E] in and out; the layer's part of the KV cache gets the new keys and values."""
    attended = self_attention(norm(x, layer.attn_norm, config), layer, kind, kv, positions, config, backend)
    x = x + backend.reduce(attended)  # the sum of several GPUs' parts; of one, as it is
    y = norm(x, layer.mlp_norm, config)
    if layer.router is None:
        transformed = mlp(y, layer.gate_up, layer.down, backend)
    else:
        transformed = mixture_of_experts(y, layer, config, backend)
    return x + backend.reduce(transformed)


def self_attention(
    x: Tensor,
    layer: Layer,
    kind: LayerKind,
    kv: LayerCache,
    positions: Positions,
    config: Config,
    backend: PyTorchBackend,
) -> Tensor:
    """[T, E] in and out. All workers write their keys and values before any of them looks."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = backend.linear(x, layer.qkv, layer.qkv_bias)
    q, k, v = qkv.view(-1, H + 2 * K, D).split((H, K, K), dim=1)  # [T, H | K | K, D]
    if layer.q_norm is not None:
        q = norm(q, layer.q_norm, config)
        k = norm(k, layer.k_norm, config)
    append(kv, k, v, positions)  # rotates k to its place in its block
    mixed = backend.attend(q, kv, positions, attention_scale(config, kind))  # [T, H, D]; rotates q, once for each block
    return backend.linear(mixed.flatten(1), layer.out, layer.out_bias)


def mlp(x: Tensor, gate_up: Matrix, down: Matrix, backend: PyTorchBackend) -> Tensor:
    """SwiGLU: [T, E] in and out."""
    gate, up = backend.linear(x, gate_up).chunk(2, dim=-1)  # [T, F] each
    return backend.linear(F.silu(gate) * up, down)


def mixture_of_experts(x: Tensor, layer: Layer, config: Config, backend: PyTorchBackend) -> Tensor:
    """[T, E] in and out: each token takes the MLPs of its most probable experts, times their probabilities."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    probabilities = F.linear(x, layer.router).softmax(-1, compute_dtype)  # [T, X]
    shares, chosen = probabilities.topk(config.num_experts_per_tok)  # [T, experts of a token] each
    if config.norm_topk_prob:
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = torch.zeros_like(x, dtype=compute_dtype)
    for expert in chosen.unique().tolist():  # waits for the device, but reads no expert that nobody chose
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        transformed = mlp(x[token], layer.gate_up[expert], layer.down[expert], backend)
        mixed[token] += shares[token, rank, None] * transformed  # no token stands twice in `token`
    return mixed.to(x.dtype)


def output_head(
    x: Tensor, norm_weight: Tensor, head: Matrix, plan: Plan, config: Config, backend: PyTorchBackend
) -> Tensor:
    """Logits [W, V], of each worker's last token alone: the others' are not needed."""
    last = x[plan.last]
    return backend.linear(norm(last, norm_weight, config), head)


def norm(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    """Root mean square norm over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


# ---- one step, from Python's lists


def step(views: list[list[str]], tokens: list[list[int]], weights: Weights, config: Config, cache: Cache) -> Tensor:
    """Worker w feeds `tokens[w]` to the last block of `views[w]`. Logits [W, V] after each worker's last token.

    Raises InputError for views that contradict each other, ids that the vocabulary lacks, or too little memory. Where
    a step fails, for whatever reason, the cache's blocks are as they were.
    """
    flat = [token for ids in tokens for token in ids]
    for token in flat:
        require(0 <= token < config.vocab_size, f"token {token} is outside the vocabulary of {config.vocab_size}")
    counts = [len(ids) for ids in tokens]
    return step_on_device(views, counts, torch.tensor(flat, dtype=torch.int64), weights, config, cache)


def step_on_device(
    views: list[list[str]], counts: list[int], tokens: Tensor, weights: Weights, config: Config, cache: Cache
) -> Tensor:
    """`step` for ids [T] of all workers in one tensor, one worker's behind the other's.

    A GPU may still be computing them: so they are not checked.
    """
    what = f"a step of {len(tokens)} tokens"
    with cache.extended(views, counts) as plan, allocating(memory_of_step(plan, config), what, cache.device):
        on_device = tokens.to(cache.device, non_blocking=True)
        return cache.backend.run(forward, on_device, weights, config, cache, plan)


def memory_of_step(plan: Plan, config: Config) -> int:
    """Bytes that attention takes in PyTorch, about.

    For each row, page and head, in float32: four copies of its scores, and two of the query for that page.
    """
    rows, pages = len(plan.offset), len(plan.page_block)
    numbers = 4 * plan.page_size + 2 * config.head_dim
    return 4 * rows * pages * config.num_attention_heads * numbers
