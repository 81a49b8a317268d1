"""The words that make workers cooperate, as data; and how their text is read: paragraphs, answers, "all done"."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from unicodedata import category

from .errors import refusing, require
from .files import is_unicode, read_json
from .layouts import HEADER_OTHERS, HEADER_OWN, SEPARATOR

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
    alone: str = "{problem}"  # for the layout "independent": plain chat
    header_others: str = "\n\n### Being written by the others right now\n\n"
    header_own: str = "\n\n### My next paragraph\n\n"
    # In the layout "contiguous", between the others' whole texts and the own one
    separator: str = "\n\n### My own work\n\n"
    prefix: str = "**{name} [{number}]:**"  # no space at the end: a lone space token derails small models
    # Once in a while a worker's next paragraph begins with this question, after its prefix
    check: str = " Quick check: am I repeating what somebody else already does? Yes or no:"
    # What the finisher is given when no steps are left; it goes on from here
    cue: str = "\n\nNo time is left. From all the work above, the final answer is \\boxed{"
    # What a finisher samples at most; the paper takes 16 tokens for a number, 64 for a formula, 1,024 for a program
    finisher_tokens: int = 64
    names: tuple[str, ...] = tuple(NAMES.split())
    # A private text for each worker, in the order of `names`, that only this worker sees; those beyond have none
    roles: tuple[str, ...] = ()
    # Names of workers that do not see what the others are writing (but in combined and interleaved what has moved)
    unaware: tuple[str, ...] = ()
    # Each worker begins so many forward passes after the one before it, and so sees what that one has taken up. Workers
    # that begin at once choose alike, and, of one length, their paragraphs end at once: then they choose alike again
    head_start: int = 0
    # What the reply begins with, before any worker writes; auto: "<think>\n" for a model that thinks before it answers,
    # if its chat template does not begin with that itself
    opening: str = "auto"
    # A worker may end its text by itself, by end-of-sequence. Untrained models do so too early: without this, workers
    # who share sample no token that ends anything, or that has no text (end-of-sequence, beginning-of-sequence,
    # </think>, ...), and none of white space with a line break where a paragraph begins
    may_end: bool = False
    # Workers who share sample no token whose text contains one of these
    banned: tuple[str, ...] = ()
    # By writing this, a worker says that nothing is left to do, and retires; "": there is no such word
    done: str = ""
    problem: str = ""  # what is asked where the user asks nothing
    boxed: bool = True  # a \boxed{...} in what a worker writes is the answer, and ends the run
    pace: int = 0  # at most so many steps a second where the run is drawn, so that an eye can follow; 0: no limit

    @property
    def headers(self) -> dict[str, str]:
        """The words of each header block."""
        return {HEADER_OTHERS: self.header_others, HEADER_OWN: self.header_own, SEPARATOR: self.separator}

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            name_of_kind = "list" if kind is tuple else kind.__name__
            # By type, not by isinstance: true is no number.
            require(type(value) is kind, f"{field.name} must be a {name_of_kind}, not {value!r}")
            if kind is str:
                require_text(value, field.name)
            elif kind is tuple:
                for text in value:
                    require_text(text, field.name)
        require(self.names, "names must hold at least one")
        for field, known in FIELDS.items():
            texts = self.roles if field == "roles" else [getattr(self, field)]
            for text in texts:
                require_known_fields(text, field, known)
        for field in ("together", "alone"):
            says_problem = "{problem}" in getattr(self, field)
            require(says_problem, f"{field} must contain {{problem}}: else workers are never told what to do")
        names_are_lines = all(name and name.isprintable() for name in self.names)
        names_differ = names_are_lines and len(set(self.names)) == len(self.names)
        require(names_differ, f"names must be lines of text that differ, not {list(self.names)}")
        require(self.prefix.strip() and self.cue.strip(), "prefix and cue must not be empty")
        require(0 <= self.pace <= 1000, f"pace must be from 0 to 1000 steps a second, not {self.pace}")
        require(0 <= self.head_start <= 1000, f"head_start must be from 0 to 1000 steps, not {self.head_start}")
        require(self.finisher_tokens >= 1, f"finisher_tokens must be at least 1, not {self.finisher_tokens}")
        require(all(self.banned), "banned must not have an empty text: every token contains that")
        is_said_whole = self.done == self.done.strip() and (not self.done or any(map(str.isalpha, self.done)))
        require(is_said_whole, f"done must be words, without spaces around them, not {self.done!r}")
        unknown = [name for name in self.unaware if name not in self.names]
        require(not unknown, f"unaware: {unknown} are not among the names")
        require(len(self.roles) <= len(self.names), f"{len(self.roles)} roles, but only {len(self.names)} names")


# What is filled in, in which words
FIELDS = {
    "together": ["problem", "n", "names", "first"],
    "alone": ["problem", "n", "names", "first"],
    "prefix": ["name", "number"],
    "roles": ["name", "problem"],
}
# A word in braces that stands by itself, and is no part of a formula, such as \\boxed{answer} or x_{max}
WORD_IN_BRACES = re.compile(r"(?<![\\\w^_}\])])\{([a-z_]{2,})\}")


def require_known_fields(text: str, name: str, known: list[str]) -> None:
    """Raise InputError for `{prompt}` and the like: it would stay as it is, and the model would read it."""
    for word in WORD_IN_BRACES.findall(text):
        fields_spelled = ", ".join(f"{{{field}}}" for field in known)
        require(word in known, f"{name}: {{{word}}} is not filled in, only {fields_spelled} are")


def require_text(value: object, name: str) -> None:
    require(type(value) is str, f"{name} must be texts, not {value!r}")
    require(is_unicode(value), f"{name} is not valid UTF-8: {value!r}")


def load_prompts(path: Path) -> Prompts:
    """Prompts with the fields that a JSON file gives; the others keep their defaults."""
    given = read_json(path)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    with refusing(path):
        return Prompts(**given)


def prompts_of(folder: Path) -> Prompts:
    """The words that a model folder brings, or the default."""
    own = folder / "prompts.json"
    return load_prompts(own) if os.path.lexists(own) else Prompts()


def fill(template: str, **values: object) -> str:
    """Put values in the place of `{key}`; all other braces stay (LaTeX has many)."""

    def value_of(field: re.Match) -> str:
        whole, key = field[0], field[1]
        return str(values[key]) if key in values else whole

    return re.sub(r"\{(\w+)\}", value_of, template)


# ---- when a paragraph ends

# Ends of sentences in the world's scripts (Unicode's Sentence_Terminal, the common ones, and the ellipsis)
TERMINATORS = ".!?…‼⁇⁈⁉‽。．！？｡।॥؟۔։።፧၊။។៕᙮᠃᠉᭚᭛꓿꘎꘏⸮"
SKIPPED = "\"'*_~` "  # when looking back for the end of a sentence, as are closing brackets and quotes
# A line that opens or closes a code block: perhaps a list item or a quote, then ``` or ~~~ or more, then at the opening
# a language. No backtick may follow on the line: that would be code within a sentence.
FENCE_LINE = re.compile(r"(?:[^\w`~]|\d+[.)])*(?P<fence>`{3,}|~{3,})(?P<language>[^`]*)")


def paragraph_closed(text: str) -> bool:
    """Does the text end with a blank line, after the end of a sentence, a code fence or a `$$`?

    Never inside an open code fence or `$$`.
    """
    visible = text.rstrip()
    ends_with_blank_line = text.count("\n", len(visible)) >= 2
    if not ends_with_blank_line:
        return False
    prose = without_code(visible)
    if prose is None:
        return False
    parts = prose.split("$$")  # text, formula, text, formula, ..., text
    formula_is_open = len(parts) % 2 == 0
    if formula_is_open:
        return False
    last_text = parts[-1]
    if len(parts) > 1:
        last_text = "." + last_text  # a formula ends a sentence, as a code block does
    return ends_a_sentence(last_text)


def without_code(text: str) -> str | None:
    """The text with a full stop in the place of each code block; None where one is still open."""
    prose = []
    open_fence = ""
    for line in text.split("\n"):
        mark = FENCE_LINE.fullmatch(line)
        if open_fence:
            if mark and mark["fence"].startswith(open_fence) and not mark["language"].strip():
                open_fence = ""
                prose.append(".")
        elif mark:
            open_fence = mark["fence"]
        else:
            prose.append(line)
    return None if open_fence else "\n".join(prose)


def ends_a_sentence(text: str) -> bool:
    for character in reversed(text.rstrip()):
        # Closing brackets and quotes; also opening quotes (Pi), with which some languages close what others open.
        is_bracket_or_quote = category(character) in ("Pe", "Pf", "Pi")
        if not is_bracket_or_quote and character not in SKIPPED:
            return character in TERMINATORS
    return False


def says_done(text: str, done: str) -> bool:
    """Does the text end with the words by which a worker says that nothing is left?"""
    if not done:
        return False
    said = text.rstrip().lower()
    before = said.removesuffix(done.lower())
    is_part_of_a_word = before[-1:].isalnum() and done[0].isalnum()
    return before != said and not is_part_of_a_word


# ---- answers

# `\boxed {`; or an escaped character, but not the backslash of a \boxed, so that `\\boxed{1}`, as some models write it,
# is still a box; or a brace
BOX_MARKS = re.compile(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]", re.DOTALL)


class BoxedAnswer:
    r"""Finds the first complete, non-empty `\boxed{...}`, braces balanced, in text that comes piece by piece."""

    def __init__(self):
        self.text = ""
        self.read_up_to = 0  # or just behind a closing brace: no match of BOX_MARKS goes across that point
        self.open_braces: list[int | None] = []  # for each: where the content begins, if it opened a box

    def read(self, piece: str) -> str | None:
        """Add a piece; the answer, if this piece completes one. Of several that it does, the one that begins first."""
        self.text += piece
        if "}" not in piece:
            return None
        end = self.text.rindex("}") + 1
        completed = {}  # content, by where it begins
        for mark in BOX_MARKS.finditer(self.text, self.read_up_to, end):
            if mark[0] == "{":
                self.open_braces.append(None)
            elif mark[0].startswith("\\boxed"):
                self.open_braces.append(mark.end())
            elif mark[0] == "}" and self.open_braces:
                begin = self.open_braces.pop()
                if begin is not None:
                    completed[begin] = self.text[begin : mark.start()].strip()
        self.read_up_to = end
        answers = [completed[begin] for begin in sorted(completed) if completed[begin]]
        return answers[0] if answers else None


def boxed(text: str) -> str | None:
    """The answer in a whole text, None without one."""
    return BoxedAnswer().read(text)
