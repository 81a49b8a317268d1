"""The bundled model: what it was taught, how, and whether it does it."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import evaluate as evaluation
import pytest
import torch
import train
from evaluate import evaluate, fresh_sheets, measure
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from refusals import refused
from scripted import play
from sheets import (
    END,
    END_OF_LINE,
    LETTERS,
    NOTHING,
    WAIT,
    WORDS,
    Encoder,
    Row,
    Sheet,
    make_sheet,
    make_tokenizer,
    transcript,
    work,
)
from util import random_weights

from minihogwild import Cache, Model, Run, forward, generate, load
from minihogwild.generate import DUET, main
from minihogwild.hub.checkpoint import empty_weights
from minihogwild.hub.config_json import parse_config
from minihogwild.interrupts import Interrupts
from minihogwild.layouts import COMMON, block_of
from minihogwild.prompts import NAMES, Prompts, load_prompts

TEAM = NAMES.split()
CASES = [("combined", 1), ("combined", 2), ("combined", 4), ("interleaved", 3), ("contiguous", 3), ("independent", 1)]


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder(make_tokenizer())


@pytest.fixture(scope="module")
def duet() -> Model:
    return load(DUET, "float32", "cpu")


# ---- sheets


@given(seed=st.integers(0, 2**32), lines=st.integers(1, 26), dependent=st.floats(0, 1))
def test_sheets(seed, lines, dependent):
    sheet = make_sheet(random.Random(seed), lines, dependent)
    assert list(sheet.lines) == list(LETTERS[:lines])
    values: dict[str, int] = {}
    for line in str(sheet).splitlines():  # Python works them out
        exec(line, {"__builtins__": {}}, values)
    assert values == sheet.values
    for n, operands in enumerate(sheet.lines.values()):
        for operand in operands:
            assert operand in LETTERS[:n] if isinstance(operand, str) else 0 <= operand <= 999
        assert len({*operands}) == 2 or isinstance(operands[0], int)


def test_how_often_a_line_needs_others():
    sheets = [make_sheet(random.Random(seed)) for seed in range(500)]
    assert all(isinstance(x, int) for sheet in sheets for name in "ab" for x in sheet.lines[name])
    later = [isinstance(x, str) for sheet in sheets for x, _ in list(sheet.lines.values())[2:]]
    assert 0.30 < sum(later) / len(later) < 0.37
    numbers = [str(x) for sheet in sheets for operands in sheet.lines.values() for x in operands if isinstance(x, int)]
    assert {1, 2, 3} == {len(number) for number in numbers}
    assert all(0.3 < sum(len(number) == n for number in numbers) / len(numbers) < 0.37 for n in (1, 2, 3))


def written(sheet: Sheet, line: str) -> str:
    return line + "".join(text for _, text in work(sheet, line, sheet.values))


@given(seed=st.integers(0, 2**32))
def test_the_work_is_right(seed):
    sheet = make_sheet(random.Random(seed), 12, 0.6)
    for name, operands in sheet.lines.items():
        text = written(sheet, name)
        assert text.endswith(END_OF_LINE)
        head, columns, result = re.fullmatch(r"(.*): (.*), so (.*)\.\n\n", text).groups()
        assert result == f"{name} = {sheet.values[name]}"
        *given, last = head.removeprefix(f"{name} = ").split(" = ")
        assert sum(map(int, last.split(" + "))) == sheet.values[name]
        assert given == ([" + ".join(operands)] if isinstance(operands[0], str) else [])
        digits = ""
        for column in columns.split(", "):
            left, right = column.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
            assert len(right) == 1 or int(right) < 20
            digits = right[-1] + digits
        assert int(columns.split("=")[-1][:-1] + digits) == sheet.values[name]


def test_a_known_paragraph():
    sheet = Sheet({"a": (30, 45), "b": (7, 118), "c": ("a", "b")})
    assert written(sheet, "c") == "c = a + b = 75 + 125: 5+5=10, 7+2+1=10, 0+1+1=2, so c = 200.\n\n"
    assert written(sheet, "b") == "b = 7 + 118: 7+8=15, 0+1+1=2, 0+1=1, so b = 125.\n\n"
    assert [needed for needed, _ in work(sheet, "c", sheet.values)] == ["", "", "a", "b"]


def test_each_word_is_one_token(encode):
    assert all(len(encode(word)) == 1 for word in WORDS)
    for text in (str(make_sheet(random.Random(1), 26)), "日本 **Alice** nothing, left", END):
        assert encode.tokenizer.decode(encode(text), skip_special_tokens=False) == text


# ---- the expert


def blocks_of(rows: list[Row]) -> dict[str, list[Row]]:
    return {block: [row for row in rows if row.block == block] for block in {row.block: None for row in rows}}


def said_by(rows: list[Row], encode: Encoder, name: str) -> tuple[str, list[Row]]:
    """(what a worker wrote, the row of each of its characters)"""
    mine = blocks_of(rows)[block_of(name)]
    texts = [encode.tokenizer.decode([row.token], skip_special_tokens=False) for row in mine]
    return "".join(texts), [row for row, text in zip(mine, texts) for _ in text]


WORKED_OUT = re.compile(r"(?:(?<=\n)|(?<=\*\* )|^)(?:[a-z]\? )*([a-z])( = )[^.]*so \1 = (\d+)(\.\n\n)")
NAMED_IN_VAIN = re.compile(r"([a-z])(\? )")
READS = re.compile(rf"([a-z]) = ([a-z]) \+ ([a-z]) = {WAIT}*(\d)\d* \+ {WAIT}*(\d)")


@examples(60)
@given(
    seed=st.integers(0, 2**32),
    case=st.sampled_from(CASES),
    lines=st.integers(1, 13),
    slips=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_the_expert_does_everything_once(seed, case, lines, slips):
    layout, workers = case
    encode, sheet = Encoder(make_tokenizer()), make_sheet(random.Random(seed), lines, 0.5)
    rows, steps = transcript(sheet, TEAM[:workers], layout, encode, random.Random(seed), slips)
    assert max(row.step for row in rows) == steps + 1  # prompt and headers are fed in 0 and 1
    done: dict[str, int] = {}  # line -> the step in which its end is fed
    named: list[tuple[int, int, str, bool]] = []  # (step in which it is fed, worker, line, was it taken)
    reads: list[tuple[int, str]] = []  # (the step in which a number is sampled, the line that it is the result of)
    stuck: set[str] = set()
    for w, name in enumerate(TEAM[:workers]):
        written = blocks_of(rows)[block_of(name)]
        for row, after in itertools.pairwise(written):  # what is sampled is fed in the next step
            assert row.target in (-100, after.token)
            assert row.target == -100 or after.step == row.step + 1
        text, at = said_by(rows, encode, name)
        if slips and text.endswith(WAIT):
            stuck.add(name)
        else:
            assert text.count(END) == text.count(NOTHING) == 1
            assert text.endswith(NOTHING + END)
        assert slips or workers > 1 or not set(text) & {WAIT, "?"}
        for match in WORKED_OUT.finditer(text):
            assert int(match[3]) == sheet.values[match[1]]
            assert match[1] not in done
            done[match[1]] = at[match.start(4)].step
            named.append((at[match.start(1)].step, w, match[1], False))
        named += [(at[match.start()].step, w, match[1], True) for match in NAMED_IN_VAIN.finditer(text)]
        reads += [(at[match.start(n + 2)].step - 1, match[n]) for match in READS.finditer(text) for n in (2, 3)]
    assert not stuck or workers > 1
    assert done.keys() == sheet.lines.keys() or stuck
    assert len(reads) == 2 * sum(isinstance(x, str) for x, _ in sheet.lines.values()) or stuck
    assert all(done[needed] <= step for step, needed in reads)  # nothing is read before it is there
    owned: set[str] = set()
    for _, _, line, taken in sorted(named):  # who names a line first has it
        assert taken == (line in owned) or stuck
        owned.add(line)


@pytest.mark.parametrize("slips", [0, 0.3])
@pytest.mark.parametrize(("layout", "workers"), CASES)
def test_choices_are_known_as_such(encode, layout, workers, slips):
    """Names, whether they are one's own, whether to wait, and the end: these, but for the slips, and no others."""
    sheet, slipped = make_sheet(random.Random(5), 9, 0.5), 0
    rows, _ = transcript(sheet, TEAM[:workers], layout, encode, random.Random(0), slips)
    for name in TEAM[:workers]:
        text, at = said_by(rows, encode, name)
        right = {m.start(n) for regex in (WORKED_OUT, NAMED_IN_VAIN) for m in regex.finditer(text) for n in (1, 2)}
        right |= {match.start(n) for match in READS.finditer(text) for n in (4, 5)}
        right |= {match.start() for match in re.finditer(f"{WAIT}|{NOTHING}", text)}
        chosen = {id(row) for before, row in itertools.pairwise(blocks_of(rows)[block_of(name)]) if before.choice}
        taught = {id(row) for before, row in itertools.pairwise(blocks_of(rows)[block_of(name)]) if before.target >= 0}
        rightly = {id(at[n]) for n in right}
        assert chosen == rightly & taught
        slipped += len(rightly - taught)
    assert (slipped > 3) == (slips > 0)


def test_the_expert_takes_what_is_ready(encode):
    sheet = Sheet({"a": (1, 1), "b": (100, 200), "c": ("a", "b"), "d": (3, 4), "e": ("c", "d")})
    rows, _ = transcript(sheet, TEAM[:2], "combined", encode)
    texts = {name: said_by(rows, encode, name)[0] for name in TEAM[:2]}
    assert texts["Bob"].startswith("**Bob [1]:** a? b = 100 + 200: 0+0=0")  # Alice has named it in the same step
    named = re.findall(r"\]:\*\* (\w)", texts["Alice"])
    assert named[:3] == ["a", "d", "c"]  # c needs what Bob is still at
    waits = re.search(r"e = c \+ d = (…+)302 \+ 7: ", texts["Bob"] + texts["Alice"])
    assert len(waits[1]) > 5  # nothing else is left, and e needs c


def test_more_workers_than_lines(encode):
    rows, _ = transcript(make_sheet(random.Random(0), 2), TEAM[:4], "combined", encode)
    for name in ("Carol", "Dave"):
        assert said_by(rows, encode, name)[0] == f"**{name} [1]:** a? b? {NOTHING}{END}"


# ---- the training forward


def tiny_config():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    more = {"head_dim": 16, "intermediate_size": 48, "vocab_size": make_tokenizer().get_vocab_size()}
    return parse_config({**train.SETTINGS, **shape, **more})


@pytest.mark.parametrize(("layout", "workers"), CASES)
def test_all_at_once_equals_the_engine_step_by_step(encode, layout, workers):
    """Token by token, on transcripts of different lengths in one batch."""
    rng, config = random.Random(layout), tiny_config()
    weights = random_weights(config, torch.float64, biases=False)
    teams = [sorted(rng.sample(TEAM, workers)) for _ in range(3)]
    transcripts = [
        transcript(make_sheet(rng, lines, 0.5), team, layout, encode, rng, slips)[0]
        for lines, slips, team in zip((2, 5, 7), (0, 0, 0.2), teams)
    ]
    with torch.no_grad():
        logits = train.forward(train.make_batch(transcripts, teams, layout), weights, config)
    _, arranged = train.arrange([train.by_block(rows, team, layout) for rows, team in zip(transcripts, teams)])
    for together, in_place, rows, team in zip(logits, arranged, transcripts, teams):
        place = {id(row): n for n, row in enumerate(in_place)}
        together = together[[place[id(row)] for row in rows]]
        views = train.views_of(layout, team)
        cache, checked = Cache(config, list(views), torch.float64), 0
        for step in range(max(row.step for row in rows) + 1):
            if not (fed := [(n, row) for n, row in enumerate(rows) if row.step == step]):
                continue
            writers = {row.block: None for _, row in fed}
            chunks = [[(n, row) for n, row in fed if row.block == block] for block in writers]
            # A chunk gives logits for its last token alone: feed the prompt one by one
            for chunk in zip(*chunks) if step < 2 and len(chunks) == 1 else [tuple(itertools.chain(*chunks))]:
                counts = [sum(row.block == block for _, row in chunk) for block in writers]
                plan = cache.extend([views[block] for block in writers], counts)
                ours = forward(torch.tensor([row.token for _, row in chunk]), weights, config, cache, plan)
                last = [[n for n, row in chunk if row.block == block][-1] for block in writers]
                theirs = together[last]
                checked += len(last)
                assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
            for block in writers:
                if any(row.moved == step for _, row in fed if row.block == block):
                    cache.move(block, COMMON)
        assert checked > 60


@pytest.mark.parametrize(("layout", "workers"), CASES)
def test_transcripts_are_what_the_loop_would_do(encode, duet, layout, workers):
    """The loop, given the expert's choices, feeds the same tokens in the same steps to the same blocks."""
    team = TEAM[:workers]
    sheet = make_sheet(random.Random(3), 7, 0.5)
    rows, steps = transcript(sheet, team, layout, encode)
    run = Run(duet, str(sheet), workers, layout)
    choices = {}
    for name in team:
        choices[name] = [row.target for row in rows if row.block == block_of(name) and row.target >= 0]
    fed, moves, step = [], [], -1
    for event in play(run, choices):
        if event["do"] == "step":
            step = run.forward_steps + 1 if run.forward_steps else step + 1
            for view, tokens in zip(event["views"], event["tokens"]):
                fed += [(step, view[-1], token) for token in tokens]
        elif event["do"] == "move":
            moves.append((step, event["from"]))
    assert (run.stopped_by, run.forward_steps) == ("retired", steps)
    assert fed == [(row.step, row.block, row.token) for row in rows]
    assert sorted(moves) == sorted({(row.moved, row.block) for row in rows if row.moved < train.LATE})


@pytest.mark.slow
def test_training_runs_to_its_end(tmp_path, monkeypatch):
    """A few steps of the real thing, and the folder that it leaves is a model like any other."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setattr(train, "SETTINGS", {**train.SETTINGS, **small, "num_hidden_layers": 2, "intermediate_size": 64})
    monkeypatch.setattr(train, "LESSONS", {("combined", 2): 1})
    phases = train.Phase(0.25, 5e-2, (1,), 10), train.Phase(0.05, 1e-3, (3,), 5)
    monkeypatch.setattr(train, "PHASES", phases)
    losses = []
    cross_entropy = train.F.cross_entropy
    monkeypatch.setattr(train.F, "cross_entropy", lambda *a, **k: losses.append(cross_entropy(*a, **k)) or losses[-1])
    options = ["--batch", "2", "--loaders", "0"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "model"), *options])
    train.main()
    means = [float(loss.detach().sum() / (loss != 0).sum()) for loss in losses]
    assert means[0] > 5
    assert min(means[-3:]) < 4.5  # it has begun to learn; whether it learns all is seen in the bundled model
    model = load(tmp_path / "model", device="cpu")
    assert model.dtype == torch.bfloat16
    run = Run(model, "a = 1 + 2", 2, max_steps=3)
    assert [event["do"] for event in run].count("step") == 2 + 3


# ---- the model in the package


def test_its_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in DUET.iterdir()}
    assert sum(files.values()) <= 10e6
    assert files.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "prompts.json"}
    settings = json.loads((DUET / "config.json").read_text())
    assert settings == {**settings, **train.SETTINGS}
    _, parts = empty_weights(parse_config(settings), torch.bfloat16, "meta")
    assert 0 < files["model.safetensors"] - sum(part.nbytes for part in parts.values()) < 10_000  # the header


def test_its_words_are_those_it_was_taught(tmp_path):
    train.save_words(tmp_path, load_prompts(DUET / "prompts.json").problem)
    for path in tmp_path.iterdir():
        assert path.read_text() == (DUET / path.name).read_text(), path.name
    assert load_prompts(DUET / "prompts.json").problem.count("\n") == 11
    assert Prompts().problem == ""


@pytest.fixture(scope="module")
def twenty() -> list[Sheet]:
    return fresh_sheets(20)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_sheet(twenty, workers):
    result = measure((str(DUET), "auto", "combined", workers, twenty[0], 0))
    assert result["right"] == 1
    assert result["duplicates"] == 0
    assert result["retired"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_twenty_sheets(twenty, workers):
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        result = evaluate(str(DUET), "auto", "combined", workers, twenty, pool)
    assert result["right"] >= 0.99
    assert result["whole"] >= 0.95
    assert result["duplicates"] <= 0.05
    assert result["steps"] <= 1.08 * result["expert"]
    assert result["retired"] == 1
    assert (result["backed_off"] > 0.5) == (workers > 1)  # two named the same line, and one let go


def test_who_does_not_see_the_same_step_does_everything_twice(monkeypatch):
    """With the engine broken: what others write in this very step is hidden. They name the same line, every time."""
    extend = Cache.extend

    def one_step_late(cache, views, counts):
        before = dict(cache.lengths)
        plan = extend(cache, views, counts)
        columns = list(dict.fromkeys(block for view in views for block in view))
        late = torch.tensor([before[block] for block in columns])
        visible = plan.visible.minimum(late)
        own = plan.own
        rows = torch.arange(len(own))
        visible[rows, own] = plan.visible[rows, own]
        return replace(plan, visible=visible)

    [sheet] = fresh_sheets(1, 6, 6)  # of six lines
    assert measure((str(DUET), "auto", "combined", 2, sheet, 0))["duplicates"] == 0
    monkeypatch.setattr(Cache, "extend", one_step_late)
    assert measure((str(DUET), "auto", "combined", 2, sheet, 0))["duplicates"] >= 5


@pytest.mark.slow
def test_alone_each_does_everything(twenty):
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        result = evaluate(str(DUET), "auto", "independent", 2, twenty[:5], pool)
    assert result["duplicates"] >= 11  # of 12
    assert result["right"] >= 0.95


def test_no_arguments_no_network(tmp_path):
    """The first thing a newcomer types."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "minihogwild.generate"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=offline, timeout=120)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    sheet, _, text = done.stdout.partition("\n\n")
    values: dict[str, int] = {}
    for line in sheet.splitlines():
        exec(line, {"__builtins__": {}}, values)
    assert len(values) == 12
    results = re.findall(r"^(\w+): .*so (\w) = (\d+)\.$", text, re.MULTILINE)
    assert sorted(line for _, line, _ in results) == sorted(values)  # each once
    assert all(int(value) == values[line] for _, line, value in results)
    assert {name for name, _, _ in results} == {"Alice", "Bob"}
    assert "stopped by retired" in done.stderr


class TimedSleep(Interrupts):
    """Knows how long it has slept."""

    slept = 0.0

    def sleep(self, seconds: float) -> None:
        began = time.perf_counter()
        super().sleep(seconds)
        self.slept += time.perf_counter() - began


def test_a_paced_run_sleeps_between_its_steps_and_does_not_count_that(duet):
    run = Run(duet, "a = 1 + 2", 1, max_steps=9)
    signals = TimedSleep(run.stop)
    began = time.perf_counter()
    steps = [event for event in generate.events_at_pace(run, 20, signals) if event["do"] == "step"]
    took = time.perf_counter() - began
    assert took >= (len(steps) - 1) / 20  # the first need not wait
    assert 0 < run.seconds <= took - signals.slept


@pytest.mark.parametrize("pace", [-1.0, math.nan, math.inf, 1e-300])
def test_a_pace_that_is_none_is_refused(pace):
    with refused("pace", str(pace)):
        generate.require_pace(pace)


@pytest.mark.slow
def test_the_evaluation_and_its_figure(capsys, tmp_path, monkeypatch):
    figure = tmp_path / "new" / "figure.svg"
    options = ["--sheets", "2", "--lines", "14", "14", "--workers", "1", "2", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options])
    evaluation.main()
    *_, last = capsys.readouterr().out.splitlines()
    one, two = json.loads(last)
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["steps"] > 1.7 * two["steps"]
    assert one["duplicates"] == two["duplicates"] == 0  # "nothing left" claims no line n
    assert one["right"] == two["right"] == 1
    assert "<svg" in figure.read_text()


def test_a_dash_is_never_the_models_own_problem(capsys, monkeypatch):
    for stdin in (None, io.TextIOWrapper(io.BytesIO(b" "))):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["-"]) == 2
        assert "prompt is empty" in capsys.readouterr().err
