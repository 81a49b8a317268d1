"""How the matrices of a model are stored: as they are, rounded to 8 or 4 bits, or packed in the checkpoint already.

Three formats of packed checkpoints are read, each with 4 bits: AWQ (version gemm), GPTQ, and compressed-tensors'
pack-quantized. For each, a few lines say which tensors stand for one matrix, and how they become a FourBit.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import refusing, require
from ..packed import HIGHEST_CODE_OF_4, EightBit, FourBit, Stacked, empty_eight_bit, empty_four_bit
from ..weights import Dense, Matrix

# safetensors' names of dtypes
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = ("I32",)  # of 32 bits: eight codes
SIZES = ("I64", "I32")
PACKED = ("qweight", "weight_packed")  # a module's tensor of codes, by its name within it, in any of the formats

CODES_IN_A_WORD = 8
ONE_IN_EACH = 0x11111111
GROUPS = (128, 64, 32)  # columns that share a scale, where we choose: the first that divides the row


class Place(Protocol):
    """Where a tensor of a checkpoint goes to. A plain tensor is one itself."""

    shape: list[int]  # that it must have in the checkpoint

    def copy_(self, tensor: Tensor) -> object:
        """Take it, in whatever form it is to be stored."""


@dataclass
class Turned:
    """A place for a tensor that is stored in another form than it comes in."""

    shape: list[int]
    copy_: Callable[[Tensor], object]
    dtypes: Collection[str] = tuple(FLOATS)  # safetensors' names of those that it may come in


class Checked(Turned):
    """A place for a tensor that is not stored: it says what the model is like, and `copy_` sees whether that is so."""


class Storage(Protocol):
    """A way to store matrices."""

    name: str  # for messages
    rounds: bool  # numbers of the checkpoint to others?

    def allocate(
        self, shapes: dict[str, list[int]], stack: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Matrix, dict[str, Place]]:
        """One matrix for all of these, one below the other; and the places, by name, of the tensors that fill it.

        `shapes` are those of the checkpoint's `….weight`, by name. Where `stack` is (X,), they are those of X experts,
        and the matrix is a stack of as many.
        """


@dataclass
class Plain:
    """Every matrix as it is, in the model's dtype."""

    name: str = ""
    rounds = False

    def allocate(self, shapes, stack, dtype, device):
        matrix = Dense(torch.empty(*stack, *total_shape(shapes, stack), dtype=dtype, device=device))
        places = {}
        for name, (part, start) in parts_of(matrix, shapes, stack).items():
            places[name] = part.tensor[start : start + shapes[name][0]]
        return matrix, places


@dataclass
class Rounded:
    """Every matrix of a plain checkpoint rounded to 8 bits, or to 4; the head to 8 in any case."""

    bits: int
    rounds = True

    @property
    def name(self) -> str:
        return f"{self.bits} bits"

    def allocate(self, shapes, stack, dtype, device):
        N, E = total_shape(shapes, stack)
        # What PyTorch's products for a CPU take; elsewhere scales need not be short
        dtype_of_scale = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if self.bits == 8 or "lm_head.weight" in shapes:
            matrix = empty_eight_bit(N, E, dtype_of_scale, device, stack)
        else:
            first = next(iter(shapes))
            group = self.group_of(first, E)
            require(group, f"4 bits: {first} has rows of {E} numbers, no multiple of {GROUPS[-1]}")
            matrix = empty_four_bit(N, E, group, dtype_of_scale, device, stack)
        places = {}
        for name, (part, start) in parts_of(matrix, shapes, stack).items():
            places[name] = Turned(shapes[name], functools.partial(self.fill, part, start, name))
        return matrix, places

    def group_of(self, name: str, E: int) -> int | None:
        """Columns that share a scale in 4 bits; `name` is a tensor's of the matrix."""
        return largest_group(E)

    def fill(self, part: EightBit | FourBit, start: int, name: str, weight: Tensor) -> None:
        """Put the checkpoint's tensor of that name in its place."""
        require_finite(weight)  # what is not would become a number like any other
        part.fill(start, weight)


def require_finite(numbers: Tensor) -> None:
    lowest, highest = numbers.aminmax()  # both NaN where any number is
    finite = lowest.isfinite() and highest.isfinite()
    require(finite, "it holds NaN or infinite numbers")


def largest_group(E: int) -> int | None:
    """Columns that share a scale, where we choose."""
    return next((group for group in GROUPS if E % group == 0), None)


def parts_of(matrix: Matrix, shapes: dict[str, list[int]], stack: tuple[int, ...]) -> dict[str, tuple[Matrix, int]]:
    """Where each tensor lies: the matrix (of a stack, its expert's), and the first row there."""
    per_expert = len(shapes) // stack[0] if stack else len(shapes)
    parts = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if number % per_expert == 0:
            part = matrix[number // per_expert] if stack else matrix
            start = 0
        parts[name] = part, start
        start += shape[0]
    return parts


def total_shape(shapes: dict[str, list[int]], stack: tuple[int, ...]) -> tuple[int, int]:
    """[N, E] of the matrix, or of each of a stack."""
    rows = sum(N for N, _ in shapes.values())
    [E] = {E for _, E in shapes.values()}
    return rows // stack[0] if stack else rows, E


# ---- checkpoints that are packed already


@dataclass
class Rows:
    """The rows of a matrix in 4 bits that one module of a checkpoint fills."""

    matrix: FourBit
    start: int
    shape: list[int]  # [N outputs, E inputs]

    @property
    def _slice(self) -> slice:
        return slice(self.start, self.start + self.shape[0])

    def take_codes(self, codes: Tensor) -> None:
        """[N, E], from 0 to 15"""
        self.matrix.fill_codes(self.start, codes.to(torch.uint8))

    def take_zero(self, zero: Tensor) -> None:
        """[E / group, N]; or one of all groups, or of all"""
        self.matrix.zero[:, self._slice] = zero.to(self.matrix.zero)

    def take_scale(self, scale: Tensor) -> None:
        """[E / group, N]; or one of all groups, or of all"""
        scale = scale.to(self.matrix.scale.dtype)
        require_finite(scale)
        self.matrix.scale[:, self._slice] = scale

    def on_device(self, tensor: Tensor) -> Tensor:
        """There it is unpacked sooner."""
        return tensor.to(self.matrix.codes.device)


class Format(Protocol):
    """A format of packed checkpoints."""

    name: str
    scales: str  # the name of a module's tensor of scales
    group: int | None  # columns that share a scale; None: the whole row
    packs_outputs: bool  # does any tensor hold eight outputs in a word,
    packs_inputs: bool  # or eight inputs?

    def places(self, rows: Rows) -> dict[str, Place]:
        """The tensors of one module, by their names within it."""


@dataclass
class Awq:
    """AutoAWQ's version "gemm": a word holds eight outputs of one input, in an order that suits its kernel."""

    group: int | None
    name: str = "AWQ"
    scales: str = "scales"
    packs_outputs: bool = True
    packs_inputs: bool = False

    # Which of eight columns lies in each nibble of a word, beginning with the lowest
    COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)

    def places(self, rows: Rows) -> dict[str, Place]:
        N, E = rows.shape
        groups = groups_of(E, self.group)
        return {
            "qweight": Turned(
                [E, N // CODES_IN_A_WORD],
                lambda words: rows.take_codes(self._unpack(rows.on_device(words)).T),
                WORDS,
            ),
            "qzeros": Turned(
                [groups, N // CODES_IN_A_WORD],
                lambda words: rows.take_zero(self._unpack(words)),
                WORDS,
            ),
            "scales": Turned([groups, N], rows.take_scale),
        }

    def _unpack(self, words: Tensor) -> Tensor:
        """[E, N / 8] words to [E, N] codes."""
        nibbles = nibbles_of(words)
        nibble_of_column = [self.COLUMN_OF_NIBBLE.index(column) for column in range(CODES_IN_A_WORD)]
        return nibbles[..., nibble_of_column].flatten(1)


@dataclass
class Gptq:
    """GPTQ: a word holds eight inputs of one output. Zero points are stored less one, in the format's first version."""

    group: int | None
    zero_is_less_one: bool = True
    name: str = "GPTQ"
    scales: str = "scales"
    packs_outputs: bool = True
    packs_inputs: bool = True

    def places(self, rows: Rows) -> dict[str, Place]:
        N, E = rows.shape
        groups = groups_of(E, self.group)
        return {
            "qweight": Turned(
                [E // CODES_IN_A_WORD, N],
                lambda words: rows.take_codes(nibbles_of(rows.on_device(words).T).flatten(1)),
                WORDS,
            ),
            "qzeros": Turned(
                [groups, N // CODES_IN_A_WORD],
                lambda words: rows.take_zero(nibbles_of(self._true_zeros(words)).flatten(1)),
                WORDS,
            ),
            "scales": Turned([groups, N], rows.take_scale),
            "g_idx": Checked([E], lambda group_of_input: require_in_order(group_of_input, E // groups), WORDS),
        }

    def _true_zeros(self, words: Tensor) -> Tensor:
        """Writers take one off each of a word's eight at once, so that a zero point of 0 borrows from its neighbour."""
        return words + ONE_IN_EACH if self.zero_is_less_one else words


@dataclass
class CompressedTensors:
    """compressed-tensors' "pack-quantized": a word holds eight inputs of one output, each with 8 added to it."""

    group: int | None
    symmetric: bool
    name: str = "compressed-tensors"
    scales: str = "weight_scale"
    packs_inputs: bool = True

    @property
    def packs_outputs(self) -> bool:
        return not self.symmetric  # zero points, if there are any

    def places(self, rows: Rows) -> dict[str, Place]:
        N, E = rows.shape
        groups = groups_of(E, self.group)
        found = {
            "weight_packed": Turned(
                [N, E // CODES_IN_A_WORD],
                lambda words: rows.take_codes(nibbles_of(rows.on_device(words)).flatten(1)),
                WORDS,
            ),
            "weight_scale": Turned([N, groups], lambda scale: self._take_scale(rows, scale)),
            "weight_shape": Checked([2], lambda shape: require_shape(shape, rows.shape), SIZES),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Turned(
                [N // CODES_IN_A_WORD, groups],
                lambda words: rows.take_zero(nibbles_of(words.T).flatten(1)),
                WORDS,
            )
        return found

    def _take_scale(self, rows: Rows, scale: Tensor) -> None:
        rows.take_scale(scale.T)
        if self.symmetric:  # no tensor brings its zero points
            rows.take_zero(torch.tensor(8))


def nibbles_of(words: Tensor) -> Tensor:
    """[..., n] words of 32 bits: [..., n, 8] numbers from 0 to 15, that of the lowest bits first."""
    shifts = 4 * torch.arange(CODES_IN_A_WORD, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & HIGHEST_CODE_OF_4).to(torch.uint8)


def groups_of(E: int, group: int | None) -> int:
    return 1 if group is None else E // group


def require_in_order(group_of_input: Tensor, group: int) -> None:
    """GPTQ may give inputs to groups in an order of its own ("act-order", desc_act). That order is not supported."""
    in_order = torch.arange(len(group_of_input)) // group
    same = torch.equal(group_of_input.long(), in_order)
    require(same, "desc_act, inputs in groups out of their order, is not supported: use a model without it")


def require_shape(shape: Tensor, right: list[int]) -> None:
    require(shape.tolist() == right, f"it says {shape.tolist()}, not {right}")


@dataclass
class Packed:
    """The matrices of a packed checkpoint: each module's as it comes, packed or plain."""

    format: Format
    stored: Collection[str]  # names of all tensors of the checkpoint
    dtype_of_scale: torch.dtype
    rounds = False

    @property
    def name(self) -> str:
        return f"4 bits ({self.format.name})"

    def allocate(self, shapes, stack, dtype, device):
        plain = [name for name in shapes if name in self.stored]  # modules_to_not_convert, ignore
        if len(plain) == len(shapes):
            return Plain().allocate(shapes, stack, dtype, device)
        if plain:
            return self._allocate_apart(shapes, stack, dtype, device)
        for name, (N, E) in shapes.items():
            self._require_divisible(name.removesuffix(".weight"), N, E)
        N, E = total_shape(shapes, stack)
        matrix = empty_four_bit(N, E, self._group_of(E), self.dtype_of_scale, device, stack)
        places = {}
        for name, (part, start) in parts_of(matrix, shapes, stack).items():
            rows = Rows(part, start, shapes[name])
            module = name.removesuffix("weight")
            for tensor, place in self.format.places(rows).items():
                places[module + tensor] = place
        return matrix, places

    def _allocate_apart(self, shapes, stack, dtype, device):
        """A matrix of which some modules are packed, and some are not."""
        first = next(iter(shapes))
        require(not stack, f"{first}: experts of one layer that are packed, and others that are not, are not supported")
        matrices = []
        places = {}
        for name, shape in shapes.items():
            matrix, places_of_module = self.allocate({name: shape}, stack, dtype, device)
            matrices.append(matrix)
            places.update(places_of_module)
        return Stacked(matrices), places

    def _require_divisible(self, module: str, N: int, E: int) -> None:
        group = self.format.group or E
        require(E % group == 0, f"{module}: {E} inputs are no multiple of the group size {group}")
        packs = {"inputs": (E, self.format.packs_inputs), "outputs": (N, self.format.packs_outputs)}
        for what, (count, in_words) in packs.items():
            divides = count % CODES_IN_A_WORD == 0
            require(divides or not in_words, f"{module}: {count} {what} are no multiple of {CODES_IN_A_WORD}")

    def _group_of(self, E: int) -> int:
        """Of whole rows, groups that our kernels like: all of a row then have the same scale."""
        if self.format.group is not None:
            return self.format.group
        return largest_group(E) or E


# ---- which of them it is


def storage_of(format: Format | None, quantize: int | None, dtypes: dict[str, str]) -> Storage:
    """How to store the matrices of a model.

    As the checkpoint's `format` says (None: it is plain), or the option `quantize`; `dtypes` are those of the
    checkpoint's tensors, by name.
    """
    if format is None:
        return Plain() if quantize is None else Rounded(quantize)
    require(quantize is None, f"--quantize {quantize}: the checkpoint is packed already ({format.name}, 4 bits)")
    dtypes_of_scales = {dtype for name, dtype in dtypes.items() if name.endswith("." + format.scales)}
    dtype_of_scale = torch.float32
    if dtypes_of_scales in ({"F16"}, {"BF16"}):
        dtype_of_scale = FLOATS[dtypes_of_scales.pop()]
    return Packed(format, dtypes.keys(), dtype_of_scale)


def format_of(settings: dict) -> Format | None:
    """The format that config.json says its checkpoint is packed in; None for a plain one."""
    key, quantization = quantization_in(settings)
    if not quantization:
        return None
    with refusing(f"config.json: {key}"):
        require(isinstance(quantization, dict), f"must be an object, not {quantization!r}")
        given = {key: value for key, value in quantization.items() if value is not None}
        method = given.get("quant_method")
        readers = {"awq": awq_format, "gptq": gptq_format, "compressed-tensors": compressed_tensors_format}
        supported = isinstance(method, str) and method in readers
        require(supported, f"quant_method {method!r} is not supported ({', '.join(readers)} are): use another copy")
        return readers[method](given)


def quantization_in(settings: dict) -> tuple[str, object]:
    """(its key in config.json, what it says)"""
    key = "quantization_config"
    if not settings.get(key):
        key = "compression_config"  # as compressed-tensors called it at first
    return key, settings.get(key)


def says_that_head_is_packed(settings: dict) -> bool:
    """Does config.json, of a format that `format_of` takes? (Whoever has the files asks them instead.)"""
    _, quantization = quantization_in(settings)
    method = quantization["quant_method"]
    if method == "gptq":
        return quantization.get("lm_head") is True
    if method == "compressed-tensors":
        targets = [group.get("targets") for group in quantization["config_groups"].values()]
        return "Linear" in str(targets) and "lm_head" not in str(quantization.get("ignore"))
    return False


def awq_format(given: dict) -> Awq:
    require_only(given, "zero_point", True)  # without them AutoAWQ cannot write this version
    for key in ("version", "format", "checkpoint_format"):  # the last two as GPTQModel writes them
        version = str(given.get(key, "gemm"))
        require(version.lower() == "gemm", f"{key} {version!r} is not supported, only 'gemm'")
    require_common_settings(given, "awq")
    return Awq(group_size(given, "group_size"))


def gptq_format(given: dict) -> Gptq:
    require_only(given, "is_marlin_format", False)
    older_key = given.get("checkpoint_format", "gptq")
    version = given.get("format", older_key)
    same = "checkpoint_format" not in given or version == older_key
    require(same, f"format {version!r} contradicts checkpoint_format {older_key!r}")
    require(version in ("gptq", "gptq_v2"), f"checkpoint_format {version!r} is not supported ('gptq', 'gptq_v2' are)")
    require_common_settings(given, "gptq")
    return Gptq(group_size(given, "group_size"), zero_is_less_one=version == "gptq")


def require_common_settings(given: dict, method: str) -> None:
    """What AWQ and GPTQ share, since GPTQModel writes both."""
    require_only(given, "bits", 4)
    require_only(given, "method", method)
    require_only(given, "pack_dtype", "int32")
    dynamic = given.get("dynamic", {})
    require(isinstance(dynamic, dict), f"dynamic must be an object, not {dynamic!r}")
    for pattern in dynamic:
        is_left = pattern.startswith("-:")  # as it is: the files tell which modules these are
        require(is_left, f"dynamic {pattern!r} is not supported: all packed modules must be packed alike")


def compressed_tensors_format(given: dict) -> CompressedTensors:
    require_only(given, "format", "pack-quantized")
    require_only(given, "kv_cache_scheme", {})
    require_only(given, "transform_config", {})  # rotations of what the weights are multiplied by
    sparsity = given.get("sparsity_config", {})
    is_dense = sparsity == {} or (isinstance(sparsity, dict) and sparsity.get("format") == "dense")
    require(is_dense, "sparsity_config is not supported")
    groups = given.get("config_groups")
    right = isinstance(groups, dict) and len(groups) > 0 and all(isinstance(group, dict) for group in groups.values())
    require(right, f"config_groups must be objects by name, not {groups!r}")
    first, *others = [format_of_group(group) for group in groups.values()]
    alike = all(other == first for other in others)
    require(alike, "config_groups that differ in their weights are not supported")
    return first


def format_of_group(group: dict) -> CompressedTensors:
    """How one of compressed-tensors' groups of modules has its weights packed."""
    for key in ("input_activations", "output_activations"):
        require(not group.get(key), f"{key} are not supported: only weights may be quantised")
    weights = group.get("weights")
    require(isinstance(weights, dict), f"config_groups: weights must be an object, not {weights!r}")
    scheme = {key: value for key, value in weights.items() if value is not None}
    require_only(scheme, "num_bits", 4)
    require_only(scheme, "type", "int")
    require_only(scheme, "dynamic", False)
    order = scheme.get("actorder", False)  # of the inputs: "weight" and "static" have gone back to that of the model
    in_order = order in (False, "weight", "static")
    require(in_order, f"actorder {order!r}, inputs in groups out of their order, is not supported: use another copy")
    strategy = scheme.get("strategy", "group")
    require(strategy in ("group", "channel"), f"strategy {strategy!r} is not supported ('group', 'channel' are)")
    columns = group_size(scheme, "group_size") if strategy == "group" else None
    symmetric = scheme.get("symmetric", True)
    require(isinstance(symmetric, bool), f"symmetric must be true or false, not {symmetric!r}")
    return CompressedTensors(columns, symmetric)


def require_only(given: dict, key: str, only: object) -> None:
    """Raise InputError for another value than this one; silence means it, but for how many bits there are."""
    is_needed = key in ("bits", "num_bits", "format")
    found = given.get(key, None if is_needed else only)
    same = found == only and type(found) is type(only)
    require(same, f"{key} {found!r} is not supported, only {only!r}")


def group_size(given: dict, key: str) -> int | None:
    """Columns that share a scale; None, where -1 says the whole row."""
    size = given.get(key)
    right = type(size) is int and (size == -1 or 1 <= size <= 2**20)
    require(right, f"{key} must be a whole number, or -1 for whole rows, not {size!r}")
    return None if size == -1 else size
