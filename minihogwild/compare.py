"""Logits of another implementation beside ours, by step and worker: `python -m minihogwild.compare`.

The first step in which they depart is named, with what is new in it: what no earlier step had, in which both agreed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .commands import Parser, run_command
from .config import refusing, require
from .replay import read_schedule, tensor_name


def traits(schedule: dict) -> Iterator[tuple[int, list[str]]]:
    """(index of the event, all that a kernel may get wrong in it, the plainest first) of each step."""
    lengths, moves = Counter(), Counter()  # of a block; how often tokens of it have been moved, at most
    emptied, just_moved = set(), False
    for index, event in enumerate(schedule["events"]):
        if event["do"] == "move":
            source, target = event["from"], event["to"]
            if lengths[source]:
                moves[target] = max(moves[target], moves.pop(source, 0) + 1)
                lengths[target] += lengths.pop(source)
                emptied, just_moved = emptied | {source}, True
            continue
        fed = Counter({view[-1]: len(ids) for view, ids in zip(event["views"], event["tokens"])})
        continued = {block for block in fed if lengths[block]}
        lengths += fed
        views = [[block for block in view if lengths[block]] for view in event["views"]]
        starts = {at for view in views for at in zip(view, accumulate([lengths[block] for block in view], initial=0))}
        seen, others = set().union(*views), set().union(*(view[:-1] for view in views))
        sees = {(view[-1], block) for view in views for block in view[:-1] if block in fed}
        longest = max(sum(lengths[block] for block in view) for view in views)
        found = {
            "a chunk of several tokens": max(fed.values()) > 1,
            "a block that is continued": continued,
            "a chunk that continues a block": any(fed[block] > 1 for block in continued),
            "several blocks in one view": others,
            "several workers": len(views) > 1,
            "workers that feed different numbers of tokens": len({*fed.values()}) > 1,
            "tokens of this very step in another's block": others & fed.keys(),
            "a chunk of this very step in another's block": any(fed[block] > 1 for block in others),
            "a block that starts elsewhere in another's view": len(starts) > len(seen),
            "a worker that sees another who does not see it": any((b, a) not in sees for a, b in sees),
            "a move just before": just_moved,
            "tokens that were moved": any(moves[block] for block in seen),
            "tokens that were moved twice": any(moves[block] > 1 for block in seen),
            "a block that was emptied and is written anew": emptied & fed.keys(),
            **{f"a position past {2**n:,}": longest > 2**n + 1 for n in range(10, 18)},
        }
        yield index, [trait for trait, holds in found.items() if holds]
        just_moved = False


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each row of logits, [W, 4]: the largest difference, the same relative to the largest of ours,
    KL(ours, theirs) in nats, and 1 where both have the same argmax. What is not a number is infinitely far away.
    """
    ours, theirs = ours.double(), theirs.double()
    largest = (ours - theirs).abs().amax(-1)
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    relative = largest / ours.abs().amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack((largest, relative, kl, same), -1).nan_to_num(torch.inf, torch.inf)


def opened(path: Path) -> safe_open:
    with refusing(f"{path} is not a file of logits"):
        return safe_open(path, "pt")


def command(options: argparse.Namespace) -> int:
    require(options.tolerance >= 0, f"--tolerance {options.tolerance} is not 0 or more")
    schedule = read_schedule(options.schedule, sys.maxsize)
    steps = {tensor_name(index): (index, found) for index, found in traits(schedule)}
    ours, theirs = opened(options.ours), opened(options.theirs)
    for path, file in ((options.ours, ours), (options.theirs, theirs)):
        others = sorted(set(file.keys()) - steps.keys())
        require(not others, f"{path}: {', '.join(others[:3])} is no step of {options.schedule}")
    agreed, departure, rows, written = set(), None, {}, set(ours.keys())
    for name, (index, found) in steps.items():
        if name not in written:  # only a part was replayed
            continue
        with refusing(f"{options.ours} and {options.theirs} cannot be compared"):
            a, b, workers = ours.get_tensor(name), theirs.get_tensor(name), len(schedule["events"][index]["views"])
            right = a.shape == b.shape == (workers, *a.shape[1:2]) and a.is_floating_point() and b.is_floating_point()
            kinds = [f"{list(tensor.shape)} {str(tensor.dtype)[6:]}" for tensor in (a, b)]
            require(right, f"{name} must be logits of [{workers}, V]: ours is {kinds[0]}, theirs {kinds[1]}")
            rows[index] = difference(a, b)
        if not departure and rows[index][:, 1].max() > options.tolerance:
            departure = index, [trait for trait in found if trait not in agreed] or found
        agreed |= set(found)
    require(rows, f"{options.ours} has no step of this schedule")
    print("event  worker         max    relative          KL  same argmax")
    for index, row in rows.items():
        for worker, (*numbers, same) in enumerate(row.tolist()):
            print(f"{index:5}  {worker:6}", *(f" {x:10.3e}" for x in numbers), " yes" if same else " NO")
    _, relative, _, same = torch.cat([*rows.values()]).T
    print(f"\n{len(rows)} of {len(steps)} steps: relative difference at most {relative.max():.3e}; ", end="")
    print(f"same argmax: {same.mean():.2%}")
    if not departure:
        print(f"They agree, to {options.tolerance:g}.")
        return 0
    if departure[0] == min(rows):
        print("Nothing agreed before: is it the model itself (weights, norms, frequencies, scale, order of heads)?")
    print(f"They depart at event {departure[0]}. New there, or else what it has, the most special first:")
    print(*(f"- {trait}" for trait in reversed(departure[1])), sep="\n")
    return 1


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
