"""A command of the package, run in this process."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch


class Said(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str


def said(main: Callable[[list[str]], int], *arguments: object, stdin: bytes = b"") -> Said:
    """Run `main` with these arguments, and these bytes on its standard input."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # commands write bytes too
    err = io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", given):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code
    return Said(code, out.buffer.getvalue().decode(), err.getvalue())
