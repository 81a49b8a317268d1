"""safetensors files to Weights: one table says which tensor of a checkpoint lies where.

Each file is opened once, and each tensor is copied straight to its place: a matrix here may hold several tensors of the
checkpoint, one below the other. How it holds them (as they are, or in fewer bits) is the business of quantized.py.
"""

import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import Config, LayerKind
from ..errors import InputError, allocating, refusing, require
from ..files import read_json, require_file
from ..packed import FourBit, Stacked
from ..weights import Dense, Layer, Matrix, Weights, name_of_dtype
from .folder import require_there
from .progress import Bar
from .quantized import FLOATS, PACKED, Checked, Format, Packed, Place, Plain, Storage, Turned, storage_of

if TYPE_CHECKING:
    from ..gpu.several import Share

MATRICES = ("qkv", "out", "gate_up", "down")  # fields of Layer that are matrices, and not plain tensors
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EACH_HAS = "layers.0.input_layernorm.weight"  # every checkpoint, packed or not, and once
MOST_EXPERTS = 2**16  # of a layer: far from every model, but a file may claim any number
# What PyTorch puts into the names of a model that it has compiled, or shared out for its training
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# Tensors that packed checkpoints have, by the formats of AWQ and GPTQ, compressed-tensors, FP8 and bitsandbytes
PACKED_ENDS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")
LFS_POINTER = b"version https://git-lfs"  # what such a file begins with


# ---- which tensors there are


@dataclass(frozen=True)
class Extras:
    """What a family's layers have besides, or in another form: seen from the names of the checkpoint's tensors."""

    biases: bool = False  # of q, k and v
    out_bias: bool = False
    qk_norms: bool = False
    fused: bool = False  # q, k and v lie in one tensor, as do gate and up (Phi-3)


def extras_in(names: Collection[str]) -> Extras:
    def any_ends_with(end: str | tuple[str, ...]) -> bool:
        return any(name.endswith(end) for name in names)

    return Extras(
        biases=any_ends_with(("q_proj.bias", "k_proj.bias", "v_proj.bias")),
        out_bias=any_ends_with("o_proj.bias"),
        qk_norms=any_ends_with("q_norm.weight"),
        fused=any(".qkv_proj." in name for name in names),
    )


def tensors_of_layer(config: Config, kind: LayerKind, extras: Extras) -> dict[str, dict[str, list[int]]]:
    """For each field of Layer: the checkpoint's tensors that lie there one below the other, with their shapes."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    fields = {
        "attn_norm": {"input_layernorm.weight": [E]},
        "qkv": {
            "self_attn.q_proj.weight": [H * D, E],
            "self_attn.k_proj.weight": [K * D, E],
            "self_attn.v_proj.weight": [K * D, E],
        },
        "out": {"self_attn.o_proj.weight": [E, H * D]},
        "mlp_norm": {"post_attention_layernorm.weight": [E]},
        "gate_up": {
            "mlp.gate_proj.weight": [F, E],
            "mlp.up_proj.weight": [F, E],
        },
        "down": {"mlp.down_proj.weight": [E, F]},
    }
    if extras.fused:
        fields["qkv"] = {"self_attn.qkv_proj.weight": [(H + 2 * K) * D, E]}
        fields["gate_up"] = {"mlp.gate_up_proj.weight": [2 * F, E]}
    if extras.biases:
        fields["qkv_bias"] = {
            "self_attn.q_proj.bias": [H * D],
            "self_attn.k_proj.bias": [K * D],
            "self_attn.v_proj.bias": [K * D],
        }
    if extras.out_bias:
        fields["out_bias"] = {"self_attn.o_proj.bias": [E]}
    if extras.qk_norms:
        fields["q_norm"] = {"self_attn.q_norm.weight": [D]}
        fields["k_norm"] = {"self_attn.k_norm.weight": [D]}
    if kind.experts:
        fields.update(tensors_of_experts(config))
    return fields


def tensors_of_experts(config: Config) -> dict[str, dict[str, list[int]]]:
    """The same for a layer's router and its experts, which lie one below the other."""
    E, F, X = config.hidden_size, config.moe_intermediate_size, config.num_experts
    fields = {"router": {"mlp.gate.weight": [X, E]}, "gate_up": {}, "down": {}}
    for expert in range(X):
        fields["gate_up"][f"mlp.experts.{expert}.gate_proj.weight"] = [F, E]
        fields["gate_up"][f"mlp.experts.{expert}.up_proj.weight"] = [F, E]
        fields["down"][f"mlp.experts.{expert}.down_proj.weight"] = [E, F]
    return fields


def empty_weights(
    config: Config,
    dtype: torch.dtype,
    device: torch.device | str,
    extras: Extras = Extras(),
    storage: Storage | None = None,
) -> tuple[Weights, dict[str, Place]]:
    """Weights of the right shapes, not filled; and what fills them: the place of each tensor of a checkpoint, by name.

    Matrices are stored as `storage` says, by default as they are. On device "meta" they take no memory.
    """
    if storage is None:
        storage = Plain()
    places: dict[str, Place] = {}

    def allocate(shapes: dict[str, list[int]]) -> Tensor:
        """One tensor for all of these; the place of each in it is noted under its name."""
        rows = [shape[0] for shape in shapes.values()]
        _, *columns = next(iter(shapes.values()))  # the same for all; none, where they are vectors
        whole = torch.empty(sum(rows), *columns, dtype=dtype, device=device)
        places.update(zip(shapes, whole.split(rows)))
        return whole

    def allocate_matrix(shapes: dict[str, list[int]], stack: tuple[int, ...] = ()) -> Matrix:
        matrix, its_places = storage.allocate(shapes, stack, dtype, device)
        places.update(its_places)
        return matrix

    def allocate_layer(number: int, kind: LayerKind) -> Layer:
        fields = {}
        for field, shapes_by_part in tensors_of_layer(config, kind, extras).items():
            shapes = {f"model.layers.{number}.{part}": shape for part, shape in shapes_by_part.items()}
            has_experts = kind.experts and field in ("gate_up", "down")
            stack = (config.num_experts,) if has_experts else ()
            fields[field] = allocate_matrix(shapes, stack) if field in MATRICES else allocate(shapes)
        return Layer(**fields)

    V, E = config.vocab_size, config.hidden_size
    embed = allocate({EMBEDDING: [V, E]})
    norm = allocate({"model.norm.weight": [E]})
    if not config.tie_word_embeddings:
        head = allocate_matrix({HEAD: [V, E]})
    elif storage.rounds:
        # The head is a rounded copy: a step reads all of it, and of the embedding a few rows.
        head, filled = storage.allocate({HEAD: [V, E]}, (), dtype, device)
        places[EMBEDDING] = both(embed, filled[HEAD])
    else:
        head = Dense(embed)
    layers = [allocate_layer(number, kind) for number, kind in enumerate(config.layer_kinds)]
    return Weights(embed, layers, norm, head), places


def both(first: Tensor, second: Place) -> Place:
    def fill(tensor: Tensor) -> None:
        first.copy_(tensor)
        second.copy_(tensor)

    return Turned(list(first.shape), fill)


# ---- reading them


@dataclass
class Stored:
    """A tensor of the checkpoint, that has not been read yet."""

    name: str
    path: Path
    file: safe_open  # that path, opened
    dtype: str  # safetensors' name
    shape: list[int]
    part: tuple | None = None  # the indices of it, where it lies in a larger one of that name

    def read(self) -> Tensor:
        if self.part is None:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[self.part]


def load_weights(
    folder: Path,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    model: str = "the model",
    format: Format | None = None,
    quantize: int | None = None,
    share: "Share | None" = None,
) -> Weights:
    """Fill Weights from a folder's safetensors. `model` is its name, for messages.

    `format` is that of a packed checkpoint. A plain one may be rounded to `quantize` bits, 8 or 4. `share` is what one
    of several GPUs is to have of them (None: everything), and no more is read. Raises InputError, by name, for a tensor
    that is unknown, missing, stands twice, or has another shape or dtype.
    """
    stored = find_tensors(folder)
    # Saved rotations are no parameters; nor is the head that a tied model shares with its embedding.
    stored = {name: tensor for name, tensor in stored.items() if ".rotary_emb." not in name}
    shared_head = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    if shared_head is not None and EMBEDDING not in stored:  # of two names for one tensor, some writers keep this one
        stored[EMBEDDING] = shared_head
        shared_head = None
    storage = storage_of(format, quantize, {name: tensor.dtype for name, tensor in stored.items()})

    require_merged(stored)
    if format is None:
        require_unpacked(stored)
    zero_biases = find_zero_biases(stored) if isinstance(storage, Packed) else set()
    extras = extras_in(stored.keys() - zero_biases)
    require_most_layers(config, stored)
    planned, expected = empty_weights(config, dtype, "meta", extras, storage)
    stored = {name: tensor for name, tensor in stored.items() if name in expected or name not in zero_biases}
    require_packed_where_it_may_be(config, expected, stored)
    require_the_same_tensors(expected, stored)
    for name, place in expected.items():
        if isinstance(place, Checked):
            fill(place, stored.pop(name))

    if share is None:
        allocate = partial(empty_weights, config)
    else:
        allocate = share.empty_weights
        planned, places = allocate(dtype, "meta", extras, storage)
        stored = share.cut(stored, places)
    stored_as = storage.name or name_of_dtype(dtype)
    nbytes = planned.nbytes
    if device.type == "cpu":
        nbytes += bytes_to_prepare(planned, dtype)
    with allocating(nbytes, f"{model}'s weights in {stored_as}", device):
        weights, places = allocate(dtype, device, extras, storage)
    for name, tensor in Bar(stored.items(), desc="loading"):
        fill(places[name], tensor)  # so one tensor at a time is held twice, and no more
    if shared_head is not None:
        head = shared_head.read().to(weights.embed)
        same = torch.equal(head, weights.embed)
        require(same, "tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return weights


def bytes_to_prepare(weights: Weights, dtype: torch.dtype) -> int:
    """What matrices in 4 bits will take besides, once they have been multiplied by on a CPU."""
    matrices = [weights.head]
    for layer in weights.layers:
        matrices += [getattr(layer, field) for field in MATRICES]
    nbytes = 0
    for matrix in matrices:
        parts = matrix.parts if isinstance(matrix, Stacked) else [matrix]
        nbytes += sum(part.bytes_to_prepare(dtype) for part in parts if isinstance(part, FourBit))
    return nbytes


def fill(place: Place, tensor: Stored) -> None:
    with refusing(f"{tensor.path.name}: {tensor.name}"):
        place.copy_(tensor.read())


def find_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, by the names that `empty_weights` has for them."""
    tensors = [tensor for path in safetensors_files(folder) for tensor in open_file(path)]
    start = start_of_names({WRAPPERS.sub("", tensor.name) for tensor in tensors})
    stored: dict[str, Stored] = {}
    for whole in tensors:
        for name, tensor in experts_in(usual_name(whole.name, start), whole).items():
            if name in stored:
                other = stored[name].path
                raise InputError(f"{tensor.path.name}: tensor {name} stands in {other.name} too")
            stored[name] = tensor
    return stored


def start_of_names(names: Collection[str]) -> str:
    """What stands before `layers` in the names: `model.` as a rule, and where that is not clear.

    It is nothing where a model was saved without its head, `language_model.model.` in one that sees images as well.
    """
    starts = [name.removesuffix(EACH_HAS) for name in names if name.endswith(EACH_HAS)]
    return starts[0] if len(starts) == 1 else "model."


def usual_name(name: str, start: str) -> str:
    name = WRAPPERS.sub("", name)
    part = name.removeprefix(start)
    if name.startswith(start) and part.startswith(("embed_tokens.", "layers.", "norm.", "rotary_emb.")):
        return "model." + part
    # What stands beside `model`, the head, begins with what stands before it.
    outer = start.removesuffix("model.") if f".{start}".endswith(".model.") else ""
    return name.removeprefix(outer)


def experts_in(name: str, tensor: Stored) -> dict[str, Stored]:
    """Each expert's tensors, by name, where this one holds all of a layer's: so transformers may save them.

    Any other tensor as it is.
    """
    start, mark, what = name.rpartition(".mlp.experts.")
    has_the_name = mark and what in ("gate_up_proj", "down_proj")
    has_the_shape = len(tensor.shape) == 3 and math.prod(tensor.shape) > 0 and tensor.shape[0] <= MOST_EXPERTS
    if not (has_the_name and has_the_shape):
        return {name: tensor}
    X, N, E = tensor.shape
    rows = {"down_proj": slice(0, N)}
    if what == "gate_up_proj":
        rows = {"gate_proj": slice(0, N // 2), "up_proj": slice(N // 2, N)}
    parts = {}
    for expert in range(X):
        for part, its_rows in rows.items():
            shape = [its_rows.stop - its_rows.start, E]
            expert_name = f"{start}{mark}{expert}.{part}.weight"
            parts[expert_name] = replace(tensor, shape=shape, part=(expert, its_rows))
    return parts


def open_file(path: Path) -> list[Stored]:
    """The tensors of one safetensors file, of which its header alone has been read."""
    tensors = []
    require_there(path)
    with refusing(f"{path} cannot be read"):
        require_file(path)
        require_no_pointer(path)
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 (not a dict)
            entry = file.get_slice(name)
            tensors.append(Stored(name, path, file, entry.get_dtype(), entry.get_shape()))
    return tensors


def require_no_pointer(path: Path) -> None:
    """Raise InputError for what a repository has in a file's place that was cloned without Git LFS."""
    with path.open("rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    require(not is_pointer, "it is a pointer of Git LFS, not the weights: fetch those by `git lfs pull`")


def stored_dtype(folder: Path) -> str | None:
    """The dtype of a checkpoint's embedding, by PyTorch's name; None where it has none."""
    stored = find_tensors(folder)
    embedding = stored.get(EMBEDDING) or stored.get(HEAD)
    if embedding is None or embedding.dtype not in FLOATS:
        return None
    return name_of_dtype(FLOATS[embedding.dtype])


def require_merged(stored: dict[str, Stored]) -> None:
    for name, tensor in sorted(stored.items()):
        is_adapters = ".lora_" in name or ".base_layer." in name
        advice = "save the model after merging it"
        require(not is_adapters, f"{tensor.path.name}: {name} belongs to an adapter that is not merged: {advice}")


def require_unpacked(stored: dict[str, Stored]) -> None:
    for name, tensor in sorted(stored.items()):
        is_packed = name.endswith(PACKED_ENDS)
        lacks = "no quantization_config in config.json says how"
        require(not is_packed, f"{tensor.path.name}: {name} is packed, and {lacks}")


def require_most_layers(config: Config, stored: dict[str, Stored]) -> None:
    """A few numbers in config.json can claim any number of tensors: a checkpoint so incomplete is not gone through."""
    sparse_layers = sum(kind.experts for kind in config.layer_kinds)
    claimed = config.num_hidden_layers + sparse_layers * config.num_experts
    found = len(stored)
    require(claimed < found + 1000, f"the checkpoint lacks most of config.json's layers: {found} tensors")


def find_zero_biases(stored: dict[str, Stored]) -> set[str]:
    """Some writers of GPTQ give every module a bias, of zeros where the model has none: zeros change nothing."""
    biases = {name for name, tensor in stored.items() if name.endswith(".bias") and tensor.dtype in FLOATS}
    return {name for name in biases if not stored[name].read().any()}


def require_packed_where_it_may_be(config: Config, expected: dict[str, Place], stored: dict[str, Stored]) -> None:
    """Raise InputError, with the cause, for a packed module that nobody expects to be packed."""
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        plain = f"{module}.weight"
        if part not in PACKED or name in expected or plain in stored:
            continue
        what = f"{tensor.path.name}: {name}: packed"
        has_two_heads = plain == HEAD and config.tie_word_embeddings
        require(not has_two_heads, f"{what}, a head of its own, but config.json's tie_word_embeddings is true")
        require(plain not in expected, f"{what}, which this module must not be: use a copy that leaves it as it is")


def require_the_same_tensors(expected: dict[str, Place], stored: dict[str, Stored]) -> None:
    missing = expected.keys() - stored.keys()
    require(not missing, f"the checkpoint lacks {name_some(missing)}")
    unknown = stored.keys() - expected.keys()
    require(not unknown, f"the checkpoint has tensors that this architecture does not know: {name_some(unknown)}")
    for name, tensor in stored.items():
        found, right = tensor.shape, list(expected[name].shape)
        require(found == right, f"{tensor.path.name}: {name} has shape {found}, not {right} as by config.json")
        dtypes = getattr(expected[name], "dtypes", FLOATS)  # a plain tensor takes any numbers with a fraction
        one_of = ", ".join(dtypes)
        require(tensor.dtype in dtypes, f"{tensor.path.name}: {name} is {tensor.dtype}, none of {one_of}")


def name_some(names: set[str]) -> str:
    """The first three, in order, and how many more there are."""
    first = ", ".join(sorted(names)[:3])
    more = len(names) - 3
    return f"{first} and {more} more" if more > 0 else first


def safetensors_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names: files of this folder, wherever the folder comes from.

    A folder that was saved once more, in one piece, may still have the index of the pieces before.
    """
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(whole) or not os.path.lexists(index):
        return [whole]
    with refusing(index):
        file_of_tensor = read_json(index).get("weight_map", {})
        names = set(file_of_tensor.values())
        outside = {name for name in names if not is_safetensors_name(name)}
        require(not outside, f"{name_some(outside)} must be a safetensors file's name, in the same folder")
        return [folder / name for name in sorted(names)]


def is_safetensors_name(name: str) -> bool:
    """Does it name a file of the same folder, and not one elsewhere?"""
    path = Path(name)
    return path.name == name and path.suffix == ".safetensors"
