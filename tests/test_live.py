"""The panes, seen through a pseudo-terminal: what a user of the command has on the screen, and what remains there."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyte
import pytest
import rich
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.screen import Screen

from minihogwild.generate import DUET, Printer
from minihogwild.live import Panes
from minihogwild.prompts import NAMES

COMMAND = [sys.executable, "-m", "minihogwild.generate"]
ALTERNATE = re.compile(rb"\x1b\[\?1049[hl]")
STATUS = re.compile(r"step (\d+) · (\d+) tokens · [\d.]+ tokens/s · (\d+) s")
FIRST = "Alice: a = 3 + 1: 3+1=4, so a = 4."  # of duet's own problem, the paragraph that closes first
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
ENVIRONMENT |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


class Terminal:
    """The command on a pseudo-terminal; `screen` is what one sees, `output` all that was written."""

    def __init__(self, pid: int, fd: int, columns: int, rows: int):
        self.pid, self.fd, self.output, self.alternate = pid, fd, b"", False
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

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
        while self.read():
            if STATUS.search(self.lines[-1]) and (seen := what(self)):
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
def terminal(*arguments: object, columns: int = 80, rows: int = 24, **environment: str) -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background may have it ignored
        os.execve(sys.executable, [*COMMAND, *map(str, arguments)], ENVIRONMENT | environment)
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
    return re.sub(r"[\d.]+ (?=tokens/s|ms per step)", "", text)


# ---- what one sees


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
        assert len(set(growing)) >= 4
        assert all(FIRST.startswith(f"Alice: {text}") for text in growing)
        y, _ = it.place(FIRST)
        assert it.screen.buffer[y][10].fg == it.screen.buffer[y][0].fg != "default"  # it is new,
        assert FIRST[7:] not in it.lines[it.place("─ Alice ─")[0] + 1]
        it.wait_for(lambda it: int(STATUS.search(it.lines[-1])[3]) >= 4)
        y, _ = it.place(FIRST)
        assert it.screen.buffer[y][10].fg == "default" != it.screen.buffer[y][0].fg  # and later is not


def test_the_status_and_how_often_it_is_drawn():
    with terminal("--pace", 40) as it:
        it.wait_for(lambda it: True)
        began, frames = time.monotonic(), it.output.count(b"\x1b[H")
        it.wait_for(lambda it: int(STATUS.search(it.lines[-1])[1]) >= 100)
        seconds, frames = time.monotonic() - began, it.output.count(b"\x1b[H") - frames
        assert frames <= 11 * seconds
        assert frames >= 3 * seconds  # 10 on a quiet machine
        steps, tokens, elapsed = map(int, STATUS.search(it.lines[-1]).groups())
        assert steps < tokens <= 2 * steps
        assert 2 <= elapsed <= seconds + 2
        assert it.end() == 0
        assert "235 forward steps, 422 tokens" in it.remains


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


def test_no_color():
    with terminal("--pace", 0, "--max-steps", 60, NO_COLOR="1") as it:
        assert it.end() == 0
        styles = {style for styles in re.findall(rb"\x1b\[([\d;]*)m", it.output) for style in styles.split(b";")}
        assert b"1" in styles <= {b"0", b"1", b"2"}  # bold and dim are no colours


# ---- what remains


def test_the_transcript_remains(piped):
    with terminal("--pace", 0) as it:
        assert it.end() == 0
        before, _, panes, _, after = re.split(rb"(\x1b\[\?1049[hl])", it.output)
        assert b"step " in panes
        assert b"\x1b" not in after
        shown = before.decode().replace("\r\n", "\n").rpartition("\r")[2]  # after the bars, which erase themselves
        problem = shown.partition("\n\n")[0]
        assert without_times(f"{problem}\n\n{it.remains}") == without_times(piped)
        assert it.output.rindex(b"\x1b[?25h") > it.output.rindex(b"\x1b[?25l")


@pytest.mark.parametrize("interrupt", [
    lambda it: os.write(it.fd, b"\x03"),
    lambda it: os.kill(it.pid, signal.SIGTERM),
], ids=["Ctrl-C", "SIGTERM"])  # fmt: skip
def test_an_interrupt_leaves_the_terminal_as_it_was(piped, interrupt):
    with terminal("--pace", 20) as it:
        before = termios.tcgetattr(it.fd)
        it.wait_for(lambda it: FIRST in str(it) and re.search("│ d = 46 .*│ a. b = 254", str(it)))
        interrupt(it)
        assert it.end() == 130
        assert not it.alternate
        assert not it.screen.cursor.hidden
        assert termios.tcgetattr(it.fd) == before
        assert "Traceback" not in it.remains
        assert "stopped by interrupt" in it.remains
        first, *lines = it.remains.partition("\n\n")[0].splitlines()
        assert first.endswith(FIRST)  # the terminal itself may have put a ^C before it
        assert any(line.startswith("Alice: d = 46 ") for line in lines)
        assert any(line.startswith("Bob: a? b = 254 ") for line in lines)
        assert all(line in piped for line in lines)  # the beginnings of what would have come


@pytest.mark.parametrize(("arguments", "environment"), [(["--plain"], {}), ([], {"TERM": "dumb"})])
def test_plain(piped, arguments, environment):
    with terminal(*arguments, "--pace", 0, **environment) as it:
        assert it.end() == 0
        assert not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", it.output)
        assert without_times(it.remains) == without_times(piped)


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
    assert re.fullmatch(r"Alice: .*\n\s*Bob: .*\n\s*2 forward steps.*\n.* steps\s*", shown)


def test_the_engine_knows_nothing_of_it():
    code = "import sys, minihogwild.generate; sys.exit('minihogwild.live' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


# ---- whatever is written


@pytest.fixture
def console(monkeypatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256", width=80, height=24)
    monkeypatch.setattr(rich, "_console", console)
    return console


def frame(console: Console, panes: Panes) -> list[str]:
    lines = console.render_lines(Screen(panes.frame()), console.options)
    return ["".join(segment.text for segment in line) for line in lines]


def step(block: str, *tokens: int) -> dict:
    return {"do": "step", "views": [["common", block]], "tokens": [list(tokens)], "sampled": [5]}


def text(worker: str, text: str) -> dict:
    return {"do": "text", "worker": worker, "text": text}


PIECES = ["\n", "\n\n", " ", "\t", "word ", "日本語", "한" * 90, "a" * 300, "😀", "e\u0301", "\u200b", "﷽"]
PIECES += ["\x1b[2J", "\x9b31m", "\x1b]0;title\x07", "\r", "\x08", "[red]x[/red]", ":smile:"]


@settings(max_examples=150)
@given(data=st.data())
def test_nothing_that_is_written_breaks_the_screen(data):
    names = [f"N{n}" for n in range(data.draw(st.integers(1, 16)))]
    writers = st.sampled_from([*names, "[b]finisher"])
    written = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
    events = st.one_of(
        st.builds(text, writers, written),
        st.builds(lambda name: {"do": "move", "from": name, "to": "common"}, st.sampled_from(names)),
        st.builds(lambda name: {"do": "retire", "worker": name}, st.sampled_from(names)),
        st.builds(step, st.sampled_from([*names, "common"]), st.integers(0, 9)),
    )
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich, "_console", console)
        panes = Panes(Printer(names), data.draw(written), data.draw(st.integers(0, 5)))
        for event in data.draw(st.lists(events, max_size=40)):
            panes.show(event)
            if data.draw(st.integers(0, 4)) == 0:
                console.size = width, height = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 60))
                lines = frame(console, panes)
                assert len(lines) == height
                assert {cell_len(line) for line in lines} == {width}
                assert all(line.isprintable() for line in (re.sub("[\u200b\u3000]", " ", line) for line in lines))


@pytest.mark.parametrize("words", ["\n" * 5000, "end", "x" * 5000 + "end", "日" * 5000 + "end", "a\n" * 5000 + "end"])
def test_one_sees_the_end(console, words):
    panes = Panes(Printer(["Alice", "Bob"]), "1 + 1", 1)
    for event in (step("Alice", 1), text("Alice", words), text("Bob", "here")):
        panes.show(event)
    shown = "\n".join(frame(console, panes))
    assert ("end▌" if "end" in words else "│ ▌ ") in shown
    assert "here▌" in shown
    assert shown.count("╯") == 2


def test_the_prompt_is_read_with_a_bar(console):
    panes = Panes(Printer(["Alice", "Bob"]), "1 + 1", 8)
    panes.show(step("common", 1, 2, 3, 4))
    assert re.search("reading the prompt .*━.* 50%", frame(console, panes)[-1])
    panes.show(step("Alice", 5))
    assert STATUS.search(frame(console, panes)[-1])


def test_a_paragraph_that_is_empty_is_not_shown(console):
    panes = Panes(Printer(["Alice", "Bob"]), "1 + 1", 1)
    for event in (text("Alice", " \n\n"), {"do": "move", "from": "Alice", "to": "common"}):
        panes.show(event)
    assert "Alice:" not in "\n".join(frame(console, panes))


def test_drawing_takes_a_twentieth_of_the_time_at_most(console):
    panes, drawn = Panes(Printer(["Alice"]), "1 + 1", 1), []

    def slow() -> str:
        began = time.thread_time()
        while time.thread_time() < began + 0.05:
            pass
        drawn.append(time.monotonic())
        return ""

    panes._get_renderable = slow
    with panes:
        time.sleep(2.5)
    assert 2 <= len(drawn) <= 3  # not 25
