"""A folder or hub repository in; Config, Weights, tokenizer and default sampling out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import Config, InputError, Layer, Rope, Weights
from .memory import allocating
from .sampling import Sampling
from .text import Tokenizer, read_json

logger = logging.getLogger("minihogwild")

FILES = [
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "prompts.json",
]  # fmt: skip
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


@dataclass
class Model:
    """All that comes out of a model folder."""

    name: str
    folder: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    sampling: Sampling  # generation_config.json's
    eos: frozenset[int]  # end-of-sequence ids

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device


def load(name: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> Model:
    """Load a model from a local folder, or else from the hub repository of that name.

    `dtype` auto is the checkpoint's; `device` auto is cuda, else mps, else cpu. Raises InputError, with the
    culprit's name, for whatever is missing, unknown, or would change the mathematics without our support.
    """
    device = pick_device(device)
    folder = fetch(str(name))
    settings = read_json(folder / "config.json")
    config = parse_config(settings)
    if dtype == "auto":
        dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    tokenizer = Tokenizer(folder)
    sampling, eos = generation_defaults(folder, settings, tokenizer)
    weights = load_weights(folder, config, dtype, device)
    return Model(str(name), folder, config, weights, tokenizer, sampling, eos)


def pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise InputError(f"device {device.type} is not available on this machine: use cpu or auto")
    return device


def fetch(name: str) -> Path:
    """The local folder of that name, or the downloaded hub repository."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # network, gated, unknown, offline: the hub's errors share no base class
        first_line = str(error).strip().split("\n")[0]
        raise InputError(f"{name}: neither a folder nor to be had from the hub: {first_line}") from error


# ---- config.json


def parse_config(settings: dict) -> Config:
    """Config from config.json; refuses what would change the mathematics and is not supported."""
    kind = settings.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise InputError(f"config.json: model_type {kind!r} is not supported (llama, qwen2 and qwen3 are)")
    if quantization := settings.get("quantization_config"):
        method = str(quantization.get("quant_method", "unknown")).upper()
        raise InputError(f"config.json: {method}-quantised weights are not supported: use the unquantised model")
    for key, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("rope_interleaved", False)):
        if settings.get(key, wanted) != wanted:
            raise InputError(f"config.json: {key} {settings[key]!r} is not supported, only {wanted!r}")
    if slides(settings):
        raise InputError("config.json: sliding-window attention is in use, and is not supported")
    try:
        H = settings["num_attention_heads"]
        E = settings["hidden_size"]
        config = Config(
            vocab_size=settings["vocab_size"],
            hidden_size=E,
            intermediate_size=settings["intermediate_size"],
            num_hidden_layers=settings["num_hidden_layers"],
            num_attention_heads=H,
            num_key_value_heads=settings.get("num_key_value_heads") or H,
            # Where config.json is silent, the defaults of transformers' classes hold
            head_dim=settings.get("head_dim") or (128 if kind == "qwen3" else E // H),
            rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
            max_position_embeddings=settings.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
            tie_word_embeddings=settings.get("tie_word_embeddings", False),
            rope=parse_rope(settings),
        )
    except KeyError as error:
        raise InputError(f"config.json: no {error.args[0]}") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"config.json: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"config.json: head_dim {config.head_dim} is odd, and rope needs pairs")
    return config


def slides(settings: dict) -> bool:
    if settings.get("layer_types") is not None:
        return "sliding_attention" in settings["layer_types"]
    within = settings.get("max_window_layers", 28) < settings.get("num_hidden_layers", 0)
    return bool(settings.get("use_sliding_window") and settings.get("sliding_window") and within)


# config.json's key -> Rope's field, for each rope type: those that must stand there, then those that may.
ROPE_KEYS = {
    "default": ({}, {}),
    "linear": ({"factor": "factor"}, {}),
    "llama3": (
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_context",
        },
        {},
    ),
    "yarn": (
        {"factor": "factor"},
        {"original_max_position_embeddings": "original_context"}
        | {key: key for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")},
    ),
}


def parse_rope(settings: dict) -> Rope:
    """Rope from both forms in the wild: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    given = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if kind not in ROPE_KEYS:
        raise InputError(f"config.json: rope type {kind!r} is not supported ({', '.join(ROPE_KEYS)} are)")
    theta = given.pop("rope_theta", None) or settings.get("rope_theta") or 10000.0
    for where in (given, settings):
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError("config.json: partial_rotary_factor is not supported, only 1.0")
    given.pop("partial_rotary_factor", None)
    required, optional = ROPE_KEYS[kind]
    if missing := [key for key in required if given.get(key) is None]:
        raise InputError(f"config.json: rope type {kind!r} needs {', '.join(missing)}")
    if unknown := given.keys() - required.keys() - optional.keys():
        raise InputError(f"config.json: rope type {kind!r} has unknown keys: {', '.join(sorted(unknown))}")
    fields = required | optional
    rope = Rope(kind, theta, **{fields[key]: value for key, value in given.items() if value is not None})
    if kind == "yarn" and not rope.original_context:
        rope = replace(rope, original_context=settings.get("max_position_embeddings", 0))
    return rope


# ---- generation_config.json


def generation_defaults(folder: Path, settings: dict, tokenizer: Tokenizer) -> tuple[Sampling, frozenset[int]]:
    """(default sampling, end-of-sequence ids), warning once of keys that ask for what we lack."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.exists() else {}
    known = ["do_sample", "temperature", "top_k", "top_p", "min_p"]
    harmless = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"}
    # For every other key of generation_config.json, these values ask for nothing
    neutral = (None, False, True, 0, 1, [], {})
    lacking = [k for k, v in given.items() if k not in {*known, *harmless} and k[0] != "_" and v not in neutral]
    if lacking:
        logger.warning("generation_config.json: not supported, and ignored: %s", ", ".join(sorted(lacking)))
    sampling = Sampling()
    if given.get("do_sample"):
        chosen = {key: given[key] for key in known[1:] if given.get(key) is not None}
        sampling = Sampling(**{"temperature": 1.0, **chosen})
    eos = given.get("eos_token_id", settings.get("eos_token_id"))
    if eos is None:
        eos = tokenizer.control.get(tokenizer.special.get("eos_token"))
    return sampling, frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


# ---- safetensors


def checkpoint_table(weights: Weights, config: Config) -> dict[str, Tensor]:
    """Every tensor that a checkpoint must hold: its name there, and the part of `weights` that it fills."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    table = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = weights.head
    for i, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split((H * D, K * D, K * D))
        gate, up = layer.gate_up.chunk(2)
        parts = {
            "input_layernorm.weight": layer.attn_norm,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": layer.out,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.down,
        }
        if layer.qkv_bias is not None:
            q, k, v = layer.qkv_bias.split((H * D, K * D, K * D))
            parts |= {"self_attn.q_proj.bias": q, "self_attn.k_proj.bias": k, "self_attn.v_proj.bias": v}
        if layer.q_norm is not None:
            parts |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
        table |= {f"model.layers.{i}.{name}": part for name, part in parts.items()}
    return table


def empty_weights(
    config: Config, dtype: torch.dtype, device: torch.device | str, biases: bool = False, qk_norms: bool = False
) -> Weights:
    """Weights of the right shapes, not filled. On device "meta" they take no memory."""
    V, E, F, D = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    embed = empty(V, E)
    layers = [
        Layer(
            attn_norm=empty(E),
            qkv=empty((H + 2 * K) * D, E),
            qkv_bias=empty((H + 2 * K) * D) if biases else None,
            q_norm=empty(D) if qk_norms else None,
            k_norm=empty(D) if qk_norms else None,
            out=empty(E, H * D),
            mlp_norm=empty(E),
            gate_up=empty(2 * F, E),
            down=empty(E, F),
        )
        for _ in range(config.num_hidden_layers)
    ]
    return Weights(embed, layers, empty(E), embed if config.tie_word_embeddings else empty(V, E))


def load_weights(folder: Path, config: Config, dtype: torch.dtype, device: torch.device) -> Weights:
    """Fill Weights from a folder's safetensors: each tensor is read once, straight to its place."""
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for path in safetensors_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in shapes:
                    raise InputError(f"{path.name}: tensor {name} stands in {shapes[name][0].name} too")
                shapes[name] = path, file.get_slice(name).get_shape()
    # Not parameters: Llama 2's saved rotary frequencies, and the head that a tied model shares with its embedding.
    shapes = {name: where for name, where in shapes.items() if not name.endswith(".rotary_emb.inv_freq")}
    shared_head = shapes.pop("lm_head.weight", None) if config.tie_word_embeddings else None

    biases = any(name.endswith("q_proj.bias") for name in shapes)
    qk_norms = any(name.endswith("q_norm.weight") for name in shapes)
    expected = checkpoint_table(empty_weights(config, dtype, "meta", biases, qk_norms), config)
    check_names(shapes, expected)
    nbytes = sum(tensor.nbytes for tensor in expected.values())
    with allocating(nbytes, f"{folder.name}'s weights in {str(dtype)[6:]}", device):
        weights = empty_weights(config, dtype, device, biases, qk_norms)
    table = checkpoint_table(weights, config)
    for path in dict.fromkeys(path for path, _ in shapes.values()):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in table:
                    table[name].copy_(file.get_tensor(name))
    if shared_head:
        with opened(shared_head[0]) as file:
            if not torch.equal(file.get_tensor("lm_head.weight").to(weights.head), weights.head):
                raise InputError("tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return weights


def check_names(shapes: dict[str, tuple[Path, list[int]]], expected: dict[str, Tensor]) -> None:
    if missing := expected.keys() - shapes.keys():
        raise InputError(f"the checkpoint lacks {some(missing)}")
    if unknown := shapes.keys() - expected.keys():
        raise InputError(f"the checkpoint has tensors that this architecture does not know: {some(unknown)}")
    for name, (path, shape) in shapes.items():
        if list(expected[name].shape) != shape:
            raise InputError(f"{path.name}: {name} has shape {shape}, not {list(expected[name].shape)}")


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def safetensors_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json in this folder")
        return [single]
    paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not paths:
        raise InputError(f"{index}: weight_map names no file")
    for path in paths:
        if not path.exists():
            raise InputError(f"{index.name} names {path.name}, which is not in {folder}")
    return paths


def opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
