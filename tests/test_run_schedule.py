"""The loop: who feeds what in which step, what is sampled, when a paragraph moves, and in which order it is told.

Texts are scripted, see scripted.py.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from scripted import (
    EVERY_LAYOUT,
    HEADERS,
    NAMES,
    PROBLEM,
    WORDS,
    play,
    prompt_of,
    record,
    view_of,
)
from tiny import END, ids_of

from minihogwild import Model, Run, workers
from minihogwild.gpu.pipeline import drive_ahead
from minihogwild.layouts import COMMON, block_of
from minihogwild.prompts import Prompts, boxed, paragraph_closed
from minihogwild.workers import drive

# ---- the schedule, restated from the design


def restated(
    model: Model, layout: str, scripts: list[list[int]], max_steps: int, check_after: int, words: Prompts
) -> tuple[list[tuple], str, int]:
    """(steps and moves, why it stopped, forward steps) with plain lists, for words that ask for no answer."""
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    shared = layout != "independent"
    vocabulary = range(model.config.vocab_size)
    allowed = [token for token in vocabulary if not any(part in decode([token]) for part in words.banned)]
    allowed = [token for token in allowed if words.may_end or token not in model.eos]
    if not shared:
        allowed = list(vocabulary)
    # No paragraph begins with an empty line
    allowed_first = allowed
    if shared and not words.may_end:
        allowed_first = [token for token in allowed if decode([token]).strip() or "\n" not in decode([token])]
    names = list(NAMES[: len(scripts)])
    late = itertools.repeat(encode("x")[0])
    texts = {name: itertools.chain(script, late) for name, script in zip(names, scripts)}
    queue: dict[str, list[int]] = {}  # of active workers
    written: dict[str, list[int]] = {name: [] for name in names}
    paragraph: dict[str, list[int]] = {name: [] for name in names}
    number = dict.fromkeys(names, 0)
    sampled_since_check = forward_steps = 0
    schedule: list[tuple] = []

    def begin(name: str) -> None:
        nonlocal sampled_since_check
        number[name] += 1
        paragraph[name] = []
        queue[name] = encode(f"**{name} [{number[name]}]:**")
        if sampled_since_check >= check_after and len(names) > 1:
            queue[name] += encode(WORDS.check)
            sampled_since_check = 0

    def draw(name: str) -> int:
        token = next(texts[name])
        choices = allowed if paragraph[name] else allowed_first
        if token not in choices:  # all others are as likely as each other: then it is the first
            token = choices[0]
        queue[name] = [token]
        written[name].append(token)
        paragraph[name].append(token)
        return token

    prompt = encode(prompt_of(layout, names))
    if shared and words.opening != "auto":
        prompt += encode(words.opening)
    if not shared:  # the prompt's last token is each worker's own: its first is sampled from there
        schedule.append(("step", [[COMMON]], [prompt[:-1]], [None]))
        queue |= {name: prompt[-1:] for name in names}
    else:
        schedule.append(("step", [[COMMON]], [prompt], [None]))
        fixed = {block: encode(WORDS.headers[block]) for block in HEADERS[layout]}
        for name, role in zip(names, words.roles):
            fixed[f"role of {name}"] = encode(role.replace("{name}", name))
        fixed = {block: ids for block, ids in fixed.items() if ids}
        if fixed:
            views = [[COMMON, block] for block in fixed]
            schedule.append(("step", views, list(fixed.values()), [None] * len(fixed)))
        for name in names:
            begin(name)

    while True:
        answered = [name for name in names if boxed(decode(written[name]))]
        if layout == "independent":
            for name in answered:  # each stops for itself
                queue.pop(name, None)
            if answered and not queue:
                return schedule, "answer", forward_steps
        elif answered:
            return schedule, "answer", forward_steps
        if not queue:
            return schedule, "retired", forward_steps
        if forward_steps == max_steps:
            return schedule, "steps", forward_steps

        active = [name for name in names if name in queue]
        if shared:
            begun = [name for name in active if forward_steps >= names.index(name) * words.head_start]
            active = begun or active[:1]
        views = [view_of(layout, name, names, words) for name in active]
        tokens = [queue[name] for name in active]
        forward_steps += 1
        after: list[tuple] = []
        sampled: list[int | None] = []
        for name in active:
            choice = None
            so_far = decode(paragraph[name]).rstrip()
            says_done = shared and paragraph[name] and words.done and so_far.endswith(words.done)
            says_done = says_done and not so_far[: -len(words.done)][-1:].isalnum()
            if queue[name][-1] in model.eos or says_done:
                del queue[name]
                if layout == "interleaved":
                    after.append(("move", block_of(name), COMMON))
            elif layout in ("combined", "interleaved") and paragraph_closed(decode(paragraph[name])):
                after.append(("move", block_of(name), COMMON))
                begin(name)
            else:
                choice = draw(name)
                sampled_since_check += 1
            sampled.append(choice)
        schedule += [("step", views, tokens, sampled), *after]


def as_tuples(schedule: list[dict]) -> list[tuple]:
    keys = {"step": ("do", "views", "tokens", "sampled"), "move": ("do", "from", "to")}
    return [tuple(event[key] for key in keys[event["do"]]) for event in schedule]


PIECES = [
    "a",
    "b ",
    ".",
    "?",
    "\n",
    "\n\n",
    ".\n\n",
    "!\n\n",
    ".\n \n",
    "é",
    "日.",
    "**",
    "```\n",
    "$$",
    "\\boxed{",
    "}",
    END,
]
some_words = st.builds(
    lambda **fields: replace(WORDS, **fields),
    may_end=st.booleans(),
    banned=st.sampled_from([(), ("?",), ("a", "\n"), ("b ", "}")]),
    opening=st.sampled_from(["auto", "", "Well,\n"]),
    roles=st.sampled_from([(), ("You, {name}, agree.\n",), ("", "No!"), ("1", "2", "3", "4")]),
    unaware=st.sampled_from([(), ("Alice",), ("Bob", "Carol")]),
    done=st.sampled_from(["", "a.", "a?", "b \n\n."]),
    head_start=st.sampled_from([0, 0, 1, 3]),
)
some_scripts = st.lists(st.lists(st.sampled_from(PIECES), max_size=14), min_size=1, max_size=4)


@examples(400, suppress_health_check=[HealthCheck.too_slow])
@given(
    layout=st.sampled_from(EVERY_LAYOUT),
    texts=some_scripts,
    max_steps=st.integers(1, 25),
    check_after=st.integers(0, 30),
    ahead=st.booleans(),
    words=some_words,
)
def test_the_schedule_is_the_one_of_the_design(model, layout, texts, max_steps, check_after, ahead, words):
    """By either driver. Each token is drawn from the row of the worker that gets it: any other has another script."""
    scripts = [ids_of(model, *text) for text in texts]
    if layout == "independent" and len(texts) > 1:
        ahead = False  # such runs are never driven ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "CHECK_AFTER", check_after)
        driver = drive_ahead if ahead else drive
        options = {"max_steps": max_steps, "driver": driver, "prompts": words}
        seen = record(model, len(scripts), layout, scripts, **options)
    schedule, stopped_by, forward_steps = restated(model, layout, scripts, max_steps, check_after, words)
    assert as_tuples(seen.schedule) == schedule
    assert (seen.run.stopped_by, seen.run.forward_steps, seen.run.finisher_steps) == (stopped_by, forward_steps, 0)


@examples(100)
@given(layout=st.sampled_from(EVERY_LAYOUT), texts=some_scripts, max_steps=st.integers(1, 25))
def test_the_run_and_the_cache_know_how_long_each_block_is(model, layout, texts, max_steps):
    scripts = [ids_of(model, *text) for text in texts]
    seen = record(model, len(scripts), layout, scripts, max_steps=max_steps)
    *_, (_, blocks) = seen.walk()
    lengths = {block: len(ids) for block, ids in blocks.items()}
    assert seen.run.lengths == lengths
    assert seen.cache.lengths == lengths


# ---- what a run consists of


def two_texts(model: Model) -> list[list[int]]:
    """Alice closes a paragraph and then ends; Bob ends while she is still at her first."""
    return [ids_of(model, "A", ".", "\n\n", "B", END), ids_of(model, "b", END)]


STEPS = {
    "combined": [
        {"Alice": "**Alice [1]:**", "Bob": "**Bob [1]:**"},
        {"Alice": "A", "Bob": "b"},
        {"Alice": ".", "Bob": END},
        {"Alice": "\n\n"},
        {"Alice": "**Alice [2]:**"},
        {"Alice": "B"},
        {"Alice": END},
    ],
    "contiguous": [
        {"Alice": "**Alice [1]:**", "Bob": "**Bob [1]:**"},
        {"Alice": "A", "Bob": "b"},
        {"Alice": ".", "Bob": END},
        {"Alice": "\n\n"},
        {"Alice": "B"},
        {"Alice": END},
    ],
    "independent": [
        {"Alice": PROBLEM[-1], "Bob": PROBLEM[-1]},  # the prompt's last token
        {"Alice": "A", "Bob": "b"},
        {"Alice": ".", "Bob": END},
        {"Alice": "\n\n"},
        {"Alice": "B"},
        {"Alice": END},
    ],
}
STEPS["interleaved"] = STEPS["combined"]
MOVES = {
    "combined": [(4, "Alice")],  # after the step that feeds the blank line
    "contiguous": [],
    "interleaved": [(3, "Bob"), (4, "Alice"), (7, "Alice")],  # those who retire move too
    "independent": [],
}
EVENTS = {
    "combined": """step, step, begin Alice, begin Bob, step, text Alice, text Bob, step, text Alice, step,
        retire Bob, text Alice, step, move Alice, begin Alice, step, text Alice, step, step, retire Alice""",
    "contiguous": """step, step, begin Alice, begin Bob, step, text Alice, text Bob, step, text Alice, step,
        retire Bob, text Alice, step, text Alice, step, step, retire Alice""",
    "interleaved": """step, begin Alice, begin Bob, step, text Alice, text Bob, step, text Alice, step,
        retire Bob, move Bob, text Alice, step, move Alice, begin Alice, step, text Alice, step, step,
        retire Alice, move Alice""",
    "independent": """step, begin Alice, begin Bob, step, text Alice, text Bob, step, text Alice, step,
        retire Bob, text Alice, step, text Alice, step, step, retire Alice""",
}


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_who_feeds_what_in_which_step(model, layout):
    seen = record(model, 2, layout, two_texts(model))
    assert seen.fed() == STEPS[layout]
    assert seen.moves() == MOVES[layout]
    assert seen.run.stopped_by == "retired"
    assert seen.run.forward_steps == len(STEPS[layout])


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_order_of_events(model, layout):
    seen = record(model, 2, layout, two_texts(model))
    order = [f"{event['do']} {event.get('worker', '')}".strip() for event in seen.events]
    assert order == [line.strip() for line in EVENTS[layout].split(",")]


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_sampled_token_is_fed_next_and_an_ending_gives_no_sample(model, layout):
    seen = record(model, 2, layout, two_texts(model))
    fed, sampled = seen.fed(), seen.sampled()
    for now, after in zip(sampled, fed[1:]):
        for name, token in now.items():
            if token is not None:
                assert after[name] == token
    for name in ("Alice", "Bob"):
        nothing = [fed[n][name] for n, step in enumerate(sampled) if name in step and step[name] is None]
        closes = name == "Alice" and layout in ("combined", "interleaved")
        assert nothing == (["\n\n", END] if closes else [END])


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_run_needs_neither_a_model_nor_a_cache(model, layout):
    """Whoever drives it may have them, or a script, or a machine of their own."""
    alice, bob = two_texts(model)
    run = Run(model, PROBLEM, 2, layout, prompts=WORDS)
    assert list(play(run, {"Alice": alice, "Bob": bob})) == record(model, 2, layout, [alice, bob]).events
    assert run.stopped_by == "retired"


def test_the_schedule_is_json(model):
    seen = record(model, 2, "interleaved", two_texts(model))
    assert json.loads(json.dumps(seen.events)) == seen.events
    for step in seen.steps:
        assert step.keys() == {"do", "views", "tokens", "sampled"}
        assert len(step["views"]) == len(step["tokens"]) == len(step["sampled"])


# ---- paragraphs


def test_a_blank_line_in_two_tokens_closes_at_the_second(model):
    newline = ids_of(model, "\n")
    assert ids_of(model, "\n\n") != newline * 2
    seen = record(model, 2, "combined", [[*ids_of(model, "A."), *newline, *newline], ids_of(model, "bbb")], max_steps=7)
    assert [step["Alice"] for step in seen.fed()] == ["**Alice [1]:**", "A", ".", "\n", "\n", "**Alice [2]:**", "x"]


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_two_that_close_in_one_step_move_in_worker_order(model, layout):
    scripts = [ids_of(model, "a.\n\n"), ids_of(model, "b", END), ids_of(model, "c.\n\n")]
    seen = record(model, 3, layout, scripts, max_steps=6)
    moved = [(3, "Bob")] if layout == "interleaved" else []
    assert seen.moves() == [*moved, (4, "Alice"), (4, "Carol")]
    prompt = prompt_of(layout, ["Alice", "Bob", "Carol"])
    bob = "**Bob [1]:**b" + END if layout == "interleaved" else ""
    assert seen.blocks()[COMMON] == f"{prompt}{bob}**Alice [1]:**a.\n\n**Carol [1]:**c.\n\n"


def test_each_worker_counts_its_own_paragraphs(model):
    scripts = [
        ids_of(model, *["a", ".\n\n"] * 3, END),
        ids_of(model, "bbbb", ".\n\n", END),
        ids_of(model, "c" * 30, END),
    ]
    seen = record(model, 3, "combined", scripts)
    begun = [(e["worker"], e["text"]) for e in seen.events if e["do"] == "begin"]
    assert begun == [
        ("Alice", "**Alice [1]:**"),
        ("Bob", "**Bob [1]:**"),
        ("Carol", "**Carol [1]:**"),
        ("Alice", "**Alice [2]:**"),
        ("Bob", "**Bob [2]:**"),
        ("Alice", "**Alice [3]:**"),
        ("Alice", "**Alice [4]:**"),
    ]
    prefixes = [text for step in seen.fed() for text in step.values() if text.startswith("**")]
    assert prefixes == [text for _, text in begun]  # fed whole, in one step each


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_the_history_reads_as_whole_paragraphs(model, layout):
    scripts = [
        ids_of(model, "One.", "\n\n", "Two is é.", "\n\n", END),
        ids_of(model, "Eins", "!", "\n", " \n", "Zwei...", "\n\n", "Drei", END),
        ids_of(model, "一。", "\n\n", "```\nx.\n\ny.\n```", "\n\n", "last"),
    ]
    seen = record(model, 3, layout, scripts, max_steps=40)
    paragraphs = {
        "Alice": ["**Alice [1]:**One.\n\n", "**Alice [2]:**Two is é.\n\n"],
        "Bob": ["**Bob [1]:**Eins!\n \n", "**Bob [2]:**Zwei...\n\n"],
        "Carol": ["**Carol [1]:**一。\n\n", "**Carol [2]:**```\nx.\n\ny.\n```\n\n"],
    }
    if layout == "interleaved":  # texts that ended move too
        paragraphs["Alice"].append("**Alice [3]:**" + END)
        paragraphs["Bob"].append("**Bob [3]:**Drei" + END)
    history = seen.blocks()[COMMON].removeprefix(prompt_of(layout, list(paragraphs)))
    for of_one in paragraphs.values():
        where = [history.index(text) for text in of_one]
        assert where == sorted(where)
    whole = sum(len(text) for of_one in paragraphs.values() for text in of_one)
    assert len(history) == whole  # nothing else, and nothing torn apart


# ---- the redundancy check


def test_the_check_comes_with_the_next_paragraph_after_so_many_tokens(model, monkeypatch):
    monkeypatch.setattr(workers, "CHECK_AFTER", 8)
    scripts = [ids_of(model, *["a.", "\n\n"] * 5), ids_of(model, "bbbbbbb.", "\n\n")]
    seen = record(model, 2, "combined", scripts, max_steps=17)
    prefixes = [(n, text) for n, step in enumerate(seen.fed()) for text in step.values() if text.startswith("**")]
    assert prefixes == [
        (0, "**Alice [1]:**"),
        (0, "**Bob [1]:**"),
        (4, "**Alice [2]:**"),  # 6 have been sampled
        (8, "**Alice [3]:**" + WORDS.check),  # 13
        (10, "**Bob [2]:**"),  # 4 since then
        (12, "**Alice [4]:**"),  # 6
        (16, "**Alice [5]:**" + WORDS.check),  # 13
    ]
    assert [e["text"] for e in seen.events if e["do"] == "begin"] == [text for _, text in prefixes]


def test_only_the_next_worker_to_begin_is_checked(model, monkeypatch):
    monkeypatch.setattr(workers, "CHECK_AFTER", 6)
    seen = record(model, 3, "combined", [ids_of(model, "a.", "\n\n")] * 3, max_steps=6)
    assert list(seen.fed()[4].values()) == ["**Alice [2]:**" + WORDS.check, "**Bob [2]:**", "**Carol [2]:**"]


@pytest.mark.parametrize(("after", "with_check"), [(8, True), (9, False)])
def test_the_check_comes_after_exactly_so_many_tokens(model, monkeypatch, after, with_check):
    monkeypatch.setattr(workers, "CHECK_AFTER", after)
    seen = record(model, 2, "interleaved", [ids_of(model, "aa.", "\n\n")] * 2, max_steps=6)
    # Both have sampled 4 before they begin again
    assert seen.fed()[5] == {"Alice": "**Alice [2]:**" + WORDS.check * with_check, "Bob": "**Bob [2]:**"}


@pytest.mark.parametrize(
    ("layout", "count"),
    [("combined", 1), ("interleaved", 1), ("contiguous", 2), ("independent", 2), ("independent", 1)],
)
def test_no_check_where_there_is_nobody_to_repeat(model, monkeypatch, layout, count):
    monkeypatch.setattr(workers, "CHECK_AFTER", 2)
    seen = record(model, count, layout, [ids_of(model, "a.", "\n\n", "b.", "\n\n")] * count, max_steps=12)
    assert not any(WORDS.check in text for step in seen.fed() for text in step.values())
    assert not any(WORDS.check in event.get("text", "") for event in seen.events)


def test_the_numbers_of_the_design():
    assert workers.CHECK_AFTER == 1024
    assert Prompts().finisher_tokens == 64
