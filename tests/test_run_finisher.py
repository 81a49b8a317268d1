"""The finisher, who is asked for the answer where the workers have not given one. Texts are scripted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import (
    ASKED,
    ASKING,
    EVERY_LAYOUT,
    LAYOUTS_THAT_SHARE,
    PROBLEM,
    WORDS,
    assert_agrees_with_oracle,
    record,
    view_of,
)
from tiny import END, ids_of

from minihogwild import Run, Sampling
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.layouts import COMMON, block_of
from minihogwild.workers import drive

DRIVERS = pytest.mark.parametrize("driver", [drive, drive_ahead])


@DRIVERS
@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_the_finisher_sees_everything_and_is_fed_what_was_left(model, layout, driver):
    scripts = [ids_of(model, "aaaa"), ids_of(model, "b", END), ids_of(model, "cc.", "\n\n", "dd")]
    # Alice and Carol have each a sampled token that is not fed; Bob has retired
    options = {"prompts": ASKING, "max_steps": 4, "computing": True, "driver": driver}
    seen = record(model, 3, layout, scripts, finisher=ids_of(model, "42}no"), **options)
    first, *others = seen.finisher
    names = ["Alice", "Bob", "Carol"]
    speaks = [COMMON, *map(block_of, names), first["views"][-1][-1]]
    assert seen.run.blocks.count(speaks[-1]) == 1  # a block of its own
    late = {"Alice": "a", "Carol": "\n\n"}
    assert first["views"] == [*(view_of(layout, name, names) for name in late), speaks]
    assert [seen.text(ids) for ids in first["tokens"]] == [*late.values(), ASKING.cue]
    assert first["sampled"] == [None, None, *ids_of(model, "4")]
    assert [step["views"] for step in others] == [[speaks]] * 2
    assert [step["tokens"] for step in others] == [[ids_of(model, "4")], [ids_of(model, "2")]]
    assert [step["sampled"] for step in others] == [ids_of(model, "2"), ids_of(model, "}")]
    assert (seen.run.finisher_steps, seen.run.forward_steps, seen.run.stopped_by) == (3, 4, "steps")
    assert seen.run.answer == "42"
    assert seen.said("finisher") == ASKING.cue + "42}"
    assert [worker.answer for worker in seen.run.workers] == [None] * 3
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_a_prefix_that_was_not_fed_is_not_fed_to_the_finisher(model, layout):
    scripts = [ids_of(model, "a.", "\n\n"), ids_of(model, "bbbbbb")]
    seen = record(model, 2, layout, scripts, finisher=ids_of(model, "1}"), prompts=ASKING, max_steps=4)
    assert seen.moves() == [(4, "Alice")]
    first = seen.finisher[0]
    assert [seen.writer_of(view) for view in first["views"]] == ["Bob", "finisher"]
    assert seen.text(first["tokens"][0]) == "b"


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_the_finisher_speaks_where_all_have_retired(model, layout):
    seen = record(model, 2, layout, [ids_of(model, "a", END)] * 2, finisher=ids_of(model, "1}"), prompts=ASKING)
    assert seen.run.stopped_by == "retired"
    assert [[seen.text(ids) for ids in step["tokens"]] for step in seen.finisher] == [[ASKING.cue], ["1"]]
    assert seen.run.answer == "1"


def test_the_finisher_says_at_most_64_tokens(model):
    seen = record(model, 2, "combined", [[], []], finisher=ids_of(model, "7" * 100), prompts=ASKING, max_steps=2)
    assert seen.run.finisher_steps == 64
    assert seen.run.answer is None
    assert seen.said("finisher") == ASKING.cue + "7" * 64
    assert seen.run.summary()["finisher_steps"] == 64


def test_the_finisher_ends_with_end_of_sequence(model):
    seen = record(model, 2, "combined", [[], []], finisher=ids_of(model, "78", END), prompts=ASKING, max_steps=2)
    assert (seen.run.finisher_steps, seen.run.answer) == (3, None)
    assert seen.said("finisher") == ASKING.cue + "78"


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_finisher_is_greedy_whatever_the_sampling(model, layout):
    """The workers follow a script here, and the finishers the model."""
    options = {"sampling": Sampling(5.0), "prompts": ASKING, "problem": ASKED, "max_steps": 3, "computing": True}
    seen = record(model, 2, layout, [[], []], **options)
    finishers = {finisher.name for finisher in seen.run.finishers}
    assert seen.finisher
    for step, logits in zip(seen.finisher, seen.logits[-len(seen.finisher) :], strict=True):
        for view, token, row in zip(step["views"], step["sampled"], logits, strict=True):
            assert token == (row.argmax() if seen.writer_of(view) in finishers else None)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize(
    ("prompts", "problem"),
    [(WORDS, PROBLEM), (replace(ASKING, boxed=False), ASKED)],
    ids=["the prompt asks for no box", "a box is no answer"],
)
def test_no_finisher_where_no_box_is_asked_for(model, layout, prompts, problem):
    seen = record(model, 2, layout, [[], []], prompts=prompts, problem=problem, max_steps=2)
    assert (seen.run.finishers, seen.run.finisher_steps, seen.finisher, seen.run.answer) == ([], 0, [], None)
    assert {event["worker"] for event in seen.events if "worker" in event} == {"Alice", "Bob"}


def test_a_worker_may_be_called_finisher(model):
    words = replace(ASKING, names=("finisher", "Bob"))
    seen = record(model, 2, "combined", [ids_of(model, "aa"), []], ids_of(model, "5}"), prompts=words, max_steps=2)
    (finisher,) = seen.run.finishers
    assert finisher.name not in ("finisher", "Bob")  # readers can tell them apart
    assert seen.said("finisher") == "aa"
    assert seen.said(finisher.name) == ASKING.cue + "5}"
    assert seen.run.answer == "5"


# ---- where workers are independent


def test_each_independent_worker_without_an_answer_has_a_finisher_of_its_own(model):
    run = Run(model, ASKED, 4, "independent", prompts=WORDS)
    own = {worker.name: finisher for worker, finisher in zip(run.workers, run.finishers, strict=True)}
    assert len({finisher.name for finisher in own.values()}) == 4
    alice, dave = own["Alice"], own["Dave"]

    texts = [["a" * 20], ["\\boxed{7}", END], ["\\boxed{8}", END], ["d", END]]
    scripts = [ids_of(model, *text) for text in texts]
    says = {alice.name: ids_of(model, "8}"), dave.name: ids_of(model, "55", END)}
    options = {"problem": ASKED, "max_steps": 12, "computing": True}
    seen = record(model, 4, "independent", scripts, finisher=says, **options)

    first, *others = seen.finisher
    alone = [COMMON, block_of("Alice")]
    assert first["views"] == [alone, [*alone, alice.block], [COMMON, block_of("Dave"), dave.block]]
    assert [seen.text(ids) for ids in first["tokens"]] == ["a", WORDS.cue, WORDS.cue]
    assert [step["views"] for step in others] == [first["views"][1:], first["views"][2:]]
    assert [worker.answer for worker in seen.run.workers] == [None, "7", "8", None]
    assert [finisher.answer for finisher in seen.run.finishers] == ["8", None, None, None]
    assert seen.run.answer == "8"  # the majority's
    assert (seen.run.finisher_steps, seen.run.stopped_by) == (3, "steps")

    assert seen.said(alice.name) == WORDS.cue + "8}"
    assert seen.said(dave.name) == WORDS.cue + "55"
    assert [seen.said(own[name].name) for name in ("Bob", "Carol")] == ["", ""]
    told = [(f["name"], f["answer"], f["paragraphs"], f["text"]) for f in seen.run.summary()["finishers"]]
    assert told == [
        (alice.name, "8", [WORDS.cue + "8}"], "8}"),
        (dave.name, None, [WORDS.cue + "55"], "55"),
    ]
    assert_agrees_with_oracle(seen)
