"""How well do workers share a sheet? Fresh sheets, the engine itself, and the expert beside it.

python tutorial/duet/evaluate.py                      20 sheets of 12 lines, a minute and a half on two cores
python tutorial/duet/evaluate.py --layouts combined independent --workers 1 2 3 4 8 --figure tutorial/figures/duet.svg
"""

import argparse
import functools
import itertools
import json
import random
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from sheets import TAKEN, Encoder, Sheet, make_sheet, make_tokenizer, transcript

from minihogwild import Run, Sampling, load
from minihogwild.generate import DUET
from minihogwild.layouts import LAYOUTS
from minihogwild.prompts import NAMES

SEED = 2**31  # training draws its sheets from seeds that are texts: no sheet is met again but by chance
CLAIM = re.compile(rf"(?:\w{re.escape(TAKEN)})*(\w) = ")
RESULT = re.compile(r", so (\w) = (\d+)\.\s*$")
loaded = functools.cache(load)  # once in each process


def fresh_sheets(count: int, fewest: int = 12, most: int = 12) -> list[Sheet]:
    rng = random.Random(SEED)
    return [make_sheet(rng, rng.randint(fewest, most)) for _ in range(count)]


def measure(job: tuple) -> dict:
    """One sheet by one team: what came of it."""
    model, dtype, layout, workers, sheet, expert = job
    torch.set_num_threads(1)
    model = loaded(model, dtype, "cpu")
    began = time.perf_counter()
    run = Run(model, str(sheet), workers, layout, max_steps=200 * len(sheet.lines), sampling=Sampling())
    growing: dict[str, str] = {}  # by worker: what it has written of the line that it is at
    claims: list[str] = []
    results: dict[str, set[str]] = {name: set() for name in sheet.lines}
    solved: list[int] = []  # the steps in which another line was right for the first time
    for event in run:
        if event["do"] == "begin":
            growing[event["worker"]] = ""
        if event["do"] != "text":
            continue
        before = growing[event["worker"]]
        text = growing[event["worker"]] = before + event["text"]
        if (claim := CLAIM.match(text)) and not CLAIM.match(before):
            claims.append(claim[1])
        if not text.endswith("\n\n"):
            continue
        growing[event["worker"]] = ""  # in some layouts the next line follows at once
        if (result := RESULT.search(text)) and result[1] in results:
            line, value = result.groups()
            if value == str(sheet.values[line]) and not results[line]:
                solved.append(run.forward_steps)
            results[line].add(value)
    right = sum(results[line] == {str(value)} for line, value in sheet.values.items())
    return {
        "right": right / len(sheet.lines),
        "whole": right == len(sheet.lines),
        "steps": run.forward_steps,
        "expert": expert,
        "duplicates": len(claims) - len(set(claims)),
        "backed_off": sum("".join(worker.paragraphs).count(TAKEN) for worker in run.workers),
        "retired": run.stopped_by == "retired",
        "seconds": time.perf_counter() - began,
        "solved": solved,
    }


def evaluate(model: str, dtype: str, layout: str, workers: int, sheets: list, pool: ProcessPoolExecutor) -> dict:
    """Means over the sheets; `solved[n]` is the mean number of lines solved after n steps."""
    encode, team = Encoder(make_tokenizer()), NAMES.split()[:workers]
    alone = layout == "independent"  # each has the whole sheet to itself
    expert = [transcript(sheet, team[:1] if alone else team, layout, encode)[1] for sheet in sheets]
    rows = list(pool.map(measure, [(model, dtype, layout, workers, *pair) for pair in zip(sheets, expert)]))
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key != "solved"}
    counts = [0] * (1 + max(row["steps"] for row in rows))
    for step in (step for row in rows for step in row["solved"]):
        counts[step] += 1
    solved = [count / len(rows) for count in itertools.accumulate(counts)]
    return {"layout": layout, "workers": workers, **means, "solved": solved}


COLUMNS = {
    "layout": "{layout}",
    "workers": "{workers}",
    "lines right": "{right:.2%}",
    "sheets right": "{whole:.1%}",
    "steps": "{steps:.1f}",
    "of the expert's": "{of_expert:.3f}",
    "of the first row's": "{of_first:.3f}",
    "duplicates": "{duplicates:.3f}",
    "backed off": "{backed_off:.2f}",
    "ended": "{retired:.1%}",
    "s a sheet": "{seconds:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DUET))
    parser.add_argument("--sheets", type=int, default=20)
    parser.add_argument("--lines", type=int, nargs=2, default=[12, 12], help="at least, and at most (26)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--layouts", nargs="+", default=["combined"], choices=LAYOUTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw lines solved against forward steps")
    options = parser.parse_args()
    sheets = fresh_sheets(options.sheets, *options.lines)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    table, first = [], {}
    with ProcessPoolExecutor(options.processes) as pool:
        for layout in options.layouts:
            for workers in options.workers:
                row = evaluate(options.model, options.dtype, layout, workers, sheets, pool)
                row["of_expert"] = row["steps"] / row["expert"]
                row["of_first"] = row["steps"] / first.setdefault(layout, row["steps"])
                table.append(row)
                print(f"| {' | '.join(COLUMNS.values()).format(**row)} |", flush=True)
    if options.figure:
        draw(table, options.figure)
    print(json.dumps([{key: value for key, value in row.items() if key != "solved"} for row in table]))


def draw(table: list[dict], path: Path) -> None:
    """Solved lines against forward steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    most = max(row["workers"] for row in table)
    for row in table:
        alone = row["layout"] == "independent"
        if alone and row["workers"] < most:
            continue  # they all look the same
        label = f"{row['workers']} worker{'s' * (row['workers'] > 1)}, {row['layout']}"
        axes.plot(row["solved"], label=label, linestyle="--" if alone else "-", linewidth=1.8)
    axes.set(xlabel="forward steps", ylabel="lines solved (mean)", xlim=0, ylim=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


if __name__ == "__main__":
    main()
