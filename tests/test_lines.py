"""A run as lines of text. (What the command prints of a whole run: test_command.py.)"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from minihogwild.show.lines import Printer, figures_of, report


def text(worker: str, words: str) -> dict:
    return {"do": "text", "worker": worker, "text": words}


def begin(worker: str) -> dict:
    return {"do": "begin", "worker": worker, "text": ""}


def shown(capsys, names: list[str], *events: dict) -> str:
    with Printer(names) as lines:
        for event in events:
            lines.show(event)
    return capsys.readouterr().out


def test_one_workers_text_is_printed_as_it_comes(capsys):
    with Printer(["Alice"]) as lines:
        for words in ("a = ", "1\n\n ", "b"):
            lines.show(text("Alice", words))
            assert capsys.readouterr().out == words
    assert capsys.readouterr().out == "\n"


def test_several_workers_print_whole_lines_with_their_names(capsys):
    events = [text("Alice", "a = "), text("Bob", "b\n\n  c"), text("Alice", "1\n"), text("Bob", "d")]
    assert shown(capsys, ["Alice", "Bob"], *events) == "Bob: b\nAlice: a = 1\nBob:\nBob:   cd\n"


def test_code_keeps_its_shape(capsys):
    code = " ```python\n\ndef f(x):\n    if x:\n\n\n        return 1  \n    return 0\n```\n\n"
    lines = ["```python", "", "def f(x):", "    if x:", "", "", "        return 1", "    return 0", "```"]
    expected = "".join(f"Alice: {line}\n" if line else "Alice:\n" for line in lines)
    pieces = [text("Alice", character) for character in code]
    assert (
        shown(capsys, ["Alice", "Bob"], *pieces, begin("Alice"), text("Alice", "\n  next"))
        == expected + "Alice: next\n"
    )


@pytest.mark.parametrize("event", [begin("Alice"), {"do": "retire", "worker": "Alice"}])
def test_a_line_ends_where_its_paragraph_does(capsys, event):
    events = [text("Alice", "a"), text("Bob", "b"), event, text("Alice", "c")]
    assert shown(capsys, ["Alice", "Bob"], *events) == "Alice: a\nAlice: c\nBob: b\n"


def test_a_finisher_speaks_after_all_workers(capsys):
    events = [text("Alice", "a"), text("Bob", "b"), text("finisher", "\n\nso \\boxed{"), text("finisher", "5}")]
    assert shown(capsys, ["Alice", "Bob"], *events) == "Alice: a\nBob: b\nfinisher: so \\boxed{5}\n"


def test_what_a_model_writes_moves_no_cursor(capsys):
    assert shown(capsys, ["Alice"], text("Alice", "a\x1b[2Jb\x9bc\x07\td")) == "a[2Jbc\td\n"


def test_steps_print_nothing(capsys):
    step = {"do": "step", "views": [["common", "text of Alice"]], "tokens": [[1]], "sampled": [2], "logits": None}
    assert shown(capsys, ["Alice", "Bob"], text("Alice", "a"), step, text("Alice", "b")) == "Alice: ab\n"


# ---- the answer and the figures


@dataclass
class Ran:
    """As much of a run as is reported."""

    answer: str | None = "7"
    forward_steps: int = 20
    finisher_steps: int = 0
    stopped_by: str = "answer"
    workers: list = field(
        default_factory=lambda: [SimpleNamespace(name="Alice", sampled=12), SimpleNamespace(name="Bob", sampled=18)]
    )

    def summary(self) -> dict:
        return {"tokens": 30, "tokens_per_second": 1234.56, "ms_per_step": 2.345}


def test_the_figures():
    expected = "20 forward steps, 30 tokens (Alice 12, Bob 18), 1234.6 tokens/s, 2.3 ms per step; stopped by answer"
    assert figures_of(Ran(), pace=0, seconds=3.0) == expected


def test_a_finishers_steps_are_told_apart():
    line = figures_of(Ran(finisher_steps=4), pace=0, seconds=3.0)
    assert line.startswith("20 forward steps + 4 of the finisher, 30 tokens")


@pytest.mark.parametrize(("pace", "told"), [(15, "15"), (15.0, "15"), (0.25, "0.25")])
def test_a_paced_run_says_so(pace, told):
    """Its speed is not what the model does: who waits is to know how long, and why."""
    line = figures_of(Ran(), pace, seconds=16.24)
    assert line.endswith(f"; stopped by answer; paced at {told} steps a second: 16.2 s in all")


def test_the_answer_goes_to_standard_output_and_the_figures_do_not(capsys):
    report(Ran(answer="7\x1b[2J", stopped_by="error: bad\x07 file"), pace=0, seconds=1.0)
    out, err = capsys.readouterr()
    assert out == "\nAnswer: 7[2J\n"
    assert err.startswith("\n20 forward steps, ")
    assert err.endswith("stopped by error: bad file\n")


def test_without_an_answer_nothing_is_printed_of_it(capsys):
    report(Ran(answer=None), pace=0, seconds=1.0)
    assert capsys.readouterr().out == ""
