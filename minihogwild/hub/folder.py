"""The files that a model's folder must have; and where one is missing, what people have in its place."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..errors import InputError

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
    if not os.path.lexists(path):
        folder = path.parent
        refuse(path, path.name, lambda pattern: [str(other.relative_to(folder)) for other in folder.glob(pattern)])


def require_listed(files: list[str], with_tokenizer: bool) -> None:
    """The same for a repository's files, before any is fetched: of what lies in their place, nothing would be."""
    has_parts = "model.safetensors.index.json" in files
    needed = ["config.json", *([] if has_parts else ["model.safetensors"]), *(["tokenizer.json"] * with_tokenizer)]
    for name in needed:
        if name not in files:
            refuse(name, name, lambda pattern: [file for file in files if is_like(file, pattern)])


def is_like(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and PurePosixPath(file).match(pattern)


def refuse(what: object, name: str, files_like: Callable[[str], list[str]]) -> None:
    for pattern, advice in INSTEAD.get(name, {}).items():
        found = sorted(files_like(pattern))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(f"{what} is missing: there is only {found[0]}{more}: {advice}")
    raise InputError(f"{what} is missing")
