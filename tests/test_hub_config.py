"""config.json and generation_config.json: the right numbers come out, or one line says why not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hub_files import MOE, TINY, make_folder, make_tensors, refusal, without, write_json
from transformers import AutoConfig

from minihogwild import Config, Rope, Sampling, load
from minihogwild.hub import config_json
from minihogwild.hub.config_json import parse_config

# ---- config.json


def sparse_layers(config: Config) -> tuple[int, ...]:
    return tuple(number for number, kind in enumerate(config.layer_kinds) if kind.experts)


YARN = {"type": "yarn", "factor": 4.0}


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


def test_rope_scaling_wins_over_rope_parameters():
    """As for transformers: whoever stretches a context by hand adds the older key, as model cards say."""
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 3e4},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 8.0},
    }
    assert parsed_rope(**both) == Rope("linear", 3e4, 2.0)
    assert parsed_rope(**both | {"rope_scaling": {}}) == Rope("yarn", 2e4, 8.0, 512)
    assert parsed_rope(**both | {"rope_scaling": None}) == Rope("yarn", 2e4, 8.0, 512)
    both["rope_scaling"].pop("rope_theta")
    assert parsed_rope(rope_theta=1e4, **both) == Rope("linear", 1e4, 2.0)
    # transformers takes 10,000 here, silently
    message = refusal(parse_config, without(TINY, "rope_theta") | both)
    assert "rope_scaling lacks the rope_theta 20000.0" in message


@pytest.mark.parametrize("forms", [("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters")])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn", "dynamic"])
@pytest.mark.parametrize("theta", ["beside", "inside", "both"])
def test_rope_is_what_transformers_reads(tmp_path, forms, kind, rope_type, theta):
    """Over the forms that config.json may have: type and numbers, and where theta stands."""
    keys = {"linear": {"factor": 4.0}, "dynamic": {"factor": 2.0}, "yarn": {"factor": 4.0}}.get(rope_type, {})
    if rope_type == "llama3":
        keys = ROPES["llama3"][0]
    settings = without(TINY, "rope_theta") | {"model_type": kind, "sliding_window": None}
    for number, form in enumerate(forms):
        inside = {"rope_theta": 1e5 + number} if theta != "beside" else {}
        named = {"rope_type": rope_type} | keys if number == 0 else {"rope_type": "default"}
        settings[form] = named | inside
    if theta != "inside":
        settings["rope_theta"] = 7e4
    write_json(tmp_path / "config.json", settings)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = parse_config(settings).rope
    assert ours.rope_theta == theirs["rope_theta"]
    assert ours.rope_type == ("default" if rope_type == "dynamic" else theirs["rope_type"])
    if rope_type in ("linear", "llama3", "yarn"):
        assert ours.factor == theirs["factor"]


def test_keys_of_yarn_that_transformers_ignores_with_a_warning(caplog):
    extra = {"attn_factor": 1.0, "finetuned": True}
    assert parsed_rope(rope_scaling=YARN | extra) == parsed_rope(rope_scaling=YARN)
    [line] = caplog.messages
    assert "attn_factor, finetuned" in line


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
    assert context(512, type="linear", factor=4.0) == 2048
    assert context(512, type="dynamic", factor=4.0) == 512  # beyond, its keys would have to be rotated anew
    # Llama 3.1's is already the long one
    assert context(1024, rope_type="llama3", **ROPES["llama3"][0]) == 1024  # 8 times 256 is more


def test_another_word_for_the_context():
    """Vicuna's: the length to which the factor stretches the model; in Llama 1 simply the same number."""
    vicuna = {"max_position_embeddings": 256, "max_sequence_length": 1024}
    assert parse_config(TINY | vicuna | {"rope_scaling": {"type": "linear", "factor": 4.0}}).context == 1024
    assert parse_config(TINY | vicuna | {"rope_scaling": {"type": "linear", "factor": 2.0}}).context == 512
    assert parse_config(TINY | vicuna).context == 256
    assert parse_config(TINY | {"max_position_embeddings": 512, "max_sequence_length": 300}).context == 300


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
        assert sparse_layers(ours) == (0, 1)
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


LONG = {"max_position_embeddings": 8192}
REFUSED = {
    "model type": (
        {"model_type": "gemma"},
        ["model_type", "'gemma'", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "seed_oss", "smollm3"],
    ),
    "another mixture of experts": ({"model_type": "qwen2_moe"}, ["'qwen2_moe'"]),
    "more experts chosen than there are": (
        MOE | {"num_experts_per_tok": 4},
        ["num_experts_per_tok 4", "num_experts 3"],
    ),
    "no expert chosen": (MOE | {"num_experts_per_tok": 0}, ["num_experts_per_tok", "not 0"]),
    "heads that no computer holds": (
        {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20},
        ["num_attention_heads 1048576", "head_dim 1048576"],
    ),
    "no experts": (MOE | {"num_experts": 0}, ["num_experts", "not 0"]),
    "every 0th layer sparse": (MOE | {"decoder_sparse_step": 0}, ["decoder_sparse_step", "not 0"]),
    "every -1st layer sparse": (MOE | {"decoder_sparse_step": -1}, ["decoder_sparse_step", "not -1"]),
    "experts without a number": (MOE | {"num_experts": "all"}, ["config.json"]),
    "dense layers without a list": (MOE | {"mlp_only_layers": 1}, ["config.json"]),
    "Mistral 7B v0.1": ({"model_type": "mistral", "sliding_window": 64}, ["sliding-window", "64", "512"]),
    "Mistral's silence": ({"model_type": "mistral"} | LONG, ["sliding-window", "4096"]),
    "Qwen's silence": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1} | LONG,
        ["sliding-window", "4096"],
    ),
    "experts with a window": (MOE | {"use_sliding_window": True, "sliding_window": 64}, ["sliding-window"]),
    "bidirectional": ({"is_causal": False}, ["is_causal", "False"]),
    "cross attention": ({"add_cross_attention": True}, ["add_cross_attention"]),
    "no model type": ({"model_type": None}, ["model_type"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "activation, close": ({"hidden_act": "gelu_pytorch_tanh"}, ["hidden_act", "'gelu_pytorch_tanh'"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias"]),
    "rope interleaved": ({"rope_interleaved": True}, ["rope_interleaved"]),
    "sliding window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        ["sliding-window"],
    ),
    "sliding window, layer 28 on": (
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 29},
        ["sliding-window"],
    ),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
    "part of the head rotated": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "the same, newer": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ["partial_rotary_factor"],
    ),
    "the same, older": ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    "rope type su": ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope type", "'su'", "yarn"]),
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
        # a window that no layer has, or that no context outgrows
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
        {"model_type": "mistral", "sliding_window": 512},
        {"model_type": "mistral"},
        # null is silence
        dict.fromkeys(["layer_types", "hidden_act", "mlp_bias", "partial_rotary_factor", "tie_word_embeddings"]),
        dict.fromkeys(["is_causal", "rope_interleaved", "max_sequence_length", "use_mrope", "sliding_window"]),
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
    return config.num_experts, config.num_experts_per_tok, sparse_layers(config)


def test_experts():
    config = parse_config(MOE)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (3, 2, 7)
    assert config.norm_topk_prob is True
    assert experts_of() == (3, 2, (0, 1, 2, 3, 4, 5, 6))
    assert experts_of(decoder_sparse_step=3) == (3, 2, (2, 5))
    assert experts_of(mlp_only_layers=[5, 0, 99]) == (3, 2, (1, 2, 3, 4, 6))
    assert experts_of(decoder_sparse_step=2, mlp_only_layers=[3]) == (3, 2, (1, 5))
    assert experts_of(decoder_sparse_step=None, mlp_only_layers=None) == (3, 2, (0, 1, 2, 3, 4, 5, 6))
    assert sparse_layers(parse_config(TINY)) == ()
    newer = without(MOE, "num_experts") | {"num_local_experts": 5}  # as transformers 5 writes it
    assert parse_config(newer).num_experts == 5


def test_the_form_of_mlx_is_refused_by_its_name():
    message = refusal(parse_config, TINY | {"quantization": {"group_size": 64, "bits": 4}})
    assert "config.json: quantization is MLX's own form, which is not supported" in message


def test_a_silent_activation_is_silu():
    assert parse_config(without(TINY, "hidden_act")) == parse_config(TINY)
    assert parse_config(TINY | {"hidden_act": "swish"}) == parse_config(TINY)  # the same, by another name


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
    folder = loaded(tmp_path, generation, **config).folder
    assert load(folder, device="cpu", with_tokenizer=False).eos == wanted
    # The tokenizer's own ends a text too: fine-tuned on chats, many a model says so there alone.
    assert load(folder, device="cpu").eos == wanted | {258}
    write_json(folder / "tokenizer_config.json", {"eos_token": None})
    assert load(folder, device="cpu").eos == wanted


@pytest.mark.parametrize("wrong", [True, [256, True], "258", 258.0, [[258]]], ids=str)
def test_what_is_no_end_of_sequence_id(tmp_path: Path, wrong: object):
    message = refusal(loaded, tmp_path, {"eos_token_id": wrong})
    assert message.startswith("generation_config.json: eos_token_id")
    assert "neither an id nor a list of ids" in message
    assert refusal(loaded, tmp_path, {}, eos_token_id=wrong).startswith("config.json: eos_token_id")


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


# ---- every field of the families' classes

CLASSES = {
    "phi3": "Phi3",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


@pytest.mark.parametrize("family", CLASSES)
def test_each_setting_that_transformers_writes_is_known(family, caplog):
    """Used, of one value alone, or harmless: so a warning is about something that this family does not have."""
    import transformers

    config = getattr(transformers, CLASSES[family] + "Config")()
    settings = {**config.to_dict(), "sliding_window": None}
    parse_config(settings)
    assert caplog.messages == []
    older = transformers.PretrainedConfig().to_dict()
    parse_config({**older, **settings})
    assert caplog.messages == []


def test_a_setting_that_nobody_knows_is_told_once(caplog):
    """It may change the mathematics of a model that is nearly a Llama: no reason to refuse, nor to be silent."""
    parse_config(TINY | {"logit_scale": 0.5, "a\x1b[31m": 1, "_private": 2, "residual_multiplier": None})
    [line] = caplog.messages
    assert line == "config.json: not known, and ignored: a\\x1b[31m, logit_scale"


@pytest.mark.parametrize("key", config_json.ONLY_VALUE)
def test_a_setting_of_which_one_value_is_supported(key):
    only = config_json.ONLY_VALUE[key]
    assert parse_config(TINY | {key: only}) == parse_config(TINY | {key: None}) == parse_config(TINY)
    other = not only if isinstance(only, bool) else "another"
    message = refusal(parse_config, TINY | {key: other})
    assert f"{key} {other!r} is not supported, only {only!r}" in message


def test_top_k_of_vllm(tmp_path):
    assert loaded(tmp_path, {"do_sample": True, "top_k": -1}).sampling == Sampling(temperature=1.0, top_k=0)
    assert "top_k" in refusal(loaded, tmp_path, {"do_sample": True, "top_k": -2})


# ---- what three families add


def test_layers_without_rotation():
    def kinds(layers: int, **settings) -> list[bool]:
        config = parse_config(TINY | {"model_type": "smollm3", "num_hidden_layers": layers} | settings)
        return [kind.rope for kind in config.layer_kinds]

    assert kinds(9) == [True, True, True, False] * 2 + [True]
    assert kinds(4, no_rope_layer_interval=2) == [True, False, True, False]
    assert kinds(3, no_rope_layers=[0, 1, 1, 0]) == [False, True, True]  # for more layers than there are
    for wrong in ([1, 0], [1, 0, 2], ["a", 0, 1]):
        message = refusal(
            parse_config, TINY | {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": wrong}
        )
        assert "no_rope_layers must have a 0 or 1 for each of 3 layers" in message


@pytest.mark.parametrize("family", ["phi3", "seed_oss", "smollm3"])
def test_what_they_mean_where_config_json_is_silent(tmp_path, family):
    silent = without(
        TINY, "rms_norm_eps", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "head_dim", "hidden_act"
    )
    silent |= {"model_type": family, "hidden_size": 16}
    write_json(tmp_path / "config.json", silent)
    theirs, ours = AutoConfig.from_pretrained(tmp_path), parse_config(silent)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"sliding_window": 64}, "sliding-window"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "'longrope'"),
        ({"rope_scaling": YARN}, "rope type 'yarn' is not supported in phi3"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "'su'"),
    ],
)
def test_what_phi_3_has_that_we_have_not(change, culprit):
    assert culprit in refusal(parse_config, TINY | {"model_type": "phi3"} | change)
    assert parse_config(TINY | {"model_type": "phi3", "sliding_window": 512}).context == 512
