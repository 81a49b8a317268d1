"""Files in and out: JSON that is read with care, and results that are written whole or not at all."""

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from .errors import refusing, require

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Files that are being written, beside those that they will be: for whoever must end this process at once
unfinished: set[Path] = set()


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError, with the file's name, for anything else."""
    with refusing(f"{path} cannot be read"):
        require_file(path)
        data = json.loads(path.read_text("utf-8-sig"))  # editors of Windows put a mark before the text
    require(isinstance(data, dict), f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data


def read_json_if_there(path: Path) -> dict:
    """The same; an empty object where there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def is_unicode(text: str) -> bool:
    """JSON can spell half a character, as "\\ud800"; no tokenizer can read one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_file(path: Path) -> None:
    """Raise InputError for a pipe or a device: it may wait for ever, or never end. (What is missing, a reader says.)

    And for a link that leads nowhere, as in a copy of the hub's cache: what it should lead to was meant to count.
    """
    require(path.exists() or not path.is_symlink(), "it is a link that leads nowhere")
    require(path.is_file() or not path.exists(), "it is not a file")


def require_writable(path: Path, option: str, taken: Iterable[Path]) -> None:
    """Raise InputError where no file can be written at `path`, or where that is one of the files `taken`.

    Asked before the work begins: afterwards it would be lost.
    """
    target = target_of(path)
    if is_stream(path):
        writable = os.access(path, os.W_OK)
    else:
        writable = is_file_or_nothing(target) and takes_files(target.parent)
    require(writable, f"{option} {path}: no file can be written there")
    others = [target_of(other) for other in taken]
    require(target not in others, f"{option} {path}: this command reads or writes that file already")


def target_of(path: Path) -> Path:
    """The file itself, where `path` is a link to it."""
    return Path(os.path.realpath(path))


def is_stream(path: Path) -> bool:
    """Is it written to as it comes, and never replaced: a pipe, a device, /dev/stdout, a shell's >(command)?"""
    if str(path).startswith(("/dev/", "/proc/")):
        return os.path.exists(path)
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISCHR(kind) or stat.S_ISSOCK(kind)


def is_file_or_nothing(path: Path) -> bool:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return True
    except OSError:  # the name is too long, say
        return False
    return stat.S_ISREG(kind)


def takes_files(folder: Path) -> bool:
    """Can a file be made there? Tried, and not asked: root may write everywhere, but /proc takes nothing."""
    try:
        tempfile.NamedTemporaryFile(prefix=".minihogwild-", dir=folder).close()
    except OSError:
        return False
    return True


def require_all_writable(outputs: dict[str, Path | None], read: Iterable[Path]) -> None:
    """`require_writable` for each option that names a file (None: it does not); no two may be the same."""
    named = {option: path for option, path in outputs.items() if path is not None}
    for option, path in named.items():
        others = [other for name, other in named.items() if name != option]
        require_writable(path, option, [*read, *others])


def is_ours_alone(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False where another process has done so."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system that knows no locks
    return True


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file beside, chunk by chunk as they come, then rename it: it is whole, or as it was.

    What is a pipe or a device gets the chunks as they come. An error names the file.
    """
    try:
        write_chunks(path, chunks)
    except BrokenPipeError:
        raise  # nobody reads any more: that is no failure
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    if is_stream(path):
        with path.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
        return
    target = target_of(path)
    number, name = tempfile.mkstemp(".part", ".minihogwild-", target.parent)  # a name that nothing has
    os.close(number)
    beside = Path(name)
    unfinished.add(beside)
    try:
        with beside.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        beside.chmod(mode_of(target))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
        unfinished.discard(beside)


def mode_of(path: Path) -> int:
    """Who may read and write the file; of one that is not there, what a new file gets."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return 0o666 & ~mask
