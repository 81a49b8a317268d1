"""What all commands of this package share: one clear line for bad input, and files that are whole or not there."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

from .config import Config, InputError, require

CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may write any; no terminal should obey


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def run_command(command: Callable[[argparse.Namespace], int], parser: Parser, argv: list[str] | None) -> int:
    """The exit code of `command`: 2, with one line on standard error, for what can't be done; 130 when interrupted."""
    logging.basicConfig(format=f"{parser.prog}: %(message)s")
    with suppress(AttributeError):  # of nothing, or of a notebook's
        sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks is no reason to stop
    if argv is None:  # SIGTERM too gives the terminal back, and leaves no half-written file
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command(parser.parse_args(argv))
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of `tokenizers`, which shares no other base with anything
        if not panic and not isinstance(error, (InputError, OSError, MemoryError, torch.OutOfMemoryError)):
            raise
        # What it quotes from a file may be of any length, and hold anything
        line = CONTROL_CODES.sub("", " ".join(str(error).split()))[:1000]
        print(f"{parser.prog}: {line}", file=sys.stderr)
        return 2


def spare_threads(config: Config) -> None:
    """Take one thread for a small model: more wait for each other, beside other programs fifty times as long."""
    if config.hidden_size < 512:
        torch.set_num_threads(1)


def require_writable(path: Path, option: str, *others: Path | None) -> None:
    """Raise InputError where no file can be written, or where it is one of the `others`: before the work, not after."""
    out = Path(os.path.realpath(path))
    writable = os.access(f"{out.parent}/", os.W_OK) and (out.is_file() or not os.path.lexists(out))
    require(writable, f"{option} {path}: no file can be written there")
    taken = out in [Path(os.path.realpath(other)) for other in others if other]
    require(not taken, f"{option} {path}: this command reads or writes that file already")


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file beside, chunk by chunk as they come, then rename it: it is whole, or as it was."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.writelines(chunks)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
