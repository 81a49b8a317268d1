"""Commands of the package as processes of their own, which answer signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from minihogwild.interrupts import SIGNALS


def answer_all_signals() -> None:
    """In a process that is about to begin: whatever `nohup`, or the tests' own shell, has switched off."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(module: str, *options: object) -> subprocess.Popen:
    """`python -m module options`, as a process that answers each signal."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        preexec_fn=answer_all_signals,
    )
