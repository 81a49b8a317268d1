"""What real models need: bans, an opening, roles, "all done". (The whole loop with them: test_run_schedule.py.)"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub_files import HIDDEN, build, save
from refusals import refused
from scripted import (
    EVERY_LAYOUT,
    LAYOUTS_THAT_SHARE,
    PROBLEM,
    WORDS,
    assert_agrees_with_oracle,
    record,
)
from tiny import END, ids_of

from minihogwild import Run, Sampling
from minihogwild.generate import main as generate
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.hub import Tokenizer
from minihogwild.layouts import COMMON, block_of
from minihogwild.replay import main as replay
from minihogwild.workers import drive

NO_END = replace(WORDS, may_end=False)
DRIVERS = pytest.mark.parametrize("driver", [drive, drive_ahead])


# ---- bans


@DRIVERS
@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(5.0), Sampling(2.0, 8, 0.9)])
def test_banned_tokens_are_never_sampled_while_workers_share(model, layout, sampling, driver):
    options = {"max_steps": 60, "sampling": sampling, "driver": driver}
    free = record(model, 2, layout, prompts=replace(WORDS, boxed=False), **options)
    assert free.run.banned == []
    usual = tuple({piece for piece in free.said("Alice") if piece.isascii()})
    assert usual
    seen = record(model, 2, layout, prompts=replace(NO_END, boxed=False, banned=usual), **options)
    text = "".join(seen.said(worker.name) for worker in seen.run.workers)
    assert seen.run.stopped_by == "steps"
    assert text
    assert not set(usual) & set(text)
    forbidden = {token for token, text in enumerate(model.tokenizer.texts) if set(usual) & set(text)}
    assert seen.run.banned == sorted(forbidden | model.eos)


def test_an_end_that_is_banned_does_not_retire(model):
    scripts = [ids_of(model, "a", END, "b"), ids_of(model, "c")]
    assert record(model, 2, "combined", scripts, prompts=NO_END, max_steps=5).run.stopped_by == "steps"
    assert not record(model, 2, "combined", scripts, prompts=WORDS, max_steps=5).run.workers[0].active


def test_independent_workers_and_finishers_may_end(model):
    scripts = [ids_of(model, "a", END)] * 2
    seen = record(model, 2, "independent", scripts, prompts=replace(NO_END, banned=("a",)), max_steps=9)
    assert (seen.run.stopped_by, seen.run.banned) == ("retired", [])
    says = ids_of(model, "a", END)
    seen = record(
        model, 2, "combined", [[], []], says, prompts=replace(NO_END, banned=("a",)), max_steps=2, budgets=(2,)
    )
    assert (seen.run.finisher_steps, seen.said("finisher")) == (2, WORDS.cue + "a")


def test_bans_must_leave_something(model):
    with refused("the bans leave no token"):
        every_text = tuple({text for text in model.tokenizer.texts if text})
        Run(model, PROBLEM, 2, prompts=replace(NO_END, banned=every_text))


def test_what_ends_a_thought_or_has_no_text_is_banned(model, tmp_path: Path):
    tokenizer = Tokenizer(save(tmp_path, build("qwen")))
    wide = replace(model.config, vocab_size=tokenizer.size)
    run = Run(replace(model, tokenizer=tokenizer, config=wide), PROBLEM, 2, prompts=NO_END)
    named = {tokenizer.name_of(token) for token in run.banned if token not in model.eos}
    assert named == {*HIDDEN, "</think>"}
    padded = replace(model.config, vocab_size=tokenizer.size + 3)
    run = Run(replace(model, tokenizer=tokenizer, config=padded), PROBLEM, 2, prompts=NO_END)
    assert run.banned[-3:] == [tokenizer.size, tokenizer.size + 1, tokenizer.size + 2]


def test_an_end_of_sequence_that_no_model_could_sample_is_not_banned(model):
    """A folder may name any number; an index out of range would end a run, and on a GPU the whole process."""
    odd = replace(model, eos=frozenset({*model.eos, model.config.vocab_size, 10**9}))
    seen = record(odd, 2, "combined", [[], []], prompts=NO_END, max_steps=3)
    assert seen.run.banned == sorted(model.eos)
    assert seen.run.stopped_by == "steps"


# ---- opening and roles


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_opening_stands_behind_the_prompt_where_workers_share(model, layout):
    words = replace(WORDS, opening="Well,\n")
    seen = record(model, 2, layout, [[], []], prompts=words, max_steps=2)
    plain = record(model, 2, layout, [[], []], max_steps=2)
    assert seen.prompt() == plain.prompt() + ("" if layout == "independent" else "Well,\n")


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_a_role_is_seen_by_its_worker_alone(model, layout):
    words = replace(WORDS, roles=("You are {name}; agree.\n", "Disagree with: {problem}\n"))
    seen = record(model, 3, layout, prompts=words, max_steps=12, sampling=Sampling(1.0))
    blocks = seen.blocks()
    assert blocks["role of Alice"] == "You are Alice; agree.\n"
    assert blocks["role of Bob"] == f"Disagree with: {PROBLEM}\n"
    assert "role of Carol" not in blocks
    for step in seen.forward:
        for view in step["views"]:
            roles = [block for block in view if block.startswith("role of")]
            own = seen.writer_of(view)
            assert roles == [f"role of {own}"] * (own != "Carol")
            assert view[: 1 + len(roles)] == [COMMON, *roles]
    assert_agrees_with_oracle(seen)


def test_independent_workers_have_no_roles(model):
    seen = record(model, 2, "independent", [[], []], prompts=replace(WORDS, roles=("Agree.",)), max_steps=2)
    assert not any(block.startswith("role") for block in seen.run.blocks)


@pytest.mark.parametrize("layout", ["combined", "contiguous"])
def test_who_is_unaware_does_not_see_what_others_write(model, layout):
    words = replace(WORDS, unaware=("Alice",))
    seen = record(model, 3, layout, prompts=words, max_steps=12, sampling=Sampling(1.0))
    for step in seen.forward:
        for view in step["views"]:
            texts = {block for block in view if block.startswith("text of")}
            expected = {"Alice"} if seen.writer_of(view) == "Alice" else {"Alice", "Bob", "Carol"}
            assert texts == {block_of(name) for name in expected}
    assert_agrees_with_oracle(seen)


# ---- all done


@DRIVERS
@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_who_says_that_nothing_is_left_retires_when_that_has_been_fed(model, layout, driver):
    scripts = [ids_of(model, "a.", "\n\n", "done.", "bb"), ids_of(model, "c" * 50)]
    words = replace(NO_END, done="Done.")
    seen = record(model, 2, layout, scripts, prompts=words, max_steps=20, driver=driver)
    retired = [event["worker"] for event in seen.events if event["do"] == "retire"]
    assert retired == ["Alice"]
    last = max(n for n, step in enumerate(seen.fed()) if "Alice" in step)
    assert seen.fed()[last]["Alice"] == "."
    assert seen.sampled()[last]["Alice"] is None
    assert seen.said("Alice") == "a.\n\ndone."


def test_plain_chat_knows_no_such_words(model):
    scripts = [ids_of(model, "Done. And on it goes")] * 2
    seen = record(model, 2, "independent", scripts, prompts=replace(NO_END, done="Done."), max_steps=9)
    assert seen.run.stopped_by == "steps"


# ---- recorded, and replayed


def test_a_recorded_run_says_what_was_banned_and_replays_bit_for_bit(tmp_path, model, capsys):
    words = {"roles": ["Agree.\n", "Disagree.\n"], "opening": "So:\n", "banned": ["a"], "boxed": False}
    (tmp_path / "words.json").write_text(json.dumps(words))
    files = [str(tmp_path / name) for name in ("run.json", "logits.safetensors")]
    folder = str(model.folder)
    options = ["--prompts", str(tmp_path / "words.json"), "--max-steps", "12", "--device", "cpu"]
    assert generate([PROBLEM, "--model", folder, "--record", files[0], *options]) == 0
    schedule = json.loads(Path(files[0]).read_text())
    assert set(model.eos) < set(schedule["banned"])
    assert {"role of Alice", "role of Bob"} < set(schedule["blocks"])
    assert replay([files[0], "--model", folder, "--out", files[1]]) == 0
    assert "all as recorded, bit for bit" in capsys.readouterr().err


# ---- head start


@DRIVERS
@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_each_worker_begins_after_the_one_before_it(model, layout, driver):
    words = replace(WORDS, head_start=3)
    scripts = [ids_of(model, "a" * 20), ids_of(model, "b" * 20), ids_of(model, "c" * 20)]
    seen = record(model, 3, layout, scripts, prompts=words, max_steps=9, driver=driver)
    writing = [set(step) for step in seen.fed()]
    assert writing == [{"Alice"}] * 3 + [{"Alice", "Bob"}] * 3 + [{"Alice", "Bob", "Carol"}] * 3


@DRIVERS
def test_nobody_waits_for_workers_who_have_retired(model, driver):
    words = replace(WORDS, head_start=5)
    scripts = [ids_of(model, "a", END), ids_of(model, "b", END), ids_of(model, "c", END)]
    seen = record(model, 3, "combined", scripts, prompts=words, max_steps=30, driver=driver)
    assert [set(step) for step in seen.fed()] == [{"Alice"}] * 3 + [{"Bob"}] * 3 + [{"Carol"}] * 3
    assert seen.run.stopped_by == "retired"


def test_plain_chat_has_no_head_start(model):
    seen = record(model, 2, "independent", [[], []], prompts=replace(WORDS, head_start=3), max_steps=2)
    assert [set(step) for step in seen.fed()] == [{"Alice", "Bob"}] * 2
