"""What duet is taught: sheets of sums, the words for them, and an expert that shares them out among workers.

A sheet is a list of lines, such as

    a = 30 + 45
    b = 7 + 118
    c = a + b

A worker claims a line by writing its name, works it out column by column from the right, and ends the paragraph:

    c = a + b = 75 + 125: 5+5=10, 7+2+1=10, 0+1+1=2, so c = 200.

The expert takes the first line that nobody has begun and whose results are there to be read. Workers that choose in
the same step choose in the order of their names: the first takes the first such line, the second the second. Where
there is none, but lines are left, it waits for a step (`…`). Once no more lines are left than workers that choose
before it, it says so, and retires.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minihogwild.layouts import COMMON, LAYOUTS
from minihogwild.prompts import NAMES, Prompts, fill

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WAIT, NOTHING, END_OF_LINE, END = "…", "nothing left", ".\n\n", "<|end|>"
PROMPTS = Prompts(
    together="{names}:\n{problem}\n",
    alone="{problem}\n",
    header_others="# others\n",
    header_own="# me\n",
    separator="# me\n",
    prefix="**{name} [{number}]:** ",
    check="",
    boxed=False,
)
# Each is one token, as is every byte
WORDS = [" = ", " + ", ", ", ", so ", ": ", "\n\n", END_OF_LINE, WAIT, NOTHING, "**", " [", "]:** ", *NAMES.split()]


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


def work(sheet: Sheet, name: str, values: dict[str, int]) -> str:
    """The whole paragraph in which a line is worked out."""
    x, y = sheet.lines[name]
    left, right = str(values.get(x, x)), str(values.get(y, y))
    columns, carry = [], 0
    for n in range(1, max(len(left), len(right)) + 1):
        digits = [int(number[-n]) if n <= len(number) else 0 for number in (left, right)] + [carry] * bool(carry)
        columns.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    given = f"{x} + {y} = " if x in values else ""
    return f"{name} = {given}{left} + {right}: {', '.join(columns)}, so {name} = {values[name]}{END_OF_LINE}"


LATE = 10**6  # after all steps


@dataclass
class Row:
    """One token of a transcript, with the two homes that it has: its own block, and later the common one."""

    token: int
    block: str
    index: int  # in its block
    step: int  # in which it is fed
    target: int = -100  # the token that is sampled from it; -100 for none
    moved: int = LATE  # the step after which it moves
    home: int = 0  # its index in the common block from then on
    choice: bool = False  # is the target a claim, a wait, or a retirement


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


def transcript(sheet: Sheet, names: list[str], layout: str, encode: Encoder) -> tuple[list[Row], int]:
    """(every token that the workers of a run would feed, were they all experts; the number of forward steps)

    Prompt and headers are fed in steps 0 and 1. The loop's rules are those of `minihogwild.generate`.
    """
    rules, words, values = LAYOUTS[layout], PROMPTS, sheet.values
    problem = {"problem": sheet, "n": len(names), "names": ", ".join(names)}
    prompt = encode(fill(words.together if rules.prefix else words.alone, **problem))
    end = encode.tokenizer.token_to_id(END)
    ends_of_line, waiting = encode(END_OF_LINE), encode(WAIT)
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

    def begin(name: str) -> list[int]:
        number[name] += 1
        paragraphs[name] = []
        return encode(fill(words.prefix, name=name, number=number[name])) if rules.prefix else own

    pending = {name: begin(name) for name in names}  # what each feeds next
    planned: dict[str, list[int]] = {name: [] for name in names}  # what it will write after that
    begun: set[str] = set()
    finishing: dict[str, str] = {}  # worker -> the line that it is at work on
    done: set[str] = set()
    step = 1
    while pending:
        step += 1
        choosing = []
        for name, tokens in pending.items():
            paragraphs[name] += feed(name, tokens, step, len(paragraphs[name]))
            if not planned[name]:
                choosing.append(name)
                if tokens == ends_of_line:
                    done.add(finishing.pop(name))
        for name in list(choosing):
            closes, retires = pending[name] == ends_of_line and rules.paragraphs, pending[name] == [end]
            if closes or (retires and rules.moves_retired):
                for row in paragraphs[name]:
                    row.moved, row.home = step, common
                    common += 1
            if closes:
                pending[name] = begin(name)
            if retires:
                del pending[name]
            if closes or retires:
                choosing.remove(name)
        left = [line for line in sheet.lines if line not in begun]
        ready = [line for line in left if {*sheet.lines[line]} <= done or sheet.lines[line][0] not in values]
        for rank, name in enumerate(choosing):
            if rank < len(ready):
                line = finishing[name] = ready[rank]
                begun.add(line)
                planned[name] = encode(work(sheet, line, values))
            else:
                planned[name] = waiting if rank < len(left) else [*encode(NOTHING), end]
        for name in pending:
            if planned[name]:
                token, *planned[name] = planned[name]
                paragraphs[name][-1].target, paragraphs[name][-1].choice = token, name in choosing
                pending[name] = [token]
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
