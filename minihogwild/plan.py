"""`--plan`: what a model's weights and cache take, and on which cards they fit, from config.json alone."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from .config import Config, LayerKind
from .errors import InputError
from .hub import fetch_config
from .hub.checkpoint import HEAD, empty_weights
from .hub.config_json import parse_config
from .hub.loading import choose_dtype, dtype_in, dtype_of
from .hub.quantized import Packed, Plain, Rounded, Storage, format_of, says_that_head_is_packed
from .weights import name_of_dtype
from .workers import MOST_WORKERS

CARDS = (8, 12, 16, 24, 48, 80)  # GB of a card, of 2**30 bytes as its makers count
TOKENS = 16384  # that each worker has written
RESERVED = 2**30  # bytes of a card for the driver, and for what a step computes


def plan(model: str, dtype: str = "auto", context: int | None = None) -> str:
    """A table: a row for each way to store the weights; in each card's column how many workers there is room for."""
    settings = fetch_config(model)
    config = parse_config(settings, context)
    format = format_of(settings)
    folder = Path(model).expanduser()
    has_weights = any(folder.glob("*.safetensors"))
    is_supposed = dtype == "auto" and dtype_in(settings) is None and not has_weights
    if dtype == "auto":
        dtype = dtype_of(settings, folder if has_weights else None)
    compute_dtype = choose_dtype(dtype)
    if format is None:
        as_they_are = f"as they are, {name_of_dtype(compute_dtype)}"
        ways = {as_they_are: Plain(), "`--quantize 8`": Rounded(8), "`--quantize 4`": Rounded(4)}
    else:
        ways = {f"as they are, {format.name}": packed_storage(settings)}

    token_bytes = bytes_of_token(config, compute_dtype)
    heads = [f"{card} GB" for card in CARDS]
    lines = [
        f"{Path(model).name}: a view holds up to {config.context:,} tokens, and each takes {token_bytes:,} bytes.",
        f"How many workers (up to {MOST_WORKERS}) have room for {TOKENS:,} tokens each, beside weights and 1 GB:",
    ]
    if is_supposed:
        lines.append(f"config.json says no dtype: {dtype} is supposed.")
    lines += ["", "| weights | take | " + " | ".join(heads) + " |", "| --- | --- |" + " --- |" * len(CARDS)]
    for name, storage in ways.items():
        try:
            weights = bytes_of_weights(config, compute_dtype, storage)
        except InputError:
            if not isinstance(storage, Rounded):
                raise
            continue  # rows that no group of ours divides
        room = [workers_on(card, weights, token_bytes) for card in CARDS]
        cells = [str(workers) if workers else "" for workers in room]
        lines.append(f"| {name} | {weights / 1e9:.1f} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bytes_of_token(config: Config, dtype: torch.dtype) -> int:
    """Keys and values of all layers."""
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * keys * dtype.itemsize


def packed_storage(settings: dict) -> Packed:
    """As far as config.json tells: not which modules have been left as they are, but for the head."""
    left = [] if says_that_head_is_packed(settings) else [HEAD]
    return Packed(format_of(settings), left, torch.float16)


def bytes_of_weights(config: Config, dtype: torch.dtype, storage: Storage) -> int:
    """Layers of a kind are alike, and so are a layer's experts: so there is no need to go through all of them."""

    def nbytes(kinds: tuple[LayerKind, ...], experts: int = 0) -> int:
        few = replace(config, layer_kinds=kinds, num_experts=experts)
        weights, _ = empty_weights(few, dtype, "meta", storage=storage)
        return weights.nbytes

    beside_layers = nbytes(())
    total = beside_layers
    for kind, layers in Counter(config.layer_kinds).items():
        with_one = nbytes((kind,), experts=1)
        with_two = nbytes((kind,), experts=2)
        more_experts = max(0, config.num_experts - 1)
        total += layers * (with_one - beside_layers + more_experts * (with_two - with_one))
    return total


def workers_on(card: int, weights: int, token_bytes: int) -> int:
    free = card * 2**30 - RESERVED - weights
    return max(0, min(MOST_WORKERS, free // (TOKENS * token_bytes)))
