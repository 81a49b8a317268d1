"""Several ranks share a model: the same logits, the same text, and one line where one of them fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from hub_files import MOE, TINY, make_folder, make_tensors
from hypothesis import given
from hypothesis import strategies as st
from packed_files import FORMATS, pack
from ranks import Started
from refusals import refused
from safetensors.torch import load_file, save_file
from util import config, configs

from minihogwild.commands import DUET
from minihogwild.gpu.several import share_of
from minihogwild.hub.quantized import Awq

SECONDS = 120
TOLERANCE = {"torch.float64": 1e-9, "torch.float32": 2e-4}


def share(rank: int, count: int, shape, format=None, quantize=None):
    return share_of(SimpleNamespace(rank=rank, count=count), shape, format, quantize)


# ---- which part each rank has


@given(configs(), st.integers(2, 6))
def test_ranks_have_all_of_a_model_and_nothing_twice_but_heads_of_keys(shape, count):
    shape = replace(shape, moe_intermediate_size=28)
    G = shape.num_attention_heads // shape.num_key_value_heads
    most_sharing = -(-count // shape.num_key_value_heads)
    if most_sharing > G:  # of five key/value heads and six ranks, two ranks must have one, and each a part of its G
        for rank in range(count):  # and all of them must know it
            with refused(f"{shape.num_key_value_heads} for keys and values", f"{count} ranks"):
                share(rank, count, shape)
        return
    shares = [share(rank, count, shape) for rank in range(count)]
    for field in ("heads", "inner", "inner_of_expert"):
        spans = [getattr(one, field) for one in shares]
        if spans[0].total == 0:  # no layer is of that kind
            continue
        assert spans[0].start == 0
        assert spans[-1].stop == spans[-1].total
        assert all(a.stop == b.start for a, b in pairwise(spans))
        assert all(len(span) > 0 for span in spans)
    assert [span.stop for span in shares[0].rows_of_head][-1] == shape.vocab_size
    for one in shares:
        # Query head h reads key/value head h // G, in the whole model and on each rank
        per_head = one.config.num_attention_heads // one.config.num_key_value_heads
        assert one.config.num_attention_heads % one.config.num_key_value_heads == 0
        for number, h in enumerate(range(one.heads.start, one.heads.stop)):
            assert one.kv_heads.start + number // per_head == h // G


def test_heads_of_keys_are_repeated_where_there_are_fewer_than_ranks():
    shape = config(heads=10, kv_heads=2)
    heads = [(one.heads.start, one.heads.stop, one.kv_heads.start) for one in (share(r, 4, shape) for r in range(4))]
    assert heads == [(0, 2, 0), (2, 5, 0), (5, 7, 1), (7, 10, 1)]


def test_groups_of_four_bits_stay_whole():
    shape = replace(config(heads=8, kv_heads=4, head_dim=32), intermediate_size=5 * 128)
    for r in range(2):
        one = share(r, 2, shape, Awq(128))
        assert one.inner.start % 128 == one.inner.stop % 128 == 0
        assert one.heads.start * 32 % 128 == one.heads.stop * 32 % 128 == 0
    with refused("8 heads, and 4 for keys and values, with 4-bit groups of 4 heads", "3 ranks"):
        share(0, 3, shape, Awq(128))
    with refused("intermediate_size 640, in wholes of 128", "6 ranks", "at most 5"):
        share(0, 6, replace(shape, num_attention_heads=48, num_key_value_heads=24), Awq(128))


@pytest.mark.parametrize(
    ("numbers", "culprit"),
    [
        ({"intermediate_size": 2}, "intermediate_size 2 cannot be shared by 3 ranks: start at most 2"),
        ({"vocab_size": 2}, "vocab_size 2 cannot be shared by 3 ranks"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "a model of 2 heads"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_its_numbers(numbers, culprit):
    with refused(culprit):
        share(0, 3, replace(config(), **numbers))


# ---- logits


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("examples", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_random_models_have_the_logits_of_one_process(tmp_path, count, examples):
    started = Started(count, tmp_path, ranks.compare_models, tmp_path, examples)
    assert started.wait() == [0] * count, started.all_said()
    for rank in range(count):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for dtype, differences in found.items():
            assert differences
            assert max(differences) <= TOLERANCE[dtype], f"rank {rank}"


WIDE = TINY | {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
WIDE_MOE = MOE | WIDE | {"model_type": "qwen3_moe", "moe_intermediate_size": 96}
PHI3 = WIDE | {"model_type": "phi3"}


def plain_folders(path: Path) -> dict[str, tuple[Path, int | None]]:
    """Families, and what a family's layers have besides; as they are, and rounded."""
    found = {}
    kinds = {
        "llama": (WIDE, {}),
        "tied": (WIDE | {"tie_word_embeddings": True}, {}),
        "qwen2": (WIDE | {"model_type": "qwen2"}, {"biases": True}),
        "qwen3": (WIDE | {"model_type": "qwen3"}, {"qk_norms": True}),
        "phi3": (PHI3, {}),
        "qwen3_moe": (WIDE_MOE, {"qk_norms": True}),
    }
    for name, (shape, extras) in kinds.items():
        folder = make_folder(path / name, shape, scaled(make_tensors(shape, **extras)), shards=2)
        for quantize in (None, 8, 4):
            found[f"{name}, {quantize}"] = folder, quantize
    return found


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """So that numbers keep their size from layer to layer: else rounding alone were more than the tolerance."""
    return {name: t / t.shape[-1] ** 0.5 if t.dim() == 2 and "embed" not in name else t for name, t in tensors.items()}


def packed_folders(path: Path) -> dict[str, tuple[Path, int | None]]:
    found = {}
    for kind in FORMATS:
        for name, shape, group in (
            ("dense", WIDE, 32),
            ("fused", PHI3, 64),
            ("experts", WIDE_MOE, 32),
            ("rows", WIDE, -1),
        ):
            if name == "rows" and kind == "awq":
                continue  # groups alone
            made = pack(shape, kind, group, keep=("mlp.gate.",) if name == "dense" else ("lm_head", "mlp.gate."))
            folder = make_folder(path / f"{kind} {name}", made.config, made.tensors)
            found[f"{kind} {name}"] = folder, None
    made = pack(WIDE, "awq", 32, keep=("lm_head", "k_proj"))  # q in 4 bits and k as it is: a matrix of several kinds
    found["apart"] = make_folder(path / "apart", made.config, made.tensors), None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("folders", [plain_folders, packed_folders], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_models_from_files_have_the_logits_of_one_process_and_read_a_part(tmp_path, count, folders, dtype):
    compare_folders(tmp_path, count, folders(tmp_path), dtype)


def test_some_models_from_files_have_the_logits_of_one_process_and_read_a_part(tmp_path):
    made = plain_folders(tmp_path) | packed_folders(tmp_path)
    some = "llama, 8", "tied, 4", "qwen2, None", "phi3, None", "awq dense", "gptq fused", "symmetric experts", "apart"
    compare_folders(tmp_path, 2, {name: made[name] for name in some}, "float64")


def compare_folders(tmp_path: Path, count: int, made: dict[str, tuple[Path, int | None]], dtype: str) -> None:
    tokens = [7, 200, 3, 11, 90, 41]
    started = Started(count, tmp_path, ranks.compare_folders, tmp_path, made, dtype, tokens)
    assert started.wait() == [0] * count, started.all_said()
    for rank in range(count):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == made.keys()
        for name, of_model in found.items():
            assert of_model["difference"] <= TOLERANCE[f"torch.{dtype}"], name
            # Of the shares, of which some are larger than others, and of what all have: here the embedding
            assert of_model["read"] < 0.8, name
            assert of_model["kept"] < 0.85, name


# ---- commands: the same text, and the same files


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What duet writes in one process: its lines, its result and its record."""
    folder = tmp_path_factory.mktemp("alone")
    started = Started(1, folder, ranks.command, "generate", *outputs(folder), *SOME_STEPS)
    assert started.wait() == [0], started.err()
    return folder


SOME_STEPS = ["--max-steps", 60]


def outputs(folder: Path) -> list[object]:
    return ["--dtype", "float32", "--device", "cpu", "--json", folder / "result", "--record", folder / "record"]


def result_of(folder: Path) -> dict:
    """Without times."""
    times = ("seconds", "tokens_per_second", "ms_per_step")
    return {key: value for key, value in json.loads((folder / "result").read_text()).items() if key not in times}


def record_of(folder: Path) -> dict:
    """Without the hashes of logits, whose last bits depend on the order of a sum."""
    record = json.loads((folder / "record").read_text())
    for event in record["events"]:
        event.pop("digest", None)
    return record


SOME_RANKS = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", SOME_RANKS)
def test_the_text_of_duet_is_that_of_one_process(tmp_path, alone, count):
    started = Started(count, tmp_path, ranks.command, "generate", *outputs(tmp_path), *SOME_STEPS)
    assert started.wait() == [0] * count, started.all_said()
    assert started.out() == (alone / "0.out").read_text()
    for rank in range(1, count):
        assert started.out(rank) == started.err(rank) == ""
    assert result_of(tmp_path) == result_of(alone)
    assert record_of(tmp_path) == record_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_whole_text_of_duet_is_that_of_the_readme(tmp_path, count):
    started = Started(count, tmp_path, ranks.command, "generate", *outputs(tmp_path))
    assert started.wait() == [0] * count, started.all_said()
    assert "Alice: l = b + k = 255 + …………586: 5+6=11, 5+8+1=14, 2+5+1=8, so l = 841." in started.out()
    assert "235 forward steps, 422 tokens" in started.err()


def test_what_one_process_has_recorded_two_replay(tmp_path, alone):
    schedule = tmp_path / "schedule"
    recorded = record_of(alone)
    events = recorded["events"]
    assert "move" in [event["do"] for event in events]
    last_step = events[-1]
    events += [{"do": "drop", "block": last_step["views"][0][-1]}, last_step]
    schedule.write_text(json.dumps(recorded))
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        arguments = [schedule, "--model", DUET, "--dtype", "float64", "--device", "cpu", "--out", folder / "logits"]
        started = Started(count, folder, ranks.command, "replay", *arguments)
        assert started.wait() == [0] * count, started.all_said()
        found.append(load_file(folder / "logits"))
    one, two = found
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)  # the file is in float32


@pytest.mark.slow
def test_evaluate_gives_the_results_of_one_process_and_goes_on_where_it_was_stopped(tmp_path):
    problems = tmp_path / "problems.jsonl"
    lines = [{"problem": f"a = {n} + 1\nb = a + 2", "answers": [[f"b = {n + 3}"]]} for n in range(3)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        out = folder / "results"
        how = ["--budgets", "5,12", "--workers", "2", "--batch", "2", "--dtype", "float32", "--device", "cpu"]
        for kept in (None, 2):  # the second time, all but two lines are gone
            if kept is not None:
                out.write_text("".join(out.read_text().splitlines(keepends=True)[:kept]))
            started = Started(count, folder, ranks.command, "evaluate", problems, "--out", out, *how)
            assert started.wait() == [0] * count, started.all_said()
        written.append(out.read_text())
    assert written[0] == written[1]
    assert written[0].count("\n") == 4


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])  # it has three heads of keys
def test_the_text_of_smollm2_is_that_of_one_process(tmp_path, smollm2_folder, count):
    found = []
    for processes in (1, count):
        folder = tmp_path / str(processes)
        folder.mkdir()
        sampled = ["--temperature", 0.6, "--seed", 1, "--max-steps", 24, "--model", smollm2_folder]
        prompt = "Write two short poems: one about the sea, one about the mountains."
        started = Started(processes, folder, ranks.command, "generate", prompt, *sampled, *outputs(folder))
        assert started.wait() == [0] * processes, started.all_said()
        found.append((started.out(), result_of(folder), record_of(folder)))
    assert found[0] == found[1]


# ---- what goes wrong


def assert_one_line(started: Started, *culprits: str) -> None:
    """All ranks together have said one line that is no report of a run; it names these."""
    lines = [line for line in started.all_said().splitlines() if line and "forward steps" not in line]
    assert len(lines) == 1, started.all_said()
    assert lines[0].startswith("minihogwild: ")
    for culprit in culprits:
        assert culprit in lines[0]


def begin_run(folder: Path, count: int = 2, pace: float = 30) -> Started:
    """duet, slowly; from when it has written something."""
    started = Started(count, folder, ranks.command, "generate", "--pace", pace, *outputs(folder))
    limit = time.monotonic() + 60
    while "Alice:" not in (started.out() if (folder / "0.out").exists() else ""):
        assert time.monotonic() < limit, started.all_said()
        time.sleep(0.02)
    return started


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, "all"),  # as from a terminal
        pytest.param(signal.SIGTERM, "all", marks=pytest.mark.slow),  # as torchrun ends them
        pytest.param(signal.SIGINT, "rank 0", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_ranks_and_what_was_written_is_kept(tmp_path, number, to):
    started = begin_run(tmp_path)
    for process in started.processes if to == "all" else started.processes[:1]:
        os.kill(process.pid, number)
    assert started.wait(20) == [130, 0]
    assert "stopped by interrupt" in started.err()
    assert "Traceback" not in started.all_said()
    result = result_of(tmp_path)
    assert result["stopped_by"] == "interrupt"
    sampled = [token for event in record_of(tmp_path)["events"] for token in event.get("sampled", [])]
    assert result["tokens"] == sum(token is not None for token in sampled) > 0


@pytest.mark.parametrize("count", SOME_RANKS)
def test_a_rank_that_is_killed_ends_all_with_one_line_and_what_was_written_is_kept(tmp_path, count):
    started = begin_run(tmp_path, count)
    began = time.monotonic()
    os.kill(started.processes[-1].pid, signal.SIGKILL)
    assert started.wait(20)[0] == 2
    assert time.monotonic() - began < 15
    assert_one_line(started, f"rank {count - 1}", "killed")
    assert result_of(tmp_path)["stopped_by"].startswith(f"error: rank {count - 1}")


@pytest.mark.slow
def test_where_rank_0_is_killed_another_one_says_so_and_nothing_is_left(tmp_path):
    started = begin_run(tmp_path, 3)
    os.kill(started.processes[0].pid, signal.SIGKILL)
    assert started.wait(20) == [-signal.SIGKILL, 2, 2]
    assert_one_line(started, "rank 0", "killed")
    assert {path.suffix for path in tmp_path.iterdir()} == {".out", ".err"}


def test_a_disk_that_is_full_is_told_as_with_one_process(tmp_path):
    started = Started(2, tmp_path, without_room, *outputs(tmp_path), *SOME_STEPS)
    assert started.wait() == [2, 0]
    assert_one_line(started, "result", "File too large")
    assert {path.suffix for path in tmp_path.iterdir()} == {".out", ".err"}


def without_room(*arguments: object) -> None:
    """No file may be longer than 3 kB: a result is, and so is a record."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    ranks.command("generate", *arguments)


def copied_duet(folder: Path) -> Path:
    shutil.copytree(DUET, folder)
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param("config.json", marks=pytest.mark.slow),
        "model.safetensors",
        pytest.param("missing", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_see_different_files_load_none(tmp_path, changed):
    folders = copied_duet(tmp_path / "0" / "model"), copied_duet(tmp_path / "1" / "model")
    theirs = folders[1]
    if changed == "config.json":
        settings = json.loads((theirs / changed).read_text())
        (theirs / changed).write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    elif changed == "model.safetensors":
        tensors = {name: tensor + 1 for name, tensor in load_file(theirs / changed).items()}  # as large as before
        save_file(tensors, theirs / changed)
    else:
        (theirs / "config.json").unlink()
    started = Started(2, tmp_path, in_own_folder, tmp_path, "--model", "model", *outputs(tmp_path))
    assert started.wait() == [2, 0]
    assert_one_line(started, "rank 1", "config.json" if changed == "missing" else changed)
    assert not (tmp_path / "result").exists()


def in_own_folder(folder: Path, *arguments: object) -> None:
    os.chdir(folder / os.environ["RANK"])
    ranks.command("generate", *arguments)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--trace", "page.html"], "--trace"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_be_done_is_told_once(tmp_path, arguments, culprit):
    started = Started(2, tmp_path, ranks.command, "generate", *arguments)
    assert started.wait() == [2, 0]
    assert_one_line(started, culprit)


def test_help_is_given_once(tmp_path):
    started = Started(2, tmp_path, ranks.command, "generate", "--help")
    assert started.wait(20) == [0, 0]
    assert started.out().count("--max-steps") >= 1
    assert started.all_said() == started.out(1) == ""


@pytest.mark.slow
def test_more_ranks_than_a_model_can_be_shared_by(tmp_path):
    started = Started(5, tmp_path, ranks.command, "generate", *outputs(tmp_path))
    assert started.wait() == [2, *[0] * 4]
    assert_one_line(started, "5 ranks")


@pytest.mark.slow
def test_one_that_does_not_answer(tmp_path):
    """It is stopped, and so says nothing at all, not even that it is gone."""
    started = Started(2, tmp_path, impatient, *outputs(tmp_path), "--pace", 30)
    while "Alice:" not in (started.out() if (tmp_path / "0.out").exists() else ""):
        time.sleep(0.02)
    os.kill(started.processes[1].pid, signal.SIGSTOP)
    started.processes[0].join(30)
    assert started.processes[0].exitcode == 2
    os.kill(started.processes[1].pid, signal.SIGCONT)
    started.wait()
    assert_one_line(started, "rank 1 has not answered")


def impatient(*arguments: object) -> None:
    from minihogwild.gpu import several

    several.SECONDS_OF_SILENCE = 2
    several.SECONDS_TO_NOTICE = 1
    ranks.command("generate", *arguments)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The real one, which adds a report of its own where a rank fails, and an exit code of 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "minihogwild.generate"]
    arguments = [*torchrun, *map(str, outputs(tmp_path))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "Alice: l = b + k = 255" in done.stdout
    failed = subprocess.run([*torchrun, "--model", "/nowhere"], capture_output=True, text=True, timeout=SECONDS)
    assert failed.returncode == 1
    assert failed.stderr.count("minihogwild: /nowhere") == 1
    assert "exitcode  : 2" in failed.stderr
