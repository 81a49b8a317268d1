"""A run as one page for the browser: what each worker saw at every step, and what every token attended to.

The run itself is left alone. It is replayed when it has ended, by the same code, in a cache that looks on; so what is
recorded is what was computed (on a CPU bit for bit; on a GPU PyTorch gives the weights, where the run had a kernel).
"""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

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
LISTS = 2**16  # most lists of a page, so that it stays small: one for each token, layer and head, while these suffice


class Watched(Cache):
    """A cache that sees to whom tokens attend, after the first `before`. It numbers them as they are written."""

    def __init__(self, model: Model, blocks: list[str], before: int = 0):
        super().__init__(model.config, blocks, model.dtype, model.device, static=False)
        self.plain, self.ops = self.ops, self  # what all else is computed by: kernels need no memory for weights
        self.linear = self.plain.linear
        self.before, self.count = before, 0
        # By slot a token's number; and 2 b, where it was written to the b-th block, + 1 once it has moved
        self.tokens = torch.zeros(2, 0, dtype=torch.int64, device=self.device)

    def see(self, weights: Tensor) -> None:
        """What a step's tokens give to each slot in one layer: [T, H, S], S slots from the pool's start."""

    def attend(self, *given) -> Tensor:
        if self.count <= self.before:
            return self.plain.attend(*given)
        return attention.attend(*given, lambda weights: self.see(weights.transpose(0, 1).flatten(1, 2)))

    def extend(self, views: list[list[str]], counts: list[int]) -> attention.Plan:
        plan, order = super().extend(views, counts), [*self.lengths]
        written = [2 * order.index(view[-1]) for view, count in zip(views, counts) for _ in range(count)]
        numbers = range(self.count, self.count + len(written))
        self.tokens[:, plan.slot] = torch.tensor([[*numbers], written], device=self.device)
        self.count += len(written)
        return plan

    def move(self, source: str, target: str) -> None:
        old, at = self._slots(source, 0, self.lengths[source]), self.lengths[target]
        super().move(source, target)
        moved = self.tokens[:, old] | self.tokens.new_tensor([[0], [1]])
        self.tokens[:, self._slots(target, at, self.lengths[target])] = moved

    def _grow(self, missing: int) -> None:
        super()._grow(missing)
        self.tokens = F.pad(self.tokens, (0, self.values[0].shape[1] - self.tokens.shape[1]))


class Record(Watched):
    """Keeps what a page shows of the tokens after the first `before`, of which there will be `rows`.

    Lists of weights come in the order: for each layer the heads' average, then each head's; last, the average of all.
    """

    def __init__(self, model: Model, blocks: list[str], before: int, rows: int):
        super().__init__(model, blocks, before)
        L, H = model.config.num_hidden_layers, model.config.num_attention_heads
        self.layers, self.heads = L * (rows * L <= LISTS), H * (rows * L * H <= LISTS)  # 0: on average alone
        self.lists, self.total = [], 0  # of the step that goes on
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # by step: see `strongest` and `end`

    def see(self, weights: Tensor) -> None:
        mean = weights.mean(1, keepdim=True)
        self.total = self.total + mean / self.config.num_hidden_layers
        if self.layers:
            self.lists.append(self.strongest(torch.cat([mean, weights], 1) if self.heads else mean))

    def strongest(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of tokens, [T, n, TOP], and their weights, followed by the sum of all others, [T, n, TOP + 1]."""
        top, at = weights.topk(TOP)
        rest = 1 - top.sum(-1, keepdim=True)
        return self.tokens[0, at].to("cpu", torch.int32), in_8_bits(torch.cat([top, rest], -1))

    def end(self) -> None:
        """A step has ended. Kept is also what its tokens gave in all to whom, [T, 2 B]: see `tokens`."""
        if self.count > self.before:
            lists = [torch.cat(parts, 1) for parts in zip(*self.lists, self.strongest(self.total))]
            T, _, slots = self.total.shape
            mass = self.total.new_zeros(T, 2 * len(self.lengths))
            mass.index_add_(1, self.tokens[1, :slots], self.total[:, 0])
            self.kept.append((*lists, in_8_bits(mass)))
            self.lists, self.total = [], 0


def in_8_bits(weights: Tensor) -> Tensor:
    """Weights in 8 bits: of their square roots, so that small ones are not lost."""
    return (weights.clamp(0, 1).sqrt() * 255).round().to("cpu", torch.uint8)


def attention_of(token: int, schedule: dict, model: Model) -> Tensor:
    """What a token, by its number in the order of writing, attended to: [L, H, tokens written up to its step]."""
    cache, layers = Watched(model, schedule["blocks"], token), []
    cache.see = layers.append
    for _ in replay(schedule, model, cache=cache):
        if cache.count > token:
            break
    row = token - cache.count  # from the step's end
    require(layers and row < 0 <= token, f"token {token} is not in the schedule")
    weights = torch.stack([weights[row] for weights in layers])  # [L, H, slots]
    L, H, slots = weights.shape
    return weights.new_zeros(L, H, cache.count).index_add_(2, cache.tokens[0, :slots], weights)


def page(blocks: list[str], events: list[dict], model: Model, about: dict) -> bytes:
    """The page of a run, from its events; `about` it, its summary. What comes before anyone begins is not recorded.

    Everything from the run is base64 there, of gzip: JSON, and the arrays that `Record` keeps. It holds what is shown:
    of a model's folder not whose it is, of a step how many tokens it fed.
    """
    begun = next((n for n, event in enumerate(events) if event["do"] == "begin"), len(events))
    schedule = {"blocks": blocks, "events": [event for event in events if event["do"] in ("step", "move")]}
    before, rows = (sum(len(ids) for _, ids in fed(part)) for part in (events[:begun], events[begun:]))
    record = Record(model, blocks, before, rows)
    for _ in replay(schedule | {"events": Bar(schedule["events"], desc="tracing")}, model, cache=record):
        record.end()
    streams = {block: Stream(model.tokenizer, []) for block in blocks}
    texts = [read(streams[block], token) for block, ids in fed(events) for token in ids]
    shown = {key: about[key] for key in ("layout", "tokens", "seed", "stopped_by", "answer")}
    shown["model"] = "/".join(Path(about["model"]).parts[-2:])
    told = [{key: event[key] for key in ("do", "views", "from", "to", "worker") if key in event} for event in events]
    for event, slim in zip(events, told):
        slim["fed"] = [len(ids) for ids in event.get("tokens", [])]
    kept = {"layers": record.layers, "heads": record.heads, "top": TOP}
    head = {"about": shown, "blocks": blocks, "events": told, "begun": begun, "texts": texts, **kept}
    arrays = [torch.cat(parts) for parts in zip(*record.kept)]
    if arrays:  # three bytes are enough for a number; the first of all, then the second of all: so they shrink well
        arrays[0] = arrays[0].view(torch.uint8).view(-1, 4).T[:3]
    text = json.dumps(head).encode()
    data = b"".join([len(text).to_bytes(4, "little"), text, *(array.numpy().tobytes() for array in arrays)])
    return TEMPLATE.read_bytes().replace(b"%DATA%", base64.b64encode(gzip.compress(data, mtime=0)))


def fed(events: list[dict]) -> Iterator[tuple[str, list[int]]]:
    """(block, tokens written to it), in order."""
    for event in events:
        if event["do"] == "step":
            yield from zip((view[-1] for view in event["views"]), event["tokens"])


def read(stream: Stream, token: int) -> str:
    """A token's text; a special token's name; a sign for a part of a character, whose text its last part brings."""
    hidden = token in stream.tokenizer.hidden
    return stream.next(token) or (stream.tokenizer.tokenizer.id_to_token(token) if hidden else "◌")
