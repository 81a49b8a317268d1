"""safetensors files: every number goes where forward() will look for it, or one line says which tensor is wrong."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hub_files import (
    BROKEN_JSON,
    CPU,
    MOE,
    TINY,
    assert_holds,
    make_folder,
    make_tensors,
    refusal,
    split,
    without,
    write_json,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minihogwild import load
from minihogwild.hub import checkpoint
from minihogwild.hub.checkpoint import load_weights
from minihogwild.hub.config_json import parse_config
from minihogwild.weights import Dense


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with nothing wrong."""
    return make_folder(tmp_path / "tiny-model", TINY, make_tensors(TINY))


# ---- one file or several


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


def test_an_index_that_was_left_beside_a_whole_file(tmp_path: Path):
    """Saved once more, in one piece: transformers takes that piece."""
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards=3)
    for path in folder.glob("model-*"):
        path.unlink()
    make_folder(tmp_path, TINY, make_tensors(TINY))
    assert (folder / "model.safetensors.index.json").exists()
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
    assert (weights.head.tensor is weights.embed) == config["tie_word_embeddings"]


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


def fused(saved: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """As transformers holds experts, and may save them: all of a layer's in one tensor, gate above up."""
    tensors = {name: tensor for name, tensor in saved.items() if ".experts." not in name}
    every = range(config["num_experts"])
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp.experts."
        part = lambda x, name, at=at: saved[f"{at}{x}.{name}_proj.weight"]  # noqa: E731
        if f"{at}0.up_proj.weight" in saved:
            gate_up = [torch.cat([part(x, "gate"), part(x, "up")]) for x in every]
            tensors[at + "gate_up_proj"] = torch.stack(gate_up)
            tensors[at + "down_proj"] = torch.stack([part(x, "down") for x in every])
    return tensors


@pytest.mark.parametrize("start", ["", "_orig_mod."])
@pytest.mark.parametrize("quantize", [None, 8])
def test_experts_in_one_tensor(tmp_path: Path, quantize: int | None, start: str):
    saved = make_tensors(MOE, qk_norms=True)
    in_one = {start + name: tensor for name, tensor in fused(saved, MOE).items()}
    assert len(in_one) < len(saved)
    usual, ours = (
        load(make_folder(tmp_path / name, MOE, tensors), device="cpu", quantize=quantize).weights
        for name, tensors in {"usual": saved, "in one": in_one}.items()
    )
    for one, other in zip(usual.layers, ours.layers):
        assert torch.equal(one.gate_up.float64(), other.gate_up.float64())
        assert torch.equal(one.down.float64(), other.down.float64())
    if quantize is None:
        assert_holds(ours, saved, MOE)


@pytest.mark.parametrize("change", [{"num_experts": 2}, {"num_experts": 4}, {"moe_intermediate_size": 8}], ids=str)
def test_experts_in_one_tensor_that_is_not_config_jsons(tmp_path: Path, change: dict):
    message = weights_refused(tmp_path, fused(make_tensors(MOE), MOE), MOE | change)
    assert "mlp.experts." in message


@pytest.mark.parametrize("shape", [(3, 14), (3, 0, 12), (14,)], ids=str)
def test_what_only_has_the_name_of_experts_in_one(tmp_path: Path, shape: tuple):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    message = weights_refused(tmp_path, make_tensors(MOE) | {name: torch.zeros(shape)}, MOE)
    assert f"not know: {name}" in message


# ---- tied embeddings, and what is in checkpoints but is no parameter

TIED = TINY | {"tie_word_embeddings": True}


def test_tied_embeddings_are_one_tensor(tmp_path: Path):
    weights = load(make_folder(tmp_path, TIED, make_tensors(TIED)), device="cpu").weights
    assert weights.head.tensor is weights.embed
    assert_holds(weights, make_tensors(TIED), TIED)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_with_the_same_head_saved_too(tmp_path: Path, shards: int, dtype: str):
    saved = make_tensors(TIED)
    head = saved["model.embed_tokens.weight"].clone()
    folder = make_folder(tmp_path, TIED, saved | {"lm_head.weight": head}, shards)
    weights = load(folder, dtype=dtype, device="cpu").weights
    assert weights.head.tensor is weights.embed
    assert_holds(weights, saved, TIED, getattr(torch, dtype))


@pytest.mark.parametrize("shards", [1, 3])
def test_tied_and_stored_under_the_heads_name(tmp_path: Path, shards: int):
    """So does safetensors' save_model: of two names it keeps the first in the alphabet."""
    saved = make_tensors(TIED)
    moved = without(saved, "model.embed_tokens.weight") | {"lm_head.weight": saved["model.embed_tokens.weight"]}
    weights = load(make_folder(tmp_path, TIED, moved, shards), device="cpu").weights
    assert weights.head.tensor is weights.embed
    assert_holds(weights, saved, TIED)
    moved["lm_head.weight"] = moved["lm_head.weight"][:-1].clone()
    assert "has shape [259, 12], not [260, 12]" in refusal(
        load, make_folder(tmp_path, TIED, moved, shards), device="cpu"
    )


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
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
             "model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.rotary_emb.sin_cached"]
)  # fmt: skip
def test_saved_rotations_are_ignored(tmp_path: Path, shards: int, name: str):
    """Llama 2 has their frequencies, ColossalAI saves their cosines too: they follow from config.json."""
    saved = make_tensors(TINY)
    folder = make_folder(tmp_path, TINY, {name: torch.ones(3)} | saved, shards)
    assert_holds(load(folder, device="cpu").weights, saved, TINY)


# ---- names and shapes


def rewrapped(name: str) -> str:
    """As FSDP and torch.compile name what they wrap: each layer by itself, and the whole."""
    whole = name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.")
    return "_orig_mod." + whole


RENAMED = {
    "compiled": lambda name: "_orig_mod." + name,
    "layers wrapped": rewrapped,
    "DistributedDataParallel": lambda name: "module." + name,
    "PEFT": lambda name: "base_model.model." + name,
    "without its head": lambda name: name.removeprefix("model."),
    "of a model that sees": lambda name: "language_model." + name,
    "of a model that sees, newer": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("how", RENAMED)
@pytest.mark.parametrize("config", [TINY, TIED, MOE], ids=["llama", "tied", "experts"])
def test_the_same_tensors_under_other_names(tmp_path: Path, config: dict, how: str, shards: int):
    saved = make_tensors(config, biases=True)
    renamed = {RENAMED[how](name): tensor for name, tensor in saved.items()}
    assert renamed.keys() != saved.keys()
    folder = make_folder(tmp_path, without(config, "torch_dtype"), renamed, shards)
    model = load(folder, device="cpu")
    assert_holds(model.weights, saved, config)
    assert model.dtype == torch.float32  # that of its embedding, which has been found


def test_a_tensor_under_both_names_is_refused(tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    twice = make_tensors(TINY) | {"_orig_mod." + name: torch.zeros(20, 12)}
    assert f"{name} stands in model.safetensors too" in weights_refused(tmp_path, twice)


def test_names_of_no_model_stay_what_they_are(tmp_path: Path):
    """Two models in one checkpoint: which is meant?"""
    saved = make_tensors(TINY)
    two = saved | {"draft." + name: tensor.clone() for name, tensor in saved.items()}
    assert "not know: draft.lm_head.weight" in weights_refused(tmp_path, two)


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
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.1.mlp.gate_proj.bias",
        "model.layers.2.input_layernorm.weight",  # one layer more than config.json says
        "model.layers.0.self_attn.rotary_embedding",
        "score.weight",
        "embed_tokens.weight",
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str):
    message = weights_refused(tmp_path, make_tensors(TINY) | {name: torch.zeros(4)})
    assert name in message
    assert "not know" in message


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "weight_scale", "weight_scale_inv", "weight.absmax"])
def test_a_packed_tensor_is_not_simply_unknown(tmp_path: Path, end: str):
    name = f"model.layers.0.self_attn.q_proj.{end}"
    message = weights_refused(tmp_path, make_tensors(TINY) | {name: torch.zeros(4)})
    assert f"{name} is packed, and no quantization_config in config.json says how" in message


@pytest.mark.parametrize("start", ["", "base_model.model."])
def test_an_adapter_that_is_not_merged_is_not_simply_unknown(tmp_path: Path, start: str):
    """A whole PEFT model: each matrix beside what is to be added to it."""
    changed = "model.layers.0.self_attn.q_proj."
    saved = {name.replace(changed, changed + "base_layer."): tensor for name, tensor in make_tensors(TINY).items()}
    saved[changed + "lora_A.default.weight"] = torch.zeros(2, 12)
    message = weights_refused(tmp_path, {start + name: tensor for name, tensor in saved.items()})
    assert f"{changed}base_layer.weight belongs to an adapter that is not merged" in message


def test_a_vocabulary_that_was_resized_in_the_checkpoint_alone(tmp_path: Path):
    message = weights_refused(tmp_path, make_tensors(TINY), TINY | {"vocab_size": 264})
    assert "lm_head.weight has shape [260, 12], not [264, 12] as by config.json" in message


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


# ---- broken files


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


# ---- memory


@pytest.mark.parametrize("shards", [1, 3])
def test_each_tensor_is_read_once_and_let_go_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
):
    """So the peak is the weights and one tensor more, never the weights twice."""
    real, read, alive = checkpoint.safe_open, [], set()

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

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
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
    tensors = [weights.embed, weights.norm, weights.head.tensor]
    for layer in weights.layers:
        fields = [field for field in vars(layer).values() if field is not None]
        tensors += [field.tensor if isinstance(field, Dense) else field for field in fields]
    assert not any(tensor.requires_grad for tensor in tensors)


# ---- what lies there in place of weights


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pointer_of_git_lfs(tmp_path: Path, shards: int):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY), shards)
    path = sorted(folder.glob("model*.safetensors"))[-1]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1234\n")
    message = refusal(load, folder, device="cpu")
    assert f"{path} cannot be read: it is a pointer of Git LFS" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_weights_that_are_no_file(tmp_path: Path, kind: str):
    """Nobody would ever write to that pipe."""
    folder = make_folder(tmp_path, TINY, make_tensors(TINY))
    path = folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    assert "model.safetensors cannot be read: it is not a file" in refusal(load, folder, device="cpu")
