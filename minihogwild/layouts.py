"""Layouts: which blocks a worker sees, in which order (arXiv 2504.06261, section 3.2), as one table."""

from collections.abc import Callable
from dataclasses import dataclass

COMMON, OTHERS, OWN, SEPARATOR, FINISHER = "common", "header others", "header own", "separator", "finisher"


@dataclass(frozen=True)
class Layout:
    """`view(own, others)` lists a worker's blocks; it writes to the last, `own`."""

    view: Callable[[str, list[str]], list[str]]
    headers: tuple[str, ...] = ()  # fixed texts in blocks of their own, shared by all
    prefix: bool = True  # a worker's text begins with its name
    paragraphs: bool = False  # each finished one moves to the common block
    moves_retired: bool = False  # so does the text of a worker that has retired


LAYOUTS = {
    "combined": Layout(lambda own, others: [COMMON, OTHERS, *others, OWN, own], headers=(OTHERS, OWN), paragraphs=True),
    "contiguous": Layout(lambda own, others: [COMMON, *others, SEPARATOR, own], headers=(SEPARATOR,)),
    "interleaved": Layout(lambda own, others: [COMMON, own], paragraphs=True, moves_retired=True),
    "independent": Layout(lambda own, others: [COMMON, own], prefix=False),
}
