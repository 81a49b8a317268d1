"""How well do workers solve problems together, and in how many forward passes? `python -m minihogwild.evaluate --help`

Each problem is run with each number of workers, layout and seed. One run answers for all budgets: where it has not
ended by then, a finisher is asked for the answer, over what has been written so far; what it says is dropped again.

Results are appended to a file as they come, a line of JSON each. The same command goes on where it was stopped; what it
has then written is what it would have written at once.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .backend import choose_backend
from .commands import (
    DUET,
    Parser,
    add_model_options,
    add_sampling_options,
    run_command,
    sampling_asked_for,
    spare_threads,
    warn_without_template,
)
from .errors import refusing, require
from .files import is_ours_alone, require_all_writable, require_file, target_of
from .hub import Model, fetch, files_of, load
from .layouts import LAYOUTS
from .prompts import Prompts, load_prompts, prompts_of
from .scoring import HAS_MATH_VERIFY, PartsFound, Problem, asked, joined, read_problems, repeats, share_right
from .show.results import Progress, draw, table
from .weights import name_of_dtype
from .workers import MOST_WORKERS, Run, drive_together, prompt_text

BEGINNING = b'{"evaluated": {'  # of a file of results
MOST_SEEDS = 10_000
TRIED_AT_ONCE = 100  # problems
FIGURES = [".svg", ".png", ".pdf"]


@dataclass(frozen=True)
class Setting:
    """One curve of the figure: how the problems are run."""

    workers: int
    layout: str


@dataclass(frozen=True)
class Batch:
    """Some problems that are run at once, in one cache."""

    setting: Setting
    seed: int
    problems: Sequence[int]  # their indices


def arguments() -> Parser:
    parser = Parser("minihogwild.evaluate", description="Solve many problems, and say how many were right, and when.")
    add = parser.add_argument
    add("problems", type=Path, metavar="PROBLEMS.jsonl",
        help='a line each: {"problem": "...", "answer": "42"}, or {"problem": "...", "answers": [["a", "b"], ["c"]]}: '
        "for each part of a job the texts of which one must be there")  # fmt: skip
    add("--model", default=str(DUET), help="a model folder, or a hub repository's name (default: duet, bundled)")
    add(
        "--out", type=Path, required=True, metavar="FILE", help="results, a line each; an existing file is gone on with"
    )
    add("--workers", type=increasing_numbers, default=[1, 2], metavar="N,N", help="numbers of workers (default: 1,2)")
    add("--layouts", type=lambda text: text.split(","), default=["combined"], metavar="NAME,NAME",
        help="for two and more workers (default: combined); one worker is plain chat")  # fmt: skip
    add("--budgets", type=increasing_numbers, default=[512, 1024, 2048], metavar="N,N",
        help="forward passes after which the answer is asked for; the last one ends a run (default: 512,1024,2048)",
    )  # fmt: skip
    add("--seeds", type=int, default=1, metavar="N", help="run each problem with the seeds 0 to N - 1 (default: 1)")
    add(
        "--join",
        type=int,
        default=1,
        metavar="K",
        help="put K problems into one prompt; counts the share that is right",
    )
    add(
        "--batch", type=int, default=1, metavar="N",
        help="solve N problems at the same time, in one cache (default: 1)",
    )  # fmt: skip
    add(
        "--figure", type=Path, metavar="FILE", help="draw what is right against forward passes (.svg, .png; matplotlib)"
    )
    add("--prompts", type=Path, metavar="FILE", help="the words that make workers cooperate, as JSON")
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def increasing_numbers(text: str) -> list[int]:
    """N,N,N. Raises argparse's error for anything else, and where they do not increase."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, increasing, as 1,2,4, not {text!r}")
    return numbers


def command(options: argparse.Namespace) -> int:
    """Check all that can be checked, load, run what is missing, tell. Returns the exit code."""
    require_numbers(options)
    sampling = sampling_asked_for(options)
    problems = joined(read_problems(options.problems), options.join)
    folder = fetch(options.model)
    require_outputs(options, folder)
    words = load_prompts(options.prompts) if options.prompts else prompts_of(folder)
    require_workers(options.workers[-1], words)
    model = load(
        options.model,
        options.dtype,
        options.device,
        folder=folder,
        quantize=options.quantize,
        context=options.context,
        ranks=options.ranks,
    )
    spare_threads(model.config)
    model = replace(model, sampling=replace(model.sampling, **sampling))
    if not HAS_MATH_VERIFY and any(problem.expected for problem in problems):
        print("without math-verify, answers are compared letter by letter: pip install 'minihogwild[evaluate]'",
              file=sys.stderr)  # fmt: skip

    results = Results(options.out, description_of(options, model, words, problems))
    batches = plan(options, len(problems))
    require_all_fit(batches, results, problems, model, words, options)
    warn_without_template(model)
    with results, Progress(len(batches), results.entries, options.budgets) as progress:
        for batch in batches:
            if not all(results.has(batch, number) for number in batch.problems):
                for entry in solve(batch, problems, model, words, options):
                    results.add(entry)
                    progress.show(results.entries)
            progress.advance()
    try:
        if options.figure:
            draw(results.entries, options.budgets, options.figure, f"{model.name}, {options.problems.name}")
    finally:
        print(table(results.entries, options.budgets))
    return 0


# ---- before the runs


def require_numbers(options: argparse.Namespace) -> None:
    for name in ("seeds", "join", "batch"):
        number = getattr(options, name)
        require(number >= 1, f"--{name} is {number}: it must be at least 1")
    require(options.seeds <= MOST_SEEDS, f"--seeds is {options.seeds}: it must be at most {MOST_SEEDS}")
    unknown = [layout for layout in options.layouts if layout not in LAYOUTS]
    require(not unknown, f"--layouts: {unknown} are unknown: use some of {', '.join(LAYOUTS)}")


def require_workers(workers: int, words: Prompts) -> None:
    most = min(len(words.names), MOST_WORKERS)
    require(workers <= most, f"--workers {workers}: it must be from 1 to {most}")


def require_outputs(options: argparse.Namespace, folder: Path) -> None:
    read = [options.problems, *files_of(folder)]
    if options.prompts is not None:
        read.append(options.prompts)
    require_all_writable({"--out": options.out, "--figure": options.figure}, read)
    with refusing(f"--out {options.out} cannot be gone on with"):
        require_file(options.out)
    if options.figure is not None:
        with refusing("--figure"):
            import matplotlib.figure  # noqa: F401  it is an extra
        known = options.figure.suffix in FIGURES
        require(known, f"--figure {options.figure}: its name must end in one of {', '.join(FIGURES)}")


def description_of(options: argparse.Namespace, model: Model, words: Prompts, problems: list[Problem]) -> dict:
    """Whatever results depend on, but for what stands in each of them."""
    is_folder = Path(options.model).expanduser().is_dir()
    description = {
        "model": model.folder.resolve().name if is_folder else model.name,  # a folder may be moved
        "config": hashlib.sha256((model.folder / "config.json").read_bytes()).hexdigest()[:16],
        "dtype": name_of_dtype(model.dtype),
        "device": model.device.type,
        "kernels": options.kernels,
        "problems": hashlib.sha256(options.problems.read_bytes()).hexdigest()[:16],
        "join": options.join,
        "budgets": options.budgets,
        "batch": options.batch,
        "sampling": asdict(model.sampling),
        "words": asdict(words),
    }
    if any(problem.expected for problem in problems):
        description["answers"] = "as mathematics" if HAS_MATH_VERIFY else "letter by letter"
    return description


def plan(options: argparse.Namespace, count: int) -> list[Batch]:
    """All batches, in order: so that a table of the results so far is about the same problems in each row."""
    settings = []
    for workers in options.workers:
        layouts = ["independent"] if workers == 1 else options.layouts
        settings += [Setting(workers, layout) for layout in layouts]
    batches = []
    for seed in range(options.seeds):
        for start in range(0, count, options.batch):
            problems = range(start, min(start + options.batch, count))
            batches += [Batch(setting, seed, problems) for setting in settings]
    return batches


def require_all_fit(
    batches: list[Batch],
    results: "Results",
    problems: list[Problem],
    model: Model,
    words: Prompts,
    options: argparse.Namespace,
) -> None:
    """Raise InputError for a problem that cannot be run, too long a one say: now, and not hours later at its turn."""
    missing: dict[Setting, dict[int, None]] = {}  # the problems' indices, in order
    for batch in batches:
        for number in batch.problems:
            if not results.has(batch, number):
                missing.setdefault(batch.setting, {})[number] = None
    for setting, indices in missing.items():
        numbers = list(indices)
        for start in range(0, len(numbers), TRIED_AT_ONCE):
            runs_of(Batch(setting, 0, numbers[start : start + TRIED_AT_ONCE]), problems, model, words, options)


# ---- the runs


def runs_of(
    batch: Batch, problems: list[Problem], model: Model, words: Prompts, options: argparse.Namespace
) -> list[Run]:
    """A run for each problem of a batch; nothing is computed yet. Raises InputError, with the problem's number."""
    backend = model.backend
    if options.kernels == "off":
        backend = choose_backend(model.device, model.dtype, kernels=False, ranks=model.ranks)
    workers, layout = batch.setting.workers, batch.setting.layout
    prompts = [prompt_text(words, layout, workers, asked(problems[number])) for number in batch.problems]
    model.tokenizer.render_ahead(prompts)
    runs = []
    for number in batch.problems:
        problem = problems[number]
        with refusing(f"problem {number + 1}"):
            run = Run(
                model,
                asked(problem),
                workers,
                layout,
                max_steps=options.budgets[-1],
                seed=batch.seed,
                prompts=replace(words, boxed=problem.expected != ()),
                backend=backend,
                budgets=tuple(options.budgets) if problem.expected else (),
            )
        runs.append(run)
    return runs


def solve(
    batch: Batch, problems: list[Problem], model: Model, words: Prompts, options: argparse.Namespace
) -> Iterator[dict]:
    """Run a batch to its end; yields the results, by the problems' indices."""
    keys = [f"{number}: " for number in batch.problems]
    runs = dict(zip(keys, runs_of(batch, problems, model, words, options)))
    found = {key: PartsFound(problems[number].parts) for key, number in zip(keys, batch.problems)}
    blocks = [key + block for key, run in runs.items() for block in run.blocks]
    cache = model.cache_for(blocks, runs[keys[0]].backend)
    for key, event in drive_together(runs, cache):
        if event["do"] in ("text", "retire"):
            for worker in runs[key].workers:
                if worker.name == event["worker"]:
                    text, steps = worker.paragraphs[-1], runs[key].forward_steps
                    found[key].look(text, steps, is_whole=not worker.active)
    model.idle_cache = cache
    for number, key in zip(batch.problems, runs):
        yield result_of(runs[key], number, problems[number], found[key], options.budgets)


def result_of(run: Run, number: int, problem: Problem, found: PartsFound, budgets: list[int]) -> dict:
    """A line of results. Nothing in it depends on when, or how fast, it was computed."""
    summary = run.summary()
    entry = {
        "problem": number,
        "workers": len(run.workers),
        "layout": run.layout,
        "seed": run.seed,
        "forward_steps": run.forward_steps,
        "finisher_steps": run.finisher_steps,
        "stopped_by": run.stopped_by,
        "tokens": summary["tokens"],
    }
    if problem.expected:
        answers = summary["answers_by_budget"]
        entry["answers"] = answers
        entry["right"] = {budget: share_right(answers[budget], problem.expected) for budget in budgets}
    else:
        paragraphs = [text for worker in run.workers for text in worker.paragraphs]
        entry["found_at"] = found.found_at
        entry["right"] = {budget: found.share(budget) for budget in budgets}
        entry["repeats"] = repeats(problem.parts, paragraphs)
    entry["texts"] = {worker.name: worker.paragraphs for worker in run.workers}
    return json.loads(json.dumps(entry))  # as it will be when it is read again: keys are texts


# ---- the file of results


class Results:
    """The file: a first line says what was evaluated and how, then each line is a result.

    A last line without its end, where writing was cut off, is written anew.
    """

    def __init__(self, path: Path, description: dict):
        self.path = path
        with refusing(f"--out {path} cannot be read"):
            written = path.read_bytes() if path.exists() else b""
        self.size = len(written)
        self.whole_lines = written[: written.rfind(b"\n") + 1]
        with refusing(f"--out {path}: it holds no results of this command"):
            # Also where no line is whole yet: whatever else it may be, it would be overwritten.
            is_ours = written.startswith(BEGINNING) or BEGINNING.startswith(written)
            require(is_ours, f"it does not begin with {BEGINNING.decode()}")
            lines = [json.loads(line) for line in self.whole_lines.split(b"\n")[:-1]]
            self.entries: list[dict] = lines[1:]
            self.known = {self._key(entry) for entry in self.entries}
        self.is_new = lines == []
        self.description = description
        if not self.is_new:
            require_same(lines[0]["evaluated"], json.loads(json.dumps(description)), path)

    def __enter__(self) -> "Results":
        target = target_of(self.path)
        self.file = target.open("r+b" if target.exists() else "xb")
        unchanged = is_ours_alone(self.file) and os.fstat(self.file.fileno()).st_size == self.size
        if not unchanged:
            self.file.close()
        require(unchanged, f"--out {self.path}: another command is writing to it")
        self.file.truncate(len(self.whole_lines))
        self.file.seek(0, os.SEEK_END)
        if self.is_new:
            self._write({"evaluated": self.description})
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def has(self, batch: Batch, number: int) -> bool:
        return (number, batch.setting.workers, batch.setting.layout, batch.seed) in self.known

    def add(self, entry: dict) -> None:
        """Append a result, unless it is there: of a batch that was cut off, some are."""
        if self._key(entry) in self.known:
            return
        self._write(entry)
        self.known.add(self._key(entry))
        self.entries.append(entry)

    def _key(self, entry: dict) -> tuple:
        return tuple(entry[name] for name in ("problem", "workers", "layout", "seed"))

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def require_same(theirs: dict, ours: dict, path: Path) -> None:
    """Raise InputError where results have been computed in another way than they would be now."""
    for key, value in ours.items():
        before = theirs.get(key)
        changed = value
        if isinstance(value, dict) and isinstance(before, dict):
            changed = {name: part for name, part in value.items() if before.get(name) != part}
        otherwise = f"its results were computed otherwise; {key} is now {changed}: take another file"
        require(before == value, f"--out {path}: {otherwise}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return run_command(command, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
