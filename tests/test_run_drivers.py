"""Who drives a run: `drive`, a step at a time, and `drive_ahead`, which lets no GPU wait. Both are tested on the CPU.

And the engine below: whatever a run's schedule, the slow oracle gives the same logits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from scripted import (
    ASKED,
    ASKING,
    EVERY_LAYOUT,
    LAYOUTS_THAT_SHARE,
    PROBLEM,
    WORDS,
    ScriptedBackend,
    ScriptedRun,
    assert_agrees_with_oracle,
    record,
)
from tiny import END, ids_of

from minihogwild import InputError, Run, Sampling, workers
from minihogwild.backend import PREFILL_CHUNK, PREFILL_SCORES, PyTorchBackend
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.layouts import COMMON
from minihogwild.workers import drive

TIMES = ("seconds", "ms_per_step", "tokens_per_second")


def result_of(run: Run) -> dict:
    """The summary, but for what a clock says."""
    return {key: value for key, value in run.summary().items() if key not in TIMES}


# ---- two orders, one run


RUN_AHEAD = [(layout, count) for layout in EVERY_LAYOUT for count in (1, 3) if (layout, count) != ("independent", 3)]


@pytest.mark.parametrize(("layout", "count"), RUN_AHEAD)
@pytest.mark.parametrize("texts", [["a.\n\n", "b \\boxed{1}"], ["a", END], ["x"]], ids=["answer", "end", "steps"])
def test_a_step_ahead_tells_the_same_in_the_same_order(model, layout, count, texts):
    scripts = [ids_of(model, *texts) for _ in range(count)]
    told = [record(model, count, layout, scripts, max_steps=40, driver=driver) for driver in (drive, drive_ahead)]
    assert told[0].events == told[1].events
    assert result_of(told[0].run) == result_of(told[1].run)
    # A step is in vain where the answer is found when it has begun, and no other
    in_vain = told[1].run.backend.passes - told[0].run.backend.passes
    assert in_vain == (told[1].run.stopped_by == "answer")


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_a_step_ahead_computes_the_same(model, layout):
    """Here the model itself decides what is written, and the tokens stay where they were drawn until they are fed."""
    told = []
    for driver in (drive, drive_ahead):
        run = Run(model, PROBLEM, 3, layout, 20, Sampling(1.0, top_p=0.9), seed=3, prompts=WORDS)
        told.append(list(driver(run, run.new_cache())))
    for one, other in zip(*told, strict=True):
        logits, theirs = one.pop("logits", None), other.pop("logits", None)
        assert one == other
        assert (logits is None) == (one["do"] != "step")
        if logits is not None:
            assert torch.equal(logits, theirs)


def test_a_step_ahead_begins_before_the_last_tokens_are_read(model):
    expected = {
        drive: ["feed", "decide", "learn", "feed", "decide", "learn"],
        drive_ahead: ["feed", "decide", "feed", "learn", "decide", "feed", "learn", "decide"],
    }
    for driver, order in expected.items():
        seen = record(model, 2, "interleaved", [[], []], max_steps=5, driver=driver)
        of_the_prompt = ["feed", "decide", "learn"]
        assert seen.run.order[:3] == of_the_prompt
        assert seen.run.order[3 : 3 + len(order)] == order


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_steps_run_ahead_where_none_is_in_vain_but_the_last(model, layout, count):
    assert Run(model, PROBLEM, count, layout).can_run_ahead == ((layout, count) in RUN_AHEAD)


def test_a_run_runs_once(model):
    run = Run(model, PROBLEM, max_steps=1, prompts=WORDS)
    list(run)
    with pytest.raises(RuntimeError, match="once"):
        list(run)


# ---- run after run


def test_the_next_run_takes_over_the_cache_and_computes_the_same(model):
    """Other layouts, workers and lengths, one after the other: each as in a model that has run nothing before."""
    used, caches = replace(model), set()
    for layout, count, steps in [
        ("combined", 3, 30),
        ("independent", 1, 5),
        ("interleaved", 2, 60),
        ("combined", 1, 9),
    ]:
        told = []
        for one in (used, replace(model)):
            run = Run(one, PROBLEM, count, layout, max_steps=steps, sampling=Sampling(1.0), prompts=ASKING)
            told.append((list(run), result_of(run)))
        assert told[0][1] == told[1][1]
        for ours, theirs in zip(told[0][0], told[1][0], strict=True):
            assert torch.equal(ours.pop("logits", torch.tensor(0)), theirs.pop("logits", torch.tensor(0)))
            assert ours == theirs
        caches.add(id(used.idle_cache))
    assert len(caches) == 1


def test_no_step_writes_out_a_tensor(model, monkeypatch):
    """For the words of an error that there is not, say: of a model's weights that takes half a second."""

    def fail(*_, **__):
        raise AssertionError("a tensor is written out")

    monkeypatch.setattr(torch.Tensor, "__repr__", fail)
    monkeypatch.setattr(torch.Tensor, "__format__", fail)
    list(Run(model, ASKED, max_steps=9, prompts=ASKING, sampling=Sampling(1.0)))


def test_a_cache_is_lent_to_one_run_at_a_time_and_kept_for_its_own_backend(model):
    model = replace(model)
    list(Run(model, PROBLEM, max_steps=1, prompts=WORDS))
    idle = model.idle_cache
    first, second = (Run(model, PROBLEM, max_steps=1, prompts=WORDS).new_cache() for _ in range(2))
    assert first is idle
    assert second is not idle
    list(Run(model, PROBLEM, max_steps=1, prompts=WORDS))
    other = Run(model, PROBLEM, max_steps=1, prompts=WORDS, backend=PyTorchBackend())
    assert other.new_cache().backend is other.backend
    assert model.idle_cache is None  # its memory is not kept for nothing


def test_a_run_that_is_cut_off_leaves_no_cache_behind(model):
    model = replace(model)
    events = iter(Run(model, PROBLEM, max_steps=9, prompts=WORDS))
    next(events)
    events.close()
    assert model.idle_cache is None
    run = ScriptedRun(model, PROBLEM, max_steps=9, prompts=WORDS, scripts={}, backend=ScriptedBackend())
    run.backend.unsound = (4, 0)
    with pytest.raises(InputError, match="NaN"):
        list(run)
    assert model.idle_cache is None


# ---- the engine under the loop


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_schedule_agrees_with_the_oracle(model, monkeypatch, layout, count):
    monkeypatch.setattr(workers, "CHECK_AFTER", 10)
    texts = [
        ["One.", "\n\n", "Two", ".\n\n", "Three"],
        ["Eins", END],
        ["One, two, three.", "\n\n", "Four.", "\n", "\n"],
    ]
    scripts = [ids_of(model, *text) for text in texts[:count]]
    options = {"prompts": ASKING, "problem": ASKED, "max_steps": 22, "computing": True}
    seen = record(model, count, layout, scripts, finisher=ids_of(model, "ab}"), **options)
    assert seen.run.finisher_steps == 3
    assert_agrees_with_oracle(seen)


def test_a_run_ahead_agrees_with_the_oracle(model):
    scripts = [ids_of(model, "One.", "\n\n", "Two", ".\n\n", "Three"), ids_of(model, "Eins", END)]
    seen = record(model, 2, "combined", scripts, max_steps=22, computing=True, driver=drive_ahead)
    assert_agrees_with_oracle(seen)


def test_sixteen_workers_agree_with_the_oracle(model):
    scripts = [ids_of(model, "a" * (w % 5), ".\n\n", "b" * w, END) for w in range(16)]
    seen = record(model, 16, "combined", scripts, max_steps=12, computing=True)
    assert len(seen.moves()) >= 10
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_tokens_come_from_the_last_row_of_the_worker_that_gets_them(model, layout):
    seen = record(model, 3, layout, max_steps=12, sampling=Sampling())  # without scripts, greedy
    chosen = 0
    for step, logits in zip(seen.steps, seen.logits, strict=True):
        for row, token in enumerate(step["sampled"]):
            if token is not None:
                chosen += 1
                assert token == logits[row].argmax()
    assert chosen == sum(worker.sampled for worker in seen.run.workers)
    assert_agrees_with_oracle(seen)


# ---- a long prompt


class Chunking(PyTorchBackend):
    """Takes so many of a prompt's tokens in one step."""

    def __init__(self, chunk: int):
        self.chunk = chunk

    def prefill_chunk(self, prompt_length: int, config) -> int:
        return self.chunk


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_long_prompt_in_chunks_gives_the_same(model, layout):
    problem = "Count from one to a hundred, please, in words. " * 4

    def told(chunk: int) -> tuple[list[list[int]], list[dict]]:
        """(the chunks of the prompt, all other steps)"""
        options = {"max_steps": 8, "sampling": Sampling(1.0), "seed": 3, "prompts": WORDS}
        run = Run(model, problem, 2, layout, backend=Chunking(chunk), **options)
        steps = [event for event in run if event["do"] == "step"]
        chunks = [step["tokens"][0] for step in steps if step["views"] == [[COMMON]]]
        assert all(step["sampled"] == [None] for step in steps[: len(chunks)])
        return chunks, steps[len(chunks) :]

    (prompt,), whole = told(10_000)
    for chunk in (1, 7, 64):
        chunks, others = told(chunk)
        assert list(itertools.chain(*chunks)) == prompt
        assert [len(ids) for ids in chunks[:-1]] == [chunk] * (len(chunks) - 1)
        assert len(chunks[-1]) <= chunk
        for ours, theirs in zip(others, whole, strict=True):
            logits, their_logits = ours.pop("logits"), theirs["logits"]
            assert ours == {key: value for key, value in theirs.items() if key != "logits"}
            assert (logits - their_logits).abs().max() <= 1e-9 * their_logits.abs().max()


@pytest.mark.parametrize("prompt_length", [1, 100, 5_000, 40_000, 10**6, 10**9])
def test_a_chunk_is_as_long_as_its_scores_allow(model, prompt_length):
    """And no longer than makes sense, and never empty."""
    chunk = PyTorchBackend().prefill_chunk(prompt_length, model.config)
    scores_of_token = prompt_length * model.config.num_attention_heads
    assert 1 <= chunk <= PREFILL_CHUNK
    assert chunk == 1 or chunk * scores_of_token <= PREFILL_SCORES
    assert chunk == PREFILL_CHUNK or (chunk + 1) * scores_of_token > PREFILL_SCORES
