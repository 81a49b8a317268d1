"""The layout independent: what N separate runs would give, and the majority's answer."""

from __future__ import annotations

import pytest
from scripted import ASKED, WORDS, Record, record
from tiny import END, ids_of, load_model

from minihogwild import Model, Run, Sampling
from minihogwild.prompts import boxed


def answers(model: Model, *texts: str) -> Record:
    """A run of workers that write these texts."""
    scripts = [ids_of(model, text, END) for text in texts]
    return record(model, len(texts), "independent", scripts, problem=ASKED)


@pytest.mark.parametrize(
    ("texts", "answer"),
    [
        (["\\boxed{7}", "\\boxed{8}", "\\boxed{8}"], "8"),
        (["later \\boxed{7}", "\\boxed{8}"], "7"),  # a tie: the lowest worker's, not the first in time
        (["\\boxed{9}", "\\boxed{7}", "\\boxed{8}", "\\boxed{8}", "\\boxed{7}"], "7"),
        (["\\boxed{7}"], "7"),
    ],
)
def test_the_majority_answers(model, texts, answer):
    seen = answers(model, *texts)
    assert seen.run.answer == answer
    assert seen.run.stopped_by == "answer"
    assert seen.run.finisher_steps == 0
    assert [worker.answer for worker in seen.run.workers] == [boxed(text) for text in texts]


def test_who_has_answered_stops_and_the_others_go_on(model):
    seen = answers(model, "\\boxed{7} more", "bbbbbbbbbbbbbbbbbbbbb \\boxed{8}")
    assert ["Alice" in step for step in seen.fed()] == [True] * 9 + [False] * 22
    assert seen.run.summary()["workers"][0]["text"] == "\\boxed{7}"


@pytest.mark.parametrize("max_steps", [30, 1000])
def test_each_of_several_writes_what_it_would_write_alone(tmp_path, max_steps):
    model = load_model(tmp_path, context=200)
    sampling = Sampling(1.0, top_k=50, top_p=0.95, min_p=0.01)
    options = {"problem": ASKED, "sampling": sampling, "seed": 5, "max_steps": max_steps, "prompts": WORDS}
    together = record(model, 3, "independent", **options)
    streams = [worker.random for worker in Run(model, ASKED, 3, "independent", seed=5).workers]
    texts = []
    for worker, finisher, stream in zip(together.run.workers, together.run.finishers, streams, strict=True):
        alone = Run(model, workers=1, **options)
        alone.workers[0].random = stream
        assert list(alone)
        assert worker.token_ids == alone.workers[0].token_ids
        assert finisher.token_ids == alone.finishers[0].token_ids
        assert (worker.answer or finisher.answer) == alone.answer
        texts.append(tuple(worker.token_ids))
    assert len(set(texts)) == 3
    assert min(map(len, texts)) > 5
