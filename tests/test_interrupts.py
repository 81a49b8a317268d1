"""Ctrl-C, a closed terminal, a polite kill: the run ends at a step's end, and everything that was computed is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import answer_all_signals, start

from minihogwild.interrupts import SIGNALS, Interrupts

GENERATE = ("minihogwild.generate", "--device", "cpu")


def sampled_in(record: Path) -> int:
    steps = [event for event in json.loads(record.read_text())["events"] if event["do"] == "step"]
    return sum(token is not None for step in steps for token in step["sampled"])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_and_result_and_record_tell_of_the_same_tokens(tmp_path, number):
    files = tmp_path / "result.json", tmp_path / "record.json"
    with start(*GENERATE, "--pace", 30, "--json", files[0], "--record", files[1]) as running:
        assert running.stdout.readline()  # the problem: the run is about to begin
        while "Alice:" not in running.stdout.readline():
            pass
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert "stopped by interrupt" in err
    result = json.loads(files[0].read_text())
    assert result["stopped_by"] == "interrupt"
    assert 0 < result["tokens"] < 422
    assert result["tokens"] == sampled_in(files[1])


def test_a_second_signal_loses_nothing_either(tmp_path):
    files = tmp_path / "result.json", tmp_path / "record.json"
    with start(*GENERATE, "--pace", 30, "--json", files[0], "--record", files[1]) as running:
        while "Alice:" not in running.stdout.readline():
            pass
        for _ in range(3):
            running.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, err = running.communicate(timeout=60)
    assert running.returncode in (130, -signal.SIGINT)  # the last one may come when all is done
    assert "Traceback" not in err
    assert json.loads(files[0].read_text())["tokens"] == sampled_in(files[1])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_when_all_is_done_a_signal_leaves_no_traceback(number):
    """Python still cleans up then, and what it calls can't know of KeyboardInterrupt."""
    program = f"""
import atexit, os, signal, sys
from minihogwild.commands import Parser, run_command
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: os.kill(os.getpid(), {int(number)}))
sys.argv = ["test"]
run_command(lambda options: 0, Parser("test"), None)
"""
    python = [sys.executable, "-c", program]
    done = subprocess.run(python, capture_output=True, text=True, preexec_fn=answer_all_signals)
    assert done.returncode == -number
    assert done.stderr == ""


STARTED_BY_MODULE = [["-m", f"minihogwild.{name}"] for name in ("generate", "evaluate", "replay", "compare")]
PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
MODULE, FUNCTION = re.search(r'^minihogwild = "(.+):(.+)"$', PYPROJECT, re.MULTILINE).groups()
STARTED_BY_SCRIPT = ["-c", f"import sys; from {MODULE} import {FUNCTION}; sys.exit({FUNCTION}())"]


@pytest.mark.parametrize("started", [*STARTED_BY_MODULE, STARTED_BY_SCRIPT], ids=lambda started: started[1])
def test_in_the_first_moments_there_is_no_traceback(tmp_path, started):
    """PyTorch is being imported."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    package = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    python = [sys.executable, *started]
    done = subprocess.run(python, env=environment, capture_output=True, text=True, preexec_fn=answer_all_signals)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_the_first_signal_asks_and_the_second_cuts_off_unless_all_is_being_kept():
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(lambda: asked.append(True)) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signals.keep_all()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wait_ends_when_a_signal_comes():
    with Interrupts(lambda: None) as signals:
        signal.raise_signal(signal.SIGTERM)
        began = time.monotonic()
        signals.sleep(30)
        assert time.monotonic() - began < 10


def test_what_is_ignored_stays_ignored():
    """As `nohup` asks for it, or a shell for what runs in the background."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts(lambda: pytest.fail("asked to end")):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
