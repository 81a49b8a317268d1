"""Budgets: finishers that are asked in the midst of a run, and change nothing of it. And several runs in one cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from refusals import refused
from scripted import (
    ASKED,
    ASKING,
    EVERY_LAYOUT,
    LAYOUTS_THAT_SHARE,
    PROBLEM,
    WORDS,
    assert_agrees_with_oracle,
    record,
)
from tiny import END, ids_of, load_model
from util import relative_difference

from minihogwild import Cache, Run, Sampling
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.layouts import block_of
from minihogwild.replay import advance_lengths, digest
from minihogwild.workers import drive, drive_together

FEW_WORDS = replace(ASKING, finisher_tokens=5)


def of_the_workers(run: Run, events: list[dict]) -> list[dict]:
    """What the workers did: all events but those of finishers. Their steps are the ones with a view of a worker."""
    workers = [worker.block for worker in run.workers]
    kept = []
    for event in events:
        is_finishers = (
            event["do"] == "step" and event["views"][-1][-1] not in workers and event["sampled"][-1] is not None
        )
        if event["do"] == "drop" or is_finishers or event.get("worker", "").startswith("finisher"):
            continue
        kept.append(event)
    return kept


def run_to_end(run: Run, driver=drive) -> tuple[list[dict], list[str]]:
    """Its events, and a digest of the logits of each step that is not a finisher's."""
    events = list(driver(run, run.new_cache()))
    digests = [digest(event["logits"]) for event in of_the_workers(run, events) if event["do"] == "step"]
    return [{key: value for key, value in event.items() if key != "logits"} for event in events], digests


@examples(30, suppress_health_check=[HealthCheck.too_slow])
@given(
    layout=st.sampled_from(EVERY_LAYOUT),
    workers=st.integers(1, 3),
    budgets=st.sets(st.integers(1, 30), min_size=1, max_size=4).map(sorted),
    seed=st.integers(0, 1000),
    ahead=st.booleans(),
)
def test_a_budgets_finisher_changes_nothing_of_the_run(model, layout, workers, budgets, seed, ahead):
    """Bit for bit: what the workers wrote, when, and the logits that it was drawn from."""
    driver = drive_ahead if ahead and (layout != "independent" or workers == 1) else drive
    options = (model, ASKED, workers, layout, 30, Sampling(1.5), seed, replace(FEW_WORDS, may_end=False))
    plain = Run(*options)
    asked = Run(*options, budgets=tuple(budgets))
    events, digests = run_to_end(plain, drive)
    events_when_asked, digests_when_asked = run_to_end(asked, driver)
    assert of_the_workers(plain, events) == of_the_workers(asked, events_when_asked)
    assert digests == digests_when_asked
    assert (plain.stopped_by, plain.forward_steps) == (asked.stopped_by, asked.forward_steps)
    dropped = {event["block"] for event in events_when_asked if event["do"] == "drop"}
    assert all(asked.lengths[block] == 0 for block in dropped - {f.block for f in asked.finishers})


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("budget", [1, 4, 9, 13])
def test_a_budget_gives_what_a_run_of_so_many_steps_gives(model, layout, budget):
    """Also the last tokens, which have not been fed yet, are seen: the same tokens come from the same logits."""
    scripts = [ids_of(model, "aa.", "\n\n", "bb"), ids_of(model, "c", END), ids_of(model, "dddd.", "\n\n", "e")]

    def finishers_logits(max_steps: int, budgets: tuple[int, ...]) -> tuple[list, list]:
        options = {"max_steps": max_steps, "problem": ASKED, "prompts": FEW_WORDS, "computing": True}
        seen = record(model, 3, layout, scripts, budgets=budgets, **options)
        assert_agrees_with_oracle(seen)
        found = []
        for step, logits in zip(seen.steps, seen.logits, strict=True):
            if step["views"][-1][-1].startswith("answer") and step["sampled"][-1] is not None:
                rows = [n for n, token in enumerate(step["sampled"]) if token is not None]
                found.append(([step["sampled"][n] for n in rows], logits[rows]))
            elif found:
                break  # the first budget's are over
        return found

    short = finishers_logits(budget, ())
    long = finishers_logits(20, (budget,))
    assert short
    assert [tokens for tokens, _ in short] == [tokens for tokens, _ in long]
    for (_, ours), (_, theirs) in zip(short, long, strict=True):
        assert relative_difference(ours, theirs) < 1e-9


def test_what_is_asked_at_budgets_is_told_and_dropped(model):
    scripts = [ids_of(model, "a" * 9), ids_of(model, "b" * 9)]
    finisher = ids_of(model, "1}2}3}")  # goes on with its script at each budget
    seen = record(model, 2, "combined", scripts, finisher=finisher, prompts=ASKING, max_steps=6, budgets=(2, 4, 6))
    assert seen.run.answer_at == {2: "1", 4: "2"}
    assert seen.run.answer == "3"
    assert seen.run.summary()["answers_by_budget"] == {2: "1", 4: "2", 6: "3"}
    assert (seen.run.forward_steps, seen.run.finisher_steps, seen.run.stopped_by) == (6, 6, "steps")
    drops = [event["block"] for event in seen.events if event["do"] == "drop"]
    assert drops == ["last token of Alice", "last token of Bob", "answer by finisher"] * 2
    first = seen.steps[2 + 2]  # after the prompt, the headers, and two steps
    common, finishers = "common", "answer by finisher"
    alice, bob = [block_of("Alice"), "last token of Alice"], [block_of("Bob"), "last token of Bob"]
    assert first["views"] == [
        [common, "header others", *bob, "header own", *alice],
        [common, "header others", *alice, "header own", *bob],
        [common, *alice, *bob, finishers],
    ]
    assert [seen.text(ids) for ids in first["tokens"]] == ["a", "b", ASKING.cue]
    fed_next = next(step for step in seen.steps[5:] if block_of("Alice") == step["views"][0][-1])
    assert [seen.text(ids) for ids in fed_next["tokens"]] == ["a", "b"]  # once more, to their own blocks


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_an_answer_that_a_worker_gave_holds_for_all_later_budgets(model, layout):
    scripts = [ids_of(model, "\\boxed{7}"), []]
    seen = record(model, 2, layout, scripts, finisher=ids_of(model, "1}"), prompts=ASKING, budgets=(2, 100, 1000))
    assert seen.run.summary()["answers_by_budget"] == {2: "1", 100: "7", 1000: "7"}


def test_independent_workers_have_a_finisher_each_and_the_majority_counts(model):
    scripts = [ids_of(model, "\\boxed{8}", END), ids_of(model, "b" * 40), ids_of(model, "c" * 40)]
    finishers = {"finisher of Bob": ids_of(model, "5}5}"), "finisher of Carol": ids_of(model, "5}8}")}
    options = {"problem": ASKED, "max_steps": 20, "budgets": (12, 20), "computing": True}
    seen = record(model, 3, "independent", scripts, finisher=finishers, **options)
    assert seen.run.summary()["answers_by_budget"] == {12: "5", 20: "8"}
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("budgets", [(0,), (3, 3), (5, 4), (4, 11), (-1, 3)])
def test_budgets_must_increase_up_to_max_steps(model, budgets):
    with refused(f"budgets are {list(budgets)}: they must increase, from 1 to max_steps, 10"):
        Run(model, PROBLEM, 2, max_steps=10, prompts=WORDS, budgets=budgets)


def test_a_budget_asks_whether_or_not_the_prompt_speaks_of_a_box(model):
    seen = record(model, 2, "combined", [[], []], finisher=ids_of(model, "4}"), max_steps=3, budgets=(3,))
    assert seen.run.answer == "4"


# ---- several runs in one cache


@examples(12, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(EVERY_LAYOUT), st.integers(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_runs_in_one_cache_go_as_they_would_alone(model, kinds, seed):
    def make() -> dict[str, Run]:
        runs = {}
        for number, (layout, workers) in enumerate(kinds):
            options = (model, f"{number} + {seed}?", workers, layout, 5 + 7 * number, Sampling(1.5), seed + number)
            runs[f"{number}: "] = Run(*options, FEW_WORDS, budgets=(3, 5))
        return runs

    alone = {}
    for key, run in make().items():
        alone[key] = list(drive(run, run.new_cache()))
    runs = make()
    blocks = [key + block for key, run in runs.items() for block in run.blocks]
    cache = Cache(model.config, blocks, model.dtype)
    together = {key: [] for key in runs}
    for key, event in drive_together(runs, cache):
        together[key].append(event)
    for key in runs:
        for ours, theirs in zip(together[key], alone[key], strict=True):
            logits, others = ours.pop("logits", torch.zeros(1)), theirs.pop("logits", torch.zeros(1))
            assert ours == theirs
            assert logits.shape == others.shape
            assert (logits - others).abs().max() <= 1e-9 * others.abs().max().clamp(min=1e-30)


def test_a_run_that_is_stopped_ends_alone(model):
    runs = {key: Run(model, PROBLEM, 2, "combined", 6, Sampling(1.0), 0, WORDS) for key in ("a ", "b ")}
    cache = Cache(model.config, [key + block for key, run in runs.items() for block in run.blocks], model.dtype)
    for key, event in drive_together(runs, cache):
        if key == "a " and event["do"] == "step" and runs[key].forward_steps == 2:
            runs[key].stop()
    assert [(run.stopped_by, run.forward_steps) for run in runs.values()] == [("interrupt", 2), ("steps", 6)]


# ---- what may not be, and what is told when it is cut off


def test_budgets_ask_for_a_box_so_boxes_must_be_read(model):
    with refused("boxed"):
        Run(model, PROBLEM, 2, prompts=replace(WORDS, boxed=False), budgets=(3,))
    assert Run(model, PROBLEM, 2, prompts=replace(WORDS, boxed=False), budgets=[]).finishers == []


def test_budgets_that_were_not_reached_have_no_answer_where_a_run_was_cut_off(model):
    run = Run(model, ASKED, 2, "combined", 30, Sampling(1.5), 0, FEW_WORDS, budgets=(3, 8, 20))
    for event in drive(run, run.new_cache()):
        if event["do"] == "text" and event["worker"] == "finisher" and run.forward_steps == 8:
            run.stop()
    assert run.stopped_by == "interrupt"
    assert list(run.summary()["answers_by_budget"]) == [3]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_driver_that_asks_too_early_is_told_so(model, steps):
    """At a budget, and at the end: what is fed there depends on tokens that have not been learned."""
    budgets = (1,) if steps == 4 else ()
    run = Run(model, PROBLEM, 2, "combined", steps, prompts=WORDS, budgets=budgets)
    while run.next_feed().stage == "prompt":
        run.learn([0] * len(run.decide().writers))
    run.decide()
    with pytest.raises(RuntimeError, match="not been learned"):
        run.next_feed()


def test_at_the_end_of_the_context_a_budgets_finisher_has_its_room(tmp_path):
    """Whatever the context: no view ever outgrows it, nor does a finisher's."""
    for context in range(150, 175, 4):
        small = load_model(tmp_path / str(context), context=context)
        run = Run(small, ASKED, 2, "combined", 60, Sampling(1.5), 0, FEW_WORDS, budgets=tuple(range(1, 61)))
        lengths = dict.fromkeys(run.blocks, 0)
        for event in drive(run, run.new_cache()):
            if event["do"] == "step":
                advance_lengths(lengths, event)
                assert all(sum(lengths[block] for block in view) <= context for view in event["views"])
            elif event["do"] in ("move", "drop"):
                advance_lengths(lengths, event)


def test_finishers_names_differ_also_from_each_other(model):
    words = replace(ASKING, names=("Alice", "Alice'", "finisher of Alice"))
    run = Run(model, ASKED, 3, "independent", prompts=words)
    assert len({finisher.name for finisher in run.finishers} | set(words.names)) == 6
    assert len(set(run.blocks)) == len(run.blocks)


def test_what_does_not_fit_is_named(model):
    with refused("a finisher's answer up to 1000000", "context of 4096"):
        Run(model, ASKED, 2, prompts=replace(ASKING, finisher_tokens=10**6))
    with refused("headers and roles 50", "context of 4096"):
        Run(model, PROBLEM, 2, prompts=replace(WORDS, roles=("x" * 5000,)))
