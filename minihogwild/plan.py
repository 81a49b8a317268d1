"""`--plan`: what a model's weights and cache take, and on which cards they fit, from config.json alone."""

from pathlib import Path

import torch

from .config import Config
from .errors import InputError
from .hub import fetch_config
from .hub.checkpoint import empty_weights
from .hub.config_json import parse_config
from .hub.loading import choose_dtype, dtype_of
from .hub.quantized import Packed, Plain, Rounded, Storage, format_of
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
    compute_dtype = choose_dtype(dtype_of(settings, folder=None) if dtype == "auto" else dtype)
    if format is None:
        as_they_are = f"as they are, {name_of_dtype(compute_dtype)}"
        ways = {as_they_are: Plain(), "`--quantize 8`": Rounded(8), "`--quantize 4`": Rounded(4)}
    else:
        ways = {f"as they are, {format.name}": Packed(format, ["lm_head.weight"], torch.float16)}

    token_bytes = bytes_of_token(config, compute_dtype)
    heads = [f"{card} GB" for card in CARDS]
    lines = [
        f"{Path(model).name}: a view holds up to {config.context:,} tokens, and each takes {token_bytes:,} bytes.",
        f"How many workers (up to {MOST_WORKERS}) have room for {TOKENS:,} tokens each, beside weights and 1 GB:",
        "",
        "| weights | take | " + " | ".join(heads) + " |",
        "| --- | --- |" + " --- |" * len(CARDS),
    ]
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


def bytes_of_weights(config: Config, dtype: torch.dtype, storage: Storage) -> int:
    weights, _ = empty_weights(config, dtype, "meta", storage=storage)
    return weights.nbytes


def workers_on(card: int, weights: int, token_bytes: int) -> int:
    free = card * 2**30 - RESERVED - weights
    return max(0, min(MOST_WORKERS, free // (TOKENS * token_bytes)))
