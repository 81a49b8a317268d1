"""A model of a few thousand random weights that reads and writes bytes, as a folder that `load` takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from util import fill_at_random

from minihogwild import Model, load
from minihogwild.hub.checkpoint import empty_weights
from minihogwild.hub.config_json import parse_config

END = "<|end|>"  # end-of-sequence, as text


def save_tokenizer(folder: Path) -> int:
    """Tokens for each byte, for a blank line, `}.` and end-of-sequence; returns the size of the vocabulary."""
    merges = [("Ċ", "Ċ"), ("}", ".")]  # Ċ is how such tokenizers spell a newline
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return len(vocab) + 1


def save_model(folder: Path, context: int = 4096, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(folder)
    settings = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": context,
        "rope_theta": 1000.0,
        "dtype": "float64",
        "eos_token_id": vocab_size - 1,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    config = parse_config(settings)
    _, places = empty_weights(config, torch.float64, "cpu")
    fill_at_random(places, seed)
    save_file({name: tensor.contiguous() for name, tensor in places.items()}, folder / "model.safetensors")
    return folder


def load_model(folder: Path, **options) -> Model:
    return load(save_model(folder, **options), device="cpu")


def ids_of(model: Model, *pieces: str) -> list[int]:
    """Token ids of pieces of text, each encoded on its own; END is end-of-sequence."""
    ids = []
    for piece in pieces:
        ids += sorted(model.eos) if piece == END else model.tokenizer.encode(piece)
    return ids
