"""Compare: wrong implementations are found, at the event where they first go wrong, with what stands out there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from replaying import assert_one_line, compared, model, replayed
from safetensors.torch import save_file
from util import Engine, run, schedules, step

from minihogwild import Config, Model, Weights
from minihogwild.compare import differences, traits
from minihogwild.oracle import Oracle, yarn_factor
from minihogwild.rope import rotate, rotation


def attentive_model() -> Model:
    """Yarn, in float64. Its scores are so small that each token gets some of the attention: no mistake stays hidden."""
    attentive = model()
    shape = attentive.config
    rows_of_q_and_k = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    for layer in attentive.weights.layers:
        layer.qkv.tensor[:rows_of_q_and_k] /= 4
        layer.qkv_bias[:rows_of_q_and_k] /= 4
    return attentive


TINY = attentive_model()
MOVE = {"do": "move", "from": "a", "to": "p"}
EVENTS = [
    step((["p"], [1, 2, 3, 4, 5, 6, 7, 8])),
    step((["p", "a"], [9])),
    step((["p", "b"], [10])),
    step((["p", "a", "b"], [11])),  # sees the other's tokens, of earlier steps
    step((["p", "b", "a"], [12]), (["p", "a", "b"], [13])),  # and now of this one
    step((["p", "b", "a"], [14]), (["p", "a", "b"], [15, 16])),
    MOVE,
    step((["p", "a", "b"], [17])),
    step((["p", "b", "a"], [18]), (["p", "a", "b"], [19])),
]


# ---- three wrong implementations: a plain one, each with one mistake


class WrongEnd(Engine):
    """Turns moved keys by the length that the common block has after the move, not by that before it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.move = self.move_too_far

    def move_too_far(self, source: str, target: str) -> None:
        cache = self.cache
        start, count = cache.lengths[target], cache.lengths[source]
        cache.move(source, target)
        for kind, kv in zip(self.config.layer_kinds, cache.layers):
            turn = rotation(torch.tensor(count), cache.frequencies[kind], torch.float64)
            for n in range(start, start + count):
                page, place = cache.pages[target][n // cache.page_size], n % cache.page_size
                kv.keys[page, :, place] = rotate(kv.keys[page, :, place], *turn)


class Blind(Oracle):
    """Hides from each worker what the others write in the same step."""

    def step(self, views: list[list[str]], tokens: list[list[int]]) -> torch.Tensor:
        self.new = {view[-1]: len(ids) for view, ids in zip(views, tokens)}
        return super().step(views, tokens)

    def attention(self, number: int, view: list[str], q: torch.Tensor) -> torch.Tensor:
        whole = {block: (self.keys[block][number], self.values[block][number]) for block in view[:-1]}
        for block, (keys, values) in whole.items():
            seen = len(keys) - self.new.get(block, 0)
            self.keys[block][number], self.values[block][number] = keys[:seen], values[:seen]
        mixed = super().attention(number, view, q)
        for block, (keys, values) in whole.items():
            self.keys[block][number], self.values[block][number] = keys, values
        return mixed


class YarnTwice(Oracle):
    """Multiplies queries and keys by yarn's factor once more."""

    def attention(self, number: int, view: list[str], q: torch.Tensor) -> torch.Tensor:
        factor = yarn_factor(self.config)
        return super().attention(number, view, factor**2 * q)  # the keys' factor too: only the product counts


def logits_of(kind: Callable[[Config, Weights, list[str]], Engine | Oracle], blocks: list[str], events: list[dict]):
    """The file that another implementation would write, as a dict; its names are made here."""
    names = [f"step_{index:04}" for index, event in enumerate(events) if event["do"] == "step"]
    return dict(zip(names, run(kind(TINY.config, TINY.weights, blocks), events)))


def compare_with(folder: Path, theirs: dict, blocks: list[str], events: list[dict], *options: object):
    """(exit code, standard output, standard error) of compare, with ours by replay."""
    assert replayed(folder, {"blocks": blocks, "events": events}, "--oracle", of=TINY)[0] == 0
    save_file({name: logits.float().contiguous() for name, logits in theirs.items()}, folder / "theirs.safetensors")
    return compared(folder / "schedule.json", folder / "logits.safetensors", folder / "theirs.safetensors", *options)


def departure(out: str) -> tuple[int, set[str]] | None:
    """(event, traits) as compare tells them."""
    if "They agree" in out:
        assert "depart" not in out
        return None
    [event] = re.findall(r"They depart at event (\d+)", out)
    return int(event), set(re.findall(r"^- (.*)$", out, re.MULTILINE))


@pytest.mark.parametrize("kind", [Oracle, Engine])
def test_a_right_implementation_agrees(tmp_path, kind):
    blocks = ["p", "a", "b"]
    code, out, err = compare_with(tmp_path, logits_of(kind, blocks, EVENTS), blocks, EVENTS, "--tolerance", 1e-6)
    assert (code, err) == (0, "")
    assert departure(out) is None
    assert "8 of 8 steps" in out
    assert "100.00%" in out
    assert out.count(" yes\n") == 11
    assert "NO" not in out


@pytest.mark.parametrize(
    ("kind", "event", "stands_out"),
    [
        (WrongEnd, 7, {"a move just before", "tokens that were moved"}),
        (
            Blind,
            4,
            {
                "several workers",
                "tokens of this very step in another's block",
                "a block that starts elsewhere in another's view",
            },
        ),
        (YarnTwice, 0, {"a chunk of several tokens"}),
    ],
)
def test_a_wrong_implementation_is_found_where_it_first_goes_wrong(tmp_path, kind, event, stands_out):
    blocks = ["p", "a", "b"]
    code, out, err = compare_with(tmp_path, logits_of(kind, blocks, EVENTS), blocks, EVENTS)
    assert (code, err) == (1, "")
    assert departure(out) == (event, stands_out)
    assert "They agree" not in out
    assert ("Nothing agreed before" in out) == (kind is YarnTwice)


quick = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("kind", [WrongEnd, Blind, YarnTwice])
@quick
@given(schedule=schedules(max_events=14))
def test_in_any_schedule_it_is_found_where_its_mistake_first_counts(tmp_path_factory, kind, schedule):
    """Where that is, is said here anew, from the events alone."""
    blocks, events = schedule
    contents, moved, wrong = {block: set() for block in blocks}, set(), []
    harmless_before = False  # a mistake that changed nothing: what it is about is then not new where it first counts
    for index, event in enumerate(events):
        if event["do"] == "move":
            source, target = event["from"], event["to"]
            if contents[source]:
                moved = moved - {source} | {target}
            contents[target], contents[source] = contents[target] | contents[source], set()
            continue
        if event["do"] == "drop":
            contents[event["block"]] = set()
            moved = moved - {event["block"]}
            continue
        for view, ids in zip(event["views"], event["tokens"]):
            contents[view[-1]].update(ids)
        owns = {view[-1] for view in event["views"]}
        for view in event["views"]:
            mistaken = {WrongEnd: moved.intersection(view), Blind: owns.intersection(view[:-1]), YarnTwice: True}[kind]
            # Of tokens that are all the same, attention takes one and the same value, whatever the scores
            if mistaken and len(set().union(*(contents[block] for block in view))) > 1:
                wrong.append(index)
            elif mistaken and not wrong:
                harmless_before = True
    assume(wrong)
    folder = tmp_path_factory.mktemp("files")
    code, out, _ = compare_with(folder, logits_of(kind, blocks, events), blocks, events, "--tolerance", 1e-6)
    assert code == 1
    event, found = departure(out)
    assert event == wrong[0]
    if kind is not YarnTwice and not harmless_before:
        assert {WrongEnd: "tokens that were moved", Blind: "tokens of this very step in another's block"}[kind] in found
    assert found <= set(dict(traits({"blocks": blocks, "events": events}))[event])


# ---- numbers


def two_steps(folder: Path, ours: dict, theirs: dict, *options: object) -> tuple[int, str, str]:
    events = [step((["p"], [1])), MOVE, step((["a"], [1]), (["p"], [2]))]
    (folder / "s.json").write_text(json.dumps({"blocks": ["p", "a"], "events": events}))
    for name, tensors in (("ours", ours), ("theirs", theirs)):
        save_file(tensors, folder / name)
    return compared(folder / "s.json", folder / "ours", folder / "theirs", *options)


def logs(*p: float) -> list[float]:
    return [math.log(x) for x in p]


def table(out: str) -> list[tuple]:
    """(event, worker, max, relative, KL, same argmax) of each line."""
    lines = [line.split() for line in out.split("\n\n")[0].splitlines()[1:]]
    return [(int(event), int(worker), *map(float, numbers), same) for event, worker, *numbers, same in lines]


def test_the_table_of_a_case_made_by_hand(tmp_path):
    one, quarter = logs(0.5, 0.25, 0.25), logs(0.25, 0.5, 0.25)
    ours = {"step_0000": torch.tensor([one]), "step_0002": torch.tensor([one, [-4.0, 1.0, 3.0]])}
    theirs = {"step_0000": torch.tensor([one]), "step_0002": torch.tensor([quarter, [-5.0, 0.0, 2.0]])}
    code, out, err = two_steps(tmp_path, ours, theirs)
    assert (code, err) == (1, "")
    first, second, third = table(out)
    assert first == (0, 0, 0, 0, 0, "yes")
    # ln 2 apart, of ln 4 at most; 1/2 ln 2 - 1/4 ln 2; and the likeliest is another
    assert second == (2, 0, *(pytest.approx(x, rel=1e-3) for x in (math.log(2), 0.5, math.log(2) / 4)), "NO")
    # All shifted by 1: the same distribution. Of 4, the largest in ours (5 in theirs)
    assert third == (2, 1, *(pytest.approx(x, abs=1e-6) for x in (1, 0.25, 0)), "yes")
    assert "2 of 2 steps: relative difference at most 5.000e-01" in out
    assert "66.67%" in out
    assert departure(out)[0] == 2


def test_differences_are_those_of_plain_arithmetic():
    random = torch.Generator().manual_seed(1)
    ours, theirs = torch.randn(2, 3, 7, generator=random).double() * 3
    for row, a, b in zip(differences(ours, theirs), ours.tolist(), theirs.tolist()):
        p, q = ([math.exp(x) / sum(map(math.exp, logits)) for x in logits] for logits in (a, b))
        largest = max(abs(x - y) for x, y in zip(a, b))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q))
        same = a.index(max(a)) == b.index(max(b))
        numbers = [row.largest, row.relative, row.kl]
        assert numbers == pytest.approx([largest, largest / max(map(abs, a)), kl], rel=1e-9)
        assert row.same_argmax == same
        assert kl > 1e-3


@pytest.mark.parametrize(("given", "code"), [(0.09, 1), (0.11, 0), (0, 1), (math.inf, 0)])
def test_the_tolerance_is_relative_to_ours(tmp_path, given, code):
    files = {"step_0000": torch.tensor([[5.0, 10.0]])}, {"step_0000": torch.tensor([[4.0, 10.0]])}
    found, out, _ = two_steps(tmp_path, *files, "--tolerance", given)
    assert found == code
    assert (departure(out) is None) == (code == 0)


@pytest.mark.parametrize("given", ["-1", "nan", "x", ""])
def test_a_tolerance_that_is_none_is_refused(tmp_path, given):
    files = {"step_0000": torch.zeros(1, 2)}, {"step_0000": torch.ones(1, 2)}
    code, out, err = two_steps(tmp_path, *files, f"--tolerance={given}")
    assert (code, out) == (2, "")
    assert_one_line(err, "compare", "--tolerance")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["ours", "theirs", "both"])
def test_what_is_not_a_number_departs(tmp_path, value, whose):
    right, wrong = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, value]])
    first = {"step_0000": torch.tensor([[1.0, 2.0]])}
    ours = first | {"step_0002": right if whose == "theirs" else wrong}
    theirs = first | {"step_0002": right if whose == "ours" else wrong}
    code, out, _ = two_steps(tmp_path, ours, theirs, "--tolerance", 1e9)
    assert code == 1
    assert departure(out)[0] == 2
    assert "depart" in out
    assert out.splitlines()[3].split()[2:4] == ["inf", "inf"]  # the second worker of event 2


def test_identical_files_agree_whatever_they_hold(tmp_path):
    tensors = {"step_0000": torch.zeros(1, 3), "step_0002": torch.tensor([[1e-30, 0, 0], [1e30, 2, 3]])}
    code, out, _ = two_steps(tmp_path, tensors, tensors, "--tolerance", 0)
    assert code == 0
    assert [line[2:] for line in table(out)] == [(0, 0, 0, "yes")] * 3


def test_files_of_a_part_of_the_events_and_of_another_dtype(tmp_path):
    ours = {"step_0002": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    theirs = {name: tensor.to(torch.bfloat16) for name, tensor in ours.items()}
    theirs["step_0000"] = torch.ones(1, 2)  # not in ours
    code, out, _ = two_steps(tmp_path, ours, theirs)
    assert code == 0
    assert [line[:2] for line in table(out)] == [(2, 0), (2, 1)]
    assert "1 of 2 steps" in out


def test_the_most_special_trait_comes_first(tmp_path):
    blocks, events = ["p", "a", "b"], [*EVENTS[:4], EVENTS[5]]
    _, out, _ = compare_with(tmp_path, logits_of(Blind, blocks, events), blocks, events)
    told = re.findall(r"^- (.*)$", out, re.MULTILINE)
    assert told.index("a chunk of this very step in another's block") < told.index("several workers")


# ---- what cannot be compared


@pytest.mark.parametrize(
    ("ours", "theirs", "culprits"),
    [
        ([1, 3], [1, 4], ["step_0000", "[1, 3]", "[1, 4]"]),
        ([2, 3], [1, 3], ["step_0000", "[2, 3]", "[1, 3]"]),
        ([3], [3], ["step_0000", "[3]"]),
        ([1, 1, 3], [1, 1, 3], ["step_0000", "[1, 1, 3]"]),
        ([2, 3], [2, 3], ["step_0000", "[2, 3]"]),  # the step has one worker
        ([1, 0], [1, 0], ["theirs"]),
    ],
)
def test_other_shapes_give_one_line(tmp_path, ours, theirs, culprits):
    code, out, err = two_steps(tmp_path, {"step_0000": torch.ones(ours)}, {"step_0000": torch.ones(theirs)})
    assert (code, out) == (2, "")
    assert_one_line(err, "compare", *culprits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_what_are_no_logits_give_one_line(tmp_path, dtype):
    right, wrong = {"step_0000": torch.ones(1, 3)}, {"step_0000": torch.ones(1, 3, dtype=dtype)}
    for files in ((right, wrong), (wrong, right)):
        code, out, err = two_steps(tmp_path, *files)
        assert (code, out) == (2, "")
        assert_one_line(err, "compare", str(dtype)[6:])


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("name", ["step_0001", "step_0003", "step_2", "other"])
def test_logits_of_another_schedule_give_one_line(tmp_path, whose, name):
    files = [{"step_0000": torch.ones(1, 3)}, {"step_0000": torch.ones(1, 3)}]
    files[whose][name] = torch.ones(1, 3)
    code, out, err = two_steps(tmp_path, *files)
    assert (code, out) == (2, "")
    assert_one_line(err, "compare", ["ours", "theirs"][whose], f"{name} is no step of ")


def test_a_missing_tensor_gives_one_line(tmp_path):
    right = {"step_0000": torch.ones(1, 2), "step_0002": torch.ones(2, 2)}
    code, _, err = two_steps(tmp_path, right, {"step_0000": torch.ones(1, 2)})
    assert code == 2
    assert_one_line(err, "compare", "theirs", "step_0002")
    code, _, err = two_steps(tmp_path, {"other": torch.ones(1)}, right)
    assert code == 2
    assert_one_line(err, "compare", "no step")


@pytest.mark.parametrize("which", ["ours", "theirs"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, None, "cut"], ids=str)
def test_what_is_no_safetensors_file_gives_one_line(tmp_path, which, content):
    right = {"step_0000": torch.ones(1, 2), "step_0002": torch.ones(2, 2)}
    assert two_steps(tmp_path, right, right)[0] == 0
    path = tmp_path / which
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    code, _, err = compared(tmp_path / "s.json", tmp_path / "ours", tmp_path / "theirs")
    assert code == 2
    assert_one_line(err, "compare", str(path))


def test_a_schedule_that_is_none_gives_one_line(tmp_path):
    (tmp_path / "s.json").write_text('{"blocks": ["a"], "events": [{"do": "step", "views": [["b"]], "tokens": [[1]]}]}')
    code, out, err = compared(tmp_path / "s.json", tmp_path / "ours", tmp_path / "theirs")
    assert (code, out) == (2, "")
    assert_one_line(err, "compare", "event 0", "'b'")


# ---- traits


def traits_of(*events: dict) -> list[set[str]]:
    return [set(found) for _, found in traits({"blocks": ["p", "a", "b", "c"], "events": list(events)})]


EMPTY = "a block that was emptied and is written anew"
MOVED = "tokens that were moved"
CONTINUED = "a block that is continued"
SEVERAL = "several blocks in one view"


def test_traits_of_one_worker_after_moves():
    assert traits_of(
        step((["a"], [1])),
        step((["a"], [1])),
        step((["b", "c", "a"], [1, 2])),  # what is empty counts for nothing
        {"do": "move", "from": "c", "to": "p"},
        step((["a"], [1])),
        {"do": "move", "from": "a", "to": "p"},
        step((["b"], [1])),
        step((["p", "a"], [1])),
        {"do": "move", "from": "p", "to": "c"},
        step((["c", "a"], [1])),
        step((["c", "p"], [1])),
    ) == [
        set(),
        {CONTINUED},
        {CONTINUED, "a chunk of several tokens", "a chunk that continues a block"},
        {CONTINUED},
        {"a move just before"},  # of tokens that it does not see
        {SEVERAL, MOVED, EMPTY},
        {SEVERAL, MOVED, EMPTY, CONTINUED, "a move just before", "tokens that were moved twice"},
        {SEVERAL, MOVED, EMPTY, "tokens that were moved twice"},
    ]


def test_traits_of_several_workers():
    both, elsewhere = "several workers", "a block that starts elsewhere in another's view"
    other, ragged = "tokens of this very step in another's block", "workers that feed different numbers of tokens"
    one_sided, chunk = "a worker that sees another who does not see it", "a chunk of several tokens"
    assert traits_of(
        step((["p"], [1])),
        step((["p", "a"], [1]), (["p", "b"], [1])),
        step((["p", "b", "a"], [1]), (["p", "a", "b"], [1])),
        step((["p", "b", "a"], [1]), (["p", "b"], [1, 2])),
        step((["p", "a"], [1]), (["b"], [1])),
        step((["p", "b", "a"], [1]), (["p", "b", "c"], [1])),
    ) == [
        set(),
        {both, SEVERAL},
        {both, SEVERAL, CONTINUED, elsewhere, other},
        {both, SEVERAL, CONTINUED, ragged, chunk, "a chunk that continues a block", other, one_sided}
        | {"a chunk of this very step in another's block"},
        {both, SEVERAL, CONTINUED},
        {both, SEVERAL, CONTINUED},
    ]


def test_traits_after_drops():
    drop_a, drop_b = {"do": "drop", "block": "a"}, {"do": "drop", "block": "b"}
    assert traits_of(
        step((["p"], [1])),
        drop_a,  # it is empty: nothing happens
        step((["a"], [1])),
        {"do": "move", "from": "a", "to": "b"},
        drop_b,
        step((["p", "c"], [1])),
        step((["p", "b"], [1])),  # nothing in it was moved any more
        drop_b,
        step((["p", "c"], [1])),
    ) == [
        set(),
        set(),
        {SEVERAL, "a move just before", "a drop just before"},
        {SEVERAL, EMPTY},
        {SEVERAL, CONTINUED, "a drop just before"},
    ]


def test_traits_of_long_views():
    *_, (_, found) = traits({"blocks": ["p", "a"], "events": [step((["p"], [1] * 5000)), step((["p", "a"], [1]))]})
    assert set(found) == {SEVERAL, "a position past 1,024", "a position past 2,048", "a position past 4,096"}


def test_a_trait_that_earlier_steps_had_in_which_both_agreed_is_not_new(tmp_path):
    events = [step((["p"], [1])), step((["p", "a"], [1])), step((["p"], [1])), step((["p", "a"], [1]))]
    blocks = ["p", "a"]
    theirs = logits_of(Oracle, blocks, events)
    theirs["step_0002"] += 1
    code, out, _ = compare_with(tmp_path, theirs, blocks, events)
    assert code == 1
    assert departure(out) == (2, {CONTINUED})
    theirs["step_0002"] -= 1
    theirs["step_0003"] += 1
    _, out, _ = compare_with(tmp_path, theirs, blocks, events)
    assert departure(out) == (3, {CONTINUED, SEVERAL})  # nothing is new, of all steps before: all that it has
