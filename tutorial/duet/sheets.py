"""What duet is taught: sheets of sums, the words for them, and an expert that shares them out among workers.

A sheet is a list of lines, such as

    a = 30 + 45
    b = 7 + 118
    c = a + b

A worker claims a line by writing its name, works it out column by column from the right, and ends the paragraph:

    c = a + b = 75 + 125: 5+5=10, 7+2+1=10, 0+1+1=2, so c = 200.

The expert names the first line that nobody has named and whose results are there to be read; where there is none, the
first that nobody has named. One token later it sees who else has named that line. If somebody has before, or in the
same step and comes earlier among the workers, it backs off (`c? `) and names another; else the line is its own. Where
a result is not there yet it waits (`…`). When all lines are named it says so, and retires.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minihogwild.layouts import COMMON, LAYOUTS, block_of
from minihogwild.prompts import NAMES, Prompts, fill

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WAIT, TAKEN, NOTHING, END_OF_LINE, END = "…", "? ", "nothing left", ".\n\n", "<|end|>"
PROMPTS = Prompts(
    together="{names}:\n{problem}\n",
    alone="{problem}\n",
    header_others="# others\n",
    header_own="# me\n",
    separator="# me\n",
    prefix="**{name} [{number}]:** ",
    check="",
    may_end=True,  # that is what it was taught, and when
    boxed=False,
    pace=15,  # steps a second that an eye can follow
)
# Each is one token, as is every byte
WORDS = [
    " = ",
    " + ",
    ", ",
    ", so ",
    ": ",
    "\n\n",
    END_OF_LINE,
    WAIT,
    TAKEN,
    NOTHING,
    "**",
    " [",
    "]:** ",
    *NAMES.split(),
]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges make each of WORDS one token."""
    vocabulary = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def made() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = spell, decoders.ByteLevel()
        return tokenizer

    for word in WORDS:
        first, *rest = made().encode(word).tokens
        for piece in rest:
            merges.append((first, piece))
            first += piece
            vocabulary.setdefault(first, len(vocabulary))
    tokenizer = made()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


@dataclass
class Sheet:
    """`lines[name]` is what is to be added: two numbers, or the names of two earlier lines."""

    lines: dict[str, tuple[int, int] | tuple[str, str]]

    @property
    def values(self) -> dict[str, int]:
        values: dict[str, int] = {}
        for name, (x, y) in self.lines.items():
            values[name] = values.get(x, x) + values.get(y, y)
        return values

    def needs(self, name: str) -> set[str]:
        """The lines whose results a line adds."""
        return self.lines.keys() & set(self.lines[name])

    def __str__(self) -> str:
        return "\n".join(f"{name} = {x} + {y}" for name, (x, y) in self.lines.items())


def make_sheet(
    rng: random.Random, lines: int = 12, dependent: float = 1 / 3, first: int = 0, most_digits: int = 3
) -> Sheet:
    """`dependent`: how likely a line from the third on needs two others. `first`: the number of the first letter."""
    assert first + lines <= len(LETTERS)

    def number() -> int:
        digits = rng.randint(1, most_digits)
        return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    names = LETTERS[first : first + lines]
    return Sheet(
        {
            name: tuple(rng.sample(names[:n], 2)) if n >= 2 and rng.random() < dependent else (number(), number())
            for n, name in enumerate(names)
        }
    )


def work(sheet: Sheet, name: str, values: dict[str, int]) -> list[tuple[str, str]]:
    """The paragraph in which a line is worked out, after its name: pieces, each with the line whose result it needs."""
    x, y = sheet.lines[name]
    left, right = str(values.get(x, x)), str(values.get(y, y))
    columns, carry = [], 0
    for n in range(1, max(len(left), len(right)) + 1):
        digits = [int(number[-n]) if n <= len(number) else 0 for number in (left, right)] + [carry] * bool(carry)
        columns.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    given = [("", f"{x} + {y} = ")] if x in values else []
    result = f"{right}: {', '.join(columns)}, so {name} = {values[name]}{END_OF_LINE}"
    needed = (x, y) if x in values else ("", "")
    return [("", " = "), *given, (needed[0], f"{left} + "), (needed[1], result)]


LATE = 10**6  # after all steps


@dataclass(slots=True)
class Row:
    """One token of a transcript, with the two homes that it has: its own block, and later the common one."""

    token: int
    block: str  # of a worker: `block_of(name)`
    index: int  # in its block
    step: int  # in which it is fed
    target: int = -100  # the token that is to be sampled from it; -100 for none
    moved: int = LATE  # the step after which it moves
    home: int = 0  # its index in the common block from then on
    choice: bool = False  # is the target a choice: which line, or mine or taken, or wait or go on


class Encoder:
    """Encodes what the expert writes; remembers, since much of it recurs."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 100_000:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]


@dataclass
class Board:
    """What all workers can read in each other's texts."""

    workers: int
    named: set[str] = field(default_factory=set)  # lines
    taken: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Word:
    """A token that the expert writes."""

    token: int
    choice: bool = False
    taught: bool = True  # or a slip, shown for what comes after it
    waits: bool = False
    names: str = ""  # the line that it names,
    ends: str = ""  # or completes


def expert(sheet: Sheet, board: Board, encode: Encoder, rng: random.Random, slips: float) -> Iterator[Word]:
    """What one worker writes, a token at a time. The board is as it is when all tokens of that step have been fed.

    `slips`: how often it names just any line, or waits for nothing. So transcripts show what to do after mistakes.
    (Alone, it never names a line that needs one not yet named: it would wait for ever.)
    """
    values = sheet.values

    def write(text: str, **first: object) -> list[Word]:
        token, *rest = encode(text)
        return [Word(token, **first), *map(Word, rest)]

    while left := [line for line in sheet.lines if line not in board.named]:
        ready = [line for line in left if sheet.needs(line) <= board.done]
        slip = rng.random() < slips
        possible = [line for line in sheet.lines if board.workers > 1 or sheet.needs(line) <= board.named]
        line = rng.choice(possible) if slip else (ready or left)[0]
        yield from write(line, choice=True, taught=not slip, names=line)
        if line in board.taken:
            yield from write(TAKEN, choice=True)
            continue
        board.taken.add(line)
        for needed, text in work(sheet, line, values):
            while needed and (needed not in board.done or rng.random() < slips):
                waits = needed not in board.done
                yield from write(WAIT, choice=True, taught=waits, waits=waits)
            words = write(text, choice=bool(needed) or text == " = ")
            if text.endswith(END_OF_LINE):
                words[-1].ends = line
            yield from words
    yield from write(NOTHING, choice=True)
    yield from write(END)


def transcript(
    sheet: Sheet, names: list[str], layout: str, encode: Encoder, rng: random.Random | None = None, slips: float = 0
) -> tuple[list[Row], int]:
    """(every token that the workers of a run would feed, were they all experts; the number of forward steps)

    Prompt and headers are fed in steps 0 and 1. The loop's rules are those of `minihogwild.workers`. After slips all
    workers may wait for a line that nobody is at: then the transcript ends there.
    """
    rules, words = LAYOUTS[layout], PROMPTS
    problem = {"problem": sheet, "n": len(names), "names": ", ".join(names)}
    prompt = encode(fill(words.together if rules.prefix else words.alone, **problem))
    end, (end_of_line,) = encode.tokenizer.token_to_id(END), encode(END_OF_LINE)
    rows: list[Row] = []

    def feed(block: str, tokens: list[int], step: int, index: int = 0) -> list[Row]:
        new = [Row(token, block, index + n, step) for n, token in enumerate(tokens)]
        rows.extend(new)
        return new

    if not rules.prefix:  # the prompt's last token is each worker's own
        assert len(names) == 1
        prompt, own = prompt[:-1], prompt[-1:]
    feed(COMMON, prompt, 0)
    common = len(prompt)  # length of the common block
    for block in rules.headers:
        feed(block, encode(words.headers[block]), 1)

    paragraphs: dict[str, list[Row]] = {name: [] for name in names}
    number = dict.fromkeys(names, 0)

    def begin(name: str) -> list[Word]:
        number[name] += 1
        paragraphs[name] = []
        return [Word(t) for t in (encode(fill(words.prefix, name=name, number=number[name])) if rules.prefix else own)]

    board, rng = Board(len(names)), rng or random.Random(0)
    writing = {name: expert(sheet, board, encode, rng, slips) for name in names}
    pending = {name: begin(name) for name in names}  # what each feeds next
    step = 1
    while pending and not all(fed[-1].waits for fed in pending.values()):
        step += 1
        for name, fed in pending.items():
            paragraphs[name] += feed(block_of(name), [word.token for word in fed], step, len(paragraphs[name]))
            board.named.update(word.names for word in fed if word.names)
            board.done.update(word.ends for word in fed if word.ends)
        for name in list(pending):
            token = pending[name][-1].token
            closes, retires = token == end_of_line and rules.paragraphs, token == end
            if closes or (retires and rules.moves_retired):
                for row in paragraphs[name]:
                    row.moved, row.home = step, common
                    common += 1
            if closes:
                pending[name] = begin(name)
            elif retires:
                del pending[name]
            else:
                word = next(writing[name])
                pending[name] = [word]
                if word.taught:
                    paragraphs[name][-1].target, paragraphs[name][-1].choice = word.token, word.choice
    return rows, step - 1


def save_words(folder: Path, problem: str) -> None:
    """All of a model folder but its config and weights."""
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end = tokenizer.token_to_id(END)
    words = {name: value for name, value in vars(PROMPTS).items() if value != getattr(Prompts(), name)}
    for name, data in {
        "tokenizer_config.json": {"eos_token": END},
        "generation_config.json": {"do_sample": False, "eos_token_id": end},
        "prompts.json": {**words, "problem": problem},
    }.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content | trim }}{{ '\\n' }}\n")
