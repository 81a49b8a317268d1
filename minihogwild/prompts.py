"""The words that make workers cooperate, as data; and how their text is read: paragraphs, boxed answers."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from unicodedata import category

from .config import refusing, require
from .layouts import OTHERS, OWN, SEPARATOR
from .text import read_json

NAMES = "Alice Bob Carol Dave Erin Frank Grace Heidi Ivan Judy Kim Leo Mallory Nina Oscar Peggy"


@dataclass(frozen=True)
class Prompts:
    """Every word that a run adds to the user's. `{name}`-like fields are filled in; other braces stay."""

    together: str = """\
{n} assistants solve one problem together: {names}. All of them write at the same time, each in a paragraph of \
their own, and each sees what the others are writing at that very moment, word by word.

How they work:
- First they agree, in a line or two, on who does what. Then each works on a part that nobody else is doing.
- A paragraph is one short step of work. It ends with a full stop and a blank line. Its author's name stands before \
it, as in "**{first} [1]:**".
- They read each other all the time, use one another's results, and say so when they find a mistake.
- Whoever sees that a part is already being done by another leaves it, and takes up something else.
- As soon as one of them knows the final answer to the whole problem, that one writes it inside \\boxed{}.

The problem:

{problem}"""
    alone: str = "{problem}"  # the layout independent: plain chat
    header_others: str = "\n\n### Being written by the others right now\n\n"
    header_own: str = "\n\n### My next paragraph\n\n"
    separator: str = "\n\n### My own work\n\n"
    prefix: str = "**{name} [{number}]:**"  # no space at the end: a lone space token derails small models
    check: str = " Quick check: am I repeating what somebody else already does? Yes or no:"
    cue: str = "\n\nNo time is left. From all the work above, the final answer is \\boxed{"
    names: tuple[str, ...] = tuple(NAMES.split())
    problem: str = ""  # what is asked where the user asks nothing
    boxed: bool = True  # a \boxed{...} in what a worker writes is the answer, and ends the run

    @property
    def headers(self) -> dict[str, str]:
        """The words of each header block."""
        return {OTHERS: self.header_others, OWN: self.header_own, SEPARATOR: self.separator}

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            require(isinstance(value, kind), f"{field.name} must be a {kind.__name__}, not {value!r}")
        lines = all(isinstance(name, str) and name and name.isprintable() for name in self.names)
        differ = lines and len(set(self.names)) == len(self.names)
        require(differ, f"names must be lines of text that differ, not {list(self.names)}")
        require(self.prefix.strip() and self.cue.strip(), "prefix and cue must not be empty")


def load_prompts(path: Path) -> Prompts:
    """Prompts with the fields that a JSON file gives; the others keep their defaults."""
    given = read_json(path)
    if isinstance(given.get("names"), list):
        given["names"] = tuple(given["names"])
    with refusing(path):
        return Prompts(**given)


def prompts_of(folder: Path) -> Prompts:
    """The words that a model folder brings, or the default."""
    own = folder / "prompts.json"
    return load_prompts(own) if own.exists() else Prompts()


def fill(template: str, **values: object) -> str:
    """Put values in the place of `{key}`; all other braces stay (LaTeX has many)."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


# Ends of sentences in the world's scripts (Unicode's Sentence_Terminal, the common ones, and the ellipsis)
TERMINATORS = ".!?…‼⁇⁈⁉‽。．！？｡।॥؟۔։።፧၊။។៕᙮᠃᠉᭚᭛꓿꘎꘏⸮"
INDENT = r"^(?:[^\w\n`~]|\d+[.)])*"  # also by list items and quotes
FENCE = INDENT + r"(([`~])\2{2,})(?!\2)[^`\n]*$"  # the line that opens a code block
FENCED = re.compile(FENCE + r"\n(?:.*?\n)??" + INDENT + r"\1\2*[^\S\n]*$", re.MULTILINE | re.DOTALL)


def paragraph_closed(text: str) -> bool:
    """Does the text end with a blank line, after the end of a sentence, a code fence or a `$$`?

    Never inside an open code fence or `$$`.
    """
    if not re.search(r"\n[^\S\n]*\n\s*\Z", text):  # the blank line
        return False
    text = FENCED.sub(".", text)  # a whole code block or formula ends a sentence,
    text = re.sub(r"\$\$.*?\$\$", ".", text, flags=re.DOTALL)
    if re.search(FENCE, text, re.MULTILINE) or "$$" in text:
        return False  # an open one does not let the paragraph end
    ends = (c for c in reversed(text.rstrip()) if c not in "\"'*_~` " and category(c) not in ("Pe", "Pf", "Pi"))
    return next(ends, " ") in TERMINATORS


def boxed(text: str) -> str | None:
    r"""What the first complete, non-empty `\boxed{...}` holds, braces balanced; None without one."""
    for match in re.finditer(r"\\boxed\s*\{(?!\s*\})", text):
        depth, rest = 1, text[match.end() :]
        for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)  # an escaped brace is two characters: no change
            if depth == 0:
                return rest[: brace.start()].strip()
    return None
