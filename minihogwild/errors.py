"""What can't be done is said in one line that names the culprit: the exception for it, and four ways to raise it."""

import operator
import re
from contextlib import contextmanager

import psutil
import torch


class InputError(ValueError):
    """Input that cannot be used. The message is one line: the culprit, and what would be right."""


def require(holds: object, otherwise: str) -> None:
    """Raise InputError, with the message `otherwise`, unless `holds`."""
    if not holds:
        raise InputError(otherwise)


def require_kind(value: object, kind: type, what: str) -> None:
    """Raise InputError unless the value is of this kind. The value itself is not written out: it may be a model."""
    if not isinstance(value, kind):
        raise InputError(f"{what} is of type {type(value).__name__}: it must be a {kind.__name__}")


def whole_number(value: object, what: str) -> int:
    """The value as an int. Raises InputError for a text, a fraction, a list and the like."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} is {value!r}: it must be a whole number") from None


@contextmanager
def refusing(what: object):
    """Turn any error inside into an InputError that says `what`, and then the reason.

    For calls into libraries, whose own errors share no base class.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise  # somebody wants to leave
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{what}: {one_line(reason)}") from error


def is_panic(error: BaseException) -> bool:
    """Has `tokenizers` given up? The class of what it raises then can't be imported, and is no Exception."""
    return type(error).__name__ == "PanicException"


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---- running out of memory

# What PyTorch says where it has no exception type of its own for it
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)
# The amount in PyTorch's messages, for a GPU and for the CPU
ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@contextmanager
def allocating(nbytes: int, what: str, device: torch.device):
    """Raise InputError where memory for `what`, estimated at `nbytes`, is not to be had on `device`.

    A CPU is asked beforehand: Linux grants memory that it does not have, and kills the process later.
    """
    if device.type == "cpu":
        free = psutil.virtual_memory().available
        enough = nbytes <= free
        require(enough, f"out of memory on cpu: {what} needs {gigabytes(nbytes)}, and {gigabytes(free)} are free")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # What failed is seldom the whole estimate, and may be far more: the allocator knows what it was asked for.
        asked = ASKED_FOR.search(str(error))
        amount = f"{asked[1]} could not be had" if asked else f"it needs about {gigabytes(nbytes)}"
        raise InputError(f"out of memory on {device}: {what}: {amount}") from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
