"""Many problems: `python -m minihogwild.evaluate`, and a file of results that is gone on with."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from in_process import Said, said
from processes import start
from refusals import assert_one_line
from sheets import make_sheet
from tiny import END, ids_of, save_model

from minihogwild import InputError, Run, Sampling, evaluate, load
from minihogwild.evaluate import DUET, main
from minihogwild.files import is_ours_alone
from minihogwild.hub import Tokenizer
from minihogwild.prompts import load_prompts
from minihogwild.scoring import ASK_FOR_BOX, ASK_FOR_BOXES

SAYS = {
    "together": "{names}: {problem}\n",
    "header_others": "[o]",
    "header_own": "[m]",
    "prefix": "{name}:",
    "cue": " \\boxed{",
    "finisher_tokens": 4,
}
PROBLEMS = [{"problem": f"What is {n}?", "answer": n} for n in "abc"]
# For the tiny model; the last batch has one problem
FEW = ["--budgets", "3,6", "--batch", 2, "--temperature", 1.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_model(tmp_path_factory.mktemp("model"))
    (path / "prompts.json").write_text(json.dumps(SAYS))
    return path


@pytest.fixture(scope="module")
def command(folder) -> Callable[..., Said]:
    """The command, run in this process, on a tiny model and the CPU."""

    def run(*arguments: object) -> Said:
        given = list(arguments)
        if "--model" not in given:
            given += ["--model", folder]
        return said(main, *given, "--device", "cpu")

    return run


@pytest.fixture
def problems(tmp_path) -> Path:
    return write(tmp_path / "problems.jsonl", *PROBLEMS)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.mark.parametrize("which", ["problems", "out"])
def test_a_pipe_is_not_waited_for(folder, problems, out, which):
    """Both files are read more than once: the results are gone on with."""
    files = {"problems": problems, "out": out}
    files[which] = out.with_name("pipe")
    os.mkfifo(files[which])
    options = ["--out", files["out"], "--model", folder, "--device", "cpu"]
    with start("minihogwild.evaluate", files["problems"], *options) as running:
        try:
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 2
    assert_one_line(err, "minihogwild.evaluate", str(files[which]), "it is not a file")


def write(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return path


def read(path: Path) -> list[dict]:
    """The results, without the first line."""
    content = path.read_bytes()
    assert content.endswith(b"\n")
    description, *entries = [json.loads(line) for line in content.splitlines()]
    assert list(description) == ["evaluated"]
    return entries


def key(entry: dict) -> tuple[int, int, str, int]:
    return entry["problem"], entry["workers"], entry["layout"], entry["seed"]


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, each by the names of its columns."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert set(rows[1]) == {"---"}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def assert_refused(result: Said, *culprits: object) -> None:
    assert (result.code, result.out) == (2, "")
    assert_one_line(result.err, "minihogwild.evaluate", *map(str, culprits))


# ---- a model that solves its problems

SHEETS = [make_sheet(random.Random(n), 3, 0.5) for n in range(4)]
SETTINGS = [(1, "independent"), (2, "combined"), (2, "independent"), (3, "combined"), (3, "independent")]
DUET_BUDGETS = (30, 60, 200)


@pytest.fixture(scope="module")
def of_duet(tmp_path_factory) -> tuple[Said, list[dict], Path]:
    """What the command said, its results, and the figure."""
    path = tmp_path_factory.mktemp("duet")
    entries = []
    for sheet in SHEETS:
        answers = [[f"{name} = {value}"] for name, value in sheet.values.items()]
        entries.append({"problem": str(sheet), "answers": answers})
    write(path / "problems", *entries)
    options = ["--workers", "1,2,3", "--layouts", "combined,independent", "--batch", 2, "--dtype", "float32"]
    options += ["--budgets", ",".join(map(str, DUET_BUDGETS)), "--device", "cpu"]
    result = said(main, path / "problems", "--out", path / "out", "--figure", path / "figure.svg", *options)
    assert (result.code, result.err) == (0, "")
    return result, read(path / "out"), path / "figure.svg"


def test_duet_solves_each_sheet_once_with_all_settings(of_duet):
    _, entries, _ = of_duet
    assert sorted(map(key, entries)) == sorted((n, *setting, 0) for n in range(4) for setting in SETTINGS)
    for entry in entries:
        assert None not in entry["found_at"]
        assert entry["right"][str(DUET_BUDGETS[-1])] == 1
        assert entry["stopped_by"] == "retired"
        assert entry["finisher_steps"] == 0


def test_workers_of_duet_need_fewer_passes_together_and_no_fewer_alone(of_duet):
    _, entries, _ = of_duet
    passes = {key(entry)[:3]: max(entry["found_at"]) for entry in entries}
    for n in range(4):
        one = passes[n, 1, "independent"]
        assert passes[n, 2, "combined"] < one
        assert passes[n, 3, "combined"] < one
        assert passes[n, 2, "independent"] >= one
        assert passes[n, 3, "independent"] >= one
    for fewer, more in ((1, 2), (2, 3)):
        layout = "independent" if fewer == 1 else "combined"
        assert sum(passes[n, more, "combined"] for n in range(4)) < sum(passes[n, fewer, layout] for n in range(4))


def stands_alone(text: str, part: str) -> bool:
    """Is the part there, and something before and behind it that is no letter or digit?"""
    for begin in range(1, len(text) - len(part)):
        around = text[begin - 1] + text[begin + len(part)]
        if text[begin:].startswith(part) and not any(character.isalnum() for character in around):
            return True
    return False


def writing_of(paragraphs: list[str], tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """(a forward pass, a worker's paragraph after it), of a worker who ends by end-of-sequence.

    A pass samples one token; but the pass that feeds a paragraph's last token samples none: the next one begins with
    the prefix.
    """
    passes = 0
    for paragraph in paragraphs:
        text = ""
        for token in tokenizer.encode(paragraph):
            passes += 1
            text += tokenizer.decode([token])
            yield passes, text
        passes += 1
    yield passes + 1, text  # end-of-sequence was sampled, and here it is fed


def test_duets_results_follow_from_its_texts(of_duet):
    _, entries, _ = of_duet
    tokenizer = load(DUET, device="cpu").tokenizer
    for entry in entries:
        writing = [step for texts in entry["texts"].values() for step in writing_of(texts, tokenizer)]
        assert entry["forward_steps"] == max(passes for passes, _ in writing)
        tokens = [len(tokenizer.encode(text)) for texts in entry["texts"].values() for text in texts]
        assert entry["tokens"] == sum(tokens) + entry["workers"]  # an end-of-sequence each
        values = SHEETS[entry["problem"]].values
        found_at = []
        for name, value in values.items():
            part = f"{name} = {value}"
            found_at.append(min(passes for passes, text in writing if stands_alone(f" {text}", part)))
        assert entry["found_at"] == found_at
        for budget in DUET_BUDGETS:
            by_then = [at for at in found_at if at <= budget]
            assert entry["right"][str(budget)] == pytest.approx(len(by_then) / len(values))
        alone = entry["layout"] == "independent"
        paragraphs_twice = entry["workers"] - 1 if alone else 0  # each has one paragraph, with all lines in it
        assert entry["repeats"] == paragraphs_twice * len(values)


def test_duets_table_tells_what_the_file_holds(of_duet):
    result, entries, _ = of_duet
    rows = cells(result.out)
    assert [(int(row["workers"]), row["layout"]) for row in rows] == SETTINGS
    for row, setting in zip(rows, SETTINGS, strict=True):
        group = [entry for entry in entries if key(entry)[1:3] == setting]
        assert row["runs"] == str(len(group)) == "4"
        for budget in DUET_BUDGETS:
            mean = statistics.fmean(entry["right"][str(budget)] for entry in group)
            assert row[f"right by {budget}"].startswith(f"{100 * mean:.1f} ± ")
        until = statistics.median(max(entry["found_at"]) for entry in group)  # five of six of three are three
        assert float(row["passes until right"]) == until
        assert float(row["tokens"]) == pytest.approx(statistics.fmean(entry["tokens"] for entry in group), abs=0.5)
        assert float(row["done twice"]) == statistics.fmean(entry["repeats"] for entry in group)


def test_duets_figure_is_written(of_duet):
    figure = ElementTree.parse(of_duet[2]).getroot()
    assert figure.tag.endswith("svg")
    assert len(list(figure.iter("{http://www.w3.org/2000/svg}path"))) > len(SETTINGS)


# ---- answers in boxes, by budget


def test_every_result_is_there_once_and_is_that_of_a_run_alone(command, folder, problems, out):
    """Also where other problems are solved at the same time; float64 leaves no doubt about the tokens."""
    options = ["--budgets", "3,6,9", "--seeds", 2, "--temperature", 1.5, "--batch", 2, "--workers", "1,3"]
    result = command(problems, "--out", out, *options, "--layouts", "interleaved,independent")
    assert result.code == 0, result.err
    entries = read(out)
    settings = [(1, "independent"), (3, "interleaved"), (3, "independent")]
    assert sorted(map(key, entries)) == sorted((n, *s, seed) for n in range(3) for s in settings for seed in range(2))
    model = load(folder, device="cpu")
    for entry in entries:
        words = load_prompts(folder / "prompts.json")
        problem = PROBLEMS[entry["problem"]]
        run = Run(
            model,
            problem["problem"] + ASK_FOR_BOX,
            entry["workers"],
            entry["layout"],
            max_steps=9,
            sampling=Sampling(1.5),
            seed=entry["seed"],
            prompts=words,
            budgets=(3, 6, 9),
        )
        for _ in run:
            pass
        assert entry["texts"] == {worker.name: worker.paragraphs for worker in run.workers}
        answers = {str(budget): answer for budget, answer in run.summary()["answers_by_budget"].items()}
        assert entry["answers"] == answers
        assert entry["right"] == {budget: answer == problem["answer"] for budget, answer in answers.items()}
        assert (entry["forward_steps"], entry["finisher_steps"]) == (run.forward_steps, run.finisher_steps)
        assert (entry["stopped_by"], entry["tokens"]) == (run.stopped_by, sum(w.sampled for w in run.workers))
    assert any(answer for entry in entries for answer in entry["answers"].values())
    of_seeds = [[entry["texts"] for entry in entries if entry["seed"] == seed] for seed in range(2)]
    assert all(texts not in of_seeds[1] for texts in of_seeds[0])
    assert [row["runs"] for row in cells(result.out)] == ["6"] * 3


Says = Callable[[Run, str], list[str]]  # what a writer of this name writes in a run, in pieces


@pytest.fixture
def script(monkeypatch) -> Callable[[Says], list[Run]]:
    """Make all writers write what is said of them, then x for ever; gives a list of the runs that will begin."""

    def write_as(says: Says) -> list[Run]:
        runs = []

        class ScriptedRun(Run):
            def decide(self):
                if self not in runs:
                    runs.append(self)
                self.decided = super().decide()
                return self.decided

            def learn(self, token_ids):
                return super().learn([self.next_of(writer) for writer in self.decided.writers])

            def next_of(self, writer) -> int:
                ids = ids_of(self.model, *says(self, writer.name))
                return ids[writer.sampled] if writer.sampled < len(ids) else ids_of(self.model, "x")[0]

        monkeypatch.setattr(evaluate, "Run", ScriptedRun)
        return runs

    return write_as


def test_an_answer_is_right_from_the_budget_on_at_which_it_was_given(command, script, tmp_path, out):
    """First a finisher is asked, and says 1, then 4; in the eleventh step a worker has boxed the answer."""

    def says(run: Run, name: str) -> list[str]:
        if name == "finisher":
            return ["1}" if run.steps_begun < 6 else "4}"]
        return ["x\\boxed{\\frac{8}{2}}"] if name == "Bob" else []

    script(says)
    problems = write(tmp_path / "problems", {"problem": "2 + 2?", "answer": 4})
    result = command(problems, "--out", out, "--workers", 2, "--budgets", "3,6,40,90")
    assert result.code == 0, result.err
    [entry] = read(out)
    steps = len("x\\boxed{\\frac{8}{2}}")
    assert (entry["forward_steps"], entry["stopped_by"], entry["tokens"]) == (steps, "answer", 2 * steps)
    assert entry["answers"] == {"3": "1", "6": "4", "40": "\\frac{8}{2}", "90": "\\frac{8}{2}"}
    assert entry["right"] == {"3": 0, "6": 1, "40": 1, "90": 1}
    assert entry["finisher_steps"] == 2 * 2
    [row] = cells(result.out)
    assert [row[f"right by {budget}"] for budget in (3, 6)] == ["0.0 ± 0.0 %", "100.0 ± 0.0 %"]
    assert row["done twice"] == "–"


@pytest.mark.parametrize(
    ("layout", "boxed", "answer"),
    [
        ("independent", ["4", "5", "5"], "5"),
        ("independent", ["5", "4", "5"], "5"),
        ("independent", ["5", "5", "4"], "5"),
        ("independent", ["4", "4", "5"], "4"),
        ("independent", ["4", "5", "6"], "4"),  # of as many, the first
        ("combined", ["4", "5", "5"], "4"),  # who share their work have one answer
    ],
)
@pytest.mark.parametrize("workers_answer", [True, False])
def test_where_workers_are_independent_the_majority_counts(
    command, script, tmp_path, out, layout, boxed, answer, workers_answer
):
    """Whether they box their answers themselves, or have to be asked."""
    boxed_by = dict(zip(("Alice", "Bob", "Carol"), boxed, strict=True))

    def says(run: Run, name: str) -> list[str]:
        if name.startswith("finisher"):
            return [boxed_by[name.split()[-1]] + "}" if layout == "independent" else boxed[0] + "}"]
        return [f"\\boxed{{{boxed_by[name]}}}"] if workers_answer else []

    script(says)
    problems = write(tmp_path / "problems", {"problem": "2 + 3?", "answer": "5"})
    result = command(problems, "--out", out, "--workers", 3, "--layouts", layout, "--budgets", "2,30")
    assert result.code == 0, result.err
    [entry] = read(out)
    assert entry["answers"]["30"] == answer
    assert entry["right"]["30"] == (answer == "5")
    assert entry["stopped_by"] == ("answer" if workers_answer else "steps")
    [row] = cells(result.out)
    assert row["right by 30"] == ("100.0 ± 0.0 %" if answer == "5" else "0.0 ± 0.0 %")


def test_joined_problems_have_their_answers_in_one_box(command, script, tmp_path, out):
    """Three in prompts of two: the last prompt has one. Counted is what is right in its place."""
    problems = [{"problem": f"What is {name}?", "answer": n} for n, name in enumerate("abc", 1)]
    boxes = {"a": "1; 7", "c": "3"}

    def says(run: Run, name: str) -> list[str]:
        return [f"\\boxed{{{boxes['c' if 'is c?' in run.problem else 'a']}}}", END]

    runs = script(says)
    write(tmp_path / "problems", *problems)
    result = command(tmp_path / "problems", "--out", out, "--workers", 1, "--budgets", "5,60", "--join", 2)
    assert result.code == 0, result.err
    asked = ["1. What is a?\n\n2. What is b?", "1. What is c?"]
    assert [run.problem for run in runs] == [text + ASK_FOR_BOXES for text in asked]
    first, last = read(out)
    assert (first["answers"]["60"], first["right"]["60"]) == ("1; 7", 0.5)
    assert (last["answers"]["60"], last["right"]["60"]) == ("3", 1)
    assert cells(result.out)[0]["right by 60"].startswith("75.0 ± ")
    boxes["a"] = "2; 1"  # both, but in other places
    command(tmp_path / "problems", "--out", tmp_path / "other", "--workers", 1, "--budgets", "5,60", "--join", 2)
    assert read(tmp_path / "other")[0]["right"]["60"] == 0


def test_parts_are_looked_for_in_all_workers_texts_and_none_is_asked_for_an_answer(command, script, tmp_path, out):
    texts = {"Alice": ["one 4", "2 x.", "\n\n", "two end", END], "Bob": ["TWO\t 2.", "\n\n", "\\boxed{9} ", END]}
    runs = script(lambda run, name: texts[name])
    answers = [["42"], ["4"], ["no", "two  2"], ["two"], ["9"], ["end"]]
    write(tmp_path / "problems", {"problem": "Box \\boxed{}.", "answers": answers})
    result = command(tmp_path / "problems", "--out", out, "--workers", 2, "--budgets", "5,99")
    assert result.code == 0, result.err
    [entry] = read(out)
    blank_line = 1 + 1  # a token, and the pass that feeds it samples none
    nine = len("TWO\t 2.") + blank_line + len("\\boxed{9}")
    end = len("one 42 x.") + blank_line + len("two end") + 1 + 1  # end-of-sequence is sampled, and fed
    two = len("TWO\t 2.") + 1  # with what follows: it is not 2.5
    assert entry["found_at"] == [len("one 42 "), None, two, len("TWO "), nine, end]
    assert entry["right"] == {"5": pytest.approx(1 / 6), "99": pytest.approx(5 / 6)}
    assert entry["forward_steps"] == max(end, nine + len(" ") + 1 + 1)
    assert entry["repeats"] == 1  # "two", by both
    assert (entry["finisher_steps"], runs[0].finishers, entry["stopped_by"]) == (0, [], "retired")


def test_without_math_verify_it_is_said_that_letters_are_compared(command, problems, out, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "HAS_MATH_VERIFY", False)
    result = command(problems, "--out", out, *FEW)
    assert result.code == 0
    assert "minihogwild[evaluate]" in result.err
    assert len(result.err.splitlines()) == 1
    parts = write(tmp_path / "parts", {"problem": "a?", "answers": [["b"]]})
    assert command(parts, "--out", tmp_path / "out", *FEW).err == ""


# ---- gone on with


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> bytes:
    """The results of an evaluation that nothing has stopped."""
    path = tmp_path_factory.mktemp("whole")
    write(path / "problems.jsonl", *PROBLEMS)
    result = command(path / "problems.jsonl", "--out", path / "out", *FEW)
    assert result.code == 0, result.err
    assert len(read(path / "out")) == 6
    return (path / "out").read_bytes()


def ends_of_lines(content: bytes) -> list[int]:
    return [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]


@pytest.fixture
def go_on(command, problems, out) -> Callable[[], bytes]:
    """Run the same command to its end; gives what is then in the file."""

    def to_the_end() -> bytes:
        result = command(problems, "--out", out, *FEW)
        assert (result.code, result.err) == (0, "")
        return out.read_bytes()

    return to_the_end


@pytest.mark.parametrize("line", range(7))
@pytest.mark.parametrize("bytes_more", [-1, 0, 1])
def test_cut_off_about_the_end_of_a_line_it_goes_on(whole, go_on, out, line, bytes_more):
    """Batches have two problems: some of these ends are in the midst of one."""
    out.write_bytes(whole[: ends_of_lines(whole)[line] + bytes_more])
    assert go_on() == whole


@examples(20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1))
@example(part=0)
@example(part=0.001)  # in the first line
def test_cut_off_anywhere_it_goes_on(whole, go_on, out, part):
    out.write_bytes(whole[: int(part * len(whole))])
    assert go_on() == whole


def test_when_all_is_there_nothing_is_run_and_the_table_is_the_same(command, problems, out, monkeypatch):
    first = command(problems, "--out", out, *FEW)
    before = out.read_bytes()
    monkeypatch.setattr(evaluate, "Run", None)
    assert command(problems, "--out", out, *FEW) == first
    assert out.read_bytes() == before


def test_interrupted_however_often_it_loses_no_line(command, problems, out, whole, monkeypatch):
    drive = evaluate.drive_together
    left = 0  # events until the next interrupt

    def interrupted(runs, cache):
        nonlocal left
        for told in drive(runs, cache):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield told

    monkeypatch.setattr(evaluate, "drive_together", interrupted)
    lengths = []
    for events in range(0, 2000, 40):
        left = events
        result = command(problems, "--out", out, *FEW)
        written = out.read_bytes()
        assert whole.startswith(written)
        assert written.endswith(b"\n")
        lengths.append(len(written))
        if result.code == 0:
            break
        assert result == (130, "", "")
    assert written == whole
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_a_failure_in_a_batch_costs_only_that_batch(command, problems, out, whole, go_on, monkeypatch):
    drive, seen = evaluate.drive_together, []

    def failing(runs, cache):
        seen.append(out.read_bytes())  # what a kill would leave
        if len(seen) == 3:
            raise MemoryError("no memory for this batch")
        return drive(runs, cache)

    monkeypatch.setattr(evaluate, "drive_together", failing)
    assert_refused(command(problems, "--out", out, *FEW), "no memory")
    assert seen == [whole[: ends_of_lines(whole)[line]] for line in (0, 2, 4)]
    assert out.read_bytes() == seen[-1]
    monkeypatch.undo()
    assert go_on() == whole


class FullDisk:
    """A file that takes so many lines, and no more."""

    def __init__(self, file, lines: int):
        self.file, self.lines = file, lines

    def write(self, line: bytes) -> int:
        if self.lines == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines -= 1
        return self.file.write(line)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("lines", [0, 1, 2, 6])
def test_where_the_disk_is_full_earlier_results_are_kept(command, problems, out, whole, go_on, monkeypatch, lines):
    opened = Path.open

    def opening(path: Path, mode: str = "r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return FullDisk(file, lines) if path == out and mode != "rb" else file

    monkeypatch.setattr(Path, "open", opening)
    assert_refused(command(problems, "--out", out, *FEW), "No space left on device")
    ends = [0, *ends_of_lines(whole)]
    assert out.read_bytes() == whole[: ends[lines]]
    monkeypatch.undo()
    assert go_on() == whole


@pytest.mark.parametrize("line", [0, 1, 4])
def test_where_a_file_may_not_grow_on_it_ends_in_the_midst_of_a_line(command, problems, out, whole, go_on, line):
    """A true limit: a part of the line is written."""
    size = ends_of_lines(whole)[line] - 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        result = command(problems, "--out", out, *FEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(result, "File too large")
    assert out.read_bytes() == whole[:size]
    assert go_on() == whole


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_process_and_what_it_wrote_is_gone_on_with(command, folder, tmp_path, number):
    problems = write(tmp_path / "problems", *PROBLEMS * 10)
    options = [*FEW, "--seeds", 2, "--model", folder]
    with start("minihogwild.evaluate", problems, "--out", tmp_path / "out", "--device", "cpu", *options) as running:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out").exists() or (tmp_path / "out").read_bytes().count(b"\n") < 4:
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        running.send_signal(number)
        printed, err = running.communicate(timeout=60)
    killed = number == signal.SIGKILL
    assert running.returncode == (-number if killed else 130)
    warning = f"minihogwild.evaluate: {folder}: no chat template: the prompt is given as it is\n"
    assert (printed, err) == ("", warning)
    assert command(problems, "--out", tmp_path / "whole", *options).code == 0
    written, whole = (tmp_path / "out").read_bytes(), (tmp_path / "whole").read_bytes()
    assert whole.startswith(written)
    assert written.endswith(b"\n") or killed
    assert 4 <= written.count(b"\n") < whole.count(b"\n")
    assert command(problems, "--out", tmp_path / "out", *options).code == 0
    assert (tmp_path / "out").read_bytes() == whole


def test_in_the_first_moments_there_is_no_traceback(problems, out):
    """PyTorch is being imported."""
    with start("minihogwild.evaluate", problems, "--out", out) as running:
        time.sleep(0.8)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err


# ---- with other settings


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (["--budgets", "3,6,9"], ["budgets", "[3, 6, 9]"]),
        (["--budgets", "6"], ["budgets"]),
        (["--temperature", 1], ["sampling", "{'temperature': 1.0}"]),
        (["--top-k", 3], ["sampling", "{'top_k': 3}"]),
        (["--min-p", 0.25], ["sampling", "{'min_p': 0.25}"]),
        (["--join", 2], ["join", "2"]),
        (["--batch", 3], ["batch", "3"]),
        (["--batch", 1], ["batch", "1"]),
        (["--dtype", "float32"], ["dtype", "float32"]),
    ],
    ids=str,
)
def test_with_other_settings_it_does_not_go_on(command, problems, out, whole, monkeypatch, options, culprits):
    out.write_bytes(whole)
    monkeypatch.setattr(evaluate, "Run", None)
    assert_refused(command(problems, "--out", out, *FEW, *options), "--out", out, *culprits)
    assert out.read_bytes() == whole


def test_with_other_words_problems_or_another_model_it_does_not_go_on(
    command, folder, problems, out, whole, monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluate, "Run", None)
    out.write_bytes(whole)
    words = tmp_path / "words.json"
    words.write_text(json.dumps({**SAYS, "check": "Again?"}))
    assert_refused(command(problems, "--out", out, *FEW, "--prompts", words), "words", "{'check': 'Again?'}")
    words.write_text(json.dumps(SAYS))  # the model's own
    assert command(problems, "--out", out, *FEW, "--prompts", words).code == 0
    other = shutil.copytree(folder, tmp_path / "other")
    assert_refused(command(problems, "--out", out, *FEW, "--model", other), "model", other.name)
    write(problems, *PROBLEMS[:2], {**PROBLEMS[2], "answer": "other"})
    assert_refused(command(problems, "--out", out, *FEW), "problems")
    write(problems, *PROBLEMS, *PROBLEMS)
    assert_refused(command(problems, "--out", out, *FEW), "problems")
    write(problems, *PROBLEMS)
    assert command(problems, "--out", out, *FEW).code == 0
    assert out.read_bytes() == whole


def test_more_workers_layouts_and_seeds_are_run_where_they_are_missing(command, problems, out, monkeypatch, tmp_path):
    made = []
    drive = evaluate.drive_together

    def counted(runs, cache):
        made.extend((run.problem, len(run.workers), run.layout, run.seed) for run in runs.values())
        return drive(runs, cache)

    monkeypatch.setattr(evaluate, "drive_together", counted)

    def settings_run(workers: str, layouts: str, seeds: int) -> set[tuple[int, str, int]]:
        """Run; gives the (workers, layout, seed) for which all problems, and each once, have been run now."""
        made.clear()
        before = out.read_bytes() if out.exists() else b""
        options = ["--workers", workers, "--layouts", layouts, "--seeds", seeds]
        result = command(problems, "--out", out, *FEW, *options)
        assert result.code == 0, result.err
        assert out.read_bytes().startswith(before)
        assert len(set(made)) == len(made)
        found = {run[1:] for run in made}
        assert len(made) == len(PROBLEMS) * len(found)
        runs = [int(row["runs"]) for row in cells(result.out)]
        assert sum(runs) == len(read(out))  # whatever is there is told
        return found

    assert settings_run("1", "combined", 1) == {(1, "independent", 0)}
    assert settings_run("1,2", "combined", 1) == {(2, "combined", 0)}
    assert settings_run("2", "combined,contiguous", 1) == {(2, "contiguous", 0)}
    assert settings_run("1,2", "combined", 2) == {(1, "independent", 1), (2, "combined", 1)}
    assert settings_run("1", "independent", 1) == set()
    assert settings_run("2,3", "contiguous,combined", 2) == {
        (2, "contiguous", 1),
        (3, "contiguous", 0),
        (3, "combined", 0),
        (3, "contiguous", 1),
        (3, "combined", 1),
    }
    grown = read(out)
    keys = [key(entry) for entry in grown]
    assert len(set(keys)) == len(keys) == 3 * 2 * 5
    options = ["--workers", "1,2,3", "--layouts", "combined,contiguous", "--seeds", 2]
    assert command(problems, "--out", tmp_path / "at once", *FEW, *options).code == 0
    assert sorted(grown, key=key) == sorted(read(tmp_path / "at once"), key=key)


def test_a_layout_that_is_named_twice_is_run_once(command, problems, out, whole):
    assert command(problems, "--out", out, *FEW, "--layouts", "combined,combined").code == 0
    assert out.read_bytes() == whole


def test_of_a_batch_only_what_is_missing_is_added(command, problems, out, whole, go_on):
    """A line in the midst may be missing too: who has taken it out wants it run again."""
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2] + lines[3:]))
    written = go_on()
    assert written == b"".join([*lines[:2], *lines[3:], lines[2]])


# ---- what cannot be done

GOOD = b'{"problem": "a?", "answer": "4"}\n'


@pytest.mark.parametrize(
    ("content", "culprits"),
    [
        (b"", ["no problem"]),
        (b"\n  \n", ["no problem"]),
        (b"What is 2 + 3?\n", ["line 1"]),
        (GOOD + b"\n{\n", ["line 3"]),
        (GOOD + b'{"problem": "b?", "answer": "4"', ["line 2"]),
        (b'[{"problem": "a?", "answer": "4"}]', ["line 1", "object"]),
        (b'"a?"', ["line 1", "object"]),
        (b"null", ["line 1", "object"]),
        (GOOD + b'{"answer": "4"}', ["line 2", "'problem'"]),
        (b'{"problem": "", "answer": "4"}', ["line 1", "'problem'"]),
        (b'{"problem": " \\n", "answer": "4"}', ["line 1", "'problem'"]),
        (b'{"problem": 3, "answer": "4"}', ["line 1", "'problem'"]),
        (b'{"problem": true, "answer": "4"}', ["line 1", "'problem'"]),
        (GOOD + b'{"problem": "a?"}', ["line 2", "'answer'", "'answers'"]),
        (b'{"problem": "a?", "answer": "4", "answers": [["4"]]}', ["line 1", "'answer'", "'answers'"]),
        (b'{"problem": "a?", "answer": null}', ["line 1", "'answer'", "None"]),
        (b'{"problem": "a?", "answer": true}', ["line 1", "'answer'", "True"]),
        (b'{"problem": "a?", "answer": ""}', ["line 1", "'answer'"]),
        (b'{"problem": "a?", "answer": " "}', ["line 1", "'answer'"]),
        (b'{"problem": "a?", "answer": ["4"]}', ["line 1", "'answer'", "['4']"]),
        (b'{"problem": "a?", "answers": "4"}', ["line 1", "'answers'"]),
        (b'{"problem": "a?", "answers": ["4"]}', ["line 1", "'answers'"]),
        (b'{"problem": "a?", "answers": []}', ["line 1", "'answers'", "empty"]),
        (b'{"problem": "a?", "answers": [["4"], []]}', ["line 1", "'answers'", "empty"]),
        (b'{"problem": "a?", "answers": [["4", ""]]}', ["line 1", "'answers'", "''"]),
        (b'{"problem": "a?", "answers": [["4", " \\t"]]}', ["line 1", "'answers'"]),
        (b'{"problem": "a?", "answers": [["4", 4]]}', ["line 1", "'answers'", "4"]),
        (b'{"problem": "a?", "answers": [[false]]}', ["line 1", "'answers'", "False"]),
        (b'{"problem": "a?", "answers": true}', ["line 1", "'answers'"]),
        (b'{"problem": "a?", "answers": {"4": ["4"]}}', ["line 1", "'answers'"]),
        (GOOD + b"\xff\n", ["cannot be read"]),
        (b"[" * 100_000, ["line 1"]),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, bytes) else "",
)
def test_a_bad_file_of_problems_gives_one_line(command, problems, out, monkeypatch, content, culprits):
    monkeypatch.setattr(evaluate, "load", None)  # not even loaded
    problems.write_bytes(content)
    assert_refused(command(problems, "--out", out), problems, *culprits)
    assert os.listdir(out.parent) == [problems.name]


def test_no_file_of_problems_gives_one_line(command, tmp_path, out, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert_refused(command(path, "--out", out), path, "cannot be read")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (["--budgets", "6,3"], ["--budgets", "6,3"]),
        (["--budgets", "3,3"], ["--budgets", "3,3"]),
        (["--budgets", "0,3"], ["--budgets", "0,3"]),
        (["--budgets", "-1"], ["--budgets", "-1"]),
        (["--budgets", ""], ["--budgets"]),
        (["--budgets", "3,,6"], ["--budgets", "3,,6"]),
        (["--budgets", "2.5"], ["--budgets", "2.5"]),
        (["--workers", "0"], ["--workers", "0"]),
        (["--workers", "0,1"], ["--workers", "0,1"]),
        (["--workers", "17"], ["workers", "17", "16"]),
        (["--workers", "1,17"], ["workers", "17", "16"]),
        (["--workers", "two"], ["--workers", "two"]),
        (["--workers", "2,1"], ["--workers", "2,1"]),
        (["--layouts", "sideways"], ["--layouts", "sideways", "combined"]),
        (["--layouts", "combined,"], ["--layouts", "''", "combined"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--seeds", "x"], ["--seeds", "x"]),
        (["--seeds", "99999999999"], ["--seeds", "99999999999", "10000"]),
        (["--join", "0"], ["--join", "0"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--batch", "-3"], ["--batch", "-3"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "2"], ["top_p", "2"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--prompts", "/no/such/file.json"], ["/no/such/file.json"]),
        (["--figure", "/no/such/folder/figure.svg"], ["--figure", "/no/such/folder/figure.svg"]),
        (["--colour", "red"], ["--colour"]),
        (["there"], ["there"]),
    ],
    ids=str,
)
def test_bad_options_give_one_line_and_nothing_is_written(command, problems, out, options, culprits):
    assert_refused(command(problems, "--out", out, *FEW, *options), *culprits)
    assert os.listdir(out.parent) == [problems.name]


def test_more_workers_than_there_are_names_give_one_line_and_nothing_is_written(command, problems, out):
    words = out.with_name("words.json")
    words.write_text(json.dumps({**SAYS, "names": ["A", "B"]}))
    result = command(problems, "--out", out, *FEW, "--workers", "2,3", "--prompts", words)
    assert_refused(result, "workers", "3", "2")
    assert not out.exists()


def test_parts_cannot_be_joined(command, problems, out):
    write(problems, PROBLEMS[0], {"problem": "a?", "answers": [["4"]]})
    assert_refused(command(problems, "--out", out, "--join", 2), "--join", "'answer'")
    assert not out.exists()


def test_results_must_be_asked_for_by_name(command, problems):
    assert_refused(command(problems), "--out")
    assert_refused(command("--out", problems), "PROBLEMS.jsonl")


def test_a_problem_that_does_not_fit_is_named(command, problems, out):
    write(problems, PROBLEMS[0], {"problem": "a" * 5000, "answer": "4"})
    result = command(problems, "--out", out, "--budgets", "3", "--workers", "1")
    assert_refused(result, "problem 2", "4096")
    assert not out.exists()  # the first one has not been run


def test_two_commands_do_not_write_to_the_same_file(command, problems, out):
    command(problems, "--out", out, *FEW)
    whole = out.read_bytes()
    with out.open("r+b") as other:
        assert is_ours_alone(other)
        assert_refused(command(problems, "--out", out, *FEW), f"--out {out}", "another command is writing to it")
    assert out.read_bytes() == whole
    assert command(problems, "--out", out, *FEW)[0] == 0


def test_what_another_command_wrote_just_now_is_not_overwritten(problems, out):
    """Between our reading and our writing it has come and gone."""
    results = evaluate.Results(out, {"some": "description"})
    out.write_bytes(b"others")
    with pytest.raises(InputError, match="another command"), results:
        pass
    assert out.read_bytes() == b"others"


def test_a_standard_output_that_fails_costs_no_figure(command, problems, out, monkeypatch):
    def table(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "table", table)
    figure = out.with_suffix(".svg")
    assert_refused(command(problems, "--out", out, *FEW, "--figure", figure), "No space left")
    assert figure.exists()


def described(whole: bytes, **other: object) -> bytes:
    """A first line with other contents in it."""
    first = json.loads(whole.splitlines()[0])
    return json.dumps({"evaluated": {**first["evaluated"], **other}}).encode() + b"\n"


OTHERS = {
    "notes": b"my notes\nof long ago\n",
    "notes in one line without an end": b"my notes of long ago",
    "one object without an end": b'{"results": "of another program"}',
    "bytes": b"\x00\xff\xfe\n\x00",
    "bytes without a line": b"\x89PNG\r\xff",
    "an object": b'{"evaluate": 3}\n',
    "a list": b"[1]\n",
    "a list of the word": b'["evaluated"]\n',
    "a text": b'"evaluated"\n',
    "a number": b"3\n",
    "a blank line": b"\n",
    "no description": b'{"evaluated": 3}\n',
    "nothing in it": b'{"evaluated": {}}\n',
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS.keys())
def test_a_file_that_holds_no_results_is_refused_and_untouched(command, problems, out, content):
    out.write_bytes(content)
    assert_refused(command(problems, "--out", out, *FEW), "--out", out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("line", [b"{}", b"3", b"[]", b"nonsense", b'{"problem": 0, "workers": 1}', b""])
def test_a_file_with_a_line_that_is_no_result_is_refused_and_untouched(command, problems, out, whole, line):
    lines = whole.splitlines(keepends=True)
    content = b"".join([*lines[:3], line + b"\n", *lines[3:]])
    out.write_bytes(content)
    assert_refused(command(problems, "--out", out, *FEW), "--out", out)
    assert out.read_bytes() == content


def test_a_description_of_another_kind_is_refused(command, problems, out, whole):
    content = described(whole, sampling="cold")
    out.write_bytes(content)
    assert_refused(command(problems, "--out", out, *FEW), "--out", out, "sampling")
    assert out.read_bytes() == content


def test_no_file_that_is_read_is_written(command, folder, problems, tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps(SAYS))
    (tmp_path / "link").symlink_to(problems)
    before = {path: path.read_bytes() for path in (problems, words, *folder.iterdir())}
    for option in ("--out", "--figure"):
        for path in (problems, tmp_path / "link", words, folder / "config.json", folder / "model.safetensors"):
            others = [] if option == "--out" else ["--out", tmp_path / "out"]
            result = command(problems, option, path, *others, "--prompts", words)
            assert_refused(result, option, path, "already")
    assert_refused(command(problems, "--out", tmp_path / "a", "--figure", tmp_path / "a"), "already")
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == ["link", problems.name, words.name]


def test_where_no_file_can_be_written_it_is_told_before_the_runs(command, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "none" / "out", tmp_path / "file" / "out"):
        assert_refused(command(problems, "--out", path), "--out", path)
        assert_refused(command(problems, "--out", tmp_path / "out", "--figure", path), "--figure", path)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", problems.name]


def test_a_figure_without_matplotlib_is_told_before_the_runs(command, problems, out, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(command(problems, "--out", out, "--figure", out.with_name("figure.svg")), "--figure", "matplotlib")
    assert os.listdir(out.parent) == [problems.name]


def test_a_kind_of_figure_that_is_not_known_is_told_before_the_runs(command, problems, out):
    assert_refused(command(problems, "--out", out, *FEW, "--figure", out.with_name("figure.txt")), "--figure", "txt")
    assert os.listdir(out.parent) == [problems.name]


def test_a_figure_is_written_where_it_was_asked_for_or_nowhere(command, problems, out):
    """Not to `figure.png`, which nobody has looked at beforehand: an older file may be there."""
    older = out.with_name("figure.png")
    older.write_bytes(b"old")
    result = command(problems, "--out", out, *FEW, "--figure", out.with_name("figure"))
    assert older.read_bytes() == b"old"
    assert (result.code == 0) == out.with_name("figure").exists()


@pytest.mark.parametrize(("name", "begins"), [("figure.svg", b"<?xml"), ("figure.png", b"\x89PNG")])
def test_a_figure_of_answers_in_boxes(command, problems, out, name, begins):
    figure = out.with_name(name)
    assert command(problems, "--out", out, *FEW, "--figure", figure).code == 0
    assert figure.read_bytes().startswith(begins)


def test_help(command):
    result = command("--help")
    assert result.code == 0
    for option in (
        "PROBLEMS.jsonl", "--model", "--out", "--workers", "--layouts", "--budgets", "--seeds", "--join", "--batch",
        "--figure", "--prompts", "--temperature", "--dtype", "--device",
    ):  # fmt: skip
        assert option in result.out


def test_all_settings_of_a_batch_come_before_the_next_batch(whole):
    """So that a table of the results so far is about the same problems in each row."""
    keys = [key(json.loads(line))[:2] for line in whole.splitlines()[1:]]
    assert keys == [(0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (2, 2)]


def test_the_words_may_be_given(command, problems, out, tmp_path):
    """Run as a whole with words of one's own: they are in the description, but for what depends on the problem."""
    words = replace(load_prompts(write(tmp_path / "words.json", SAYS)), check="Again?")
    write(tmp_path / "words.json", {**SAYS, "check": "Again?"})
    assert command(problems, "--out", out, *FEW, "--prompts", tmp_path / "words.json").code == 0
    described = json.loads(out.read_bytes().splitlines()[0])["evaluated"]["words"]
    assert described == json.loads(json.dumps(vars(words)))
