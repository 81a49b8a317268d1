"""`load`: from the name of a model to the model."""

import functools
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub  # imports what is asked of it, and only then
import torch

from ..backend import PyTorchBackend, choose_backend
from ..cache import Cache
from ..config import Config
from ..errors import InputError, refusing, require, whole_number
from ..files import read_json, read_json_if_there
from ..sampling import Sampling
from ..weights import Weights, name_of_dtype
from .checkpoint import load_weights, stored_dtype
from .config_json import parse_config, read_generation_defaults
from .folder import require_listed, require_there
from .limits import in_time
from .progress import Bar, close_bars
from .quantized import Format, awq_format, format_of, gptq_format
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..gpu.several import Ranks

logger = logging.getLogger("minihogwild")

# What is fetched from a hub repository
FILES = [
    "config.json",
    "adapter_config.json",  # not applied: so that it can be told
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "prompts.json",
]
HUB_SECONDS = 5  # until it must have begun to answer (the library asks twice)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Model:
    """All that comes out of a model folder."""

    name: str  # as the user gave it
    folder: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer | None  # None: loaded without one
    sampling: Sampling  # generation_config.json's
    eos: frozenset[int]  # end-of-sequence ids: generation_config.json's or config.json's, and the tokenizer's
    ranks: "Ranks | None" = None  # the processes that share it, where `config` and `weights` are those of one of them
    # Of the last run that has come to its end: the next takes it over, with its memory and all that was recorded for it
    idle_cache: Cache | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @cached_property
    def backend(self) -> PyTorchBackend:
        """The fastest that there is; one object for all runs."""
        return choose_backend(self.device, self.dtype, ranks=self.ranks)

    def cache_for(self, blocks: list[str], backend: PyTorchBackend | None = None) -> Cache:
        """An empty cache with these blocks; `backend` None is the model's own."""
        backend = self.backend if backend is None else backend
        idle = self.idle_cache
        self.idle_cache = None  # whoever can't use it does not keep its memory either
        if idle is None or idle.backend is not backend:
            return Cache(self.config, blocks, self.dtype, self.device, backend)
        idle.begin_anew(blocks)
        return idle


def load(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    folder: Path | None = None,
    with_tokenizer: bool = True,
    quantize: int | None = None,
    context: int | None = None,
    ranks: "Ranks | None" = None,
) -> Model:
    """Load a model from a local folder, or else from the hub repository of that name.

    `dtype` auto is config.json's (on a CPU, with 8 or 4 bits, bfloat16 for float16); `device` auto is cuda, else mps,
    else cpu. `folder` is what `fetch(name)` gave, for whoever has asked for it before. Without its tokenizer, a folder
    needs config.json and weights alone. `quantize` (8 or 4) rounds the matrices of a plain checkpoint to so many bits.
    `context` is how many tokens a view may hold, for whoever knows better than config.json.
    `ranks` are the processes that share the model, each with a GPU of its own (gpu/several.py); this one gets its part.
    Raises InputError, with the culprit's name, for whatever is missing, unknown, or would change the mathematics
    without our support.
    """
    require(isinstance(name, (str, Path)), f"a model is named by a text or a path, not by {name!r}")
    require(quantize in (None, 4, 8), f"quantize is {quantize!r}: it must be 8, 4 or None")
    if context is not None:
        context = whole_number(context, "context")
        require(context >= 1, f"context is {context}: it must be at least 1")
    device = choose_device(device)
    if folder is None:
        folder = fetch(str(name), with_tokenizer)
    require(isinstance(folder, Path), f"folder must be a Path, as fetch gives it, not {folder!r}")
    settings = read_config(folder / "config.json")
    if os.path.lexists(folder / "adapter_config.json"):
        read_json(folder / "adapter_config.json")  # whatever it says
        logger.warning("adapter_config.json: the adapter is not applied")
    config = parse_config(settings, context)
    format = format_of(settings) or format_beside(folder)
    if dtype == "auto":
        has_fewer_bits = format is not None or quantize is not None
        dtype = dtype_of(settings, folder, has_fewer_bits and device.type == "cpu")
    dtype = choose_dtype(dtype)
    tokenizer = read_tokenizer(folder, config) if with_tokenizer else None
    sampling, eos = read_generation_defaults(folder, settings)
    if tokenizer is not None:
        eos |= tokenizer.eos  # a fine-tuned model's may stand there alone: the other files are those of its base
    share = None
    if ranks is not None:
        options = {"name": str(name), "dtype": name_of_dtype(dtype), "device": device.type}
        ranks.tell({"do": "load", **options, "quantize": quantize, "context": context})
        share = ranks.share_of(config, format, quantize, device)
        ranks.agree_on_files(folder)
    weights = load_weights(folder, config, dtype, device, str(name), format, quantize, share)
    if ranks is not None:
        ranks.wait_for_all()
        config = share.config
    return Model(str(name), folder, config, weights, tokenizer, sampling, eos, ranks)


# Files in which older writers say what `quantization_config` in config.json says now, and their names for its keys
OLDER_FORMATS = ("quantize_config.json", "quant_config.json")
OLDER_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def format_beside(folder: Path) -> Format | None:
    """A packed checkpoint's format, as AutoGPTQ and AutoAWQ wrote it beside config.json; None where they have not."""
    path, given = quantization_beside(folder)
    if not given:
        return None
    with refusing(path):
        method = given["quant_method"]
        require(method in ("awq", "gptq"), f"quant_method {method!r} is not supported in this file")
        return awq_format(given) if method == "awq" else gptq_format(given)


def quantization_beside(folder: Path) -> tuple[Path, dict]:
    """(the file, what it says in the keys that `quantization_config` has now); nothing where there is no such file."""
    for name in OLDER_FORMATS:
        found = read_json_if_there(folder / name)
        given = {OLDER_KEYS.get(key, key): value for key, value in found.items() if value is not None}
        if given:
            method = "awq" if "zero_point" in given else "gptq"
            return folder / name, {"quant_method": method} | given
    return folder, {}


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the first of cuda, mps and cpu that this machine has."""
    is_present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        present = [kind for kind in is_present if is_present[kind]]
        return torch.device(present[0])
    with refusing(f"device {device!r} is none: use one of {', '.join(is_present)}, auto"):
        chosen = torch.device(device)
        require(chosen.type in is_present, f"{chosen.type} is not supported")
    here = is_present[chosen.type]
    require(here, f"device {chosen.type} is not available on this machine: use cpu or auto")
    return chosen


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name."""
    chosen = DTYPES[dtype] if dtype in [*DTYPES] else dtype
    require(chosen in [*DTYPES.values()], f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    return chosen


def dtype_of(settings: dict, folder: Path | None, few_bits_on_cpu: bool = False) -> str:
    """What config.json says; else the checkpoint's own.

    But PyTorch's products with 8 and 4 bits on a CPU are fast with bfloat16, and not with float16.
    """
    dtype = dtype_in(settings)
    if dtype is None and folder is not None:
        dtype = stored_dtype(folder)
    if few_bits_on_cpu and dtype == "float16":
        return "bfloat16"
    return dtype or "float32"


def dtype_in(settings: dict) -> str | None:
    for key in ("dtype", "torch_dtype"):  # as transformers writes it today, and as it did
        name = settings.get(key)
        if name and name != "auto":
            dtype = getattr(torch, name.removeprefix("torch."), None)  # PyTorch has short names too, such as half
            supported = dtype in DTYPES.values()
            require(supported, f"config.json: {key} {name!r} is not supported: use --dtype with {', '.join(DTYPES)}")
            return name_of_dtype(dtype)
    return None


def read_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The folder's tokenizer. It may know a few ids past the embedding, such as a [PAD] that nobody feeds."""
    path = folder / "tokenizer.json"
    require_there(path)
    tokenizer = Tokenizer(folder)
    V = config.vocab_size
    require(tokenizer.last_of_model < V, f"{path}: {tokenizer.size} ids, more than config.json's vocab_size {V}")
    tokenizer.size = min(tokenizer.size, V)
    return tokenizer


def fetch_config(name: str) -> dict:
    """config.json of the local folder or hub repository of that name, without anything else of it.

    But where older writers say beside it how the checkpoint is packed, it is as if config.json did.
    """
    with refusing(f"{name}: neither a folder nor to be had from the hub"), reasons_of_the_hub():
        folder = local_folder(name)
        if folder is None:
            files = listed_on_hub(name)
            beside = [file for file in OLDER_FORMATS if file in (files or [])]
            for file in [*beside, "config.json"]:  # small ones
                download = functools.partial(huggingface_hub.hf_hub_download, name, file, **what_is_kept(files))
                folder = Path(in_time(download, 10 * HUB_SECONDS)).parent
    settings = read_config(folder / "config.json")
    if format_of(settings) is None and format_beside(folder) is not None:
        _, settings["quantization_config"] = quantization_beside(folder)
    return settings


def read_config(path: Path) -> dict:
    require_there(path)
    return read_json(path)


def fetch(name: str, with_tokenizer: bool = True) -> Path:
    """The local folder of that name (`~` is the user's home), or the downloaded hub repository.

    Raises InputError, before anything is downloaded, where that repository lacks a file that is needed.
    """
    with refusing(f"{name}: neither a folder nor to be had from the hub"), reasons_of_the_hub():
        folder = local_folder(name)
        if folder is None:
            files = listed_on_hub(name)
            if files:
                require_listed(files, with_tokenizer)
            download = huggingface_hub.snapshot_download
            folder = Path(download(name, allow_patterns=FILES, tqdm_class=Bar, **what_is_kept(files)))
    close_bars()
    return folder


def what_is_kept(files: list[str] | None) -> dict:
    """What a download is told where the hub does not answer: to take what is kept here."""
    return {"local_files_only": True} if files is None else {}


def listed_on_hub(name: str) -> list[str] | None:
    """The repository's files; none where the hub refuses, which a download then says; None where it does not answer.

    A hub that says nothing, or that it has too much to do, would be waited for, for minutes.
    """
    try:
        ask = functools.partial(huggingface_hub.HfApi().repo_info, name, timeout=HUB_SECONDS)
        about = in_time(ask, 3 * HUB_SECONDS)  # a byte now and then is no answer
    except InputError:
        return None
    except Exception as error:  # each version of the library has others; all but these will come again
        status = getattr(getattr(error, "response", None), "status_code", 0)
        is_silent = "Timeout" in type(error).__name__ or status == 429 or status >= 500
        return None if is_silent else []
    return [file.rfilename for file in about.siblings or []]


def local_folder(name: str) -> Path | None:
    """The folder of that name here; None where there is none, and the hub is to be asked."""
    require(name, "its name is empty")
    path = Path(name).expanduser()
    require(not path.is_file(), "it is a file: give the folder that it lies in")
    require(path.is_dir() or not os.path.lexists(path), "what has that name here is no folder, nor a link to one")
    return path if path.is_dir() else None


# What can be done about the usual failures, by the names of the hub's exceptions (to import them takes a while)
REASONS = {
    "GatedRepoError": "it is gated, its owners ask for consent: give it on its page, and log in by `hf auth login`",
    "RepositoryNotFoundError": "no such repository, or a private one: then log in by `hf auth login`",
    "HFValidationError": "no such folder is here; and on the hub, names are as Qwen/QwQ-32B, with nothing around them",
    "LocalEntryNotFoundError": "the hub cannot be reached, and nothing of it is kept here",
    "OfflineModeIsEnabled": "the hub is not asked (HF_HUB_OFFLINE), and nothing of it is kept here",
    "EntryNotFoundError": "the repository has no config.json",
}


@contextmanager
def reasons_of_the_hub():
    """Say what can be done; what the library says is long, and for programmers."""
    try:
        yield
    except Exception as error:
        for kind in type(error).__mro__:
            if kind.__name__ in REASONS:
                raise InputError(REASONS[kind.__name__]) from error
        raise
