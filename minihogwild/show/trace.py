"""A run as one page for the browser: what each worker saw at every step, and what every token attended to.

The run itself is left alone. When it has ended it is replayed, by the same code, with a backend that looks on; so what
is recorded is what was computed (on a CPU bit for bit; on a GPU PyTorch gives the weights, where the run had a kernel).
"""

import base64
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention import LayerCache, Plan, Positions, attention_weights, causal_mask_of, mix_values
from ..backend import PyTorchBackend
from ..config import Config
from ..errors import require
from ..hub import Bar, Model, TextStream, Tokenizer
from ..layouts import block_of
from ..replay import replay
from ..weights import Layer

TEMPLATE = Path(__file__).with_name("trace.html")
TOP = 8  # weights that are kept of each list, the strongest; of the rest, the sum
LISTS = 2**16  # most lists of a page, so that it stays small: one for each token, layer and head, while these suffice
PART_OF_A_CHARACTER = "◌"  # stands for a token that completes none


# ---- looking on


class Onlooker:
    """Computes as another backend does, and shows attention's weights from the step on that feeds the token `first`.

    Tokens are numbered in the order in which they are fed. Until then all is left to the other backend: kernels keep
    no weights, and for those of a long prompt there may be no room.
    """

    def __init__(self, backend: PyTorchBackend, first: int, show: Callable[[Tensor], None]):
        self.backend = backend
        self.first = first
        self.show = show  # is given the weights of one layer after the other, [T, H, slots]
        self.count = 0  # tokens fed so far
        self.is_watching = False
        self.plan: Plan | None = None  # of the latest step

    def __getattr__(self, name: str):
        return getattr(self.backend, name)  # all that is not below

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        self.count += len(tokens)
        self.is_watching = self.count > self.first
        self.plan = plan
        return forward(tokens, weights, config, cache, plan)

    def causal_mask(self, plan: Plan, dtype: torch.dtype) -> Tensor | None:
        if self.is_watching:
            return causal_mask_of(plan, dtype)
        return self.backend.causal_mask(plan, dtype)

    def append(self, qkv: Tensor, layer: Layer, kv: LayerCache, positions: Positions, config: Config) -> Tensor:
        if self.is_watching:
            return PyTorchBackend.append(self, qkv, layer, kv, positions, config)
        return self.backend.append(qkv, layer, kv, positions, config)

    def attend(self, q: Tensor, kv: LayerCache, positions: Positions, scale: float) -> Tensor:
        if not self.is_watching:
            return self.backend.attend(q, kv, positions, scale)
        weights = attention_weights(q, kv, positions, scale)  # [K, T, G, slots]
        self.show(weights.transpose(0, 1).flatten(1, 2))  # [T, H, slots]
        return mix_values(weights, kv).to(q.dtype)


class Tokens:
    """All tokens fed so far, by number: where each was written, and where it stands by now."""

    def __init__(self, blocks: list[str]):
        self.blocks = blocks
        self.written_to: list[int] = []  # of each token: to which of the blocks, by its number
        self.has_moved: list[bool] = []  # of each token: is it in another one by now?
        self.held: dict[str, list[int]] = {block: [] for block in blocks}  # of each block: its tokens, in order

    @property
    def count(self) -> int:
        return len(self.written_to)

    def note(self, event: dict) -> None:
        """Follow an event of a schedule."""
        if event["do"] == "step":
            for block, ids in fed([event]):
                self.held[block] += range(self.count, self.count + len(ids))
                self.written_to += [self.blocks.index(block)] * len(ids)
                self.has_moved += [False] * len(ids)
        elif event["do"] == "move":
            source, target = event["from"], event["to"]
            for token in self.held[source]:
                self.has_moved[token] = True
            self.held[target] += self.held[source]
            self.held[source] = []
        elif event["do"] == "drop":
            self.held[event["block"]] = []

    def in_slots(self, plan: Plan, views: list[list[str]]) -> Tensor:
        """Which token each slot of the pool held in the latest step, [slots] int64; 0 where nobody could look."""
        columns = list(dict.fromkeys(block for view in views for block in view))  # the plan's: as views name them
        numbers = np.zeros((len(plan.page_block), plan.page_size), dtype=np.int64)
        pages = zip(plan.page_block.tolist(), plan.page_start.tolist())
        for page, (column, start) in enumerate(pages):
            block = columns[column]
            tokens = self.held[block][start : start + plan.page_size]  # none, in a page that was not read
            numbers[page, : len(tokens)] = tokens
        return torch.from_numpy(numbers.reshape(-1))


def replay_watched(schedule: dict, model: Model, onlooker: Onlooker, tokens: Tokens) -> Iterator[dict]:
    """Compute a schedule once more. Yields the event of each step, when `tokens` has been told of it."""
    cache = model.cache_for(schedule["blocks"], onlooker)
    events = schedule["events"]
    noted = 0
    for index, _ in replay(schedule, model, cache=cache):
        for event in events[noted : index + 1]:
            tokens.note(event)
        noted = index + 1
        yield events[index]


def fed(events: list[dict]) -> Iterator[tuple[str, list[int]]]:
    """(block, ids written to it), in the order in which tokens are numbered."""
    for event in events:
        if event["do"] == "step":
            for view, ids in zip(event["views"], event["tokens"]):
                yield view[-1], ids


def count_fed(events: list[dict]) -> int:
    return sum(len(ids) for _, ids in fed(events))


def attention_of(token: int, schedule: dict, model: Model) -> Tensor:
    """What a token, by its number in the order of feeding, attended to: [L, H, tokens fed up to its step].

    Raises InputError for a token that is not in the schedule.
    """
    require(0 <= token < count_fed(schedule["events"]), f"token {token} is not in the schedule")
    layers = []
    onlooker = Onlooker(model.backend, token, layers.append)
    tokens = Tokens(schedule["blocks"])
    for event in replay_watched(schedule, model, onlooker, tokens):
        if onlooker.is_watching:
            token_in_slot = tokens.in_slots(onlooker.plan, event["views"])
            break
    row = token - tokens.count  # counted from the end of its step
    weights = torch.stack([layer[row] for layer in layers])  # [L, H, slots]
    L, H, _ = weights.shape
    by_token = weights.new_zeros(L, H, tokens.count)
    return by_token.index_add_(2, token_in_slot.to(weights.device), weights)


# ---- what is kept of it


@dataclass
class Strongest:
    """The strongest weights of some lists, a list being what one token gives to all slots in one layer and head."""

    slots: Tensor  # [T, lists, TOP] int64
    weights: Tensor  # [T, lists, TOP + 1] uint8: see `in_8_bits`; the last one is the sum of all others


@dataclass
class KeptStep:
    """What a page keeps of the tokens of one step. Lists are in the order in which a Recorder makes them."""

    tokens: Tensor  # [T, lists, TOP] int32: the numbers of those that got each list's strongest weights
    weights: Tensor  # [T, lists, TOP + 1] uint8: these weights, and the sum of all others
    # [T, 2 B] uint8, averaged over layers and heads: 2 b for all tokens that were written to block b and are still
    # there, 2 b + 1 for those that have moved since
    by_block: Tensor


class Recorder:
    """Keeps what a page shows of the attention of some `rows` tokens, step by step.

    Lists come in this order: for each layer the heads' average, then each head's; last, the average of all. Where that
    would be too many for a page, the heads' are left out, and then the layers'.
    """

    def __init__(self, config: Config, rows: int):
        L, H = config.num_hidden_layers, config.num_attention_heads
        self.config = config
        self.layers = L if rows * L <= LISTS else 0  # that have lists of their own
        self.heads = H if rows * L * H <= LISTS else 0
        self.steps: list[KeptStep] = []
        # Of the step that goes on:
        self.lists: list[Strongest] = []  # of the layers so far
        self.average: Tensor | None = None  # over these layers and all heads, [T, 1, slots]

    def keep_layer(self, weights: Tensor) -> None:
        """The weights of a step's next layer: [T, H, slots]."""
        average_of_heads = weights.mean(1, keepdim=True)
        part = average_of_heads / self.config.num_hidden_layers
        self.average = part if self.average is None else self.average + part
        if self.heads:
            self.lists.append(strongest_of(torch.cat([average_of_heads, weights], 1)))
        elif self.layers:
            self.lists.append(strongest_of(average_of_heads))

    def end_step(self, token_in_slot: Tensor, tokens: Tokens) -> None:
        """All layers have been told of. `token_in_slot` is [slots]."""
        self.lists.append(strongest_of(self.average))
        slots = torch.cat([found.slots for found in self.lists], 1)
        weights = torch.cat([found.weights for found in self.lists], 1)
        given = self.given_to_blocks(token_in_slot, tokens)
        self.steps.append(KeptStep(token_in_slot[slots].int(), weights, in_8_bits(given)))
        self.lists = []
        self.average = None

    def given_to_blocks(self, token_in_slot: Tensor, tokens: Tokens) -> Tensor:
        """[T, 2 B]: see `KeptStep.by_block`."""
        column_of_token = 2 * torch.tensor(tokens.written_to) + torch.tensor(tokens.has_moved)
        column_of_slot = column_of_token[token_in_slot].to(self.average.device)
        T = len(self.average)
        given = self.average.new_zeros(T, 2 * len(tokens.blocks))
        return given.index_add_(1, column_of_slot, self.average[:, 0])

    def as_bytes(self) -> bytes:
        """All that is kept, as the page reads it: tokens of all steps, then weights, then what blocks got."""
        if not self.steps:
            return b""
        tokens = torch.cat([step.tokens for step in self.steps])
        weights = torch.cat([step.weights for step in self.steps])
        by_block = torch.cat([step.by_block for step in self.steps])
        # Three of its four bytes are enough for a number. First those that count least, of all numbers, and so on: so
        # they are packed well.
        bytes_of_tokens = tokens.view(torch.uint8).view(-1, 4)[:, :3].T
        return b"".join(array.numpy().tobytes() for array in (bytes_of_tokens, weights, by_block))


def strongest_of(weights: Tensor) -> Strongest:
    """Of lists [T, lists, slots]; the result is on the host."""
    top, slots = weights.topk(TOP)
    others = 1 - top.sum(-1, keepdim=True)
    return Strongest(slots.cpu(), in_8_bits(torch.cat([top, others], -1)))


def in_8_bits(weights: Tensor) -> Tensor:
    """Weights in 8 bits, on the host: their square roots, so that small ones are not lost."""
    return (weights.clamp(0, 1).sqrt() * 255).round().to("cpu", torch.uint8)


# ---- the page


def page(
    blocks: list[str],
    events: list[dict],
    model: Model,
    about: dict,
    names: dict[str, str],
    backend: PyTorchBackend | None = None,
) -> bytes:
    """The page of a run, from its events and its summary, `about`.

    `names`, by block: how readers know the worker or finisher that writes there. `backend` is the run's own (None: the
    fastest that there is). Attention is recorded from the first event on that lets a worker begin.

    The page holds what it shows and no more: of a model's folder not whose it is, of a step how many tokens it fed.
    """
    begun = index_of_beginning(events)
    if backend is None:
        backend = model.backend
    recorder = Recorder(model.config, rows=count_fed(events[begun:]))
    record(recorder, blocks, events, model, Onlooker(backend, count_fed(events[:begun]), recorder.keep_layer))
    shown = {key: about[key] for key in ("layout", "tokens", "seed", "stopped_by", "answer")}
    shown["model"] = name_to_show(model)
    head = {
        "about": shown,
        "blocks": blocks,
        "names": names,
        "events": [event_to_show(event) for event in events],
        "begun": begun,
        "texts": texts_of(blocks, events, model.tokenizer),
        "layers": recorder.layers,
        "heads": recorder.heads,
        "top": TOP,
    }
    return fill_template(head, recorder.as_bytes())


def index_of_beginning(events: list[dict]) -> int:
    """Of the first event that lets a worker begin; where there is none, of the end."""
    for index, event in enumerate(events):
        if event["do"] == "begin":
            return index
    return len(events)


def record(recorder: Recorder, blocks: list[str], events: list[dict], model: Model, onlooker: Onlooker) -> None:
    """Replay a run with an onlooker that shows the recorder each layer."""
    schedule = {"blocks": blocks, "events": [event for event in events if event["do"] in ("step", "move", "drop")]}
    tokens = Tokens(blocks)
    computed = replay_watched(schedule, model, onlooker, tokens)
    step_count = sum(event["do"] == "step" for event in events)
    for event in Bar(computed, desc="tracing", total=step_count):
        if onlooker.is_watching:
            token_in_slot = tokens.in_slots(onlooker.plan, event["views"])
            recorder.end_step(token_in_slot, tokens)


def name_to_show(model: Model) -> str:
    """A hub repository's name; a folder's own alone, since those above it may say whose it is."""
    given = os.path.abspath(Path(model.name).expanduser())
    folder = os.path.abspath(model.folder)
    return os.path.basename(folder) if given == folder else model.name


def event_to_show(event: dict) -> dict:
    """What the page needs of an event: it knows workers by their blocks."""
    if event["do"] == "step":
        counts = [len(ids) for ids in event["tokens"]]
        return {"do": "step", "views": event["views"], "fed": counts}
    if event["do"] == "move":
        return {"do": "move", "from": event["from"], "to": event["to"]}
    if event["do"] == "drop":
        return {"do": "drop", "block": event["block"]}
    return {"do": event["do"], "by": block_of(event["worker"])}  # begin or retire


def texts_of(blocks: list[str], events: list[dict], tokenizer: Tokenizer) -> list[str]:
    """The text of each token, in the order in which they are numbered."""
    streams = {block: TextStream(tokenizer, []) for block in blocks}
    texts = []
    for block, ids in fed(events):
        for token_id in ids:
            texts.append(read_token(streams[block], token_id))
    return texts


def read_token(stream: TextStream, token_id: int) -> str:
    """A token's text; a special token's name; a sign for a part of a character, whose text its last part brings."""
    text = stream.next(token_id)
    if text:
        return text
    if token_id in stream.tokenizer.hidden:
        return stream.tokenizer.name_of(token_id)
    return PART_OF_A_CHARACTER


def fill_template(head: dict, arrays: bytes) -> bytes:
    """The page around what comes from the run: JSON and arrays, which stand there as base64 of gzip."""
    text = json.dumps(head).encode()
    data = len(text).to_bytes(4, "little") + text + arrays
    packed = base64.b64encode(gzip.compress(data, mtime=0))
    return TEMPLATE.read_bytes().replace(b"%DATA%", packed)
