"""One model on several GPUs: `torchrun --nproc-per-node N -m minihogwild.generate ...` starts N processes, the *ranks*.

Each rank has some of the heads, and of the inner size F of each MLP and of each expert, and of the vocabulary's rows of
the head; so it reads a share of the weights, and has keys and values of its own heads alone. In each layer every rank
comes to a part of two sums, which are then added up over all ranks (`reduce`). Everything else, such as norms, the
router, and the embedding, each rank has and does for itself.

Rank 0 leads: it alone has the run, draws the token ids, answers signals, and writes. What it does to its cache it tells
the others, in the words of a schedule (replay.py), and they do the same:

    {"do": "load", ...}  {"do": "cache", "blocks": [...], ...}  {"do": "step", "views": [...], "counts": [...]}
    {"do": "move", ...}  {"do": "drop", ...}  {"do": "begin anew", "blocks": [...]}  {"do": "end"}

Token ids are not among these words: rank 0's GPU sends them to the others', and no host waits for that.

From top to bottom: which part each rank has; how it is read; how it is computed with; who follows whom.
"""

import hashlib
import json
import logging
import math
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..attention import Plan
from ..backend import PyTorchBackend, choose_backend
from ..cache import Cache
from ..config import Config
from ..errors import InputError, is_out_of_memory, one_line, refusing, require
from ..files import unfinished
from ..hub import load
from ..hub.checkpoint import HEAD, Extras, Stored, empty_weights, safetensors_files
from ..hub.quantized import CODES_IN_A_WORD, Format, Place, Rounded, Storage, Turned, largest_group, require_finite
from ..interrupts import SIGNALS
from ..model import step_on_device
from ..packed import EightBit, FourBit, Stacked, in_few_rows
from ..weights import Dense, Matrix, Weights

if TYPE_CHECKING:
    from .one_shot import OneShot

SECONDS = 120  # that a rank waits for another one, in a sum or when they meet
SECONDS_OF_SILENCE = 60  # until a rank that says nothing at all counts as lost
SECONDS_TO_NOTICE = 5  # that rank 0 has to end in good order, where another one has failed
PLACES = 64  # in a file, that are looked at
ADDRESS = "minihogwild"  # under which rank 0 says where it hears the others
CANNOT_BE_DONE = 2  # an exit code, as in commands.py
OUTPUTS, INPUTS = 0, 1  # of a matrix: its rows, and its columns


# ---- which part each rank has


@dataclass(frozen=True)
class Span:
    """Some of the numbers from 0 to `total`: one rank's."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    def times(self, width: int) -> "Span":
        """The same, where each has become so many."""
        return Span(self.start * width, self.stop * width, self.total * width)


def span_of(rank: int, count: int, total: int, unit: int, what: str) -> Span:
    """A rank's part, as even as whole units allow. Raises InputError where there are fewer units than ranks."""
    units = -(-total // unit)
    in_units = f", in wholes of {unit}" if unit > 1 else ""
    require(units >= count, f"{what} {total}{in_units} cannot be shared by {count} ranks: start at most {units}")
    start = rank * units // count * unit
    stop = (rank + 1) * units // count * unit
    return Span(start, min(stop, total), total)


def heads_of(rank: int, count: int, config: Config, unit: int) -> tuple[Span, Span]:
    """(query heads, key/value heads) of a rank; of the first, it has whole `unit`s.

    Query heads stay with the key/value head that they share. Where there are fewer of these than ranks, some ranks
    have the same one, and each of them a part of its query heads.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    G = H // K
    at_once = math.lcm(G, unit) // G  # key/value heads that have whole units of query heads
    if -(-K // at_once) >= count:
        kv = span_of(rank, count, K, at_once, "num_key_value_heads")
        return kv.times(G), kv
    most_sharing = -(-count // K)  # ranks that have the same head
    has_enough = count > K and most_sharing * unit <= G and G % unit == 0
    shape = f"{H} heads, and {K} for keys and values"
    in_units = f", with 4-bit groups of {unit} heads" if unit > 1 else ""
    require(has_enough, f"a model of {shape}{in_units} cannot be shared by {count} ranks: start fewer")
    head = rank * K // count
    sharing = [other for other in range(count) if other * K // count == head]
    part = span_of(sharing.index(rank), len(sharing), G, unit, "num_attention_heads")
    return Span(head * G + part.start, head * G + part.stop, H), Span(head, head + 1, K)


@dataclass(frozen=True)
class Share:
    """What one rank has of a model."""

    ranks: "Ranks"
    whole: Config
    heads: Span
    kv_heads: Span
    inner: Span  # of F
    inner_of_expert: Span  # of an expert's F
    rows_of_head: list[Span]  # of all ranks: rows of the head, which are tokens of the vocabulary

    @property
    def config(self) -> Config:
        """That of a smaller model: what this rank computes with. (Its vocabulary is whole: only the head is shared.)"""
        return replace(
            self.whole,
            num_attention_heads=len(self.heads),
            num_key_value_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
            moe_intermediate_size=len(self.inner_of_expert),
        )

    def parts(self, name: str) -> tuple[int, list[Span]]:
        """Of the matrix that this tensor of the checkpoint belongs to, what this rank has.

        First whether its outputs are shared (0), or its inputs (1); then which of them are this rank's, in one piece or
        several. No piece: nothing is shared, and each rank has it all.
        """
        D = self.whole.head_dim
        q, k = self.heads.times(D), self.kv_heads.times(D)
        inner = self.inner_of_expert if ".experts." in name else self.inner
        parts_of_module = {
            "q_proj": (OUTPUTS, [q]),
            "k_proj": (OUTPUTS, [k]),
            "v_proj": (OUTPUTS, [k]),
            "qkv_proj": (OUTPUTS, one_below_the_other([q, k, k])),
            "o_proj": (INPUTS, [q]),
            "gate_proj": (OUTPUTS, [inner]),
            "up_proj": (OUTPUTS, [inner]),
            "gate_up_proj": (OUTPUTS, one_below_the_other([inner, inner])),
            "down_proj": (INPUTS, [inner]),
            "lm_head": (OUTPUTS, [self.own_rows_of_head]),
        }
        module = name.split(".")[-2]
        return parts_of_module.get(module, (OUTPUTS, []))

    @property
    def own_rows_of_head(self) -> Span:
        return self.rows_of_head[self.ranks.rank]

    def inputs(self, name: str) -> Span | None:
        """Which of the inputs of this tensor's matrix are this rank's; None where it has all of them."""
        shared, spans = self.parts(name)
        if shared == OUTPUTS or len(spans[0]) == spans[0].total:
            return None
        return spans[0]

    def empty_weights(
        self, dtype: torch.dtype, device: torch.device | str, extras: Extras, storage: Storage
    ) -> tuple[Weights, dict[str, Place]]:
        """As `checkpoint.empty_weights`, for this rank alone."""
        if self.ranks.rank > 0:
            extras = replace(extras, out_bias=False)  # or the sum over all ranks would have it once for each
        if isinstance(storage, Rounded):
            storage = RoundedShare(storage.bits, self)
        weights, places = empty_weights(self.config, dtype, device, extras, StorageOfShare(storage, self))
        if isinstance(weights.head, Dense):  # the embedding, whole
            rows = self.own_rows_of_head
            weights.head = self.part_of_head(Dense(weights.head.tensor[rows.start : rows.stop]))
        return weights, places

    def part_of_head(self, rows: Matrix) -> "PartOfHead":
        return PartOfHead([rows], self.ranks, [len(span) for span in self.rows_of_head])

    def cut(self, stored: dict[str, Stored], places: dict[str, Place]) -> "dict[str, Stored | Cut]":
        """Of the checkpoint's tensors, what goes to these places: nothing else will be read."""
        return {name: self.cut_one(name, tensor, places[name]) for name, tensor in stored.items() if name in places}

    def cut_one(self, name: str, tensor: Stored, place: Place) -> "Stored | Cut":
        """The axis that is shared is the one that is shorter in its place than in the checkpoint.

        For a packed matrix has its axes in another order, and counts by eights or by groups.
        """
        shared_axes = [axis for axis, size in enumerate(place.shape) if size != tensor.shape[axis]]
        if not shared_axes:
            return tensor
        [axis] = shared_axes
        _, spans = self.parts(name)
        pieces = [piece_of(tensor, axis, in_proportion(span, tensor.shape[axis])) for span in spans]
        return Cut(name, tensor.path, pieces, axis)


def share_of(ranks: "Ranks", config: Config, format: Format | None, quantize: int | None) -> Share:
    """This rank's. Raises InputError, with the numbers, where a model cannot be shared by so many.

    `format` is that of a packed checkpoint. A plain one may be rounded to `quantize` bits, 8 or 4.
    """
    rank, count = ranks.rank, ranks.count

    def unit_of(inputs: int) -> int:
        """How many inputs stay together: groups that share a scale, and words of a packed checkpoint."""
        if format is not None:
            return math.lcm(format.group or 1, CODES_IN_A_WORD)
        if quantize == 4:
            return largest_group(inputs) or 1
        return 1

    H, D, V = config.num_attention_heads, config.head_dim, config.vocab_size
    heads, kv_heads = heads_of(rank, count, config, unit=math.lcm(D, unit_of(H * D)) // D)
    inner, inner_of_expert = Span(0, 0, 0), Span(0, 0, 0)
    if not all(kind.experts for kind in config.layer_kinds):
        size = config.intermediate_size
        inner = span_of(rank, count, size, unit_of(size), "intermediate_size")
    if any(kind.experts for kind in config.layer_kinds):
        size = config.moe_intermediate_size
        inner_of_expert = span_of(rank, count, size, unit_of(size), "moe_intermediate_size")
    unit_of_head = 1 if format is None else CODES_IN_A_WORD
    rows_of_head = [span_of(other, count, V, unit_of_head, "vocab_size") for other in range(count)]
    return Share(ranks, config, heads, kv_heads, inner, inner_of_expert, rows_of_head)


def one_below_the_other(spans: list[Span]) -> list[Span]:
    """Of each of several matrices, in one that holds them all."""
    total = sum(span.total for span in spans)
    moved = []
    first = 0
    for span in spans:
        moved.append(Span(first + span.start, first + span.stop, total))
        first += span.total
    return moved


# ---- how it is read


@dataclass
class Cut:
    """A part of a tensor of the checkpoint, that has not been read yet; for the loader, a `Stored` like another."""

    name: str
    path: Path
    pieces: list[Stored]
    axis: int  # along which they lie behind each other

    def read(self) -> Tensor:
        pieces = [piece.read() for piece in self.pieces]
        return torch.cat(pieces, self.axis) if len(pieces) > 1 else pieces[0]


def in_proportion(span: Span, size: int) -> slice:
    """The same part of an axis of this size."""
    start, stop = span.start * size, span.stop * size
    require(start % span.total == stop % span.total == 0, f"{size} cannot be cut at {span.start} of {span.total}")
    return slice(start // span.total, stop // span.total)


def piece_of(tensor: Stored, axis: int, span: slice) -> Stored:
    """Some of the tensor's numbers along one axis. It may itself be a part of a larger one: an expert's."""
    indices = [] if tensor.part is None else list(tensor.part)
    before = 0 if tensor.part is None else 1  # the expert's number stands before the tensor's own axes
    for size in tensor.shape[len(indices) - before :]:
        indices.append(slice(0, size))
    whole = indices[before + axis]
    indices[before + axis] = slice(whole.start + span.start, whole.start + span.stop)
    shape = list(tensor.shape)
    shape[axis] = span.stop - span.start
    return replace(tensor, shape=shape, part=tuple(indices))


@dataclass
class StorageOfShare:
    """As another storage, but of the head there are some rows alone."""

    storage: Storage
    share: Share

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def rounds(self) -> bool:
        return self.storage.rounds

    def allocate(self, shapes, stack, dtype, device):
        if HEAD not in shapes:
            return self.storage.allocate(shapes, stack, dtype, device)
        V, E = shapes[HEAD]
        rows = self.share.own_rows_of_head
        matrix, places = self.storage.allocate({HEAD: [len(rows), E]}, stack, dtype, device)
        if self.share.whole.tie_word_embeddings:  # then it is filled with the embedding, which is read as a whole
            of_rows = places[HEAD]
            places[HEAD] = Turned([V, E], lambda embedding: of_rows.copy_(embedding[rows.start : rows.stop]))
        return self.share.part_of_head(matrix), places


@dataclass
class RoundedShare(Rounded):
    """Rounds to the very numbers that the whole matrix would be rounded to."""

    share: Share

    def group_of(self, name: str, E: int) -> int | None:
        inputs = self.share.inputs(name)
        return super().group_of(name, E if inputs is None else inputs.total)

    def fill(self, part: EightBit | FourBit, start: int, name: str, weight: Tensor) -> None:
        if isinstance(part, FourBit) or self.share.inputs(name) is None:
            super().fill(part, start, name, weight)
            return
        require_finite(weight)
        # In 8 bits a row has one scale, by its largest number: here, the largest of what all ranks have of the row
        largest_here = [some.float().abs().amax(1) for _, some in in_few_rows(0, weight)]
        part.fill(start, weight, self.share.ranks.largest(torch.cat(largest_here)))


# ---- how it is computed with


class PartOfHead(Stacked):
    """Of the head, [V, E], the rows of one rank. A product with it gathers those of all ranks: [T, V]."""

    def __init__(self, parts: list[Matrix], ranks: "Ranks", rows: list[int]):
        super().__init__(parts)
        self.ranks = ranks
        self.rows = rows  # how many each rank has

    def join(self, products: list[Tensor], bias: Tensor | None) -> Tensor:
        return self.ranks.gather(super().join(products, bias), self.rows)


class SharedBackend:
    """As another backend; but what each rank has computed a part of is added up."""

    def __init__(self, backend: PyTorchBackend, ranks: "Ranks"):
        self.backend = backend
        self.ranks = ranks

    def __getattr__(self, name: str):
        return getattr(self.backend, name)  # all that is not below

    def reduce(self, x: Tensor) -> Tensor:
        return self.ranks.sum(x)

    def run(self, forward: Callable[..., Tensor], tokens: Tensor, weights, config, cache, plan: Plan) -> Tensor:
        tokens = self.ranks.of_first(tokens)
        return self.backend.run(forward, tokens, weights, config, cache, plan)

    def tell(self, event: dict) -> None:
        if event["do"] == "cache":
            event = event | {"kernels": type(self.backend) is not PyTorchBackend}
        self.ranks.tell(event)


class Ranks:
    """One rank, as it meets the others: in sums, and in words. Those of rank 0 are a `Leader`, else a `Follower`."""

    def __init__(self, program: str):
        self.program = program  # as its messages begin
        self.rank = int(os.environ["RANK"])
        self.count = int(os.environ["WORLD_SIZE"])
        self.one_host = int(os.environ["LOCAL_WORLD_SIZE"]) == self.count
        self.has_tried_one_shot = False
        self.one_shot: OneShot | None = None

    # ---- sums, and what is like them: all ranks call these at the same time

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x. (x itself may be overwritten.)"""
        x = x.contiguous()
        with self.together():
            one_shot = self.one_shot_for(x)
            if one_shot is not None:
                return one_shot.sum(x)
            dist.all_reduce(x)
            return x

    def one_shot_for(self, x: Tensor) -> "OneShot | None":
        """What adds up few rows in one kernel; None where NCCL, or gloo, is to do it."""
        suits = x.is_cuda and x.dtype != torch.float64  # which that kernel would add up in float32
        if not suits or not self.one_host:
            return None
        if not self.has_tried_one_shot:
            self.has_tried_one_shot = True
            self.one_shot = self.make_one_shot(x.device)
        is_small = self.one_shot is not None and x.nbytes <= self.one_shot.largest
        return self.one_shot if is_small else None

    def make_one_shot(self, device: torch.device) -> "OneShot | None":
        """None where any of the ranks cannot: its GPUs cannot read each other's memory, or PyTorch is older."""
        one_shot = None
        with suppress(ImportError, AttributeError, RuntimeError):
            from .one_shot import OneShot  # not above: it needs Triton

            one_shot = OneShot(self.rank, device)
        works = torch.tensor(one_shot is not None, dtype=torch.int32, device=device)
        dist.all_reduce(works, dist.ReduceOp.MIN)
        return one_shot if works.item() == 1 else None

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of all ranks', at each place."""
        with self.together():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers

    def of_first(self, token_ids: Tensor) -> Tensor:
        """Rank 0's, on all ranks. The others need only give a tensor of this shape."""
        with self.together():
            dist.broadcast(token_ids, src=0)
        return token_ids

    def gather(self, product: Tensor, columns: list[int]) -> Tensor:
        """The products of all ranks, side by side: [T, columns of this rank] to [T, all columns]."""
        widest = max(columns)
        padded = F.pad(product, (0, widest - columns[self.rank])).contiguous()
        of_ranks = padded.new_empty(len(columns), *padded.shape)
        with self.together():
            dist.all_gather(list(of_ranks), padded)
        return torch.cat([part[:, :width] for part, width in zip(of_ranks, columns)], -1)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what fails where another rank has gone, or does not answer."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                self.has_failed(error)
            raise

    # ---- words

    def tell(self, order: dict) -> None:
        """Have the others do this as well. (Said on one of these, it is for nobody.)"""

    def share_of(self, config: Config, format: Format | None, quantize: int | None, device: torch.device) -> Share:
        """This rank's part of a model. Raises InputError where it cannot be shared by so many."""
        if device.type == "cuda":
            here, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            require(local < here, f"rank {self.rank} has no GPU: this host has {here}, start no more ranks on it")
        return share_of(self, config, format, quantize)

    def agree_on_files(self, folder: Path) -> None:
        """Raise InputError, on rank 0, where another rank would load other files from what should be the same folder.

        Asked before they are loaded, since ranks then read, and round, in step.
        """
        mine = fingerprints(folder)
        for rank, theirs in self.exchange(mine).items():
            differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            require(not differing, f"rank {rank} sees another {', '.join(differing[:3])} in {folder} than rank 0")

    def wait_for_all(self) -> None:
        """On rank 0: until all others have come here too."""
        self.exchange({})


class Leader(Ranks):
    """Rank 0: it tells the others what to do, and ends with one line where one of them fails."""

    def __init__(self, program: str):
        super().__init__(program)
        self.failure: str | None = None  # of another rank: what is to be told,
        self.has_noticed = False  # and the main thread is about to tell it
        self.has_ended = False
        self.lines = self.meet_followers(meet())
        self.words = {rank: queue.SimpleQueue() for rank in self.lines}  # what each has said
        for rank in self.lines:
            threading.Thread(target=self.listen, args=(rank,), daemon=True).start()

    def meet_followers(self, store: dist.Store) -> dict[int, "Line"]:
        secret = secrets.token_hex()  # who does not know it is none of us
        host = "127.0.0.1" if self.one_host else os.environ["MASTER_ADDR"]  # where the others find this one,
        heard_on = host if self.one_host else ""  # and on which networks it hears them: all
        lines = {}
        with refusing("the ranks do not meet"), socket.create_server((heard_on, 0)) as server:
            server.settimeout(SECONDS)
            port = server.getsockname()[1]
            store.set(ADDRESS, json.dumps([host, port, secret]))
            while len(lines) < self.count - 1:
                line = Line(server.accept()[0], SECONDS_OF_SILENCE / 2)
                with suppress(OSError, ValueError, AttributeError):  # a stranger's words, or none
                    hello = line.hear()
                    if hello.get("secret") == secret:
                        lines[hello["rank"]] = line
        return lines

    def tell(self, order: dict) -> None:
        self.raise_failure()
        for line in self.lines.values():
            line.say(order)

    def exchange(self, word: dict) -> dict[int, dict]:
        """What each of the others says next, by rank."""
        said = {}
        for rank, words in self.words.items():
            said[rank] = words.get()
            self.raise_failure()
        return said

    def raise_failure(self) -> None:
        if self.failure is not None:
            self.has_noticed = True
            raise InputError(self.failure)

    def has_failed(self, error: RuntimeError) -> None:
        """Say why a sum has failed: what the other rank has said, or that it is gone, may come a moment later."""
        for _ in range(SECONDS_TO_NOTICE * 10 // 2):
            self.raise_failure()
            time.sleep(0.1)
        raise InputError(f"a sum over all ranks has failed: {one_line(str(error))}")

    def listen(self, rank: int) -> None:
        """A thread for each of the others."""
        silent = 0
        while silent < 2:  # not once: whoever stops all of them, and goes on (Ctrl-Z, fg), finds a silence too
            try:
                word = self.lines[rank].hear()
            except TimeoutError:
                silent += 1
                continue
            silent = 0
            if word is None:
                return self.note(f"rank {rank} has ended without a word: was it killed?")
            if "failed" in word:
                return self.note(f"rank {rank}: {word['failed']}")
            if "alive" not in word:
                self.words[rank].put(word)
        return self.note(f"rank {rank} has not answered for {SECONDS_OF_SILENCE} seconds")

    def note(self, failure: str) -> None:
        """End with this line: in good order, as a rule, where the main thread next meets the others.

        But it may be waiting for its GPU, which waits for that of the other rank, and nothing can wake it.
        """
        if self.failure is not None or self.has_ended:
            return
        self.failure = failure
        for words in self.words.values():
            words.put({})  # whoever waits for words is to look
        time.sleep(SECONDS_TO_NOTICE)
        if not self.has_noticed and not self.has_ended:
            print(f"{self.program}: {failure}", file=sys.stderr, flush=True)
            for path in list(unfinished):
                path.unlink(missing_ok=True)
            self.end(CANNOT_BE_DONE)

    def end(self, code: int) -> None:
        """End all ranks, this one with an exit code. Nobody waits for a GPU that may wait for another."""
        self.has_ended = True
        for line in self.lines.values():
            line.say({"do": "end"})
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed
                stream.flush()
        os._exit(code)


class Follower(Ranks):
    """All other ranks: they do what rank 0 does. Their exit code is 0, since rank 0's is that of all."""

    def __init__(self, program: str):
        super().__init__(program)
        store = meet()
        host, port, secret = json.loads(store.get(ADDRESS))
        self.line = Line(socket.create_connection((host, port), SECONDS))
        self.line.say({"rank": self.rank, "secret": secret})
        self.orders: queue.SimpleQueue[dict] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()
        threading.Thread(target=self.say_alive, daemon=True).start()

    def listen(self) -> None:
        """A thread: the main one may be waiting for a sum that will never be."""
        while (order := self.line.hear()) is not None:
            if order["do"] == "end":
                os._exit(0)
            self.orders.put(order)
        if self.rank == 1:  # one of those that are left speaks for all
            message = "rank 0 has ended without a word: was it killed?"
            print(f"{self.program}: {message}", file=sys.__stderr__, flush=True)
        os._exit(CANNOT_BE_DONE)

    def say_alive(self) -> None:
        while True:
            time.sleep(SECONDS_OF_SILENCE / 6)
            self.line.say({"alive": True})

    def exchange(self, word: dict) -> dict[int, dict]:
        self.line.say(word)
        return {}

    def end(self, code: int) -> None:
        """Where all run the same program: wait to be ended by rank 0, which may still have to hear the others."""
        threading.Event().wait(SECONDS)
        os._exit(code)

    def has_failed(self, error: RuntimeError) -> None:
        """Another one has failed, as a rule, and rank 0 is about to end all."""
        time.sleep(SECONDS_TO_NOTICE)

    def follow(self) -> None:
        """Do as rank 0 does, until it ends this process."""
        try:
            model = None
            cache = None
            while True:
                order = self.orders.get()
                what = order.pop("do")
                if what == "load":
                    model = load(**order, with_tokenizer=False, ranks=self)
                elif what == "cache":
                    backend = choose_backend(model.device, model.dtype, order["kernels"], self)
                    page_size = order["page_size"]
                    cache = Cache(model.config, order["blocks"], model.dtype, model.device, backend, page_size)
                elif what == "begin anew":
                    cache.begin_anew(order["blocks"])
                elif what == "step":
                    count = sum(order["counts"])
                    tokens = torch.zeros(count, dtype=torch.int64, device=model.device)  # rank 0's take their place
                    step_on_device(order["views"], order["counts"], tokens, model.weights, model.config, cache)
                elif what == "move":
                    cache.move(order["from"], order["to"])
                elif what == "drop":
                    cache.drop(order["block"])
                elif what == "grown":
                    same = cache.pool_version == order["pool_version"]
                    require(same, "its cache has another size than rank 0's: memory is short on one of them")
        except Exception as error:
            reason = str(error) if isinstance(error, (InputError, OSError)) else f"{type(error).__name__}: {error}"
            self.line.say({"failed": one_line(reason)})
            os._exit(0)


class Line:
    """A connection on which each line is a word: a JSON object."""

    def __init__(self, connection: socket.socket, seconds: float | None = None):
        connection.settimeout(seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.received = b""
        self.lock = threading.Lock()  # for whoever speaks

    def say(self, word: dict) -> None:
        """Where nobody hears it any more, that is for those who listen to find out."""
        with self.lock:
            try:
                self.connection.sendall(json.dumps(word).encode() + b"\n")
            except OSError:  # perhaps in the midst of it: nothing that follows could be understood
                self.connection.close()

    def hear(self) -> dict | None:
        """The next word; None where the other end is closed. Raises TimeoutError where nothing comes in time."""
        while b"\n" not in self.received:
            try:
                some = self.connection.recv(2**16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if some == b"":
                return None
            self.received += some
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)


def meet() -> dist.Store:
    """Wait for all ranks. Raises InputError where they do not come."""
    # NVLink multicast is of no use for a few rows; where it does not work, whoever only asks for it fails.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local = int(os.environ["LOCAL_RANK"])
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
    with refusing("the ranks do not meet"):
        limit = timedelta(seconds=SECONDS)
        store, rank, count = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    return store


def join(program: str) -> Ranks:
    """Meet the others. (For rank 0; and for a program that all ranks run alike, as a benchmark or a test is.)

    `program` stands before the messages.
    """
    return Leader(program) if os.environ["RANK"] == "0" else Follower(program)


def follow(program: str) -> NoReturn:
    """Of all other ranks, from the beginning to the end of their process. Nothing that they say is to be seen."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  to the end
    logging.disable()
    follower = Follower(program)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # rank 0 answers them, for all
    follower.follow()


def fingerprints(folder: Path) -> dict[str, str]:
    """By name, a hash of each file that a model is loaded from: of its size, its beginning, and some places in it.

    To read all of it would take as long as to load it; and another model has other numbers nearly everywhere.
    """
    found = {}
    settings = [folder / name for name in ("config.json", "quantize_config.json", "quant_config.json")]
    for path in [path for path in settings if path.exists()] + safetensors_files(folder):
        size = path.stat().st_size
        hashed = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for place in range(PLACES):
                file.seek(size * place // PLACES)
                hashed.update(file.read(2**12))
        found[path.name] = hashed.hexdigest()
    return found
