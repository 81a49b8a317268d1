"""Model folders come from strangers: whatever is in them, one line says what is wrong, within limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import packed_files
import pytest
import torch
from hub_files import MOE, TINY, make_folder, make_tensors, without, write_json
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from in_process import said
from mutations import limited, mutate, mutated_bytes, to_json
from refusals import assert_one_line
from safetensors.torch import save_file

from minihogwild import generate, load
from minihogwild.hub import chat_template

YARN = TINY | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = TINY | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128}, "tie_word_embeddings": True}
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [256, 258]}
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "prompts.json"]
FILES += ["model.safetensors.index.json"]
NAMES = [
    "vocab_size",
    "num_key_value_heads",
    "rope_theta",
    "factor",
    "content",
    "model",
    "names",
    "x",
    "dtype",
    "shape",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Sound ones: each of another family, the second in two shards."""
    made = []
    for config, shards in ((TINY, 1), (MOE, 2), (YARN, 2), (LLAMA3, 1)):
        folder = tmp_path_factory.mktemp("sound")
        make_folder(folder, config, make_tensors(config), shards, GENERATION)
        settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": CHAT}
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "prompts.json", {"names": ["A", "B"], "together": "{problem}", "boxed": False})
        made.append(folder)
    return made


def run(folder: Path) -> tuple[int, str]:
    """(exit code, standard error) of a short run."""
    code, _, err = said(generate.main, "hello", "--model", folder, "--max-steps", 2, "--device", "cpu")
    return code, err


def assert_run_or_refused(folder: Path) -> str:
    """Within limits, and leaving the folder as it was. Returns what was said where it was refused, else ""."""
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    before = sorted(os.listdir(folder))
    with limited(nbytes):
        code, err = run(folder)
    assert code in (0, 2)
    assert sorted(os.listdir(folder)) == before
    if code == 2:
        assert err.startswith("minihogwild: ")
        assert err.count("\n") == 1, err
        assert len(err) < 1200
    return err if code else ""


def test_sound_folders_run(folders):
    for folder in folders:
        assert run(folder)[0] == 0


# ---- any mutation


def outcomes_of(mutation: Callable, folders: list[Path], count: int) -> Counter:
    """Change a copy of a sound folder by `mutation(draw, folder)`, `count` times: how many then ran or were refused."""
    outcomes = Counter()

    @examples(count, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), sound=st.sampled_from(folders))
    def try_one(data, sound):
        with tempfile.TemporaryDirectory() as copy:
            folder = Path(shutil.copytree(sound, Path(copy) / "model"))
            mutation(data.draw, folder)
            said = assert_run_or_refused(folder)
        outcomes["refused" if said else "ran"] += 1

    try_one()
    return outcomes


def change_json(draw: Callable, folder: Path) -> None:
    """Of one file: one to three changes of its values, and perhaps one of its bytes."""
    path = folder / draw(st.sampled_from(["config.json", *FILES]))
    if not path.exists():
        path = folder / "config.json"
    value = json.loads(path.read_text())
    for _ in range(draw(st.integers(1, 3))):
        if value:
            mutate(draw, value, NAMES)
    path.write_bytes(mutated_bytes(draw, to_json(draw, value)))


def change_tensors(draw: Callable, folder: Path) -> None:
    """Of one safetensors file: its header, the header's length, or the numbers."""
    path = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    change = draw(st.sampled_from(["lies", "lies", "length", "header", "body"]))
    if change == "lies":  # about names, dtypes, shapes, places
        value = json.loads(header)
        mutate(draw, value, NAMES)
        header = to_json(draw, value)
        size = len(header)
    elif change == "length":
        size = draw(st.one_of(st.integers(0, 2 * len(content)), st.integers(0, 2**64 - 1)))
    elif change == "header":
        header = mutated_bytes(draw, header)
    else:
        body = mutated_bytes(draw, body)
    path.write_bytes(size.to_bytes(8, "little") + header + body)


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@few_or_many(60, 1200)
def test_any_mutation_of_a_json_file(folders, count):
    outcomes = outcomes_of(change_json, folders, count)
    assert outcomes["ran"] > count / 20  # else nothing was tried,
    assert outcomes["refused"] > count / 4  # or nothing was changed


@pytest.fixture(scope="module")
def packed_folders(tmp_path_factory) -> list[Path]:
    """One in each format of 4 bits, dense or with experts."""
    made = []
    for number, kind in enumerate(packed_files.FORMATS):
        shape = (MOE if number % 2 else TINY) | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        checkpoint = packed_files.pack(shape | {"moe_intermediate_size": 32}, kind, 32)
        folder = make_folder(tmp_path_factory.mktemp(kind), checkpoint.config, checkpoint.tensors)
        write_json(folder / "prompts.json", {"names": ["A", "B"], "together": "{problem}", "boxed": False})
        made.append(folder)
    return made


def test_sound_packed_folders_run(packed_folders):
    for folder in packed_folders:
        assert run(folder)[0] == 0


def change_quantization(draw: Callable, folder: Path) -> None:
    """Of config.json, what it says of the format: one to three changes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(draw(st.integers(1, 3))):
        mutate(draw, config["quantization_config"] or {"x": 0}, [*NAMES, "bits", "group_size", "weights", "version"])
    path.write_bytes(to_json(draw, config))


@few_or_many(40, 200)
def test_any_mutation_of_what_is_said_of_a_format(packed_folders, count):
    outcomes = outcomes_of(change_quantization, packed_folders, count)
    assert outcomes["ran"] > 0  # most of what can be said there is not supported
    assert outcomes["refused"] > count / 4


@few_or_many(40, 200)
def test_any_mutation_of_packed_bytes(packed_folders, count):
    outcomes = outcomes_of(change_tensors, packed_folders, count)
    assert outcomes["ran"] > count / 20
    assert outcomes["refused"] > count / 4


@few_or_many(40, 800)
def test_any_mutation_of_safetensors_bytes(folders, count):
    outcomes = outcomes_of(change_tensors, folders, count)
    assert outcomes["ran"] > count / 20
    assert outcomes["refused"] > count / 4


# ---- by hand: what random changes hardly hit

INTEGERS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
INTEGERS += ["num_key_value_heads", "max_position_embeddings", "num_experts", "num_experts_per_tok"]
INTEGERS += ["moe_intermediate_size", "decoder_sparse_step", "original_max_position_embeddings"]
FLOATS = [
    "rms_norm_eps",
    "rope_theta",
    "factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
]
OTHERS = ["tie_word_embeddings", "norm_topk_prob", "truncate", "model_type", "torch_dtype", "mlp_only_layers"]
OTHERS += ["layer_types", "rope_scaling", "quantization_config", "use_sliding_window"]
NO_NUMBER = [-1, float("nan"), float("inf"), -float("inf"), 10**400, "3", [3], {"a": 3}, True, 2**62]
ABSURD = {key: [*NO_NUMBER, 0, 3.0] for key in INTEGERS} | {key: NO_NUMBER for key in FLOATS}
ABSURD |= {key: [0, 1.5, float("nan")] for key in OTHERS}
LARGE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "model", MOE, make_tensors(MOE))


def with_value(config: dict, key: str, value: object) -> dict:
    if key not in [*FLOATS[2:], "original_max_position_embeddings", "truncate"]:
        return config | {key: value}
    return config | {"rope_scaling": {"type": "yarn", "factor": 2.0} | {key: value}}


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_value_is_named_with_its_key(folder, key):
    for value in ABSURD[key]:
        write_json(folder / "config.json", with_value(MOE, key, value))
        err = assert_run_or_refused(folder)
        assert f"config.json: {key} must be " in err or "config.json cannot be read: ValueError: Exceeds" in err, value


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "warm"), ("top_k", 2.5), ("top_p", [0.9]), ("do_sample", 1), ("eos_token_id", "x")],
)
def test_absurd_values_in_generation_config(folder, key, value):
    write_json(folder / "generation_config.json", {"do_sample": True, key: value})
    err = assert_run_or_refused(folder)
    assert f"generation_config.json: {key} " in err
    assert repr(value) in err


def test_more_heads_than_numbers_for_them(folder):
    write_json(folder / "config.json", without(TINY, "head_dim") | {"hidden_size": 3})
    assert "head_dim 0 " in assert_run_or_refused(folder)


@pytest.mark.parametrize("key", LARGE)
@pytest.mark.parametrize("others", [{}, dict.fromkeys(LARGE, 2**20)], ids=["alone", "with the others"])
def test_the_largest_values_are_held_against_the_tensors(folder, key, others):
    write_json(folder / "config.json", MOE | {"num_key_value_heads": 1} | others | {key: 2**20})
    err = assert_run_or_refused(folder)
    assert "lacks" in err or "has shape" in err, err


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_a_ramp_without_width_is_refused(folder, low):
    rope = LLAMA3["rope_parameters"] | {"low_freq_factor": low}
    write_json(folder / "config.json", TINY | {"rope_parameters": rope})
    assert f"low_freq_factor {low} is not below high_freq_factor 4.0" in assert_run_or_refused(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_no_weights_are_refused(folder, dtype):
    tensors = make_tensors(MOE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    err = assert_run_or_refused(folder)
    assert "model.safetensors" in err
    assert ": model.norm.weight is " in err


@pytest.mark.parametrize("kind", ["pipe", "endless"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_what_is_no_file_is_not_waited_for(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    code, err = run(folder)
    assert code == 2
    assert f"{name} cannot be read: it is not a file" in err
    assert err.count("\n") == 1


def test_a_terminal_does_not_obey_what_a_folder_writes(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # so the model's own problem is asked, and shown
    write_json(folder / "generation_config.json", {"a\x1b[31m\nb": 7})
    write_json(folder / "prompts.json", {"problem": "one\x1b[2Jtwo", "together": "{problem}", "boxed": False})
    code, out, _ = said(generate.main, "--model", folder, "--max-steps", 1, "--device", "cpu", "--workers", 1)
    assert code == 0
    assert out.startswith("one[2Jtwo\n")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no\x1b[2J') }}")
    assert "no[2J" in assert_run_or_refused(folder)


def test_an_unsupported_key_makes_one_line_of_a_warning(folder, caplog):
    write_json(folder / "generation_config.json", {"a\x1b[31m\nb": 7})
    load(folder, device="cpu")
    [line] = caplog.messages
    assert line.endswith(r"a\x1b[31m\nb")


def with_tokenizer(folder: Path, **parts: object) -> None:
    """Put these in the place of the same parts of tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", tokenizer | parts)


def run_apart(folder: Path, *options: str, program: str = "from minihogwild import command") -> tuple[int, str]:
    """The same as `run`, as a process of its own: with what libraries write past Python."""
    command = [sys.executable, "-c", f"import sys\n{program}\nsys.exit(command())"]
    options = ["--model", str(folder), "--max-steps", "2", "--device", "cpu", "--plain", *options]
    done = subprocess.run([*command, "hello " * 200, *options], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


PANICS = {
    "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": "(l|l|o)*(.|..)*(?!.|$)x"},  # the library gives up the search
        "behavior": "Isolated",
        "invert": False,
    },
}


@pytest.mark.parametrize("part", PANICS)
def test_a_panic_of_the_tokenizer_gives_one_line_of_ours(folder, part):
    with_tokenizer(folder, **{part: PANICS[part]})
    code, err = run_apart(folder)
    assert code == 2
    assert_one_line(err, "minihogwild", "the tokenizer fails: PanicException: ")


def test_a_search_that_takes_for_ever_is_not_waited_for(folder):
    """Each place of the text takes long, though not so long that the library would give up."""
    pattern = {"Regex": "(?:.|..){0,18}(?!\\s|\\S|$)(?=a)"}
    with_tokenizer(folder, pre_tokenizer=PANICS["pre_tokenizer"] | {"pattern": pattern})
    program = "from minihogwild.hub import tokenizer\ntokenizer.SECONDS = 1\nfrom minihogwild import command"
    began = time.monotonic()
    code, err = run_apart(folder, program=program)
    assert time.monotonic() - began < 60
    assert code == 2
    assert_one_line(err, "minihogwild", "the tokenizer fails: it takes more than 1 seconds")


@pytest.mark.parametrize(
    "steps", [[{"type": "Prepend", "prepend": "a" * 10**6}], [{"type": "Prepend", "prepend": "a" * 9}] * 9]
)
def test_what_a_tokenizer_puts_before_a_text_counts_as_growth(folder, steps):
    with_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": steps})
    assert "its normalizer may make a text 1e+0" in assert_run_or_refused(folder)


def test_a_tokenizer_larger_than_the_embedding(folder):
    write_json(folder / "config.json", MOE | {"vocab_size": 255})
    err = assert_run_or_refused(folder)
    assert "tokenizer.json: 259 ids, more than config.json's vocab_size 255" in err


def test_ids_with_gaps(folder):
    """The library numbers added tokens by how many there are before them: those would have other ids than listed."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Zzz"] = 10**6
    write_json(folder / "tokenizer.json", tokenizer)
    assert "'<|endoftext|>' is listed as token 256, but would be 257: ids are missing" in assert_run_or_refused(folder)
    tokenizer["added_tokens"] = []
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {})
    assert "ids are missing below 1000001: 257 is one" in assert_run_or_refused(folder)


@pytest.mark.parametrize("template", ["", "{% if 0 %}x{% endif %}"])
def test_a_template_that_gives_nothing_is_not_blamed_on_the_prompt(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    err = assert_run_or_refused(folder)
    assert f"{folder}: its chat template, or its tokenizer, makes nothing of the prompt" in err


ATTACKS = {
    "loops for ever": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 seconds"),
    "one product that never ends": ("{{ 9 ** (9 ** (9 ** 9)) }}", "1 seconds"),
    "fills the memory": ("{{ 'x' * 10 ** 10 }}", "memory"),
    "fills it bit by bit": (
        "{% set n = namespace(s='x' * 9999) %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "",  # memory or time
    ),
    "is padded": ("{{ 'x' | center(10 ** 10) }}", "memory"),
    "a flood of text": ("{% for a in range(9999) %}{{ '<|im_start|>' * 99 }}{% endfor %}", "characters"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    "crowds the line with its own words": ("{{ raise_exception('no ' * 10 ** 6) }}", "no no no"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_attacks_is_ended(folder, monkeypatch, attack):
    template, culprit = ATTACKS[attack]
    if "seconds" in culprit:
        monkeypatch.setattr(chat_template, "SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    began = time.monotonic()
    err = assert_run_or_refused(folder)
    assert time.monotonic() - began < 20
    assert "the chat template fails: " in err
    assert culprit.lower() in err.lower()
