"""The command: workers solve a problem together, and one watches. `python -m minihogwild.generate --help`"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich import get_console

from . import interrupts
from .backend import choose_backend
from .commands import (
    CONTROL_CODES,
    DUET,
    Parser,
    add_model_options,
    add_sampling_options,
    message_of,
    run_command,
    sampling_asked_for,
    spare_threads,
    warn_without_template,
)
from .errors import refusing, require
from .files import require_all_writable, write_whole
from .hub import fetch, files_of, load
from .layouts import LAYOUTS
from .plan import plan
from .prompts import Prompts, load_prompts, prompts_of
from .replay import digest, schedule_json
from .show.lines import Printer, report
from .workers import Run, drive

BYTE_ORDER_MARK = "\ufeff"
LONGEST_INPUT = 2**27  # bytes


def arguments() -> Parser:
    parser = Parser("minihogwild", description="Several workers, one language model, one shared attention cache.")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the problem; -: standard input; none: that, else the model's own")
    add("--model", default=str(DUET), help="a model folder, or a hub repository's name (default: duet, bundled)")
    add("--workers", type=int, default=2, choices=range(1, 17), metavar="N", help="1 to 16 (default: 2)")
    add("--layout", choices=LAYOUTS, help="what workers see of each other (default: combined; independent for one)")
    add("--max-steps", type=int, default=1024, metavar="N", help="forward passes after the prompt (default: 1024)")
    add_sampling_options(parser)
    add("--seed", type=int, default=0, help="same seed, same text, on the same machine and dtype (default: 0)")
    add("--prompts", type=Path, metavar="FILE", help="the words that make workers cooperate, as JSON")
    add_model_options(parser)
    add("--pace", type=float, metavar="N", help="at most N steps a second; 0: any (default: what the model's own words "
        "ask for where the run is drawn on a terminal, as duet's do; else 0)")  # fmt: skip
    add("--plan", action="store_true", help="run nothing: tell from config.json on which cards the model fits, in "
        "how many bits, with how many workers")  # fmt: skip
    add("--plain", action="store_true", help="on a terminal too, print line by line and draw nothing")
    add("--json", type=Path, metavar="FILE", help="write the result, with each worker's text and token ids")
    add("--record", type=Path, metavar="FILE", help="write the run's schedule, for minihogwild.replay")
    add("--trace", type=Path, metavar="FILE", help="write an HTML page: what each worker saw and attended to, by step, "
        "layer and head (where that is too much for a page: by layer, or on average)")  # fmt: skip
    return parser


def command(options: argparse.Namespace) -> int:
    """Check all that can be checked, load, run, write. Returns the exit code."""
    if options.plan:
        require_options_of_plan(options)
        print(plan(options.model, options.dtype, options.context))
        return 0
    heads_are_here = options.ranks is None
    require(heads_are_here or options.trace is None, "--trace: it shows all heads, so run it in one process")
    is_drawn = prepare_terminal(options)
    sampling = sampling_asked_for(options)
    require_pace(options.pace)
    folder = fetch(options.model)
    require_outputs(options, folder)
    prompts = load_prompts(options.prompts) if options.prompts else prompts_of(folder)
    prompt = read_prompt(options.prompt, prompts.problem)

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
    run = Run(
        model,
        prompt,
        options.workers,
        options.layout,
        options.max_steps,
        replace(model.sampling, **sampling),
        options.seed,
        prompts,
        backend=choose_backend(model.device, model.dtype, options.kernels == "auto", model.ranks),
    )
    warn_without_template(model)
    if options.prompt is None and prompt == prompts.problem:
        print(CONTROL_CODES.sub("", prompt), end="\n\n", flush=True)
    return run_and_write(run, options, is_drawn, pace_of(options, prompts, is_drawn))


# ---- before the run


def prepare_terminal(options: argparse.Namespace) -> bool:
    """Is the run to be drawn? Where it is not, nothing draws progress bars on a terminal either."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    can_draw = is_terminal and get_console().is_interactive  # not where TERM is dumb
    is_drawn = can_draw and not options.plain
    if options.plain or (is_terminal and not is_drawn):
        disable_progress_bars()
    return is_drawn


def require_options_of_plan(options: argparse.Namespace) -> None:
    """Raise InputError for an option that would be ignored."""
    parser = arguments()
    for name, value in vars(options).items():
        is_given = value != parser.get_default(name)
        option = "PROMPT" if name == "prompt" else "--" + name.replace("_", "-")
        taken = name in ("plan", "model", "dtype", "context", "ranks")
        require(taken or not is_given, f"--plan takes --model, --dtype and --context, not {option}")


def require_pace(pace: float | None) -> None:
    if pace is not None:
        require(pace == 0 or 0.01 <= pace < float("inf"), f"pace is {pace}: it must be 0 (none), or 0.01 or more")


def pace_of(options: argparse.Namespace, prompts: Prompts, is_drawn: bool) -> float:
    """Steps a second at most; 0: as fast as can be. Only who watches, and a model made to be watched, is slowed."""
    if options.pace is not None:
        return options.pace
    return prompts.pace if is_drawn else 0


def outputs_of(options: argparse.Namespace) -> dict[str, Path]:
    """The files that were asked for, by option."""
    asked = {"--json": options.json, "--record": options.record, "--trace": options.trace}
    return {option: path for option, path in asked.items() if path is not None}


def require_outputs(options: argparse.Namespace, folder: Path) -> None:
    """Raise InputError for a file that can't be written, or that is read or written otherwise."""
    read = files_of(folder)
    if options.prompts is not None:
        read.append(options.prompts)
    require_all_writable(outputs_of(options), read)


def read_prompt(given: str | None, default: str) -> str:
    """The problem: as given, from standard input, or the default where neither says anything."""
    if given is None or given == "-":
        text = read_standard_input(wait_for_typing=given == "-")
        given = default if given is None and not text.strip() else text
    require(given.strip(), "the prompt is empty: give it as an argument, or on standard input")
    return given


def read_standard_input(wait_for_typing: bool) -> str:
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty() and not wait_for_typing:
        return ""
    parts = []
    room = LONGEST_INPUT
    with refusing("standard input"):
        while (part := sys.stdin.buffer.read(2**16)) != b"":
            if part is None:  # whoever started us has left it so that it does not wait, and nothing has come yet
                time.sleep(0.01)
                continue
            room -= len(part)
            require(room >= 0, f"it holds more than {LONGEST_INPUT:,} bytes, and no context does")  # or never ends
            parts.append(part)
    text = b"".join(parts).decode("utf-8", "surrogateescape")
    # What editors and shells put around a text is no part of it, and a newline is one character.
    return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").rstrip("\n")


# ---- the run


def run_and_write(run: Run, options: argparse.Namespace, is_drawn: bool, pace: float) -> int:
    """Show the run while it goes on; write and tell what it gave, also where it failed or was interrupted."""
    view = Printer([worker.name for worker in run.workers])
    if is_drawn:
        from .show.panes import Panes  # not above: where nothing is drawn, nothing of it is imported

        view = Panes(view, run)
    digests = []  # of each step's logits, if the run is recorded
    began = time.monotonic()
    failures = []
    with interrupts.Interrupts(run.stop) as signals:
        try:
            with view:
                for event in events_at_pace(run, pace, signals):
                    if event["do"] == "step" and options.record:
                        digests.append(digest(event["logits"]))
                    view.show(event)
        except KeyboardInterrupt:
            run.stopped_by = "interrupt"
        except Exception as error:  # whatever it is: what was computed until then is kept
            run.stopped_by = f"error: {message_of(error)}"
            failures.append(error)
        seconds = time.monotonic() - began
        signals.keep_all()
        if run.history or not failures:  # else nothing was computed, and there is nothing to tell
            failures += write_results(run, options, digests)
            output_is_closed = any(isinstance(failure, BrokenPipeError) for failure in failures)
            if not output_is_closed:
                report(run, pace, seconds)
    if failures:
        raise failures[0]
    return 130 if run.stopped_by == "interrupt" else 0


def events_at_pace(run: Run, pace: float, signals: interrupts.Interrupts) -> Iterator[dict]:
    """The run's events; at most `pace` steps a second, if that is not 0."""
    if pace == 0:
        yield from run
        return
    due = time.monotonic()
    # Step by step: the time of a step that goes on while we wait would be nobody's.
    for event in drive(run, run.new_cache()):
        if event["do"] == "step":
            signals.sleep(due - time.monotonic())
            due = max(due, time.monotonic()) + 1 / pace
        yield event


def write_results(run: Run, options: argparse.Namespace, digests: list[str]) -> list[Exception]:
    """Write each file that was asked for; what could not be written, as errors: one must not cost the others."""
    contents: dict[str, Callable[[], bytes]] = {
        "--json": lambda: json.dumps(run.summary(), ensure_ascii=False, indent=2).encode() + b"\n",
        "--record": lambda: schedule_json(run.blocks, with_digests(run.history, digests), bans_of(run)),
        "--trace": lambda: trace_page(run),
    }
    failures = []
    for option, path in outputs_of(options).items():
        try:
            write_whole(path, [contents[option]()])
        except Exception as error:
            failures.append(error)
    return failures


def with_digests(history: list[dict], digests: list[str]) -> list[dict]:
    """The run's events, each step with the hash of its logits (the last steps without, if the run was cut off)."""
    remaining = iter(digests)
    events = []
    for event in history:
        found = next(remaining, None) if event["do"] == "step" else None
        events.append(event if found is None else event | {"digest": found})
    return events


def bans_of(run: Run) -> dict[str, list[int]]:
    return {"banned": run.banned, "banned_first": run.banned_first}


def trace_page(run: Run) -> bytes:
    from .show.trace import page  # not above: what watches is no part of the engine

    names = {writer.block: writer.name for writer in run.workers + run.finishers}
    return page(run.blocks, run.history, run.model, run.summary(), names, run.backend)


def main(argv: list[str] | None = None) -> int:
    """The command `minihogwild`."""
    return run_command(command, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
