"""Layouts: which blocks a worker sees, in which order (arXiv 2504.06261, section 3.2), as one table.

Blocks have names of their own. What a worker is called is nobody's business here: names come from a file, and could
be anything, also "common".
"""

from collections.abc import Callable
from dataclasses import dataclass

COMMON = "common"  # the prompt, and what has moved there
HEADER_OTHERS = "header others"
HEADER_OWN = "header own"
SEPARATOR = "separator"


def block_of(worker: str) -> str:
    """The block that a worker of this name writes to: never the name of one of the blocks above."""
    return f"text of {worker}"


def answer_block_of(finisher: str) -> str:
    """The block that a finisher writes to."""
    return f"answer by {finisher}"


def role_block_of(worker: str) -> str:
    """The block that this worker alone sees: which part it is to play."""
    return f"role of {worker}"


def with_role(view: list[str], role: str) -> list[str]:
    """The view with the worker's role behind the common block."""
    behind_common = view.index(COMMON) + 1
    return [*view[:behind_common], role, *view[behind_common:]]


def last_token_block_of(worker: str) -> str:
    """Where a copy of a worker's last token stands while a finisher is asked in the midst of a run."""
    return f"last token of {worker}"


def with_last_tokens(view: list[str], last_tokens: dict[str, str]) -> list[str]:
    """The view with, behind each block that is a key of `last_tokens`, the block that it gives."""
    longer = []
    for block in view:
        longer.append(block)
        if block in last_tokens:
            longer.append(last_tokens[block])
    return longer


@dataclass(frozen=True)
class Layout:
    """`view(own, others)` lists the blocks that a worker sees; it writes to the last one, `own`."""

    view: Callable[[str, list[str]], list[str]]
    headers: tuple[str, ...] = ()  # blocks with a fixed text each, shared by all workers
    prefix: bool = True  # a worker's text begins with its name
    paragraphs: bool = False  # each finished one moves to the common block
    moves_retired: bool = False  # so does the text of a worker that has retired


LAYOUTS = {
    "combined": Layout(
        view=lambda own, others: [COMMON, HEADER_OTHERS, *others, HEADER_OWN, own],
        headers=(HEADER_OTHERS, HEADER_OWN),
        paragraphs=True,
    ),
    "contiguous": Layout(
        view=lambda own, others: [COMMON, *others, SEPARATOR, own],
        headers=(SEPARATOR,),
    ),
    "interleaved": Layout(
        view=lambda own, others: [COMMON, own],
        paragraphs=True,
        moves_retired=True,
    ),
    "independent": Layout(
        view=lambda own, others: [COMMON, own],
        prefix=False,
    ),
}
