"""The loop: who feeds what, when, into which view. Texts are scripted, cache and forward are the real ones."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import END, ids_of, load_model
from torch import Tensor

from minihogwild import InputError, Model, Sampling, generate
from minihogwild import model as transformer
from minihogwild.generate import Run
from minihogwild.layouts import COMMON, FINISHER, LAYOUTS, OTHERS, OWN, SEPARATOR
from minihogwild.oracle import Oracle
from minihogwild.prompts import Prompts, boxed, paragraph_closed

NAMES = Prompts().names
WORDS = Prompts(
    together="{names} ({n}) work on: {problem}\n",
    header_others="\n[the others]\n",
    header_own="\n[mine]\n",
    separator="\n[me]\n",
    check=" Again?",
    cue="\nSo \\boxed{",
)
ASKING = replace(WORDS, together="{names} ({n}) box \\boxed{} for: {problem}\n")  # so there is a finisher
PROBLEM = "What is 2 + 3?"
LAYOUTS_THAT_SHARE = ("combined", "contiguous", "interleaved")
EVERY_LAYOUT = (*LAYOUTS_THAT_SHARE, "independent")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return load_model(tmp_path_factory.mktemp("model"))


# ---- running by script, and looking at what happened


@dataclass
class Record:
    """A run that is over: its events, and what its forward and its sampling saw."""

    run: Run
    events: list[dict] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # of each step, as forward returned them
    given: list[Tensor] = field(default_factory=list)  # what each call of `sample` was asked to choose from

    @property
    def schedule(self) -> list[dict]:
        return [event for event in self.events if event["do"] in ("step", "move")]

    @property
    def steps(self) -> list[dict]:
        return [event for event in self.events if event["do"] == "step"]

    @property
    def prefill(self) -> list[dict]:
        return self.steps[: len(self.steps) - self.run.forward_steps - self.run.finisher_steps]

    @property
    def forward(self) -> list[dict]:
        """The steps that count: without prefill and finisher."""
        return self.steps[len(self.prefill) : len(self.prefill) + self.run.forward_steps]

    @property
    def finisher(self) -> list[dict]:
        return self.steps[len(self.prefill) + self.run.forward_steps :]

    def text(self, ids: list[int]) -> str:
        """Readable text, end-of-sequence included."""
        return self.run.model.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    def fed(self) -> list[dict[str, str]]:
        """What each worker feeds in each forward step."""
        return [{view[-1]: self.text(ids) for view, ids in zip(s["views"], s["tokens"])} for s in self.forward]

    def sampled(self) -> list[dict[str, str | None]]:
        """What is sampled from its row in each forward step; None where nothing is."""
        return [
            {view[-1]: None if i is None else self.text([i]) for view, i in zip(s["views"], s["sampled"])}
            for s in self.forward
        ]

    def moves(self) -> list[tuple[int, str]]:
        """(after how many forward steps, whose text) for each move."""
        before = [len([e for e in self.events[:n] if e["do"] == "step"]) for n in range(len(self.events))]
        moves = [(n, e) for n, e in zip(before, self.events) if e["do"] == "move"]
        assert all(event["to"] == COMMON for _, event in moves)
        return [(n - len(self.prefill), event["from"]) for n, event in moves]

    def walk(self) -> Iterator[tuple[dict, dict[str, list[int]]]]:
        """Each event of the schedule, with every block's tokens after it."""
        blocks: dict[str, list[int]] = {block: [] for block in self.run.cache.lengths}
        for event in self.schedule:
            if event["do"] == "move":
                blocks[event["to"]] += blocks[event["from"]]
                blocks[event["from"]] = []
            else:
                for view, ids in zip(event["views"], event["tokens"], strict=True):
                    blocks[view[-1]] += ids
            yield event, blocks

    def blocks(self) -> dict[str, str]:
        """Every block's text at the end."""
        *_, (_, blocks) = self.walk()
        return {block: self.text(ids) for block, ids in blocks.items()}

    def views_at_the_end(self) -> dict[str, str]:
        blocks = self.blocks()
        return {worker.name: "".join(blocks[block] for block in worker.view) for worker in self.run.workers}


def record(
    model: Model,
    workers: int,
    layout: str | None,
    scripts: list[list[int]] | None = None,
    finisher: list[int] | dict[str, list[int]] | None = None,
    problem: str = PROBLEM,
    prompts: Prompts = WORDS,
    ahead: bool = False,
    **options,
) -> Record:
    """Run to the end. Worker w writes `scripts[w]`, then x for ever, and a finisher what is given: each its own.

    `ahead`: each step begins before the tokens drawn after the one before are read, as on a GPU.
    """
    run = Run(model, problem, workers, layout, prompts=prompts, **options)
    run.ahead = ahead and (run.shared or workers == 1)
    seen = Record(run)
    views_now: list[list[str]] = []
    extend, forward, sample = run.cache.extend, transformer.forward, generate.sample
    late = itertools.repeat(ids_of(model, "x")[0])
    texts = {id(w.random): itertools.chain(script, late) for w, script in zip(run.workers, scripts or [])}
    assert not scripts or len(scripts) == workers
    if isinstance(finisher, list):
        finisher = {writer.name: finisher for writer in run.finishers}
    finishers = {block: iter(ids) for block, ids in (finisher or {}).items()}

    def spying_extend(views, counts):
        views_now[:] = views
        return extend(views, counts)

    def spying_forward(*arguments):
        logits = forward(*arguments)
        seen.logits.append(logits.clone())
        for row, view in zip(logits, views_now):
            if view[-1] in finishers:
                row[next(finishers[view[-1]])] = 1e9
        return logits

    def by_script(logits, sampling, streams):
        assert sampling == run.sampling
        assert len(logits) == len(streams)
        seen.given.append(logits.clone())
        return torch.tensor([next(texts[id(s)]) for s in streams]) if scripts else sample(logits, sampling, streams)

    run.cache.extend = spying_extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "forward", spying_forward)
        patch.setattr(generate, "sample", by_script)
        seen.events += run
    return seen


def assert_agrees_with_oracle(seen: Record) -> None:
    """The schedule, replayed the slow way, gives the logits that the run's forward returned."""
    oracle = Oracle(seen.run.model.config, seen.run.model.weights, list(seen.run.cache.lengths))
    logits = iter(seen.logits)
    for event in seen.schedule:
        if event["do"] == "move":
            oracle.move(event["from"], event["to"])
        else:
            theirs = oracle.step(event["views"], event["tokens"])
            ours = next(logits)
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert next(logits, None) is None


# ---- the schedule, restated from the design


def view_of(layout: str, own: str, names: list[str]) -> list[str]:
    others = [name for name in names if name != own]
    return {
        "combined": [COMMON, OTHERS, *others, OWN, own],
        "contiguous": [COMMON, *others, SEPARATOR, own],
        "interleaved": [COMMON, own],
        "independent": [COMMON, own],
    }[layout]


HEADERS = {"combined": [OTHERS, OWN], "contiguous": [SEPARATOR], "interleaved": [], "independent": []}


def prompt_of(layout: str, names: list[str], words: Prompts = WORDS, problem: str = PROBLEM) -> str:
    if layout == "independent":
        return problem
    together = words.together.replace("{names}", ", ".join(names)).replace("{n}", str(len(names)))
    return together.replace("{problem}", problem)


def restated(
    model: Model, layout: str, scripts: list[list[int]], max_steps: int, check_after: int
) -> tuple[list[tuple], str, int]:
    """(steps and moves, why it stopped, forward steps) with plain lists, for words that ask for no answer."""
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
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
        queue[name] = [token]
        written[name].append(token)
        paragraph[name].append(token)
        return token

    prompt = encode(prompt_of(layout, names))
    if layout == "independent":  # the prompt's last token is each worker's own: its first is sampled from there
        schedule.append(("step", [[COMMON]], [prompt[:-1]], [None]))
        queue |= {name: prompt[-1:] for name in names}
    else:
        schedule.append(("step", [[COMMON]], [prompt], [None]))
        texts_of = {OTHERS: WORDS.header_others, OWN: WORDS.header_own, SEPARATOR: WORDS.separator}
        if headers := HEADERS[layout]:
            views, tokens = [[COMMON, block] for block in headers], [encode(texts_of[block]) for block in headers]
            schedule.append(("step", views, tokens, [None] * len(headers)))
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

        active = list(filter(queue.__contains__, names))
        views, tokens = [view_of(layout, name, names) for name in active], [queue[name] for name in active]
        forward_steps += 1
        after: list[tuple] = []
        sampled: list[int | None] = []
        for name in active:
            choice = None
            if queue[name][-1] in model.eos:
                del queue[name]
                if layout == "interleaved":
                    after.append(("move", name, COMMON))
            elif layout in ("combined", "interleaved") and paragraph_closed(decode(paragraph[name])):
                after.append(("move", name, COMMON))
                begin(name)
            else:
                choice = draw(name)
                sampled_since_check += 1
            sampled.append(choice)
        schedule += [("step", views, tokens, sampled), *after]


def as_tuples(schedule: list[dict]) -> list[tuple]:
    return [tuple(event.values()) for event in schedule]


pieces = st.sampled_from(
    [
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
)
some_scripts = st.lists(st.lists(pieces, max_size=14), min_size=1, max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    layout=st.sampled_from(EVERY_LAYOUT),
    texts=some_scripts,
    max_steps=st.integers(1, 25),
    check_after=st.integers(0, 30),
    ahead=st.booleans(),
)
def test_the_schedule_is_the_one_of_the_design(model, layout, texts, max_steps, check_after, ahead):
    scripts = [ids_of(model, *text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "CHECK_AFTER", check_after)
        seen = record(model, len(scripts), layout, scripts, max_steps=max_steps, ahead=ahead)
    schedule, stopped_by, forward_steps = restated(model, layout, scripts, max_steps, check_after)
    assert as_tuples(seen.schedule) == schedule
    assert (seen.run.stopped_by, seen.run.forward_steps, seen.run.finisher_steps) == (stopped_by, forward_steps, 0)
    # Each worker's next token is chosen from its own row
    rows = [
        logits[row if len(logits) == len(step["sampled"]) else 0]
        for step, logits in zip(seen.steps, seen.logits)
        for row, token in enumerate(step["sampled"])
        if token is not None
    ]
    assert torch.equal(torch.stack(rows), torch.cat(seen.given))


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("texts", [["a.\n\n", "b \\boxed{1}"], ["a", END], ["x"]], ids=["answer", "end", "steps"])
def test_a_step_ahead_tells_the_same_in_the_same_order(model, layout, texts):
    for workers in (1, 3):
        scripts = [ids_of(model, *texts) for _ in range(workers)]
        told = [record(model, workers, layout, scripts, max_steps=40, ahead=ahead) for ahead in (False, True)]
        assert told[0].events == told[1].events
        results = [{**seen.run.summary(), "seconds": 0, "ms_per_step": 0, "tokens_per_second": 0} for seen in told]
        assert results[0] == results[1]
        # A step is in vain where the answer is found when it has begun, and no other
        vain = told[1].run.ahead and told[1].run.stopped_by == "answer"
        assert len(told[1].logits) - len(told[0].logits) == vain


def test_no_number_where_a_step_is_ahead_is_told_as_ever(model, monkeypatch):
    forward, calls = transformer.forward, itertools.count(1)
    wrong = lambda *arguments: forward(*arguments) * (math.nan if next(calls) == 4 else 1)  # noqa: E731
    monkeypatch.setattr(transformer, "forward", wrong)
    run = Run(model, PROBLEM, 2, "interleaved", prompts=WORDS, max_steps=9)
    run.ahead = True
    with pytest.raises(InputError, match="step 3: Alice's logits are NaN"):
        list(run)


def test_a_run_that_is_left_while_a_step_is_ahead_counts_what_was_told(model):
    run = Run(model, PROBLEM, 2, "interleaved", prompts=WORDS, max_steps=9)
    run.ahead = True
    told = []
    for event in run:
        told.append(event)
        if run.forward_steps == 3:
            break
    steps = [event for event in told if event["do"] == "step"]
    assert len(steps) == 1 + run.forward_steps  # after the prompt
    assert sum(worker["tokens"] for worker in run.summary()["workers"]) == 2 * 3


def test_a_step_ahead_begins_before_the_last_tokens_are_read(model, monkeypatch):
    order = []
    forward, to_host = transformer.forward, generate.to_host

    def logged(ids):
        n = len(order)
        read = to_host(ids)
        return lambda: order.append(f"read {n}") or read()

    monkeypatch.setattr(transformer, "forward", lambda *arguments: order.append("step") or forward(*arguments))
    monkeypatch.setattr(generate, "to_host", logged)
    for ahead, expected in ((False, "step read step read"), (True, "step step read step read")):
        run = Run(model, PROBLEM, 2, "interleaved", prompts=WORDS, max_steps=5)
        run.ahead = ahead
        order.clear()
        list(run)
        after_the_prompt = [what.split()[0] for what in order[1:]]
        assert " ".join(after_the_prompt).startswith(expected)


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


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_who_feeds_what_in_which_step(model, layout):
    seen = record(model, 2, layout, two_texts(model))
    assert seen.fed() == STEPS[layout]
    assert seen.moves() == MOVES[layout]
    assert seen.run.stopped_by == "retired"
    assert seen.run.forward_steps == len(STEPS[layout])


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
def test_the_order_of_events(model, layout):
    seen = record(model, 2, layout, two_texts(model))
    order = [e["do"] + " " + e.get("worker", e.get("from", "")) for e in seen.events]
    order = [line.strip() for line in order]
    expected = {
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
    assert order == [line.strip() for line in expected[layout].split(",")]


def test_a_blank_line_in_two_tokens_closes_at_the_second(model):
    newline = ids_of(model, "\n")
    assert ids_of(model, "\n\n") != newline * 2
    seen = record(model, 2, "combined", [[*ids_of(model, "A."), *newline, *newline], ids_of(model, "bbb")], max_steps=7)
    assert [step["Alice"] for step in seen.fed()] == ["**Alice [1]:**", "A", ".", "\n", "\n", "**Alice [2]:**", "x"]


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_two_that_close_in_one_step_move_in_worker_order(model, layout):
    scripts = [ids_of(model, letter, ".", "\n\n") for letter in "abc"]
    scripts[1] = ids_of(model, "b", END)
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
        (name, f"**{name} [{number}]:**")
        for name, number in [
            ("Alice", 1),
            ("Bob", 1),
            ("Carol", 1),
            ("Alice", 2),
            ("Bob", 2),
            ("Alice", 3),
            ("Alice", 4),
        ]
    ]
    prefixes = [text for step in seen.fed() for text in step.values() if text.startswith("**")]
    assert prefixes == [text for _, text in begun]  # fed whole, in one step each


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_views_are_those_of_the_table(model, layout, workers):
    scripts = [ids_of(model, "a" * (w % 3), ".\n\n", "b", *([END] if w % 4 == 1 else [])) for w in range(workers)]
    seen = record(model, workers, layout, scripts, max_steps=9)
    names = list(NAMES[:workers])
    views = [view for step in seen.forward for view in step["views"]]
    assert len(views) >= 9 + 5 * (workers > 1)
    assert all(view == view_of(layout, view[-1], names) for view in views)
    for step in seen.forward:  # in worker order
        assert [names.index(view[-1]) for view in step["views"]] == sorted(names.index(v[-1]) for v in step["views"])
    if layout != "independent":  # all first prefixes go in one step
        assert seen.fed()[0] == {name: f"**{name} [1]:**" for name in names}


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_prompt_and_headers_are_prefilled_once_in_blocks_of_their_own(model, layout):
    seen = record(model, 3, layout, [ids_of(model, "a", ".\n\n", "b", END)] * 3)
    text = {OTHERS: WORDS.header_others, OWN: WORDS.header_own, SEPARATOR: WORDS.separator}
    headers = HEADERS[layout]
    prompt, *more = seen.prefill
    text_of_prompt = prompt_of(layout, ["Alice", "Bob", "Carol"])
    if layout == "independent":  # each worker feeds the last token to its own block
        text_of_prompt = text_of_prompt[:-1]
    assert (prompt["views"], [seen.text(ids) for ids in prompt["tokens"]]) == ([[COMMON]], [text_of_prompt])
    assert [view for step in more for view in step["views"]] == [[COMMON, header] for header in headers]
    assert [seen.text(ids) for step in more for ids in step["tokens"]] == [text[header] for header in headers]
    assert [i for step in more for i in step["sampled"]] == [None] * len(headers)
    writers = [view[-1] for step in seen.forward for view in step["views"]]
    assert not set(writers) & {COMMON, *text}
    assert {event["from"] for event in seen.schedule if event["do"] == "move"} <= {"Alice", "Bob", "Carol"}
    for header in headers:
        assert seen.blocks()[header] == text[header]


def test_empty_headers_are_no_step(model):
    words = replace(WORDS, header_others="", header_own="")
    seen = record(model, 2, "combined", two_texts(model), prompts=words)
    assert len(seen.prefill) == 1
    assert seen.fed() == STEPS["combined"]
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_the_history_reads_as_whole_paragraphs(model, layout):
    scripts = [
        ids_of(model, "One.", "\n\n", "Two is é.", "\n\n", END),
        ids_of(model, "Eins", "!", "\n", " \n", "Zwei...", "\n\n", "Drei", END),
        ids_of(model, "一。", "\n\n", "```\nx.\n\ny.\n```", "\n\n", "last"),
    ]
    seen = record(model, 3, layout, scripts, max_steps=40)
    names = ["Alice", "Bob", "Carol"]
    history = seen.blocks()[COMMON].removeprefix(prompt_of(layout, names))
    prefix = r"**{} [{}]:**".format
    paragraphs = [
        *(prefix("Alice", n + 1) + text for n, text in enumerate(["One.\n\n", "Two is é.\n\n"])),
        *(prefix("Bob", n + 1) + text for n, text in enumerate(["Eins!\n \n", "Zwei...\n\n"])),
        *(prefix("Carol", n + 1) + text for n, text in enumerate(["一。\n\n", "```\nx.\n\ny.\n```\n\n"])),
    ]
    if layout == "interleaved":  # texts that ended move too
        paragraphs += [prefix("Alice", 3) + END, prefix("Bob", 3) + "Drei" + END]
    where = [history.index(text) for text in paragraphs]
    assert sum(map(len, paragraphs)) == len(history)  # nothing else, and nothing torn apart
    assert where[0] < where[1]
    assert where[2] < where[3]
    assert where[4] < where[5]


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_where_the_text_of_a_retired_worker_stays(model, layout):
    seen = record(model, 2, layout, [ids_of(model, "aaaaaaaa"), ids_of(model, "bye", END)], max_steps=8)
    text = (PROBLEM[-1] if layout == "independent" else "**Bob [1]:**") + "bye" + END
    assert [e["worker"] for e in seen.events if e["do"] == "retire"] == ["Bob"]
    blocks, alice_sees = seen.blocks(), seen.views_at_the_end()["Alice"]
    if layout == "interleaved":
        assert seen.moves() == [(5, "Bob")]
        assert blocks[COMMON].endswith(text)
        assert blocks["Bob"] == ""
    else:
        assert seen.moves() == []
        assert blocks["Bob"] == text
    assert (text in alice_sees) == (layout != "independent")
    assert all("Bob" not in step for step in seen.fed()[5:])


def test_contiguous_and_independent_never_move(model):
    for layout in ("contiguous", "independent"):
        seen = record(model, 3, layout, [ids_of(model, "a.", "\n\n", "b.", "\n\n", END)] * 3)
        assert len(seen.schedule) == len(seen.steps)
        assert [e["text"] != "" for e in seen.events if e["do"] == "begin"] == [layout == "contiguous"] * 3


def test_tokens_and_words_are_those_of_the_fragments_alone(model):
    """A prefix's tokens do not depend on what stands before it: fragments are tokenised on their own."""
    seen = record(model, 2, "combined", two_texts(model))
    assert seen.forward[0]["tokens"] == [ids_of(model, "**Alice [1]:**"), ids_of(model, "**Bob [1]:**")]
    assert seen.prefill[1]["tokens"] == [ids_of(model, WORDS.header_others), ids_of(model, WORDS.header_own)]


def test_defaults(model):
    assert Run(model, PROBLEM).layout == "combined"
    assert Run(model, PROBLEM, 1).layout == "independent"
    assert [worker.name for worker in Run(model, PROBLEM).workers] == ["Alice", "Bob"]
    alone = record(model, 1, None, [ids_of(model, "a", END)], problem="Hello?")
    assert seen_prompt(alone) == "Hello?"  # plain chat


def seen_prompt(seen: Record) -> str:
    last = seen.forward[0]["tokens"][0] if seen.run.layout == "independent" else []
    return seen.text([i for step in seen.prefill if step["views"] == [[COMMON]] for i in step["tokens"][0]] + last)


# ---- the redundancy check


def checked(seen: Record) -> list[str]:
    return [step_text for step in seen.fed() for step_text in step.values() if step_text.endswith(WORDS.check)]


def test_the_check_comes_with_the_next_paragraph_after_so_many_tokens(model, monkeypatch):
    monkeypatch.setattr(generate, "CHECK_AFTER", 8)
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
    monkeypatch.setattr(generate, "CHECK_AFTER", 6)
    seen = record(model, 3, "combined", [ids_of(model, "a.", "\n\n")] * 3, max_steps=6)
    assert [text for text in seen.fed()[4].values()] == [
        "**Alice [2]:**" + WORDS.check,
        "**Bob [2]:**",
        "**Carol [2]:**",
    ]


def test_the_check_after_exactly_so_many_tokens(model, monkeypatch):
    for after, with_check in ((8, True), (9, False)):  # Alice and Bob sample 4 each before they begin again
        monkeypatch.setattr(generate, "CHECK_AFTER", after)
        seen = record(model, 2, "interleaved", [ids_of(model, "aa.", "\n\n")] * 2, max_steps=6)
        assert bool(checked(seen)) == with_check


def test_the_number_of_the_design():
    assert generate.CHECK_AFTER == 1024
    assert generate.FINISHER_TOKENS == 64


@pytest.mark.parametrize(
    ("layout", "workers"),
    [("combined", 1), ("interleaved", 1), ("contiguous", 2), ("independent", 2), ("independent", 1)],
)
def test_no_check_where_there_is_nobody_to_repeat(model, monkeypatch, layout, workers):
    monkeypatch.setattr(generate, "CHECK_AFTER", 2)
    seen = record(model, workers, layout, [ids_of(model, "a.", "\n\n", "b.", "\n\n")] * workers, max_steps=12)
    assert checked(seen) == []
    assert not any(WORDS.check in e.get("text", "") for e in seen.events)


# ---- stops


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_the_first_complete_box_stops_the_run(model, layout):
    scripts = [ids_of(model, "aaaaaaaaaaaaaaaaaaaaaaa"), ids_of(model, "so \\boxed{\\frac{1}{2}} is it")]
    seen = record(model, 2, layout, scripts, prompts=ASKING)
    assert seen.run.answer == "\\frac{1}{2}"
    assert seen.run.stopped_by == "answer"
    assert seen.run.finisher_steps == 0
    spoken = "so \\boxed{\\frac{1}{2}}"
    assert seen.run.forward_steps == len(spoken)  # one token a step, and the last is never fed
    assert seen.events[-1] == {"do": "text", "worker": "Bob", "text": "}"}
    assert [w["paragraphs"] for w in seen.run.summary()["workers"]] == [["a" * len(spoken)], [spoken]]
    assert [w["answer"] for w in seen.run.summary()["workers"]] == [None, "\\frac{1}{2}"]


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_of_two_answers_in_one_step_the_lowest_workers_counts(model, layout):
    scripts = [ids_of(model, "aaa"), ids_of(model, "\\boxed{2}"), ids_of(model, "\\boxed{3}")]
    assert record(model, 3, layout, scripts).run.answer == "2"
    assert record(model, 3, layout, [scripts[0], *scripts[:0:-1]]).run.answer == "3"


def test_a_box_that_is_completed_inside_a_token(model):
    script = ids_of(model, "\\boxed{1}. So")
    assert [model.tokenizer.decode([i]) for i in script[7:10]] == ["1", "}.", " "]
    seen = record(model, 2, "combined", [ids_of(model, "a"), script])
    assert seen.run.answer == "1"
    assert seen.run.summary()["workers"][1]["paragraphs"] == ["\\boxed{1}."]


def test_an_empty_box_is_no_answer(model):
    seen = record(model, 2, "combined", [ids_of(model, "\\boxed{} \\boxed{ } \\boxed{x}"), ids_of(model, "b")])
    assert seen.run.answer == "x"


def test_what_was_not_sampled_is_no_answer(model):
    words = replace(WORDS, together="\\boxed{1} {problem}", prefix="\\boxed{2}{name}", header_own="\\boxed{3}")
    words = replace(words, cue=" \\boxed{")
    seen = record(
        model,
        2,
        "combined",
        [ids_of(model, "a}", END)] * 2,
        problem="\\boxed{4}",
        prompts=words,
        finisher=ids_of(model, "5}"),
    )
    assert seen.run.stopped_by == "retired"
    assert seen.run.answer == "5"


def test_without_boxed_answers_a_box_is_text(model):
    words = replace(ASKING, boxed=False)
    for layout in EVERY_LAYOUT:
        scripts = [ids_of(model, "\\boxed{1} ok", END)] * 2
        seen = record(model, 2, layout, scripts, prompts=words, problem="\\boxed{}?")
        assert (seen.run.answer, seen.run.stopped_by, seen.run.finisher_steps) == (None, "retired", 0)
        assert [worker.answer for worker in seen.run.workers] == [None, None]


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_max_steps(model, layout, max_steps):
    seen = record(model, 2, layout, [[], []], max_steps=max_steps)
    assert seen.run.stopped_by == "steps"
    assert seen.run.forward_steps == len(seen.forward) == max_steps
    assert [w.tokens for w in seen.run.workers] == [max_steps] * 2


def test_an_end_in_the_last_step_is_an_end(model):
    retiring, answering = [ids_of(model, "a", END)] * 2, [ids_of(model, "ab"), ids_of(model, "\\boxed{1}")]
    assert record(model, 2, "combined", retiring, max_steps=3).run.stopped_by == "retired"
    assert record(model, 2, "combined", retiring, max_steps=2).run.stopped_by == "steps"
    assert record(model, 2, "combined", answering, max_steps=9).run.stopped_by == "answer"
    assert record(model, 2, "combined", answering, max_steps=8).run.stopped_by == "steps"


# ---- the context


def longest_view(seen: Record) -> int:
    lengths = [
        sum(len(blocks[block]) for block in view)
        for event, blocks in seen.walk()
        if event["do"] == "step"
        for view in event["views"]
    ]
    return max(lengths)


@pytest.mark.parametrize("asking", [True, False], ids=["asking", "not asking"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_no_view_outgrows_the_context(tmp_path, layout, workers, asking):
    context = 200
    model = load_model(tmp_path, context=context)
    texts = [["aa", ".\n\n"] * 40, ["bbbbbbbb", ".\n\n"] * 20, ["c" * 200]]
    problem = PROBLEM + (" In \\boxed{}." if asking else "")
    seen = record(
        model,
        workers,
        layout,
        [ids_of(model, *text) for text in texts[:workers]],
        finisher=[*ids_of(model, "y" * 100)],  # as long as it may
        prompts=ASKING if asking else WORDS,
        problem=problem,
        max_steps=1000,
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


def test_the_context_counts_what_yarn_adds(model, tmp_path):
    long = load_model(tmp_path, context=150)
    rope = replace(long.config.rope, rope_type="yarn", factor=4.0, original_max_position_embeddings=50)
    long.config = replace(long.config, rope=rope)
    seen = record(long, 1, "independent", [[]], max_steps=1000)
    assert seen.run.stopped_by == "context"
    assert longest_view(seen) == 200


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("asking", [True, False], ids=["asking", "not asking"])
def test_no_length_of_prompt_breaks_the_context(tmp_path, layout, asking):
    """From prompts that fit well to prompts that do not fit: a refusal, or a run within the context."""
    context = 160
    model = load_model(tmp_path, context=context)
    words = replace(ASKING if asking else WORDS, together="{problem}")
    refused, longest = {}, {}
    for length in range(1, context + 2, 5):
        problem = ("p" * length + "\\boxed")[-length:] if asking else "p" * length
        try:
            scripts = [ids_of(model, "a.", "\n\n")] * 2
            longest[length] = longest_view(record(model, 2, layout, scripts, None, problem, words, max_steps=4))
        except InputError as error:
            refused[length] = str(error)
    assert {length: view for length, view in longest.items() if view > context} == {}
    assert refused
    room = len(words.cue) + 64 if asking else 0
    assert min(refused) > max(longest) > context - room - 30  # headers and prefixes must fit too
    assert all(str(length) in error and str(context) in error for length, error in refused.items())


# ---- the finisher


def said(events: list[dict], writer: str) -> str:
    return "".join(e["text"] for e in events if e["do"] == "text" and e["worker"] == writer)


@pytest.mark.parametrize("layout", LAYOUTS_THAT_SHARE)
def test_the_finisher_sees_everything_and_is_fed_what_was_left(model, layout):
    scripts = [ids_of(model, "aaaa"), ids_of(model, "b", END), ids_of(model, "cc.", "\n\n", "dd")]
    # Alice and Carol have each a sampled token that is not fed; Bob has retired
    seen = record(model, 3, layout, scripts, finisher=ids_of(model, "42}no"), prompts=ASKING, max_steps=4)
    first, *others = seen.finisher
    names = ["Alice", "Bob", "Carol"]
    speaks = [COMMON, *names, first["views"][-1][-1]]
    assert speaks[-1] not in {*names, COMMON, OTHERS, OWN, SEPARATOR}
    late = {"Alice": "a", "Carol": "\n\n"}
    assert first["views"] == [*(view_of(layout, name, names) for name in late), speaks]
    assert [seen.text(ids) for ids in first["tokens"]] == [*late.values(), ASKING.cue]
    assert first["sampled"] == [None, None, *ids_of(model, "4")]
    assert [step["views"] for step in others] == [[speaks]] * 2
    assert [step["tokens"] for step in others] == [[ids_of(model, "4")], [ids_of(model, "2")]]
    assert (seen.run.finisher_steps, seen.run.forward_steps, seen.run.stopped_by) == (3, 4, "steps")
    assert seen.run.answer == "42"
    assert said(seen.events, FINISHER) == ASKING.cue + "42}"
    assert [step["sampled"] for step in others] == [ids_of(model, "2"), ids_of(model, "}")]
    assert [worker.answer for worker in seen.run.workers] == [None] * 3
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_a_prefix_that_was_not_fed_is_not_fed_to_the_finisher(model, layout):
    scripts = [ids_of(model, "a.", "\n\n"), ids_of(model, "bbbbbb")]
    seen = record(model, 2, layout, scripts, finisher=ids_of(model, "1}"), prompts=ASKING, max_steps=4)
    assert seen.moves() == [(4, "Alice")]
    assert [view[-1] for view in seen.finisher[0]["views"]] == ["Bob", FINISHER]
    assert seen.text(seen.finisher[0]["tokens"][0]) == "b"


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
    assert said(seen.events, FINISHER) == ASKING.cue + "7" * 64
    assert seen.run.summary()["finisher_steps"] == 64


def test_the_finisher_ends_with_end_of_sequence(model):
    seen = record(model, 2, "combined", [[], []], finisher=ids_of(model, "78", END), prompts=ASKING, max_steps=2)
    assert (seen.run.finisher_steps, seen.run.answer) == (3, None)
    assert said(seen.events, FINISHER) == ASKING.cue + "78"


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_finisher_is_greedy_whatever_the_sampling(model, layout):
    seen = record(model, 2, layout, [[], []], sampling=Sampling(5.0), prompts=ASKING, problem="\\boxed{}?", max_steps=3)
    assert seen.finisher
    for step, logits in zip(seen.steps[-len(seen.finisher) :], seen.logits[-len(seen.finisher) :]):
        for view, token, row in zip(step["views"], step["sampled"], logits, strict=True):
            assert token == (row.argmax() if FINISHER in view[-1] else None)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_no_finisher_where_no_box_is_asked_for(model, layout):
    for prompts, problem in ((WORDS, PROBLEM), (replace(ASKING, boxed=False), "\\boxed{}?")):
        seen = record(model, 2, layout, [[], []], prompts=prompts, problem=problem, max_steps=2)
        assert (seen.run.finisher_steps, seen.finisher, seen.run.answer) == (0, [], None)
        assert not any(FINISHER in e.get("worker", "") for e in seen.events)


# ---- independent


ASKED = PROBLEM + " In \\boxed{}."


def answer_of(model: Model, *texts: str, **options) -> Record:
    return record(
        model, len(texts), "independent", [ids_of(model, text, END) for text in texts], problem=ASKED, **options
    )


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
    seen = answer_of(model, *texts)
    assert seen.run.answer == answer
    assert seen.run.stopped_by == "answer"
    assert seen.run.finisher_steps == 0
    assert [worker.answer for worker in seen.run.workers] == [boxed(text) for text in texts]


def test_who_has_answered_stops_and_the_others_go_on(model):
    seen = answer_of(model, "\\boxed{7} more", "bbbbbbbbbbbbbbbbbbbbb \\boxed{8}")
    assert ["Alice" in step for step in seen.fed()] == [True] * 9 + [False] * 22
    assert seen.run.summary()["workers"][0]["text"] == "\\boxed{7}"


def test_each_worker_without_an_answer_has_a_finisher_of_its_own(model):
    run = Run(model, ASKED, 4, "independent", prompts=WORDS)
    own = {worker.name: finisher.name for worker, finisher in zip(run.workers, run.finishers, strict=True)}
    assert len(set(own.values())) == 4
    scripts = {own["Alice"]: ids_of(model, "8}"), own["Dave"]: ids_of(model, "55", END)}
    seen = answer_of(model, "a" * 20, "\\boxed{7}", "\\boxed{8}", "d", finisher=scripts, max_steps=12)
    first, *others = seen.finisher
    assert first["views"] == [[COMMON, "Alice"], [COMMON, "Alice", own["Alice"]], [COMMON, "Dave", own["Dave"]]]
    assert [seen.text(ids) for ids in first["tokens"]] == ["a", WORDS.cue, WORDS.cue]
    assert [step["views"] for step in others] == [first["views"][1:], first["views"][2:]]
    assert [worker.answer for worker in seen.run.workers] == [None, "7", "8", None]
    assert [finisher.answer for finisher in seen.run.finishers] == ["8", None, None, None]
    assert seen.run.answer == "8"  # the majority's
    assert (seen.run.finisher_steps, seen.run.stopped_by) == (3, "steps")
    assert said(seen.events, own["Alice"]) == WORDS.cue + "8}"
    assert said(seen.events, own["Dave"]) == WORDS.cue + "55"
    assert [said(seen.events, own[name]) for name in ("Bob", "Carol")] == ["", ""]
    told = [(f["name"], f["answer"], f["paragraphs"], f["text"]) for f in seen.run.summary()["finishers"]]
    alice, dave = (own["Alice"], "8", [WORDS.cue + "8}"], "8}"), (own["Dave"], None, [WORDS.cue + "55"], "55")
    assert told == [alice, dave]
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("max_steps", [30, 1000])
def test_each_of_several_writes_what_it_would_write_alone(tmp_path, max_steps):
    model = load_model(tmp_path, context=200)
    sampling = Sampling(1.0, top_k=50, top_p=0.95, min_p=0.01)
    options = {"problem": ASKED, "sampling": sampling, "seed": 5, "max_steps": max_steps}
    together = record(model, 3, "independent", **options)
    streams = [worker.random for worker in Run(model, ASKED, 3, "independent", seed=5).workers]
    texts = []
    for worker, finisher, stream in zip(together.run.workers, together.run.finishers, streams, strict=True):
        alone = Run(model, prompts=WORDS, workers=1, **options)
        alone.workers[0].random = stream
        assert list(alone)
        assert worker.token_ids == alone.workers[0].token_ids
        assert finisher.token_ids == alone.finishers[0].token_ids
        assert (worker.answer or finisher.answer) == alone.answer
        texts.append(tuple(worker.token_ids))
    assert len(set(texts)) == 3
    assert min(map(len, texts)) > 5


# ---- seeds


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_same_seed_same_text(model, layout):
    def text(seed: int) -> list[list[int]]:
        run = Run(model, PROBLEM, 3, layout, 12, Sampling(1.0), seed, WORDS)
        assert list(run)
        return [worker.token_ids for worker in run.workers]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_streams_of_workers_and_seeds_all_differ(model):
    first = [
        torch.rand(3, generator=worker.random).tolist()
        for seed in range(4)
        for worker in Run(model, "?", 16, seed=seed).workers
    ]
    assert len(set(map(tuple, first))) == 64


# ---- the engine under the loop


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_schedule_agrees_with_the_oracle(model, monkeypatch, layout, workers):
    monkeypatch.setattr(generate, "CHECK_AFTER", 10)
    texts = [
        ["One.", "\n\n", "Two", ".\n\n", "Three"],
        ["Eins", END],
        ["One, two, three.", "\n\n", "Four.", "\n", "\n"],
    ]
    scripts = [ids_of(model, *text) for text in texts[:workers]]
    options = {"prompts": ASKING, "problem": ASKED, "max_steps": 22}
    seen = record(model, workers, layout, scripts, finisher=ids_of(model, "ab}"), **options)
    assert seen.run.finisher_steps == 3
    assert_agrees_with_oracle(seen)


def test_sixteen_workers_agree_with_the_oracle(model):
    scripts = [ids_of(model, "a" * (w % 5), ".\n\n", "b" * w, END) for w in range(16)]
    seen = record(model, 16, "combined", scripts, max_steps=12)
    assert len(seen.moves()) >= 10
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_tokens_come_from_the_last_row_of_the_worker_that_gets_them(model, layout):
    seen = record(model, 3, layout, max_steps=12, sampling=Sampling())  # the real sampling, greedy
    chosen = 0
    for step, logits in zip(seen.steps, seen.logits):
        for row, token in enumerate(step["sampled"]):
            if token is not None:
                chosen += 1
                assert token == logits[row].argmax()
    assert chosen == sum(worker.tokens for worker in seen.run.workers)
    assert_agrees_with_oracle(seen)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_long_prompt_in_chunks_gives_the_same(model, monkeypatch, layout):
    problem = "Count from one to a hundred, please, in words. " * 4
    options = {"problem": problem, "max_steps": 8, "sampling": Sampling(1.0), "seed": 3}
    whole = record(model, 2, layout, **options)
    (prompt,) = [step["tokens"][0] for step in whole.prefill if step["views"] == [[COMMON]]]
    heads = model.config.num_attention_heads
    for chunk, scores in ((7, 2**26), (100, heads * 100 * 40), (64, 1)):
        monkeypatch.setattr(generate, "PREFILL_CHUNK", chunk)
        monkeypatch.setattr(generate, "PREFILL_SCORES", scores)
        seen = record(model, 2, layout, **options)
        chunks = [step["tokens"][0] for step in seen.prefill if step["views"] == [[COMMON]]]
        assert list(itertools.chain(*chunks)) == prompt
        assert len(chunks) > 3
        reached = 0
        for tokens in chunks:
            reached += len(tokens)
            assert len(tokens) <= chunk
            assert len(tokens) == 1 or len(tokens) * reached * heads <= scores
        assert all(i is None for step in seen.prefill[: len(chunks) - 1] for i in step["sampled"])
        later = len(seen.steps) - len(chunks)
        assert as_tuples(seen.schedule)[-later:] == as_tuples(whole.schedule)[-later:]
        for ours, theirs in zip(seen.logits[-later - 1 :], whole.logits[-later - 1 :], strict=True):
            assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


# ---- what is told


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_character_is_shown_once_and_whole(model, layout):
    text = "é 日本 😀 👩‍🔬 ñ."
    seen = record(model, 2, layout, [ids_of(model, text, "\n\n", "ü", END), ids_of(model, "😀" * 9, END)])
    told = [e["text"] for e in seen.events if e["do"] == "text" and e["worker"] == "Alice"]
    assert told == [*text, "\n\n", "ü"]
    told = [e["text"] for e in seen.events if e["do"] == "text" and e["worker"] == "Bob"]
    assert told == ["😀"] * 9
    assert sum(worker.tokens for worker in seen.run.workers) == len(ids_of(model, text, "\n\n", "ü", "😀" * 9)) + 2


def test_text_that_follows_characters_of_many_bytes_is_shown_from_its_start(model):
    for problem in ("😀😀é", "日本語", "é" * 9):
        seen = record(model, 1, None, [ids_of(model, " ok é", END)], problem=problem)
        assert "".join(e["text"] for e in seen.events if e["do"] == "text") == " ok é"


def test_bytes_that_are_no_text_are_no_obstacle(model):
    broken = ids_of(model, "😀")[:2]
    seen = record(model, 2, "combined", [[*broken, *ids_of(model, "ok.", "\n\n", END)], [*broken, *ids_of(model, END)]])
    assert seen.run.stopped_by == "retired"
    told = "".join(e["text"] for e in seen.events if e["do"] == "text" and e["worker"] == "Alice")
    assert told.endswith("ok.\n\n")
    assert json.dumps(seen.run.summary(), allow_nan=False)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_the_summary(model, layout):
    scripts = [ids_of(model, "a é.", "\n\n", "b", END), ids_of(model, "c", END), ids_of(model, "dd", ".\n\n")]
    options = {"sampling": Sampling(0.5, top_k=3), "seed": 9, "max_steps": 8, "prompts": ASKING, "problem": ASKED}
    seen = record(model, 3, layout, scripts, finisher=ids_of(model, "6}"), **options)
    summary = seen.run.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    prompt = prompt_of(layout, ["Alice", "Bob", "Carol"], ASKING, ASKED)
    assert summary.keys() >= {
        "forward_steps", "finisher_steps", "tokens", "seconds", "ms_per_step", "answer", "stopped_by", "workers",
    }  # fmt: skip
    expected = {
        "layout": layout,
        "seed": 9,
        "sampling": {"temperature": 0.5, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        "prompt_tokens": len(ids_of(model, prompt)),
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

    words = {worker["name"]: ["" for _ in worker["paragraphs"]] for worker in summary["workers"]}
    number = dict.fromkeys(words, -1)
    sampled, shown = Counter(), dict.fromkeys(words, "")
    for event in seen.events:
        if event["do"] == "begin":
            number[event["worker"]] += 1
            shown[event["worker"]] += event["text"]
        elif event["do"] == "text" and event["worker"] in words:
            words[event["worker"]][number[event["worker"]]] += event["text"]
            shown[event["worker"]] += event["text"]
    for step in seen.forward:
        sampled.update(view[-1] for view, token in zip(step["views"], step["sampled"]) if token is not None)
    for worker in summary["workers"]:
        assert worker["paragraphs"] == words[worker["name"]]
        assert worker["text"] == shown[worker["name"]]
        assert worker["text"] == model.tokenizer.decode(worker["token_ids"])
        assert worker["tokens"] == sampled[worker["name"]]
    if layout in ("combined", "interleaved"):
        assert summary["workers"][0]["paragraphs"] == ["a é.\n\n", "b"]
        assert summary["workers"][0]["text"] == "**Alice [1]:**a é.\n\n**Alice [2]:**b"
        assert summary["workers"][1]["token_ids"] == ids_of(model, "**Bob [1]:**c", END)


def test_a_summary_at_any_time(model):
    run = Run(model, PROBLEM, 2, prompts=WORDS, max_steps=5)
    before = run.summary()
    assert (before["forward_steps"], before["tokens"], before["stopped_by"], before["ms_per_step"]) == (0, 0, None, 0)
    for event in run:
        summary = json.loads(json.dumps(run.summary(), allow_nan=False))
        assert event["do"] != "step" or summary["forward_steps"] <= 5
    assert run.summary()["forward_steps"] == 5


def test_a_run_runs_once(model):
    run = Run(model, PROBLEM, max_steps=1, prompts=WORDS)
    list(run)
    with pytest.raises(RuntimeError, match="once"):
        list(run)


def test_the_schedule_is_json(model):
    seen = record(model, 2, "interleaved", two_texts(model))
    assert json.loads(json.dumps(seen.events)) == seen.events
    for step in seen.steps:
        assert step.keys() == {"do", "views", "tokens", "sampled"}
        assert len(step["views"]) == len(step["tokens"]) == len(step["sampled"])


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


def test_the_problem_is_not_filled_in(model):
    problem = "{n} {names} {first} {problem} \\frac{1}{2} {"
    for layout in EVERY_LAYOUT:
        seen = record(model, 2, layout, [[], []], problem=problem, max_steps=1)
        assert seen_prompt(seen).count(problem) == 1


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
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -3}, "max_steps is -3"),
        ({"problem": "p" * 5000}, "4096"),
        ({"problem": "p" * 5000, "layout": "independent"}, "5000"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_with_the_culprit(model, options, culprit):
    arguments = {"problem": PROBLEM, "prompts": WORDS, **options}
    with pytest.raises(InputError) as refused:
        list(Run(model, **arguments))
    assert culprit in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_every_layout_is_tested_here():
    assert set(EVERY_LAYOUT) == set(LAYOUTS)
