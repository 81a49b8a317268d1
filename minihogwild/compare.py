"""Logits of another implementation beside ours, by step and worker: `python -m minihogwild.compare`.

The first step in which they depart is named, with what is new in it: what no earlier step had, in which both agreed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .commands import Parser, run_command
from .errors import refusing, require
from .files import require_file
from .replay import advance_lengths, read_schedule, tensor_name
from .weights import name_of_dtype

# ---- what is special about a step


class BlockHistory:
    """What has happened to each block, up to some event of a schedule."""

    def __init__(self, blocks: list[str]):
        self.lengths = dict.fromkeys(blocks, 0)  # tokens
        self.times_moved = dict.fromkeys(blocks, 0)  # how often tokens that it holds were moved, at most
        self.emptied: set[str] = set()  # by a move or a drop, at any time
        self.since_last_step: set[str] = set()  # "move", "drop": which of them has emptied a block

    def add_step(self, event: dict) -> None:
        advance_lengths(self.lengths, event)
        self.since_last_step = set()

    def add_move(self, event: dict) -> None:
        source, target = event["from"], event["to"]
        if self.lengths[source] > 0:
            self.times_moved[target] = max(self.times_moved[target], self.times_moved[source] + 1)
            self._note_emptied(source, by="move")
        advance_lengths(self.lengths, event)

    def add_drop(self, event: dict) -> None:
        if self.lengths[event["block"]] > 0:
            self._note_emptied(event["block"], by="drop")
        advance_lengths(self.lengths, event)

    def _note_emptied(self, block: str, by: str) -> None:
        self.times_moved[block] = 0
        self.emptied.add(block)
        self.since_last_step.add(by)


def traits(schedule: dict) -> Iterator[tuple[int, list[str]]]:
    """For each step: (index of the event, all that a kernel may get wrong in it, the plainest first)."""
    history = BlockHistory(schedule["blocks"])
    for index, event in enumerate(schedule["events"]):
        if event["do"] == "move":
            history.add_move(event)
        elif event["do"] == "drop":
            history.add_drop(event)
        else:
            just_before = history.since_last_step
            history.add_step(event)
            yield index, traits_of_step(event, history, just_before)


def traits_of_step(event: dict, history: BlockHistory, just_before: set[str]) -> list[str]:
    """The traits of one step. `history` has the step's own tokens already; `just_before`: see `since_last_step`."""
    lengths = history.lengths
    new_tokens = {}  # by block
    views = []  # without what is empty: that moves nothing, and can't be seen
    for view, ids in zip(event["views"], event["tokens"]):
        new_tokens[view[-1]] = len(ids)
        views.append([block for block in view if lengths[block] > 0])

    seen = set()  # blocks, in any view
    of_others = set()  # blocks that a worker sees, and does not write to
    starts = set()  # (block, where it starts in a view)
    longest_view = 0  # in tokens
    for view in views:
        seen.update(view)
        of_others.update(view[:-1])
        start = 0
        for block in view:
            starts.add((block, start))
            start += lengths[block]
        longest_view = max(longest_view, start)
    last_position = longest_view - 1

    written = set(new_tokens)
    chunks = {block for block in written if new_tokens[block] > 1}
    continued = {block for block in written if lengths[block] > new_tokens[block]}
    sees = set()  # (the block of one worker of this step, that of another)
    for view in views:
        for block in view[:-1]:
            if block in written:
                sees.add((view[-1], block))
    one_sided = [(a, b) for a, b in sees if (b, a) not in sees]
    times_moved = max(history.times_moved[block] for block in seen)

    holds = {
        "a chunk of several tokens": len(chunks) > 0,
        "a block that is continued": len(continued) > 0,
        "a chunk that continues a block": len(chunks & continued) > 0,
        "several blocks in one view": len(of_others) > 0,
        "several workers": len(views) > 1,
        "workers that feed different numbers of tokens": len(set(new_tokens.values())) > 1,
        "tokens of this very step in another's block": len(of_others & written) > 0,
        "a chunk of this very step in another's block": len(of_others & chunks) > 0,
        "a block that starts elsewhere in another's view": len(starts) > len(seen),
        "a worker that sees another who does not see it": len(one_sided) > 0,
        "a move just before": "move" in just_before,
        "a drop just before": "drop" in just_before,
        "tokens that were moved": times_moved >= 1,
        "tokens that were moved twice": times_moved >= 2,
        "a block that was emptied and is written anew": len(history.emptied & written) > 0,
    }
    for power in range(10, 18):
        position = 2**power
        holds[f"a position past {position:,}"] = last_position > position
    return [trait for trait in holds if holds[trait]]


# ---- two implementations' logits


@dataclass(frozen=True)
class Difference:
    """How far one row of theirs is from ours. What is not a number is infinitely far away."""

    largest: float  # of any logit
    relative: float  # the same, in relation to the largest logit of ours
    kl: float  # KL(ours, theirs), in nats
    same_argmax: bool


def differences(ours: Tensor, theirs: Tensor) -> list[Difference]:
    """One for each worker, of logits [W, V] each."""
    ours, theirs = ours.double(), theirs.double()
    largest = (ours - theirs).abs().amax(-1)  # [W], as are all that follow
    largest_logit = ours.abs().amax(-1)
    relative = largest / largest_logit.clamp_min(torch.finfo(torch.float64).tiny)  # 0 / 0 would not be a number
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same_argmax = ours.argmax(-1) == theirs.argmax(-1)
    columns = [far_if_no_number(column).tolist() for column in (largest, relative, kl)]
    return [Difference(*row) for row in zip(*columns, same_argmax.tolist())]


def far_if_no_number(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=torch.inf, posinf=torch.inf)


def open_logits(path: Path) -> safe_open:
    with refusing(f"{path} is not a file of logits"):
        require_file(path)
        return safe_open(path, "pt")


def require_logits(name: str, ours: Tensor, theirs: Tensor, workers: int) -> None:
    """Raise InputError unless both are [workers, V]: floating-point numbers, in whatever dtype."""
    is_table = ours.dim() == 2 and len(ours) == workers
    are_numbers = ours.is_floating_point() and theirs.is_floating_point()
    our_dtype, their_dtype = name_of_dtype(ours.dtype), name_of_dtype(theirs.dtype)
    found = f"ours is {list(ours.shape)} {our_dtype}, theirs {list(theirs.shape)} {their_dtype}"
    right = is_table and ours.shape == theirs.shape and are_numbers
    require(right, f"{name} must be logits of [{workers}, V]: {found}")


def first_departure(
    compared: dict[int, list[Difference]], traits_of: dict[int, list[str]], tolerance: float
) -> tuple[int, list[str]] | None:
    """(the first event whose relative difference is larger, what is new in it, or else all its traits).

    None where they agree. New is what no earlier step had: in those, both agreed.
    """
    known = set()
    for index, rows in compared.items():
        if max(row.relative for row in rows) > tolerance:
            new = [trait for trait in traits_of[index] if trait not in known]
            return index, new if new else traits_of[index]
        known.update(traits_of[index])
    return None


# ---- the command


def command(options: argparse.Namespace) -> int:
    require(options.tolerance >= 0, f"--tolerance {options.tolerance} is not 0 or more")
    schedule = read_schedule(options.schedule, vocab_size=sys.maxsize)  # any: nothing is computed from the ids
    traits_of = dict(traits(schedule))  # by event
    steps = {tensor_name(index) for index in traits_of}
    ours, theirs = open_logits(options.ours), open_logits(options.theirs)
    for path, file in ((options.ours, ours), (options.theirs, theirs)):
        others = sorted(set(file.keys()) - steps)
        require(not others, f"{path}: {', '.join(others[:3])} is no step of {options.schedule}")

    steps_in_ours = set(ours.keys())  # perhaps only a part of the schedule's
    compared = {}  # by event
    for index in traits_of:
        name = tensor_name(index)
        if name in steps_in_ours:
            workers = len(schedule["events"][index]["views"])
            with refusing(f"{options.ours} and {options.theirs} cannot be compared"):
                our_logits, their_logits = ours.get_tensor(name), theirs.get_tensor(name)
                require_logits(name, our_logits, their_logits, workers)
                compared[index] = differences(our_logits, their_logits)
    require(compared, f"{options.ours} has no step of this schedule")

    print_table(compared, steps_in_all=len(steps))
    departure = first_departure(compared, traits_of, options.tolerance)
    if departure is None:
        print(f"They agree, to {options.tolerance:g}.")
        return 0
    index, stands_out = departure
    if index == min(compared):
        print("Nothing agreed before: is it the model itself (weights, norms, frequencies, scale, order of heads)?")
    print(f"They depart at event {index}. New there, or else what it has, the most special first:")
    for trait in reversed(stands_out):
        print(f"- {trait}")
    return 1


def print_table(compared: dict[int, list[Difference]], steps_in_all: int) -> None:
    print("event  worker         max    relative          KL  same argmax")
    all_rows = []
    for index, rows in compared.items():
        for worker, row in enumerate(rows):
            same = "yes" if row.same_argmax else "NO"
            print(f"{index:5}  {worker:6}  {row.largest:10.3e}  {row.relative:10.3e}  {row.kl:10.3e}  {same}")
        all_rows += rows
    largest = max(row.relative for row in all_rows)
    same_share = sum(row.same_argmax for row in all_rows) / len(all_rows)
    print(f"\n{len(compared)} of {steps_in_all} steps: ", end="")
    print(f"relative difference at most {largest:.3e}; same argmax: {same_share:.2%}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where they agree, 1 where they depart, 2 for bad input."""
    parser = Parser("minihogwild.compare", description="Hold another implementation's logits against ours.")
    add = parser.add_argument
    add("schedule", type=Path, help="the schedule that both have replayed")
    add("ours", type=Path, help="the logits that minihogwild.replay wrote")
    add("theirs", type=Path, help="the other's, in the same format")
    add("--tolerance", type=float, default=2e-4, metavar="R", help="relative difference allowed (2e-4; bfloat16: 0.05)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
