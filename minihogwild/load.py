"""A folder or hub repository in; Config, Weights, tokenizer and default sampling out."""

import logging
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub  # imports what is asked of it, and only then
import torch
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from torch import Tensor

from .config import Config, Layer, Rope, Weights, refusing, require
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

    `dtype` auto is config.json's; `device` auto is cuda, else mps, else cpu. Raises InputError, with the
    culprit's name, for whatever is missing, unknown, or would change the mathematics without our support.
    """
    device = pick_device(device)
    folder = fetch(str(name))
    settings = read_json(folder / "config.json")
    config = parse_config(settings)
    if dtype == "auto":
        dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    dtype = DTYPES.get(dtype, dtype)
    require(dtype in DTYPES.values(), f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    tokenizer = Tokenizer(folder)
    ids = f"{tokenizer.size} ids, more than config.json's vocab_size {config.vocab_size}"
    require(tokenizer.size <= config.vocab_size, f"{folder / 'tokenizer.json'}: {ids}")
    sampling, eos = generation_defaults(folder, settings)
    weights = load_weights(folder, config, dtype, device, str(name))
    return Model(str(name), folder, config, weights, tokenizer, sampling, eos)


def pick_device(device: str | torch.device) -> torch.device:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(next(kind for kind in present if present[kind]) if device == "auto" else device)
    require(present.get(device.type, True), f"device {device.type} is not available on this machine: use cpu or auto")
    return device


class Bar(tqdm):
    """The hub's progress bar on standard error, where that is a terminal; when closed it leaves nothing behind."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"leave": False, "disable": None})


def fetch(name: str) -> Path:
    """The local folder of that name, or the downloaded hub repository."""
    with refusing(f"{name}: neither a folder nor to be had from the hub"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, tqdm_class=Bar))
    for bar in [bar for bar in Bar._instances if isinstance(bar, Bar)]:
        bar.close()  # the hub leaves some open, to be drawn again at the very end
    return folder


# ---- config.json

KINDS = {  # of values in config.json and generation_config.json
    **{key: float if kind == float | None else kind for fields in (Config, Rope, Sampling)
       for key, kind in fields.__annotations__.items() if kind not in (Rope, tuple[int, ...])},
    "num_local_experts": int, "decoder_sparse_step": int, "use_sliding_window": bool, "do_sample": bool,
    "model_type": str, "dtype": str, "torch_dtype": str, "type": str, "layer_types": list, "mlp_only_layers": list,
    "quantization_config": dict, "rope_parameters": dict, "rope_scaling": dict,
}  # fmt: skip
BOUNDS = {  # far from every model; what follows may count to these numbers, or divide by them
    int: (1, 2**20),
    float: (0, 1e12),
    **dict.fromkeys(["max_position_embeddings", "original_max_position_embeddings"], (1, 2**31)),
    **dict.fromkeys(["factor", "beta_fast", "beta_slow"], (1e-6, 1e12)),
    "rope_theta": (1.01, 1e12),
    "top_k": (0, 2**31),
}


def given_in(settings: dict) -> dict:
    """The settings that are not null. Raises InputError where one is of the wrong type or out of bounds."""
    given = {key: value for key, value in settings.items() if value is not None}
    for key in filter(given.__contains__, KINDS):
        value, kind = given[key], KINDS[key]
        low, high = BOUNDS.get(key, BOUNDS.get(kind, (None, None)))
        right = type(value) in ((float, int) if kind is float else (kind,))
        wanted = kind.__name__ + (f" from {low} to {high}" if high else "")
        require(right and (not high or low <= value <= high), f"{key} must be {wanted}, not {value!r}")
    return given


@refusing("config.json")
def parse_config(settings: dict) -> Config:
    """Config from config.json; refuses what would change the mathematics and is not supported."""
    given = given_in(settings)
    kind = settings.get("model_type")
    # What is supported, and the max_position_embeddings that each means where config.json is silent
    context = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768}
    require(kind in context, f"model_type {kind!r} is not supported ({', '.join(context)} are)")
    quantization = settings.get("quantization_config") or {}
    method = str(quantization.get("quant_method", "unknown")).upper()
    require(not quantization, f"{method}-quantised weights are not supported: use the unquantised model")
    only = {"hidden_act": "silu", "mlp_bias": False, "rope_interleaved": False, "partial_rotary_factor": 1.0}
    for key, value in only.items():
        require(settings.get(key, value) == value, f"{key} {settings.get(key)!r} is not supported, only {value!r}")
    # Mistral's window needs no switch, and is 4096 where config.json is silent, but not where it says null
    slides = (kind == "mistral" or settings.get("use_sliding_window")) and settings.get("sliding_window", 4096)
    slides = slides or "sliding_attention" in (settings.get("layer_types") or [])
    require(not slides, "sliding-window attention is not supported")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if settings.get(key) is None]
    require(not missing, f"no {', '.join(missing)}")
    E, H = settings["hidden_size"], settings["num_attention_heads"]
    # Where config.json is silent, the defaults of transformers' classes hold (num_key_value_heads: Llama's)
    silent = {"num_key_value_heads": H, "head_dim": 128 if kind == "qwen3" else E // H, "rms_norm_eps": 1e-6}
    silent |= {"max_position_embeddings": context[kind], "tie_word_embeddings": False}
    settings = silent | given
    K, D = settings["num_key_value_heads"], settings["head_dim"]
    require(H % K == 0, f"num_attention_heads {H} is not a multiple of num_key_value_heads {K}")
    require(D % 2 == 0 < D, f"head_dim {D} is not an even number: rope turns pairs")
    experts = parse_experts(settings) if kind == "qwen3_moe" else {}
    return Config(**{key: settings[key] for key in (*needed, *silent)}, rope=parse_rope(settings), **experts)


def parse_experts(settings: dict) -> dict:
    """Config's fields about experts: `num_experts` (transformers 5 writes `num_local_experts`) and the like."""
    silent = {"num_experts": settings.get("num_local_experts", 128), "num_experts_per_tok": 8}
    silent |= {"moe_intermediate_size": 768, "norm_topk_prob": False}
    experts = {key: settings.get(key, value) for key, value in silent.items()}
    X, chosen, every = experts["num_experts"], experts["num_experts_per_tok"], settings.get("decoder_sparse_step", 1)
    require(chosen <= X, f"num_experts_per_tok {chosen} is more than num_experts {X}")
    layers, dense = range(settings["num_hidden_layers"]), set(settings.get("mlp_only_layers", []))
    return experts | {"sparse_layers": tuple(i for i in layers if i not in dense and (i + 1) % every == 0)}


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
    given = given_in(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = given.pop("rope_type", given.pop("type", "default"))
    theta = given.pop("rope_theta", settings.get("rope_theta") or 10000.0)
    require(kind in ROPE_KEYS, f"rope type {kind!r} is not supported ({', '.join(ROPE_KEYS)} are)")
    require(given.pop("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor is not supported, only 1.0")
    missing = [key for key in ROPE_KEYS[kind] if key not in given]
    require(not missing, f"rope type {kind!r} needs {', '.join(missing)}")
    unknown = sorted(given.keys() - {*ROPE_KEYS[kind], *(YARN_KEYS if kind == "yarn" else [])})
    require(not unknown, f"rope type {kind!r} has unknown keys: {', '.join(unknown)}")
    low, high = given.get("low_freq_factor", 0), given.get("high_freq_factor", 1)
    require(low < high, f"low_freq_factor {low} is not below high_freq_factor {high}")
    if kind == "yarn":
        given.setdefault(LENGTH, settings.get(LENGTH, settings["max_position_embeddings"]))
    return Rope(kind, theta, **given)


# ---- generation_config.json


@refusing("generation_config.json")
def generation_defaults(folder: Path, settings: dict) -> tuple[Sampling, frozenset[int]]:
    """(default sampling, end-of-sequence ids), warning once of keys that ask for what we lack."""
    path = folder / "generation_config.json"
    given = given_in(read_json(path) if path.exists() else {})
    chosen = {key: given[key] for key in vars(Sampling()) if key in given}
    harmless = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"}
    # For every other key, these values ask for nothing
    asking = {key for key, value in given.items() if value not in (False, True, 0, 1, [], {}) and key[0] != "_"}
    if lacking := sorted(asking - harmless - chosen.keys()):
        logger.warning("generation_config.json: not supported, and ignored: %s", ascii(", ".join(lacking))[1:-1])
    sampling = Sampling(**{"temperature": 1.0, **chosen}) if given.get("do_sample") else Sampling()
    eos = given.get("eos_token_id", settings.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    require(all(isinstance(token, int) for token in eos), f"eos_token_id {eos} is neither an id nor a list of ids")
    return sampling, frozenset(eos)


# ---- safetensors

STORED = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that can be weights


def empty_weights(
    config: Config, dtype: torch.dtype, device: torch.device | str, biases: bool = False, qk_norms: bool = False
) -> tuple[Weights, dict[str, Tensor]]:
    """Weights of the right shapes, not filled; and what fills them: each tensor of a checkpoint, by its name there.

    On device "meta" they take no memory.
    """
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    fields = {  # of Layer: the checkpoint's tensors that lie there one below the other
        "attn_norm": {"input_layernorm.weight": [E]},
        "qkv": {f"self_attn.{x}_proj.weight": [n * D, E] for x, n in heads.items()},
        "out": {"self_attn.o_proj.weight": [E, heads["q"] * D]},
        "mlp_norm": {"post_attention_layernorm.weight": [E]},
        "gate_up": {"mlp.gate_proj.weight": [F, E], "mlp.up_proj.weight": [F, E]},
        "down": {"mlp.down_proj.weight": [E, F]},
    }
    if biases:
        fields["qkv_bias"] = {f"self_attn.{x}_proj.bias": [n * D] for x, n in heads.items()}
    if qk_norms:
        fields |= {f"{x}_norm": {f"self_attn.{x}_norm.weight": [D]} for x in "qk"}
    X, F = config.num_experts, config.moe_intermediate_size  # from here on, F of an expert
    experts = {  # the same, in sparse layers: one expert below the other
        "router": {"mlp.gate.weight": [X, E]},
        "gate_up": {f"mlp.experts.{n}.{x}_proj.weight": [F, E] for n in range(X) for x in ("gate", "up")},
        "down": {f"mlp.experts.{n}.down_proj.weight": [E, F] for n in range(X)},
    }
    parts = {}

    def empty(shapes: dict[str, list[int]], prefix: str = "model.") -> Tensor:
        rows, (_, *columns) = [shape[0] for shape in shapes.values()], next(iter(shapes.values()))
        whole = torch.empty(sum(rows), *columns, dtype=dtype, device=device)
        parts.update(zip([prefix + name for name in shapes], whole.split(rows)))
        return whole.view(X, -1, *columns) if "experts" in next(iter(shapes)) else whole

    def layer(i: int) -> Layer:
        table = fields | experts if i in config.sparse_layers else fields
        return Layer(**{field: empty(shapes, f"model.layers.{i}.") for field, shapes in table.items()})

    embed, norm = empty({"embed_tokens.weight": [config.vocab_size, E]}), empty({"norm.weight": [E]})
    head = embed if config.tie_word_embeddings else empty({"lm_head.weight": [config.vocab_size, E]}, "")
    return Weights(embed, [layer(i) for i in range(config.num_hidden_layers)], norm, head), parts


def load_weights(folder: Path, config: Config, dtype: torch.dtype, device: torch.device, model="the model") -> Weights:
    """Fill Weights from a folder's safetensors: each file is opened once, each tensor goes straight to its place."""
    found: dict[str, tuple[Path, safe_open, list[int]]] = {}  # name of a tensor -> its file, also opened, and shape
    for path in safetensors_files(folder):
        with refusing(f"{path} cannot be read"):
            file = safe_open(path, framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for name, part in slices.items():
                require(part.get_dtype() in STORED, f"{name} is {part.get_dtype()}, none of {', '.join(STORED)}")
        for name, part in slices.items():
            first, *_ = found.setdefault(name, (path, file, part.get_shape()))
            require(first is path, f"{path.name}: tensor {name} stands in {first.name} too")
    # Not parameters: Llama 2's saved rotary frequencies, and the head that a tied model shares with its embedding.
    found = {name: where for name, where in found.items() if not name.endswith(".rotary_emb.inv_freq")}
    shared_head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None

    optional = [any(name.endswith(end) for name in found) for end in ("q_proj.bias", "q_norm.weight")]
    # A few numbers in config.json can claim any number of tensors: a checkpoint so incomplete is not gone through
    claimed = config.num_hidden_layers + len(config.sparse_layers) * config.num_experts
    require(claimed < len(found) + 1000, f"the checkpoint lacks most of config.json's layers: {len(found)} tensors")
    _, expected = empty_weights(config, dtype, "meta", *optional)
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    require(not missing, f"the checkpoint lacks {some(missing)}")
    require(not unknown, f"the checkpoint has tensors that this architecture does not know: {some(unknown)}")
    for name, (path, _, shape) in found.items():
        right = list(expected[name].shape)
        require(shape == right, f"{path.name}: {name} has shape {shape}, not {right}")

    nbytes = sum(tensor.nbytes for tensor in expected.values())
    with allocating(nbytes, f"{model}'s weights in {str(dtype)[6:]}", device):
        weights, parts = empty_weights(config, dtype, device, *optional)
    for name, (_, file, _) in Bar(found.items(), "loading"):
        parts[name].copy_(file.get_tensor(name))
    same = not shared_head or torch.equal(shared_head[1].get_tensor("lm_head.weight").to(weights.head), weights.head)
    require(same, "tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return weights


def some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def safetensors_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names: files of this folder, wherever the folder comes from."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    with refusing(index):
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        outside = [name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"]
        require(not outside, f"{some(set(outside))} must be a safetensors file's name, in the same folder")
        return [folder / name for name in names]
