"""What evaluate tells of its results: progress, a table, a figure."""

import math
import random
import statistics
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ..scoring import share_found

NOTHING = "–"
RESAMPLES = 1000  # for the 95 % intervals
MOST = 5 / 6  # of the parts of a job


# ---- by setting


def by_setting(entries: list[dict]) -> dict[tuple[int, str], list[dict]]:
    """The results of each (number of workers, layout), in this order."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["workers"], entry["layout"]), []).append(entry)
    return dict(sorted(groups.items()))


def share(entries: list[dict], budget: int) -> tuple[float, float]:
    """The mean share that is right by then, and half the width of its 95 % interval: a bootstrap over problems.

    Problems are drawn, with all of their seeds: how hard a problem is, its seeds have in common. The half is 0 for a
    single problem, and where all are equally right: a bootstrap knows no other.
    """
    by_problem: dict[int, list[float]] = {}
    for entry in entries:
        by_problem.setdefault(entry["problem"], []).append(right_by(entry, budget))
    means = [statistics.fmean(values) for values in by_problem.values()]
    random_numbers = random.Random(0)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = random_numbers.choices(means, k=len(means))
        resampled.append(statistics.fmean(drawn))
    resampled.sort()
    low = resampled[round(0.025 * RESAMPLES)]
    high = resampled[round(0.975 * RESAMPLES) - 1]
    return statistics.fmean(means), (high - low) / 2


def right_by(entry: dict, passes: int) -> float:
    """The share that was right after so many forward passes: of parts at any number, of a boxed answer at a budget."""
    if "found_at" in entry:
        return share_found(entry["found_at"], passes)
    return entry["right"][str(passes)]


def passes_until_right(entry: dict) -> float:
    """Forward passes until most of the parts, or the answer, were right; infinite if that never came."""
    if "found_at" in entry:
        needed = math.ceil(MOST * len(entry["found_at"]))
        found = sorted(at for at in entry["found_at"] if at is not None)
        return found[needed - 1] if len(found) >= needed else math.inf
    right = [int(budget) for budget, share in entry["right"].items() if share == 1]
    if entry["stopped_by"] == "answer":  # what workers answered holds from then on
        right = [min(budget, entry["forward_steps"]) for budget in right]
    return min(right, default=math.inf)


# ---- the table


def table(entries: list[dict], budgets: list[int]) -> str:
    """A row for each number of workers and layout, as Markdown."""
    if not entries:
        return "no results"
    header = ["workers", "layout", "runs", *(f"right by {budget}" for budget in budgets)]
    header += ["passes until right", "tokens", "done twice"]
    rows = [header, ["---"] * len(header)]
    for (workers, layout), group in by_setting(entries).items():
        rows.append([str(workers), layout, *figures_of(group, budgets)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def figures_of(entries: list[dict], budgets: list[int]) -> list[str]:
    """The cells of one row."""
    cells = [str(len(entries))]
    for budget in budgets:
        mean, half_width = share(entries, budget)
        cells.append(f"{100 * mean:.1f} ± {100 * half_width:.1f} %")
    until = statistics.median(passes_until_right(entry) for entry in entries)
    cells.append(NOTHING if until == math.inf else f"{until:g}")
    tokens = statistics.fmean(entry["tokens"] for entry in entries)
    cells.append(f"{tokens:.0f}")
    done_twice = [entry["repeats"] for entry in entries if "repeats" in entry]
    cells.append(f"{statistics.fmean(done_twice):.2f}" if done_twice else NOTHING)
    return cells


# ---- progress


class Progress:
    """On a terminal, a bar and the table so far; elsewhere nothing."""

    def __init__(self, batches: int, entries: list[dict], budgets: list[int]):
        self.budgets = budgets
        self.bar = RichProgress(BarColumn(), MofNCompleteColumn(), "batches", TimeRemainingColumn(), auto_refresh=False)
        self.task = self.bar.add_task("", total=batches)
        console = Console(stderr=True)
        self.live = Live(self._drawn(entries), console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.live.stop()

    def advance(self) -> None:
        self.bar.advance(self.task)

    def show(self, entries: list[dict]) -> None:
        if self.live:
            self.live.update(self._drawn(entries))

    def _drawn(self, entries: list[dict]) -> Group:
        return Group(Markdown(table(entries, self.budgets)), self.bar)


# ---- the figure


def draw(entries: list[dict], budgets: list[int], path: Path, title: str) -> None:
    """What is right against forward passes: a curve for each number of workers and layout."""
    from matplotlib.figure import Figure  # not above: it is an extra

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    in_parts = all("found_at" in entry for entry in entries)
    passes = list(range(budgets[-1] + 1)) if in_parts else budgets
    for (workers, layout), group in by_setting(entries).items():
        shares = [100 * statistics.fmean(right_by(entry, number) for entry in group) for number in passes]
        style = "--" if layout == "independent" and workers > 1 else "-"
        label = "1 worker" if workers == 1 else f"{workers} workers, {layout}"
        [line] = axes.plot(passes, shares, style, label=label, marker=None if in_parts else "o")
        for budget in budgets:
            mean, half_width = share(group, budget)
            axes.errorbar(budget, 100 * mean, 100 * half_width, color=line.get_color(), capsize=2)
    axes.set(xlabel="forward passes", ylabel="right, %", ylim=(0, 103), title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
