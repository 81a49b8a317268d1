"""Running out of memory, said in one line."""

from contextlib import contextmanager

import psutil
import torch

from .config import InputError

TOLD = ("out of memory", "not enough memory", "can't allocate memory")  # by torch, where it has no type for it


@contextmanager
def allocating(nbytes: int, what: str, device: torch.device):
    """Raise InputError where `nbytes` for `what` are not to be had on `device`.

    A CPU is asked beforehand: Linux grants memory that it does not have, and kills the process later.
    """
    asked = f"out of memory on {device}: {what} needs {nbytes / 1e9:.2f} GB"
    if device.type == "cpu" and nbytes > (free := psutil.virtual_memory().available):
        raise InputError(f"{asked}, of which {free / 1e9:.2f} GB are free")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(how in str(error) for how in TOLD):
            raise
        raise InputError(asked) from error
