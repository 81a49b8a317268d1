"""A run on a terminal: the history, and below it what each worker is writing, side by side. It reads events alone."""

import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from math import ceil

from rich import get_console
from rich.console import Console, ConsoleOptions, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.segment import Segment, SegmentLines
from rich.text import Text

from .commands import CONTROL_CODES

COLOURS = "cyan", "magenta", "green", "yellow", "dodger_blue1", "red", "orange1", "medium_purple"
WIDTH, HEIGHT = 36, 5  # that a pane should have: narrow screens have fewer side by side, low ones fewer rows
FRESH = 1.5  # seconds for which a paragraph in the history keeps its writer's colour


@lru_cache(256)  # it is drawn many times, and does not change
def lines_of(name: str, colour: str, fresh: bool, paragraph: str, width: int) -> list[list[Segment]]:
    text = Text.assemble((f"{name}: " if name else "", f"bold {colour}"), (paragraph, colour if fresh else ""))
    return get_console().render_lines(text, get_console().options.update(width=width, height=None))


@dataclass
class Tail:
    """The last lines of a text, as many as there is room for."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(options.max_width * options.height, 1)
        start = max(len(self.text) // room - 1, 0) * room  # moves rarely, as all lines may then wrap anew
        lines = console.render_lines(Text(self.text[start:]), options.update(height=None))
        yield SegmentLines(lines[-options.height :], new_lines=True)


class Panes(Live):
    """Shows a run while it is entered, on the terminal's other screen; what it showed is printed when that has gone.

    Each frame is drawn whole, for the size that the screen then has: as events come, and by a thread of rich's while
    a long step lets none come.
    """

    def __init__(self, printer, problem: str, prompt_tokens: int):
        self.printer, self.told = printer, []
        self.writing = dict.fromkeys(printer.workers, "")  # by writer: its unfinished paragraph
        self.history = [("", CONTROL_CODES.sub("", problem) + "\n", 0.0)]  # (writer, paragraph, when it came)
        self.retired: set[str] = set()
        self.steps = self.tokens = 0
        self.began, self.due = time.monotonic(), 0.0
        self.prefill = Progress()
        self.prefill.add_task("reading the prompt", total=prompt_tokens)
        super().__init__(get_renderable=self.frame, screen=True, refresh_per_second=5)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        with self.printer:
            for event in self.told:
                self.printer.show(event)

    def show(self, event: dict) -> None:
        """Take note of an event, and draw if it is time."""
        self.told.append(event)
        name = event.get("worker", event.get("from"))
        if event["do"] == "text":
            self.writing[name] = self.writing.get(name, "") + CONTROL_CODES.sub("", event["text"])
        elif event["do"] == "move":
            if paragraph := self.writing[name].strip():
                self.history.append((name, paragraph, time.monotonic()))
            self.writing[name] = ""
        elif event["do"] == "retire":
            self.retired.add(name)
        elif event["do"] == "step" and event["views"][0][-1] in self.printer.workers:
            self.began = self.began if self.steps else time.monotonic()
            self.steps += 1
            self.tokens += sum(token is not None for token in event["sampled"])
        elif event["do"] == "step":
            self.prefill.advance(self.prefill.task_ids[0], sum(map(len, event["tokens"])))
        self.refresh()

    def refresh(self) -> None:
        """Draw, ten times a second at most, and for a twentieth of the time at most: screens may be large."""
        if (now := time.monotonic()) >= self.due:
            self.due, began = now + 0.1, time.thread_time()
            super().refresh()
            self.due = max(self.due, now + 20 * (time.thread_time() - began))

    def frame(self) -> Layout:
        width, height = self.console.width, self.console.height - 1
        names, now = list(self.writing), time.monotonic()
        colours = {"": "", **dict(zip(names, cycle(COLOURS)))}
        rows = min(ceil(len(names) / max(width // WIDTH, 1)), max(height * 2 // 3 // HEIGHT, 1))
        columns, rows = ceil(len(names) / rows), []
        for n in range(0, len(names), columns):
            rows.append(Layout())
            rows[-1].split_row(*[self.pane(name, colours[name]) for name in names[n : n + columns]])
        lines = []
        for name, text, came in self.history[-height:]:
            lines += lines_of(name, colours[name], now - came < FRESH, text, width)
        lines = lines[-max(height - max(HEIGHT * len(rows), height // 4), 1) :]
        seconds = max(now - self.began, 0.001)
        status = f"step {self.steps} · {self.tokens} tokens · {self.tokens / seconds:.1f} tokens/s · {seconds:.0f} s"
        frame = Layout()
        frame.split_column(
            Layout(SegmentLines(lines, new_lines=True), size=len(lines)),
            *rows,
            Layout(Text(status, "bold", no_wrap=True) if self.steps else self.prefill, size=1),
        )
        return frame

    def pane(self, name: str, colour: str) -> Panel:
        done = name in self.retired
        text = Tail(self.writing[name].strip() + ("" if done else "▌"))
        title = Text(f"{name}, done" if done else name, f"bold {colour}")
        return Panel(text, title=title, title_align="left", border_style="dim" if done else colour)
