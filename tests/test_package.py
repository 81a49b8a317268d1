"""Minimal means that the package can be read in an evening: its size is a test."""

import ast
import inspect
import io
import tokenize
from pathlib import Path

import minihogwild
from minihogwild import forward

LIMIT = 1907  # lines of code in the whole package; 1,300 in the end


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, and no comment or docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_are_counted_as_we_say():
    assert (
        code_lines('"""Doc."""\n\n# why\nx = (\n    1,\n)\n\n\ndef f():\n    """More\n    of it."""\n    return x\n')
        == 5
    )


def test_the_package_stays_small():
    counts = {path.name: code_lines(path.read_text()) for path in Path(minihogwild.__path__[0]).glob("*.py")}
    print(f"\n{sum(counts.values())} lines of code: {', '.join(f'{k} {v}' for k, v in sorted(counts.items()))}")
    assert sum(counts.values()) <= LIMIT


def test_forward_fits_one_screen():
    assert len(inspect.getsource(inspect.unwrap(forward)).splitlines()) <= 40
