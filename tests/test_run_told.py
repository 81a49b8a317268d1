"""What is told of a run: text, character by character, and the summary; and that a seed fixes it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from scripted import ASKED, ASKING, EVERY_LAYOUT, PROBLEM, WORDS, prompt_of, record
from tiny import END, ids_of

from minihogwild import Run, Sampling


def texts_of(events: list[dict], worker: str) -> list[str]:
    return [event["text"] for event in events if event["do"] == "text" and event["worker"] == worker]


# ---- text


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_character_is_shown_once_and_whole(model, layout):
    text = "é 日本 😀 👩‍🔬 ñ."
    seen = record(model, 2, layout, [ids_of(model, text, "\n\n", "ü", END), ids_of(model, "😀" * 9, END)])
    assert texts_of(seen.events, "Alice") == [*text, "\n\n", "ü"]
    assert texts_of(seen.events, "Bob") == ["😀"] * 9
    assert seen.run.summary()["tokens"] == len(ids_of(model, text, "\n\n", "ü", "😀" * 9)) + 2


@pytest.mark.parametrize("problem", ["😀😀é", "日本語", "é" * 9])
def test_text_that_follows_characters_of_many_bytes_is_shown_from_its_start(model, problem):
    seen = record(model, 1, None, [ids_of(model, " ok é", END)], problem=problem)
    assert seen.said("Alice") == " ok é"


def test_bytes_that_are_no_text_are_no_obstacle(model):
    broken = ids_of(model, "😀")[:2]
    seen = record(model, 2, "combined", [[*broken, *ids_of(model, "ok.", "\n\n", END)], [*broken, *ids_of(model, END)]])
    assert seen.run.stopped_by == "retired"
    assert seen.said("Alice").endswith("ok.\n\n")
    assert json.dumps(seen.run.summary(), allow_nan=False)


# ---- the summary


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_summary_says_how_it_went(model, layout):
    scripts = [ids_of(model, "a é.", "\n\n", "b", END), ids_of(model, "c", END), ids_of(model, "dd", ".\n\n")]
    options = {"sampling": Sampling(0.5, top_k=3), "seed": 9, "max_steps": 8, "prompts": ASKING, "problem": ASKED}
    seen = record(model, 3, layout, scripts, finisher=ids_of(model, "6}"), **options)
    summary = seen.run.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    expected = {
        "model": model.name,
        "layout": layout,
        "seed": 9,
        "sampling": {"temperature": 0.5, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        "prompt_tokens": len(ids_of(model, prompt_of(layout, ["Alice", "Bob", "Carol"], ASKING, ASKED))),
        "forward_steps": 8,
        "finisher_steps": 2,
        "answer": "6",
        "stopped_by": "steps",
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["seconds"] > 0
    assert summary["ms_per_step"] == pytest.approx(1000 * summary["seconds"] / 8)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert [worker["name"] for worker in summary["workers"]] == ["Alice", "Bob", "Carol"]
    assert summary["tokens"] == sum(worker["tokens"] for worker in summary["workers"])
    if layout in ("combined", "interleaved"):
        assert summary["workers"][0]["paragraphs"] == ["a é.\n\n", "b"]
        assert summary["workers"][0]["text"] == "**Alice [1]:**a é.\n\n**Alice [2]:**b"
        assert summary["workers"][1]["token_ids"] == ids_of(model, "**Bob [1]:**c", END)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_summary_holds_what_the_events_told(model, layout):
    scripts = [ids_of(model, "a é.", "\n\n", "b", END), ids_of(model, "c", END), ids_of(model, "dd", ".\n\n")]
    seen = record(model, 3, layout, scripts, max_steps=8)
    paragraphs: dict[str, list[str]] = {"Alice": [], "Bob": [], "Carol": []}
    shown = dict.fromkeys(paragraphs, "")
    for event in seen.events:
        if event["do"] == "begin":
            paragraphs[event["worker"]].append("")
            shown[event["worker"]] += event["text"]
        elif event["do"] == "text":
            paragraphs[event["worker"]][-1] += event["text"]
            shown[event["worker"]] += event["text"]
    sampled = Counter(name for step in seen.sampled() for name, token in step.items() if token is not None)
    for worker in seen.run.summary()["workers"]:
        assert worker["paragraphs"] == paragraphs[worker["name"]]
        assert worker["text"] == shown[worker["name"]]
        assert worker["text"] == model.tokenizer.decode(worker["token_ids"])
        assert worker["tokens"] == sampled[worker["name"]]


def test_a_summary_can_be_had_at_any_time(model):
    run = Run(model, PROBLEM, 2, prompts=WORDS, max_steps=5)
    before = run.summary()
    assert (before["forward_steps"], before["tokens"], before["stopped_by"], before["ms_per_step"]) == (0, 0, None, 0)
    steps = 0
    for event in run:
        steps += event["do"] == "step"
        summary = json.loads(json.dumps(run.summary(), allow_nan=False))
        assert summary["forward_steps"] == max(steps - 2, 0)  # prompt and headers
    assert run.summary()["forward_steps"] == 5


# ---- seeds


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_same_seed_gives_the_same_text(model, layout):
    def text(seed: int) -> list[list[int]]:
        run = Run(model, PROBLEM, 3, layout, 12, Sampling(1.0), seed, WORDS)
        assert list(run)
        return [worker.token_ids for worker in run.workers]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_streams_of_workers_and_seeds_all_differ(model):
    first = [
        tuple(torch.rand(3, generator=worker.random).tolist())
        for seed in range(4)
        for worker in Run(model, "?", 16, seed=seed).workers
    ]
    assert len(set(first)) == 64
