"""Layouts: which blocks a worker sees, what is in them, and what becomes of them. Texts are scripted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scripted import (
    ASKED,
    ASKING,
    EVERY_LAYOUT,
    HEADERS,
    NAMES,
    PROBLEM,
    WORDS,
    assert_agrees_with_oracle,
    prompt_of,
    record,
    view_of,
)
from tiny import END, ids_of, load_model

from minihogwild import InputError, Run
from minihogwild.layouts import COMMON, LAYOUTS, block_of


def test_every_layout_is_tested_here():
    assert set(EVERY_LAYOUT) == set(LAYOUTS)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_views_are_those_of_the_table(model, layout, workers):
    scripts = [ids_of(model, "a" * (w % 3), ".\n\n", "b", *([END] if w % 4 == 1 else [])) for w in range(workers)]
    seen = record(model, workers, layout, scripts, max_steps=9)
    names = list(NAMES[:workers])
    views = [view for step in seen.forward for view in step["views"]]
    assert len(views) >= 9 + 5 * (workers > 1)
    assert all(view == view_of(layout, seen.writer_of(view), names) for view in views)
    for step in seen.fed():
        assert list(step) == [name for name in names if name in step]  # in worker order
    if layout != "independent":  # all first prefixes go in one step
        assert seen.fed()[0] == {name: f"**{name} [1]:**" for name in names}


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_prompt_and_headers_are_prefilled_once_in_blocks_of_their_own(model, layout):
    seen = record(model, 3, layout, [ids_of(model, "a", ".\n\n", "b", END)] * 3)
    headers = HEADERS[layout]
    prompt, *more = seen.prefill
    text_of_prompt = prompt_of(layout, ["Alice", "Bob", "Carol"])
    if layout == "independent":  # each worker feeds the last token to its own block
        text_of_prompt = text_of_prompt[:-1]
    assert (prompt["views"], [seen.text(ids) for ids in prompt["tokens"]]) == ([[COMMON]], [text_of_prompt])
    assert [view for step in more for view in step["views"]] == [[COMMON, header] for header in headers]
    assert [seen.text(ids) for step in more for ids in step["tokens"]] == [WORDS.headers[header] for header in headers]
    assert [token for step in more for token in step["sampled"]] == [None] * len(headers)
    writers = [view[-1] for step in seen.forward for view in step["views"]]
    assert not set(writers) & {COMMON, *WORDS.headers}
    for header in headers:
        assert seen.blocks()[header] == WORDS.headers[header]


def test_empty_headers_are_no_step(model):
    words = replace(WORDS, header_others="", header_own="")
    scripts = [ids_of(model, "A", ".", "\n\n", "B", END), ids_of(model, "b", END)]
    seen = record(model, 2, "combined", scripts, prompts=words, computing=True)
    assert len(seen.prefill) == 1
    assert seen.fed() == record(model, 2, "combined", scripts).fed()
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_where_the_text_of_a_retired_worker_stays(model, layout):
    seen = record(model, 2, layout, [ids_of(model, "aaaaaaaa"), ids_of(model, "bye", END)], max_steps=8)
    text = (PROBLEM[-1] if layout == "independent" else "**Bob [1]:**") + "bye" + END
    assert [event["worker"] for event in seen.events if event["do"] == "retire"] == ["Bob"]
    blocks = seen.blocks()
    if layout == "interleaved":
        assert seen.moves() == [(5, "Bob")]
        assert blocks[COMMON].endswith(text)
        assert blocks[block_of("Bob")] == ""
    else:
        assert seen.moves() == []
        assert blocks[block_of("Bob")] == text
    alice = seen.run.workers[0]
    alice_sees = "".join(blocks[block] for block in alice.view)
    assert (text in alice_sees) == (layout != "independent")
    assert all("Bob" not in step for step in seen.fed()[5:])


@pytest.mark.parametrize("layout", ["contiguous", "independent"])
def test_contiguous_and_independent_never_move(model, layout):
    seen = record(model, 3, layout, [ids_of(model, "a.", "\n\n", "b.", "\n\n", END)] * 3)
    assert seen.moves() == []
    begun = [event["text"] for event in seen.events if event["do"] == "begin"]
    assert [text != "" for text in begun] == [layout == "contiguous"] * 3


def test_fragments_are_tokenised_on_their_own(model):
    """The tokens of a prefix do not depend on what stands before it."""
    seen = record(model, 2, "combined", [[], []], max_steps=1)
    assert seen.forward[0]["tokens"] == [ids_of(model, "**Alice [1]:**"), ids_of(model, "**Bob [1]:**")]
    assert seen.prefill[1]["tokens"] == [ids_of(model, WORDS.header_others), ids_of(model, WORDS.header_own)]


def test_two_workers_are_combined_and_one_is_plain_chat(model):
    assert Run(model, PROBLEM).layout == "combined"
    assert [worker.name for worker in Run(model, PROBLEM).workers] == ["Alice", "Bob"]
    assert Run(model, PROBLEM, 1).layout == "independent"
    assert record(model, 1, None, [ids_of(model, "a", END)], problem="Hello?").prompt() == "Hello?"


# ---- a worker's name is not its block's name


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize(
    "names",
    [
        ("common", "header others", "header own"),
        ("finisher", "separator", "text of finisher"),
        ("answer by finisher", "finisher of finisher", "finisher"),
        ("text of common", "common", "text of text of common"),
    ],
    ids=lambda names: names[0],
)
def test_a_worker_may_be_called_as_a_block_is(model, layout, names):
    """The schedule is the one of a run with other names, but for the names."""
    plain = [f"{letter}{'x' * (len(name) - 1)}" for letter, name in zip("ABC", names)]  # as long: the same tokens
    scripts = [ids_of(model, "One.", "\n\n", "Two."), ids_of(model, "b", END), ids_of(model, "Three.", "\n\n")]
    told = []
    for called in (names, plain):
        words = replace(ASKING, names=tuple(called))
        options = {"problem": ASKED, "prompts": words, "finisher": ids_of(model, "5}"), "max_steps": 12}
        seen = record(model, 3, layout, scripts, **options)
        assert seen.run.finisher_steps == 2
        assert len(set(seen.run.blocks)) == len(seen.run.blocks)
        numbers = {block: n for n, block in enumerate(seen.run.blocks)}
        told.append([as_numbers(event, numbers) for event in seen.schedule])
    assert told[0] == told[1]


def as_numbers(event: dict, numbers: dict[str, int]) -> tuple:
    """A step or a move, with numbers in the place of the blocks' names, and lengths in the place of tokens."""
    if event["do"] == "move":
        return "move", numbers[event["from"]], numbers[event["to"]]
    views = [[numbers[block] for block in view] for view in event["views"]]
    return "step", views, [len(ids) for ids in event["tokens"]], event["sampled"]


# ---- words from the model's folder


def test_a_file_in_the_models_folder_has_the_words(tmp_path):
    model = load_model(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps({"names": ["Uno", "Due"], "together": "{problem}!"}))
    run = Run(model, PROBLEM, 2)
    assert [worker.name for worker in run.workers] == ["Uno", "Due"]
    assert run.prompt == ids_of(model, PROBLEM + "!")
    assert [worker.name for worker in Run(model, PROBLEM, 2, prompts=WORDS).workers] == ["Alice", "Bob"]
    with pytest.raises(InputError, match="3"):
        Run(model, PROBLEM, 3)
    (tmp_path / "prompts.json").write_text(json.dumps({"names": 5}))
    with pytest.raises(InputError, match="names"):
        Run(model, PROBLEM, 2)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_problem_is_not_filled_in(model, layout):
    problem = "{n} {names} {first} {problem} \\frac{1}{2} {"
    seen = record(model, 2, layout, [[], []], problem=problem, max_steps=1)
    assert seen.prompt().count(problem) == 1
