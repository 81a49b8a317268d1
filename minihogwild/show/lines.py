"""A run as lines of text: what its workers write, while they write it; in the end the answer and the figures."""

import sys

from ..commands import CONTROL_CODES
from ..workers import Run


class Printer:
    """Prints a run's text as it grows: one worker's as it comes, several workers' line by line, each with its name.

    `with Printer(names) as lines:` and then `lines.show(event)` for each event of the run. Leaving it ends all lines.
    """

    def __init__(self, names: list[str]):
        self.names = names  # of the workers
        self.unfinished = dict.fromkeys(names, "")  # the line that each writer is at, as far as it has come
        # Of writers who are within a paragraph: blank lines since their last line that was not
        self.blank_lines: dict[str, int] = {}

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *error) -> None:
        for name in list(self.unfinished):
            self.end_line(name)

    def show(self, event: dict) -> None:
        if event["do"] == "text":
            self.write(event["worker"], CONTROL_CODES.sub("", event["text"]))
        elif "worker" in event and len(self.names) > 1:
            self.end_line(event["worker"])  # it begins or ends a paragraph, or has retired

    def write(self, name: str, text: str) -> None:
        if len(self.names) == 1:
            print(text, end="", flush=True)
            return
        if name not in self.names:  # a finisher: it speaks after all of them
            for worker in self.names:
                self.end_line(worker)
        whole = self.unfinished.get(name, "") + text
        *lines, self.unfinished[name] = whole.split("\n")
        for line in lines:
            self.print_line(name, line)

    def end_line(self, name: str) -> None:
        """End the writer's line and paragraph: what follows begins a new one."""
        self.write(name, "\n")
        self.blank_lines.pop(name, None)

    def print_line(self, name: str, line: str) -> None:
        """A paragraph keeps its shape, since it may be code: indentation and blank lines, but none around it."""
        is_first = name not in self.blank_lines
        if not line.strip():
            if not is_first:
                self.blank_lines[name] += 1
            return
        for _ in range(self.blank_lines.get(name, 0)):
            print(f"{name}:")
        shape = line.strip() if is_first else line.rstrip()
        print(f"{name}: {shape}", flush=True)
        self.blank_lines[name] = 0


def report(run: Run, pace: float, seconds: float) -> None:
    """The answer, for standard output; figures, for standard error.

    `pace`: steps a second that the run was held to, or 0; `seconds`: how long all of it took.
    """
    if run.answer:
        print("\nAnswer:", CONTROL_CODES.sub("", run.answer), flush=True)
    figures = CONTROL_CODES.sub("", figures_of(run, pace, seconds))  # why it ended may quote what a file held
    print(f"\n{figures}", file=sys.stderr)


def figures_of(run: Run, pace: float, seconds: float) -> str:
    """One line of what a run took, and why it ended."""
    result = run.summary()
    steps = f"{run.forward_steps} forward steps"
    if run.finisher_steps:
        steps += f" + {run.finisher_steps} of the finisher"
    by_worker = ", ".join(f"{worker.name} {worker.sampled}" for worker in run.workers)
    line = (
        f"{steps}, {result['tokens']} tokens ({by_worker}), {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['ms_per_step']:.1f} ms per step; stopped by {run.stopped_by}"
    )
    if pace:
        line += f"; paced at {pace:g} steps a second: {seconds:.1f} s in all"
    return line
