"""A run on a terminal: its history, and below it what each worker is writing, side by side. It reads events alone.

The run takes note of events (`Panes.show`) and never draws; a thread of its own draws, whatever the run waits for. Both
hold `Panes.lock` meanwhile, so no frame shows half an event.
"""

import threading
import time
from dataclasses import dataclass
from math import ceil

from rich import get_console
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.control import Control
from rich.layout import Layout
from rich.panel import Panel
from rich.progress import Progress
from rich.screen import Screen
from rich.segment import Segment, SegmentLines
from rich.text import Text

from ..commands import CONTROL_CODES
from ..workers import Run
from .lines import Printer
from .screen import OtherScreen

COLOURS = ["cyan", "magenta", "green", "yellow", "dodger_blue1", "red", "orange1", "medium_purple"]
CURSOR = "▌"  # stands at the end of what is being written

# What a pane should have: narrow screens have fewer of them side by side, low ones fewer below each other
PANE_WIDTH = 36
PANE_HEIGHT = 5

FRESH_SECONDS = 1.5  # for so long a paragraph in the history keeps its writer's colour
FRAME_SECONDS = 0.1  # from one frame to the next, at least
REST_AFTER_DRAWING = 20  # times what drawing took, at least: screens may be large, and the run needs the processor


class Clock:
    """The time, in seconds. A test has a clock of its own."""

    def now(self) -> float:
        return time.monotonic()

    def computed(self) -> float:
        """For how long this thread has been computing: what others on a busy machine take is not counted."""
        return time.thread_time()


@dataclass
class Paragraph:
    """A finished one, in the history."""

    writer: str
    text: str
    came_at: float  # by the clock


class Panes:
    """Shows a run while it is entered, on the terminal's other screen; then prints it by `lines`, on the first.

    `with Panes(lines, run) as panes:` and then `panes.show(event)` for each of the run's events. Each frame is drawn
    whole, for the size that the screen then has.
    """

    def __init__(self, lines: Printer, run: Run, clock: Clock | None = None):
        self.lines = lines
        self.clock = Clock() if clock is None else clock
        self.console = get_console()

        # What is shown
        self.worker_blocks = {worker.block for worker in run.workers}
        self.finisher_blocks = {finisher.block for finisher in run.finishers}
        self.problem = CONTROL_CODES.sub("", run.problem)
        self.history: list[Paragraph] = []
        self.unfinished = {worker.name: "" for worker in run.workers}  # by writer: the paragraph that it is at
        self.retired: set[str] = set()
        self.steps = 0
        self.tokens = 0
        self.first_step_at = 0.0  # by the clock
        self.prefill = Progress()
        self.prefill_task = self.prefill.add_task("reading the prompt", total=len(run.prompt))
        self.to_print: list[dict] = []  # events for `lines`

        # Who draws it
        self.lock = threading.RLock()
        self.screen = OtherScreen(self.console, self.lock)
        self.thread = threading.Thread(target=self.draw_until_ended, daemon=True)
        self.ended = threading.Event()
        self.failure: Exception | None = None  # of drawing

    def __enter__(self) -> "Panes":
        self.screen.answer_signals()
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        try:
            self.ended.set()
            self.thread.join()
        finally:
            self.screen.give_back()  # in case the thread could not
            self.screen.leave_signals_alone()
        with self.lines:
            for event in self.to_print:
                self.lines.show(event)

    # ---- what has happened

    def show(self, event: dict) -> None:
        """Take note of an event: the next frame shows it. Raises whatever drawing has failed with."""
        with self.lock:
            if event["do"] == "step":
                self.note_step(event)
            else:
                self.note_text(event)
        if self.failure is not None:
            raise self.failure

    def note_step(self, event: dict) -> None:
        """One in which the workers alone write counts as a step; others are the prompt's, or a finisher's."""
        written_to = {view[-1] for view in event["views"]}
        if written_to <= self.worker_blocks:
            if self.steps == 0:
                self.first_step_at = self.clock.now()
            self.steps += 1
            sampled = [token for token in event["sampled"] if token is not None]
            self.tokens += len(sampled)
        elif not written_to & self.finisher_blocks:
            fed = sum(len(ids) for ids in event["tokens"])
            self.prefill.advance(self.prefill_task, fed)

    def note_text(self, event: dict) -> None:
        self.to_print.append(event)
        name = event["worker"]
        if event["do"] == "text":
            text = CONTROL_CODES.sub("", event["text"])
            self.unfinished[name] = self.unfinished.get(name, "") + text
        elif event["do"] == "move":
            paragraph = self.unfinished[name].strip()
            if paragraph:
                self.history.append(Paragraph(name, paragraph, self.clock.now()))
            self.unfinished[name] = ""
        elif event["do"] == "retire":
            self.retired.add(name)

    # ---- when it is drawn

    def draw_until_ended(self) -> None:
        """The thread that draws, from beginning to end."""
        try:
            while not self.ended.is_set():
                pause = self.draw()
                self.ended.wait(pause)
            self.screen.give_back()
        except Exception as error:
            self.failure = error

    def draw(self) -> float:
        """Draw a frame. Returns for how many seconds not to draw another."""
        computed_before = self.clock.computed()
        with self.lock:
            if not self.ended.is_set() and self.screen.take():
                self.console.print(Control.home(), Screen(self.frame()), end="")
        took = self.clock.computed() - computed_before
        return max(FRAME_SECONDS, REST_AFTER_DRAWING * took)

    # ---- how it looks

    def frame(self) -> Layout:
        """The history at the top, below it the panes, and a line of figures at the bottom."""
        width = self.console.width
        height = self.console.height - 1  # without the figures
        rows = self.rows_of_panes(width, height)
        height_of_panes = max(PANE_HEIGHT * len(rows), height // 4)
        history = self.end_of_history(width, max(height - height_of_panes, 1))
        frame = Layout()
        frame.split_column(
            Layout(SegmentLines(history, new_lines=True), size=len(history)),
            *rows,
            Layout(self.figures(), size=1),
        )
        return frame

    def rows_of_panes(self, width: int, height: int) -> list[Layout]:
        """As few rows as the width allows; but no more than leave a third of the height to the history."""
        names = list(self.unfinished)
        side_by_side = max(width // PANE_WIDTH, 1)
        rows_needed = ceil(len(names) / side_by_side)
        rows_allowed = max(height * 2 // 3 // PANE_HEIGHT, 1)
        columns = ceil(len(names) / min(rows_needed, rows_allowed))
        rows = []
        for first in range(0, len(names), columns):
            row = Layout()
            row.split_row(*[self.pane(name) for name in names[first : first + columns]])
            rows.append(row)
        return rows

    def pane(self, name: str) -> Panel:
        colour = self.colour_of(name)
        text = self.unfinished[name].strip()
        if name in self.retired:
            title = f"{name}, done"
            border = "dim"
        else:
            title = name
            border = colour
            text += CURSOR
        return Panel(LastLines(text), title=Text(title, f"bold {colour}"), title_align="left", border_style=border)

    def colour_of(self, name: str) -> str:
        number = list(self.unfinished).index(name)
        return COLOURS[number % len(COLOURS)]

    def end_of_history(self, width: int, height: int) -> list[list[Segment]]:
        """The last lines of the problem and what follows it: as many as there is room for."""
        lines = []
        for paragraph in reversed(self.history):
            if len(lines) < height:
                text = self.coloured(paragraph, end_of(paragraph.text, width, height))
                lines = self.lines_of(text, width) + lines
        if len(lines) < height:
            text = Text(end_of(f"{self.problem}\n", width, height))
            lines = self.lines_of(text, width) + lines
        return lines[-height:]

    def coloured(self, paragraph: Paragraph, words: str) -> Text:
        colour = self.colour_of(paragraph.writer)
        age = self.clock.now() - paragraph.came_at
        colour_of_words = colour if age < FRESH_SECONDS else ""
        return Text.assemble((f"{paragraph.writer}: ", f"bold {colour}"), (words, colour_of_words))

    def lines_of(self, text: Text, width: int) -> list[list[Segment]]:
        return self.console.render_lines(text, self.console.options.update(width=width, height=None))

    def figures(self) -> RenderableType:
        """How far the run has come; before the first step, how much of the prompt has been read."""
        if self.steps == 0:
            return self.prefill
        seconds = max(self.clock.now() - self.first_step_at, 0.001)
        speed = f"{self.tokens / seconds:.1f} tokens/s"
        line = f"step {self.steps} · {self.tokens} tokens · {speed} · {seconds:.0f} s"
        return Text(line, "bold", no_wrap=True)


@dataclass
class LastLines:
    """The last lines of a text: as many as there is room for."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height
        text = Text(end_of(self.text, options.max_width, height))
        lines = console.render_lines(text, options.update(height=None))
        yield SegmentLines(lines[-height:], new_lines=True)


def end_of(text: str, width: int, height: int) -> str:
    """So much of a text's end that it fills the room: to break all of a long one into lines would take too long."""
    room = max(width * height, 1)
    rooms_filled = len(text) // room
    # By whole rooms, so that it seldom begins at another place: each time, all lines may break elsewhere.
    start = max(rooms_filled - 1, 0) * room
    return text[start:]
