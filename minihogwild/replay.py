"""A schedule in, logits out: `python -m minihogwild.replay`, for whoever checks another implementation.

A schedule is a run without its words: what was done to the cache's blocks, in order. As JSON:

    {"version": 1, "blocks": [name, ...], "events": [event, ...]}

    {"do": "step", "views": [[block, ...], ...], "tokens": [[id, ...], ...]}    and perhaps "sampled", "digest"
    {"do": "move", "from": block, "to": block}
    {"do": "drop", "block": block}

In a step each worker feeds its tokens to the last block of its view. A move appends the whole of a block to another
and empties it; a drop empties it. A schedule may also name the ids that its workers were not allowed to sample,
"banned", and those where a paragraph began, "banned_first"; the logits are those without that.

The logits go to a safetensors file: for each step event a tensor `step_0000`, numbered by the event's index, float32,
[workers in the step, V], after each worker's last token.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .backend import choose_backend
from .cache import Cache, check_known, check_move, check_step
from .commands import Parser, add_model_options, run_command, spare_threads
from .config import Config
from .errors import allocating, refusing, require
from .files import read_json, require_writable, write_whole
from .hub import Model, fetch, files_of, load
from .model import step
from .oracle import Oracle
from .weights import name_of_dtype

# What a schedule says of each kind of event
KEYS = {
    "step": ("do", "views", "tokens", "sampled", "digest"),
    "move": ("do", "from", "to"),
    "drop": ("do", "block"),
}


# ---- schedules


def schedule_json(blocks: list[str], events: list[dict], bans: dict[str, list[int]] | None = None) -> bytes:
    """A schedule as a file holds it, with a line for each event.

    `events` may be those of a Run: what a schedule does not say (who began, who moved, ...) is left out.
    """
    lines = []
    for event in events:
        keys = KEYS.get(event["do"])
        if keys is not None:
            kept = {key: event[key] for key in keys if key in event}
            lines.append(json.dumps(kept, ensure_ascii=False))
    names = json.dumps(blocks, ensure_ascii=False)
    bans_spelled = "".join(f'"{name}": {ids}, ' for name, ids in (bans or {}).items() if ids)
    all_lines = ",\n".join(lines)
    return f'{{"version": 1, "blocks": {names}, {bans_spelled}"events": [\n{all_lines}\n]}}\n'.encode()


def read_schedule(path: Path, vocab_size: int) -> dict:
    """The blocks and events of a schedule, from its file.

    Raises InputError where it contradicts itself, with the event's index. So whatever is returned can be replayed.
    """
    schedule = read_json(path)
    version = schedule.get("version", 1)
    blocks = schedule.get("blocks")
    events = schedule.get("events")
    with refusing(path):
        require(version == 1, f"version {version!r} is not known, only 1")
        names_differ = is_list_of(str, blocks) and len(set(blocks)) == len(blocks)
        require(names_differ, "blocks must be a list of names that differ")
        require(isinstance(events, list), "events must be a list")
        for name in ("banned", "banned_first"):
            require(is_list_of(int, schedule.get(name, [])), f"{name} must be a list of int")
        known_blocks = set(blocks)
        for index, event in enumerate(events):
            with refusing(f"event {index}"):
                check_event(event, known_blocks, vocab_size)
    return {"blocks": blocks, "events": events}


def check_event(event: object, blocks: Collection[str], vocab_size: int) -> None:
    """Raise InputError for what is no event, or contradicts itself."""
    is_event = isinstance(event, dict) and event.get("do") in list(KEYS)
    require(is_event, "'do' must be step, move or drop")
    if event["do"] == "step":
        check_step_event(event, blocks, vocab_size)
    elif event["do"] == "move":
        source, target = event.get("from"), event.get("to")
        are_names = isinstance(source, str) and isinstance(target, str)
        require(are_names, "'from' and 'to' must be names of blocks")
        check_move(source, target, blocks)
    else:
        block = event.get("block")
        require(isinstance(block, str), "'block' must be the name of a block")
        check_known([block], blocks)


def check_step_event(event: dict, blocks: Collection[str], vocab_size: int) -> None:
    views, tokens = event.get("views"), event.get("tokens")
    require(is_list_of_lists_of(str, views), "views must be a list of lists of str")
    require(is_list_of_lists_of(int, tokens), "tokens must be a list of lists of int")
    counts = [len(ids) for ids in tokens]
    check_step(views, counts, blocks)
    for ids in tokens:
        for token in ids:
            is_in_vocabulary = 0 <= token < vocab_size
            require(is_in_vocabulary, f"token [{token}] is outside the vocabulary of {vocab_size}")


def is_list_of(kind: type, values: object) -> bool:
    """Is it a list, with values of this very type in it? (For `isinstance`, true would be an integer.)"""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def is_list_of_lists_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(is_list_of(kind, row) for row in values)


def advance_lengths(lengths: dict[str, int], event: dict) -> None:
    """Turn the numbers of tokens that blocks hold before an event into those after it."""
    if event["do"] == "step":
        for view, ids in zip(event["views"], event["tokens"]):
            lengths[view[-1]] += len(ids)
    elif event["do"] == "move":
        lengths[event["to"]] += lengths[event["from"]]
        lengths[event["from"]] = 0
    else:
        lengths[event["block"]] = 0


# ---- running them


def replay(
    schedule: dict, model: Model, oracle: bool = False, cache: Cache | None = None
) -> Iterator[tuple[int, Tensor]]:
    """For each step, as it is made: (index of the event, logits [W, V]).

    Made by the engine, in the model's dtype, or by the oracle, in float64. `cache` is the engine's: an empty one with
    the schedule's blocks, for whoever wants to look into it meanwhile, or to choose its backend (None: a new one).
    Raises InputError where memory is out.
    """
    config, blocks = model.config, schedule["blocks"]
    if oracle:
        machine = Oracle(config, model.weights, blocks)
    elif cache is None:
        machine = Cache(config, blocks, model.dtype, model.device, model.backend)
    else:
        machine = cache
    lengths = dict.fromkeys(blocks, 0)
    for index, event in enumerate(schedule["events"]):
        advance_lengths(lengths, event)
        if event["do"] == "move":
            machine.move(event["from"], event["to"])
        elif event["do"] == "drop":
            machine.drop(event["block"])
        else:
            nbytes = memory_of_scores(event, lengths, config)
            with allocating(nbytes, f"event {index}", model.device):
                logits = run_step(event, machine, model)
            yield index, logits


def run_step(event: dict, machine: Cache | Oracle, model: Model) -> Tensor:
    """Logits [W, V] of a step event."""
    if isinstance(machine, Oracle):
        return machine.step(event["views"], event["tokens"])
    return step(event["views"], event["tokens"], model.weights, model.config, machine)


def memory_of_scores(event: dict, lengths: dict[str, int], config: Config) -> int:
    """Bytes that one layer's scores of one worker take in the oracle: in float64, before and after the softmax."""
    most_scores = 0
    for view, ids in zip(event["views"], event["tokens"]):
        tokens_in_view = sum(lengths[block] for block in view)
        most_scores = max(most_scores, len(ids) * tokens_in_view)
    return 16 * config.num_attention_heads * most_scores


# ---- are they those that were recorded?


def digest(logits: Tensor) -> str:
    """dtype and hash of logits: equal where they are equal bit for bit."""
    data = logits.cpu().contiguous().view(torch.uint8).numpy()
    hashed = hashlib.sha256(data).hexdigest()
    return f"{name_of_dtype(logits.dtype)}:{hashed[:16]}"


class DigestCheck:
    """Counts the steps whose logits were recorded in the same dtype as ours, and notes the first that differs."""

    def __init__(self, events: list[dict]):
        self.events = events
        self.checked = 0
        self.first_different: int | None = None  # index of the event

    def watch(self, results: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Pass on what `replay` gives, and check each step on its way."""
        for index, logits in results:
            self.check(index, logits)
            yield index, logits

    def check(self, index: int, logits: Tensor) -> None:
        recorded = self.events[index].get("digest")
        if not isinstance(recorded, str):
            return
        recorded_dtype = recorded.split(":")[0]
        if recorded_dtype != name_of_dtype(logits.dtype):
            return
        self.checked += 1
        if recorded != digest(logits) and self.first_different is None:
            self.first_different = index

    def verdict(self) -> str:
        if self.first_different is None:
            return f"{self.checked} recorded digests: all as recorded, bit for bit"
        return f"{self.checked} recorded digests: event {self.first_different} is the first to differ"


# ---- the file of logits


def tensor_name(index: int) -> str:
    return f"step_{index:04d}"


def safetensors_chunks(results: Iterator[tuple[int, Tensor]], shapes: dict[int, list[int]]) -> Iterator[bytes]:
    """A safetensors file of the steps in `shapes`, by their indices: its header, and each step's logits as they come.

    So no step's logits need be kept until the last one's are there. Raises InputError for what is not finite.
    """
    yield safetensors_header({tensor_name(index): shape for index, shape in shapes.items()})
    for index, logits in results:
        if index in shapes:
            single = logits.cpu().to(torch.float32)
            require(single.isfinite().all(), f"event {index}: its logits are not finite")
            yield single.numpy().tobytes()


def safetensors_header(shapes: dict[str, list[int]]) -> bytes:
    """What a safetensors file of float32 tensors begins with: the header's length, and where each tensor lies."""
    header = {}
    start = 0
    for name, (rows, columns) in shapes.items():
        end = start + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    padding = b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    length = len(text) + len(padding)
    return length.to_bytes(8, "little") + text + padding


# ---- the command


def command(options: argparse.Namespace) -> int:
    require(not options.oracle or options.device in ("auto", "cpu"), "--oracle: it runs on the cpu alone")
    require(not options.oracle or options.ranks is None, "--oracle: it runs in one process alone")
    device = "cpu" if options.oracle else options.device
    folder = fetch(options.model, with_tokenizer=False)
    require_writable(options.out, "--out", [options.schedule, *files_of(folder)])
    model = load(
        options.model,
        options.dtype,
        device,
        folder=folder,
        with_tokenizer=False,
        quantize=options.quantize,
        context=options.context,
        ranks=options.ranks,
    )
    spare_threads(model.config)
    schedule = read_schedule(options.schedule, model.config.vocab_size)

    events = schedule["events"]
    wanted = range(len(events))[options.events]
    schedule["events"] = events[: wanted.stop]  # also the ones before: what they write is seen later
    shapes = {}
    for index in wanted:
        if events[index]["do"] == "step":
            workers = len(events[index]["views"])
            shapes[index] = [workers, model.config.vocab_size]

    cache = None
    if not options.oracle:
        backend = choose_backend(model.device, model.dtype, options.kernels == "auto", model.ranks)
        cache = model.cache_for(schedule["blocks"], backend)
    results = replay(schedule, model, options.oracle, cache)
    digests = DigestCheck(events)
    if not options.oracle:  # whose bits are its own, even in float64
        results = digests.watch(results)
    write_whole(options.out, safetensors_chunks(results, shapes))
    print(f"steps: {len(shapes)}, logits in {options.out}", file=sys.stderr)
    if digests.checked > 0:
        print(digests.verdict(), file=sys.stderr)
    return 0 if digests.first_different is None else 1


def event_range(text: str) -> slice:
    """A:B, as Python slices; each may be missing. Raises ValueError for anything else."""
    start, stop = text.split(":")
    return slice(int(start) if start else None, int(stop) if stop else None)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 where recorded logits were others, bit for bit, in the same dtype; 2 for bad input."""
    parser = Parser("minihogwild.replay", description="Replay a schedule, and write the logits of its steps.")
    add = parser.add_argument
    add("schedule", type=Path, help="as `minihogwild --record` writes it, or anybody else")
    add("--model", required=True, help="a model folder (it needs no tokenizer), or a hub repository's name")
    add("--out", type=Path, required=True, metavar="FILE", help="a safetensors file: one tensor for each step event")
    add("--oracle", action="store_true", help="by the slow, obvious way, in float64, not by the engine")
    add("--events", type=event_range, default=slice(None), metavar="A:B",
        help="write the logits of these alone, a slice as in Python")  # fmt: skip
    add_model_options(parser)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
