"""The vectors are what the code gives today, the engine agrees with them, and their page is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minihogwild import load
from minihogwild.compare import main as compare
from minihogwild.replay import read_schedule, replay

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = sorted((path.parent.name, path.stem) for path in (VECTORS / "logits").glob("*/*.safetensors"))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


def test_they_are_small_and_all_there():
    models = {path.name for path in (VECTORS / "models").iterdir()}
    schedules = {path.stem for path in (VECTORS / "schedules").iterdir()}
    assert {*CASES} == {(m, s) for m in models for s in schedules if (m == "long") == (s == "long")}
    assert len(models) == 8
    assert len(schedules) == 9
    assert sum(path.stat().st_size for path in VECTORS.rglob("*") if path.is_file()) < 3e6


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_oracle_and_engine_agree_with_them(name, schedule):
    exact, single = (load(VECTORS / "models" / name, dtype, "cpu") for dtype in ("float64", "float32"))
    events = read_schedule(VECTORS / "schedules" / f"{schedule}.json", exact.config.vocab_size)
    stored = load_file(VECTORS / "logits" / name / f"{schedule}.safetensors")
    runs = replay(events, exact, oracle=True), replay(events, exact), replay(events, single)
    steps = 0
    for (index, oracle), (_, engine), (_, engine32) in zip(*runs, strict=True):
        steps += 1
        assert relative(stored[f"step_{index:04d}"].double(), oracle) <= 1e-6  # stored in float32
        assert relative(engine, oracle) <= 1e-9
        assert relative(engine32.double(), oracle) <= 2e-4
    assert steps == len(stored) > 3


def test_the_command_makes_them_again(tmp_path, monkeypatch):
    """All but the long one, which takes longest; its schedule and model are made again too."""
    monkeypatch.syspath_prepend(VECTORS)
    import make

    monkeypatch.setattr(make, "CONFIGS", {name: make.CONFIGS[name] for name in ("llama", "qwen2", "qwen3_moe")})
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path)])
    make.main()
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 9 + 3 * (3 + 8) + 1
    for path in made:
        kept = VECTORS / path.relative_to(tmp_path)
        if path.suffix == ".safetensors":
            ours, theirs = load_file(path), load_file(kept)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert torch.allclose(tensor, theirs[key], rtol=1e-6, atol=1e-6), (kept, key)
        else:
            assert path.read_bytes() == kept.read_bytes(), kept


def test_the_inside_hangs_together():
    """Its parts follow from one another by the formula, and it is the step that its page says."""
    with safe_open(VECTORS / "inside.safetensors", "pt") as file:
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    model = load(VECTORS / "models" / "llama", "float64", "cpu")
    events = read_schedule(VECTORS / "schedules" / "together.json", 64)["events"]
    event, H, K, D = events[int(x["event"])], 4, 2, 16
    blocks = list(dict.fromkeys(block for view in event["views"] for block in view))
    lengths = [len(x[f"keys.{block}"]) for block in blocks]
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    t = 0
    for view, ids in zip(event["views"], event["tokens"]):
        position = sum(lengths[blocks.index(block)] for block in view) - len(ids)
        for n in range(len(ids)):
            start = 0
            for block in blocks:
                b = blocks.index(block)
                seen = 0 if block not in view else lengths[b] - (len(ids) - 1 - n if block == view[-1] else 0)
                assert int(x["visible"][t, b]) == seen
                if not seen:
                    continue
                offset = sum(lengths[blocks.index(other)] for other in view[: view.index(block)])
                assert int(x["offset"][t, b]) == offset
                turn = torch.polar(torch.ones(D // 2, dtype=torch.float64), (position + n - offset) * frequencies)
                q = torch.complex(*x["q"][t].chunk(2, -1)) * turn
                q = torch.cat((q.real, q.imag), -1)
                assert torch.allclose(q, x["rotated_q"][t, b], atol=1e-9)
                keys = x[f"keys.{block}"].repeat_interleave(H // K, 1)
                start = sum(lengths[:b])
                scores = torch.einsum("hd,nhd->hn", q, keys)[:, :seen] / D**0.5
                assert torch.allclose(scores, x["scores"][t, :, start : start + seen], atol=1e-9)
            t += 1
    values = torch.cat([x[f"values.{block}"] for block in blocks]).repeat_interleave(H // K, 1)
    assert torch.allclose(x["weights"], x["scores"].softmax(-1), atol=1e-12)
    assert torch.allclose(x["output"], torch.einsum("thn,nhd->thd", x["weights"], values), atol=1e-9)
    assert len(event["views"]) > 1
    assert model.config.head_dim == D


def test_the_example_on_their_page(tmp_path, capsys):
    """Nothing of this package, and it agrees with ours."""
    (code,) = re.findall(r"```python\n(.*?)```", (VECTORS / "README.md").read_text(), re.DOTALL)
    assert "minihogwild" not in code
    (tmp_path / "example.py").write_text(code)
    for schedule in sorted({schedule for _, schedule in CASES} - {"long"}):
        path, ours = (
            VECTORS / "schedules" / f"{schedule}.json",
            VECTORS / "logits" / "llama" / f"{schedule}.safetensors",
        )
        theirs = tmp_path / "theirs.safetensors"
        command = [sys.executable, "example.py", str(VECTORS / "models" / "llama"), str(path), str(theirs)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
        assert compare([str(path), str(ours), str(theirs), "--tolerance", "1e-6"]) == 0, schedule
    capsys.readouterr()
