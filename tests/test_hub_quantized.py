"""Checkpoints in 4 bits, and plain ones that are rounded: every weight is the number that its format says."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hub_files import MOE, TINY, free_memory, make_folder, make_tensors, refusal, sparse, without, write_json
from packed_files import FORMATS, Checkpoint, pack, quantization_config
from util import Engine, relative_difference, step
from util import run as run_schedule

from minihogwild import Weights, load
from minihogwild.hub import checkpoint
from minihogwild.oracle import Oracle
from minihogwild.packed import BlocksOfRows, EightBit, FourBit, Stacked, layout_of_pytorch
from minihogwild.weights import Dense, Matrix

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows that groups of 32 and 64 divide
DENSE = TINY | WIDE
EXPERTS = MOE | WIDE | {"moe_intermediate_size": 32}


def folder_of(path: Path, made: Checkpoint, shards: int = 1) -> Path:
    return make_folder(path, made.config, made.tensors, shards)


def loaded(path: Path, made: Checkpoint, dtype: str = "float32", **options) -> Weights:
    return load(folder_of(path, made), dtype, "cpu", with_tokenizer=False, **options).weights


def exact(matrix: Matrix | torch.Tensor) -> torch.Tensor:
    return matrix.double() if isinstance(matrix, torch.Tensor) else matrix.float64()


def assert_means(weights: Weights, meant: dict[str, torch.Tensor], config: dict) -> None:
    """Every matrix, in float64, is what a plain checkpoint of these numbers would hold."""
    below = lambda names: torch.cat([meant[name] for name in names])  # noqa: E731
    assert torch.equal(exact(weights.embed), meant["model.embed_tokens.weight"])
    if not config["tie_word_embeddings"]:
        assert torch.equal(exact(weights.head), meant["lm_head.weight"])
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        assert torch.equal(exact(layer.qkv), below(f"{at}self_attn.{part}_proj.weight" for part in "qkv"))
        assert torch.equal(exact(layer.out), meant[at + "self_attn.o_proj.weight"])
        mlps = [f"{at}mlp."]
        if sparse(config, i):
            assert torch.equal(exact(layer.router), meant[at + "mlp.gate.weight"])
            mlps = [f"{at}mlp.experts.{expert}." for expert in range(config["num_experts"])]
        gate_up = [below(f"{mlp}{part}_proj.weight" for part in ("gate", "up")) for mlp in mlps]
        down = [meant[f"{mlp}down_proj.weight"] for mlp in mlps]
        if not sparse(config, i):
            assert torch.equal(exact(layer.gate_up), gate_up[0])
            assert torch.equal(exact(layer.down), down[0])
        else:
            assert torch.equal(exact(layer.gate_up), torch.stack(gate_up))
            assert torch.equal(exact(layer.down), torch.stack(down))


def with_quantization(kind: str, **changes) -> dict:
    settings = quantization_config(kind, 32)
    for key, value in changes.items():
        if (
            key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder")
            and "config_groups" in settings
        ):
            settings["config_groups"]["group_0"]["weights"][key] = value
        elif key == "input_activations":
            settings["config_groups"]["group_0"][key] = value
        else:
            settings[key] = value
    return {"quantization_config": settings}


def groups_like(**groups: dict) -> dict:
    """config_groups, of which each has these changes."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return {name: {"weights": weights | changes} for name, changes in groups.items()}


# ---- the formats


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_each_format_means_its_numbers(tmp_path, shape, kind, group):
    if shape is EXPERTS and group == 64:
        shape = shape | {"moe_intermediate_size": 64}
    made = pack(shape, kind, group)
    weights = loaded(tmp_path, made)
    assert_means(weights, made.meant, shape)
    assert isinstance(weights.layers[0].qkv, FourBit)
    assert isinstance(weights.layers[1].down, FourBit)
    assert isinstance(weights.head, Dense)


@pytest.mark.parametrize("kind", ["awq", "gptq", "symmetric"])
def test_groups_of_128_and_scales_in_bfloat16(tmp_path, kind):
    shape = DENSE | {"hidden_size": 128, "head_dim": 32}
    made = pack(shape, kind, 128, dtype=torch.bfloat16)
    weights = loaded(tmp_path, made, "bfloat16")
    for name in made.tensors.keys() & made.meant.keys():  # what is plain is in the model's dtype
        made.meant[name] = made.meant[name].bfloat16().double()
    assert_means(weights, made.meant, shape)
    assert weights.layers[0].qkv.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "biases", "qk_norms"),
    [
        ("llama", False, False),
        ("mistral", False, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
        ("seed_oss", True, False),
        ("smollm3", False, False),
    ],
)
@pytest.mark.parametrize("kind", ["awq", "gptq", "asymmetric"])
def test_each_family(tmp_path, family, biases, qk_norms, kind):
    shape = DENSE | {"model_type": family, "sliding_window": None, "tie_word_embeddings": family == "qwen3"}
    made = pack(shape, kind, 32, biases=biases, qk_norms=qk_norms)
    weights = loaded(tmp_path, made)
    assert_means(weights, made.meant, shape)
    assert (weights.layers[0].qkv_bias is not None) == biases
    assert (weights.layers[0].q_norm is not None) == qk_norms


@pytest.mark.parametrize("kind", FORMATS)
def test_fused_modules(tmp_path, kind):
    """Phi-3's: q, k and v are packed as one, as are gate and up."""
    made = pack(DENSE | {"model_type": "phi3"}, kind, 32)
    weights = loaded(tmp_path, made)
    for i, layer in enumerate(weights.layers):
        assert torch.equal(exact(layer.qkv), made.meant[f"model.layers.{i}.self_attn.qkv_proj.weight"])
        assert torch.equal(exact(layer.gate_up), made.meant[f"model.layers.{i}.mlp.gate_up_proj.weight"])
        assert torch.equal(exact(layer.down), made.meant[f"model.layers.{i}.mlp.down_proj.weight"])
        assert isinstance(layer.qkv, FourBit)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("plain", ["k_proj", "layers.0.", "up_proj", "o_proj", "self_attn"])
def test_what_is_not_converted_is_read_as_it_is(tmp_path, kind, plain):
    """modules_to_not_convert, or ignore: the files tell which modules these are."""
    made = pack(DENSE, kind, 32, keep=("lm_head", plain))
    weights = loaded(tmp_path, made)
    assert_means(weights, made.meant, DENSE)
    if plain in ("k_proj", "up_proj"):
        field = "qkv" if plain == "k_proj" else "gate_up"
        assert isinstance(getattr(weights.layers[0], field), Stacked)


def test_a_packed_head(tmp_path):
    made = pack(DENSE | {"vocab_size": 264}, "asymmetric", 32, keep=())
    weights = loaded(tmp_path, made)
    assert isinstance(weights.head, FourBit)
    assert_means(weights, made.meant, made.config)


def test_the_newer_key_for_the_format_of_gptq(tmp_path):
    made = pack(DENSE, "gptq_v2", 32)
    settings = made.config["quantization_config"]
    settings["format"] = settings.pop("checkpoint_format")
    assert_means(loaded(tmp_path, made), made.meant, DENSE)


NO_DIFFERENCE = {
    "awq, all keys": with_quantization(
        "awq", format="gemm", checkpoint_format="gemm", method="awq", pack_dtype="int32"
    ),
    "awq, in capitals": with_quantization("awq", version="GEMM"),
    "gptq, all keys": with_quantization("gptq", format="gptq", method="gptq", pack_dtype="int32"),
    "gptq, some modules left": with_quantization("gptq", dynamic={"-:.*up_proj": {}, "-:.*gate.*": {"bits": 8}}),
    "weights ordered while they were made": with_quantization("symmetric", actorder="weight"),
    "the same, by its other name": with_quantization("symmetric", actorder="static"),
    "no order": with_quantization("symmetric", actorder=False),
    "groups made in two ways": with_quantization(
        "symmetric", config_groups=groups_like(a={"observer": "mse"}, b={"observer": "minmax", "actorder": None})
    ),
    "groups of which one says the default": with_quantization(
        "symmetric", config_groups=groups_like(a={}, b={"symmetric": True, "dynamic": False})
    ),
}


@pytest.mark.parametrize("what", NO_DIFFERENCE)
def test_settings_that_say_the_same(tmp_path, what):
    change = NO_DIFFERENCE[what]
    kind = change["quantization_config"]["quant_method"]
    made = pack(DENSE, "symmetric" if kind == "compressed-tensors" else kind, 32, keep=("lm_head", "up_proj"))
    made.config |= change
    assert_means(loaded(tmp_path, made), made.meant, DENSE)


def test_the_older_key_for_compressed_tensors(tmp_path):
    made = pack(DENSE, "symmetric", 32)
    made.config["compression_config"] = made.config.pop("quantization_config")
    assert_means(loaded(tmp_path, made), made.meant, DENSE)


def test_shards(tmp_path):
    made = pack(EXPERTS, "awq", 32)
    weights = load(folder_of(tmp_path, made, shards=3), "float32", "cpu").weights
    assert_means(weights, made.meant, EXPERTS)


def test_biases_of_zeros_that_some_writers_add(tmp_path):
    made = pack(DENSE, "gptq", 32)
    made.tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    assert_means(loaded(tmp_path / "zeros", made), made.meant, DENSE)
    made.tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)
    message = refusal(loaded, tmp_path / "ones", made)
    assert "lacks model.layers.1.self_attn.o_proj.bias" in message  # they are no zeros: so all layers need theirs


@pytest.mark.parametrize("module", ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate"])
def test_a_bias_that_no_model_has_may_be_of_zeros(tmp_path, module):
    made = pack(DENSE, "gptq", 32)
    made.tensors[module + ".bias"] = torch.zeros(8)
    assert_means(loaded(tmp_path / "zeros", made), made.meant, DENSE)
    made.tensors[module + ".bias"][3] = 1
    assert f"does not know: {module}.bias" in refusal(loaded, tmp_path / "ones", made)


@pytest.mark.parametrize("zero", ["q_proj", "k_proj", "layers.1."])
def test_a_bias_that_the_model_has_may_be_of_zeros(tmp_path, zero):
    shape = DENSE | {"model_type": "qwen2"}
    made = pack(shape, "gptq", 32, biases=True)
    for name, tensor in made.tensors.items():
        if name.endswith(".bias") and zero in name:
            tensor.zero_()
    weights = loaded(tmp_path, made)
    for i, layer in enumerate(weights.layers):
        biases = [made.tensors[f"model.layers.{i}.self_attn.{part}_proj.bias"] for part in "qkv"]
        assert torch.equal(layer.qkv_bias, torch.cat(biases))


# ---- the engine with them


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-4)])
@pytest.mark.parametrize("kind", ["awq", "gptq", "asymmetric"])
@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_engine_equals_oracle(tmp_path, shape, kind, dtype, tolerance):
    made = pack(shape, kind, 32)
    model = load(folder_of(tmp_path, made), dtype, "cpu", with_tokenizer=False)
    alice, bob = ["p", "b", "a"], ["p", "a", "b"]
    events = [step((["p"], [*range(40)]))]
    events += [step((alice, [n, n + 1]), (bob, [n + 2])) for n in range(5)]
    events += [{"do": "move", "from": "a", "to": "p"}, step((alice, [3]), (bob, [4]))]
    ours = run_schedule(Engine(model.config, model.weights, ["p", "a", "b"]), events)
    theirs = run_schedule(Oracle(model.config, model.weights, ["p", "a", "b"]), events)
    assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= tolerance


# ---- refusals


TWO_GROUPS = groups_like(a={}, b={"group_size": 64})
REFUSED = {
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
    "no method": ({"quantization_config": {"bits": 4}}, "quant_method None"),
    "no text": ({"quantization_config": {"quant_method": ["awq"]}}, "quant_method ['awq']"),
    "awq of 8 bits": (with_quantization("awq", bits=8), "bits 8"),
    "awq of a text": (with_quantization("awq", bits="4"), "bits '4'"),
    "awq's other version": (with_quantization("awq", version="gemv"), "version 'gemv'"),
    "awq without zero points": (with_quantization("awq", zero_point=False), "zero_point False"),
    "awq by the newer key": (with_quantization("awq", format="gemv_fast"), "format 'gemv_fast'"),
    "awq by another key": (with_quantization("awq", checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "awq, made as gptq": (with_quantization("awq", method="gptq"), "method 'gptq'"),
    "awq, by module": (with_quantization("awq", dynamic={"+:.*": {"bits": 8}}), "dynamic"),
    "awq, no group": (with_quantization("awq", group_size=None), "group_size"),
    "awq, group 0": (with_quantization("awq", group_size=0), "group_size"),
    "gptq of 3 bits": (with_quantization("gptq", bits=3), "bits 3"),
    "gptq for marlin": (with_quantization("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "gptq, marlin of old": (with_quantization("gptq", is_marlin_format=True), "is_marlin_format True"),
    "gptq, by module": (with_quantization("gptq", dynamic={"+:.*": {"bits": 8}}), "dynamic"),
    "gptq, some by module": (with_quantization("gptq", dynamic={"-:.*up.*": {}, ".*": {"bits": 8}}), "dynamic '.*'"),
    "gptq, a list of modules": (with_quantization("gptq", dynamic=["-:.*"]), "dynamic must be an object"),
    "gptq, made as qqq": (with_quantization("gptq", method="qqq"), "method 'qqq'"),
    "gptq in long words": (with_quantization("gptq", pack_dtype="int64"), "pack_dtype 'int64'"),
    "not packed": (with_quantization("symmetric", format="float-quantized"), "format 'float-quantized'"),
    "of 8 bits": (with_quantization("symmetric", num_bits=8), "num_bits 8"),
    "rotated": (with_quantization("symmetric", transform_config={"config_groups": {"R4": {}}}), "transform_config"),
    "gptq by the newer key": (with_quantization("gptq", checkpoint_format=None, format="marlin"), "'marlin'"),
    "gptq, two formats": (with_quantization("gptq", format="gptq_v2"), "contradicts"),
    "of floats": (with_quantization("symmetric", type="float"), "type 'float'"),
    "activations too": (with_quantization("symmetric", input_activations={"num_bits": 8}), "input_activations"),
    "inputs in another order": (with_quantization("symmetric", actorder="group"), "actorder 'group'"),
    "inputs in another order, by its other name": (with_quantization("symmetric", actorder="dynamic"), "'dynamic'"),
    "inputs in another order, as of old": (with_quantization("symmetric", actorder=True), "actorder True"),
    "by block": (with_quantization("symmetric", strategy="block"), "strategy 'block'"),
    "sparse": (with_quantization("symmetric", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "a cache in 8 bits": (with_quantization("symmetric", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "two schemes": (with_quantization("symmetric", config_groups=TWO_GROUPS), "config_groups that differ"),
    "packed, by its older name": ({"compression_config": {"quant_method": "fp8"}}, "'fp8'"),
    "no scheme": (with_quantization("symmetric", config_groups={}), "config_groups"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, what):
    """By config.json alone: no other file is there."""
    change, named = REFUSED[what]
    [key] = change
    write_json(tmp_path / "config.json", TINY | change)
    message = refusal(load, tmp_path, device="cpu")
    assert message.startswith(f"config.json: {key}: ")
    assert named in message


def spoilt(tmp_path: Path, kind: str, change, shape: dict = DENSE, **options) -> str:
    made = pack(shape, kind, 32, **options)
    change(made.tensors)
    return refusal(loaded, tmp_path, made)


AT = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("kind", "name"),
    [("awq", "qweight"), ("awq", "scales"), ("awq", "qzeros"), ("gptq", "g_idx"), ("symmetric", "weight_scale"),
     ("symmetric", "weight_packed"), ("asymmetric", "weight_zero_point"), ("asymmetric", "weight_shape")],
)  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path, kind, name):
    assert spoilt(tmp_path, kind, lambda tensors: tensors.pop(AT + name)).endswith(f"lacks {AT}{name}")


@pytest.mark.parametrize(("kind", "name"), [("awq", "qweight"), ("gptq", "qzeros"), ("symmetric", "weight_packed")])
def test_a_misshapen_tensor_is_named(tmp_path, kind, name):
    def cut(tensors):
        tensors[AT + name] = tensors[AT + name][:-1].clone()

    message = spoilt(tmp_path, kind, cut)
    assert f"{AT}{name} has shape" in message


@pytest.mark.parametrize(
    ("name", "dtype"), [("qweight", torch.int64), ("scales", torch.int32), ("qzeros", torch.float16)]
)
def test_a_tensor_of_another_dtype_is_named(tmp_path, name, dtype):
    def turn(tensors):
        tensors[AT + name] = tensors[AT + name].to(dtype)

    message = spoilt(tmp_path, "awq", turn)
    assert f"model.safetensors: {AT}{name} is " in message


def test_both_packed_and_plain(tmp_path):
    message = spoilt(tmp_path, "awq", lambda tensors: tensors.update({AT + "weight": torch.ones(64, 64)}))
    assert f"not know: {AT}qweight, {AT}qzeros, {AT}scales" in message


def test_inputs_in_another_order(tmp_path):
    def shuffle(tensors):
        tensors[AT + "g_idx"] = tensors[AT + "g_idx"].flip(0).contiguous()

    message = spoilt(tmp_path, "gptq", shuffle)
    assert f"{AT}g_idx: desc_act" in message


def test_inputs_in_another_order_are_seen_before_memory_is_asked_for(tmp_path, monkeypatch):
    free_memory(monkeypatch, 10)
    test_inputs_in_another_order(tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "name"), [("awq", "scales"), ("gptq", "scales"), ("symmetric", "weight_scale")])
def test_a_scale_that_is_no_number(tmp_path, kind, name, wrong):
    def spoil(tensors):
        tensors[AT + name][1, 1] = wrong

    message = spoilt(tmp_path, kind, spoil)
    assert message.startswith(f"model.safetensors: {AT}{name}: ")
    assert "NaN or infinite" in message


def test_a_shape_that_says_otherwise(tmp_path):
    def lie(tensors):
        tensors[AT + "weight_shape"] = torch.tensor([64, 63])

    assert f"{AT}weight_shape: it says [64, 63], not [64, 64]" in spoilt(tmp_path, "symmetric", lie)


@pytest.mark.parametrize("kind", ["awq", "gptq", "symmetric"])
def test_groups_that_do_not_divide_a_row(tmp_path, kind):
    made = pack(DENSE, kind, 32)
    made.config |= {"quantization_config": quantization_config(kind, 48)}
    message = refusal(loaded, tmp_path, made)
    assert "q_proj: 64 inputs are no multiple of the group size 48" in message


def test_outputs_that_fill_no_words(tmp_path):
    made = pack(DENSE, "awq", 32)
    made.config |= {"num_key_value_heads": 1, "num_attention_heads": 1, "head_dim": 6}
    assert "q_proj: 6 outputs are no multiple of 8" in refusal(loaded, tmp_path, made)


def test_experts_of_both_kinds(tmp_path):
    message = spoilt(tmp_path, "awq", lambda tensors: None, EXPERTS, keep=("lm_head", "mlp.gate.", "experts.1."))
    assert "experts of one layer that are packed, and others that are not" in message


def test_a_plain_checkpoint_that_claims_to_be_packed(tmp_path):
    """Every module is plain, as if none had been converted: nothing contradicts that."""
    made = Checkpoint(DENSE | {"quantization_config": quantization_config("awq", 32)}, make_tensors(DENSE))
    made.meant = {name: tensor.double() for name, tensor in made.tensors.items()}
    assert_means(loaded(tmp_path, made), made.meant, DENSE)


@pytest.mark.parametrize("quantize", [None, 8])
@pytest.mark.parametrize(("kind", "name"), [("awq", "qweight"), ("gptq", "qweight"), ("symmetric", "weight_packed")])
def test_a_packed_checkpoint_that_claims_to_be_plain(tmp_path, kind, name, quantize):
    """Its settings may be in quantize_config.json alone."""
    made = pack(DENSE, kind, 32)
    made.config = without(made.config, "quantization_config")
    message = refusal(loaded, tmp_path, made, quantize=quantize)
    assert f"model.layers.0.mlp.down_proj.{name} is packed, and no quantization_config in config.json" in message


@pytest.mark.parametrize("kind", ["awq", "gptq", "symmetric"])
def test_a_packed_router(tmp_path, kind):
    shape = EXPERTS | {"num_experts": 8}
    message = refusal(loaded, tmp_path, pack(shape, kind, 32, keep=("lm_head",)))
    assert message.startswith("model.safetensors: model.layers.1.mlp.gate.")
    assert "packed, which this module must not be" in message


def test_a_packed_embedding(tmp_path):
    made = pack(DENSE | {"vocab_size": 264}, "symmetric", 32, keep=())
    made.tensors["model.embed_tokens.weight_packed"] = made.tensors["lm_head.weight_packed"].clone()
    del made.tensors["model.embed_tokens.weight"]
    message = refusal(loaded, tmp_path, made)
    assert message.startswith("model.safetensors: model.embed_tokens.weight_packed: packed, which this module must not")


def test_a_packed_head_of_a_tied_model(tmp_path):
    made = pack(DENSE | {"vocab_size": 264}, "gptq", 32, keep=())
    made.config["tie_word_embeddings"] = True
    message = refusal(loaded, tmp_path, made)
    assert message.startswith(
        "model.safetensors: lm_head.qweight: packed, a head of its own, but config.json's tie_word"
    )


AUTO_GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False, "sym": True, "model_name": None}
AUTO_AWQ = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
IN_A_FILE = {  # by the format: the file that older writers have, and what stands in it
    "gptq": [("quantize_config.json", AUTO_GPTQ), ("quantize_config.json", AUTO_GPTQ | {"quant_method": "gptq"})],
    "awq": [
        ("quant_config.json", AUTO_AWQ),
        ("quantize_config.json", {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    ],
}


@pytest.mark.parametrize(("kind", "n"), [("gptq", 0), ("gptq", 1), ("awq", 0), ("awq", 1)])
def test_a_format_in_a_file_of_its_own(tmp_path, kind, n):
    """As AutoGPTQ and AutoAWQ wrote it before transformers read their formats."""
    name, given = IN_A_FILE[kind][n]
    made = pack(DENSE, kind, 32)
    wrong = quantization_config(kind, 64)
    made.config = without(made.config, "quantization_config")
    write_json(tmp_path / name, given)
    assert_means(loaded(tmp_path, made), made.meant, DENSE)
    write_json(tmp_path / name, given | ({"w_bit": 3} if "w_bit" in given else {"bits": 3}))
    assert refusal(loaded, tmp_path, made).startswith(f"{tmp_path / name}: bits 3 is not supported")
    write_json(tmp_path / name, given | {"quant_method": "hqq"})
    assert "quant_method 'hqq' is not supported" in refusal(loaded, tmp_path, made)
    write_json(tmp_path / name, wrong)  # where config.json says it too, that counts
    made.config["quantization_config"] = quantization_config(kind, 32)
    assert_means(loaded(tmp_path, made), made.meant, DENSE)


# ---- rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_as_near_as_can_be(tmp_path, shape, bits, dtype):
    """Half a step from the numbers they come from, but for what the scale's own rounding and the zero point's take."""
    tensors = make_tensors(shape)
    folder = make_folder(tmp_path, shape, tensors)
    rounded = load(folder, dtype, "cpu", quantize=bits).weights
    plain = load(folder, "float32", "cpu").weights
    for ours, theirs in zip(rounded.layers, plain.layers):
        for name in ("qkv", "out", "gate_up", "down"):
            matrix, right = getattr(ours, name), getattr(theirs, name).float64()
            assert isinstance(matrix, EightBit if bits == 8 else FourBit)
            E = right.shape[-1]
            columns = E if bits == 8 else next(group for group in (128, 64, 32) if E % group == 0)
            groups = right.unflatten(-1, (-1, columns))
            span = (
                groups.abs().amax(-1, keepdim=True) * 2 if bits == 8 else groups.amax(-1, True) - groups.amin(-1, True)
            )
            steps = (matrix.float64().unflatten(-1, (-1, columns)) - groups).abs() / (span / (2**bits - 1))
            assert steps.max() < 1.07, (name, steps.max())
            assert steps.mean() < 0.27, (name, steps.mean())
    assert isinstance(rounded.head, EightBit)
    assert torch.equal(rounded.embed, plain.embed.to(rounded.embed.dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_rounded(tmp_path, bits, wrong):
    tensors = make_tensors(DENSE, dtype=torch.float16)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = wrong
    message = refusal(load, make_folder(tmp_path, DENSE, tensors), device="cpu", quantize=bits)
    assert message.startswith("model.safetensors: model.layers.1.mlp.up_proj.weight: ")
    assert "NaN or infinite" in message


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_of_a_tied_model_is_rounded_and_its_embedding_is_not(tmp_path, bits):
    shape = DENSE | {"tie_word_embeddings": True}
    weights = load(make_folder(tmp_path, shape, make_tensors(shape)), "float32", "cpu", quantize=bits).weights
    assert isinstance(weights.head, EightBit)
    assert torch.equal(weights.embed, make_tensors(shape)["model.embed_tokens.weight"])
    assert (weights.head.float64() - weights.embed.double()).abs().max() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits, tmp_path):
    tensors = make_tensors(DENSE)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    tensors["model.layers.1.mlp.down_proj.weight"][5] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][6] = 0.5
    weights = load(make_folder(tmp_path, DENSE, tensors), "bfloat16", "cpu", quantize=bits).weights
    assert not weights.layers[0].qkv.float64()[:64].any()
    assert not weights.layers[1].down.float64()[5].any()
    assert (weights.layers[1].down.float64()[6] - 0.5).abs().max() < 0.003


def test_a_row_that_no_group_divides(tmp_path):
    message = refusal(load, make_folder(tmp_path, TINY, make_tensors(TINY)), device="cpu", quantize=4)
    assert "4 bits: model.layers.0.self_attn.q_proj.weight has rows of 12 numbers, no multiple of 32" in message
    load(tmp_path, device="cpu", quantize=8)


def test_what_is_packed_is_not_rounded_again(tmp_path):
    message = refusal(loaded, tmp_path, pack(DENSE, "gptq", 32), quantize=8)
    assert "--quantize 8: the checkpoint is packed already (GPTQ, 4 bits)" in message


# ---- memory


def test_no_moment_at_which_a_model_lies_there_unpacked(tmp_path, monkeypatch):
    """Of what has been read from the files, nothing is still there when the next tensor is read."""
    made = pack(DENSE | {"num_hidden_layers": 20}, "awq", 32)
    folder = folder_of(tmp_path, made)
    read, before, most = checkpoint.Stored.read, [], 0

    def watched(stored):
        nonlocal before, most
        before = [reference for reference in before if reference() is not None]
        most = max(most, len(before))
        tensor = read(stored)
        before.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint.Stored, "read", watched)
    weights = load(folder, "float32", "cpu", with_tokenizer=False).weights
    assert most == 0
    plain = sum(tensor.numel() for name, tensor in made.meant.items() if ".layers." in name)
    packed = sum(layer.nbytes for layer in weights.layers)
    assert packed < 0.65 * plain  # bytes: half of one for each weight, and for 32 of them a scale and a zero point


def test_memory_is_asked_for_as_packed(tmp_path, monkeypatch):
    made = pack(DENSE, "awq", 32)
    folder = folder_of(tmp_path, made)
    free_memory(monkeypatch, 10)
    message = refusal(load, folder, "float32", "cpu")
    assert "weights in 4 bits (AWQ) needs" in message


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("keep", [("lm_head", "mlp.gate."), ("lm_head", "mlp.gate.", "k_proj")], ids=["all", "some"])
@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_what_the_products_prepare_is_asked_for_too(tmp_path, monkeypatch, shape, keep, dtype):
    asked = []
    monkeypatch.setattr(checkpoint, "allocating", lambda nbytes, what, device: asked.append(nbytes) or nullcontext())
    weights = loaded(tmp_path, pack(shape, "awq", 32, keep=keep), dtype)
    matrices = [getattr(layer, name) for layer in weights.layers for name in ("qkv", "out", "gate_up", "down")]
    parts = [part for matrix in matrices for part in getattr(matrix, "parts", [matrix]) if isinstance(part, FourBit)]
    parts = [expert for part in parts for expert in (part.experts if part.scale.dim() == 3 else [part])]
    for part in parts:
        part.times(torch.ones(1, part.shape[1], dtype=weights.embed.dtype))
    prepared = [part.scales_and_shifts.nbytes for part in parts if part.scales_and_shifts is not None]
    assert bool(prepared) == (dtype != "float64" and isinstance(layout_of_pytorch(), BlocksOfRows))
    assert asked == [weights.nbytes + sum(prepared)]


# ---- what it is computed in


@pytest.mark.parametrize(
    ("stored", "computed"), [("float16", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_on_a_cpu_fewer_bits_are_multiplied_in_bfloat16_where_the_model_says_float16(tmp_path, stored, computed):
    made = pack(DENSE | {"torch_dtype": stored}, "awq", 32)
    folder = folder_of(tmp_path / "packed", made)
    assert load(folder, device="cpu").dtype == getattr(torch, computed)
    assert load(folder, "float16", device="cpu").dtype == torch.float16  # whoever asks for it gets it
    plain = make_folder(tmp_path / "plain", DENSE | {"torch_dtype": stored}, make_tensors(DENSE))
    assert load(plain, device="cpu", quantize=8).dtype == getattr(torch, computed)
    assert load(plain, device="cpu").dtype == getattr(torch, stored)
