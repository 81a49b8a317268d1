"""How far float32, bfloat16 and float16 are from float64, as steps and moves add up: `python benchmarks/drift.py`

Two schedules, on a tiny model: a run of two workers, 2,000 steps and 100 moves; and a token that is moved 1,000 times,
each time turned anew and rounded to the cache's dtype. Every dtype starts from the same weights, exact in bfloat16.
The figures are the largest difference of a row's logits, relative to its largest logit: median and maximum over the
steps since the last line.
"""

import argparse
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from minihogwild import load
from minihogwild.replay import replay

DTYPES = ("float32", "bfloat16", "float16")


def run_of_two(rng: random.Random, vocabulary: int) -> Iterator[dict]:
    """2,000 steps; one of the two moves after every 20th, in turn."""
    views = [["common", "bob", "alice"], ["common", "alice", "bob"]]
    yield {"do": "step", "views": [["common"]], "tokens": [[rng.randrange(vocabulary) for _ in range(32)]]}
    for n in range(1, 2001):
        yield {"do": "step", "views": views, "tokens": [[rng.randrange(vocabulary)] for _ in views]}
        if n % 20 == 0:
            yield {"do": "move", "from": ("alice", "bob")[n // 20 % 2], "to": "common"}


def moved_often(rng: random.Random, vocabulary: int) -> Iterator[dict]:
    """The first token is moved 1,000 times, to and fro, each time behind a token that is new."""
    here, there = "here", "there"
    yield {"do": "step", "views": [[here]], "tokens": [[rng.randrange(vocabulary)]]}
    for _ in range(1000):
        yield {"do": "step", "views": [[here, there]], "tokens": [[rng.randrange(vocabulary)]]}
        yield {"do": "move", "from": here, "to": there}
        here, there = there, here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "vectors" / "models" / "llama")
    options = parser.parse_args()
    models = {dtype: load(options.model, dtype, "cpu") for dtype in ("float64", *DTYPES)}
    print("| schedule | up to step | " + " | ".join(f"{dtype}: median, max" for dtype in DTYPES) + " |")
    print("| --- " * (2 + len(DTYPES)) + "|")
    for name, make in (("two workers, 100 moves", run_of_two), ("moved 1,000 times", moved_often)):
        events = list(make(random.Random(0), models["float64"].config.vocab_size))
        blocks = list(dict.fromkeys(b for event in events for view in event.get("views", []) for b in view))
        runs = [replay({"blocks": blocks, "events": events}, model) for model in models.values()]
        apart = {dtype: [] for dtype in DTYPES}
        for step, ((_, exact), *others) in enumerate(zip(*runs, strict=True)):
            for dtype, (_, logits) in zip(DTYPES, others):
                largest = (logits.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
                apart[dtype].append(float(largest.max()))
            if step in (10, 100, 1000, 2000):
                cells = [f"{statistics.median(values):.1e}, {max(values):.1e}" for values in apart.values()]
                print(f"| {name} | {step:,} | {' | '.join(cells)} |", flush=True)
                apart = {dtype: [] for dtype in DTYPES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
