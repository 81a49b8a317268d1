"""The same mathematics the slow, obvious way, in float64, to hold the engine against.

Keys are kept unrotated. Each worker's view is laid out token by token, at explicit positions 0, 1, 2, ...; every key is
rotated to its position, and one plain softmax runs over them. A move appends one block's keys and values to another's.
Nothing is shared with the engine but Config and Weights.
"""

import math

import torch
from torch import Tensor

from .config import Config, LayerKind
from .weights import Layer, Matrix, Weights


class Oracle:
    """A cache and a forward pass in one: `step` takes the views and tokens of one step, and returns its logits."""

    def __init__(self, config: Config, weights: Weights, blocks: list[str]):
        self.config = config
        self.embed = exact(weights.embed)
        self.layers = [exact_layer(layer) for layer in weights.layers]
        self.final_norm = exact(weights.norm)
        self.head = exact(weights.head)
        # Unrotated keys and values of each block, for each layer: [N, K, D]
        K, D = config.num_key_value_heads, config.head_dim
        self.keys: dict[str, list[Tensor]] = {}
        self.values: dict[str, list[Tensor]] = {}
        for block in blocks:
            self.keys[block] = [torch.zeros(0, K, D, dtype=torch.float64) for _ in self.layers]
            self.values[block] = [torch.zeros(0, K, D, dtype=torch.float64) for _ in self.layers]

    # ---- a step

    @torch.no_grad()
    def step(self, views: list[list[str]], tokens: list[list[int]]) -> Tensor:
        """Logits [W, V] float64 after each worker's last token.

        `views`: for each worker the blocks that it sees, in order, its own last; `tokens`: the ids that it feeds.
        """
        hidden = []  # for each worker: [n, E], n new tokens
        for ids in tokens:
            hidden.append(self.embed[torch.tensor(ids)])
        for layer_index in range(len(self.layers)):
            hidden = self.transformer_layer(layer_index, views, hidden)
        logits = []
        for x in hidden:
            last = self.norm(x[-1], self.final_norm)
            logits.append(self.head @ last)
        return torch.stack(logits)

    def transformer_layer(self, layer_index: int, views: list[list[str]], hidden: list[Tensor]) -> list[Tensor]:
        """For each worker [n, E] in and out. All of them write to their blocks, and only then each looks."""
        layer = self.layers[layer_index]
        queries = []
        for view, x in zip(views, hidden):
            own = view[-1]
            q, k, v = self.project(x, layer)
            self.keys[own][layer_index] = torch.cat((self.keys[own][layer_index], k))
            self.values[own][layer_index] = torch.cat((self.values[own][layer_index], v))
            queries.append(q)

        outputs = []
        for view, x, q in zip(views, hidden, queries):
            mixed = self.attention(layer_index, view, q)  # [n, H, D]
            x = x + mixed.flatten(1) @ layer.out.T
            if layer.out_bias is not None:
                x = x + layer.out_bias
            y = self.norm(x, layer.mlp_norm)
            transformed = [self.mlp(token, layer) for token in y]
            outputs.append(x + torch.stack(transformed))
        return outputs

    def project(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, H, D], k and v [n, K, D], before any rotation."""
        H, K, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        qkv = self.norm(x, layer.attn_norm) @ layer.qkv.T
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        heads = qkv.view(-1, H + 2 * K, D)
        q = heads[:, :H]
        k = heads[:, H : H + K]
        v = heads[:, H + K :]
        if layer.q_norm is not None:
            q = self.norm(q, layer.q_norm)
            k = self.norm(k, layer.k_norm)
        return q, k, v

    def attention(self, layer_index: int, view: list[str], q: Tensor) -> Tensor:
        """[n, H, D]: a worker's n new tokens stand last in its view; each looks at itself and all before it."""
        keys = torch.cat([self.keys[block][layer_index] for block in view])  # [S, K, D], S tokens in the view
        values = torch.cat([self.values[block][layer_index] for block in view])
        S, n = len(keys), len(q)
        positions = torch.arange(S)
        new_positions = positions[S - n :]

        kind = self.config.layer_kinds[layer_index]
        q = self.rotate(q, new_positions, kind)
        keys = self.rotate(keys, positions, kind)

        # Grouped-query attention: G query heads in a row share a key head. Here each gets a copy of its own.
        G = self.config.num_attention_heads // self.config.num_key_value_heads
        keys = keys.repeat_interleave(G, dim=1)  # [S, H, D]
        values = values.repeat_interleave(G, dim=1)
        scale = 1 / math.sqrt(self.config.head_dim)
        if kind.rope:
            scale *= yarn_factor(self.config) ** 2  # the factor of both, query and key
        scores = scale * torch.einsum("nhd,shd->hns", q, keys)
        comes_later = positions[None, :] > new_positions[:, None]  # [n, S]
        scores = scores.masked_fill(comes_later, -math.inf)
        return torch.einsum("hns,shd->nhd", scores.softmax(-1), values)

    def mlp(self, x: Tensor, layer: Layer) -> Tensor:
        """[E] in and out: one token alone."""
        if layer.router is None:
            return swiglu(x, layer.gate_up, layer.down)
        probabilities = (layer.router @ x).softmax(0).tolist()
        least_likely_first = sorted(range(len(probabilities)), key=lambda expert: probabilities[expert])
        chosen = least_likely_first[-self.config.num_experts_per_tok :]
        whole = 1.0
        if self.config.norm_topk_prob:
            whole = sum(probabilities[expert] for expert in chosen)
        mixed = torch.zeros_like(x)
        for expert in chosen:
            share = probabilities[expert] / whole
            mixed = mixed + share * swiglu(x, layer.gate_up[expert], layer.down[expert])
        return mixed

    def rotate(self, x: Tensor, positions: Tensor, kind: LayerKind) -> Tensor:
        """Rotate [n, heads, D] to n positions, pair by pair, as complex numbers."""
        if not kind.rope:
            return x
        frequencies = torch.tensor(frequencies_of_pairs(self.config), dtype=torch.float64)
        angles = positions.double()[:, None, None] * frequencies  # [n, 1, D / 2]
        half = self.config.head_dim // 2
        pairs = torch.complex(x[..., :half], x[..., half:])
        rotated = pairs * torch.exp(1j * angles)
        return torch.cat((rotated.real, rotated.imag), -1)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * weight

    # ---- what else happens to blocks

    def move(self, source: str, target: str) -> None:
        """Append the whole of one block to another, and empty it."""
        for stored in (self.keys, self.values):
            for layer_index in range(len(self.layers)):
                stored[target][layer_index] = torch.cat((stored[target][layer_index], stored[source][layer_index]))
        self.drop(source)

    def drop(self, block: str) -> None:
        """Empty a block."""
        for stored in (self.keys, self.values):
            for layer_index in range(len(self.layers)):
                stored[block][layer_index] = stored[block][layer_index][:0]


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * up)


# ---- weights in float64


def exact(weight: Tensor | Matrix | None) -> Tensor | None:
    """The very numbers that the engine multiplies by, in float64, whatever form they are stored in."""
    if weight is None:
        return None
    if isinstance(weight, Tensor):
        return weight.to("cpu", torch.float64)
    return weight.float64()


def exact_layer(layer: Layer) -> Layer:
    """The same layer, of plain float64 tensors."""
    return Layer(**{name: exact(weight) for name, weight in vars(layer).items()})


# ---- rope scaling


def frequencies_of_pairs(config: Config) -> list[float]:
    """Radians per position for each of the D / 2 pairs, one by one."""
    rope = config.rope
    frequencies = []
    for pair in range(config.head_dim // 2):
        trained = 1 / rope.rope_theta ** (2 * pair / config.head_dim)
        slowed = trained / rope.factor
        share = min(max(share_that_is_slowed(pair, trained, config), 0.0), 1.0)
        frequencies.append(share * slowed + (1 - share) * trained)
    return frequencies


def share_that_is_slowed(pair: int, trained_frequency: float, config: Config) -> float:
    """How much of a pair's frequency is divided by `factor`: none of it (0, or less), all (1, or more), or a part."""
    rope = config.rope
    if rope.rope_type == "default":
        return 0.0
    if rope.rope_type == "linear":
        return 1.0
    if rope.rope_type == "llama3":
        wavelength = 2 * math.pi / trained_frequency
        turns = rope.original_max_position_embeddings / wavelength  # in the trained context
        return (rope.high_freq_factor - turns) / (rope.high_freq_factor - rope.low_freq_factor)
    # yarn: 0 up to the pair that makes beta_fast turns in the trained context, rising to 1 at the one that makes
    # beta_slow turns
    first = pair_that_makes(rope.beta_fast, config)
    last = pair_that_makes(rope.beta_slow, config)
    if rope.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, config.head_dim - 1)  # as transformers has it, though there are only D / 2 pairs
    width = last - first
    if width == 0:
        width = 0.001  # no division by 0, but a jump from one pair to the next; transformers has the same number
    return (pair - first) / width


def pair_that_makes(turns: float, config: Config) -> float:
    """The pair, as a real number, that makes `turns` turns in the trained context."""
    rope = config.rope
    wavelength = rope.original_max_position_embeddings / turns
    # A pair's wavelength is 2 pi theta ** (2 pair / D): solved for the pair
    return config.head_dim / 2 * math.log(wavelength / (2 * math.pi), rope.rope_theta)


def yarn_factor(config: Config) -> float:
    """What YaRN multiplies rotated queries and keys by."""
    rope = config.rope
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    growth = 0.1 * math.log(max(rope.factor, 1))
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * growth + 1) / (rope.mscale_all_dim * growth + 1)
    return growth + 1
