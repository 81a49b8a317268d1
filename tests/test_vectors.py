"""The vectors are what the code gives today, the engine agrees with them, and their page is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    assert len(models) == 14
    assert len(schedules) == 9
    assert sum(path.stat().st_size for path in VECTORS.rglob("*") if path.is_file()) < 3e6


# Of positions past 100,000: test_rope.py holds the angles there to exact ones in the fast tests
SLOW = [pytest.param(*case, marks=pytest.mark.slow) if "long" in case else case for case in CASES]


@pytest.mark.parametrize(("name", "schedule"), SLOW)
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
    """All models and schedules, and the logits of four models."""
    monkeypatch.syspath_prepend(VECTORS)
    import make

    replay_command, replayed = make.replay, ("llama", "qwen2", "qwen3_moe", "awq")

    def replay_some(arguments: list[str]) -> int:
        return replay_command(arguments) if Path(arguments[2]).parent.name in replayed else 0

    monkeypatch.setattr(make, "replay", replay_some)
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path)])
    make.main()
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 9 + 3 * 14 + len(replayed) * 8 + 1  # schedules, model folders, logits, the inside
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
    """Its parts follow from the weights and from one another, by the formula, written down anew."""
    x = load_file(VECTORS / "inside.safetensors")
    weights = {name: w.double() for name, w in load_file(VECTORS / "models" / "llama" / "model.safetensors").items()}
    events = read_schedule(VECTORS / "schedules" / "together.json", 64)["events"]
    event, H, K, D = events[int(x["event"])], 4, 2, 16
    blocks = list(dict.fromkeys(block for view in event["views"] for block in view))
    lengths = {block: len(x[f"keys.{block}"]) for block in blocks}
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)

    def turned(vectors: torch.Tensor, position: int) -> torch.Tensor:
        vectors = torch.complex(*vectors.chunk(2, -1)) * torch.exp(1j * position * frequencies)
        return torch.cat((vectors.real, vectors.imag), -1)

    hidden = weights["model.embed_tokens.weight"][[token for ids in event["tokens"] for token in ids]]
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * weights["model.layers.0.input_layernorm.weight"]
    for name in "qkv":
        expected = (hidden @ weights[f"model.layers.0.self_attn.{name}_proj.weight"].T).view(len(hidden), -1, D)
        assert torch.allclose(x[name], expected, atol=1e-9)
    t = 0
    for view, ids in zip(event["views"], event["tokens"]):
        for n in range(len(ids)):
            index = lengths[view[-1]] - len(ids) + n
            assert torch.allclose(x[f"keys.{view[-1]}"][index], turned(x["k"][t], index), atol=1e-9)
            assert torch.allclose(x[f"values.{view[-1]}"][index], x["v"][t], atol=1e-9)
            position, start = sum(lengths[block] for block in view[:-1]) + index, 0
            for b, block in enumerate(blocks):
                seen = (index + 1 if block == view[-1] else lengths[block]) if block in view else 0
                offset = sum(lengths[other] for other in view[: view.index(block)]) if seen else 0
                assert (int(x["visible"][t, b]), int(x["offset"][t, b])) == (seen, offset)
                q = turned(x["q"][t], position - offset)
                assert torch.allclose(q, x["rotated_q"][t, b], atol=1e-9)
                keys = x[f"keys.{block}"].repeat_interleave(H // K, 1)
                scores = torch.einsum("hd,nhd->hn", q, keys) / D**0.5
                scores[:, seen:] = -torch.inf
                assert torch.allclose(scores, x["scores"][t, :, start : start + lengths[block]], atol=1e-9)
                start += lengths[block]
            assert start == x["scores"].shape[-1]
            t += 1
    values = torch.cat([x[f"values.{block}"] for block in blocks]).repeat_interleave(H // K, 1)
    assert torch.allclose(x["weights"], x["scores"].softmax(-1), atol=1e-12)
    assert torch.allclose(x["output"], torch.einsum("thn,nhd->thd", x["weights"], values), atol=1e-9)
    assert len(event["views"]) > 1
    assert max(map(len, event["tokens"])) > 1


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
