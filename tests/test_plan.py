"""--plan: from config.json alone, what a model takes, and where it fits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hub_files import MOE, TINY, make_folder, make_tensors, without, write_json
from in_process import said
from packed_files import pack

from minihogwild import generate, load
from minihogwild.hub.config_json import parse_config
from minihogwild.hub.quantized import Plain, Rounded
from minihogwild.plan import bytes_of_token, bytes_of_weights, packed_storage, plan, workers_on

QWQ = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
LAYER = 5120 * (5120 + 2 * 1024) + 5120 * 5120 + 3 * 5120 * 27648  # weights of its matrices
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "moe_intermediate_size": 32}


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of each row, by its first."""
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = cells
    return rows


def test_a_large_model(tmp_path):
    """By hand: 64 layers, an embedding and a head; 8 key/value heads of 128 in each layer, twice two bytes."""
    write_json(tmp_path / "config.json", QWQ)
    table = plan(str(tmp_path))
    assert f"{2 * 2 * 64 * 8 * 128:,} bytes" in table
    assert "up to 40,960 tokens" in table
    rows = rows_of(table)
    whole = 2 * (64 * LAYER + 2 * 5120 * 152064)
    assert rows["as they are, bfloat16"] == [f"{whole / 1e9:.1f} GB", "", "", "", "", "", "4"]
    scales = 2 * (64 * (7168 + 5120 + 2 * 27648 + 5120) + 152064)  # one for each row
    eight = 64 * LAYER + 3 * 5120 * 152064 + scales
    assert rows["`--quantize 8`"][0] == f"{eight / 1e9:.1f} GB"
    free = 48 * 2**30 - 2**30 - eight
    assert rows["`--quantize 8`"][5] == str(int(free / (262144 * 16384)))


def test_a_packed_model(tmp_path):
    """4 bits for each weight, and for 128 of them a scale of 2 bytes and a zero point of 1; the head as it is."""
    packed = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    write_json(tmp_path / "config.json", QWQ | {"torch_dtype": "float16", "quantization_config": packed})
    rows = rows_of(plan(str(tmp_path)))
    nbytes = 64 * LAYER * (1 / 2 + 3 / 128) + 2 * 2 * 5120 * 152064
    assert list(rows) == ["weights", "---", "as they are, AWQ"]
    assert rows["as they are, AWQ"][0] == f"{nbytes / 1e9:.1f} GB"


OLDER_AWQ = {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}
OLDER_GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
OLDER_FILES = [("quant_config.json", OLDER_AWQ, "AWQ"), ("quantize_config.json", OLDER_GPTQ, "GPTQ")]


@pytest.mark.parametrize(("file", "content", "name"), OLDER_FILES)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_format_that_stands_in_a_file_of_its_own(tmp_path, monkeypatch, where, file, content, name):
    """As older writers have it."""
    write_json(tmp_path / "config.json", QWQ | {"torch_dtype": "float16"})
    write_json(tmp_path / file, content)
    model = str(tmp_path)
    if where == "hub":
        monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda _: ["config.json", file])
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, asked: str(tmp_path / asked))
        model = "someone/model"
    rows = rows_of(plan(model))
    nbytes = 64 * LAYER * (1 / 2 + 3 / 128) + 2 * 2 * 5120 * 152064
    assert list(rows) == ["weights", "---", f"as they are, {name}"]
    assert float(rows[f"as they are, {name}"][0].split()[0]) == pytest.approx(nbytes / 1e9, rel=0.01)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_one_that_is_refused_is_named_as_when_it_is_loaded(tmp_path, file):
    write_json(tmp_path / "config.json", QWQ)
    write_json(tmp_path / file, {"bits": 3, "group_size": 128})
    code, out, err = said(generate.main, "--model", tmp_path, "--plan")
    assert (code, out) == (2, "")
    assert f"{file}: bits 3" in err


@pytest.mark.parametrize("shape", [TINY | WIDE, MOE | WIDE], ids=["dense", "experts"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_estimate_is_what_is_loaded(tmp_path, shape, bits):
    loaded = load(make_folder(tmp_path, shape, make_tensors(shape)), device="cpu", quantize=bits)
    storage = Rounded(bits) if bits else Plain()
    assert bytes_of_weights(parse_config(shape), torch.float32, storage) == loaded.weights.nbytes


def test_the_estimate_is_what_is_loaded_from_a_packed_folder(tmp_path):
    made = pack(TINY | WIDE, "awq", 32)
    loaded = load(make_folder(tmp_path, made.config, made.tensors), device="cpu")
    storage = packed_storage(made.config)
    assert bytes_of_weights(parse_config(made.config), torch.float32, storage) == loaded.weights.nbytes


def test_room_for_workers():
    config = parse_config(TINY)
    token_bytes = bytes_of_token(config, torch.float32)
    assert token_bytes == 2 * 2 * 2 * 6 * 4  # keys and values, layers, heads, dimensions, bytes
    one = 16384 * 2**20
    assert workers_on(40, 39 * 2**30 - one, 2**20) == 1
    assert workers_on(40, 39 * 2**30 - one + 1, 2**20) == 0
    assert workers_on(40, 50 * 2**30, 2**20) == 0
    assert workers_on(80, 0, 1) == 16  # as many as there can be


def test_rows_that_cannot_be_rounded_have_no_line(tmp_path):
    write_json(tmp_path / "config.json", TINY)
    assert list(rows_of(plan(str(tmp_path)))) == ["weights", "---", "as they are, float32", "`--quantize 8`"]


def test_groups_that_do_not_divide_are_named(tmp_path):
    packed = {"quant_method": "awq", "bits": 4, "group_size": 48}
    write_json(tmp_path / "config.json", TINY | WIDE | {"quantization_config": packed})
    code, out, err = said(generate.main, "--model", tmp_path, "--plan")
    assert (code, out) == (2, "")
    assert "64 inputs are no multiple of the group size 48" in err


def test_absurd_counts_take_no_time(tmp_path):
    """A million layers of a million experts, as far as config.json is concerned: they are not gone through."""
    sizes = {"num_hidden_layers": 2**20, "num_experts": 2**20, "moe_intermediate_size": 2**20, "vocab_size": 2**20}
    write_json(tmp_path / "config.json", MOE | sizes)
    started = time.perf_counter()
    rows = rows_of(plan(str(tmp_path)))
    assert time.perf_counter() - started < 5
    F, E, X, L = 2**20, 12, 2**20, 2**20
    dense = 2 * E + 24 * E + 2 * 12 * E + E * 24 + 3 * E * 20
    sparse = dense - 3 * E * 20 + X * E + X * 3 * F * E
    weights = dense + (L - 1) * sparse + 2 * 2**20 * E + E
    assert rows["as they are, float32"][0] == f"{4 * weights / 1e9:.1f} GB"


def test_a_head_that_config_json_calls_packed(tmp_path):
    """AWQ leaves it as it is; GPTQ has a key for it, and compressed-tensors packs what is not ignored."""
    shape = TINY | WIDE | {"vocab_size": 264}
    for number, (kind, change, is_packed) in enumerate(
        [
            ("awq", {}, False),
            ("gptq", {}, False),
            ("gptq", {"lm_head": False}, False),
            ("gptq", {"lm_head": True}, True),
            ("symmetric", {}, False),
            ("symmetric", {"ignore": ["re:.*lm_head.*"]}, False),
            ("symmetric", {"ignore": None}, True),
            ("symmetric", {"ignore": ["model.layers.0.mlp.up_proj"]}, True),
        ]
    ):
        made = pack(shape, kind, 32, keep=() if is_packed else ("lm_head",))
        made.config["quantization_config"] |= change
        folder = make_folder(tmp_path / str(number), made.config, made.tensors)
        nbytes = load(folder, device="cpu").weights.nbytes
        [(_, row)] = [(name, row) for name, row in rows_of(plan(str(folder))).items() if name.startswith("as")]
        assert bytes_of_weights(parse_config(made.config), torch.float32, packed_storage(made.config)) == nbytes
        assert row[0] == f"{nbytes / 1e9:.1f} GB"


def test_the_dtype_is_the_checkpoints_where_config_json_has_none(tmp_path):
    shape = without(TINY, "torch_dtype")
    make_folder(tmp_path / "here", shape, make_tensors(shape, dtype=torch.bfloat16))
    table = plan(str(tmp_path / "here"))
    assert "as they are, bfloat16" in rows_of(table)
    assert "supposed" not in table
    (tmp_path / "there").mkdir()
    write_json(tmp_path / "there" / "config.json", shape)
    table = plan(str(tmp_path / "there"))
    assert "as they are, float32" in rows_of(table)
    assert "config.json says no dtype: float32 is supposed" in table
    assert "supposed" not in plan(str(tmp_path / "there"), "float16")


@pytest.mark.parametrize(
    "options",
    [("--quantize", 4), ("--device", "cpu"), ("--workers", 3), ("--json", "x.json"), ("--top-k", 0), ("What is 2?",)],
)
def test_other_options_are_not_ignored(tmp_path, options):
    write_json(tmp_path / "config.json", TINY)
    code, out, err = said(generate.main, "--model", tmp_path, "--plan", *options)
    assert (code, out) == (2, "")
    name = options[0] if len(options) == 2 else "PROMPT"
    assert err == f"minihogwild: --plan takes --model, --dtype and --context, not {name}\n"


def test_its_own_options(tmp_path):
    write_json(tmp_path / "config.json", TINY)
    code, out, _ = said(generate.main, "--plan", "--model", tmp_path, "--dtype", "float16", "--context", 100)
    assert code == 0
    assert "up to 100 tokens" in out
    assert "as they are, float16" in out


def test_the_command_reads_nothing_but_config_json(tmp_path, monkeypatch):
    """Of a hub repository too."""
    write_json(tmp_path / "config.json", QWQ)
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda _: ["config.json", "model.safetensors"])
    code, out, err = said(generate.main, "--model", "Qwen/QwQ-32B", "--plan")
    assert (code, err) == (0, "")
    assert asked == [("Qwen/QwQ-32B", "config.json")]
    assert "QwQ-32B: " in out
    _, local, _ = said(generate.main, "--model", tmp_path, "--plan")
    assert rows_of(local) == rows_of(out)


@pytest.mark.parametrize("content", ["{", '{"model_type": "gpt2"}', '{"quantization_config": {"quant_method": "fp8"}}'])
def test_what_cannot_be_planned(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    code, out, err = said(generate.main, "--model", tmp_path, "--plan")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "config.json" in err


def test_no_such_model(tmp_path):
    code, _, err = said(generate.main, "--model", Path(tmp_path) / "nowhere", "--plan")
    assert code == 2
    assert "neither a folder nor to be had from the hub" in err
