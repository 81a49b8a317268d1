"""config.json and generation_config.json: what is read, what it may be, and what is refused.

A setting that would change the mathematics, and that is not supported, is refused by name.
"""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from ..config import Config, LayerKind, Rope
from ..errors import refusing, require
from ..files import read_json_if_there
from ..sampling import Sampling

logger = logging.getLogger("minihogwild")


# ---- what each setting may be


class Allowed(NamedTuple):
    kind: type
    lowest: float | None = None
    highest: float | None = None


# Far from every model; what follows may count to these numbers, or divide by them.
COUNT = Allowed(int, 1, 2**20)
WIDEST = 2**30  # all heads together: so a matrix has no more bytes than 64 bits count
LENGTH = Allowed(int, 1, 2**31)
NUMBER = Allowed(float, 0, 1e12)
DIVISOR = Allowed(float, 1e-6, 1e12)
SWITCH = Allowed(bool)
TEXT = Allowed(str)
LIST = Allowed(list)
OBJECT = Allowed(dict)

ALLOWED = {
    # config.json
    "model_type": TEXT,
    "dtype": TEXT,
    "torch_dtype": TEXT,
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "rms_norm_eps": NUMBER,
    "max_position_embeddings": LENGTH,
    "max_sequence_length": LENGTH,
    "tie_word_embeddings": SWITCH,
    "use_sliding_window": SWITCH,
    "sliding_window": Allowed(int, 0, 2**31),
    "max_window_layers": Allowed(int, 0, 2**20),
    "layer_types": LIST,
    "quantization_config": OBJECT,  # for quantized.py, as is the next
    "compression_config": OBJECT,
    # about experts
    "num_experts": COUNT,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": COUNT,
    "norm_topk_prob": SWITCH,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": LIST,
    # about rope
    "no_rope_layers": LIST,
    "no_rope_layer_interval": COUNT,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": Allowed(float, 1.01, 1e12),
    "factor": DIVISOR,
    "original_max_position_embeddings": LENGTH,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "attention_factor": NUMBER,
    "mscale": NUMBER,
    "mscale_all_dim": NUMBER,
    "beta_fast": DIVISOR,
    "beta_slow": DIVISOR,
    "truncate": SWITCH,
    # generation_config.json
    "do_sample": SWITCH,
    "temperature": NUMBER,
    "top_k": Allowed(int, -1, 2**31),  # -1 is vLLM's word for all, as 0 is ours
    "top_p": NUMBER,
    "min_p": NUMBER,
}


def without_nulls(settings: dict) -> dict:
    """The settings that say something: null means what silence means. Raises InputError for what is not allowed."""
    given = {}
    for key, value in settings.items():
        if value is None:
            continue
        if key in ALLOWED:
            require_allowed(key, value, ALLOWED[key])
        given[key] = value
    return given


def require_allowed(key: str, value: object, allowed: Allowed) -> None:
    """Raise InputError where the value is of the wrong type or out of bounds."""
    wanted = allowed.kind.__name__
    types = [allowed.kind]
    if allowed.kind is float:
        types.append(int)  # a whole number will do
    right = type(value) in types  # not isinstance: true is no number
    if allowed.highest is not None:
        wanted += f" from {allowed.lowest} to {allowed.highest}"
        right = right and allowed.lowest <= value <= allowed.highest
    require(right, f"{key} must be {wanted}, not {value!r}")


# ---- config.json


class Family(NamedTuple):
    """What config.json means where it is silent, as transformers' classes have it."""

    context: int  # max_position_embeddings
    head_dim: int | None = None  # None: E / H
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    sliding_window: int | None = 4096
    switches_window: bool = True  # no layer has a window unless `use_sliding_window` says so


FAMILIES = {
    "llama": Family(context=2048),
    "mistral": Family(context=131072, switches_window=False),
    "phi3": Family(context=4096, rms_norm_eps=1e-5, sliding_window=None, switches_window=False),
    "qwen2": Family(context=32768),
    "qwen3": Family(context=32768, head_dim=128),
    "qwen3_moe": Family(context=32768),
    "seed_oss": Family(context=524288, head_dim=128),
    "smollm3": Family(context=32768, rope_theta=2e6, tie_word_embeddings=True, sliding_window=None),
}
# These must be there
NEEDED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
# Of these one value is supported, which is also what silence means
ONLY_VALUE = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_mrope": False,
}
# These change nothing that is computed here
HARMLESS_SETTINGS = {
    "about training": [
        "attention_dropout",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "resid_pdrop",
        "embd_pdrop",
        "residual_dropout",
        "problem_type",
        "pretraining_tp",
    ],
    "about what else a library gives": [
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "output_scores",
        "torchscript",
        "chunk_size_feed_forward",
        "is_decoder",
        "id2label",
        "label2id",
        "finetuning_task",
        "task_specific_params",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "prefix",
        "sep_token_id",
        "tokenizer_class",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
    ],
    "about the file": ["architectures", "transformers_version", "transformers.js_config", "auto_map", "name_or_path"],
    "special tokens, of which generation_config.json and the tokenizer tell": [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
    ],
    "seen from the tensors": ["attention_bias", "attention_out_bias", "qkv_bias", "use_qk_norm", "qk_norm"],
}
# What older files say of generation, which generation_config.json has now
GENERATION_IN_CONFIG = [
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "diversity_penalty",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "max_length", "min_length", "early_stopping", "remove_invalid_values", "max_new_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "min_new_tokens",
    "exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff",
]  # fmt: skip


@refusing("config.json")
def parse_config(settings: dict, longest_view: int | None = None) -> Config:
    """Config from config.json; refuses what would change the mathematics and is not supported.

    `longest_view` is the context, in tokens, for whoever knows better.
    """
    given = without_nulls(settings)
    name = given.get("model_type")
    require(name in FAMILIES, f"model_type {name!r} is not supported ({', '.join(FAMILIES)} are)")
    family = FAMILIES[name]
    require_only_values(given)
    packed_by_mlx = "quantization" in given
    require(not packed_by_mlx, "quantization is MLX's own form, which is not supported: take another copy of the model")
    warn_of_unknown_settings(given)
    missing = [key for key in NEEDED if key not in given]
    require(not missing, f"no {', '.join(missing)}")

    # (Where config.json is silent of num_key_value_heads, for all families what Llama's class has.)
    E, H = given["hidden_size"], given["num_attention_heads"]
    K = given.get("num_key_value_heads", H)
    D = given.get("head_dim", family.head_dim or E // H)
    require(H % K == 0, f"num_attention_heads {H} is not a multiple of num_key_value_heads {K}")
    require(D > 0 and D % 2 == 0, f"head_dim {D} is not an even number: rope turns pairs")
    width = H * D
    require(width <= WIDEST, f"num_attention_heads {H} of head_dim {D} are more than {WIDEST} numbers of a token")
    context = given.get("max_position_embeddings", family.context)
    experts = {}
    layer_kinds = (LayerKind(),) * given["num_hidden_layers"]
    if name == "qwen3_moe":
        experts = parse_experts(given)
        layer_kinds = parse_sparse_layers(given)
    elif name == "smollm3":
        layer_kinds = parse_rotated_layers(given)
    rope = parse_rope(given, context, family.rope_theta)
    # In Phi-3's class each other type means longrope, whose frequencies depend on how long the text is
    require(name != "phi3" or rope.rope_type == "default", f"rope type {rope.rope_type!r} is not supported in phi3")
    config = Config(
        vocab_size=given["vocab_size"],
        hidden_size=E,
        intermediate_size=given["intermediate_size"],
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D,
        rms_norm_eps=given.get("rms_norm_eps", family.rms_norm_eps),
        max_position_embeddings=context,
        tie_word_embeddings=given.get("tie_word_embeddings", family.tie_word_embeddings),
        rope=rope,
        layer_kinds=layer_kinds,
        **experts,
    )
    if "max_sequence_length" in given:
        config = replace(config, longest_view=min(config.context, given["max_sequence_length"]))
    if longest_view is not None:
        config = replace(config, longest_view=longest_view)
    window = smallest_window(name, settings)
    fits = window is None or window >= config.context
    require(fits, f"sliding-window attention is not supported: {window} tokens, of a context of {config.context}")
    return config


def require_only_values(given: dict) -> None:
    for key, only in ONLY_VALUE.items():
        found = given.get(key, only)
        if key == "hidden_act" and found == "swish":  # the same by the name of its other inventors
            found = only
        require(found == only, f"{key} {found!r} is not supported, only {only!r}")


def warn_of_unknown_settings(given: dict) -> None:
    """Say once what is not known: it may change the mathematics of a model that is nearly one of ours."""
    known = {*ALLOWED, *ONLY_VALUE, *GENERATION_IN_CONFIG}
    for keys in HARMLESS_SETTINGS.values():
        known.update(keys)
    unknown = [key for key in given if key not in known and not key.startswith("_")]
    if unknown:
        logger.warning("config.json: not known, and ignored: %s", printable_names(unknown))


def smallest_window(name: str, settings: dict) -> int | None:
    """The fewest tokens that a layer sees, where any sees the last ones alone; None where none does.

    As transformers' class of that family reads `settings`, which here still have their nulls: null means no window, and
    silence in many families does not.
    """
    family = FAMILIES[name]
    window = settings.get("sliding_window", family.sliding_window) or None
    if family.switches_window and not settings.get("use_sliding_window"):
        window = None
    layers = settings["num_hidden_layers"]
    layer_types = settings.get("layer_types")
    if layer_types is None:
        first = settings.get("max_window_layers")  # of two families' layers: those before it see everything
        if first is None:
            first = 28
        no_layer_has_it = name in ("qwen2", "qwen3") and first >= layers
        return None if no_layer_has_it else window
    if "sliding_attention" not in layer_types[:layers]:
        return None
    return window or 0  # some layer has one, though nothing says how long it is


def parse_experts(given: dict) -> dict:
    """Config's fields about experts."""
    newer_key = given.get("num_local_experts", 128)  # as transformers 5 writes it
    count = given.get("num_experts", newer_key)
    chosen = given.get("num_experts_per_tok", 8)
    require(chosen <= count, f"num_experts_per_tok {chosen} is more than num_experts {count}")
    return {
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": given.get("moe_intermediate_size", 768),
        "norm_topk_prob": given.get("norm_topk_prob", False),
    }


def parse_sparse_layers(given: dict) -> tuple[LayerKind, ...]:
    """Every so many layers have experts, but for those that are listed as having one MLP alone."""
    every = given.get("decoder_sparse_step", 1)
    with_one_mlp = set(given.get("mlp_only_layers", []))
    dense = LayerKind()
    sparse = LayerKind(experts=True)
    kinds = []
    for number in range(given["num_hidden_layers"]):
        has_experts = number not in with_one_mlp and (number + 1) % every == 0
        kinds.append(sparse if has_experts else dense)
    return tuple(kinds)


def parse_rotated_layers(given: dict) -> tuple[LayerKind, ...]:
    """SmolLM3's: a list has 1 for each layer with rotation; without one, every fourth layer (or so) has none."""
    layers = given["num_hidden_layers"]
    interval = given.get("no_rope_layer_interval", 4)
    rotated = given.get("no_rope_layers", [(number + 1) % interval != 0 for number in range(layers)])
    right = len(rotated) >= layers and all(has_rope in (0, 1) for has_rope in rotated)
    require(right, f"no_rope_layers must have a 0 or 1 for each of {layers} layers, not {rotated}")
    return tuple(LayerKind(rope=bool(has_rope)) for has_rope in rotated[:layers])


# ---- rope

TRAINED_LENGTH = "original_max_position_embeddings"
# What each rope type must have, and what it may have
ROPE_NEEDS = {
    "default": [],
    "linear": ["factor"],
    "dynamic": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", TRAINED_LENGTH],
    "yarn": ["factor"],
}
ROPE_MAY_HAVE = {
    "yarn": [TRAINED_LENGTH, "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"],
}
# What some files have beside that, and transformers ignores with a warning
ROPE_IGNORED = {"yarn": ["attn_factor", "finetuned"]}


def parse_rope(config: dict, context: int, default_theta: float) -> Rope:
    """Rope from both forms in the wild: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    given = without_nulls(rope_settings(config))
    older_key = given.pop("type", "default")
    rope_type = given.pop("rope_type", older_key)
    theta_beside = config.get("rope_theta", default_theta)
    theta = given.pop("rope_theta", theta_beside)
    rotated_part = given.pop("partial_rotary_factor", 1.0)
    require(rotated_part == 1.0, "partial_rotary_factor is not supported, only 1.0")
    ignored = [key for key in ROPE_IGNORED.get(rope_type, []) if given.pop(key, None) is not None]
    if ignored:
        logger.warning("config.json: rope type %r: not known, and ignored: %s", rope_type, printable_names(ignored))
    require_rope_keys(rope_type, given)
    if rope_type == "dynamic":  # differs only past the context, where keys would have to be rotated anew
        return Rope("default", theta)
    if rope_type == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        require(low < high, f"low_freq_factor {low} is not below high_freq_factor {high}")
    if rope_type == "yarn" and TRAINED_LENGTH not in given:
        given[TRAINED_LENGTH] = config.get(TRAINED_LENGTH, context)
    return Rope(rope_type, theta, **given)


def require_rope_keys(rope_type: str, given: dict) -> None:
    """Raise InputError for an unknown rope type, for a key that it lacks, or one that it does not know."""
    require(rope_type in ROPE_NEEDS, f"rope type {rope_type!r} is not supported ({', '.join(ROPE_NEEDS)} are)")
    needed = ROPE_NEEDS[rope_type]
    missing = [key for key in needed if key not in given]
    require(not missing, f"rope type {rope_type!r} needs {', '.join(missing)}")
    known = needed + ROPE_MAY_HAVE.get(rope_type, [])
    unknown = [key for key in sorted(given) if key not in known]
    require(not unknown, f"rope type {rope_type!r} has unknown keys: {', '.join(unknown)}")


def rope_settings(config: dict) -> dict:
    """`rope_scaling`, or where that is absent or empty the newer `rope_parameters`.

    So does transformers. A file that it wrote with the newer key gets the older one by hand, to stretch the context.
    """
    older, newer = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if not older:
        return newer
    theta = newer.get("rope_theta")
    says_theta = "rope_theta" in older or "rope_theta" in config or theta is None
    require(says_theta, f"rope_scaling lacks the rope_theta {theta} that rope_parameters has beside it")
    return older


# ---- generation_config.json

SAMPLING_KEYS = [field.name for field in fields(Sampling)]
# Other keys that ask for nothing that we lack
HARMLESS = [
    "do_sample",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
]
# Values of any other key that ask for nothing
NEUTRAL_VALUES = (False, True, 0, 1, [], {})


def read_generation_defaults(folder: Path, config: dict) -> tuple[Sampling, frozenset[int]]:
    """(default sampling, end-of-sequence ids), warning once of keys that ask for what we lack.

    `config` is config.json, which gives the ids where generation_config.json is silent.
    """
    with refusing("generation_config.json"):
        given = without_nulls(read_json_if_there(folder / "generation_config.json"))
        warn_of_what_is_lacking(given)
        sampling = Sampling()  # greedy
        if given.get("do_sample"):
            chosen = {key: given[key] for key in SAMPLING_KEYS if key in given}
            if chosen.get("top_k") == -1:
                chosen["top_k"] = 0
            sampling = Sampling(**{"temperature": 1.0, **chosen})
        if "eos_token_id" in given:
            return sampling, parse_eos(given["eos_token_id"])
    with refusing("config.json"):
        return sampling, parse_eos(config.get("eos_token_id"))


def warn_of_what_is_lacking(given: dict) -> None:
    lacking = []
    for key, value in given.items():
        is_known = key in HARMLESS or key in SAMPLING_KEYS or key.startswith("_")
        if not is_known and value not in NEUTRAL_VALUES:
            lacking.append(key)
    if lacking:
        logger.warning("generation_config.json: not supported, and ignored: %s", printable_names(lacking))


def printable_names(names: list[str]) -> str:
    """In order, on one line; a terminal might obey what a stranger wrote."""
    return ", ".join(sorted(names)).encode("unicode_escape").decode("ascii")


def parse_eos(eos: object) -> frozenset[int]:
    """From an id, a list of ids, or None."""
    if eos is None:
        return frozenset()
    ids = eos if isinstance(eos, list) else [eos]
    all_are_ids = all(type(token) is int for token in ids)  # not isinstance: true is no id
    require(all_are_ids, f"eos_token_id {ids} is neither an id nor a list of ids")
    return frozenset(ids)
