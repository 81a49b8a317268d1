"""Runs that follow a script: each worker's tokens are written down beforehand, and all else is the real thing.

`record(model, 2, "combined", scripts)` makes a run and lets a driver of the package take it to its end. The driver
samples from logits as ever; but these leave it one choice, the next token of the script of the row's writer. No model
is needed for that: it computes only where it is asked to (`computing=True`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from tiny import END, ids_of
from torch import Tensor

from minihogwild import Cache, Model, Run
from minihogwild.backend import PyTorchBackend
from minihogwild.layouts import COMMON, HEADER_OTHERS, HEADER_OWN, SEPARATOR, block_of
from minihogwild.oracle import Oracle
from minihogwild.prompts import Prompts
from minihogwild.workers import Feed, Writer, drive

NAMES = Prompts().names
WORDS = Prompts(
    together="{names} ({n}) work on: {problem}\n",
    header_others="\n[the others]\n",
    header_own="\n[mine]\n",
    separator="\n[me]\n",
    check=" Again?",
    cue="\nSo \\boxed{",
    may_end=True,
)
ASKING = replace(WORDS, together="{names} ({n}) box \\boxed{} for: {problem}\n")  # so there is a finisher
PROBLEM = "What is 2 + 3?"
ASKED = PROBLEM + " In \\boxed{}."
LAYOUTS_THAT_SHARE = ("combined", "contiguous", "interleaved")
EVERY_LAYOUT = (*LAYOUTS_THAT_SHARE, "independent")

Driver = Callable[[Run, Cache], Iterator[dict]]


# ---- a run by script


class ScriptedBackend(PyTorchBackend):
    """Logits that leave one choice for each row of a pass. With `computing`, `computed` has the model's own."""

    def __init__(self, computing: bool = False):
        self.computing = computing
        self.computed: list[Tensor] = []  # of each pass, [W, V]
        self.passes = 0
        self.choices: list[int | None] = []  # for each row of the next pass; None: whatever the model says
        self.unsound: tuple[int, int] | None = None  # (a pass, counted from 1, and a row of it whose logits are NaN)

    def run(self, forward, tokens: Tensor, weights, config, cache: Cache, plan) -> Tensor:
        self.passes += 1
        logits = torch.zeros(len(plan.last), config.vocab_size, dtype=torch.float64)
        if self.computing:
            logits = forward(tokens, weights, config, cache, plan)
            self.computed.append(logits.clone())
        for row, choice in zip(logits, self.choices, strict=True):
            if choice is not None:
                row[choice] = 1e9
        if self.unsound is not None and self.passes == self.unsound[0]:
            logits[self.unsound[1]] = math.nan
        return logits


class ScriptedRun(Run):
    """A run whose writers follow scripts, by the names of their blocks; who has come to the end of it writes x."""

    def __init__(self, model: Model, problem: str, *options: object, scripts: dict[str, list[int]], **more: object):
        super().__init__(model, problem, *options, **more)
        self.scripts = scripts
        self.decided = Counter()  # for each block, how many of its script's tokens have been chosen
        self.order: list[str] = []  # what the driver did: "feed", "decide" and "learn"
        (self.late,) = ids_of(model, "x")

    def next_feed(self) -> Feed | None:
        feed = super().next_feed()
        if feed is not None:
            self.order.append("feed")
            self.backend.choices = [self.choice_of(writer) for writer in feed.writers]
        return feed

    def choice_of(self, writer: Writer | None) -> int | None:
        if writer is None or writer.block not in self.scripts:
            return None
        script, n = self.scripts[writer.block], self.decided[writer.block]
        return script[n] if n < len(script) else self.late

    def decide(self):
        decision = super().decide()
        self.order.append("decide")
        self.decided.update(writer.block for writer in decision.writers)
        return decision

    def learn(self, token_ids: list[int]) -> list[dict]:
        self.order.append("learn")
        return super().learn(token_ids)


# ---- looking at what happened


@dataclass
class Record:
    """A run that is over, with its cache, the events that it told, and the model's logits of each step."""

    run: Run
    cache: Cache
    events: list[dict] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def schedule(self) -> list[dict]:
        return [event for event in self.events if event["do"] in ("step", "move", "drop")]

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
        model = self.run.model
        parts = [[]]
        for token in ids:
            if token in model.eos:
                parts.append([])
            else:
                parts[-1].append(token)
        return END.join(model.tokenizer.decode(part) for part in parts)

    def writer_of(self, view: list[str]) -> str:
        """The name of the worker, or the finisher, whose view it is."""
        names = {writer.block: writer.name for writer in self.run.workers + self.run.finishers}
        return names[view[-1]]

    def fed(self) -> list[dict[str, str]]:
        """What each worker feeds in each forward step."""
        return [
            {self.writer_of(view): self.text(ids) for view, ids in zip(step["views"], step["tokens"], strict=True)}
            for step in self.forward
        ]

    def sampled(self) -> list[dict[str, str | None]]:
        """What is sampled from its row in each forward step; None where nothing is."""
        return [
            {
                self.writer_of(view): None if token is None else self.text([token])
                for view, token in zip(step["views"], step["sampled"], strict=True)
            }
            for step in self.forward
        ]

    def moves(self) -> list[tuple[int, str]]:
        """(after how many forward steps, whose text) for each move."""
        steps, moves = 0, []
        for event in self.events:
            if event["do"] == "step":
                steps += 1
            if event["do"] == "move":
                assert (event["from"], event["to"]) == (block_of(event["worker"]), COMMON)
                moves.append((steps - len(self.prefill), event["worker"]))
        return moves

    def walk(self) -> Iterator[tuple[dict, dict[str, list[int]]]]:
        """Each event of the schedule, with every block's tokens after it."""
        blocks: dict[str, list[int]] = {block: [] for block in self.run.blocks}
        for event in self.schedule:
            if event["do"] == "move":
                blocks[event["to"]] += blocks[event["from"]]
                blocks[event["from"]] = []
            elif event["do"] == "drop":
                blocks[event["block"]] = []
            else:
                for view, ids in zip(event["views"], event["tokens"], strict=True):
                    blocks[view[-1]] += ids
            yield event, blocks

    def blocks(self) -> dict[str, str]:
        """Every block's text at the end."""
        *_, (_, blocks) = self.walk()
        return {block: self.text(ids) for block, ids in blocks.items()}

    def prompt(self) -> str:
        """The text of the prompt, as it was fed."""
        ids = [token for step in self.prefill if step["views"] == [[COMMON]] for token in step["tokens"][0]]
        if self.run.layout == "independent":  # its last token is each worker's own
            ids += self.forward[0]["tokens"][0]
        return self.text(ids)

    def said(self, writer: str) -> str:
        """All the text that was told of a writer, but prefixes."""
        return "".join(e["text"] for e in self.events if e["do"] == "text" and e["worker"] == writer)


def record(
    model: Model,
    workers: int,
    layout: str | None,
    scripts: list[list[int]] | None = None,
    finisher: list[int] | dict[str, list[int]] | None = None,
    problem: str = PROBLEM,
    prompts: Prompts = WORDS,
    driver: Driver = drive,
    computing: bool = False,
    **options: object,
) -> Record:
    """Run to the end. Worker w writes `scripts[w]`, then x for ever, and a finisher what is given: each its own.

    Without scripts, workers write what the model says.
    """
    computing = computing or scripts is None
    names = prompts.names[:workers]
    of_block = {block_of(name): script for name, script in zip(names, scripts or [], strict=scripts is not None)}
    run = ScriptedRun(
        model,
        problem,
        workers,
        layout,
        scripts=of_block,
        prompts=prompts,
        backend=ScriptedBackend(computing),
        **options,
    )
    for writer in run.finishers:
        given = finisher.get(writer.name) if isinstance(finisher, dict) else finisher
        if given is not None:
            run.scripts[writer.block] = given
    seen = Record(run, run.new_cache())
    for event in driver(run, seen.cache):
        seen.events.append({key: value for key, value in event.items() if key != "logits"})
    seen.logits = run.backend.computed
    assert run.history == [event for event in seen.events if event["do"] != "text"]
    return seen


def play(run: Run, scripts: dict[str, list[int]]) -> Iterator[dict]:
    """A run without any model and cache: the loop of minihogwild/workers.py, with scripts by the writers' names."""
    rest = {name: iter(script) for name, script in scripts.items()}
    while run.next_feed() is not None:
        decision = run.decide()
        yield from run.learn([next(rest[writer.name]) for writer in decision.writers])
    yield from run.tell_waiting()


def assert_agrees_with_oracle(seen: Record) -> None:
    """The schedule, replayed the slow way, gives the logits that the run's model gave."""
    oracle = Oracle(seen.run.model.config, seen.run.model.weights, seen.run.blocks)
    logits = iter(seen.logits)
    for event in seen.schedule:
        if event["do"] == "move":
            oracle.move(event["from"], event["to"])
        elif event["do"] == "drop":
            oracle.drop(event["block"])
        else:
            theirs = oracle.step(event["views"], event["tokens"])
            ours = next(logits)
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert next(logits, None) is None


# ---- restated from the design

HEADERS = {
    "combined": [HEADER_OTHERS, HEADER_OWN],
    "contiguous": [SEPARATOR],
    "interleaved": [],
    "independent": [],
}


def view_of(layout: str, name: str, names: list[str], words: Prompts = WORDS) -> list[str]:
    """The view of the worker `name`."""
    own = block_of(name)
    others = [block_of(other) for other in names if other != name and name not in words.unaware]
    view = {
        "combined": [COMMON, HEADER_OTHERS, *others, HEADER_OWN, own],
        "contiguous": [COMMON, *others, SEPARATOR, own],
        "interleaved": [COMMON, own],
        "independent": [COMMON, own],
    }[layout]
    if layout != "independent" and names.index(name) < len(words.roles):
        view.insert(1, f"role of {name}")
    return view


def prompt_of(layout: str, names: list[str], words: Prompts = WORDS, problem: str = PROBLEM) -> str:
    """The text of the prompt, for a model without a chat template."""
    if layout == "independent":
        return problem
    together = words.together.replace("{names}", ", ".join(names)).replace("{n}", str(len(names)))
    return together.replace("{problem}", problem)
