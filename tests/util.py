"""Random models, random schedules, and both ways to run them: what the property tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from minihogwild import Cache, Config, Layer, LayerKind, Rope, Weights
from minihogwild import step as engine_step
from minihogwild.backend import PyTorchBackend
from minihogwild.cache import PAGE
from minihogwild.hub.checkpoint import Extras, empty_weights
from minihogwild.oracle import Oracle

V = 61

ROPES = {
    "default": Rope(rope_theta=1000.0),
    "linear": Rope("linear", factor=3.0),
    "llama3": Rope(
        "llama3",
        rope_theta=5000.0,
        factor=8.0,
        original_max_position_embeddings=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "yarn": Rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn, given m": Rope(
        "yarn", rope_theta=500.0, factor=16.0, original_max_position_embeddings=24, attention_factor=1.3, truncate=False
    ),
    "yarn, mscales": Rope(
        "yarn", factor=8.0, original_max_position_embeddings=48, mscale=1.2, mscale_all_dim=0.4, beta_fast=16.0
    ),
}


def config(
    rope: str = "default",
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 2,
    kinds: tuple[LayerKind, ...] | None = None,
    **experts,
) -> Config:
    """A small shape; `kinds` gives the layers one by one, else there are `layers` plain ones."""
    return Config(
        vocab_size=V,
        hidden_size=20,
        intermediate_size=28,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope=ROPES[rope],
        layer_kinds=(LayerKind(),) * layers if kinds is None else kinds,
        **experts,
    )


# Of the layers of one model: with and without rotation, with one MLP or with experts
layer_kinds = st.lists(st.builds(LayerKind, rope=st.booleans(), experts=st.booleans()), min_size=1, max_size=3)


@st.composite
def configs(draw) -> Config:
    kv_heads = draw(st.integers(1, 3))
    kinds = tuple(draw(layer_kinds))
    experts = {}
    if any(kind.experts for kind in kinds):
        count = draw(st.integers(1, 5))
        experts = {
            "num_experts": count,
            "num_experts_per_tok": draw(st.integers(1, count)),
            "moe_intermediate_size": draw(st.sampled_from([1, 9, 28])),
            "norm_topk_prob": draw(st.booleans()),
        }
    shape = config(
        rope=draw(st.sampled_from(sorted(ROPES))),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 5])),  # odd head counts among them
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6, 8, 16])),
        kinds=kinds,
        **experts,
    )
    return replace(shape, tie_word_embeddings=draw(st.booleans()))


def random_weights(
    config: Config,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    biases: bool = True,
    qk_norms: bool = False,
    out_bias: bool = False,
) -> Weights:
    """Weights so large that attention is far from uniform, and what a token sees decides its logits."""
    extras = Extras(biases, out_bias=out_bias, qk_norms=qk_norms)
    weights, places = empty_weights(config, dtype, "cpu", extras)
    fill_at_random(places, seed)
    return weights


def fill_at_random(places: dict[str, Tensor], seed: int = 0) -> None:
    """Fill the tensors of a checkpoint, given by their names there."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in places.items():
        drawn = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.3 * drawn
        elif tensor.dim() == 2 and name != "model.embed_tokens.weight":
            gain = 4.0 if "q_proj" in name or "k_proj" in name else 2.0
            drawn *= gain / tensor.shape[1] ** 0.5
        tensor.copy_(drawn)


class WatchedOracle(Oracle):
    """Notes the narrowest choice of experts: how far, in the router's scores, the last one taken led the next one.

    Which experts a token takes is the one thing that jumps: where two are nearly even, rounding may decide.
    """

    narrowest = float("inf")

    def mlp(self, x: Tensor, layer: Layer) -> Tensor:
        if layer.router is not None:
            scores, taken = (layer.router @ x).sort(descending=True).values, self.config.num_experts_per_tok
            leads = scores[taken - 1 : -1] - scores[taken:]  # none, where all are taken
            self.narrowest = min([self.narrowest, *leads[:1].tolist()])
        return super().mlp(x, layer)


class Engine:
    """The engine under the oracle's interface."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        blocks: list[str],
        page_size: int = PAGE,
        backend: PyTorchBackend | None = None,
    ):
        self.config = config
        self.weights = weights
        self.cache = Cache(config, blocks, weights.embed.dtype, backend=backend, page_size=page_size)
        self.move = self.cache.move
        self.drop = self.cache.drop

    def step(self, views: list[list[str]], tokens: list[list[int]]) -> Tensor:
        return engine_step(views, tokens, self.weights, self.config, self.cache)


def run(machine: Engine | Oracle, events: list[dict]) -> Iterator[Tensor]:
    """The logits of each step of a schedule."""
    for event in events:
        if event["do"] == "move":
            machine.move(event["from"], event["to"])
        elif event["do"] == "drop":
            machine.drop(event["block"])
        else:
            yield machine.step(event["views"], event["tokens"])


def step(*workers: tuple[list[str], list[int]]) -> dict:
    views, tokens = zip(*workers)
    return {"do": "step", "views": list(views), "tokens": list(tokens)}


def tokens(count: int | st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    sizes = st.just(count) if isinstance(count, int) else count
    return sizes.flatmap(lambda n: st.lists(st.integers(0, V - 1), min_size=n, max_size=n))


@st.composite
def schedules(draw, max_events: int = 10) -> tuple[list[str], list[dict]]:
    """(blocks, events): any workers with any views, ragged chunks, idle workers, moves between any blocks, drops."""
    blocks = [f"block {n}" for n in range(draw(st.integers(1, 6)))]
    events = [step(([blocks[0]], draw(tokens(st.integers(1, 20)))))]
    for _ in range(draw(st.integers(1, max_events))):
        if len(blocks) > 1 and draw(st.integers(0, 3)) == 0:
            source, target = draw(st.permutations(blocks))[:2]
            events.append({"do": "move", "from": source, "to": target})
            continue
        if draw(st.integers(0, 7)) == 0:
            events.append({"do": "drop", "block": draw(st.sampled_from(blocks))})
            continue
        owns = draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=4, unique=True))
        workers = []
        for own in owns:  # each sees other blocks in an order of its own, or not at all
            others = [block for block in draw(st.permutations(blocks)) if block != own]
            view = [*others[: draw(st.integers(0, len(others)))], own]
            workers.append((view, draw(tokens(st.integers(1, 7)))))
        events.append(step(*workers))
    return blocks, events


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the logits' scale."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
