"""The transformer, for Llama and its relatives: from token ids to logits, for all workers in one pass.

What a family adds follows from which tensors its checkpoint has (biases, q/k norms, a router), and from the config's
table of layer kinds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LayerCache, Plan, Positions
from .backend import PyTorchBackend
from .cache import Cache
from .config import Config, LayerKind
from .errors import allocating, refusing, require, require_kind, whole_number
from .rope import attention_scale
from .weights import Layer, Matrix, Weights


@torch.no_grad()
def forward(tokens: Tensor, weights: Weights, config: Config, cache: Cache, plan: Plan) -> Tensor:
    """One step of all workers: [T] token ids in, logits [W, V] after each worker's last token out.

    `plan = cache.extend(views, counts)` says whose tokens these are, where they are written, and what each may see.
    """
    backend = cache.backend
    plan = plan.to(cache.device)
    # What a step needs to know about positions is computed once, and not in each layer. Which keys each row may see, in
    # the form that this backend's attention wants, is the same for all layers; with the rotations, for all of a kind.
    causal_mask = backend.causal_mask(plan, cache.compute_dtype)
    positions = {}
    for kind, frequencies in cache.frequencies.items():
        positions[kind] = backend.positions(plan, frequencies, causal_mask, cache.compute_dtype)

    x = F.embedding(tokens, weights.embed)  # [T, E]
    change = torch.zeros_like(x)
    for kind, layer, kv in zip(config.layer_kinds, weights.layers, cache.layers):
        x, change = transformer_layer(x, change, layer, kind, kv, positions[kind], config, backend)
    _, y = backend.add_and_norm(x, change, weights.norm, config.rms_norm_eps)
    return backend.linear(y[plan.last], weights.head)  # the other tokens' logits are not needed


def transformer_layer(
    x: Tensor,
    change: Tensor,
    layer: Layer,
    kind: LayerKind,
    kv: LayerCache,
    positions: Positions,
    config: Config,
    backend: PyTorchBackend,
) -> tuple[Tensor, Tensor]:
    """(x, change) in and out, [T, E] each; the layer's part of the KV cache gets the new keys and values.

    What a layer's second half changes about x is added to it by who comes next: the next layer, or the last norm. So
    every sum is followed by a norm, and a backend may do both at once.
    """
    x, y = backend.add_and_norm(x, change, layer.attn_norm, config.rms_norm_eps)
    change = self_attention(y, layer, kind, kv, positions, config, backend)
    change = backend.reduce(change)  # the sum of several GPUs' parts; of one, as it is
    x, y = backend.add_and_norm(x, change, layer.mlp_norm, config.rms_norm_eps)
    if layer.router is None:
        change = mlp(y, layer.gate_up, layer.down, backend)
    else:
        change = mixture_of_experts(y, layer, config, backend)
    return x, backend.reduce(change)


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
    qkv = backend.linear(x, layer.qkv, layer.qkv_bias)  # [T, (H + 2K) D]
    q = backend.append(qkv, layer, kv, positions, config)  # keys and values are in the cache now
    mixed = backend.attend(q, kv, positions, attention_scale(config, kind))  # [T, H, D]
    return backend.linear(mixed.flatten(1), layer.out, layer.out_bias)


def mlp(x: Tensor, gate_up: Matrix, down: Matrix, backend: PyTorchBackend) -> Tensor:
    """SwiGLU: [T, E] in and out."""
    return backend.linear(backend.linear_and_swiglu(x, gate_up), down)


def mixture_of_experts(x: Tensor, layer: Layer, config: Config, backend: PyTorchBackend) -> Tensor:
    """[T, E] in and out: each token takes the MLPs of its R most probable experts, times their probabilities."""
    chosen = backend.choose_experts(x, layer.router, config.num_experts_per_tok, config.norm_topk_prob)
    gate_up = backend.linear_of_experts(x, layer.gate_up, chosen)  # [T, R, 2F]
    each = backend.linear_of_experts(backend.swiglu(gate_up), layer.down, chosen)  # [T, R, E]
    return backend.mix_experts(each, chosen)


# ---- one step, from Python's lists


def step(views: list[list[str]], tokens: list[list[int]], weights: Weights, config: Config, cache: Cache) -> Tensor:
    """Worker w feeds `tokens[w]` to the last block of `views[w]`. Logits [W, V] after each worker's last token.

    Raises InputError for views that contradict each other, ids that the vocabulary lacks, or too little memory. Where
    a step fails, for whatever reason, the cache's blocks are as they were.
    """
    for value, kind in ((weights, Weights), (config, Config), (cache, Cache)):
        require_kind(value, kind, "what a step takes")
    with refusing("a step takes a list of blocks and a list of token ids for each worker"):
        for view in views:
            require(all(isinstance(block, str) for block in view), f"blocks have names, unlike those of {view!r}")
        flat = [whole_number(token, "a token") for ids in tokens for token in ids]
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
