"""Valid files made invalid: random changes of JSON and of bytes; and limits that no reader may exceed."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

SECONDS = 60  # far more than any of them takes
PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 to it forgets the peak of memory

deep = st.integers(2, 2000).map(lambda depth: f"deep {'[' * depth + ']' * depth}")  # see `to_json`
NUMBERS = [2**31, 2**63, 2**64, 10**400, -1, 0, 1, 3, 0.5, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "step",
    "move",
    "block 0",
    "\ud800",
    "\x1b[2J\n",
    "[" * 50,
    "float64:0",
    "yarn",
    "../x",
    "x.safetensors",
    "I64",
]
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(0, 20), st.text(max_size=2), st.lists(st.integers(0, 9), max_size=2)), max_size=3),
    st.dictionaries(st.sampled_from(["do", "views", "content", "shape", ""]), st.integers(), max_size=2),
    deep,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of a JSON value but the whole."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in parts for place in ((*path, key), *places(part, (*path, key)))]


def mutate(draw, value: dict, names: list[str]) -> None:
    """Change one part of a JSON value; keys that change get one of `names`."""
    *path, key = draw(st.sampled_from(places(value)))
    for step_down in path:
        value = value[step_down]
    change = draw(st.sampled_from(["replace", "replace", "delete", "nest", "twice", "name", "swap"]))
    if change == "replace":
        value[key] = draw(junk)
    elif change == "delete":
        del value[key]
    elif change == "nest":
        value[key] = [value[key]]
    elif change == "twice" and isinstance(value, list):
        value.insert(key, value[key])
    elif change == "swap" and isinstance(value, list):
        value[key], value[0] = value[0], value[key]
    elif isinstance(value, dict):
        value[draw(st.sampled_from(names))] = value.pop(key)


def to_json(draw, value: object) -> bytes:
    """As a file holds it. What Python's own writer gives up on is put in here: JSON that is nested very deeply."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return text.replace('"deep ', "").replace(']"', "]").encode("utf-8", "surrogatepass")


def mutated_bytes(draw, data: bytes) -> bytes:
    """Cut, or one place replaced by a few other bytes; more often neither."""
    change = draw(st.sampled_from(["no", "no", "no", "end", "start", "byte"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if change == "byte":
        return data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[at + 1 :]
    return {"end": data[:at], "start": data[at:]}.get(change, data)


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Fail where the body takes more than SECONDS, or more memory than twice `nbytes` and 64 MB."""

    def too_long(*_):
        raise AssertionError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    if PEAK.exists():
        PEAK.write_text("5")
    held = peak()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = peak() - held
    assert grown <= 2 * nbytes + 64e6, f"{grown / 1e6:.0f} MB for {nbytes} bytes"


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    if PEAK.exists():  # the same number, after a reset too
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
