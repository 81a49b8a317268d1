"""A model without a tokenizer, and the commands replay and compare in this process: what their tests share."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import torch
from in_process import Said, said
from util import config, random_weights

from minihogwild import Config, Model, compare, replay


def model(dtype: torch.dtype = torch.float64, shape: Config | None = None, **options) -> Model:
    shape = shape or config("yarn")
    weights = random_weights(shape, dtype, **options)
    return Model("tiny", Path(), shape, weights, tokenizer=None, sampling=None, eos=frozenset())


def replayed(folder: Path, schedule: dict | bytes, *options: object, of: Model) -> Said:
    """What replay says of a schedule that is put to `folder`; the logits go to logits.safetensors there."""
    path = folder / "schedule.json"
    path.write_bytes(schedule if isinstance(schedule, bytes) else json.dumps(schedule).encode())
    with patch.multiple(replay, fetch=lambda name, **_: Path(name), load=lambda *_, **__: of):
        return said(replay.main, path, "--model", "tiny", "--out", folder / "logits.safetensors", *options)


def compared(*arguments: object) -> Said:
    return said(compare.main, *arguments)


def assert_one_line(err: str, program: str, *culprits: str) -> None:
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"minihogwild.{program}: ")
    assert len(err) < 1200
    for culprit in culprits:
        assert culprit in err
