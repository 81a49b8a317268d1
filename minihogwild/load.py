"""A folder or hub repository in; Config, Weights, tokenizer and default sampling out."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
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
        dtype = settings.get("dtype") or settings.get("torch_dtype") or stored_dtype(folder)
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    tokenizer = Tokenizer(folder)
    sampling, eos = generation_defaults(folder, settings, tokenizer)
    weights = load_weights(folder, config, dtype, device, str(name))
    return Model(str(name), folder, config, weights, tokenizer, sampling, eos)


def pick_device(device: str | torch.device) -> torch.device:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(next(kind for kind in present if present[kind]) if device == "auto" else device)
    if not present.get(device.type, True):
        raise InputError(f"device {device.type} is not available on this machine: use cpu or auto")
    return device


def fetch(name: str) -> Path:
    """The local folder of that name, or the downloaded hub repository."""
    folder = Path(os.path.expanduser(name))  # which leaves a user that it does not know as it is
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # network, gated, unknown, offline: the hub's errors share no base class
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{name}: neither a folder nor to be had from the hub: {why}") from error


# ---- config.json


def refuse(wrong: object, what: str) -> None:
    if wrong:
        raise InputError(f"config.json: {what}")


def parse_config(settings: dict) -> Config:
    """Config from config.json; refuses what would change the mathematics and is not supported."""
    kind = settings.get("model_type")
    known = ("llama", "qwen2", "qwen3")
    refuse(kind not in known, f"model_type {kind!r} is not supported (llama, qwen2 and qwen3 are)")
    quantization = settings.get("quantization_config") or {}
    method = str(quantization.get("quant_method", "unknown")).upper()
    refuse(quantization, f"{method}-quantised weights are not supported: use the unquantised model")
    only = {"hidden_act": "silu", "mlp_bias": False, "rope_interleaved": False, "partial_rotary_factor": 1.0}
    for key, value in only.items():
        refuse(settings.get(key, value) != value, f"{key} {settings.get(key)!r} is not supported, only {value!r}")
    refuse(slides(settings), "sliding-window attention is in use, and is not supported")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if settings.get(key) is None]
    refuse(missing, f"no {', '.join(missing)}")
    E, H = settings["hidden_size"], settings["num_attention_heads"]
    # Where config.json is silent, the defaults of transformers' classes hold
    silent = {"num_key_value_heads": H, "head_dim": 128 if kind == "qwen3" else E // H, "rms_norm_eps": 1e-6}
    silent |= {"max_position_embeddings": 2048 if kind == "llama" else 32768, "tie_word_embeddings": False}
    settings = silent | {key: value for key, value in settings.items() if value is not None}
    K, D = settings["num_key_value_heads"], settings["head_dim"]
    refuse(not K or H % K, f"num_attention_heads {H} is not a multiple of num_key_value_heads {K}")
    refuse(D % 2, f"head_dim {D} is odd, and rope needs pairs")
    return Config(**{key: settings[key] for key in (*needed, *silent)}, rope=parse_rope(settings))


def slides(settings: dict) -> bool:
    if settings.get("layer_types") is not None:
        return "sliding_attention" in settings["layer_types"]
    used = settings.get("use_sliding_window") and settings.get("sliding_window")
    return used and settings.get("max_window_layers", 28) < settings.get("num_hidden_layers", 0)


LENGTH = "original_max_position_embeddings"
ROPE_KEYS = {  # that each rope type must have
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", LENGTH],
    "yarn": ["factor"],
}
YARN_KEYS = [LENGTH, "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"]  # may have


def parse_rope(settings: dict) -> Rope:
    """Rope from both forms in the wild: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    theta = given.pop("rope_theta", settings.get("rope_theta") or 10000.0)
    refuse(kind not in ROPE_KEYS, f"rope type {kind!r} is not supported ({', '.join(ROPE_KEYS)} are)")
    refuse(given.pop("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor is not supported, only 1.0")
    if LENGTH in settings and kind in ("llama3", "yarn"):
        given[LENGTH] = settings[LENGTH]  # beside the rope's own keys: transformers prefers it
    missing = [key for key in ROPE_KEYS[kind] if key not in given]
    refuse(missing, f"rope type {kind!r} needs {', '.join(missing)}")
    unknown = sorted(given.keys() - {*ROPE_KEYS[kind], *(YARN_KEYS if kind == "yarn" else [])})
    refuse(unknown, f"rope type {kind!r} has unknown keys: {', '.join(unknown)}")
    if kind == "yarn":
        given.setdefault(LENGTH, settings["max_position_embeddings"])
    return Rope(kind, theta, **given)


# ---- generation_config.json


def generation_defaults(folder: Path, settings: dict, tokenizer: Tokenizer) -> tuple[Sampling, frozenset[int]]:
    """(default sampling, end-of-sequence ids), warning once of keys that ask for what we lack."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.exists() else {}
    numbers = {"temperature", "top_k", "top_p", "min_p"}
    harmless = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"}
    # For every other key of generation_config.json, these values ask for nothing
    neutral = (None, False, True, 0, 1, [], {})
    asking = {key for key, value in given.items() if value not in neutral and not key.startswith("_")}
    if lacking := sorted(asking - numbers - harmless - {"do_sample"}):
        logger.warning("generation_config.json: not supported, and ignored: %s", ", ".join(lacking))
    chosen = {key: given[key] for key in numbers if given.get(key) is not None}
    sampling = Sampling(**{"temperature": 1.0, **chosen}) if given.get("do_sample") else Sampling()
    named = tokenizer.control.get(tokenizer.special.get("eos_token"))
    eos = next((i for i in (given.get("eos_token_id"), settings.get("eos_token_id"), named) if i is not None), [])
    return sampling, frozenset(eos if isinstance(eos, list) else [eos])


# ---- safetensors


def checkpoint_table(weights: Weights, config: Config) -> dict[str, Tensor]:
    """Every tensor that a checkpoint must hold: its name there, and the part of `weights` that it fills."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = (H * D, K * D, K * D)
    table = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = weights.head
    for i, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split(rows)
        gate, up = layer.gate_up.chunk(2)
        parts = {"input_layernorm": layer.attn_norm}
        parts |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.out}
        parts |= {"post_attention_layernorm": layer.mlp_norm}
        parts |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down}
        if layer.q_norm is not None:
            parts |= {"self_attn.q_norm": layer.q_norm, "self_attn.k_norm": layer.k_norm}
        table |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
        if layer.qkv_bias is not None:
            biases = zip("qkv", layer.qkv_bias.split(rows))
            table |= {f"model.layers.{i}.self_attn.{name}_proj.bias": part for name, part in biases}
    return table


def empty_weights(
    config: Config, dtype: torch.dtype, device: torch.device | str, biases: bool = False, qk_norms: bool = False
) -> Weights:
    """Weights of the right shapes, not filled. On device "meta" they take no memory."""
    V, E, F, D = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    shapes = {"attn_norm": [E], "qkv": [(H + 2 * K) * D, E], "out": [E, H * D]}
    shapes |= {"mlp_norm": [E], "gate_up": [2 * F, E], "down": [E, F]}
    shapes |= {"qkv_bias": [(H + 2 * K) * D]} if biases else {}
    shapes |= {"q_norm": [D], "k_norm": [D]} if qk_norms else {}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    embed = empty(V, E)
    layers = [Layer(**{name: empty(*shape) for name, shape in shapes.items()}) for _ in range(config.num_hidden_layers)]
    return Weights(embed, layers, empty(E), embed if config.tie_word_embeddings else empty(V, E))


def load_weights(folder: Path, config: Config, dtype: torch.dtype, device: torch.device, model="the model") -> Weights:
    """Fill Weights from a folder's safetensors: each tensor is read once, straight to its place."""
    found: dict[str, tuple[Path, list[int]]] = {}  # name of a tensor -> its file and shape
    for path in safetensors_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise InputError(f"{path.name}: tensor {name} stands in {found[name][0].name} too")
                found[name] = path, file.get_slice(name).get_shape()
    # Not parameters: Llama 2's saved rotary frequencies, and the head that a tied model shares with its embedding.
    found = {name: where for name, where in found.items() if not name.endswith(".rotary_emb.inv_freq")}
    shared_head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None

    optional = [any(name.endswith(end) for name in found) for end in ("q_proj.bias", "q_norm.weight")]
    expected = checkpoint_table(empty_weights(config, dtype, "meta", *optional), config)
    if missing := expected.keys() - found.keys():
        raise InputError(f"the checkpoint lacks {some(missing)}")
    if unknown := found.keys() - expected.keys():
        raise InputError(f"the checkpoint has tensors that this architecture does not know: {some(unknown)}")
    for name, (path, shape) in found.items():
        if list(expected[name].shape) != shape:
            raise InputError(f"{path.name}: {name} has shape {shape}, not {list(expected[name].shape)}")

    nbytes = sum(tensor.nbytes for tensor in expected.values())
    with allocating(nbytes, f"{model}'s weights in {str(dtype)[6:]}", device):
        weights = empty_weights(config, dtype, device, *optional)
    for name, tensor in checkpoint_table(weights, config).items():
        tensor.copy_(read(found[name][0], name))
    if shared_head and not torch.equal(read(shared_head[0], "lm_head.weight").to(weights.head), weights.head):
        raise InputError("tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return weights


def stored_dtype(folder: Path) -> torch.dtype:
    with opened(safetensors_files(folder)[0]) as file:
        return file.get_tensor(min(file.keys())).dtype


def read(path: Path, name: str) -> Tensor:
    with opened(path) as file:
        return file.get_tensor(name)


def some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def safetensors_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists() and not single.exists():
        raise InputError(f"{folder}: neither {single.name} nor {index.name} in this folder")
    if not index.exists():
        return [single]
    paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not paths:
        raise InputError(f"{index}: weight_map names no file")
    if missing := {path.name for path in paths if not path.exists()}:
        raise InputError(f"{index.name} names {some(missing)}, not to be found in {folder}")
    return paths


def opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
