"""A schedule in, logits out: `python -m minihogwild.replay`, for whoever checks another implementation.

A schedule is the list of the steps and moves of a run, as JSON:

    {"version": 1, "blocks": [name, ...], "events": [event, ...]}
    {"do": "step", "views": [[block, ...], ...], "tokens": [[id, ...], ...]}    and "sampled", "digest"
    {"do": "move", "from": block, "to": block}

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

from .cache import Cache, check_move, check_step
from .commands import Parser, require_writable, run_command, spare_threads, write_whole
from .config import refusing, require
from .load import DTYPES, Model, load
from .memory import allocating
from .model import step
from .oracle import Oracle
from .text import read_json


def digest(logits: Tensor) -> str:
    """dtype and hash of logits: equal where they are equal bit for bit."""
    data = logits.cpu().contiguous().view(torch.uint8).numpy()
    return f"{str(logits.dtype)[6:]}:{hashlib.sha256(data).hexdigest()[:16]}"


def schedule_json(blocks: list[str], events: list[dict]) -> bytes:
    """A schedule as a file holds it: a line for each of a run's steps and moves."""
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in events if event["do"] in ("step", "move"))
    return f'{{"version": 1, "blocks": {json.dumps(blocks, ensure_ascii=False)}, "events": [\n{lines}\n]}}\n'.encode()


def read_schedule(path: Path, vocab_size: int) -> dict:
    """A schedule from its file. Raises InputError, with the event's index, where it contradicts itself."""
    schedule = {"version": 1, "blocks": None, "events": None} | read_json(path)
    blocks, events = schedule["blocks"], schedule["events"]
    with refusing(path):
        require(schedule["version"] == 1, f"version {schedule['version']!r} is not known, only 1")
        require(all_of(str, blocks) and len(set(blocks)) == len(blocks), "blocks must be a list of names that differ")
        require(isinstance(events, list), "events must be a list")
        known = dict.fromkeys(blocks)  # found at once, however many
        for index, event in enumerate(events):
            with refusing(f"event {index}"):
                check_event(event, known, vocab_size)
    return schedule


def all_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def check_event(event: object, blocks: Collection[str], vocab_size: int) -> None:
    require(isinstance(event, dict) and event.get("do") in ("step", "move"), "'do' must be step or move")
    if event["do"] == "move":
        ends = [event.get("from"), event.get("to")]
        require(all_of(str, ends), "'from' and 'to' must be names of blocks")
        check_move(*ends, blocks)
        return
    for key, kind in (("views", str), ("tokens", int)):
        lists = event.get(key)
        right = all_of(list, lists) and all(all_of(kind, row) for row in lists)
        require(right, f"{key} must be a list of lists of {kind.__name__}")
    check_step(event["views"], [len(ids) for ids in event["tokens"]], blocks)
    outside = [token for ids in event["tokens"] for token in ids if not 0 <= token < vocab_size]
    require(not outside, f"token {outside[:1]} is outside the vocabulary of {vocab_size}")


def replay(
    schedule: dict, model: Model, oracle: bool = False, cache: Cache | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(index of the event, logits [W, V]) of each step: by the engine (in `cache`), or in float64 by the oracle."""
    config, weights, blocks, total = model.config, model.weights, schedule["blocks"], 0
    cache = cache or (Oracle(config, weights, blocks) if oracle else Cache(config, blocks, model.dtype, model.device))
    for index, event in enumerate(schedule["events"]):
        if event["do"] == "move":
            cache.move(event["from"], event["to"])
            continue
        views, tokens = event["views"], event["tokens"]
        total += sum(map(len, tokens))  # of all blocks
        nbytes = 16 * config.num_attention_heads * max(map(len, tokens)) * total  # scores and their softmax
        with allocating(nbytes, f"event {index}", model.device):
            logits = cache.step(views, tokens) if oracle else step(views, tokens, weights, config, cache)
        yield index, logits


def part(text: str) -> slice:
    """A:B, as Python slices; each may be missing."""
    start, stop = (int(end) if end else None for end in text.split(":"))
    return slice(start, stop)


def tensor_name(index: int) -> str:
    return f"step_{index:04d}"


def safetensors_header(shapes: dict[str, list[int]]) -> bytes:
    """What a safetensors file of float32 tensors begins with: the header's length, and where each tensor lies."""
    tensors, end = {}, 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + 4 * rows * columns
        tensors[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def command(options: argparse.Namespace) -> int:
    require_writable(options.out, "--out", options.schedule, *Path(options.model).glob("*"))
    require(not options.oracle or options.device in ("auto", "cpu"), "--oracle: it runs on the cpu alone")
    model = load(options.model, options.dtype, "cpu" if options.oracle else options.device)
    spare_threads(model.config)
    schedule = read_schedule(options.schedule, model.config.vocab_size)
    events = schedule["events"]
    chosen = range(len(events))[options.events]
    schedule["events"] = events[: chosen.stop]  # all from the first: they make the cache
    steps = [index for index in chosen if events[index]["do"] == "step"]
    shapes = {tensor_name(index): [len(events[index]["views"]), model.config.vocab_size] for index in steps}
    same = {}  # by event: is the recorded digest ours?

    def chunks() -> Iterator[bytes]:
        yield safetensors_header(shapes)  # so the logits can follow as they come
        for index, logits in replay(schedule, model, options.oracle):
            recorded = events[index].get("digest")
            alike = isinstance(recorded, str) and recorded.split(":")[0] == str(logits.dtype)[6:]
            if alike and not options.oracle:  # which has bits of its own
                same[index] = recorded == digest(logits)
            if index in chosen:
                row = logits.cpu().to(torch.float32)
                require(row.isfinite().all(), f"event {index}: its logits are not finite")
                yield row.numpy().data

    write_whole(options.out, chunks())
    print(f"steps: {len(steps)}, logits in {options.out}", file=sys.stderr)
    differ = [index for index in same if not same[index]]
    if same:
        alike = f"event {differ[0]} is the first to differ" if differ else "all as recorded, bit for bit"
        print(f"{len(same)} recorded digests: {alike}", file=sys.stderr)
    return 1 if differ else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 where recorded logits were others, bit for bit, in the same dtype; 2 for bad input."""
    parser = Parser("minihogwild.replay", description="Replay a schedule, and write the logits of its steps.")
    add = parser.add_argument
    add("schedule", type=Path, help="as `minihogwild --record` writes it, or anybody else")
    add("--model", required=True, help="a model folder, or a hub repository's name")
    add("--out", type=Path, required=True, metavar="FILE", help="a safetensors file: one tensor for each step event")
    add("--oracle", action="store_true", help="by the slow, obvious way, in float64, not by the engine")
    add("--events", type=part, default=":", metavar="A:B", help="write the logits of these alone, a slice as in Python")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: config.json's")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
