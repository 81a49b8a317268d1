"""The panes, frame by frame; and through a pseudo-terminal, as a user of the command has them on the screen."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pyte
import pytest
import rich
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from rich.cells import cell_len
from rich.console import Console
from rich.screen import Screen

from minihogwild.generate import DUET
from minihogwild.layouts import COMMON, HEADER_OTHERS, SEPARATOR, block_of
from minihogwild.prompts import NAMES
from minihogwild.show.lines import Printer
from minihogwild.show.panes import FRESH_SECONDS, Panes

COMMAND = [sys.executable, "-m", "minihogwild.generate"]
ALTERNATE = re.compile(rb"\x1b\[\?1049[hl]")
STATUS = re.compile(r"step (\d+) · (\d+) tokens · [\d.]+ tokens/s · (\d+) s")
FIRST = "Alice: a = 3 + 1: 3+1=4, so a = 4."  # of duet's own problem, the paragraph that closes first
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
ENVIRONMENT |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
slow = pytest.mark.slow


# ---- frames


@pytest.fixture
def console(monkeypatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256", width=80, height=24)
    monkeypatch.setattr(rich, "_console", console)
    return console


class Clock:
    """A clock that goes on when it is told to; each drawing takes `drawing` seconds."""

    def __init__(self, drawing: float = 0.0):
        self.time = 1000.0
        self.drawing = drawing
        self.drawn = 0.0

    def now(self) -> float:
        return self.time

    def computed(self) -> float:
        self.drawn += self.drawing  # asked before a drawing and after it
        return self.drawn


def panes_of(*names: str, problem: str = "1 + 1", prompt_tokens: int = 1, clock: Clock | None = None) -> Panes:
    run = SimpleNamespace(
        workers=[SimpleNamespace(name=name, block=block_of(name)) for name in names],
        finishers=[SimpleNamespace(name="finisher", block="answer by finisher")],
        problem=problem,
        prompt=[0] * prompt_tokens,
    )
    return Panes(Printer(list(names)), run, clock)


def frame(console: Console, panes: Panes) -> list[str]:
    lines = console.render_lines(Screen(panes.frame()), console.options)
    return ["".join(segment.text for segment in line) for line in lines]


def step(*blocks: str, ids: tuple[int, ...] = (1,)) -> dict:
    """Each of the blocks is written to."""
    return {
        "do": "step",
        "views": [[COMMON, block] if block != COMMON else [COMMON] for block in blocks],
        "tokens": [list(ids) for _ in blocks],
        "sampled": [5 if block.startswith("text of ") else None for block in blocks],
        "logits": None,
    }


def text(worker: str, words: str) -> dict:
    return {"do": "text", "worker": worker, "text": words}


def move(worker: str) -> dict:
    return {"do": "move", "from": block_of(worker), "to": COMMON, "worker": worker}


def retire(worker: str) -> dict:
    return {"do": "retire", "worker": worker}


def style_of(console: Console, panes: Panes, words: str) -> str:
    """How the first piece of the frame that holds these words is drawn."""
    for line in console.render_lines(Screen(panes.frame()), console.options):
        for segment in line:
            if words in segment.text:
                return str(segment.style)
    raise AssertionError(f"not to be seen: {words}")


@pytest.mark.parametrize(
    ("workers", "columns", "rows", "side_by_side"),
    [
        (1, 80, 24, 1),
        (2, 140, 40, 2),
        (2, 60, 40, 1),
        (4, 140, 40, 2),
        (4, 60, 40, 1),
        (8, 80, 24, 3),
        (8, 60, 40, 2),
    ],
)
def test_a_frame_has_a_pane_for_each_worker(console, workers, columns, rows, side_by_side):
    console.size = columns, rows
    names = NAMES.split()[:workers]
    panes = panes_of(*names, problem="What is 1 + 1?")
    panes.show(step(*map(block_of, names)))
    for name in names:
        panes.show(text(name, f"{name} writes"))
    lines = frame(console, panes)
    shown = "\n".join(lines)
    assert lines[0].strip() == "What is 1 + 1?"
    assert [shown.count(corner) for corner in "╭╮╰╯"] == [workers] * 4
    places = [
        next((y, line.index(f"─ {name} ─")) for y, line in enumerate(lines) if f" {name} " in line) for name in names
    ]
    assert places == sorted(places)
    assert [y for y, _ in places].count(places[0][0]) == side_by_side
    assert len({style_of(console, panes, f" {name} ") for name in names}) == workers
    assert all(f"{name} writes▌" in shown for name in names)


def test_text_grows_until_its_paragraph_moves_to_the_history(console):
    clock = Clock()
    panes = panes_of("Alice", "Bob", clock=clock)
    panes.show(step(block_of("Alice"), block_of("Bob")))
    for words, so_far in (("a", "a▌"), (" = 4", "a = 4▌"), (".\n\n", "a = 4.▌")):
        panes.show(text("Alice", words))
        assert f"│ {so_far} " in "\n".join(frame(console, panes))
    panes.show(move("Alice"))
    shown = "\n".join(frame(console, panes))
    assert "Alice: a = 4." in shown
    assert "│ ▌ " in shown
    name, words = style_of(console, panes, "Alice: "), style_of(console, panes, "a = 4.")
    assert name == f"bold {words}" != "bold none"
    clock.time += FRESH_SECONDS
    assert style_of(console, panes, "Alice: ") == name
    assert style_of(console, panes, "a = 4.") == "none"


def test_who_has_retired_is_done(console):
    panes = panes_of("Alice", "Bob")
    panes.show(text("Alice", "over"))
    panes.show(retire("Alice"))
    shown = "\n".join(frame(console, panes))
    assert "─ Alice, done ─" in shown
    assert "over▌" not in shown
    assert "─ Bob ─" in shown


def test_the_figures(console):
    clock = Clock()
    panes = panes_of("Alice", "Bob", clock=clock)
    panes.show(step(COMMON))
    clock.time += 5  # before the first step: not counted
    panes.show(step(block_of("Alice"), block_of("Bob")))
    clock.time += 2
    panes.show(step(block_of("Bob")))
    assert frame(console, panes)[-1].strip() == "step 2 · 3 tokens · 1.5 tokens/s · 2 s"


def test_a_finishers_steps_are_not_the_workers(console):
    panes = panes_of("Alice", "Bob")
    panes.show(step(block_of("Alice"), block_of("Bob")))
    panes.show(step(block_of("Alice"), block_of("Bob"), "answer by finisher"))  # also what was sampled last is fed
    panes.show(text("finisher", "So "))
    panes.show(step("answer by finisher"))
    shown = frame(console, panes)
    assert shown[-1].startswith("step 1 · 2 tokens")
    assert "─ finisher ─" in "\n".join(shown)


def test_the_prompt_is_read_with_a_bar(console):
    panes = panes_of("Alice", "Bob", prompt_tokens=8)
    panes.show(step(COMMON, ids=(1, 2, 3, 4)))
    assert re.search("reading the prompt .*━.* 50%", frame(console, panes)[-1])
    panes.show(step(block_of("Alice")))
    assert STATUS.search(frame(console, panes)[-1])


def test_workers_may_be_called_like_blocks(console):
    names = [COMMON, HEADER_OTHERS, SEPARATOR, "finisher's", "text of Bob"]
    panes = panes_of(*names, prompt_tokens=8)
    panes.show(step(COMMON, ids=(1, 2, 3, 4)))
    assert re.search("reading the prompt .* 50%", frame(console, panes)[-1])  # and no step of a worker's
    panes.show(step(HEADER_OTHERS, SEPARATOR, ids=(1, 2)))
    assert re.search("reading the prompt .* 100%", frame(console, panes)[-1])
    panes.show(step(*map(block_of, names)))
    panes.show(text(COMMON, "mine.\n\n"))
    panes.show(move(COMMON))
    shown = frame(console, panes)
    assert shown[-1].startswith("step 1 · 5 tokens")
    assert "common: mine." in [line.strip() for line in shown]
    assert all(f"─ {name} ─" in "\n".join(shown) for name in names)


def test_a_paragraph_that_is_empty_is_not_shown(console):
    panes = panes_of("Alice", "Bob")
    for event in (text("Alice", " \n\n"), move("Alice")):
        panes.show(event)
    assert "Alice:" not in "\n".join(frame(console, panes))


def test_without_colours_there_are_none(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256", width=80, height=24, no_color=True)
    monkeypatch.setattr(rich, "_console", console)
    panes = panes_of("Alice", "Bob")
    for event in (step(block_of("Alice")), text("Alice", "a = 4."), move("Alice"), retire("Bob")):
        panes.show(event)
    panes.draw()
    styles = {style for found in re.findall(r"\x1b\[([\d;]*)m", console.file.getvalue()) for style in found.split(";")}
    assert "1" in styles <= {"0", "1", "2"}  # bold and dim are no colours


@pytest.mark.parametrize("words", ["\n" * 5000, "end", "x" * 5000 + "end", "日" * 5000 + "end", "a\n" * 5000 + "end"])
def test_one_sees_the_end(console, words):
    panes = panes_of("Alice", "Bob")
    for event in (step(block_of("Alice")), text("Alice", words), text("Bob", "here")):
        panes.show(event)
    shown = "\n".join(frame(console, panes))
    assert ("end▌" if "end" in words else "│ ▌ ") in shown
    assert "here▌" in shown
    assert shown.count("╯") == 2
    panes.show(move("Alice"))
    if "end" in words:
        assert "end" in "\n".join(frame(console, panes))


PIECES = ["\n", "\n\n", " ", "\t", "word ", "日本語", "한" * 90, "a" * 300, "😀", "e\u0301", "\u200b", "﷽"]
PIECES += ["\x1b[2J", "\x9b31m", "\x1b]0;title\x07", "\r", "\x08", "[red]x[/red]", ":smile:"]


@examples(80)
@given(data=st.data())
def test_nothing_that_is_written_breaks_the_screen(data):
    names = [f"N{n}" for n in range(data.draw(st.integers(1, 16)))]
    writers = st.sampled_from([*names, "[b]finisher"])
    written = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
    events = st.one_of(
        st.builds(text, writers, written),
        st.builds(move, st.sampled_from(names)),
        st.builds(retire, st.sampled_from(names)),
        st.builds(step, st.sampled_from([*map(block_of, names), COMMON, "answer by finisher"])),
    )
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich, "_console", console)
        panes = panes_of(*names, problem=data.draw(written), prompt_tokens=data.draw(st.integers(0, 5)))
        for event in data.draw(st.lists(events, max_size=40)):
            panes.show(event)
            if data.draw(st.integers(0, 4)) == 0:
                console.size = width, height = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 60))
                lines = frame(console, panes)
                assert len(lines) == height
                assert {cell_len(line) for line in lines} == {width}
                assert all(line.isprintable() for line in (re.sub("[\u200b\u3000]", " ", line) for line in lines))


# ---- when frames are drawn


@given(drawing=st.floats(0, 10))
def test_drawing_takes_a_twentieth_of_the_time_at_most_and_ten_frames_a_second(drawing):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich, "_console", console)
        pause = panes_of("Alice", clock=Clock(drawing)).draw()
    assert drawing <= (drawing + pause) / 20
    assert pause >= 0.1
    assert pause <= max(0.1, 20.001 * drawing)  # and no longer than for that


def wait_until(holds: Callable[[], object]) -> None:
    """However busy the machine is."""
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def frames_in(console: Console) -> int:
    return console.file.getvalue().count("\x1b[H")


def test_frames_are_drawn_while_the_run_waits(console):
    with panes_of("Alice"):
        wait_until(lambda: frames_in(console) >= 3)


def test_logits_are_not_kept():
    """A step's event brings them; those of all steps would take gigabytes."""
    logits = torch.zeros(3)
    gone = weakref.ref(logits)
    panes = panes_of("Alice")
    panes.show(step(block_of("Alice")) | {"logits": logits})
    del logits
    assert gone() is None


def test_a_failure_of_drawing_is_a_failure_of_the_run(console, monkeypatch, capsys):
    def broken() -> None:
        raise OSError("the terminal has gone")

    panes = panes_of("Alice", "Bob")
    monkeypatch.setattr(panes, "frame", broken)
    with panes:
        wait_until(lambda: panes.failure)
        with pytest.raises(OSError, match="has gone"):
            panes.show(text("Alice", "so far"))
    assert not console.is_alt_screen
    assert capsys.readouterr().out == "Alice: so far\n"


# ---- whose the screen is


@pytest.fixture
def asked(console) -> Iterator[list[tuple[int, bool, str]]]:
    """Signals that have come to others than the panes: which, was the screen taken, and what was last said of the
    cursor."""
    seen = []

    def others(number: int, frame: object) -> None:
        cursor = console.file.getvalue().rpartition("\x1b[?25")[2][:1]
        seen.append((number, console.is_alt_screen, cursor))

    earlier = {number: signal.signal(number, others) for number in (signal.SIGTSTP, signal.SIGQUIT)}
    yield seen
    for number, handler in earlier.items():
        assert signal.getsignal(number) is others  # they were put back
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGQUIT])
def test_a_signal_that_stops_or_ends_finds_the_screen_given_back(console, asked, number):
    with panes_of("Alice"):
        for times in (1, 2):
            wait_until(lambda: console.is_alt_screen)
            signal.raise_signal(number)
            assert asked == [(number, False, "h")] * times
            frames = frames_in(console)
            wait_until(lambda: console.is_alt_screen and frames_in(console) > frames)  # noqa: B023
    assert not console.is_alt_screen
    assert console.file.getvalue().endswith("\x1b[?25h\x1b[?1049l")


def test_signals_that_are_ignored_stay_ignored(console):
    earlier = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # as a shell without job control has it
    try:
        with panes_of("Alice"):
            assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTSTP, earlier)


def test_another_thread_may_show_panes(console, asked):
    """Only the main thread can have handlers: there are none, then."""
    shown = []

    def show() -> None:
        with panes_of("Alice"):
            wait_until(lambda: frames_in(console))
            shown.append(True)

    thread = threading.Thread(target=show)
    thread.start()
    thread.join()
    assert shown
    assert not console.is_alt_screen


def test_nothing_is_drawn_in_the_background(console, monkeypatch):
    ours = []
    monkeypatch.setattr("minihogwild.show.screen.is_in_foreground", lambda: bool(ours))
    panes = panes_of("Alice")
    panes.draw()
    assert console.file.getvalue() == ""
    ours.append(True)
    panes.draw()
    assert console.file.getvalue().startswith("\x1b[?1049h")
    assert frames_in(console) == 2  # a screen that is taken is cleared, too
    ours.clear()
    panes.draw()
    assert frames_in(console) == 2


# ---- on a terminal


class Terminal:
    """A program on a pseudo-terminal; `screen` is what one sees, `output` all that was written."""

    def __init__(self, pid: int, fd: int, columns: int, rows: int):
        self.pid, self.fd, self.output, self.alternate = pid, fd, b"", False
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def read(self, seconds: float = 60) -> bool:
        """Read once; False when nothing more will come. What does not come in time is a failure."""
        assert select.select([self.fd], [], [], seconds)[0], f"no output in {seconds} s:\n{self}"
        try:
            new = os.read(self.fd, 2**16)
        except OSError:  # so Linux says that the other end has been closed
            return False
        self.output += new
        for part in re.split(rb"(\x1b\[\?1049[hl])", new):  # pyte knows no other screen: an empty one is near enough
            if ALTERNATE.fullmatch(part):
                self.alternate = part.endswith(b"h")
                self.screen.reset()
            else:
                self.stream.feed(part)
        return bool(new)

    def wait_for(self, what: Callable[[Terminal], object]):
        """What `what` returns, as soon as that is true of a whole frame."""
        return self.wait_until(lambda it: STATUS.search(it.lines[-1]) and what(it))

    def wait_until(self, what: Callable[[Terminal], object]):
        while self.read():
            if seen := what(self):
                return seen
        raise AssertionError(f"it ended before that was seen:\n{self}")

    def end(self) -> int:
        """Read all; the exit code."""
        while self.read():
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    @property
    def lines(self) -> list[str]:
        return self.screen.display

    @property
    def cursor_is_hidden(self) -> bool:
        return self.output.rfind(b"\x1b[?25l") > self.output.rfind(b"\x1b[?25h")

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def remains(self) -> str:
        """What was written after the panes had gone."""
        return ALTERNATE.split(self.output)[-1].decode().replace("\r\n", "\n")

    def place(self, text: str) -> tuple[int, int]:
        """(row, column) of a text that is on the screen once."""
        [place] = [(y, line.index(text)) for y, line in enumerate(self.lines) if text in line]
        return place


@contextmanager
def terminal(
    *arguments: object, program: list[str] = COMMAND, columns: int = 80, rows: int = 24, **environment: str
) -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background may have it ignored
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.execve(program[0], [*program, *map(str, arguments)], ENVIRONMENT | environment)
    running = Terminal(pid, fd, columns, rows)
    try:
        yield running
    finally:
        if running.pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


@pytest.fixture(scope="module")
def piped() -> str:
    """What the command prints where no terminal is; what is there to be coloured or drawn may not be."""
    done = subprocess.run(
        COMMAND, capture_output=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT | {"FORCE_COLOR": "1"}, timeout=300
    )
    assert b"\x1b" not in done.stdout + done.stderr
    assert FIRST in done.stdout.decode()
    return (done.stdout + done.stderr).decode()


def without_times(text: str) -> str:
    """Nor what says that it was paced: what is piped is not."""
    text = re.sub(r"; paced at .* in all", "", text)
    return re.sub(r"[\d.]+ (?=tokens/s|ms per step)", "", text)


@slow
@pytest.mark.parametrize(
    ("workers", "columns", "rows", "side_by_side"),
    [
        (1, 80, 24, 1),
        (2, 140, 40, 2),
        (2, 60, 40, 1),
        (4, 140, 40, 2),
        (4, 60, 40, 1),
        (8, 80, 24, 3),
        (8, 60, 40, 2),
    ],
)
def test_a_pane_for_each_worker(workers, columns, rows, side_by_side):
    names = NAMES.split()[:workers]

    def all_there(terminal: Terminal) -> bool:
        return all(f"─ {name} ─" in str(terminal) for name in names) and (workers == 1 or FIRST in str(terminal))

    with terminal("--workers", workers, "--pace", 30, columns=columns, rows=rows) as it:
        it.wait_for(all_there)
        titles = [it.place(f"─ {name} ─") for name in names]
        assert titles == sorted(titles)
        assert [y for y, _ in titles].count(titles[0][0]) == side_by_side
        colours = {it.screen.buffer[y][x].fg for y, x in titles}
        assert len(colours) == workers
        text = [it.screen.buffer[y + 1][x + 1] for y, x in titles]  # of each, the first character
        assert all(cell.data.strip() for cell in text)
        assert str(it).count("╭") == str(it).count("╮") == str(it).count("╰") == str(it).count("╯") == workers
        if workers > 1:
            assert it.place(FIRST)[0] < titles[0][0]
            assert it.screen.buffer[it.place(FIRST)[0]][0].fg == it.screen.buffer[titles[0][0]][titles[0][1] + 2].fg


@slow
def test_text_grows_and_a_closed_paragraph_moves_to_the_history():
    with terminal("--pace", 30, columns=140, rows=40) as it:
        growing = []
        while True:
            it.wait_for(lambda it: True)
            if FIRST in str(it):
                break
            if "─ Alice ─" in str(it):
                y, x = it.place("─ Alice ─")
                growing.append(it.lines[y + 1][x + 1 : 60].strip(" │▌"))
        assert len(set(growing)) >= 2
        assert all(FIRST.startswith(f"Alice: {text}") for text in growing)
        y, _ = it.place(FIRST)
        assert it.screen.buffer[y][10].fg == it.screen.buffer[y][0].fg != "default"  # it is new,
        assert FIRST[7:] not in it.lines[it.place("─ Alice ─")[0] + 1]
        it.wait_for(lambda it: int(STATUS.search(it.lines[-1])[3]) >= 4)
        y, _ = it.place(FIRST)
        assert it.screen.buffer[y][10].fg == "default" != it.screen.buffer[y][0].fg  # and later is not


@slow
def test_the_status():
    with terminal("--pace", 40) as it:
        began = time.monotonic()
        it.wait_for(lambda it: int(STATUS.search(it.lines[-1])[1]) >= 100)
        seconds = time.monotonic() - began
        steps, tokens, elapsed = map(int, STATUS.search(it.lines[-1]).groups())
        assert steps < tokens <= 2 * steps
        assert 2 <= elapsed <= seconds + 1  # a hundred steps take two seconds and a half at least
        assert it.end() == 0
        assert "235 forward steps, 422 tokens" in it.remains


@slow
def test_resizing():
    with terminal("--pace", 10, columns=140, rows=40) as it:
        it.wait_for(lambda it: FIRST in str(it))
        for columns, rows in ((60, 30), (25, 8), (10, 3), (200, 50), (80, 24)):
            it.resize(columns, rows)
            frames = it.output.count(b"\x1b[H")
            while it.output.count(b"\x1b[H") < frames + 3:  # the first may have been on its way
                assert it.read()
            if columns < 60:
                continue
            it.wait_for(lambda it: it.lines[0].startswith("a = 3 + 1") or FIRST in str(it))
            assert str(it).count("╭") == str(it).count("╯") == 2
            (alice, _), (bob, _) = it.place("─ Alice ─"), it.place("─ Bob ─")
            assert (alice == bob) == (columns >= 80)
            assert all(line[0] in "╭│╰" and line[columns - 1] in "╮│╯" for line in it.lines[alice:-1])
        os.kill(it.pid, signal.SIGINT)
        assert it.end() == 130


@slow
def test_no_color():
    with terminal("--pace", 0, "--max-steps", 60, NO_COLOR="1") as it:
        assert it.end() == 0
        styles = {style for styles in re.findall(rb"\x1b\[([\d;]*)m", it.output) for style in styles.split(b";")}
        assert b"1" in styles <= {b"0", b"1", b"2"}  # bold and dim are no colours


# ---- what remains on a terminal


@slow
def test_the_transcript_remains(piped):
    with terminal("--pace", 0) as it:
        assert it.end() == 0
        before, _, panes, _, after = re.split(rb"(\x1b\[\?1049[hl])", it.output)
        assert b"step " in panes
        assert b"\x1b" not in after
        shown = before.decode().replace("\r\n", "\n").rpartition("\r")[2]  # after the bars, which erase themselves
        problem = shown.partition("\n\n")[0]
        assert without_times(f"{problem}\n\n{it.remains}") == without_times(piped)
        assert not it.cursor_is_hidden


@pytest.mark.parametrize("interrupt", [
    lambda it: it.type(b"\x03"),
    pytest.param(lambda it: os.kill(it.pid, signal.SIGTERM), marks=slow),
], ids=["Ctrl-C", "SIGTERM"])  # fmt: skip
def test_an_interrupt_leaves_the_terminal_as_it_was(interrupt):
    with terminal("--pace", 20) as it:
        before = termios.tcgetattr(it.fd)
        it.wait_for(lambda it: FIRST in str(it) and re.search("│ d = 46 .*│ a. b = 254", str(it)))
        interrupt(it)
        assert it.end() == 130
        assert not it.alternate
        assert not it.cursor_is_hidden
        assert termios.tcgetattr(it.fd) == before
        assert "Traceback" not in it.remains
        assert "stopped by interrupt" in it.remains
        first, *lines = it.remains.partition("\n\n")[0].splitlines()
        assert first.endswith(FIRST)  # the terminal itself may have put a ^C before it
        assert any(line.startswith("Alice: d = 46 ") for line in lines)
        assert any(line.startswith("Bob: a? b = 254 ") for line in lines)


def test_control_backslash_ends_it_and_gives_the_screen_back():
    with terminal("--pace", 20) as it:
        before = termios.tcgetattr(it.fd)
        it.wait_for(lambda it: True)
        it.type(b"\x1c")
        assert it.end() == -signal.SIGQUIT
        assert not it.alternate
        assert not it.cursor_is_hidden
        assert termios.tcgetattr(it.fd) == before


def test_control_z_in_a_shell():
    """Stopped, it leaves the shell its screen, also where it goes on in the background; `fg` brings the panes back."""
    shell = ["/bin/bash", "--norc", "--noprofile", "-i"]
    with terminal(program=shell, columns=140, PS1="$ ") as it:
        it.type(f"{' '.join(COMMAND)} --pace 4\n".encode())
        it.wait_for(lambda it: it.alternate)
        for _ in range(2):
            it.type(b"\x1a")
            it.wait_until(lambda it: "Stopped" in str(it))
            assert not it.alternate
            assert not it.cursor_is_hidden
            it.type(b"fg\n")
            it.wait_for(lambda it: it.alternate and it.cursor_is_hidden)
        it.type(b"\x1a")
        it.wait_until(lambda it: "Stopped" in str(it))
        taken = it.output.count(b"\x1b[?1049h")
        it.type(b"bg\nsleep 1; echo still the she''ll\n")
        it.wait_until(lambda it: "still the shell" in str(it))
        assert it.output.count(b"\x1b[?1049h") == taken
        it.type(b"fg\n")
        it.wait_for(lambda it: it.alternate)
        it.type(b"\x03")
        it.wait_until(lambda it: "stopped by interrupt" in str(it))
        assert not it.alternate
        assert not it.cursor_is_hidden


@slow
@pytest.mark.parametrize(("arguments", "environment"), [(["--plain"], {}), ([], {"TERM": "dumb"})])
def test_plain(piped, arguments, environment):
    with terminal(*arguments, "--pace", 0, **environment) as it:
        assert it.end() == 0
        assert not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", it.output)
        assert without_times(it.remains) == without_times(piped)


@slow
def test_an_error_is_shown(tmp_path):
    with terminal("1 + 1", "--model", tmp_path) as it:
        assert it.end() == 2
        assert not it.alternate
        assert "config.json" in str(it)


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as has one repository, duet."""

    def do_GET(self) -> None:
        path = DUET / self.path.partition("?")[0].rpartition("/")[2]
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in DUET.iterdir()
        ]
        about = {"id": "a/duet", "sha": "0" * 40, "siblings": [{"rfilename": file["path"]} for file in files]}
        answer = json.dumps(files if "/tree/" in self.path else about).encode()
        answer = path.read_bytes() if "/resolve/" in self.path else answer
        self.send_response(200)
        headers = {"Content-Length": len(answer), "ETag": f'"{path.name}"', "X-Repo-Commit": "0" * 40}
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@slow
@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_downloading_and_loading_show_bars_that_leave_nothing_behind(plain, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        with terminal("a = 1 + 2", "--model", "a/duet", "--max-steps", 2, *plain, **here) as it:
            assert it.end() == 0
            for what in (r"Fetching \d+ files: +0%", "loading: +0%"):
                assert bool(re.search(what.encode(), it.output)) == (not plain)
            assert (b"\x1b" in it.output) == (not plain)
            shown = str(it)
        hub.shutdown()
    assert re.fullmatch(r"Alice: .*\n\s*Bob: .*\n\s*2 forward steps.*\n.* steps.*\s*", shown)
