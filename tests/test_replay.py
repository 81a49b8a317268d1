"""Schedules: which are refused, what a replay of the others writes, and that a recorded run is replayed bit for bit."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hub_files import TINY as FOLDER
from hub_files import make_folder, make_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import said
from mutations import limited, mutate, mutated_bytes, to_json
from refusals import refused
from replaying import assert_one_line, model, replayed
from safetensors import safe_open
from safetensors.torch import load, load_file
from test_engine import TOLERANCE, pages
from tiny import END, ids_of, save_model
from util import V, config, configs, relative_difference, schedules, step

from minihogwild import Cache, Model, compare, generate, replay, workers
from minihogwild import load as load_model
from minihogwild.backend import PyTorchBackend
from minihogwild.hub import loading
from minihogwild.layouts import COMMON, HEADER_OTHERS, HEADER_OWN, SEPARATOR, block_of
from minihogwild.oracle import Oracle
from minihogwild.replay import digest, schedule_json, tensor_name

BLOCKS = ["a", "b", "c"]
PROMPT = step((["a"], [1, 2, 3]))
MOVE = {"do": "move", "from": "a", "to": "b"}
DROP = {"do": "drop", "block": "b"}
TINY = model()


def schedule(*events: object, **keys: object) -> dict:
    return {"version": 1, "blocks": BLOCKS, "events": list(events), **keys}


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "logits.safetensors")


# ---- what is refused


def wrong_step(**keys: object) -> dict:
    return {"do": "step", "views": [["a"]], "tokens": [[1]], **keys}


@pytest.mark.parametrize(
    ("event", "culprit"),
    [
        (wrong_step(views=[["d"]]), "unknown block 'd'"),
        (wrong_step(views=[["d", "a"]]), "unknown block 'd'"),
        (wrong_step(views=[["a", "b", "a"]]), "twice"),
        (wrong_step(views=[["b", "b", "a"]]), "twice"),
        (wrong_step(views=[["a"], ["b", "a"]], tokens=[[1], [2]]), "same block"),
        (wrong_step(views=[[]]), "none of them empty"),
        (wrong_step(views=[], tokens=[]), "at least one view"),
        (wrong_step(tokens=[[]]), "at least one token"),
        (wrong_step(views=[["a"], ["b"]], tokens=[[1], []]), "at least one token"),
        (wrong_step(tokens=[]), "a token list for each"),
        (wrong_step(tokens=[[1], [2]]), "a token list for each"),
        (wrong_step(views=[["a"], ["b"]]), "a token list for each"),
        (wrong_step(tokens=[[1, V]]), f"token [{V}] is outside the vocabulary of {V}"),
        (wrong_step(tokens=[[-1]]), "token [-1] is outside"),
        (wrong_step(tokens=[[10**30]]), "outside the vocabulary"),
        (wrong_step(tokens=[[1.0]]), "tokens"),
        (wrong_step(tokens=[[True]]), "tokens"),
        (wrong_step(tokens=[["1"]]), "tokens"),
        (wrong_step(tokens=[[None]]), "tokens"),
        (wrong_step(tokens=[1]), "tokens"),
        (wrong_step(tokens=["1"]), "tokens"),
        (wrong_step(tokens=None), "tokens"),
        (wrong_step(views=["a"]), "views"),  # not a list of letters
        (wrong_step(views=[[["a"]]]), "views"),
        (wrong_step(views=[[1]]), "views"),
        (wrong_step(views={"a": 1}), "views"),
        ({"do": "step", "tokens": [[1]]}, "views"),
        ({"do": "step", "views": [["a"]]}, "tokens"),
        ({**MOVE, "to": "a"}, "onto itself"),
        ({**MOVE, "from": "d"}, "unknown block 'd'"),
        ({**MOVE, "to": "d"}, "unknown block 'd'"),
        ({**MOVE, "to": ["b"]}, "'from' and 'to'"),
        ({**MOVE, "from": {}}, "'from' and 'to'"),
        ({"do": "move", "from": "a"}, "'from' and 'to'"),
        ({**DROP, "block": "d"}, "unknown block 'd'"),
        ({**DROP, "block": ["b"]}, "'block'"),
        ({**DROP, "block": None}, "'block'"),
        ({"do": "drop", "from": "b"}, "'block'"),
        ({"do": "dance"}, "'do'"),
        ({"do": ["step"]}, "'do'"),
        ({}, "'do'"),
        ([], "'do'"),
        ("step", "'do'"),
        (None, "'do'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("oracle", [[], ["--oracle"]], ids=["engine", "oracle"])
def test_an_event_that_contradicts_itself_is_refused_by_its_index(tmp_path, event, culprit, oracle):
    with patch.object(replay, "step", None):  # nothing runs before all has been checked
        code, out, err = replayed(tmp_path, schedule(PROMPT, MOVE, event, PROMPT), *oracle, of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", "schedule.json: event 2: ", culprit)
    assert os.listdir(tmp_path) == ["schedule.json"]


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (schedule(version=2), "version 2"),
        (schedule(version="1"), "version '1'"),
        (schedule(version=None), "version None"),
        (schedule(blocks=["a", "b", "a"]), "blocks"),
        (schedule(blocks=["a", 1]), "blocks"),
        (schedule(blocks="abc"), "blocks"),
        (schedule(blocks={"a": 1}), "blocks"),
        (schedule(events={"0": PROMPT}), "events"),
        ({"blocks": ["a"]}, "events"),
        ({"events": []}, "blocks"),
        (b"", "schedule.json"),
        (b"[]", "object"),
        (b"\xff\xfe", "schedule.json"),
        (b'{"blocks": ["a"], "events": [', "schedule.json"),
        (b"[" * 100_000, "schedule.json"),
        (b'{"version": ' + b"9" * 5000 + b"}", "schedule.json"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_schedule_is_refused(tmp_path, content, culprit):
    code, out, err = replayed(tmp_path, content, of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", "schedule.json", culprit)
    assert os.listdir(tmp_path) == ["schedule.json"]


def test_a_refusal_stays_one_readable_line_where_names_are_long(tmp_path):
    blocks = ["\x1b[2J\n" * 1000, *map(str, range(10_000))]
    code, _, err = replayed(tmp_path, schedule(wrong_step(views=[["none"]]), blocks=blocks), of=TINY)
    assert code == 2
    assert_one_line(err, "replay", "event 0: unknown block 'none'")
    assert "\x1b" not in err


def test_many_blocks_and_events_are_read_in_time_that_grows_with_their_number(tmp_path):
    blocks = [str(n) for n in range(40_000)]
    events = [wrong_step(views=[blocks[-1:]])] * len(blocks)
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(schedule(*events, blocks=blocks)))
    began = time.process_time()
    assert len(replay.read_schedule(path, V)["events"]) == len(blocks)
    assert time.process_time() - began < 5  # 0.4 here; each name looked up in a list: 20


def test_no_schedule_no_folder_for_the_logits(tmp_path):
    for arguments in (
        [tmp_path / "none.json", "--out", tmp_path / "logits"],
        [tmp_path, "--out", tmp_path / "logits"],
        [tmp_path / "none.json", "--out", tmp_path / "none" / "logits"],
        [tmp_path / "none.json", "--out", tmp_path],
    ):
        with patch.multiple(replay, fetch=lambda name, **_: Path(name), load=lambda *_, **__: TINY):
            code, out, err = said(replay.main, *arguments, "--model", "tiny")
        assert (code, out) == (2, "")
        assert_one_line(err, "replay")
    assert os.listdir(tmp_path) == []


def test_a_step_that_memory_cannot_hold_is_refused_before_it_is_tried(tmp_path, monkeypatch):
    free = type("Memory", (), {"available": 2**27})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    events = schedule(PROMPT, wrong_step(tokens=[[1] * 4000]))  # its mask alone: 16 million entries
    with patch.object(replay, "step", side_effect=replay.step) as steps:
        code, _, err = replayed(tmp_path, events, of=TINY)
    assert code == 2
    assert_one_line(err, "replay", "out of memory", "event 1 needs")
    assert steps.call_count == 1
    assert os.listdir(tmp_path) == ["schedule.json"]


def test_an_oracle_without_memory_gives_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes.")

    monkeypatch.setattr(Oracle, "step", fail)
    code, _, err = replayed(tmp_path, schedule(PROMPT), "--oracle", of=TINY)
    assert code == 2
    assert_one_line(err, "replay", "memory")


# ---- what is not


def test_what_a_reader_may_ignore_is_ignored(tmp_path):
    plain = schedule(PROMPT, {"do": "move", "from": "c", "to": "b"}, wrong_step())  # nothing moves: c is empty
    more = [{**event, "sampled": "?", "digest": digest_like, "note": {}} for event, digest_like in zip(
        plain["events"], (None, 7, ["float64:0"])
    )]  # fmt: skip
    without = {"blocks": ["a"], "events": [PROMPT, wrong_step()]}  # no version: it is 1
    assert replayed(tmp_path, plain, of=TINY)[0] == 0
    expected = written(tmp_path)
    assert sorted(expected) == ["step_0000", "step_0002"]
    code, _, err = replayed(tmp_path, schedule(*more, author="somebody"), of=TINY)
    assert code == 0
    assert "digest" not in err
    found = written(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert replayed(tmp_path, without, of=TINY)[0] == 0
    found = written(tmp_path)
    assert torch.equal(found["step_0001"], expected["step_0002"])


def test_no_context_limit(tmp_path):
    shape = config("yarn")
    assert shape.context < 5000
    few = model(shape=type(shape)(**{**vars(shape), "max_position_embeddings": 4}))
    events = schedule(*[wrong_step(tokens=[[n % V for n in range(50)]])] * 5)
    for oracle in ([], ["--oracle"]):
        assert replayed(tmp_path, events, *oracle, of=few)[0] == 0
        assert len(written(tmp_path)) == 5


def test_a_drop_empties_a_block(tmp_path):
    """What is written to it afterwards stands where the first stood; of an empty one, or one never written, nothing."""
    forgotten = [step((["a", "b"], [4, 5])), MOVE | {"from": "c"}, DROP, DROP, {**DROP, "block": "c"}]
    last = step((["a", "b"], [6]), (["b", "a", "c"], [7, 8]))
    for oracle in ([], ["--oracle"]):
        assert replayed(tmp_path, schedule(PROMPT, *forgotten, last), *oracle, of=TINY)[0] == 0
        found = written(tmp_path)
        assert sorted(found) == ["step_0000", "step_0001", "step_0006"]
        assert replayed(tmp_path, schedule(PROMPT, last), *oracle, of=TINY)[0] == 0
        assert relative_difference(found["step_0006"], written(tmp_path)["step_0001"]) <= 1e-6  # float32 in the file
        assert replayed(tmp_path, schedule(PROMPT, *forgotten[:1], last), *oracle, of=TINY)[0] == 0
        assert relative_difference(found["step_0006"], written(tmp_path)["step_0002"]) > 1e-3


@pytest.mark.parametrize("oracle", [[], ["--oracle"]], ids=["engine", "oracle"])
def test_a_folder_without_a_tokenizer_is_enough(tmp_path, oracle):
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schedule(PROMPT)))
    arguments = [path, "--model", folder, "--device", "cpu", *oracle, "--out"]
    assert said(replay.main, *arguments, tmp_path / "with")[0] == 0
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert said(replay.main, *arguments, tmp_path / "without")[0] == 0
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_without_kernels_it_is_pytorchs_backend(tmp_path):
    chosen = patch.object(replay, "choose_backend", side_effect=replay.choose_backend)
    with patch.object(loading, "Cache", side_effect=Cache) as caches, chosen as choices:
        for options in ([], ["--kernels", "auto"], ["--kernels", "off"]):
            assert replayed(tmp_path, schedule(PROMPT), *options, of=TINY)[0] == 0
        assert replayed(tmp_path, schedule(PROMPT), "--kernels", "off", "--oracle", of=TINY)[0] == 0
    with_kernels = [arguments.args[2] for arguments in choices.call_args_list]
    assert with_kernels == [True, True, False]  # the oracle needs no backend
    backends = [arguments.args[4] for arguments in caches.call_args_list]
    assert [type(backend) for backend in backends] == [PyTorchBackend] * 3
    code, _, err = replayed(tmp_path, schedule(PROMPT), "--kernels", "on", of=TINY)
    assert code == 2
    assert_one_line(err, "replay", "--kernels")


def test_names_of_tensors():
    names = [tensor_name(index) for index in (0, 7, 9999, 10_000, 123_456)]
    assert names == ["step_0000", "step_0007", "step_9999", "step_10000", "step_123456"]


@pytest.mark.parametrize("given", ["0:2", "1:3", ":3", "2:", ":", "4:4", "3:2", "0:99", "90:99", "-2:", ":-2", "-99:2"])
@pytest.mark.parametrize("is_apart", [True, False])
def test_events_are_limited_as_python_slices_are(tmp_path, given, is_apart):
    spelled = ["--events", given] if is_apart else [f"--events={given}"]
    events = [PROMPT, wrong_step(), MOVE, wrong_step(), wrong_step(tokens=[[5]])]
    assert replayed(tmp_path, schedule(*events), of=TINY)[0] == 0
    whole = written(tmp_path)
    code, _, err = replayed(tmp_path, schedule(*events), *spelled, of=TINY)
    assert code == 0
    found = written(tmp_path)
    start, stop = (int(end) if end else None for end in given.split(":"))
    assert sorted(found) == [f"step_{index:04}" for index in range(5)[start:stop] if index != 2]
    assert all(torch.equal(found[name], whole[name]) for name in found)
    assert err.startswith(f"steps: {len(found)}, ")


@pytest.mark.parametrize("given", ["", "3", "a:b", "1:2:1", "::", "1.5:", "1-2", "9" * 5000 + ":"])
def test_events_that_are_no_range_are_refused(tmp_path, given):
    code, out, err = replayed(tmp_path, schedule(PROMPT), f"--events={given}", of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", "--events")
    assert os.listdir(tmp_path) == ["schedule.json"]


def test_steps_after_the_last_one_asked_for_are_not_run(tmp_path):
    with patch.object(replay, "step", side_effect=replay.step) as steps:
        replayed(tmp_path, schedule(*[PROMPT] * 9), "--events", "2:4", of=TINY)
    assert steps.call_count == 4


# ---- what is written


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_engine_and_oracle_write_the_same_logits(dtype, data):
    blocks, events = data.draw(schedules())
    drawn = model(dtype, data.draw(configs()), seed=data.draw(st.integers(0, 99)), biases=data.draw(st.booleans()))
    files = []
    paged = partial(Cache, page_size=data.draw(pages))
    with tempfile.TemporaryDirectory() as name, patch.object(replay, "Cache", paged):
        for oracle in ([], ["--oracle"]):
            assert replayed(Path(name), {"blocks": blocks, "events": events}, *oracle, of=drawn)[0] == 0
            files.append(written(Path(name)))
    steps = {f"step_{n:04}": len(event["views"]) for n, event in enumerate(events) if event["do"] == "step"}
    for file in files:
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.items()} == {
            name: (torch.float32, (workers, V)) for name, workers in steps.items()
        }
    # Both were rounded to float32 on their way to the file: that is all that parts them in float64
    rounding = torch.finfo(torch.float32).eps
    tolerance = max(TOLERANCE[dtype], rounding)
    assert all(relative_difference(files[0][name], files[1][name]) <= tolerance for name in steps)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configs(), schedules(), pages)
def test_what_is_replayed_is_what_the_oracle_gives(shape, schedule, page):
    """`replay` itself, before it rounds to float32; the reference is run here, event by event."""
    blocks, events = schedule
    of = model(shape=shape)
    cache = Cache(shape, blocks, torch.float64, page_size=page)
    ours = dict(replay.replay({"blocks": blocks, "events": events}, of, cache=cache))
    theirs = dict(replay.replay({"blocks": blocks, "events": events}, of, oracle=True))
    reference, expected = Oracle(shape, of.weights, blocks), {}
    for index, event in enumerate(events):
        if event["do"] == "move":
            reference.move(event["from"], event["to"])
        elif event["do"] == "drop":
            reference.drop(event["block"])
        else:
            expected[index] = reference.step(event["views"], event["tokens"])
    assert ours.keys() == theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[index], expected[index]) for index in expected)
    assert max(relative_difference(ours[index], expected[index]) for index in expected) <= 1e-9


def test_the_file_holds_the_logits_in_the_order_of_workers(tmp_path):
    events = [PROMPT, MOVE, step((["b", "a"], [4]), (["b", "c"], [5, 6])), step((["b", "c", "a"], [7]))]
    assert replayed(tmp_path, schedule(*events), of=TINY)[0] == 0
    cache = Cache(TINY.config, BLOCKS, torch.float64)
    expected = {"step_0000": replay.step([["a"]], [[1, 2, 3]], TINY.weights, TINY.config, cache)}
    cache.move("a", "b")
    expected["step_0002"] = replay.step([["b", "a"], ["b", "c"]], [[4], [5, 6]], TINY.weights, TINY.config, cache)
    expected["step_0003"] = replay.step([["b", "c", "a"]], [[7]], TINY.weights, TINY.config, cache)
    found = written(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], logits.float()) for name, logits in expected.items())
    # The bytes, read without the library: header length, JSON, then the data without a gap
    data = (tmp_path / "logits.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    header = json.loads(data[8:start])
    assert header["step_0002"] == {"dtype": "F32", "shape": [2, V], "data_offsets": [4 * V, 12 * V]}
    assert data[start:] == b"".join(logits.float().numpy().tobytes() for logits in expected.values())


def test_a_schedule_without_steps_gives_a_file_without_tensors(tmp_path):
    assert replayed(tmp_path, schedule(MOVE), of=TINY)[0] == 0
    with safe_open(tmp_path / "logits.safetensors", "pt") as file:
        assert list(file.keys()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_written_as_they_are(tmp_path, dtype):
    of = model(dtype)
    assert replayed(tmp_path, schedule(PROMPT), of=of)[0] == 0
    expected = replay.step([["a"]], [[1, 2, 3]], of.weights, of.config, Cache(of.config, BLOCKS, dtype))
    assert expected.dtype == dtype
    assert torch.equal(written(tmp_path)["step_0000"], expected.float())


def test_each_steps_logits_are_written_before_the_next_are_made_and_not_kept(tmp_path, monkeypatch):
    """Memory does not grow with the steps: of 50, one's logits live at a time."""
    log, made, size = [], [], 4 * V

    class File(io.RawIOBase):
        def write(self, data):
            log.append(("written", memoryview(data).nbytes))

    def opened(self, mode="r", *arguments, **options):
        return File() if self.suffix == ".part" else open_(self, mode, *arguments, **options)

    def logged(*arguments):
        log.append(("made", sum(logits() is not None for logits in made)))
        logits = step_of_the_model(*arguments)
        made.append(weakref.ref(logits))
        return logits

    step_of_the_model = replay.step
    open_ = Path.open
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    monkeypatch.setattr(replay, "step", logged)
    assert replayed(tmp_path, schedule(*[wrong_step()] * 50), of=TINY)[0] == 0
    assert len(made) == 50
    assert log[0][0] == "written"
    assert log[0][1] > 50 * 20  # the header, first
    assert [what for what, _ in log[1:]] == ["made", "written"] * 50
    assert {count for what, count in log[1:] if what == "made"} <= {0, 1}  # still alive: the one before
    assert {count for what, count in log[1:] if what == "written"} == {size}


def test_a_schedule_holds_what_the_format_has_and_nothing_else(tmp_path):
    """Events of a Run say more, and there are more kinds of them."""
    kept = [
        {"do": "step", "views": [["a"]], "tokens": [[1]], "sampled": [2], "digest": "float64:0"},
        {"do": "step", "views": [["a"], ["b"]], "tokens": [[1], [3]]},
        {"do": "move", "from": "a", "to": "b"},
        {"do": "drop", "block": "b"},
    ]
    more = {"worker": "Zoë", "logits": torch.zeros(1, V), "text": "x"}
    others = [{"do": "begin", "worker": "a"}, {"do": "text", "text": "x"}, {"do": "retire", "worker": "a"}]
    data = schedule_json(["a", "b", "ü"], [*others, *(event | more for event in kept), *others])
    assert json.loads(data) == {"version": 1, "blocks": ["a", "b", "ü"], "events": kept}
    assert "ü".encode() in data
    assert len(data.splitlines()) == len(kept) + 2  # a line for each
    (tmp_path / "s.json").write_bytes(data)
    assert replay.read_schedule(tmp_path / "s.json", V) == {"blocks": ["a", "b", "ü"], "events": kept}
    assert json.loads(schedule_json(["a"], [])) == {"version": 1, "blocks": ["a"], "events": []}
    assert json.loads(schedule_json(["a"], [], {"banned": [3, 1], "banned_first": []})) == {
        "version": 1,
        "blocks": ["a"],
        "banned": [3, 1],
        "events": [],
    }


@pytest.mark.parametrize("name", ["banned", "banned_first"])
def test_bans_of_a_schedule_are_lists_of_ids(tmp_path, name):
    path = tmp_path / "s.json"
    events = [{"do": "step", "views": [["a"]], "tokens": [[1]]}]
    for wrong in ("x", [1.5], [True], {"1": 2}, None):
        path.write_text(json.dumps({"blocks": ["a"], "events": events, name: wrong}))
        with refused("s.json", f"{name} must be a list of int"):
            replay.read_schedule(path, V)
    path.write_text(json.dumps({"blocks": ["a"], "events": events, name: [3, 1]}))
    assert replay.read_schedule(path, V)["events"] == events


# ---- what fails on the way


@pytest.mark.parametrize("error", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_a_gpu_that_is_lost_gives_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`\n")

    monkeypatch.setattr(replay, "step", fail)
    code, out, err = replayed(tmp_path, schedule(PROMPT), of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", "CUDA error: an illegal memory access")


def test_another_failure_is_ours_and_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no CUDA error")

    monkeypatch.setattr(replay, "step", fail)
    with pytest.raises(RuntimeError, match="no CUDA error"):
        replayed(tmp_path, schedule(PROMPT), of=TINY)


@pytest.mark.parametrize("control", ["\x1b", "\x9b", "\x7f", *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"])
def test_no_message_controls_or_reverses_the_terminal(tmp_path, control):
    code, _, err = replayed(tmp_path, schedule(PROMPT), "--out", tmp_path / "none" / f"{control}fdp.exe", of=TINY)
    assert code == 2
    assert_one_line(err, "replay", "fdp.exe")
    assert control not in err


@pytest.fixture
def older(tmp_path) -> Path:
    path = tmp_path / "logits.safetensors"
    path.write_text("old")
    return path


def assert_as_it_was(older: Path) -> None:
    assert older.read_text() == "old"
    assert sorted(os.listdir(older.parent)) == [older.name, "schedule.json"]


def test_the_logits_are_not_written_over_a_model_at_home(tmp_path, monkeypatch):
    """`~` is the home folder, for this check as for what is loaded."""
    folder = make_folder(tmp_path / "model", FOLDER, make_tensors(FOLDER))
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "schedule.json").write_text(json.dumps(schedule(PROMPT)))
    out = folder / "model.safetensors"
    code, _, err = said(replay.main, tmp_path / "schedule.json", "--model", "~/model", "--out", out)
    assert code == 2
    assert_one_line(err, "replay", "--out", "already")
    assert out.read_bytes() == before


def test_the_logits_are_not_written_over_the_schedule(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "schedule.json")
    for out in (tmp_path / "schedule.json", tmp_path / "link"):
        code, said, err = replayed(tmp_path, schedule(PROMPT), "--out", out, of=TINY)
        assert (code, said) == (2, "")
        assert_one_line(err, "replay", "--out", "already")
        assert json.loads((tmp_path / "schedule.json").read_text()) == schedule(PROMPT)


def test_the_logits_are_not_written_over_the_model(tmp_path):
    save_model(tmp_path)
    held = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "s.json").write_text(json.dumps(schedule(PROMPT)))
    out = tmp_path / "model.safetensors"
    assert said(replay.main, tmp_path / "s.json", "--model", tmp_path, "--out", out)[0] == 2
    assert said(generate.main, "hi", "--model", tmp_path, "--max-steps", 1, "--json", out)[0] == 2
    assert out.read_bytes() == held


def test_the_oracle_runs_on_no_gpu(tmp_path):
    code, out, err = replayed(tmp_path, schedule(PROMPT), "--oracle", "--device", "cuda", of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", "--oracle", "cpu")


@pytest.mark.parametrize("buffering", [-1, 0], ids=["told at the end", "told at once"])
def test_a_full_disk_leaves_the_older_file(tmp_path, older, monkeypatch, buffering):
    opened = Path.open

    def full(self, mode="r", *arguments, **options):
        if "w" not in mode:
            return opened(self, mode, *arguments, **options)
        self.touch()
        return open("/dev/full", mode, buffering)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with patch.object(
            Path, "write_bytes", lambda self, data: os.write(os.open(self, os.O_CREAT | os.O_RDWR), data)
        ):
            code, out, err = replayed(tmp_path, schedule(PROMPT, PROMPT), of=TINY)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", os.strerror(errno.ENOSPC))
    assert_as_it_was(older)


@pytest.mark.parametrize("oracle", [[], ["--oracle"]], ids=["engine", "oracle"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_leaves_the_older_file(tmp_path, older, monkeypatch, at, oracle):
    calls = itertools.count(1)

    def interrupted(*_):
        if next(calls) == at:
            raise KeyboardInterrupt
        return torch.ones(1, V)

    monkeypatch.setattr(replay, "step", interrupted)
    monkeypatch.setattr(Oracle, "step", interrupted)
    code, out, err = replayed(tmp_path, schedule(*[PROMPT] * 4), *oracle, of=TINY)
    assert (code, out, err) == (130, "", "")
    assert next(calls) == at + 1
    assert_as_it_was(older)


@pytest.mark.parametrize("oracle", [[], ["--oracle"]], ids=["engine", "oracle"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e300], ids=str)
def test_logits_that_are_not_finite_are_told_by_their_event(tmp_path, older, value, oracle):
    of = model()
    events = [PROMPT, MOVE, step((["b"], [7])), step((["a", "c"], [2]), (["b", "a"], [3]))]
    of.weights.embed[7] = value
    expected = 2
    if value == 1e300:  # finite in float64, and not in the file
        of.weights.embed[7], of.weights.head.tensor[:] = 1.0, value
        expected = 0
    code, out, err = replayed(tmp_path, schedule(*events), *oracle, of=of)
    assert (code, out) == (2, "")
    assert_one_line(err, "replay", f"event {expected}: ", "not finite")
    assert_as_it_was(older)


# ---- recorded runs


SAYS = {"together": "{names}: {problem}\n", "header_others": "[o]", "header_own": "[m]", "cue": " \\boxed{"}
NAMES = ["Alice", "Bob", "Carol"]
WRITTEN = {  # blocks that are written to before a worker begins, by layout
    "combined": {COMMON, HEADER_OTHERS, HEADER_OWN},
    "contiguous": {COMMON, SEPARATOR},
    "interleaved": {COMMON},
    "independent": {COMMON},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_model(tmp_path_factory.mktemp("model"))
    (path / "prompts.json").write_text(json.dumps(SAYS))
    return path


@pytest.fixture(scope="module")
def tiny(folder) -> Model:
    return load_model(folder, device="cpu")


@pytest.fixture
def ran(monkeypatch) -> list[dict]:
    """What runs: each step that the model is given with the digest of what it gave, and each move of the cache."""
    events = []
    step_of_the_model, move_of_the_cache = workers.step, Cache.move

    def logged_step(views, tokens, *others):
        logits = step_of_the_model(views, tokens, *others)
        event = {"do": "step", "views": views, "tokens": tokens, "digest": digest(logits)}
        events.append(json.loads(json.dumps(event)))  # as it is now
        return logits

    def logged_move(cache, source, target):
        events.append({"do": "move", "from": source, "to": target})
        move_of_the_cache(cache, source, target)

    monkeypatch.setattr(workers, "step", logged_step)
    monkeypatch.setattr(Cache, "move", logged_move)
    return events


@pytest.fixture
def script(tiny, monkeypatch) -> None:
    """Let Alice write two paragraphs and end, and the others x for ever; the finisher writes what the model says."""
    text, ids = itertools.chain(ids_of(tiny, "So.", "\n\n", "And.", "\n\n", "Y", END)), ids_of(tiny, "x")
    first = []

    def sample(logits, sampling, streams):
        first.append(streams[0])
        return torch.tensor([next(text) if stream is first[0] else ids[0] for stream in streams])

    monkeypatch.setattr(workers, "sample", sample)


def blocks_of_finishers(layout: str, names: list[str]) -> set[str]:
    if layout == "independent":
        return {f"answer by finisher of {name}" for name in names}
    return {"answer by finisher"}


def record(folder: Path, path: Path, *options: object) -> tuple[int, dict]:
    arguments = ["Put it in \\boxed{}.", "--model", folder, "--device", "cpu", "--record", path, *options]
    code, _, _ = said(generate.main, *arguments)
    return code, json.loads(path.read_text("utf-8"))


def again(folder: Path, path: Path, *options: object) -> tuple[int, str, str]:
    out = path.with_suffix(".safetensors")
    return said(replay.main, path, "--model", folder, "--device", "cpu", "--out", out, *options)


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize("count", [1, 3])
def test_a_run_is_recorded_as_it_ran_and_replayed_bit_for_bit(tmp_path, folder, ran, script, layout, count):
    path = tmp_path / "run.json"
    code, recorded = record(folder, path, "--layout", layout, "--workers", count, "--max-steps", 20)
    assert code == 0
    assert recorded["version"] == 1
    events = [{key: value for key, value in event.items() if key != "sampled"} for event in recorded["events"]]
    assert events == ran
    steps = [event for event in recorded["events"] if event["do"] == "step"]
    moves = [event for event in recorded["events"] if event["do"] == "move"]
    assert len(moves) == {"combined": 2, "interleaved": 3}.get(layout, 0)
    assert set().union(*(view for event in steps for view in event["views"])) <= set(recorded["blocks"])
    assert {view[-1] for event in steps for view in event["views"]} == (
        WRITTEN[layout] | {block_of(name) for name in NAMES[:count]} | blocks_of_finishers(layout, NAMES[:count])
    )
    assert any("finisher" in view[-1] for view in steps[-1]["views"])

    # What was sampled is what its block is fed next
    for event, following in itertools.pairwise(steps):
        fed = {view[-1]: ids for view, ids in zip(following["views"], following["tokens"])}
        for view, token in zip(event["views"], event["sampled"]):
            if token is not None and view[-1] in fed and view[-1] in [v[-1] for v in event["views"]]:
                assert fed[view[-1]] == [token]
    assert any(token is not None for event in steps for token in event["sampled"])
    assert any(token is None for token in steps[0]["sampled"])

    code, out, err = again(folder, path)
    assert (code, out) == (0, "")
    assert f"{len(steps)} recorded digests: all as recorded" in err
    assert len(load_file(tmp_path / "run.safetensors")) == len(steps)


def test_a_recorded_run_goes_through_the_oracle_which_has_digests_of_its_own(tmp_path, folder, script):
    path = tmp_path / "run.json"
    record(folder, path, "--max-steps", 12)
    again(folder, path)
    ours = load_file(tmp_path / "run.safetensors")
    code, _, err = again(folder, path, "--oracle")  # float64 too, but not bit for bit
    assert code == 0
    assert "digest" not in err
    theirs = load_file(tmp_path / "run.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(relative_difference(ours[name], theirs[name]) <= torch.finfo(torch.float32).eps for name in ours)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_with_rounded_weights_is_replayed_bit_for_bit_and_agrees_with_the_oracle(tmp_path, bits):
    path, ours, theirs = (tmp_path / name for name in ("run.json", "run.safetensors", "theirs.safetensors"))
    with patch("sys.stdin", None):
        code, _, _ = said(generate.main, "--quantize", bits, "--record", path, "--max-steps", 40)
    assert code == 0
    code, _, err = again(generate.DUET, path, "--quantize", bits)
    assert code == 0
    assert "recorded digests: all as recorded, bit for bit" in err
    code, _, err = said(replay.main, path, "--model", generate.DUET, "--out", theirs, "--oracle", "--quantize", bits)
    assert code == 0
    code, out, _ = said(compare.main, path, ours, theirs, "--tolerance", 0.05)
    assert code == 0, out
    code, _, _ = again(generate.DUET, path)  # with other weights there are other logits
    assert code == 1


@pytest.mark.parametrize("options", [[], ["--workers", 1], ["--layout", "interleaved", "--workers", 3]], ids=str)
def test_duet_is_replayed_bit_for_bit(tmp_path, options):
    path = tmp_path / "run.json"
    with patch("sys.stdin", None):  # its own problem
        code, _, _ = said(generate.main, *options, "--record", path, "--max-steps", 40, "--temperature", 1)
    assert code == 0
    steps = [event for event in json.loads(path.read_text())["events"] if event["do"] == "step"]
    assert len(steps) > 40
    assert all(event["digest"].startswith("bfloat16:") for event in steps)
    code, _, err = again(generate.DUET, path)
    assert code == 0
    assert f"{len(steps)} recorded digests: all as recorded, bit for bit" in err


@pytest.mark.parametrize("what", ["digest", "token"])
def test_what_was_changed_in_a_recording_is_found(tmp_path, folder, script, what):
    path = tmp_path / "run.json"
    _, recorded = record(folder, path, "--max-steps", 12)
    events = recorded["events"]
    changed = [index for index, event in enumerate(events) if event["do"] == "step"][6]
    if what == "token":
        events[changed]["tokens"][0][0] ^= 1
    else:
        for event in (events[changed], events[-1]):  # the first of them is told
            event["digest"] = event["digest"][:-1] + ("1" if event["digest"].endswith("0") else "0")
    path.write_text(json.dumps(recorded))
    code, _, err = again(folder, path)
    assert code == 1
    assert f"event {changed} is the first to differ" in err
    assert (tmp_path / "run.safetensors").exists()  # these are the logits; what they should have been is unknown
    assert again(folder, path, "--events", f":{changed}")[0] == 0
    code, _, err = again(folder, path, "--dtype", "float32")  # another dtype has other bits
    assert code == 0
    assert "digest" not in err


@pytest.mark.parametrize("at", [1, 2, 9])
def test_an_interrupted_run_leaves_the_recording_of_what_ran(tmp_path, folder, script, monkeypatch, at):
    path, calls, step_of_the_model = tmp_path / "run.json", itertools.count(1), workers.step

    def interrupted(*arguments):
        if next(calls) == at:
            raise KeyboardInterrupt
        return step_of_the_model(*arguments)

    monkeypatch.setattr(workers, "step", interrupted)
    code, recorded = record(folder, path, "--max-steps", 20)
    assert code == 130
    assert sum(event["do"] == "step" for event in recorded["events"]) == at - 1
    code, _, err = again(folder, path)
    assert code == 0
    assert at == 1 or f"{at - 1} recorded digests: all as recorded" in err
    assert sorted(os.listdir(tmp_path)) == ["run.json", "run.safetensors"]


def test_a_recording_that_cannot_be_written_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", None)
    code, out, err = said(generate.main, "hi", "--record", tmp_path / "none" / "run.json")
    assert (code, out) == (2, "")
    assert "--record" in err
    assert len(err.splitlines()) == 1


def test_digests_tell_bits_apart():
    logits = torch.randn(2, V, dtype=torch.float32)
    assert digest(logits) == digest(logits.clone()) == digest(logits.T.contiguous().T)
    assert digest(logits).startswith("float32:")
    assert digest(logits.nextafter(logits + 1)) != digest(logits)
    assert digest(logits.bfloat16()).startswith("bfloat16:")
    assert digest(logits.flip(0)) != digest(logits)


# ---- any bytes at all


@st.composite
def broken_schedules(draw) -> bytes:
    blocks, events = draw(schedules(max_events=3))
    value = json.loads(json.dumps({"version": 1, "blocks": blocks, "events": events}))
    for _ in range(draw(st.integers(0, 3))):
        if value:
            mutate(draw, value, ["digest", "sampled", "do", "views", "x"])
    return mutated_bytes(draw, to_json(draw, value))


@settings(max_examples=1200, suppress_health_check=list(HealthCheck))
@given(data=broken_schedules(), oracle=st.booleans())
def test_any_mutation_of_a_schedule_is_replayed_or_refused_in_one_line(data, oracle):
    with tempfile.TemporaryDirectory() as name, limited(len(data)):
        code, out, err = replayed(Path(name), data, *["--oracle"] * oracle, of=QUICK)
        files = sorted(os.listdir(name))
        if code < 2:
            load((Path(name) / "logits.safetensors").read_bytes())
    assert code in (0, 1, 2)
    assert out == ""
    if code == 2:
        assert_one_line(err, "replay", "schedule.json")
        assert files == ["schedule.json"]
    else:
        assert len(err.splitlines()) <= 2
        assert files == ["logits.safetensors", "schedule.json"]
    CODES.append(code)


QUICK = model(shape=config("default", heads=1, kv_heads=1, head_dim=2, layers=1))
CODES = []


def test_the_mutations_were_of_all_kinds():
    if CODES:  # the test above ran in this process
        assert len(CODES) >= 1200
        assert CODES.count(0) > 150
        assert CODES.count(2) > 500
