"""Files in and out: JSON that is read with care, and results that are written whole or not at all."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from .errors import refusing, require


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError, with the file's name, for anything else."""
    with refusing(f"{path} cannot be read"):
        # A missing file is left to `read_text`, which says so; a pipe or a device would wait for ever.
        require(path.is_file() or not path.exists(), "it is not a file")
        data = json.loads(path.read_text("utf-8"))
    require(isinstance(data, dict), f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data


def require_writable(path: Path, option: str, taken: Iterable[Path]) -> None:
    """Raise InputError where no file can be written at `path`, or where that is one of the files `taken`.

    Asked before the work begins: afterwards it would be lost.
    """
    target = Path(os.path.realpath(path))
    folder_takes_files = os.access(f"{target.parent}/", os.W_OK)
    file_or_nothing = target.is_file() or not os.path.lexists(target)
    require(folder_takes_files and file_or_nothing, f"{option} {path}: no file can be written there")
    others = [Path(os.path.realpath(other)) for other in taken]
    require(target not in others, f"{option} {path}: this command reads or writes that file already")


def require_all_writable(outputs: dict[str, Path | None], read: Iterable[Path]) -> None:
    """`require_writable` for each option that names a file (None: it does not); no two may be the same."""
    named = {option: path for option, path in outputs.items() if path is not None}
    for option, path in named.items():
        others = [other for name, other in named.items() if name != option]
        require_writable(path, option, [*read, *others])


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file beside, chunk by chunk as they come, then rename it: it is whole, or as it was."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(target.name + ".part")
    try:
        with beside.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
