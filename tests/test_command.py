"""The command: what it prints and writes, and one line with exit code 2 for what cannot be done."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import Said, said
from mutations import limited
from refusals import assert_one_line
from tiny import END, ids_of, save_model

from minihogwild import Model, generate, load, workers
from minihogwild import model as transformer
from minihogwild.generate import main
from minihogwild.prompts import Prompts

SAYS = {"together": "{names}: {problem}\n", "header_others": "[o]", "header_own": "[m]", "cue": " \\boxed{"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_model(tmp_path_factory.mktemp("model"))
    (path / "prompts.json").write_text(json.dumps(SAYS))  # short, and without an answer in a box
    return path


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder, device="cpu")


@pytest.fixture
def command(folder) -> Callable[..., Said]:
    """The command, run in this process, on a tiny model and the CPU."""

    def run(*arguments: object, stdin: bytes = b"") -> Said:
        given = list(arguments)
        if "--model" not in given:
            given += ["--model", folder]
        if "--device" not in given:
            given += ["--device", "cpu"]
        return said(main, *given, stdin=stdin)

    return run


@pytest.fixture
def script(model, monkeypatch) -> Callable[..., None]:
    """Make worker w write the w-th text, then x for ever."""

    def write(*texts: list[str]) -> None:
        scripts = iter([ids_of(model, *text) for text in texts])
        late = itertools.repeat(ids_of(model, "x")[0])
        writing = {}  # by a worker's own stream of random numbers

        def sample(logits, sampling, streams):
            for stream in streams:  # at first all workers, in their order; then, where there is one, a finisher
                if id(stream) not in writing:
                    script = next(scripts, None)
                    if script is None:
                        return sampled(logits, sampling, streams)
                    writing[id(stream)] = stream, itertools.chain(script, late)
            return torch.tensor([next(writing[id(stream)][1]) for stream in streams])

        sampled = workers.sample
        monkeypatch.setattr(workers, "sample", sample)

    return write


@pytest.fixture
def fail_at_step(monkeypatch) -> Callable[[int, BaseException], None]:
    """Let the n-th forward pass raise."""

    def patch(n: int, error: BaseException) -> None:
        forward, calls = transformer.forward, itertools.count(1)

        def failing(*arguments):
            if next(calls) == n:
                raise error
            return forward(*arguments)

        monkeypatch.setattr(transformer, "forward", failing)

    return patch


def assert_last_line(err: str, *culprits: str) -> None:
    """Figures of what was computed may come first."""
    assert_one_line(err.splitlines()[-1] + "\n", "minihogwild", *culprits)
    assert "Traceback" not in err


# ---- what it prints


def test_one_worker_prints_its_text_as_it_is(command, script):
    script(["é is\n  5.\n\nSo 😀", END])
    code, out, err = command("How?", "--workers", 1)
    assert code == 0
    assert out == "é is\n  5.\n\nSo 😀\n"
    assert "retired" in err


def test_several_workers_print_line_by_line_with_their_names(command, script):
    script(["A 日.", "\n\n", "B", END], ["one\ntwo", END])
    code, out, err = command("How?")
    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("Alice")] == ["Alice: A 日.", "Alice: B"]
    assert [line for line in lines if line.startswith("Bob")] == ["Bob: one", "Bob: two"]
    assert len([line for line in lines if line.strip()]) == 4
    assert lines.index("Bob: one") < lines.index("Alice: A 日.") < lines.index("Bob: two") < lines.index("Alice: B")
    sampled = {"Alice": len("A ") + len("日".encode()) + len(".") + 1 + len("B") + 1, "Bob": len("one\ntwo") + 1}
    for words in (f"{sum(sampled.values())} tokens", *(f"{name} {n}" for name, n in sampled.items()), "retired"):
        assert words in err
    assert re.search(r"\d+ forward steps", err)
    assert re.search(r"[\d.]+ tokens/s", err)
    assert re.search(r"[\d.]+ ms per step", err)


def test_the_answer_comes_last(command, script):
    script(["so \\boxed{\\frac{1}{2}}"], ["b" * 30])
    code, out, err = command("How?")
    assert code == 0
    assert out.splitlines()[-1] == "Answer: \\frac{1}{2}"
    assert "Alice: so \\boxed{\\frac{1}{2}}" in out.splitlines()
    assert "stopped by answer" in err


@pytest.mark.parametrize("workers", [1, 2])
def test_the_finisher_is_shown(command, script, workers):
    script(*[[], []][:workers])
    code, out, err = command("Put it in \\boxed{}.", "--workers", workers, "--max-steps", 3)
    assert code == 0
    cue = SAYS["cue"]
    if workers == 1:  # its text goes on
        assert out.startswith("xxx" + cue)
    else:
        assert out.startswith("Alice: xxx\nBob: xxx\nfinisher: " + cue.strip())
    assert re.search(r"\b3 forward steps", err)
    assert "finisher" in err


def test_a_finisher_of_several_lines_speaks_after_the_workers(command, script, tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps({**SAYS, "cue": "So:\n\\boxed{"}))
    script([], [])
    _, out, _ = command("Put it in \\boxed{}.", "--max-steps", 3, "--prompts", words)
    assert out.startswith("Alice: xxx\nBob: xxx\nfinisher: So:\nfinisher: \\boxed{")


@pytest.mark.parametrize("workers", [1, 2])
def test_piped_output_has_no_control_codes(command, script, workers):
    script(*[["some words.", "\n\n", "more \\boxed{1}"]] * workers)
    code, out, err = command("How?", "--workers", workers)
    assert code == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_terminal_does_not_obey_what_a_model_writes(command, script, workers):
    script(*[["\x1b[2Jgone\x07", "\n\n", END]] * workers)
    code, out, err = command("How?", "--workers", workers)
    assert code == 0
    assert "[2Jgone" in out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err)


def test_a_models_own_problem_where_nothing_is_asked(folder, command, tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps({**SAYS, "problem": "What now?\nAnd then?"}))
    path = tmp_path / "result.json"
    for stdin, shown in ((b"", True), (b" \n", True), (b"Who?", False)):
        options = ["--prompts", words, "--max-steps", 2, "--json", path]
        code, out, _ = command(*options, stdin=stdin)
        assert code == 0
        assert out.startswith("What now?\nAnd then?\n\n") == shown
        asked = "What now?\nAnd then?" if shown else "Who?"
        assert json.loads(path.read_text())["prompt_tokens"] == len(f"Alice, Bob: {asked}\n")
    assert command("Who?", *options)[1].startswith("Alice")


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", "\ufeff{}", "\ufeff{}\n\n"], ids=ascii)
def test_what_editors_and_shells_put_around_a_text_is_no_part_of_it(command, tmp_path, around):
    def prompt_tokens(argument: str, stdin: str | None) -> int:
        path = tmp_path / "o.json"
        stdin = b"" if stdin is None else stdin.encode()
        assert command(argument, "--max-steps", 1, "--json", path, stdin=stdin)[0] == 0
        return json.loads(path.read_text())["prompt_tokens"]

    alone = prompt_tokens("Two\nlines?", None)
    assert prompt_tokens("-", around.format("Two\nlines?")) == alone
    assert prompt_tokens("-", around.format("Two\r\nlines?")) == alone
    assert prompt_tokens("-", around.format(" Two\nlines?")) == alone + 1  # spaces are text


@pytest.mark.parametrize("source", ["prompt", "role", "header", "opening"])
def test_a_text_that_no_context_holds_is_refused_before_it_becomes_tokens(command, tmp_path, source):
    """Fifty million characters: a tokenizer would take gigabytes for them."""
    words = tmp_path / "words.json"
    long = "a" * 50_000_000
    fields = {"role": {"roles": [long]}, "header": {"header_own": long}, "opening": {"opening": long}}.get(source, {})
    words.write_text(json.dumps({"together": "{problem}"} | fields))
    prompt = b"a" * 50_000_000 if source == "prompt" else b"hi"
    with limited(10 * len(prompt) + 200_000_000):
        code, out, err = command("-", "--prompts", words, stdin=prompt)
    assert (code, out) == (2, "")
    assert "a text of 50,000,000 characters is too long for a context of 4096" in err


def test_a_prompt_from_everywhere(command, tmp_path):
    results = {}
    words = "How much is 2 + 3, in 日本語?"
    for name, argument, stdin in (
        ("argument", [words], b"not this"),
        ("standard input", [], words.encode()),
        ("dash", ["-"], words.encode()),
    ):
        path = tmp_path / name
        code, out, err = command(*argument, "--max-steps", 5, "--json", path, stdin=stdin)
        assert code == 0, err
        results[name] = out, [worker["token_ids"] for worker in json.loads(path.read_text("utf-8"))["workers"]]
    assert results["argument"] == results["standard input"] == results["dash"]
    other = command("How much is 2 + 3, in English?", "--max-steps", 5)[1]
    assert other != results["argument"][0]


def test_a_standard_input_that_does_not_block_is_read_to_its_end(monkeypatch):
    """As some programs leave it to those that they start."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write_slowly() -> None:
        with open(writing, "wb", buffering=0) as file:
            for part in (b"one ", b"two"):
                time.sleep(0.2)
                file.write(part)

    with open(reading) as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        threading.Thread(target=write_slowly).start()
        assert generate.read_standard_input(wait_for_typing=True) == "one two"


def test_a_model_without_a_chat_template_is_told_in_one_line(folder, tmp_path):
    """As a process writes it; one that has a template is not told of."""
    options = [sys.executable, "-m", "minihogwild.generate", "hi", "--max-steps", "1", "--device", "cpu", "--model"]
    told = f"minihogwild: {folder}: no chat template: the prompt is given as it is\n"
    done = subprocess.run([*options, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(told)
    with_template = shutil.copytree(folder, tmp_path / "model")
    (with_template / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for model in (with_template, generate.DUET):
        done = subprocess.run([*options, str(model)], capture_output=True, text=True)
        assert done.returncode == 0
        assert "template" not in done.stderr


def test_a_standard_input_that_never_ends(command):
    options = [sys.executable, "-m", "minihogwild.generate", "--max-steps", "1", "--device", "cpu"]
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run(options, stdin=endless, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert_one_line(done.stderr, "minihogwild", "standard input: it holds more than")


def test_memory_that_python_lacks_is_told(monkeypatch, capsys):
    """Its own MemoryError has no message."""

    def read(*_):
        raise MemoryError

    monkeypatch.setattr(generate, "read_prompt", read)
    assert main(["hi", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "minihogwild: out of memory\n"


@pytest.mark.parametrize("option", ["prompts", "model", "json"])
def test_a_value_that_is_far_too_long_does_not_crowd_out_what_is_wrong_with_it(command, option):
    code, _, err = command("hi", f"--{option}", "y" * 6000, "--max-steps", 1)
    reasons = {"prompts": "name too long", "model": "neither a folder nor", "json": "no file can be written"}
    assert code == 2
    assert_one_line(err, "minihogwild", "yyy", reasons[option])


def test_help(command):
    code, out, _ = command("--help")
    assert code == 0
    for option in (
        "--model", "--workers", "--layout", "--max-steps", "--temperature", "--top-k", "--top-p", "--min-p", "--seed",
        "--prompts", "--dtype", "--quantize", "--device", "--json", "--plan",
    ):  # fmt: skip
        assert option in out


# ---- options arrive


def test_options_arrive(command, tmp_path):
    path = tmp_path / "result.json"
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"names": ["Uno", "Due", "Tre"], "together": "{problem}"}))
    options = (
        "--workers 3 --layout contiguous --max-steps 4 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.01 --seed 5"
    )
    code, _, err = command("How?", *options.split(), "--prompts", words, "--dtype", "float32", "--json", path)
    assert code == 0, err
    result = json.loads(path.read_text("utf-8"))
    assert [worker["name"] for worker in result["workers"]] == ["Uno", "Due", "Tre"]
    assert (result["layout"], result["forward_steps"], result["seed"]) == ("contiguous", 4, 5)
    assert result["sampling"] == {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.01}
    assert result["prompt_tokens"] == len("How?")


def test_the_models_sampling_holds_where_no_option_says_otherwise(command, tmp_path):
    folder = save_model(tmp_path)
    given = {"do_sample": True, "temperature": 0.25, "top_k": 9, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(given))
    path = tmp_path / "result.json"
    assert command("How?", "--model", folder, "--max-steps", 1, "--top-k", 4, "--json", path)[0] == 0
    assert json.loads(path.read_text())["sampling"] == {"temperature": 0.25, "top_k": 4, "top_p": 0.5, "min_p": 0.0}


@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved", "independent"])
def test_same_seed_same_text(command, layout):
    def text(seed: int) -> str:
        code, out, _ = command("How?", "--layout", layout, "--temperature", 1, "--max-steps", 10, "--seed", seed)
        assert code == 0
        return out

    assert text(1) == text(1)
    assert text(1) != text(2)


# ---- the result as JSON


def test_json_has_the_result(command, script, tmp_path):
    path = tmp_path / "result.json"
    script(["é.", "\n\n", "so \\boxed{5}"], ["one", END])
    code, _, _ = command("How?", "--json", path)
    assert code == 0
    text = path.read_text("utf-8")
    assert "é" in text  # readable, not escaped
    result = json.loads(text)
    assert result.keys() >= {
        "forward_steps", "finisher_steps", "tokens", "seconds", "ms_per_step", "answer", "stopped_by", "workers",
    }  # fmt: skip
    assert (result["answer"], result["stopped_by"], result["finisher_steps"]) == ("5", "answer", 0)
    assert result["seconds"] > 0
    assert result["ms_per_step"] == pytest.approx(1000 * result["seconds"] / result["forward_steps"])
    alice, bob = result["workers"]
    assert alice["paragraphs"] == ["é.\n\n", "so \\boxed{5}"]
    assert alice["text"] == "**Alice [1]:**é.\n\n**Alice [2]:**so \\boxed{5}"
    assert (bob["paragraphs"], bob["text"]) == (["one"], "**Bob [1]:**one")
    assert (alice["tokens"], bob["tokens"]) == (len("é.".encode()) + 1 + len("so \\boxed{5}"), len("one") + 1)
    assert result["tokens"] == alice["tokens"] + bob["tokens"]
    assert all(isinstance(i, int) for i in alice["token_ids"])
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_takes_the_place_of_an_older_file(command, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old " * 10_000)
    monkeypatch.chdir(tmp_path)
    assert command("How?", "--max-steps", 2, "--json", "result.json")[0] == 0
    assert json.loads(path.read_text("utf-8"))["forward_steps"] == 2


def test_the_older_file_stays_where_nothing_was_computed(command, tmp_path, fail_at_step):
    path = tmp_path / "result.json"
    path.write_text("old")
    fail_at_step(1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    code, _, err = command("How?", "--json", path)
    assert code == 2
    assert_one_line(err, "minihogwild", "out of memory", "2.00 GiB")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("forward_steps", [0, 1, 5])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("CUDA error: lost")],
    ids=["memory", "device"],
)
def test_a_run_that_fails_late_writes_what_there_is(command, script, tmp_path, fail_at_step, error, forward_steps):
    script(["abcdefghijkl"], ["abcdefghijkl"])
    fail_at_step(2 + forward_steps + 1, error)  # prompt and headers come first
    options = [[f"--{what}", tmp_path / what] for what in ("json", "record", "trace")]
    code, out, err = command("How?", *itertools.chain(*options))
    assert code == 2
    assert_last_line(err, "memory" if isinstance(error, torch.OutOfMemoryError) else "CUDA error: lost")
    result = json.loads((tmp_path / "json").read_text())
    assert result["stopped_by"].startswith("error: ")
    assert result["forward_steps"] == forward_steps
    written = "abcdefghijkl"[:forward_steps]
    assert [worker["tokens"] for worker in result["workers"]] == [len(written)] * 2
    assert out.splitlines() == [f"{name}: {written}" for name in ("Alice", "Bob") if written]
    schedule = json.loads((tmp_path / "record").read_text())
    assert len(schedule["events"]) == 2 + forward_steps  # as many as the result tells of
    assert all("digest" in event for event in schedule["events"])
    assert (tmp_path / "trace").read_bytes().startswith(b"<!")


@pytest.mark.parametrize("broken", ["json", "record", "trace"])
def test_a_file_that_cannot_be_written_does_not_cost_the_others(command, tmp_path, monkeypatch, broken):
    """Its folder goes away during the run."""
    folders = {what: tmp_path / what for what in ("json", "record", "trace")}
    for folder in folders.values():
        folder.mkdir()
    digests = []

    def digest_and_remove(logits):
        if not digests:
            shutil.rmtree(folders[broken])
        digests.append("float64:0")
        return digests[-1]

    monkeypatch.setattr(generate, "digest", digest_and_remove)
    options = [[f"--{what}", folder / "file"] for what, folder in folders.items()]
    code, _, err = command("How?", "--max-steps", 3, *itertools.chain(*options))
    assert code == 2
    assert_last_line(err, broken)
    assert "3 forward steps" in err
    for what, folder in folders.items():
        assert (what == broken) != (folder / "file").exists()


@pytest.mark.parametrize("option", ["--json", "--record"])
def test_a_full_disk_leaves_the_older_file(command, tmp_path, option):
    path = tmp_path / "result.json"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))  # bytes of a file
    try:
        code, _, err = command("How?", "--max-steps", 30, option, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert err.splitlines()[-1].startswith("minihogwild: ")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]  # nothing half-written either


def test_a_pipe_is_written_to_and_stays_one(command, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        code, _, err = command("How?", "--max-steps", 1, "--json", path)
        assert code == 0, err
        assert json.loads(os.read(reader, 2**20))["forward_steps"] == 1
        assert stat.S_ISFIFO(path.lstat().st_mode)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    "where", ["/dev/stdout | cat", "/dev/stdout > out.txt; cat out.txt", ">(cat; sleep 0.1) | cat"]
)
def test_a_result_for_the_next_program(folder, tmp_path, where):
    """A pipe of the shell's, also by its number; standard output, also where that is a file."""
    line = f"{sys.executable} -m minihogwild.generate How? --model {folder} --max-steps 20 --device cpu --json {where}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"forward_steps": 20' in done.stdout
    assert done.stdout.startswith("Alice")  # its text comes first, and is still there


def test_a_file_of_the_users_beside_is_left_alone(command, tmp_path):
    path, beside = tmp_path / "o.json", tmp_path / "o.json.part"
    beside.write_text("mine")
    path.write_text("older")
    path.chmod(0o640)
    assert command("How?", "--max-steps", 1, "--json", path)[0] == 0
    assert beside.read_text() == "mine"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # who may read it, still may
    mask = os.umask(0o027)
    try:
        command("How?", "--max-steps", 1, "--json", tmp_path / "new.json")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["new.json", "o.json", "o.json.part"]


@pytest.mark.parametrize("length", [250, 251, 255, 256])
def test_long_names(command, tmp_path, length):
    """As long as a name may be; a longer one is refused before the run."""
    path = tmp_path / ("n" * length)
    code, out, err = command("How?", "--max-steps", 1, "--json", path)
    if length <= 255:
        assert code == 0
        assert path.exists()
    else:
        assert (code, out) == (2, "")
        assert "no file can be written there" in err
        assert "forward steps" not in err


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="this system has no /proc")
@pytest.mark.parametrize("path", ["/proc/x", "/proc/self/fd/x.json"])
def test_a_folder_that_takes_no_files_is_told_before_the_run(command, path):
    """Root is told that it may write there; whether a file can be made is known only when one is."""
    code, out, err = command("How?", "--max-steps", 1, "--json", path)
    assert (code, out) == (2, "")
    assert_one_line(err, "minihogwild", f"--json {path}: no file can be written there")


def test_a_template_in_a_folder_of_its_own_is_no_place_for_results(command, folder):
    template = folder / "additional_chat_templates" / "default.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages[0].content }}")
    code, _, err = command("How?", "--max-steps", 1, "--json", template)
    assert code == 2
    assert_one_line(err, "minihogwild", f"--json {template}", "already")
    assert template.read_text() == "{{ messages[0].content }}"


# ---- what cannot be done


TMP = "{tmp}"  # in arguments: an empty folder


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["hi", "--model", "/no/such/folder"], ["/no/such/folder"]),
        (["hi", "--model", "./neither"], ["./neither"]),
        (["hi", "--model", TMP], ["config.json"]),
        (["hi", "--workers", "0"], ["workers", "0", "16"]),
        (["hi", "--workers", "17"], ["workers", "17", "16"]),
        (["hi", "--workers", "-2"], ["workers", "-2"]),
        (["hi", "--workers", "two"], ["--workers", "two"]),
        (["hi", "--workers", "1.5"], ["--workers", "1.5"]),
        (["hi", "--workers"], ["--workers"]),
        (["hi", "--layout", "sideways"], ["--layout", "sideways", "combined"]),
        (["hi", "--max-steps", "0"], ["max_steps", "0"]),
        (["hi", "--max-steps", "many"], ["--max-steps", "many"]),
        (["hi", "--temperature", "-1"], ["temperature", "-1"]),
        (["hi", "--temperature", "nan"], ["temperature", "nan"]),
        (["hi", "--temperature", "inf"], ["temperature", "inf"]),
        (["hi", "--temperature", "warm"], ["--temperature", "warm"]),
        (["hi", "--top-k", "-1"], ["top_k", "-1"]),
        (["hi", "--top-k", "2.5"], ["--top-k", "2.5"]),
        (["hi", "--top-p", "0"], ["top_p", "0"]),
        (["hi", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["hi", "--min-p", "-0.5"], ["min_p", "-0.5"]),
        (["hi", "--min-p", "2"], ["min_p", "2"]),
        (["hi", "--seed", "-1"], ["seed", "-1"]),
        (["hi", "--seed", "12345678901234567890"], ["seed", "12345678901234567890"]),
        (["hi", "--seed", "x"], ["--seed", "x"]),
        (["hi", "--dtype", "int8"], ["--dtype", "int8"]),
        (["hi", "--device", "abacus"], ["--device", "abacus"]),
        (["hi", "--device", "cuda"], ["cuda"]),
        (["hi", "--colour", "red"], ["--colour"]),
        (["hi", "--col\nour"], ["--col"]),
        (["hi", "there"], ["there"]),
        (["hi", "the\nre"], ["the"]),
        ([""], ["prompt is empty"]),
        ([" \n "], ["prompt is empty"]),
        ([], ["prompt is empty"]),  # nothing on standard input
        (["-"], ["prompt is empty"]),
        (["h\udcffi"], ["UTF-8"]),  # how Python passes on an argument of other bytes
        (["h" * 5000], ["4096"]),
        (["hi", "--prompts", TMP + "/none.json"], ["none.json"]),
        (["hi", "--prompts", TMP], ["{tmp}"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("with_json", [False, True], ids=["", "json"])
def test_bad_input_gives_one_line(command, tmp_path, monkeypatch, arguments, culprits, with_json):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [argument.replace(TMP, str(empty)) for argument in arguments]
    code, out, err = command(*arguments, *(["--json", tmp_path / "result.json"] if with_json else []))
    assert (code, out) == (2, "")
    assert_one_line(err, "minihogwild", *(culprit.replace(TMP, str(empty)) for culprit in culprits))
    assert os.listdir(tmp_path) == ["empty"]
    assert os.listdir(empty) == []


def test_a_name_that_the_hub_does_not_give_makes_one_line(command, monkeypatch):
    def refuse(*_, **__):
        raise OSError("404: no nobody/nothing\nMore about this at ...")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name: [])
    code, out, err = command("hi", "--model", "nobody/nothing")
    assert (code, out) == (2, "")
    assert_one_line(err, "minihogwild", "nobody/nothing")


def test_no_prompt_on_a_terminal_gives_one_line(folder, capsys, monkeypatch):
    for stdin in (None, type("Terminal", (), {"isatty": lambda self: True})()):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["--model", str(folder)]) == 2
        assert_one_line(capsys.readouterr().err, "minihogwild", "prompt is empty", "standard input")


def test_bytes_that_are_no_text_on_standard_input_give_one_line(command):
    for argument in ([], ["-"]):
        code, out, err = command(*argument, stdin=b"What is \xff\xfe?")
        assert (code, out) == (2, "")
        assert_one_line(err, "minihogwild", "UTF-8")


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b"", "words.json"),
        (b"{", "words.json"),
        (b"[1]", "words.json"),
        (b'"\xff"', "words.json"),
        (b'{"colour": "red"}', "colour"),
        (b'{"check": 3}', "check"),
        (b'{"names": ["A", "A"]}', "names"),
        (b'{"names": ["A"]}', "workers"),  # of two
        (b'{"prefix": "\\ud800"}', "UTF-8: '\\ud800'"),  # half a character
        (b'{"names": ["\\ud800", "B"]}', "names"),
        (b'{"col\\nour": "red"}', "col"),
    ],
)
def test_a_broken_prompts_file_gives_one_line(command, tmp_path, content, culprit):
    path = tmp_path / "words.json"
    path.write_bytes(content)
    code, out, err = command("hi", "--prompts", path, "--max-steps", 2)
    assert (code, out) == (2, "")
    assert_one_line(err, "minihogwild", culprit)


def test_a_json_file_that_cannot_be_written_is_told_before_the_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", None)  # not even loaded
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "none" / "result.json", tmp_path / "file" / "result.json"):
        code, out, err = command("hi", "--json", path)
        assert (code, out) == (2, "")
        assert_one_line(err, "minihogwild", "--json", str(path))
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_no_file_is_written_over_another_of_the_same_command(command, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", None)
    words = tmp_path / "words.json"
    words.write_text("{}")
    (tmp_path / "link.json").symlink_to(words)
    for options in (
        ["--json", words, "--prompts", words],
        ["--record", tmp_path / "link.json", "--prompts", words],
        ["--json", tmp_path / "new.json", "--record", tmp_path / "x" / ".." / "new.json"],
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        code, out, err = command("hi", *options)
        assert (code, out) == (2, "")
        assert_one_line(err, "minihogwild", options[0], "already")
    assert words.read_text() == "{}"


# ---- what ends a run early


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_prints_what_there_is(command, script, fail_at_step, tmp_path, workers):
    path = tmp_path / "result.json"
    script(*[["abcdefghijkl"]] * workers)
    prefill = 1 if workers == 1 else 2
    fail_at_step(prefill + 6, KeyboardInterrupt())
    code, out, err = command("How?", "--workers", workers, "--json", path)
    assert code == 130
    written = "abcde"
    if workers == 1:
        assert out == written + "\n"
    else:
        assert out.splitlines() == [f"Alice: {written}", f"Bob: {written}"]
    assert "5 forward steps" in err
    assert "Traceback" not in err
    result = json.loads(path.read_text("utf-8"))
    assert result["forward_steps"] == 5
    assert result["stopped_by"] not in ("answer", "retired", "steps", "context")
    assert [worker["paragraphs"] for worker in result["workers"]] == [[written]] * workers


def test_an_interrupt_before_the_first_step(command, fail_at_step, monkeypatch):
    fail_at_step(1, KeyboardInterrupt())
    code, out, err = command("How?")
    assert (code, out.strip()) == (130, "")
    assert "Traceback" not in err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load", interrupted)
    assert command("How?")[:2] == (130, "")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB."
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 12 bytes."
        ),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_gives_one_line(command, script, fail_at_step, error, step, workers):
    script(*[["abcdefghijkl"]] * workers)
    fail_at_step(step, error)
    code, _, err = command("How?", "--workers", workers)
    assert code == 2
    assert_last_line(err, "out of memory", "step")
    assert re.search(r"[\d.]+ ?[kMGi]*B\b", err.splitlines()[-1])  # how much, and for what
    assert len(err.splitlines()) == (1 if step == 1 else 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_one_line(command, model, monkeypatch, tmp_path, value):
    """In the third step and of the second worker; what was written until then has been shown."""
    forward, calls = transformer.forward, itertools.count(1)

    def overflowing(*arguments):
        logits = forward(*arguments)
        logits[:, ids_of(model, "a")] = 1e4
        if len(logits) == 2 and next(calls) == 4:  # the headers come first
            logits[1, 5] = value
        return logits

    monkeypatch.setattr(transformer, "forward", overflowing)
    code, out, err = command("How?", "--workers", 2, "--temperature", 1, "--json", tmp_path / "result.json")
    assert code == 2
    assert_last_line(err, "step 3", "Bob", "NaN or infinite")
    assert out == "Alice: aa\nBob: aa\n"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["stopped_by"].startswith("error: step 3: Bob's logits")
    assert [worker["tokens"] for worker in result["workers"]] == [2, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_finishers_logits_that_are_no_numbers_give_one_line(command, monkeypatch, workers):
    forward, calls = transformer.forward, itertools.count(1)
    finishing = (1 if workers == 1 else 2) + 2 + 2  # prompt and headers; two steps; the finisher's second

    def overflowing(*arguments):
        logits = forward(*arguments)
        return logits * math.nan if next(calls) == finishing else logits

    monkeypatch.setattr(transformer, "forward", overflowing)
    code, _, err = command("Put it in \\boxed{}.", "--workers", workers, "--max-steps", 2)
    assert code == 2
    assert_last_line(err, "finisher", "NaN or infinite")


def test_other_errors_are_not_hidden(folder, fail_at_step):
    fail_at_step(3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["How?", "--model", str(folder), "--device", "cpu"])


def test_output_that_cannot_show_every_character_is_no_failure(folder, script, monkeypatch, capsys):
    script(["日 é \ufffd a.", END], ["ü b", END])
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["How?", "--model", str(folder), "--device", "cpu"]) == 0
    assert b" a." in shown.buffer.getvalue()


@pytest.mark.parametrize("temperature", [1e-40, 1e30])
def test_extreme_temperatures_are_no_failure(command, temperature):
    code, _, err = command("How?", "--temperature", temperature, "--max-steps", 5)
    assert code == 0
    assert "Traceback" not in err


# ---- whose pace


@pytest.mark.parametrize(
    ("asked", "words", "is_drawn", "pace"),
    [
        (None, 0, False, 0),
        (None, 0, True, 0),  # a terminal alone slows nothing
        (None, 15, False, 0),
        (None, 15, True, 15),  # who watches a model that was made to be watched
        (3, 15, True, 3),
        (3, 0, False, 3),
        (0, 15, True, 0),
    ],
)
def test_only_who_watches_a_model_that_asks_for_it_is_slowed_by_default(asked, words, is_drawn, pace):
    options = generate.arguments().parse_args([] if asked is None else ["--pace", str(asked)])
    assert generate.pace_of(options, Prompts(pace=words), is_drawn) == pace


def test_a_paced_run_says_so_and_tells_the_whole_time(command):
    code, out, err = command("How?", "--max-steps", 5, "--pace", 50)
    assert code == 0
    found = re.search(r"; paced at 50 steps a second: ([\d.]+) s in all$", err.rstrip())
    assert found
    assert float(found[1]) >= 0.1  # four times a fiftieth, and more
    assert "paced" not in command("How?", "--max-steps", 5)[2]
    assert command("How?", "--max-steps", 5)[1] == out


# ---- the folder


def test_a_model_in_the_home_folder_brings_its_own_problem(folder, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = shutil.copytree(folder, tmp_path / "mine")
    (own / "prompts.json").write_text(json.dumps({**SAYS, "problem": "What now?"}))
    for name in ("~/mine", own):
        code, out, err = command("--model", name, "--max-steps", 2)
        assert code == 0, err
        assert out.startswith("What now?\n\n")
    weights = own / "model.safetensors"
    code, _, err = command("--model", "~/mine", "--json", weights)  # not over the model's own
    assert code == 2
    assert_one_line(err, "minihogwild", "--json", "already")


def test_a_hub_repository_brings_its_own_problem(folder, command, tmp_path, monkeypatch):
    own = shutil.copytree(folder, tmp_path / "snapshot")
    (own / "prompts.json").write_text(json.dumps({**SAYS, "problem": "What now?"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(own))
    monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name: [])
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--model", "somebody/something", "--max-steps", 2, "--json", tmp_path / "result.json")
    assert code == 0, err
    assert out.startswith("What now?\n\n")
    assert json.loads((tmp_path / "result.json").read_text())["model"] == "somebody/something"


def test_workers_may_be_called_like_blocks(command, script, tmp_path):
    names = ["common", "header others", "finisher"]
    (tmp_path / "words.json").write_text(json.dumps({**SAYS, "names": names}))
    script(["a"], ["b"], ["c"])
    options = ["--workers", 3, "--max-steps", 2, "--prompts", tmp_path / "words.json"]
    code, out, err = command("Put it in \\boxed{}.", *options)
    assert code == 0, err
    assert out.splitlines()[:3] == ["common: ax", "header others: bx", "finisher: cx"]


# ---- as a process


MODULE = [sys.executable, "-m", "minihogwild.generate"]


MODULE_AT_ONCE = [sys.executable, "-Bmminihogwild.generate"]


@pytest.mark.parametrize("path_ends", ["", os.pathsep])  # an empty entry is the current folder
@pytest.mark.parametrize("start", [MODULE, MODULE_AT_ONCE], ids=["apart", "at once"])
def test_nothing_of_a_model_folder_is_imported_where_that_is_the_current_one(tmp_path, start, path_ends):
    """`python -m` looks there first: a folder from a stranger could bring a psutil of its own."""
    model = Path(shutil.copytree(generate.DUET, tmp_path / "model"))
    package = generate.DUET.parent
    for name in ("psutil", "torch", "json", "numpy", "tokenizers", "safetensors", "argparse", "signal", "threading"):
        (model / f"{name}.py").write_text("raise SystemExit('a stranger runs')\n")
    environment = os.environ | {"PYTHONPATH": f"{package.parent}{path_ends}"}
    options = ["--model", ".", "--max-steps", "2", "--plain"]
    done = subprocess.run([*start, *options], cwd=model, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a stranger runs" not in done.stderr


def test_the_current_folder_may_be_gone(tmp_path):
    """As far as it is ours: some builds of PyTorch cannot be imported there, and say so."""
    environment = os.environ | {"PYTHONPATH": str(generate.DUET.parent.parent)}
    start = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m minihogwild.config"
    done = subprocess.run(["bash", "-c", start], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


OPTIONS_WITH_A_VALUE = ["workers", "temperature", "seed", "max-steps", "top-k", "dtype", "pace", "context", "quantize"]


def test_what_looks_like_an_option_may_be_the_prompt(folder):
    assert main(["--model", str(folder), "--max-steps", "1", "--device", "cpu", "--", "--x=--"]) == 0


@pytest.mark.parametrize("option", [*OPTIONS_WITH_A_VALUE, "layout", "json", "record", "model", "prompts"])
def test_two_dashes_are_no_value(option, capsys):
    assert main([f"--{option}=--"]) == 2
    assert_one_line(capsys.readouterr().err, "minihogwild", f"--{option}")


def script_path() -> str:
    path = shutil.which("minihogwild", path=sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])
    assert path, "the command minihogwild is not installed"
    return path


def process(command: list, stdin: bytes = b"") -> tuple[int, str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_module_and_the_command_say_the_same(folder, tmp_path):
    path = tmp_path / "result.json"
    options = ["--model", folder, "--device", "cpu", "--temperature", "1", "--max-steps", "20", "--seed", "3"]
    code, out, err = process([*MODULE, *options], stdin="2 + 日?".encode())
    assert code == 0
    assert "20 forward steps" in err
    assert "Warning" not in err
    assert len(out) > 10
    assert process([script_path(), "2 + 日?", *options, "--json", path])[:2] == (0, out)
    assert json.loads(path.read_text("utf-8"))["forward_steps"] == 20


def test_bad_input_to_a_process_gives_one_line(folder):
    code, out, err = process([script_path(), b"h\xffi", "--model", folder])
    assert (code, out) == (2, "")
    assert_one_line(err, "minihogwild", "UTF-8")


@pytest.mark.parametrize("closed", [">&- <&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_standard_streams_are_no_failure_of_ours(folder, tmp_path, closed):
    path = tmp_path / "result.json"
    options = f"--model {folder} --device cpu --max-steps 2 --json {path}"
    code, _, err = process(["bash", "-c", f"{script_path()} hi {options} {closed}"])
    assert "Traceback" not in err
    assert code == 0
    assert json.loads(path.read_text("utf-8"))["forward_steps"] == 2


def test_without_standard_error_what_belongs_there_is_not_among_the_results(folder):
    assert process(["bash", "-c", f"{script_path()} hi --model {folder} --workers 99 2>&-"])[:2] == (2, "")


def test_a_program_without_standard_error_can_load(folder, monkeypatch):
    """As one without a console has none on Windows."""
    monkeypatch.setattr(sys, "stderr", None)
    assert load(folder, device="cpu").folder == folder


def test_a_small_model_takes_one_thread(command, folder):
    """Else two programs on two cores, each with two threads, slow each other down fifty times."""
    torch.set_num_threads(2)
    try:
        assert command("hi", "--max-steps", 2)[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_nothing_is_printed_of_a_default_prompt_before_all_is_well(command):
    assert command("--model", generate.DUET, "--seed", -1)[:2] == (2, "")


def test_standard_output_may_be_a_notebooks(folder, monkeypatch):
    """Some other object with a `write`, and little more."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["hi", "--model", str(folder), "--device", "cpu", "--max-steps", "2"]) == 0


def test_a_reader_that_goes_away_is_no_failure_of_ours(folder):
    options = ["--model", folder, "--device", "cpu", "--workers", "1", "--max-steps", "3000", "--temperature", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([*MODULE, "hi", *options], stdout=pipe, stderr=pipe, env=environment) as running:
        assert running.stdout.read(1)
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(300) != 0
