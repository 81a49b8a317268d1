"""The same mathematics the slow, obvious way, in float64, to hold the engine against.

Keys are kept unrotated. Each worker's view is laid out token by token with explicit absolute positions,
every key is rotated to its position, and one plain softmax runs over them. A move joins two lists. Nothing
is shared with the engine but Config and Weights.
"""

import math

import torch
from torch import Tensor

from .config import Config, Layer, Weights


class Oracle:
    """A cache and a forward in one: `step` takes what one step of all workers takes, and returns its logits."""

    def __init__(self, config: Config, weights: Weights, blocks: list[str]):
        self.config, self.weights = config, to_float64(weights)
        self.frequencies = torch.tensor(frequencies(config), dtype=torch.float64)
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        empty = torch.zeros(2, 0, K, D, dtype=torch.float64)
        self.stored = {block: [empty] * L for block in blocks}  # [2, N, K, D] for each layer: unrotated keys; values

    @torch.no_grad()
    def step(self, views: list[list[str]], tokens: list[list[int]]) -> Tensor:
        """Logits [W, V] float64 after each worker's last token."""
        hidden = [self.weights.embed[torch.tensor(ids)] for ids in tokens]  # W times [n, E]
        for i, layer in enumerate(self.weights.layers):
            queries = []
            for view, x in zip(views, hidden):
                q, k, v = self.project(x, layer)
                own = self.stored[view[-1]]
                own[i] = torch.cat((own[i], torch.stack((k, v))), 1)
                queries.append(q)
            for w, view in enumerate(views):
                mixed = self.attention(i, view, queries[w])
                x = hidden[w] + mixed.flatten(1) @ layer.out.T
                hidden[w] = x + torch.stack([self.mlp(y, layer) for y in self.norm(x, layer.mlp_norm)])
        last = torch.stack([x[-1] for x in hidden])
        return self.norm(last, self.weights.norm) @ self.weights.head.T

    def move(self, source: str, target: str) -> None:
        """Append the whole of one block to another, and empty it."""
        for i, moved in enumerate(self.stored[source]):
            self.stored[target][i] = torch.cat((self.stored[target][i], moved), 1)
            self.stored[source][i] = moved[:, :0]

    def project(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, H, D], k and v [n, K, D], before any rotation."""
        H, K, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        y = self.norm(x, layer.attn_norm) @ layer.qkv.T
        if layer.qkv_bias is not None:
            y = y + layer.qkv_bias
        q, k, v = (y[:, a * D : b * D].unflatten(1, (-1, D)) for a, b in ((0, H), (H, H + K), (H + K, H + 2 * K)))
        if layer.q_norm is not None:
            q, k = self.norm(q, layer.q_norm), self.norm(k, layer.k_norm)
        return q, k, v

    def attention(self, i: int, view: list[str], q: Tensor) -> Tensor:
        """[n, H, D]: a worker's n new tokens, the last of its view, look at all of it but what comes after them."""
        keys, values = torch.cat([self.stored[block][i] for block in view], 1)  # [S, K, D], S tokens in the view
        positions = torch.arange(len(keys), dtype=torch.float64)
        mine = positions[len(keys) - len(q) :]
        q, keys = self.turn(q, mine), self.turn(keys, positions)
        future = positions[None, :] > mine[:, None]  # [n, S]
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)  # [S, H, D]
        scores = magnitude(self.config) ** 2 / math.sqrt(self.config.head_dim) * torch.einsum("nhd,shd->hns", q, keys)
        return torch.einsum("hns,shd->nhd", scores.masked_fill(future, -math.inf).softmax(-1), values)

    def mlp(self, x: Tensor, layer: Layer) -> Tensor:
        """[E] in and out: one token alone."""
        if layer.router is None:
            return swiglu(x, layer.gate_up, layer.down)
        probabilities = (layer.router @ x).softmax(0).tolist()
        best = sorted(range(len(probabilities)), key=probabilities.__getitem__)[-self.config.num_experts_per_tok :]
        whole = sum(probabilities[n] for n in best) if self.config.norm_topk_prob else 1.0
        return sum(probabilities[n] / whole * swiglu(x, layer.gate_up[n], layer.down[n]) for n in best)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate [n, heads, D] to n positions, as complex numbers."""
        half = self.config.head_dim // 2
        turned = torch.complex(x[..., :half], x[..., half:])
        turned = turned * torch.exp(1j * positions[:, None, None] * self.frequencies)
        return torch.cat((turned.real, turned.imag), -1)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * up)


def to_float64(weights: Weights) -> Weights:
    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("cpu", torch.float64)

    layers = [Layer(**{name: exact(tensor) for name, tensor in vars(layer).items()}) for layer in weights.layers]
    return Weights(exact(weights.embed), layers, exact(weights.norm), exact(weights.head))


def frequencies(config: Config) -> list[float]:
    """Radians per position for each of the D / 2 pairs, one by one."""
    rope, D = config.rope, config.head_dim
    result = []
    for pair in range(D // 2):
        plain = 1 / rope.rope_theta ** (2 * pair / D)
        stretched = {"default": 0.0, "linear": 1.0}.get(rope.rope_type)  # how far toward plain / factor
        if rope.rope_type == "llama3":
            turns = rope.original_max_position_embeddings / (2 * math.pi / plain)  # in the trained context
            stretched = (rope.high_freq_factor - turns) / (rope.high_freq_factor - rope.low_freq_factor)
        elif rope.rope_type == "yarn":
            first, last = yarn_bounds(config)
            stretched = (pair - first) / ((last - first) or 0.001)
        stretched = min(max(stretched, 0.0), 1.0)
        result.append(stretched * plain / rope.factor + (1 - stretched) * plain)
    return result


def yarn_bounds(config: Config) -> tuple[float, float]:
    """The pairs, as real numbers, that make beta_fast and beta_slow turns in the trained context."""
    rope, D = config.rope, config.head_dim
    bounds = []
    for turns, rounded in ((rope.beta_fast, math.floor), (rope.beta_slow, math.ceil)):
        wavelength = rope.original_max_position_embeddings / turns
        pair = D / 2 * math.log(wavelength / (2 * math.pi), rope.rope_theta)
        bounds.append(rounded(pair) if rope.truncate else pair)
    return max(bounds[0], 0), min(bounds[1], D - 1)


def magnitude(config: Config) -> float:
    """What YaRN multiplies queries and keys by."""
    rope = config.rope
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    log = 0.1 * math.log(max(rope.factor, 1))
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * log + 1) / (rope.mscale_all_dim * log + 1)
    return log + 1
