"""The page of a run, in a real browser: what it shows is what was computed, and nothing in it does harm."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from replaying import model as model_of_nobody
from tiny import END, save_model
from torch import Tensor
from util import schedules

from minihogwild import Cache, InputError, Model, Run, Sampling, generate, load, workers
from minihogwild.backend import PyTorchBackend
from minihogwild.generate import DUET, main
from minihogwild.hub import TextStream
from minihogwild.layouts import COMMON, HEADER_OTHERS, block_of
from minihogwild.oracle import Oracle, yarn_factor
from minihogwild.prompts import Prompts, prompts_of
from minihogwild.replay import digest, read_schedule, replay
from minihogwild.show import trace

CHROMIUM = shutil.which("chromium")
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to test with: apt-get install chromium")
slow = pytest.mark.slow
LAST = 80  # of duet's steps that most tests look at: five paragraphs have moved by then


class Traced:
    """A run with its page; its events, and what follows from them, told by simple lists."""

    def __init__(self, path: Path, model: Model, problem: str, **options):
        run, self.path, self.model = Run(model, problem, **options), path, model
        self.digests = [digest(event["logits"]) for event in run if event["do"] == "step"]
        self.events, self.blocks = run.history, run.blocks
        self.workers = [worker.name for worker in run.workers]
        self.names = {writer.block: writer.name for writer in run.workers + run.finishers}
        self.about = run.summary()
        self.write(self.events)
        self.schedule = {"blocks": self.blocks, "events": [e for e in self.events if e["do"] in ("step", "move")]}

    def write(self, events: list[dict], **about) -> None:
        """The page of these events."""
        self.path.write_bytes(trace.page(self.blocks, events, self.model, self.about | about, self.names))

    def look(self) -> None:
        """Let the oracle do it all again. By token: its weights, and what there was when it was fed.

        All is told as a reader knows it: by the names of those who write, in the place of their blocks.
        """
        label = {block: self.names.get(block, block) for block in self.blocks}
        reader = Reader(self.model, [*label.values()])
        self.steps, self.attention, self.homes = [], [], reader.homes
        self.ids, self.first, before = [], None, None  # the first token that a worker fed
        begun = next(n for n, event in enumerate(self.events) if event["do"] == "begin")
        for n, event in enumerate(self.events):
            if event["do"] == "move":
                event = event | {"from": label[event["from"]], "to": label[event["to"]]}
            elif event["do"] == "step":
                event = event | {"views": [[label[block] for block in view] for view in event["views"]]}
            if event["do"] == "move":
                reader.move(event["from"], event["to"])
            elif event["do"] == "step":
                if n > begun and self.first is None:
                    self.first = len(self.ids)
                    self.steps.append(before)  # step 0: the prompt alone
                self.attention += reader.look(event["views"], event["tokens"])
                self.ids += [token for ids in event["tokens"] for token in ids]
                before = {"held": {block: [*tokens] for block, tokens in reader.held.items()}, "event": event}
                before["fed"] = range(len(self.ids) - sum(map(len, event["tokens"])), len(self.ids))
                if n > begun:
                    self.steps.append(before)

    def step_of(self, token: int) -> int:
        return next(n for n, step in enumerate(self.steps) if n and token in step["fed"])


class Reader(Oracle):
    """The oracle, with an attention of its own that keeps its weights, and tokens numbered as they come."""

    def __init__(self, model: Model, blocks: list[str]):
        super().__init__(model.config, model.weights, blocks)
        self.held, self.homes = {block: [] for block in blocks}, []

    def look(self, views: list[list[str]], tokens: list[list[int]]) -> list[Tensor]:
        """Of each token that is fed, [L, H, tokens so far]."""
        for view, ids in zip(views, tokens):
            self.held[view[-1]] += range(len(self.homes), len(self.homes) + len(ids))
            self.homes += [view[-1]] * len(ids)
        self.seen = defaultdict(list)  # by own block: for each layer [H, n, S]
        super().step(views, tokens)
        found = []
        for view, ids in zip(views, tokens):
            layers = torch.stack(self.seen[view[-1]])  # [L, H, n, S]
            whole = layers.new_zeros(*layers.shape[:3], len(self.homes))
            whole[..., [token for block in view for token in self.held[block]]] = layers
            found += [whole[:, :, row] for row in range(len(ids))]
        return found

    def move(self, source: str, target: str) -> None:
        self.held[target] = self.held[target] + self.held[source]
        super().move(source, target)
        self.held[source] = []

    def drop(self, block: str) -> None:
        super().drop(block)
        self.held[block] = []

    def attention(self, number: int, view: list[str], q: Tensor) -> Tensor:
        keys = torch.cat([self.keys[block][number] for block in view])  # [S, K, D]
        values = torch.cat([self.values[block][number] for block in view])
        kind = self.config.layer_kinds[number]
        heads, S, n = q.shape[1], len(keys), len(q)
        places = torch.arange(S)
        turned_keys, turned_queries = self.rotate(keys, places, kind), self.rotate(q, places[S - n :], kind)
        weights, out = torch.zeros(heads, n, S, dtype=torch.float64), torch.zeros_like(q)
        for row in range(n):
            upto = S - n + row + 1
            for head in range(heads):
                kv = head * keys.shape[1] // heads
                scores = turned_keys[:upto, kv] @ turned_queries[row, head]
                scores *= yarn_factor(self.config) ** 2 / math.sqrt(q.shape[-1])
                weights[head, row, :upto] = torch.softmax(scores, 0)
                out[row, head] = weights[head, row] @ values[:, kv]
        self.seen[view[-1]].append(weights)
        return out


@pytest.fixture(autouse=True)
def _nobody_types(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(DUET, "float32", "cpu")


@pytest.fixture(scope="module")
def duet(model, tmp_path_factory) -> Traced:
    path = tmp_path_factory.mktemp("page") / "run.html"
    traced = Traced(path, model, prompts_of(DUET).problem, max_steps=LAST)
    traced.look()
    return traced


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Model:
    """Four heads share two of keys; its text is noise."""
    return load(save_model(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Open a page, offline. That it complains of anything, or asks for anything, is a failure."""
    contexts, complaints = [], []

    def visit(path: Path, **options) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "request", lambda request: None if request.url[:4] in ("file", "data") else complaints.append(request.url)
        )
        page.goto(path.as_uri())
        page.locator("#step", has_text="of").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def scrub(page: Page, step: int) -> None:
    page.locator("#scrub").fill(str(step))
    assert page.locator("#step").text_content().startswith(f"step {step} of")


def pane(page: Page, worker: str) -> Locator:
    return page.locator(".pane").filter(has=page.locator(f"header >> text={worker}'s view"))


def token(page: Page, worker: str, number: int) -> Locator:
    return pane(page, worker).locator(f'.t[data-n="{number}"]')


def told(page: Page) -> tuple[dict[int, float], float]:
    """The list beside the views: weights by token, and the rest."""
    listed = {}
    for entry in page.locator("#strongest button").all():
        listed[int(entry.get_attribute("data-n"))] = share(entry.locator(".share"))
    return listed, share(page.locator("#strongest .rest .share"))


def share(element: Locator) -> float:
    return float(element.text_content().removesuffix(" %")) / 100


def near(shown: float, true: float, rounded: float = 0.0) -> bool:
    """To the precision that is stored: 8 bits of the square root; and shown."""
    low, high = math.sqrt(max(shown - rounded, 0)), math.sqrt(shown + rounded)
    return low - 0.5 / 255 - 1e-3 <= math.sqrt(true) <= high + 0.5 / 255 + 1e-3


def assert_is(listed: dict[int, float], rest: float, true: Tensor, rounded: float = 0.0) -> None:
    """Are these the strongest weights of [N], and is that the rest?"""
    strongest = true.topk(trace.TOP).values
    for number, weight in listed.items():
        assert near(weight, true[number].item(), rounded), (number, weight, true[number])
        assert true[number] >= strongest[-1] - 1e-4
    assert all(
        number in listed for number in (true > strongest[-1] + 1e-4).nonzero()[:, 0].tolist() if true[number] > 1e-5
    )
    assert near(rest, max(1 - strongest.sum().item(), 0), rounded)


# ---- what was computed


def onlooker(first: int, show: Callable[[Tensor], None], backend: PyTorchBackend | None = None) -> trace.Onlooker:
    return trace.Onlooker(backend or PyTorchBackend(), first, show)


@slow
def test_a_replay_is_the_run_bit_for_bit(duet):
    for dtype, expected in (("float32", duet.digests), ("bfloat16", None)):
        model = load(DUET, dtype, "cpu")
        expected = expected or [digest(logits) for _, logits in replay(duet.schedule, model)]
        shown = []
        cache = Cache(model.config, duet.blocks, model.dtype, "cpu", onlooker(0, shown.append))
        assert [digest(logits) for _, logits in replay(duet.schedule, model, cache=cache)] == expected
        assert len(shown) == len(expected) * model.config.num_hidden_layers


class Kernels(PyTorchBackend):
    """A backend of which is noted what it is asked for; it reads the plan's tables, and not the mask."""

    def __init__(self):
        self.asked = []

    def linear(self, x, weight, bias=None):
        self.asked.append("linear")
        return super().linear(x, weight, bias)

    def reduce(self, x):
        self.asked.append("reduce")
        return x

    def causal_mask(self, plan, dtype):
        self.asked.append("causal_mask")

    def attend(self, q, kv, positions, scale):
        assert positions.causal_mask is None
        self.asked.append("attend")
        mask = super().causal_mask(positions.plan, torch.promote_types(kv.keys.dtype, torch.float32))
        return super().attend(q, kv, replace(positions, causal_mask=mask), scale)


def test_what_is_not_recorded_is_left_to_the_runs_own_backend(model, duet):
    """Kernels on a GPU keep no weights: those of a long prompt may not fit."""
    kernels, shown, digests, fed = Kernels(), [], [], 0
    layers = model.config.num_hidden_layers
    looking = onlooker(duet.first, shown.append, kernels)
    cache = Cache(model.config, duet.blocks, model.dtype, "cpu", looking)
    for index, logits in replay(duet.schedule, model, cache=cache):
        digests.append(digest(logits))
        fed += sum(map(len, duet.schedule["events"][index]["tokens"]))
        watched = fed > duet.first
        assert len(shown) == layers * watched
        assert kernels.asked.count("attend") == layers * (not watched)
        assert kernels.asked.count("causal_mask") == (not watched)
        assert kernels.asked.count("linear") == 4 * layers + 1
        assert kernels.asked.count("reduce") == 2 * layers
        kernels.asked.clear()
        shown.clear()
    assert digests == duet.digests


def test_a_block_that_is_dropped_holds_nothing_and_its_slots_are_others(tiny):
    """The second text stands where the first stood, in the same slots; the third token sees both blocks."""
    steps = [(["a"], [5, 6, 7]), (["a", "b"], [8, 9]), (["b", "a"], [10, 11, 12, 13]), (["a", "b"], [14])]
    events = [{"do": "step", "views": [view], "tokens": [ids]} for view, ids in steps]
    schedule = {"blocks": ["a", "b"], "events": [*events[:2], {"do": "drop", "block": "a"}, *events[2:]]}
    weights = trace.attention_of(9, schedule, tiny)
    assert weights.shape[2] == 10
    assert (weights[..., :3] == 0).all()
    assert (weights[..., 3:] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_run_with_a_page_is_the_same_run(tmp_path):
    arguments = ["--max-steps", "40", "--device", "cpu", "--workers", "3"]
    assert main([*arguments, "--record", str(tmp_path / "a.json")]) == 0
    assert main([*arguments, "--record", str(tmp_path / "b.json"), "--trace", str(tmp_path / "run.html")]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(read_schedule(tmp_path / "b.json", 10**6)["events"]) >= 42


@pytest.mark.parametrize(
    "layout",
    ["combined", *(pytest.param(layout, marks=slow) for layout in ("contiguous", "interleaved", "independent"))],
)
def test_attention_of_a_token_is_the_oracles(tiny, tmp_path, layout):
    sampling = Sampling(temperature=1.5)
    traced = Traced(tmp_path / "run.html", tiny, "Hi", workers=3, layout=layout, max_steps=12, sampling=sampling)
    traced.look()
    for number in (0, traced.first, traced.first + 1, len(traced.ids) // 2, len(traced.ids) - 1):
        ours = trace.attention_of(number, traced.schedule, tiny)
        torch.testing.assert_close(ours, traced.attention[number], rtol=0, atol=1e-9)


@examples(15)
@given(schedule=schedules(), data=st.data())
def test_attention_of_any_token_of_any_schedule_is_the_oracles(schedule, data):
    """Whatever the views, and also where blocks move or are dropped."""
    blocks, events = schedule
    model = model_of_nobody()
    reader = Reader(model, blocks)
    expected = []
    for event in events:
        if event["do"] == "move":
            reader.move(event["from"], event["to"])
        elif event["do"] == "drop":
            reader.drop(event["block"])
        else:
            expected += reader.look(event["views"], event["tokens"])
    number = data.draw(st.integers(0, len(expected) - 1))
    ours = trace.attention_of(number, {"blocks": blocks, "events": events}, model)
    torch.testing.assert_close(ours, expected[number], rtol=0, atol=1e-9)


def test_attention_of_a_token_that_has_moved_and_of_what_has(model, duet):
    for number in (*duet.steps[18]["fed"], duet.steps[LAST]["fed"][-1]):
        ours = trace.attention_of(number, duet.schedule, model)
        torch.testing.assert_close(ours.double(), duet.attention[number], rtol=0, atol=1e-4)
    for number in (-1, len(duet.ids)):
        with pytest.raises(InputError, match="token"):
            trace.attention_of(number, duet.schedule, model)


@BROWSER
def test_the_page_holds_what_the_oracle_computes(duet, visit):
    L, H = duet.attention[0].shape[:2]
    page = visit(duet.path)
    code = """([L, H]) => { const all = []; for (let n = recorded; n < home.length; n++) {
        const lists = [attention(n)];
        for (let l = 0; l < L; l++) for (let h = -1; h < H; h++) lists.push(attention(n, l, h));
        all.push(lists); } return all; }"""
    for number, lists in enumerate(page.evaluate(code, [L, H]), duet.first):
        true = duet.attention[number]
        planes = [true.mean((0, 1))]
        for layer in true:
            planes += [layer.mean(0), *layer]
        for found, plane in zip(lists, planes, strict=True):
            assert_is(dict(map(tuple, found["tokens"])), found["rest"], plane)
    assert number == len(duet.ids) - 1


@slow
@BROWSER
def test_numbers_beyond_two_bytes(tiny, tmp_path, browser, monkeypatch):
    def of_a_long_run(tokens: Tensor, *others: Tensor) -> trace.KeptStep:
        return kept(tokens + 70000, *others)

    kept = trace.KeptStep
    monkeypatch.setattr(trace, "KeptStep", of_a_long_run)
    traced = Traced(tmp_path / "run.html", tiny, "Hi", max_steps=6, sampling=Sampling(temperature=1.5))
    traced.look()
    page = browser.new_page()
    page.goto(traced.path.as_uri())
    page.locator("#facts", has_text="can't be drawn").wait_for()  # for want of so many tokens; but it is unpacked
    found = page.evaluate("attention(home.length - 1)")
    page.close()
    listed = {number - 70000: weight for number, weight in found["tokens"]}
    assert_is(listed, found["rest"], traced.attention[-1].mean((0, 1)))


@slow
@BROWSER
@pytest.mark.parametrize("most", [600, 20])
def test_where_there_are_many_lists_averages_are_kept(tiny, tmp_path, visit, monkeypatch, most):
    """Two layers of four heads: 8 lists for a token would be too many, or even 2."""
    monkeypatch.setattr(trace, "LISTS", most)
    traced = Traced(tmp_path / "run.html", tiny, "Hi", max_steps=12, sampling=Sampling(temperature=1.5))
    traced.look()
    page, number = visit(traced.path), len(traced.ids) - 1
    averages = [-1] + [0, 1] * (most == 600)
    for layer in averages:
        found = page.evaluate("([n, layer]) => attention(n, layer)", [number, layer])
        true = traced.attention[number].mean((0, 1)) if layer < 0 else traced.attention[number][layer].mean(0)
        assert_is(dict(map(tuple, found["tokens"])), found["rest"], true)
    assert page.locator("#layer option").count() == len(averages)
    assert page.locator("#head option").count() == 1
    assert "average" in page.locator("#kept").text_content()


@pytest.mark.parametrize("steps", [60, pytest.param(500, marks=slow)])
def test_a_page_is_small(model, tmp_path, steps):
    endless = replace(model, eos=frozenset())
    traced = Traced(tmp_path / "run.html", endless, prompts_of(DUET).problem, workers=4, max_steps=steps)
    assert len(traced.digests) >= steps
    assert traced.path.stat().st_size < 100e3 + 4e3 * steps


# ---- what one sees


@slow
@BROWSER
def test_each_workers_view_at_each_step(duet, visit):
    page, read = visit(duet.path), duet.model.tokenizer.decode
    assert page.locator(".pane").count() == len(duet.workers)
    for n in (LAST, 0, 1, 17, 18, 36, LAST // 2, LAST - 1):  # forward, and back
        scrub(page, n)
        held = duet.steps[n]["held"]
        views = {view[-1]: view for view in duet.steps[1]["event"]["views"]}
        for worker in duet.workers:
            blocks = [block for block in pane(page, worker).locator(".block").all() if block.is_visible()]
            offset, found = 0, [block for block in views[worker] if held[block] or block in duet.workers]
            for element, block in zip(blocks, found, strict=True):
                count = len(held[block])
                assert element.locator("header").text_content().startswith(block)
                where = element.locator("header span").last.text_content()
                assert where == f"offset {offset} · {count} token{'s' * (count != 1)}"
                numbers = [int(span) for span in element.locator(".t").evaluate_all("all => all.map(t => t.dataset.n)")]
                assert numbers == held[block]
                text = element.locator(".text").text_content().replace("↵", "").replace("\n", "")
                shown = read([duet.ids[number] for number in numbers]).replace("\n", "")
                assert text.replace("<|end|>", "") == shown
                offset += count
        assert page.evaluate("""Object.values(panes).every(({root, spans}) => {  // found by number: all that there are
            const all = [...root.querySelectorAll(".t")];
            return all.length === spans.size && all.every(t => spans.get(+t.dataset.n) === t);
        })""")


@slow
@BROWSER
def test_texts_beyond_ascii_and_special_tokens(tiny, tmp_path, visit):
    """Each byte is a token: all but a character's last have no text, and only special tokens are called by a name."""
    words = replace(Prompts(), prefix="é 😀 日本 {name}\n")
    traced = Traced(tmp_path / "run.html", tiny, "é 😀 日本", max_steps=2, prompts=words)
    traced.look()
    page, tokenizer = visit(traced.path), tiny.tokenizer
    scrub(page, 1)
    for block in ("common", "Bob"):
        ids = [traced.ids[n] for n in traced.steps[1]["held"][block]]
        element = pane(page, "Bob").locator(".common .text" if block == "common" else ".text").last
        text = element.text_content().replace("↵", "").replace("\n", "")
        assert text.count("◌") == sum(len(c.encode()) - 1 for c in tokenizer.decode(ids))
        assert text.replace("◌", "") == tokenizer.decode(ids).replace("\n", "")
    assert trace.read_token(TextStream(tokenizer, []), *tiny.eos) == END


@slow
@BROWSER
def test_a_token_keeps_its_writers_colour(duet, visit):
    page = visit(duet.path)
    scrub(page, LAST)
    colour = "t => getComputedStyle(t).color"
    title = {worker: pane(page, worker).locator("header button").evaluate(colour) for worker in duet.workers}
    assert len(set(title.values())) == len(duet.workers)
    page.evaluate(
        "followed = null; for (const pane of Object.values(panes)) glow(pane)"
    )  # what glows has more contrast
    for worker in duet.workers:
        shown = pane(page, worker).locator(".common .t").evaluate_all(f"all => all.map({colour})")
        homes = [duet.homes[number] for number in duet.steps[LAST]["held"]["common"]]
        for one, home in zip(shown, homes, strict=True):
            assert one == title.get(home, one)
            assert (one in title.values()) == (home in title)


@BROWSER
def test_what_a_token_attended_to(duet, visit):
    page = visit(duet.path)
    page.set_viewport_size({"width": 1280, "height": 1400})
    scrub(page, LAST)
    history = duet.steps[LAST]["held"]["common"]
    moved = [n for n in history if duet.homes[n] == "Bob"][-3]
    prefix = duet.steps[LAST]["held"]["Bob"][1]
    newest = duet.steps[LAST]["fed"][0]
    for number, layer, head in ((moved, "", ""), (prefix, "2", ""), (newest, "4", "2"), (moved, "6", "4")):
        true = duet.attention[number]
        page.locator("#layer").select_option(label=layer or "all, averaged")
        assert page.locator("#head").is_disabled() == (not layer)
        if layer:
            page.locator("#head").select_option(label=head or "all, averaged")
            true = true[int(layer) - 1 : int(layer)]
        true = true[:, int(head) - 1] if head else true.mean(1)
        page.mouse.move(0, 0)
        token(page, "Alice", number).hover()
        assert_is(*told(page), true.mean(0), rounded=0.0005)
        there = duet.steps[duet.step_of(number)]["held"]
        for entry in page.locator("#strongest button").all():
            m, where = int(entry.get_attribute("data-n")), entry.locator(".where").text_content()
            [block] = [block for block, tokens in there.items() if m in tokens]
            if duet.homes[m] not in duet.workers:
                assert where == ("prompt" if block == "common" else block)
            else:
                names = {"common": "history", duet.homes[number]: "own paragraph"}
                assert where == f"{duet.homes[m]}, {names.get(block, 'writing at that moment')}"
        who = page.locator("#who h2").text_content()
        reader = duet.homes[number]
        follows = next(m for m in [*range(number + 1, len(duet.ids)), None] if m is None or duet.homes[m] == reader)
        then = "" if follows is None else f", before {duet.model.tokenizer.decode([duet.ids[follows]]).strip()}"
        assert who.replace("↵", "").strip() == f"{reader} looks, in step {duet.step_of(number)}{then}"
        # The bar: of all layers and heads, what it gave to its own paragraph, the other's, what has moved, the prompt
        mass = defaultdict(float)
        for block, tokens in there.items():
            for m in tokens:
                key = (duet.homes[m], block == duet.blocks[0]) if duet.homes[m] in duet.workers else ""
                mass[key] += duet.attention[number].mean((0, 1))[m].item()
        other = next(worker for worker in duet.workers if worker != reader)
        keys = [(reader, False), (other, False), *((w, True) for w in duet.workers), ""]
        widths = page.locator("#shares i").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().width / i.parentNode.getBoundingClientRect().width)"
        )
        assert widths == pytest.approx([mass[key] for key in keys], abs=0.01)
        # The stronger, the more it glows, in each view that holds it
        glowing = 0
        for m in told(page)[0]:
            for worker in duet.workers:
                if token(page, worker, m).count():
                    expected = 0.8 * math.sqrt(true.mean(0)[m] / true.mean(0).max())
                    assert alpha(token(page, worker, m)) == pytest.approx(expected, abs=0.02)
                    glowing += 1
        assert glowing == page.locator(".t.hot").count() > trace.TOP
        assert all(page.locator(f'.t.reads[data-n="{number}"]').nth(w).is_visible() for w in range(2))


def alpha(element: Locator) -> float:
    """Of its background: how much it glows."""
    colour = element.evaluate("t => getComputedStyle(t).backgroundColor")
    return float(re.search(r"rgba\(.*, ([\d.]+)\)", colour)[1])


@slow
@BROWSER
def test_without_a_choice_each_view_glows_for_its_workers_newest_token(duet, visit):
    page = visit(duet.path)
    scrub(page, 40)
    for worker, number in zip(duet.workers, duet.steps[40]["fed"], strict=True):
        assert pane(page, worker).locator(".reads").get_attribute("data-n") == str(number)
        true = duet.attention[number].mean((0, 1))
        hot = pane(page, worker).locator(".hot").evaluate_all("all => all.map(t => +t.dataset.n)")
        assert set(hot) == set(true.topk(trace.TOP).indices.tolist())
    assert_is(*told(page), duet.attention[duet.steps[40]["fed"][0]].mean((0, 1)), rounded=0.0005)


@slow
@BROWSER
def test_a_click_holds_a_token_and_the_list_leads_on(duet, visit):
    page = visit(duet.path)
    scrub(page, LAST)
    keenest = {}  # layer and head that read most of what Bob has written, by token of Alice's
    for number in duet.steps[LAST]["held"]["common"]:
        others = torch.tensor([home == "Bob" for home in duet.homes[: duet.attention[number].shape[2]]])
        by_head = (duet.attention[number] * others).sum(-1)
        if duet.homes[number] == "Alice" and by_head.flatten().sort().values.diff()[-1] > 0.1:  # one leads clearly
            keenest[number] = divmod(by_head.argmax().item(), by_head.shape[1])
    number, (layer, head) = next(item for item in keenest.items() if 0 not in item[1])
    token(page, "Alice", number).click()
    page.mouse.move(5, 5)
    assert page.locator(".reads").first.get_attribute("data-n") == str(number)
    page.locator("#keenest").click()
    assert [page.locator(name).input_value() for name in ("#layer", "#head")] == [str(layer), str(head)]
    assert_is(*told(page), duet.attention[number][layer, head], rounded=0.0005)
    page.get_by_role("button", name="go to step").click()
    assert page.locator("#step").text_content().startswith(f"step {duet.step_of(number)} ")
    page.locator("#strongest button").first.hover()
    assert page.locator(".pointed").count() == 2
    to = page.locator("#strongest button").first.get_attribute("data-n")
    page.locator("#strongest button").first.click()
    assert page.locator(".reads").count() == 2
    assert page.locator(".reads").first.get_attribute("data-n") == to
    page.get_by_role("button", name="let go").click()
    assert page.locator(".reads").count() == 2
    assert page.locator(".reads").first.get_attribute("data-n") != to


@slow
@BROWSER
@pytest.mark.parametrize("whole", [False, True])
def test_mass_from_worker_to_worker(duet, visit, whole):
    page, n = visit(duet.path), 18  # Alice's first paragraph has moved, and she feeds a prefix of several tokens
    scrub(page, n)
    if whole:
        page.locator("#span").select_option("in the whole run")
    sums = {worker: defaultdict(list) for worker in duet.workers}
    for step in duet.steps[1:] if whole else [duet.steps[n]]:
        for number in step["fed"]:
            mass = defaultdict(float)
            for block, tokens in step["held"].items():
                for m in tokens:
                    home = duet.homes[m] if duet.homes[m] in duet.workers else "prompt"
                    moved = home != "prompt" and block == duet.blocks[0]
                    mass[home, moved] += duet.attention[number].mean((0, 1))[m].item()
            for key in [("prompt", False), *((w, moved) for moved in (True, False) for w in duet.workers)]:
                sums[duet.homes[number]][key].append(mass[key])
    rows = page.locator("#matrix tbody tr").all()
    for row, (worker, columns) in zip(rows, sums.items(), strict=True):
        assert row.locator("th").text_content() == worker
        shown = [share(cell) for cell in row.locator("td").all()]
        assert shown == pytest.approx([sum(column) / len(column) for column in columns.values()], abs=0.006)
        assert sum(shown) == pytest.approx(1, abs=0.003)
    heads = page.locator("#matrix thead tr").last.locator("th").all_text_contents()
    assert heads == ["reader", "prompt", *duet.workers, *duet.workers]
    if whole:
        return
    # The same as areas, from the bottom: own, the other's, both histories (pale), the prompt
    for reader, svg in zip(duet.workers, page.locator("#strips svg").all(), strict=True):
        other = next(worker for worker in duet.workers if worker != reader)
        keys = [(reader, False), (other, False), *((w, True) for w in duet.workers), ("prompt", False)]
        paths, low = svg.locator("path").all(), 0.0
        assert [path.get_attribute("class") for path in paths] == [None, None, "pale", "pale", None]
        for path, key in zip(paths, keys, strict=True):
            column = sums[reader][key]
            high = low + sum(column) / len(column)
            corners = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path.get_attribute("d")[:-1])[1:]]
            four = [corners[i] for i in (2 * n, 2 * n + 1, -2 * n - 1, -2 * n - 2)]
            here = sorted(1 - y for _, y in four)
            assert here == pytest.approx([low, low, high, high], abs=0.008)
            assert [x for x, _ in four] == [n - 0.5, n + 0.5, n - 0.5, n + 0.5]
            low = high


@slow
@BROWSER
def test_a_paragraph_that_would_begin_after_the_last_step(model, tmp_path, visit):
    page = visit(Traced(tmp_path / "run.html", model, prompts_of(DUET).problem, max_steps=17).path)
    mark = page.locator("#lanes .begin").nth(1)  # Alice's second
    assert mark.get_attribute("title") == "step 17: Alice begins: "
    assert mark.evaluate("mark => [mark.style.left, mark.style.width]") == ["100%", "0%"]


@slow
@BROWSER
def test_the_timeline(duet, visit):
    page, step, expected = visit(duet.path), 0, []
    for event in duet.events:
        step += event["do"] == "step" and event["views"][-1][-1] in duet.names
        if event["do"] != "step":
            expected.append((event["do"], min(step + (event["do"] == "begin"), LAST), event["worker"]))
    marks = []
    for mark in page.locator("#lanes button").all():
        number, who = re.match(r"step (\d+): (\w+)", mark.get_attribute("aria-label")).groups()
        marks.append((mark.get_attribute("class"), int(number), who))
    assert sorted(marks) == sorted(expected)
    assert {kind for kind, *_ in marks} == {"begin", "move"}
    for kind in ("move", "begin"):
        mark = page.locator(f"#lanes button.{kind}").nth(1)
        mark.click()
        number = re.match(r"step (\d+)", mark.get_attribute("aria-label"))[1]
        assert page.locator("#step").text_content() == f"step {number} of {LAST}"
        assert page.locator("#happens b").count()
    assert "begins: **Bob [2]:** c = a + b" in " ".join(
        m.get_attribute("title") for m in page.locator("#lanes button").all()
    )
    page.locator("#strips .track").first.click()  # in the middle
    assert page.locator("#step").text_content() == f"step {LAST // 2} of {LAST}"


@slow
@BROWSER
def test_keys(duet, visit):
    page = visit(duet.path)
    scrub(page, 17)
    press, step = page.keyboard.press, page.locator("#step")
    page.locator("#scrub").evaluate("slider => slider.blur()")
    for key, there in (("ArrowRight", 18), ("ArrowLeft", 17), ("Shift+ArrowRight", 27), ("End", LAST), ("Home", 0)):
        press(key)
        assert step.text_content() == f"step {there} of {LAST}"
    scrub(page, 17)
    page.locator("#scrub").evaluate("slider => slider.blur()")
    for key in ("Control+ArrowRight", "Alt+ArrowLeft", "Meta+ArrowRight"):  # the browser's own
        press(key)
    page.locator("#layer").focus()
    press("End")
    assert page.locator("#layer").input_value() != "-1"
    assert step.text_content() == f"step 17 of {LAST}"
    page.locator("#layer").select_option("-1")
    page.locator("#layer").evaluate("select => select.blur()")
    press("Home")
    moments = sorted(
        {int(mark.get_attribute("aria-label").split()[1][:-1]) for mark in page.locator("#lanes button").all()}
    )
    for moment in moments:
        press("]")
        assert step.text_content() == f"step {moment} of {LAST}"
    press("[")
    assert step.text_content() == f"step {moments[-2]} of {LAST}"
    # Into a view, and from token to token
    scrub(page, LAST)
    for _ in range(30):
        press("Tab")
        if page.evaluate("document.activeElement.matches('.t')"):
            break
    number = page.evaluate("+document.activeElement.dataset.n")
    for _ in range(3):
        press("ArrowLeft")
    assert page.evaluate("document.activeElement.closest('.pane') === document.querySelector('.pane')")
    view = pane(page, "Alice").locator(".t").evaluate_all("all => all.map(t => +t.dataset.n)")
    there = page.evaluate("+document.activeElement.dataset.n")
    assert view.index(there) == max(view.index(number) - 3, 0)
    press("ArrowUp")
    above = page.evaluate("+document.activeElement.dataset.n")
    assert view.index(above) < view.index(there)
    press("ArrowDown")
    while duet.homes[page.evaluate("+document.activeElement.dataset.n")] != "Bob":
        press("ArrowLeft")
    press("ArrowLeft")
    chosen = page.evaluate("+document.activeElement.dataset.n")
    assert_is(*told(page), duet.attention[chosen].mean((0, 1)), rounded=0.0005)
    press("Enter")
    press("ArrowLeft")  # what is pointed at goes first
    page.locator("#play").focus()
    assert page.locator(f'.reads[data-n="{chosen}"]').count() == 2
    press("Escape")
    assert page.locator(f'.reads[data-n="{chosen}"]').count() == 0
    assert step.text_content() == f"step {LAST} of {LAST}"


@slow
@BROWSER
def test_play(duet, visit):
    page = visit(duet.path)
    scrub(page, LAST - 3)
    page.get_by_role("button", name="play").click()
    page.get_by_role("button", name="pause").wait_for()
    page.locator("#step", has_text=f"step {LAST} of").wait_for()
    page.get_by_role("button", name="play").wait_for()  # it has stopped
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")  # from the beginning
    page.locator("#step", has_text=re.compile(r"step ([5-9]|[1-7]\d) of")).wait_for()
    page.keyboard.press("Space")
    assert page.evaluate("now") < LAST
    assert page.get_by_role("button", name="play").is_visible()


@slow
@BROWSER
def test_a_phone(duet, visit):
    page = visit(
        duet.path, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    for n in (0, 18, LAST):
        scrub(page, n)
        assert page.evaluate("document.documentElement.scrollWidth") == 375
    number = duet.steps[LAST]["held"]["Alice"][-2]
    element = token(page, "Alice", number)
    element.evaluate("t => t.scrollIntoView({block: 'center'})")
    element.tap()
    assert_is(*told(page), duet.attention[number].mean((0, 1)), rounded=0.0005)
    shown = page.locator("#strongest button").first.bounding_box()
    assert 0 < shown["y"] < shown["y"] + shown["height"] <= 740  # beside the text, not below all of it
    assert page.locator("#top").bounding_box()["y"] >= 0
    boxes = [part.bounding_box() for part in page.locator(".pane").all()]
    assert boxes[0]["x"] == boxes[1]["x"]


def contrast(page: Page, selector: str) -> float:
    """The lowest, by WCAG's formula, of the texts of some elements against what lies behind them."""
    return page.evaluate(
        """selector => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgba = colour => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const light = colour => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(colour[i] / 255), 0);
        return Math.min(...[...document.querySelectorAll(selector)].map(element => {
            let behind = element;
            while (rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
            const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
            const [a, b] = pair.map(rgba).map(light);
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        }));
    }""",
        selector,
    )


@slow
@BROWSER
def test_light_and_dark(duet, visit):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = visit(duet.path, color_scheme=scheme)
        scrub(page, LAST)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert contrast(page, ".t:not(.hot), .pane > header *, .block header span, .dim, h1, th, b, #kept") >= 4.5
    assert len(backgrounds) == 2


# ---- whatever is written

HOSTILE = [
    "</script><script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "\x00\x1b[2J\x07\x9b31m",
    "\u202e\u2066",
    "&lt;b&gt; ${harmed} `",
    "\ud800",
    "<!--",
    "%DATA%",
    "",
]


@BROWSER
def test_what_is_written_does_no_harm(model, tmp_path, visit, monkeypatch):
    texts = iter(HOSTILE * 1000)
    monkeypatch.setattr(trace, "read_token", lambda *_: next(texts))
    names = ("</script><img src=x onerror=alert(1)>", "__proto__ & \"quoted\" 'too'")
    words = replace(prompts_of(DUET), names=names)
    model = replace(model, name="<script>alert(1)</script>", eos=frozenset())
    page = visit(Traced(tmp_path / "run.html", model, "a = 1 + 2\nb = a + 3", max_steps=30, prompts=words).path)
    for n in range(0, 31, 5):
        scrub(page, n)
        page.locator(".t").last.dispatch_event("click")
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, script").count() == 2  # the data, and the page's own
    spans = page.evaluate("Array.from({length: 9}, (_, n) => document.querySelector(`.t[data-n='${n}']`).textContent)")
    assert spans[0] == HOSTILE[0]
    assert spans[2] == "\u2400\u241b[2J\u2407\ufffd31m"
    assert spans[3] == "\ufffd\ufffd"
    assert spans[7] == "%DATA%"
    assert page.locator(".pane header button").all_text_contents() == [f"{name}'s view" for name in names]
    assert "<script>alert(1)</script>" in page.locator("#facts").text_content()


@slow
@BROWSER
@pytest.mark.parametrize("options", [{"workers": 1}, {"layout": "independent"}, {"layout": "contiguous", "workers": 8}])
def test_other_runs(tiny, tmp_path, visit, options):
    words = replace(Prompts(), together="{names}: {problem} \\boxed", cue="So: \\boxed{")  # there will be a finisher
    words = replace(words, separator="")
    page = visit(Traced(tmp_path / "run.html", tiny, "Hi", max_steps=5, prompts=words, **options).path)
    finishers = 1 if options.get("workers", 2) != 1 and options.get("layout") != "independent" else 0
    assert page.locator(".pane").count() == options.get("workers", 2) + finishers
    page.keyboard.press("End")
    shown = [block.text_content() for block in page.locator(".block header").all() if block.is_visible()]
    assert not [text for text in shown if text.startswith("separator")]  # nothing is in it
    assert page.locator(".hot").count()
    assert int(page.locator("#step").text_content().split()[-1]) > 5 * bool(finishers)


@slow
@BROWSER
def test_a_run_to_its_end(tmp_path, visit):
    """Bob retires, Alice is stopped; then a finisher writes, which no event lets begin. No name does harm."""
    names = ("constructor", "__proto__", "toString")
    words = replace(Prompts(), names=names, together="{names}: {problem} \\boxed", cue="So: \\boxed{")
    folder = tmp_path / "secret" / "tiny"
    folder.mkdir(parents=True)
    own = load(save_model(folder), device="cpu")
    run = Traced(tmp_path / "run.html", own, "Hi", workers=3, layout="contiguous", max_steps=8, prompts=words)
    steps = [event for event in run.events if event["do"] == "step"][2:]
    at = next(n for n, event in enumerate(run.events) if event is steps[4])
    early = [*run.events[: at + 1], {"do": "retire", "worker": names[1]}]
    for event in steps[5:]:  # without him
        keep = [w for w, view in enumerate(event["views"]) if view[-1] != block_of(names[1])]
        early.append({"do": "step", **{key: [event[key][w] for w in keep] for key in ("views", "tokens")}})
    run.write(early, text="secret")
    page, last = visit(run.path), len(steps)
    assert page.locator("#facts").text_content().startswith(f"tiny · {', '.join(names)}, ")
    data = page.evaluate("JSON.stringify([about, events])")
    assert "secret" not in data
    assert "tokens" not in page.evaluate("Object.keys(events.at(-1))")
    finisher = run.names[run.blocks[-1]]
    ends = {names[0]: 9, names[1]: 5, names[2]: 9, finisher: last}  # the finisher's first step feeds what was sampled
    begins = dict.fromkeys(names, 1) | {finisher: 9}
    for who, begin in begins.items():
        bar = page.locator("#lanes .steps").filter(has=page.locator(f"span[title={who!r}]")).locator(".begin")
        assert bar.get_attribute("title").startswith(f"step {begin}: {who} begins: ")
        left, width = bar.evaluate("bar => [bar.style.left, bar.style.width].map(parseFloat)")
        assert [left, width] == pytest.approx([100 * begin / last, 100 * (ends[who] - begin) / last], abs=0.01)
    for n, state in ((5, "tokens in view"), (6, "retired"), (last, "retired")):
        scrub(page, n)
        assert pane(page, names[1]).locator("header span").first.text_content().endswith(state)
        assert "retired" not in pane(page, names[0]).text_content()
    place = "([n, reader]) => where(n, reader)"
    token_of = "([who, step]) => writes[who].find(n => step_of[n] === step)"
    bob = page.evaluate(token_of, [block_of(names[1]), 2])
    for step, expected in ((5, "writing at that moment"), (6, "unfinished paragraph")):
        assert page.evaluate(place, [bob, page.evaluate(token_of, [block_of(names[0]), step])]) == expected
    colours = page.locator(".pane header button").evaluate_all("all => all.map(t => getComputedStyle(t).color)")
    assert len(set(colours)) == 4
    assert colours[3] == page.evaluate("getComputedStyle(document.body).color")
    run.write(early[:2])  # before anyone began
    assert visit(run.path).locator(".pane").count() == 0


@BROWSER
def test_workers_may_be_called_like_blocks(model, tmp_path, visit):
    names = (COMMON, HEADER_OTHERS, "finisher")
    words = replace(prompts_of(DUET), names=names)
    path = tmp_path / "run.html"
    run = Traced(path, model, prompts_of(DUET).problem, workers=3, max_steps=60, prompts=words)
    blocks = {move["from"] for move in run.events if move["do"] == "move"}
    assert blocks >= {block_of(COMMON)}
    page = visit(path)
    page.keyboard.press("End")
    assert page.locator(".pane > header button").all_text_contents() == [f"{name}'s view" for name in names]
    assert page.locator("#lanes .steps > span.by").all_text_contents() == [*names]
    assert [row.text_content() for row in page.locator("#matrix tbody th").all()] == [*names]
    assert f"· {', '.join(names)} ·" in page.locator("#facts").text_content()
    for number, own in enumerate(names):
        others = [name for name in names if name != own]
        shown = page.locator(".pane").nth(number).locator(".block header span:first-child")
        titles = ["common: prompt and history", HEADER_OTHERS, *others, "header own", f"{own}, own"]
        assert shown.all_text_contents() == titles
    # A token of the worker "common" that has moved to the history, beside one of the prompt
    number = page.evaluate("block => writes[block].find(n => n >= recorded)", block_of(COMMON))
    element = page.locator(f'.pane .common .t[data-n="{number}"]').first
    element.hover()
    assert page.locator("#who h2 b").text_content() == COMMON
    colour = "element => getComputedStyle(element).color"
    by_name = page.locator(".pane header button").first.evaluate(colour)
    page.evaluate("followed = null; for (const pane of Object.values(panes)) glow(pane)")
    assert element.evaluate(colour) == by_name
    assert page.locator('.pane .common .t[data-n="0"]').first.evaluate(colour) != by_name
    places = page.locator("#strongest .where").all_text_contents()
    assert {"prompt", f"{COMMON}, own paragraph"} >= {*places} - {f"{name}, writing at that moment" for name in names}


@pytest.mark.parametrize(
    ("name", "folder", "shown"),
    [
        ("/home/me/models/tiny", "/home/me/models/tiny", "tiny"),
        ("/home/me/models/tiny/", "/home/me/models/tiny", "tiny"),
        ("models/tiny", "models/tiny", "tiny"),
        ("../tiny", "../tiny", "tiny"),
        ("~/tiny", "~/tiny", "tiny"),
        ("owner/tiny", "/cache/models--owner--tiny/snapshots/0123", "owner/tiny"),
        ("gpt2", "/cache/models--gpt2/snapshots/0123", "gpt2"),
    ],
)
def test_the_page_says_of_a_models_folder_not_whose_it_is(tiny, name, folder, shown):
    found = replace(tiny, name=name, folder=Path(folder).expanduser())
    assert trace.name_to_show(found) == shown


def test_a_folder_that_is_given_as_a_dot_has_a_name(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert trace.name_to_show(replace(tiny, name=".", folder=Path())) == "mine"


@slow
@BROWSER
def test_sixteen_workers_have_colours_of_their_own(tiny, tmp_path, visit):
    words = replace(Prompts(), names=tuple("ABCDEFGHIJKLMNOP"))
    run = Traced(tmp_path / "run.html", tiny, "Hi", workers=16, max_steps=1, prompts=words)
    for scheme in ("light", "dark"):
        page = visit(run.path, color_scheme=scheme)
        colours = page.locator(".pane header button").evaluate_all("all => all.map(t => getComputedStyle(t).color)")
        assert len(set(colours)) == 17  # and the finisher
        assert contrast(page, ".pane header button, .block header span, .t:not(.hot)") >= 4.5


# ---- the command


@slow
@BROWSER
@pytest.mark.parametrize("steps", [0, 1, 30])  # that the workers have made
def test_an_interrupt_leaves_a_page(tmp_path, monkeypatch, visit, capsys, steps):
    made, step = [], workers.step

    def interrupted(*given):
        made.append(1)
        if len(made) > steps + 2:  # the prompt, the headers
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(workers, "step", interrupted)
    path = tmp_path / "run.html"
    assert main(["--device", "cpu", "--trace", str(path)]) == 130
    assert "Traceback" not in "".join(capsys.readouterr())
    page = visit(path)
    assert page.locator("#step").text_content().endswith(f" of {steps}")
    assert page.locator(".pane").count() == 2 * bool(steps)
    assert "stopped by interrupt" in page.locator("#facts").text_content()


def test_an_interrupt_while_the_page_is_made_cuts_nothing_off(tmp_path, monkeypatch):
    def interrupted(*given, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return replay(*given, **options)

    monkeypatch.setattr(trace, "replay", interrupted)
    path = tmp_path / "run.html"
    arguments = ["--max-steps", 2, "--device", "cpu", "--trace", path, "--json", tmp_path / "a.json"]
    assert main([*map(str, arguments)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "run.html"]
    assert path.read_bytes().endswith(b"</html>\n")
    assert json.loads((tmp_path / "a.json").read_text())["forward_steps"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--trace", "no/run.html"],
        ["--trace", "."],
        ["--trace", "words.json", "--prompts", "words.json"],
        ["--trace", "model/config.json", "--model", "model"],
        ["--trace", "a", "--json", "a"],
        ["--trace", "x/../a", "--record", "a"],
        ["--trace"],
    ],
)
def test_what_can_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "model").mkdir()
    for file in ("words.json", "model/config.json"):
        (tmp_path / file).write_text("{}")
    monkeypatch.setattr(generate, "load", None)
    assert main(["hi", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"minihogwild: .*(--trace|--json|--record).*\n", err)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["config.json", "model", "words.json", "x"]
    assert (tmp_path / "words.json").read_text() == (tmp_path / "model/config.json").read_text() == "{}"
