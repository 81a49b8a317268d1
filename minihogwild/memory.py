"""Running out of memory, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from .config import InputError


@contextmanager
def allocating(nbytes: int, what: str, device: torch.device) -> Iterator[None]:
    """Raise InputError where `nbytes` for `what` are not to be had on `device`.

    A CPU is asked beforehand: Linux grants memory that it does not have, and kills the process later.
    """
    asked = f"out of memory on {device}: {what} needs {nbytes / 1e9:.2f} GB"
    free = psutil.virtual_memory().available
    if device.type == "cpu" and nbytes > free:
        raise InputError(f"{asked}, of which {free / 1e9:.2f} GB are free")
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch: OutOfMemoryError on an accelerator, else RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise InputError(asked) from error
