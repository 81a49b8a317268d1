"""A run as one page for the browser: what each worker saw at every step, and what every token attended to.

The run itself is left alone. It is replayed when it has ended, by the same code, in a cache that looks on; so what is
recorded is what was computed (on a CPU bit for bit; on a GPU by PyTorch, where the run had kernels of its own).
"""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention
from .cache import Cache
from .config import require
from .load import Bar, Model
from .replay import replay
from .text import Stream

TEMPLATE = Path(__file__).with_name("trace.html")
TOP = 8  # weights that are kept of each list, the strongest; of the rest, the sum
LISTS = (
    2**16
)  # that a page holds at most, so that it stays small: one for each token, layer and head, while these suffice


class Watched(Cache):
    """A cache that sees who attends to whom. It numbers tokens in the order in which they are written."""

    linear = staticmethod(attention.linear)

    def __init__(self, model: Model, blocks: list[str]):
        super().__init__(model.config, blocks, model.dtype, model.device, static=False)
        self.ops, self.count, self.order = self, 0, {block: b for b, block in enumerate(blocks)}
        # [2, slots of the pool]: the number of the token there; 2 b, b the block that it was written to, + 1 if moved
        self.tokens = torch.zeros(2, 0, dtype=torch.int64, device=self.device)

    def see(self, weights: Tensor) -> None:
        """What a step's tokens give to each slot in one layer: [T, H, S], S slots from the pool's start."""

    def attend(self, *given) -> Tensor:
        return attention.attend(*given, lambda weights: self.see(weights.transpose(0, 1).flatten(1, 2)))

    def extend(self, views: list[list[str]], counts: list[int]) -> attention.Plan:
        plan = super().extend(views, counts)
        self.tokens[0, plan.slot] = torch.arange(self.count, self.count + sum(counts), device=self.device)
        written = [2 * self.order[view[-1]] for view, count in zip(views, counts) for _ in range(count)]
        self.tokens[1, plan.slot] = torch.tensor(written, device=self.device)
        self.count += sum(counts)
        return plan

    def move(self, source: str, target: str) -> None:
        old, at = self._slots(source, 0, self.lengths[source]), self.lengths[target]
        super().move(source, target)
        moved = self.tokens[:, old]
        moved[1] |= 1
        self.tokens[:, self._slots(target, at, self.lengths[target])] = moved

    def _grow(self, missing: int) -> None:
        super()._grow(missing)
        self.tokens = F.pad(self.tokens, (0, self.values[0].shape[1] - self.tokens.shape[1]))


class Record(Watched):
    """Keeps what a page shows. Lists of weights come in the order: for each layer the heads' average, then each head's;
    last, the average of all."""

    def __init__(self, model: Model, blocks: list[str], rows: int):
        super().__init__(model, blocks)
        L, H = model.config.num_hidden_layers, model.config.num_attention_heads
        self.layers = L if rows * L <= LISTS else 0  # 0: they are kept on average alone
        self.heads = H if rows * L * H <= LISTS else 0
        self.lists, self.total = [], 0
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # by step: numbers and weights, [T, lists, TOP]; see `end`

    def see(self, weights: Tensor) -> None:
        mean = weights.mean(1, keepdim=True)
        self.total = self.total + mean / self.config.num_hidden_layers
        if self.layers:
            self.lists.append(self.strongest(torch.cat([mean, weights], 1) if self.heads else mean))

    def strongest(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of tokens, [T, n, TOP], and their weights, followed by the sum of all others, [T, n, TOP + 1]."""
        top, at = weights.topk(TOP)
        return self.tokens[0, at].to("cpu", torch.int32), in_8_bits(torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1))

    def end(self, keep: bool) -> None:
        """A step has ended. Also kept is what its tokens gave in all to whom, [T, 2 B]: see `tokens`."""
        if keep:
            lists = [torch.cat(parts, 1) for parts in zip(*self.lists, self.strongest(self.total))]
            weights = self.total[:, 0]
            mass = weights.new_zeros(len(weights), 2 * len(self.order))
            mass.index_add_(1, self.tokens[1, : weights.shape[1]], weights)
            self.kept.append((*lists, in_8_bits(mass)))
        self.lists, self.total = [], 0


def in_8_bits(weights: Tensor) -> Tensor:
    """Weights in 8 bits: of their square roots, so that small ones are not lost."""
    return (weights.clamp(0, 1).sqrt() * 255).round().to("cpu", torch.uint8)


def attention_of(token: int, schedule: dict, model: Model) -> Tensor:
    """What a token, by its number in the order of writing, attended to: [L, H, tokens written up to its step]."""
    cache, layers = Watched(model, schedule["blocks"]), []
    cache.see = layers.append
    for _ in replay(schedule, model, cache=cache):
        if cache.count > token:
            break
        layers.clear()
    row = token - cache.count  # from the step's end
    require(layers and row < 0 <= token, f"token {token} is not in the schedule")
    weights = torch.stack([weights[row] for weights in layers])  # [L, H, slots]
    return weights.new_zeros(*weights.shape[:2], cache.count).index_add_(
        2, cache.tokens[0, : weights.shape[2]], weights
    )


def page(blocks: list[str], events: list[dict], model: Model, about: dict) -> bytes:
    """The page of a run, from its events; `about` it, its summary. What comes before anyone begins is not recorded.

    Everything from the run is base64 there, of gzip: JSON, and the arrays that `Record` keeps.
    """
    begun = next((n for n, event in enumerate(events) if event["do"] == "begin"), len(events))
    schedule = {"blocks": blocks, "events": [event for event in events if event["do"] in ("step", "move")]}
    before, rows = (sum(len(ids) for _, ids in fed(part)) for part in (events[:begun], events[begun:]))
    record = Record(model, blocks, rows)
    for _ in replay(schedule | {"events": Bar(schedule["events"], desc="tracing")}, model, cache=record):
        record.end(record.count > before)
    streams = {block: Stream(model.tokenizer, []) for block in blocks}
    texts = [read(streams[block], token) for block, ids in fed(events) for token in ids]
    about = {key: value for key, value in about.items() if not isinstance(value, list)}
    head = {"about": about, "blocks": blocks, "events": events, "begun": begun, "texts": texts}
    head |= {"layers": record.layers, "heads": record.heads, "top": TOP}
    arrays = [torch.cat(parts).numpy() for parts in zip(*record.kept)]
    if arrays:  # three bytes are enough for a number; the first of all, then the second of all: so they shrink well
        arrays[0] = arrays[0].astype("<i4").view(np.uint8).reshape(-1, 4).T[:3]
    text = json.dumps(head).encode()
    data = b"".join([len(text).to_bytes(4, "little"), text, *(array.tobytes() for array in arrays)])
    return TEMPLATE.read_bytes().replace(b"%DATA%", base64.b64encode(gzip.compress(data, mtime=0)))


def fed(events: list[dict]) -> Iterator[tuple[str, list[int]]]:
    """(block, tokens written to it), in order."""
    for event in events:
        if event["do"] == "step":
            yield from zip((view[-1] for view in event["views"]), event["tokens"])


def read(stream: Stream, token: int) -> str:
    """A token's text; where it has none, as special tokens and parts of a character, what the vocabulary calls it."""
    return stream.next(token) or stream.tokenizer.tokenizer.id_to_token(token) or ""
