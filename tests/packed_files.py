"""The three formats of 4-bit checkpoints, stated once more, in NumPy, number by number: what the tests hold ours to.

In each, w[n, e] = (code[n, e] - zero[e // group, n]) * scale[e // group, n]; they differ in where the numbers lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hub_files import make_tensors

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that lies in nibble 0, 1, ... of a word


@dataclass
class Numbers:
    """One matrix, drawn at random: N outputs, E inputs, G groups."""

    codes: np.ndarray  # [N, E], 0 to 15
    zero: np.ndarray  # [G, N], 0 to 15
    scale: torch.Tensor  # [G, N], in the dtype in which it is stored

    @property
    def group(self) -> int:
        return self.codes.shape[1] // len(self.zero)

    def meant(self) -> torch.Tensor:
        """The weights, in float64."""
        N, E = self.codes.shape
        weight = np.zeros((N, E))
        scale = self.scale.double().numpy()
        for e in range(E):
            g = e // self.group
            weight[:, e] = (self.codes[:, e].astype(float) - self.zero[g]) * scale[g]
        return torch.from_numpy(weight)


def draw(N: int, E: int, group: int, random: np.random.Generator, dtype: torch.dtype, symmetric: bool) -> Numbers:
    G = 1 if group == -1 else E // group
    codes = random.integers(0, 16, (N, E))
    zero = np.full((G, N), 8) if symmetric else random.integers(0, 16, (G, N))
    scale = torch.from_numpy(random.uniform(0.01, 0.1, (G, N))).to(dtype)
    return Numbers(codes, zero, scale)


def word(numbers: list[int]) -> int:
    """Eight numbers from 0 to 15 in 32 bits, the first in the lowest; as a signed number."""
    value = 0
    for place, number in enumerate(numbers):
        value |= int(number) << (4 * place)
    return value - 2**32 if value >= 2**31 else value


def pack_rows(numbers: np.ndarray, order: list[int] | None = None) -> torch.Tensor:
    """[rows, columns] to words of eight columns each, [rows, columns / 8]."""
    order = order or list(range(8))
    packed = [[word([row[start + place] for place in order]) for start in range(0, len(row), 8)] for row in numbers]
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def awq(numbers: Numbers) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_rows(numbers.codes.T, AWQ_ORDER),  # [E, N / 8]
        "qzeros": pack_rows(numbers.zero, AWQ_ORDER),  # [G, N / 8]
        "scales": numbers.scale,
    }


def gptq(numbers: Numbers, version: str = "gptq") -> dict[str, torch.Tensor]:
    qzeros = pack_rows(numbers.zero).long()  # [G, N / 8]
    if (
        version == "gptq"
    ):  # one less in each of the eight, by one subtraction from the word: 0 borrows from its neighbour
        qzeros = (qzeros - 0x11111111 + 2**31) % 2**32 - 2**31
    E = numbers.codes.shape[1]
    return {
        "qweight": pack_rows(numbers.codes).T.contiguous(),  # [E / 8, N]
        "qzeros": qzeros.to(torch.int32),
        "scales": numbers.scale,
        "g_idx": torch.tensor([e // numbers.group for e in range(E)], dtype=torch.int32),
    }


def compressed_tensors(numbers: Numbers, symmetric: bool) -> dict[str, torch.Tensor]:
    made = {
        "weight_packed": pack_rows(numbers.codes),  # [N, E / 8]
        "weight_scale": numbers.scale.T.contiguous(),  # [N, G]
        "weight_shape": torch.tensor(numbers.codes.shape),
    }
    if not symmetric:
        made["weight_zero_point"] = pack_rows(numbers.zero).T.contiguous()  # [N / 8, G]
    return made


# ---- whole checkpoints

FORMATS = ["awq", "gptq", "gptq_v2", "symmetric", "asymmetric"]  # the last two of compressed-tensors


def module(kind: str, numbers: Numbers) -> dict[str, torch.Tensor]:
    """One module's tensors by their names within it."""
    if kind == "awq":
        return awq(numbers)
    if kind in ("gptq", "gptq_v2"):
        return gptq(numbers, kind)
    return compressed_tensors(numbers, kind == "symmetric")


def quantization_config(kind: str, group: int) -> dict:
    """As config.json has it."""
    if kind == "awq":
        settings = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", **settings, "modules_to_not_convert": None}
    if kind in ("gptq", "gptq_v2"):
        settings = {"bits": 4, "group_size": group, "desc_act": False, "sym": False}
        return {"quant_method": "gptq", **settings, "checkpoint_format": kind}
    weights = {"num_bits": 4, "type": "int", "symmetric": kind == "symmetric", "dynamic": False}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"format": "pack-quantized", "config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", **settings, "kv_cache_scheme": None}


@dataclass
class Checkpoint:
    config: dict  # config.json
    tensors: dict[str, torch.Tensor]  # as in the files
    meant: dict[str, torch.Tensor] = field(default_factory=dict)  # what a plain checkpoint would hold, in float64


def pack(
    config: dict,
    kind: str,
    group: int,
    keep: tuple[str, ...] = ("lm_head", "mlp.gate."),
    dtype: torch.dtype = torch.float16,
    biases: bool = False,
    qk_norms: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """A model of this shape whose matrices are packed; but for those whose names hold one of `keep`."""
    random = np.random.default_rng(seed)
    made = Checkpoint(config | {"quantization_config": quantization_config(kind, group)}, {})
    for name, tensor in make_tensors(config, biases, qk_norms).items():
        is_matrix = tensor.dim() == 2 and name != "model.embed_tokens.weight"
        if not is_matrix or any(part in name for part in keep):
            made.tensors[name] = tensor
            made.meant[name] = tensor.double()
            continue
        numbers = draw(*tensor.shape, group, random, dtype, kind == "symmetric")
        for part, value in module(kind, numbers).items():
            made.tensors[name.removesuffix("weight") + part] = value
        made.meant[name] = numbers.meant()
    return made
