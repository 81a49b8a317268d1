"""The files that a model's folder must have; and where one is missing, what people have in its place."""

import os
from pathlib import Path

from ..errors import require

MERGE = "an adapter is no model, merge it into the one that it was made for"
CONVERT = "transformers can convert it"
OTHER_COPY = "take a copy of the model in safetensors, as transformers writes it"
# By the missing file: what may lie there, and what can be done. The first that is found is told.
INSTEAD = {
    "config.json": {
        "adapter_config.json": MERGE,
        "snapshots/*/config.json": "that folder is the model's",  # this one is the hub's cache of it
        "*/config.json": "such a folder is a model's",  # this one is a training run's
        "*.gguf": OTHER_COPY,
        "params.json": OTHER_COPY,
    },
    "model.safetensors": {
        "pytorch_model*.bin": "convert it to safetensors, nothing is unpickled here",
        "*.pth": OTHER_COPY,
        "*.gguf": OTHER_COPY,
        "adapter_model.safetensors": MERGE,
        "consolidated*.safetensors": OTHER_COPY,
        "*-of-*.safetensors": "model.safetensors.index.json, which names such parts, is missing",
        "*.safetensors": "if it is the model's, call it model.safetensors",
    },
    "tokenizer.json": {
        "tokenizer.model": CONVERT,
        "vocab.json": CONVERT,
        "tekken.json": CONVERT,
        "*.tiktoken": CONVERT,
    },
}


def files_of(folder: Path) -> list[Path]:
    """All that may be read there: of templates there may be a folder of their own."""
    return [*folder.glob("*"), *folder.glob("*/*.jinja")]


def require_there(path: Path) -> None:
    """Raise InputError where there is no such file, with what lies there in its place."""
    if os.path.lexists(path):
        return
    for pattern, advice in INSTEAD.get(path.name, {}).items():
        found = sorted(str(other.relative_to(path.parent)) for other in path.parent.glob(pattern))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            require(False, f"{path} is missing: there is only {found[0]}{more}: {advice}")
    require(False, f"{path} is missing")
