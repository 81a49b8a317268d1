"""A model without a tokenizer, and the commands replay and compare in this process: what their tests share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from util import config, random_weights

from minihogwild import Config, Model, compare, replay


def model(dtype: torch.dtype = torch.float64, shape: Config | None = None, **options) -> Model:
    shape = shape or config("yarn")
    weights = random_weights(shape, dtype, **options)
    return Model("tiny", Path(), shape, weights, tokenizer=None, sampling=None, eos=frozenset())


def said(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code
    return code, out.buffer.getvalue().decode(), err.getvalue()


def replayed(folder: Path, schedule: dict | bytes, *options: object, of: Model) -> tuple[int, str, str]:
    """`said` by replay, for a schedule that is put to `folder`; the logits go to logits.safetensors there."""
    path = folder / "schedule.json"
    path.write_bytes(schedule if isinstance(schedule, bytes) else json.dumps(schedule).encode())
    with patch.object(replay, "load", lambda *_: of):
        return said(replay.main, path, "--model", "tiny", "--out", folder / "logits.safetensors", *options)


def compared(*arguments: object) -> tuple[int, str, str]:
    return said(compare.main, *arguments)


def assert_one_line(err: str, program: str, *culprits: str) -> None:
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"minihogwild.{program}: ")
    assert len(err) < 1200
    for culprit in culprits:
        assert culprit in err
