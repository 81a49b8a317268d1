"""When a run ends: an answer, everybody's end, the number of steps, the context, an interrupt, logits that are no
numbers; and what is refused before it begins. Texts are scripted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from refusals import refused
from scripted import (
    ASKED,
    ASKING,
    EVERY_LAYOUT,
    LAYOUTS_THAT_SHARE,
    PROBLEM,
    WORDS,
    Driver,
    Record,
    ScriptedBackend,
    ScriptedRun,
    record,
)
from tiny import END, ids_of, load_model

from minihogwild import InputError, Run
from minihogwild.backend import PyTorchBackend
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.layouts import block_of
from minihogwild.workers import drive

DRIVERS = pytest.mark.parametrize("driver", [drive, drive_ahead])


# ---- an answer


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_the_first_complete_box_stops_the_run(model, layout):
    spoken = "so \\boxed{\\frac{1}{2}}"
    seen = record(model, 2, layout, [ids_of(model, "a" * 30), ids_of(model, spoken + " is it")], prompts=ASKING)
    assert seen.run.answer == "\\frac{1}{2}"
    assert seen.run.stopped_by == "answer"
    assert seen.run.finisher_steps == 0
    assert seen.run.forward_steps == len(spoken)  # one token a step, and the last is never fed
    assert seen.events[-1] == {"do": "text", "worker": "Bob", "text": "}"}
    summary = seen.run.summary()
    assert [worker["paragraphs"] for worker in summary["workers"]] == [["a" * len(spoken)], [spoken]]
    assert [worker["answer"] for worker in summary["workers"]] == [None, "\\frac{1}{2}"]


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_of_two_answers_in_one_step_the_lowest_workers_counts(model, layout):
    nothing, two, three = ids_of(model, "aaa"), ids_of(model, "\\boxed{2}"), ids_of(model, "\\boxed{3}")
    assert record(model, 3, layout, [nothing, two, three]).run.answer == "2"
    assert record(model, 3, layout, [nothing, three, two]).run.answer == "3"


def test_a_box_that_is_completed_inside_a_token(model):
    script = ids_of(model, "\\boxed{1}. So")
    assert [model.tokenizer.decode([token]) for token in script[7:10]] == ["1", "}.", " "]
    seen = record(model, 2, "combined", [ids_of(model, "a"), script])
    assert seen.run.answer == "1"
    assert seen.run.summary()["workers"][1]["paragraphs"] == ["\\boxed{1}."]


def test_an_empty_box_is_no_answer(model):
    seen = record(model, 2, "combined", [ids_of(model, "\\boxed{} \\boxed{ } \\boxed{x}"), ids_of(model, "b")])
    assert seen.run.answer == "x"


def test_what_was_not_sampled_is_no_answer(model):
    words = replace(WORDS, together="\\boxed{1} {problem}", prefix="\\boxed{2}{name}", header_own="\\boxed{3}")
    scripts = [ids_of(model, "a}", END)] * 2
    seen = record(model, 2, "combined", scripts, ids_of(model, "5}"), problem="\\boxed{4}", prompts=words)
    assert seen.run.stopped_by == "retired"
    assert seen.run.answer == "5"


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_without_boxed_answers_a_box_is_text(model, layout):
    words = replace(ASKING, boxed=False)
    scripts = [ids_of(model, "\\boxed{1} ok", END)] * 2
    seen = record(model, 2, layout, scripts, prompts=words, problem="\\boxed{}?")
    assert (seen.run.answer, seen.run.stopped_by, seen.run.finisher_steps) == (None, "retired", 0)
    assert [worker.answer for worker in seen.run.workers] == [None, None]


# ---- the number of steps


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_max_steps(model, layout, max_steps):
    seen = record(model, 2, layout, [[], []], max_steps=max_steps)
    assert seen.run.stopped_by == "steps"
    assert seen.run.forward_steps == len(seen.forward) == max_steps
    assert [worker.sampled for worker in seen.run.workers] == [max_steps] * 2


@DRIVERS
@pytest.mark.parametrize(
    ("texts", "max_steps", "stopped_by"),
    [
        (["a" + END, "a" + END], 3, "retired"),
        (["a" + END, "a" + END], 2, "steps"),
        (["ab", "\\boxed{1}"], 9, "answer"),
        (["ab", "\\boxed{1}"], 8, "steps"),
    ],
)
def test_an_end_in_the_last_step_is_an_end(model, driver, texts, max_steps, stopped_by):
    scripts = [ids_of(model, text.removesuffix(END), *[END] * text.endswith(END)) for text in texts]
    assert record(model, 2, "combined", scripts, max_steps=max_steps, driver=driver).run.stopped_by == stopped_by


# ---- the context


def longest_view(seen: Record) -> int:
    longest = 0
    for event, blocks in seen.walk():
        if event["do"] == "step":
            for view in event["views"]:
                longest = max(longest, sum(len(blocks[block]) for block in view))
    return longest


@DRIVERS
@pytest.mark.parametrize("asking", [True, False], ids=["asking", "not asking"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_no_view_outgrows_the_context(tmp_path, layout, workers, asking, driver):
    if layout == "independent" and workers > 1:
        driver = drive  # such runs are never driven ahead
    context = 200
    model = load_model(tmp_path, context=context)
    texts = [["aa", ".\n\n"] * 40, ["bbbbbbbb", ".\n\n"] * 20, ["c" * 200]]
    seen = record(
        model,
        workers,
        layout,
        [ids_of(model, *text) for text in texts[:workers]],
        finisher=ids_of(model, "y" * 100),  # as long as it may
        prompts=ASKING if asking else WORDS,
        problem=ASKED if asking else PROBLEM,
        max_steps=1000,
        driver=driver,
    )
    assert seen.run.stopped_by == "context"
    assert (seen.run.finisher_steps > 0) == asking
    longest = longest_view(seen)
    assert longest <= context
    # Nor does it stop early: the next step, a prefix for each at most, would not have fitted
    assert longest > context - workers * (len("**Alice [10]:**") + 1) - 2


def test_room_for_the_finisher_is_kept_only_where_it_speaks(tmp_path):
    model = load_model(tmp_path, context=200)
    plain = record(model, 2, "independent", [[], []], max_steps=1000)
    boxed_wanted = record(model, 2, "independent", [[], []], problem=PROBLEM + "\\boxed{}", max_steps=1000)
    assert longest_view(plain) == 200
    more = len(ids_of(model, "\\boxed{}" + ASKING.cue)) + 64
    assert 0 <= plain.run.forward_steps - boxed_wanted.run.forward_steps - more <= 4


def test_the_context_counts_what_yarn_adds(tmp_path):
    model = load_model(tmp_path, context=150)
    rope = replace(model.config.rope, rope_type="yarn", factor=4.0, original_max_position_embeddings=50)
    model.config = replace(model.config, rope=rope)
    seen = record(model, 1, "independent", [[]], max_steps=1000)
    assert seen.run.stopped_by == "context"
    assert longest_view(seen) == 200


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("asking", [True, False], ids=["asking", "not asking"])
def test_no_length_of_prompt_breaks_the_context(tmp_path, layout, asking):
    """From prompts that fit well to prompts that do not fit: a refusal, or a run within the context."""
    context = 160
    model = load_model(tmp_path, context=context)
    words = replace(ASKING if asking else WORDS, together="{problem}")
    scripts = [ids_of(model, "a.", "\n\n")] * 2
    too_long, longest = {}, {}
    for length in range(1, context + 2, 5):
        problem = ("p" * length + "\\boxed")[-length:] if asking else "p" * length
        try:
            longest[length] = longest_view(record(model, 2, layout, scripts, None, problem, words, max_steps=4))
        except InputError as error:
            too_long[length] = str(error)
    assert {length: view for length, view in longest.items() if view > context} == {}
    room = len(words.cue) + 64 if asking else 0
    assert min(too_long) > max(longest) > context - room - 30  # headers and prefixes must fit too
    assert all(str(length) in error and str(context) in error for length, error in too_long.items())


# ---- an interrupt: the run is asked to stop, at any moment


def tokens_told(events: list[dict], run: Run) -> int:
    """How many tokens the workers have sampled, by the events."""
    of_workers = {worker.block for worker in run.workers}
    steps = [event for event in events if event["do"] == "step"]
    pairs = [pair for step in steps for pair in zip(step["views"], step["sampled"], strict=True)]
    return sum(token is not None and view[-1] in of_workers for view, token in pairs)


def assert_agrees_with_what_was_told(run: Run, told: list[dict]) -> None:
    """History, summary and the events that were told are of one run."""
    assert run.history == [event for event in told if event["do"] != "text"]
    summary = run.summary()
    assert summary["tokens"] == tokens_told(told, run)
    assert summary["tokens"] == sum(worker["tokens"] for worker in summary["workers"])
    for worker in summary["workers"]:
        own = [event for event in told if event.get("worker") == worker["name"]]
        texts = [event["text"] for event in own if event["do"] == "text"]
        assert "".join(worker["paragraphs"]) == "".join(texts)
        prefixes = [event["text"] for event in own if event["do"] == "begin"]
        assert len(worker["paragraphs"]) == len(prefixes)
        ids_of_prefixes = run.model.tokenizer.encode("".join(prefixes))
        assert len(worker["token_ids"]) == len(ids_of_prefixes) + worker["tokens"]


def without_logits(event: dict) -> dict:
    return {key: value for key, value in event.items() if key != "logits"}


def stopped_after(model, layout: str, driver: Driver, events_before: int) -> tuple[Run, list[dict]]:
    """A run that is asked to stop when so many of its events have been told."""
    texts = {"Alice": ids_of(model, "a.\n\n", "b.\n\n", "c"), "Bob": ids_of(model, "bbb", END)}
    scripts = {block_of(name): script for name, script in texts.items()}
    options = {"prompts": ASKING, "max_steps": 12, "backend": ScriptedBackend()}
    run = ScriptedRun(model, ASKED, 2, layout, scripts=scripts, **options)
    told = []
    if events_before == 0:
        run.stop()
    for event in driver(run, run.new_cache()):
        told.append(without_logits(event))
        if len(told) == events_before:
            run.stop()
    return run, told


@DRIVERS
@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_a_run_that_is_asked_to_stop_ends_at_a_steps_end(model, layout, driver):
    _, whole = stopped_after(model, layout, driver, events_before=10**6)
    last_of_the_work = max(n for n, event in enumerate(whole) if event.get("worker") in ("Alice", "Bob"))
    assert whole[-1]["worker"] == "finisher"
    for events_before in range(last_of_the_work):
        run, told = stopped_after(model, layout, driver, events_before)
        assert run.stopped_by == "interrupt"
        assert told == whole[: len(told)]
        assert len(told) >= events_before
        assert run.finisher_steps == 0
        assert not any(event.get("worker") == "finisher" for event in told)
        assert_agrees_with_what_was_told(run, told)
        if run.forward_steps:  # the next event would have been another step's, or the finisher's cue
            after = whole[len(told)]
            assert after["do"] == "step" or after["worker"] == "finisher"


@DRIVERS
def test_at_most_the_step_that_is_under_way_follows_an_interrupt(model, driver):
    for events_before in range(1, 20):
        _, told = stopped_after(model, "combined", driver, events_before)
        steps_after = [event for event in told[events_before:] if event["do"] == "step"]
        assert len(steps_after) <= 1


@DRIVERS
def test_a_finisher_that_is_asked_to_stop_says_no_more(model, driver):
    _, whole = stopped_after(model, "combined", driver, events_before=10**6)
    cue = next(n for n, event in enumerate(whole) if event.get("worker") == "finisher")
    run, told = stopped_after(model, "combined", driver, events_before=cue + 4)
    assert run.stopped_by == "interrupt"
    assert 0 < run.finisher_steps < 64
    assert_agrees_with_what_was_told(run, told)


class AskedAtACall(ScriptedRun):
    """Asked to stop while its driver is in the n-th call of one of its methods: before that begins, or when it ends."""

    asked_in_time = False  # while there was still work to do

    def stop(self) -> None:
        self.asked_in_time = Run.reason_to_stop(self) is None
        super().stop()

    def ask_at(self, method: str, call: int, at_its_end: bool) -> None:
        inner = getattr(self, method)
        calls = itertools.count(1)

        def asked(*arguments: object) -> object:
            is_the_one = next(calls) == call
            if is_the_one and not at_its_end:
                self.stop()
            result = inner(*arguments)
            if is_the_one and at_its_end:
                self.stop()
            return result

        setattr(self, method, asked)


@DRIVERS
@pytest.mark.parametrize("at_its_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["next_feed", "reason_to_stop", "decide", "learn", "tell_waiting"])
def test_a_signal_may_come_at_any_moment(model, method, at_its_end, driver):
    """As a handler of Ctrl-C calls `stop`: in the middle of anything."""
    scripts = {block_of("Alice"): ids_of(model, "a.\n\n", "b.\n\n"), block_of("Bob"): ids_of(model, "bbb", END)}
    for call in range(1, 13):
        options = {"prompts": ASKING, "max_steps": 9, "backend": ScriptedBackend()}
        run = AskedAtACall(model, ASKED, 2, "combined", scripts=scripts, **options)
        run.ask_at(method, call, at_its_end)
        told = [without_logits(event) for event in driver(run, run.new_cache())]
        if run.asked_in_time:
            assert run.stopped_by == "interrupt"
            assert not any(event.get("worker") == "finisher" for event in told)
        assert_agrees_with_what_was_told(run, told)


@DRIVERS
def test_a_run_that_is_left_counts_what_was_told(model, driver):
    run = Run(model, PROBLEM, 2, "interleaved", prompts=WORDS, max_steps=9)
    told = []
    for event in driver(run, run.new_cache()):
        told.append(event)
        if run.forward_steps == 3:
            break
    assert sum(event["do"] == "step" for event in told) == 1 + 3  # after the prompt
    assert run.summary()["tokens"] == 2 * 3


# ---- logits that are no numbers


class FailingBackend(PyTorchBackend):
    """From its n-th pass on, one row's logits are NaN."""

    def __init__(self, at_pass: int, row: int):
        self.passes = 0
        self.at_pass = at_pass
        self.row = row

    def run(self, forward, *arguments: object) -> torch.Tensor:
        self.passes += 1
        logits = forward(*arguments)
        if self.passes >= self.at_pass:
            logits[self.row] = math.nan
        return logits


@DRIVERS
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 3])
def test_logits_of_one_worker_that_are_no_numbers_end_the_run(model, driver, row, step):
    backend = FailingBackend(at_pass=1 + step, row=row)  # the first pass is the prompt's
    run = Run(model, PROBLEM, 3, "interleaved", prompts=WORDS, max_steps=9, backend=backend)
    told = []
    with refused(f"step {step}: {['Alice', 'Bob', 'Carol'][row]}'s logits", "NaN", "float32"):
        for event in driver(run, run.new_cache()):
            told.append(without_logits(event))
    assert run.forward_steps == step - 1
    assert sum(event["do"] == "step" for event in told) == 1 + step - 1
    assert_agrees_with_what_was_told(run, told)


@DRIVERS
@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_what_another_worker_did_in_a_step_that_failed_is_not_told(model, layout, driver):
    """Alice's paragraph has closed, and Carol has retired, in the very step in which Bob's logits are no numbers."""
    scripts = {
        block_of("Alice"): ids_of(model, "a.\n\n"),
        block_of("Bob"): ids_of(model, "bbbbbb"),
        block_of("Carol"): ids_of(model, "cc", END),
    }
    prefill = 2 if layout == "combined" else 1
    backend = ScriptedBackend()
    run = ScriptedRun(model, PROBLEM, 3, layout, scripts=scripts, prompts=WORDS, max_steps=9, backend=backend)
    backend.unsound = (prefill + 4, 1)
    told = []
    with refused("step 4: Bob's logits"):
        for event in driver(run, run.new_cache()):
            told.append(without_logits(event))
    assert run.forward_steps == 3
    assert_agrees_with_what_was_told(run, told)


@DRIVERS
def test_logits_of_the_finisher_that_are_no_numbers_end_the_run(model, driver):
    backend = FailingBackend(at_pass=1 + 4 + 2, row=-1)
    run = Run(model, ASKED, 2, "interleaved", prompts=ASKING, max_steps=4, backend=backend)
    told = []
    with refused("finisher's logits", "NaN"):
        for event in driver(run, run.new_cache()):
            told.append(without_logits(event))
    assert (run.forward_steps, run.finisher_steps) == (4, 1)
    assert_agrees_with_what_was_told(run, told)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 17}, "workers is 17"),
        ({"layout": "sideways"}, "sideways"),
        ({"problem": ""}, "prompt is empty"),
        ({"problem": " \n\t "}, "prompt is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -3}, "max_steps is -3"),
        ({"problem": "p" * 5000}, "4096"),
        ({"problem": "p" * 5000, "layout": "independent"}, "5000"),
    ],
)
def test_bad_arguments_are_refused_when_the_run_is_made(model, options, culprit):
    with refused(culprit):
        Run(model, **{"problem": PROBLEM, "prompts": WORDS, **options})
