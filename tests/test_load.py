"""Loading: a model folder in the hub's own format goes in; the right numbers come out, or one line says why not."""

from __future__ import annotations

import fnmatch
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, tqdm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minihogwild import Config, InputError, Sampling, load
from minihogwild.config import Rope
from minihogwild.load import load_weights, parse_config, pick_device
from minihogwild.memory import allocating

# `minihogwild.load` is the function by now; the module of that name is needed to put stand-ins into it.
loading = importlib.import_module("minihogwild.load")

CPU = torch.device("cpu")
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258


# ---- making checkpoints


def without(mapping: dict, *keys: str) -> dict:
    return {key: value for key, value in mapping.items() if key not in keys}


def sparse(config: dict, i: int) -> bool:
    """Whether layer i has experts."""
    moe = config["model_type"] == "qwen3_moe"
    return moe and i not in config["mlp_only_layers"] and (i + 1) % config["decoder_sparse_step"] == 0


def make_tensors(config: dict, biases=False, qk_norms=False, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under the hub's names, all different: random numbers."""
    E, V, D = (config[key] for key in ("hidden_size", "vocab_size", "head_dim"))
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (E,),
            "post_attention_layernorm.weight": (E,),
            "self_attn.q_proj.weight": (H * D, E),
            "self_attn.k_proj.weight": (K * D, E),
            "self_attn.v_proj.weight": (K * D, E),
            "self_attn.o_proj.weight": (E, H * D),
        }
        F, mlps = config["intermediate_size"], ["mlp"]
        if sparse(config, i):
            layer |= {"mlp.gate.weight": (config["num_experts"], E)}
            F, mlps = config["moe_intermediate_size"], [f"mlp.experts.{n}" for n in range(config["num_experts"])]
        for mlp in mlps:
            layer |= {f"{mlp}.{part}_proj.weight": (F, E) for part in ("gate", "up")}
            layer |= {f"{mlp}.down_proj.weight": (E, F)}
        if biases:
            layer |= {"self_attn.q_proj.bias": (H * D,)}
            layer |= {f"self_attn.{p}_proj.bias": (K * D,) for p in "kv"}
        if qk_norms:
            layer |= {f"self_attn.{p}_norm.weight": (D,) for p in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    random = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def byte_tokenizer() -> HFTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), "utf-8")


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> list[str]:
    """Several safetensors files and their index; returns the files' names."""
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return names


def split(tensors: dict, parts: int) -> list[dict]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::parts]} for i in range(parts)]


def make_folder(folder: Path, config: dict, tensors: dict, shards: int = 1, generation: dict | None = None) -> Path:
    """A whole model folder, as downloaded from the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "bos_token": None})
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, split(tensors, shards))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with nothing wrong."""
    return make_folder(tmp_path / "tiny-model", TINY, make_tensors(TINY))


def refusal(call, *args, **kwargs) -> str:
    """The message of the InputError that the call raises: one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    return message


def assert_holds(weights, saved: dict[str, torch.Tensor], config: dict, dtype=None) -> None:
    """Every saved number stands where forward() will look for it."""
    H, K, D = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    left = {name: tensor.to(dtype or tensor.dtype) for name, tensor in saved.items()}

    def same(tensor, name):
        wanted = left.pop(name)
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name

    same(weights.embed, "model.embed_tokens.weight")
    same(weights.norm, "model.norm.weight")
    if not config["tie_word_embeddings"]:
        same(weights.head, "lm_head.weight")
    assert len(weights.layers) == config["num_hidden_layers"]
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        same(layer.attn_norm, at + "input_layernorm.weight")
        same(layer.mlp_norm, at + "post_attention_layernorm.weight")
        same(layer.qkv[: H * D], at + "self_attn.q_proj.weight")
        same(layer.qkv[H * D : (H + K) * D], at + "self_attn.k_proj.weight")
        same(layer.qkv[(H + K) * D :], at + "self_attn.v_proj.weight")
        same(layer.out, at + "self_attn.o_proj.weight")
        mlps, F = {"mlp": (layer.gate_up, layer.down)}, config["intermediate_size"]
        if sparse(config, i):
            same(layer.router, at + "mlp.gate.weight")
            pairs, F = zip(layer.gate_up, layer.down, strict=True), config["moe_intermediate_size"]
            mlps = {f"mlp.experts.{n}": pair for n, pair in enumerate(pairs)}
        for mlp, (gate_up, down) in mlps.items():
            same(gate_up[:F], f"{at}{mlp}.gate_proj.weight")
            same(gate_up[F:], f"{at}{mlp}.up_proj.weight")
            same(down, f"{at}{mlp}.down_proj.weight")
        if layer.qkv_bias is not None:
            same(layer.qkv_bias[: H * D], at + "self_attn.q_proj.bias")
            same(layer.qkv_bias[H * D : (H + K) * D], at + "self_attn.k_proj.bias")
            same(layer.qkv_bias[(H + K) * D :], at + "self_attn.v_proj.bias")
        if layer.q_norm is not None:
            same(layer.q_norm, at + "self_attn.q_norm.weight")
            same(layer.k_norm, at + "self_attn.k_norm.weight")
    assert not left, "saved, but nowhere in the weights"


# ---- whole folders


def test_a_tilde_is_the_home_folder(tiny: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert load("~/tiny-model", device="cpu").folder == tiny


def test_a_folder_in_one_file(tiny: Path):
    model = load(tiny, device="cpu")
    assert model.config == Config(
        vocab_size=260,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope=Rope("default", rope_theta=50000.0),
    )
    assert_holds(model.weights, make_tensors(TINY), TINY)
    assert (model.dtype, model.device, model.folder) == (torch.float32, CPU, tiny)
    assert model.name == str(tiny)
    assert model.tokenizer.decode(model.tokenizer.encode("As written: naïve ☕")) == "As written: naïve ☕"


def test_a_folder_is_found_by_a_relative_path(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.parent)
    by_name, by_path = load(tiny.name, device="cpu"), load(Path(tiny.name), device="cpu")
    assert_holds(by_name.weights, make_tensors(TINY), TINY)
    assert_holds(by_path.weights, make_tensors(TINY), TINY)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_give_the_same_weights_as_one_file(tmp_path: Path, shards: int):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=shards)
    assert not (folder / "model.safetensors").exists()
    assert_holds(load(folder, device="cpu").weights, make_tensors(TINY), TINY)


def test_the_index_decides_which_files_count(tmp_path: Path):
    """Some repositories keep other safetensors beside the shards: those must not be read."""
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=2)
    save_file({"some.lora_A.weight": torch.zeros(3)}, folder / "adapter_model.safetensors")
    save_file({"model.norm.weight": torch.zeros(12)}, folder / "model-old.safetensors")
    assert_holds(load(folder, device="cpu").weights, make_tensors(TINY), TINY)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_architecture_is_loaded_to_its_place(data):
    """Any heads and head size, biases and norms, dense and sparse layers, tied or not, any number of shards."""
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    K = number(1, 3)
    config = TINY | {
        "vocab_size": number(1, 9),
        "hidden_size": number(1, 8),
        "intermediate_size": number(1, 7),
        "num_hidden_layers": number(1, 3),
        "num_key_value_heads": K,
        "num_attention_heads": K * number(1, 3),
        "head_dim": 2 * number(1, 3),
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        config |= {
            "model_type": "qwen3_moe",
            "num_experts": (X := number(1, 4)),
            "num_experts_per_tok": number(1, X),
            "moe_intermediate_size": number(1, 4),
            "decoder_sparse_step": number(1, 3),
            "mlp_only_layers": data.draw(st.lists(st.integers(0, 2))),
        }
    biases, qk_norms = data.draw(st.booleans()), data.draw(st.booleans())
    saved = make_tensors(config, biases, qk_norms)
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), split(saved, number(1, 4)))
        weights = load_weights(Path(name), parse_config(config), torch.float32, CPU)
    assert_holds(weights, saved, config)
    assert all((layer.qkv_bias is not None) == biases for layer in weights.layers)
    assert all((layer.q_norm is not None) == (layer.k_norm is not None) == qk_norms for layer in weights.layers)
    assert (weights.head is weights.embed) == config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("kind", "biases", "qk_norms"),
    [
        ("llama", False, False),
        ("mistral", False, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
        ("qwen3_moe", False, True),
    ],
)
def test_each_family_from_a_folder(tmp_path: Path, kind: str, biases: bool, qk_norms: bool):
    config = MOE | {"model_type": kind, "sliding_window": None}  # what a kind does not know, it ignores
    saved = make_tensors(config, biases, qk_norms)
    weights = load(make_folder(tmp_path, config, saved), device="cpu").weights
    assert_holds(weights, saved, config)
    assert all((layer.qkv_bias is not None) == biases for layer in weights.layers)
    assert all((layer.q_norm is not None) == qk_norms for layer in weights.layers)


def test_experts_lie_in_the_order_of_their_numbers(tmp_path: Path):
    """Of their names 10 and 11 would come before 2."""
    config = MOE | {"num_experts": 12}
    saved = make_tensors(config)
    assert_holds(load(make_folder(tmp_path, config, saved, shards=2), device="cpu").weights, saved, config)


# ---- tied embeddings, and what is in checkpoints but is no parameter

TIED = TINY | {"tie_word_embeddings": True}


def test_tied_embeddings_are_one_tensor(tmp_path: Path):
    weights = load(make_folder(tmp_path, TIED, make_tensors(TIED)), device="cpu").weights
    assert weights.head is weights.embed
    assert_holds(weights, make_tensors(TIED), TIED)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_with_the_same_head_saved_too(tmp_path: Path, shards: int, dtype: str):
    saved = make_tensors(TIED)
    head = saved["model.embed_tokens.weight"].clone()
    folder = make_folder(tmp_path, TIED, saved | {"lm_head.weight": head}, shards)
    weights = load(folder, dtype=dtype, device="cpu").weights
    assert weights.head is weights.embed
    assert_holds(weights, saved, TIED, getattr(torch, dtype))


def one_number_off(embedding: torch.Tensor) -> torch.Tensor:
    head = embedding.clone()
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spoil", [one_number_off, lambda embedding: embedding[:1].clone()], ids=["number", "shape"])
def test_tied_with_another_head_is_refused(tmp_path: Path, shards: int, spoil):
    saved = make_tensors(TIED)
    saved["lm_head.weight"] = spoil(saved["model.embed_tokens.weight"])
    message = refusal(load, make_folder(tmp_path, TIED, saved, shards), device="cpu")
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("shards", [1, 2])
def test_rotary_frequencies_saved_by_llama_2_are_ignored(tmp_path: Path, shards: int):
    saved = make_tensors(TINY)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    folder = make_folder(tmp_path, TINY, extra | saved, shards)
    assert_holds(load(folder, device="cpu").weights, saved, TINY)


# ---- dtype and device

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype(tmp_path: Path, name: str, stored: torch.dtype):
    config = TINY | {"model_type": "qwen2"}
    saved = make_tensors(config, biases=True, qk_norms=True, dtype=stored)
    folder = make_folder(tmp_path, config, saved)
    for given_dtype in (name, DTYPES[name]):
        model = load(folder, dtype=given_dtype, device="cpu")
        assert model.dtype == DTYPES[name]
        assert_holds(model.weights, saved, config, DTYPES[name])  # every single tensor has it


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_auto_dtype_is_the_one_in_config_json(tmp_path: Path, key: str, name: str):
    """Whatever the tensors are stored in."""
    config = without(TINY, "torch_dtype") | {key: name}
    saved = make_tensors(config, dtype=torch.float16 if name == "float64" else torch.float64)
    folder = make_folder(tmp_path, config, saved)
    assert_holds(load(folder, device="cpu").weights, saved, config, DTYPES[name])


@pytest.mark.parametrize("silence", [{}, {"torch_dtype": None}], ids=["absent", "null"])
def test_auto_dtype_is_float32_where_config_json_is_silent(tmp_path: Path, silence: dict):
    config = without(TINY, "torch_dtype") | silence
    saved = make_tensors(config, dtype=torch.bfloat16)
    assert load(make_folder(tmp_path, config, saved), device="cpu").dtype == torch.float32


def test_an_unknown_dtype_is_refused_by_name(tiny: Path):
    message = refusal(load, tiny, dtype="int8", device="cpu")
    assert "'int8'" in message
    assert all(name in message for name in DTYPES)
    write_json(tiny / "config.json", TINY | {"torch_dtype": "float8_e4m3fn"})
    assert "'float8_e4m3fn'" in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_device(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: int, chosen: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pick_device("auto") == torch.device(chosen)
    assert pick_device("cpu") == pick_device(CPU) == CPU


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch, device: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.split(":")[0] in refusal(load, tiny, device=device)


# ---- names and shapes


def weights_refused(folder: Path, tensors: dict, config: dict = TINY, shards: int = 1) -> str:
    return refusal(load, make_folder(folder, config, tensors, shards), device="cpu")


FULL = make_tensors(TINY, biases=True, qk_norms=True)


@pytest.mark.parametrize("name", [name for name in FULL if "layers.0." not in name])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str):
    assert weights_refused(tmp_path, without(FULL, name)).endswith(f"lacks {name}")


SPARSE = make_tensors(MOE, qk_norms=True)


@pytest.mark.parametrize("name", [name for name in SPARSE if ".mlp." in name])
def test_a_missing_tensor_of_a_sparse_model_is_named(tmp_path: Path, name: str):
    assert weights_refused(tmp_path, without(SPARSE, name), MOE).endswith(f"lacks {name}")


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"num_experts": 4}, "model.layers.1.mlp.experts.3.down_proj.weight"),
        ({"mlp_only_layers": []}, "model.layers.0.mlp.experts.0.down_proj.weight"),
        ({"mlp_only_layers": [0, 1]}, "model.layers.1.mlp.down_proj.weight"),
        ({"decoder_sparse_step": 3}, "model.layers.1.mlp.down_proj.weight"),
        ({"model_type": "qwen3"}, "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_sparse_model_that_is_not_the_one_in_config_json(tmp_path: Path, change: dict, lacks: str):
    assert f"lacks {lacks}" in weights_refused(tmp_path, SPARSE, MOE | change)


def test_an_expert_too_many_or_misshapen_is_named(tmp_path: Path):
    message = weights_refused(tmp_path / "many", SPARSE, MOE | {"num_experts": 2})
    assert "not know: model.layers.1.mlp.experts.2.down_proj.weight" in message
    message = weights_refused(tmp_path / "wide", SPARSE, MOE | {"moe_intermediate_size": 8})
    assert "mlp.experts." in message
    assert "has shape" in message
    name = "model.layers.1.mlp.gate.weight"
    message = weights_refused(tmp_path / "router", SPARSE | {name: SPARSE[name][:2].clone()}, MOE)
    assert f"{name} has shape [2, 12], not [3, 12]" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.o_proj.bias",  # llama with attention_bias
        "model.layers.1.mlp.gate_proj.bias",
        "model.layers.2.input_layernorm.weight",  # one layer more than config.json says
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "score.weight",
        "embed_tokens.weight",
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str):
    message = weights_refused(tmp_path, make_tensors(TINY) | {name: torch.zeros(4)})
    assert name in message
    assert "not know" in message


def test_an_untied_head_in_a_tied_folder_is_not_simply_unknown(tmp_path: Path):
    """The other way round is a missing tensor: config.json says untied, and no head was saved."""
    assert "lacks lm_head.weight" in weights_refused(tmp_path, make_tensors(TIED), TINY)


def test_many_missing_tensors_stay_one_short_line(tmp_path: Path):
    config = TINY | {"num_hidden_layers": 40}
    message = weights_refused(tmp_path, make_tensors(TINY), config)
    assert "model.layers.10.input_layernorm.weight" in message  # the first, by name
    assert f"{38 * 9 - 3} more" in message
    assert len(message) < 300


@pytest.mark.parametrize("extra", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path, extra: str):
    folder = make_folder(tmp_path, TINY, saved := make_tensors(TINY), shards=3)
    shards = split(saved, 3)
    owner = next(i for i in range(3) if extra in shards[i])
    other = (owner + 1) % 3
    shards[other][extra] = saved[extra].clone()  # even an equal one: which was meant?
    names = write_shards(folder, shards)
    message = refusal(load, folder, device="cpu")
    assert extra in message
    assert names[owner] in message
    assert names[other] in message


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor[:, None].contiguous()


SPOILT_SHAPES = {
    "transposed": transposed,
    "a row short": lambda tensor: tensor[:-1].clone(),
    "of one row": lambda tensor: tensor[:1].clone(),  # copy_ would broadcast it
    "of one number": lambda tensor: tensor.reshape(-1)[0].clone(),
    "with an axis more": lambda tensor: tensor[None].clone(),
}


@pytest.mark.parametrize("how", SPOILT_SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path, name: str, how: str):
    spoilt = SPOILT_SHAPES[how](FULL[name])
    message = weights_refused(tmp_path, FULL | {name: spoilt})
    assert f"{name} has shape {list(spoilt.shape)}, not {list(FULL[name].shape)}" in message
    assert "model.safetensors" in message


def test_swapped_projections_do_not_fit(tmp_path: Path):
    """q, k and v share one matrix: that the sum of their rows is right is not enough."""
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    saved = make_tensors(TINY)
    message = weights_refused(tmp_path, saved | {q: saved[k].clone(), k: saved[q].clone()})
    assert q in message or k in message


# ---- config.json


def parsed_rope(**settings) -> Rope:
    return parse_config(without(TINY, "rope_theta") | settings).rope


ROPES = {
    "default": ({}, Rope("default", 9e4)),
    "linear": ({"factor": 4.0}, Rope("linear", 9e4, factor=4.0)),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 256,
        },
        Rope("llama3", 9e4, 8.0, 256, low_freq_factor=1.5, high_freq_factor=5.0),
    ),
    "yarn": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        Rope(
            "yarn",
            9e4,
            4.0,
            128,
            attention_factor=1.25,
            mscale=0.7,
            mscale_all_dim=0.9,
            beta_fast=24.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_in_every_form_of_the_wild(kind: str):
    keys, wanted = ROPES[kind]
    theta = {"rope_theta": 9e4}
    for named in ({"type": kind}, {"rope_type": kind}, {"type": kind, "rope_type": kind}):
        assert parsed_rope(**theta, rope_scaling=named | keys) == wanted
        assert parsed_rope(rope_parameters=named | keys | theta) == wanted
        assert parsed_rope(**theta, rope_parameters=named | keys) == wanted
        assert parsed_rope(rope_parameters=named | keys | theta, rope_scaling=None) == wanted


def test_rope_where_config_json_says_little():
    assert parsed_rope() == Rope("default", 10000.0)
    assert parsed_rope(rope_theta=5e5) == Rope("default", 5e5)
    assert parsed_rope(rope_theta=5e5, rope_scaling=None) == Rope("default", 5e5)
    assert parsed_rope(rope_theta=5e5, rope_scaling={}, rope_parameters=None) == Rope("default", 5e5)
    assert parsed_rope(rope_parameters={"rope_theta": 5e5}) == Rope("default", 5e5)
    assert parsed_rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == Rope("default", 5e5)


def test_rope_parameters_win_over_the_older_form():
    """Both stand in files that are to be read by older versions of transformers too."""
    both = {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 8.0},
    }
    assert parsed_rope(**both) == Rope("yarn", 2e4, 8.0, 512)


def test_null_rope_keys_leave_the_defaults():
    given = {"rope_type": "yarn", "factor": 2.0, "attention_factor": None, "beta_fast": None, "truncate": None}
    assert parsed_rope(rope_scaling=given) == Rope("yarn", 10000.0, 2.0, 512)


@pytest.mark.parametrize("silence", [{}, {"original_max_position_embeddings": None}], ids=["absent", "null"])
def test_yarn_was_trained_on_max_position_embeddings_unless_it_says_otherwise(silence: dict):
    assert parsed_rope(rope_scaling={"type": "yarn", "factor": 2.0} | silence).original_max_position_embeddings == 512


def test_yarn_where_no_context_at_all_is_given():
    """config.json may leave max_position_embeddings to the default of its class."""
    config = parse_config(without(TINY, "max_position_embeddings") | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert config.rope.original_max_position_embeddings == config.max_position_embeddings == 2048


def test_context():
    def context(longest: int, **rope) -> int:
        scaling = {"rope_scaling": rope} if rope else {}
        return parse_config(TINY | {"max_position_embeddings": longest} | scaling).context

    assert context(512) == 512
    # yarn, unscaled (Qwen) and scaled (DeepSeek)
    assert context(512, type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert context(2048, type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert context(640, type="yarn", factor=2.5, original_max_position_embeddings=512) == 1280
    assert context(512, type="yarn", factor=4.0) == 2048
    assert context(4096, type="yarn", factor=4.0, original_max_position_embeddings=512) == 4096
    # Llama 3.1's is already the long one
    assert context(1024, rope_type="llama3", **ROPES["llama3"][0]) == 1024  # 8 times 256 is more


def test_numbers_that_config_json_may_leave_out():
    silent = without(TINY, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    config = parse_config(silent)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.rms_norm_eps == 1e-6
    assert config.tie_word_embeddings is False
    assert config.max_position_embeddings == 2048
    assert parse_config(silent | {"model_type": "qwen2"}).max_position_embeddings == 32768
    assert parse_config(silent | {"model_type": "qwen3"}).max_position_embeddings == 32768
    mistral = parse_config(silent | {"model_type": "mistral", "sliding_window": None})
    assert mistral.max_position_embeddings == 131072
    assert parse_config(TINY | {"num_key_value_heads": None}).num_key_value_heads == 4


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_numbers_left_out_are_those_of_transformers(kind: str):
    """Its own classes are what a hub author relied on when leaving something out."""
    from transformers import AutoConfig

    given = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    given |= {"num_attention_heads": 6, "num_key_value_heads": 3} | (
        {"sliding_window": None} if kind == "mistral" else {}
    )
    theirs, ours = AutoConfig.for_model(kind, **given), parse_config(given | {"model_type": kind})
    names = ["rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    if kind == "qwen3_moe":
        names += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
        assert (theirs.decoder_sparse_step, theirs.mlp_only_layers) == (1, [])
        assert ours.sparse_layers == (0, 1)
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("silence", [{}, {"head_dim": None}], ids=["absent", "null"])
def test_head_dim(silence: dict):
    def head_dim(kind: str, **more) -> int:
        config = without(TINY, "head_dim") | {"model_type": kind, "hidden_size": 64} | silence | more
        return parse_config(config).head_dim

    assert head_dim("llama") == head_dim("qwen2") == 16  # hidden_size / num_attention_heads
    assert head_dim("qwen3") == 128
    assert head_dim("llama", head_dim=24) == head_dim("qwen2", head_dim=24) == head_dim("qwen3", head_dim=24) == 24


YARN = {"type": "yarn", "factor": 4.0}
REFUSED = {
    "model type": (
        {"model_type": "gemma"},
        ["model_type", "'gemma'", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"],
    ),
    "another mixture of experts": ({"model_type": "qwen2_moe"}, ["'qwen2_moe'"]),
    "more experts chosen than there are": (
        MOE | {"num_experts_per_tok": 4},
        ["num_experts_per_tok 4", "num_experts 3"],
    ),
    "no expert chosen": (MOE | {"num_experts_per_tok": 0}, ["num_experts_per_tok", "not 0"]),
    "no experts": (MOE | {"num_experts": 0}, ["num_experts", "not 0"]),
    "every 0th layer sparse": (MOE | {"decoder_sparse_step": 0}, ["decoder_sparse_step", "not 0"]),
    "every -1st layer sparse": (MOE | {"decoder_sparse_step": -1}, ["decoder_sparse_step", "not -1"]),
    "experts without a number": (MOE | {"num_experts": "all"}, ["config.json"]),
    "dense layers without a list": (MOE | {"mlp_only_layers": 1}, ["config.json"]),
    "Mistral 7B v0.1": ({"model_type": "mistral", "sliding_window": 4096}, ["sliding-window"]),
    "Mistral's silence": ({"model_type": "mistral"}, ["sliding-window"]),  # means 4096
    "Qwen's silence": ({"model_type": "qwen2", "use_sliding_window": True}, ["sliding-window"]),  # the same
    "no model type": ({"model_type": None}, ["model_type"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "activation, close": ({"hidden_act": "gelu_pytorch_tanh"}, ["hidden_act", "'gelu_pytorch_tanh'"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias"]),
    "rope interleaved": ({"rope_interleaved": True}, ["rope_interleaved"]),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["AWQ", "quantised"]),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ", "quantised"]),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, ["FP8", "quantised"]),
    "some quantisation": ({"quantization_config": {"bits": 4}}, ["quantised"]),
    "sliding window": (
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
        ["sliding-window"],
    ),
    "sliding window, layer 28 on": (
        {"use_sliding_window": True, "sliding_window": 4096, "num_hidden_layers": 29},
        ["sliding-window"],
    ),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
    "part of the head rotated": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "the same, newer": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ["partial_rotary_factor"],
    ),
    "the same, older": ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    "rope type dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope type", "'dynamic'", "yarn"]),
    "rope type longrope": ({"rope_parameters": {"rope_type": "longrope"}}, ["rope type", "'longrope'"]),
    "rope_type before type": ({"rope_scaling": {"type": "linear", "rope_type": "su", "factor": 2.0}}, ["'su'"]),
    "rope key of yarn": ({"rope_scaling": YARN | {"extrapolation": 1}}, ["extrapolation", "'yarn'"]),
    "rope key of another type": ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, ["mscale"]),
    "factor without a type": ({"rope_scaling": {"factor": 2.0}}, ["factor", "'default'"]),
    "rope key of llama3": ({"rope_scaling": {"rope_type": "llama3", **ROPES["llama3"][0], "beta": 1}}, ["beta"]),
    "several rope keys": ({"rope_scaling": YARN | {"zeta": 1, "alpha": 2}}, ["alpha, zeta"]),
    "linear without a factor": ({"rope_scaling": {"type": "linear"}}, ["'linear'", "factor"]),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn", "beta_fast": 32}}, ["'yarn'", "factor"]),
    "yarn with null for a factor": ({"rope_scaling": {"type": "yarn", "factor": None}}, ["'yarn'", "factor"]),
    "heads in no whole groups": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        ["num_attention_heads 4", "num_key_value_heads 3"],
    ),
    "odd head": ({"head_dim": 7}, ["head_dim 7"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_changes_the_mathematics_is_refused(case: str):
    change, culprits = REFUSED[case]
    message = refusal(parse_config, TINY | change)
    assert message.startswith("config.json: ")
    for culprit in culprits:
        assert culprit in message
    parse_config(TINY)  # and it was the change that was refused


@pytest.mark.parametrize("key", ROPES["llama3"][0])
def test_llama3_needs_each_of_its_keys(key: str):
    message = refusal(parsed_rope, rope_scaling={"rope_type": "llama3", **without(ROPES["llama3"][0], key)})
    assert f"'llama3' needs {key}" in message


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_number_is_named(key: str):
    assert refusal(parse_config, without(TINY, key)) == f"config.json: no {key}"


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 4096},
        {"layer_types": None},
        {"model_type": "mistral", "sliding_window": None},  # v0.2 and later
        without(MOE, "model_type"),  # not llama's
        {"mlp_bias": False, "attention_bias": False, "pretraining_tp": 1, "rope_interleaved": False},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 1.0}},
        {"quantization_config": None},
        {"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1},
    ],
    ids=lambda harmless: ", ".join(f"{key} {value}" for key, value in harmless.items())[:60],
)
def test_what_is_not_in_use_is_not_refused(harmless: dict):
    assert parse_config(TINY | harmless) == parse_config(TINY)


def experts_of(**change) -> tuple:
    config = parse_config(MOE | {"num_hidden_layers": 7, "mlp_only_layers": []} | change)
    return config.num_experts, config.num_experts_per_tok, config.sparse_layers


def test_experts():
    config = parse_config(MOE)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (3, 2, 7)
    assert config.norm_topk_prob is True
    assert experts_of() == (3, 2, (0, 1, 2, 3, 4, 5, 6))
    assert experts_of(decoder_sparse_step=3) == (3, 2, (2, 5))
    assert experts_of(mlp_only_layers=[5, 0, 99]) == (3, 2, (1, 2, 3, 4, 6))
    assert experts_of(decoder_sparse_step=2, mlp_only_layers=[3]) == (3, 2, (1, 5))
    assert experts_of(decoder_sparse_step=None, mlp_only_layers=None) == (3, 2, (0, 1, 2, 3, 4, 5, 6))
    assert parse_config(TINY).sparse_layers == ()
    newer = without(MOE, "num_experts") | {"num_local_experts": 5}  # as transformers 5 writes it
    assert parse_config(newer).num_experts == 5


def test_a_silent_activation_is_silu():
    assert parse_config(without(TINY, "hidden_act")) == parse_config(TINY)


def test_load_refuses_by_config_before_it_reads_anything_else(tmp_path: Path):
    write_json(tmp_path / "config.json", TINY | {"quantization_config": {"quant_method": "awq"}})
    assert "AWQ" in refusal(load, tmp_path, device="cpu")


# ---- generation_config.json


def loaded(folder: Path, generation: dict | None = None, **config):
    config = TINY | config
    return load(make_folder(folder, config, make_tensors(config), generation=generation), device="cpu")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
QWEN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        (None, GREEDY),
        ({}, GREEDY),
        ({"do_sample": False}, GREEDY),
        ({"do_sample": False, **QWEN}, GREEDY),
        (QWEN, GREEDY),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, **QWEN}, Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(temperature=0.6, top_p=0.9)),
        ({"do_sample": True, "temperature": None, "top_k": None}, Sampling(temperature=1.0)),
    ],
)
def test_default_sampling(tmp_path: Path, generation: dict | None, wanted: Sampling):
    assert loaded(tmp_path, generation).sampling == wanted


def test_impossible_default_sampling_is_refused(tmp_path: Path):
    assert "top_p" in refusal(loaded, tmp_path, {"do_sample": True, "top_p": 1.5})


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": 257}, {"eos_token_id": 256}, {257}),
        ({"eos_token_id": [256, 258]}, {"eos_token_id": 257}, {256, 258}),
        ({"eos_token_id": 0}, {"eos_token_id": 257}, {0}),  # an id like any other
        ({}, {"eos_token_id": 256}, {256}),
        (None, {"eos_token_id": [256, 257]}, {256, 257}),
        ({"eos_token_id": None}, {"eos_token_id": 256}, {256}),
        (None, {}, set()),
        ({}, {"eos_token_id": None}, set()),
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, generation: dict | None, config: dict, wanted: set[int]):
    assert loaded(tmp_path, generation, **config).eos == wanted


def warnings_of(caplog: pytest.LogCaptureFixture, folder: Path, generation: dict) -> list[str]:
    with caplog.at_level(logging.DEBUG):
        loaded(folder, generation)
    return [record.getMessage() for record in caplog.records if record.name.startswith("minihogwild")]


def test_one_warning_for_all_that_we_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lacking = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "num_beams": 4, "suppress_tokens": [5]}
    [message] = warnings_of(caplog, tmp_path, {"do_sample": True, **QWEN, **lacking})
    assert all(key in message for key in lacking)
    assert "generation_config.json" in message
    assert not any(key in message for key in ("do_sample", *QWEN))
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("key", ["repetition_penalty", "typical_p", "length_penalty"])
def test_one_warning_for_one_key(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str):
    [message] = warnings_of(caplog, tmp_path, {key: 1.05})
    assert key in message


def test_no_warning_for_what_asks_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": None}
    known = {
        "_from_model_config": True,
        "_commit_hash": "0123456789abcdef",
        "bos_token_id": 5,
        "eos_token_id": [7, 8],
        "pad_token_id": 9,
        "do_sample": True,
        "transformers_version": "4.51.0",
        "max_length": 4096,
        "max_new_tokens": 2048,
    }
    assert warnings_of(caplog, tmp_path, QWEN | known | neutral) == []


# ---- broken folders

CUT_TOKENIZER = byte_tokenizer().to_str()[:-40]
BROKEN_JSON = {
    "cut off": b'{"model_type": "llama", ',
    "empty": b"",
    "not JSON": b"<!DOCTYPE html><html>\n<body>\n</body></html>",
    "a list": b'["model_type", "llama"]',
    "a number": b"17",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "very deep": b'{"a":' * 200_000,
}


@pytest.mark.parametrize("how", BROKEN_JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json_names_its_file(tiny: Path, name: str, how: str):
    (tiny / name).write_bytes(BROKEN_JSON[how])
    assert name in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize("how", BROKEN_JSON)
def test_a_broken_index_names_its_file(tmp_path: Path, how: str):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=2)
    (folder / "model.safetensors.index.json").write_bytes(BROKEN_JSON[how])
    assert "model.safetensors.index.json" in refusal(load, folder, device="cpu")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 7, ["a"], None]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name):
    folder = make_folder(tmp_path / "model", TINY, make_tensors(TINY), shards=2)
    save_file(make_tensors(TINY), tmp_path / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    write_json(folder / "model.safetensors.index.json", index)
    message = refusal(load, folder, device="cpu")
    assert "model.safetensors.index.json" in message
    assert "\n" not in message


@pytest.mark.parametrize("weight_map", [[], 7, "model.safetensors"])
def test_an_index_of_the_wrong_kind_is_refused(tmp_path: Path, weight_map):
    folder = make_folder(tmp_path / "model", TINY, make_tensors(TINY), shards=2)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert "model.safetensors.index.json" in refusal(load, folder, device="cpu")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}])
def test_an_index_that_names_no_file(tmp_path: Path, index: dict):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=2)
    write_json(folder / "model.safetensors.index.json", index)
    assert "lacks lm_head.weight" in refusal(load, folder, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tiny: Path, name: str):
    (tiny / name).unlink()
    message = refusal(load, tiny, device="cpu")
    assert name in message
    assert str(tiny) in message
    assert "JSON" not in message  # missing is not broken


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_files_that_need_not_be_there(tiny: Path, name: str):
    (tiny / name).unlink(missing_ok=True)
    assert_holds(load(tiny, device="cpu").weights, make_tensors(TINY), TINY)


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = refusal(load, folder, device="cpu")
    assert "model-00002-of-00003.safetensors" in message
    assert "model-00001" not in message


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9999])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_safetensors_file_is_named(tmp_path: Path, shards: int, kept: float):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=shards)
    path = max(folder.glob("model*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert path.name in refusal(load, folder, device="cpu")


@pytest.mark.parametrize("data", [BROKEN_JSON["an LFS pointer"], b"PK\x03\x04 a pickle, zipped"])
def test_something_else_under_the_name_of_safetensors(tiny: Path, data: bytes):
    (tiny / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "Nonesuch"}}', CUT_TOKENIZER])
def test_a_tokenizer_that_cannot_be_read_is_named(tiny: Path, content: str):
    (tiny / "tokenizer.json").write_text(content, "utf-8")
    assert "tokenizer.json" in refusal(load, tiny, device="cpu")


# ---- the hub

NEEDED = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
NOT_NEEDED = {
    ".gitattributes",
    "LICENSE",
    "README.md",
    "USE_POLICY.md",
    "config.json.md",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "flax_model.msgpack",
    "merges.txt",
    "onnx/config.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/tokenizer.json",
    "openvino/openvino_model.bin",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "runs/events.out.tfevents.1",
    "special_tokens_map.json",
    "tf_model.h5",
    "tokenizer.model",
    "training_args.bin",
    "vocab.json",
}


class Hub:
    """Stands in for `snapshot_download`: notes what was asked for, and gives a local folder or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | BaseException):
        self.answer = answer
        self.calls = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(self, repo_id: str, **options) -> str:
        self.calls.append((repo_id, options))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which no name is a folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_a_hub_repository(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    model = load("someone/tiny-model", device="cpu")
    assert model.name == "someone/tiny-model"
    assert model.folder == tiny
    assert_holds(model.weights, make_tensors(TINY), TINY)
    [(repo_id, options)] = hub.calls
    assert repo_id == "someone/tiny-model"
    # Nothing that would overrule the user's own settings: cache folder, offline mode, token
    assert options.keys() == {"allow_patterns", "tqdm_class"}
    assert issubclass(options["tqdm_class"], tqdm)  # nor whether progress bars are wanted


def test_no_progress_bar_stays_open(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub leaves some, which would be drawn again when they are collected, wherever the cursor is by then."""
    terminal, bars = io.StringIO(), []
    terminal.isatty = lambda: True

    def download(_, tqdm_class: type, **options) -> str:
        bars.append(tqdm_class(total=7, file=terminal))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load("someone/tiny-model", device="cpu")
    assert "0/7" in terminal.getvalue()
    drawn = terminal.getvalue()
    bars[0].close()
    assert terminal.getvalue() == drawn  # it was closed already,
    assert drawn.split("\r")[-2].strip() == ""  # and has left nothing behind


def test_only_the_files_needed_are_downloaded(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    load("someone/tiny-model", device="cpu")
    patterns = hub.calls[0][1]["allow_patterns"]
    kept = set(filter_repo_objects(sorted(NEEDED | NOT_NEEDED), allow_patterns=patterns))
    assert kept == NEEDED
    one_file = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    assert list(filter_repo_objects(one_file, allow_patterns=patterns)) == [one_file[0], one_file[1], one_file[3]]
    assert any(fnmatch.fnmatch("prompts.json", pattern) for pattern in patterns)  # a model's own words


def test_a_repository_name_without_an_owner(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    assert load("tiny-model", device="cpu").folder == tiny
    assert [repo_id for repo_id, _ in hub.calls] == ["tiny-model"]


def test_a_local_folder_comes_before_the_hub(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, AssertionError("a local folder must not be looked up"))
    monkeypatch.chdir(tiny.parent.parent)
    assert load(f"{tiny.parent.name}/{tiny.name}", device="cpu").name == f"{tiny.parent.name}/{tiny.name}"
    assert hub.calls == []


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "../model",
        "models/mine/tiny",
        "/nowhere/at/all",
        "/nowhere",
        "~/no/such/model",
        "~no-such-user-here/model",
        "~no-such-user-here",
    ],
)
def test_what_looks_local_never_reaches_the_hub(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """The hub's own client sees that it is no repository's name."""
    monkeypatch.setattr("socket.socket.connect", None)
    message = refusal(load, name, device="cpu")
    assert message.startswith(f"{name}: neither a folder")
    assert "Repo id" in message or "home directory" in message


class RepositoryNotFoundError(OSError):
    """The hub's own takes an HTTP response, whose library changes from version to version."""


class GatedRepoError(RepositoryNotFoundError):
    pass


URL = "https://huggingface.co/api/models/someone/tiny-model/revision/main"
HUB_ERRORS = {
    "unknown": (
        RepositoryNotFoundError(
            f"404 Client Error. (Request ID: Root=1-6a; 77)\n\nRepository Not Found for url: {URL}.\n"
            "Please make sure you specified the correct `repo_id` and `repo_type`."
        ),
        "Not Found",
    ),
    "gated": (
        GatedRepoError(
            f"401 Client Error. (Request ID: Root=1-6a; 77)\n\nCannot access gated repo for url {URL}.\n"
            "Access to model someone/tiny-model is restricted. You must be authenticated to access it."
        ),
        "gated",
    ),
    "offline": (
        LocalEntryNotFoundError(
            "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and "
            "outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass "
            "'local_files_only=False' as input."
        ),
        "outgoing traffic has been disabled",
    ),
    "no network": (ConnectionError("Name or service not known\n(caused by something)"), "Name or service not known"),
    "a bad name": (ValueError("Repo id must use alphanumeric chars"), "Repo id must use alphanumeric chars"),
    "forbidden": (OSError("\n\n403 Forbidden: no.\nCannot access content at: there."), "403 Forbidden"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors_become_one_line_that_says_why(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    error, reason = HUB_ERRORS[case]
    hub = Hub(monkeypatch, error)
    message = refusal(load, "someone/tiny-model", device="cpu")
    assert message.startswith("someone/tiny-model: ")
    assert "hub" in message
    assert reason in message
    assert len(hub.calls) == 1


def test_a_hub_error_without_a_message_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, TimeoutError())
    assert "TimeoutError" in refusal(load, "someone/tiny-model", device="cpu")


def test_an_interrupted_download_stays_an_interrupt(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("someone/tiny-model", device="cpu")


def test_the_hub_s_own_cache_and_offline_mode(tmp_path: Path):
    """With the real hub client: what is in the user's cache is found offline, what isn't gives the one line."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny-model"
    make_folder(cached / "snapshots" / revision, TINY, make_tensors(TINY))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    program = (
        "import minihogwild\n"
        "print(minihogwild.load('someone/tiny-model', device='cpu').folder)\n"
        "try: minihogwild.load('someone/absent', device='cpu')\n"
        "except minihogwild.InputError as error: print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == str(cached / "snapshots" / revision)
    assert refused.startswith("someone/absent: ")


# ---- memory


@pytest.mark.parametrize("shards", [1, 3])
def test_each_tensor_is_read_once_and_let_go_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
):
    """So the peak is the weights and one tensor more, never the weights twice."""
    real, read, alive = loading.safe_open, [], set()

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            assert not alive, f"{alive} still held when {name} is read"
            tensor = self.file.get_tensor(name)
            read.append(name)
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            return tensor

    monkeypatch.setattr(loading, "safe_open", Watched)
    folder = make_folder(tmp_path, TINY, saved := make_tensors(TINY), shards=shards)
    weights = load(folder, device="cpu").weights
    assert sorted(read) == sorted(saved)
    assert not alive
    assert_holds(weights, saved, TINY)


def test_weights_own_their_memory_and_ask_for_no_gradient(tiny: Path):
    """Not a view of the file: changing it later must not change the model."""
    weights = load(tiny, device="cpu").weights
    path = tiny / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    assert_holds(weights, make_tensors(TINY), TINY)
    layer_tensors = [tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None]
    assert not any(tensor.requires_grad for tensor in [weights.embed, weights.norm, weights.head, *layer_tensors])


def free_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=nbytes, total=2 * nbytes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("bfloat16", 2)])
def test_the_memory_asked_for_is_that_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: str, size: int
):
    asked = []

    def asking(nbytes, what, device):
        asked.append((nbytes, what, device))
        return allocating(nbytes, what, device)

    monkeypatch.setattr(loading, "allocating", asking)
    config = TINY | {"tie_word_embeddings": tied}
    saved = make_tensors(config)
    load(make_folder(tmp_path / "tiny-model", config, saved), dtype=dtype, device="cpu")
    [(nbytes, what, device)] = asked
    assert nbytes == size * sum(tensor.numel() for tensor in saved.values())
    assert "tiny-model" in what
    assert dtype in what
    assert device == CPU


def test_a_model_too_large_for_memory_is_refused_before_it_is_allocated(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    free_memory(monkeypatch, 1000)
    message = refusal(load, tiny, device="cpu")
    assert "memory" in message
    assert "tiny-model" in message
    assert "float32" in message
    free_memory(monkeypatch, 10**9)
    load(tiny, device="cpu")


def test_a_hub_model_too_large_for_memory_goes_by_its_name(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    """A snapshot's folder is named by a hash, which tells nobody anything."""
    snapshot = make_folder(tmp_path / "0123456789abcdef0123456789abcdef01234567", TINY, make_tensors(TINY))
    Hub(monkeypatch, snapshot)
    free_memory(monkeypatch, 1000)
    assert "tiny-model" in refusal(load, "someone/tiny-model", device="cpu")


def ask(nbytes: float, device: str, error: BaseException | None = None) -> str:
    with allocating(int(nbytes), "the attention cache", torch.device(device)):
        if error:
            raise error
    return "had"


def test_free_memory_is_asked_for_beforehand_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    free_memory(monkeypatch, 3_000_000_000)
    message = refusal(ask, 12.34e9, "cpu")
    for part in ("out of memory", "cpu", "the attention cache", "12.34 GB", "3.00 GB"):
        assert part in message
    assert ask(3_000_000_000, "cpu") == "had"
    assert "3.00 GB" in refusal(ask, 3_000_000_001, "cpu")
    assert ask(12.34e9, "cuda:0") == "had"  # its memory is another's


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.3 GiB.\nGPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80000000000 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9 GB)."),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_out_of_memory_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, device: str, error: BaseException):
    free_memory(monkeypatch, 10**12)
    message = refusal(ask, 9.99e9, device, error)
    for part in ("out of memory", device, "the attention cache", "9.99 GB"):
        assert part in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        NotImplementedError("no such kernel"),
        ValueError("not enough memory of last summer"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_other_errors_pass_unchanged(error: BaseException):
    with pytest.raises(type(error)) as caught:
        ask(1, "cuda", error)
    assert caught.value is error
