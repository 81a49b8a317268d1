"""Makes sheets of small parts, to see how well several workers share out a job.

python examples/problems/make_problems.py --kind questions --sheets 60 --seed 1 --out sheets.jsonl

A sheet is a problem of numbered parts, one a line, and for each part what counts as an answer. The parts need nobody
clever: what is to be seen is whether each is done, and by one worker only. So an answer must tell its own part and
nothing else. A sheet is drawn again where an accepted answer stands in the problem itself (reciting the questions would
answer it) or among another part's answers (one worker's work would count as two).
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from bank import DEFINITIONS, FAMILIES, FORMS, FUNCTIONS, SUBJECTS, TRANSLATIONS, with_spellings

from minihogwild.scoring import stands_in

PARTS = 6


@dataclass(frozen=True)
class Part:
    asks: str
    answers: list[str]  # any of them will do


@dataclass(frozen=True)
class Sheet:
    kind: str
    parts: list[Part]

    @property
    def problem(self) -> str:
        return "\n".join(f"{number}. {part.asks}" for number, part in enumerate(self.parts, start=1))

    @property
    def line(self) -> str:
        """As it stands in a file."""
        fields = {"problem": self.problem, "kind": self.kind, "answers": [part.answers for part in self.parts]}
        return json.dumps(fields, ensure_ascii=False) + "\n"


# ---- who is right


def answered(answers: list[str], text: str) -> bool:
    """Does one of a part's accepted answers stand in the text? The rule is that of `minihogwild.evaluate`."""
    return stands_in(text, tuple(answers))


def is_fair(sheet: Sheet) -> bool:
    """Nothing answers a part but an answer to that part: neither the problem nor the answers to the others."""
    for part in sheet.parts:
        elsewhere = [sheet.problem]
        for other in sheet.parts:
            if other is not part:
                elsewhere += other.answers
        if any(answered(part.answers, text) for text in elsewhere):
            return False
    return True


# ---- how each kind is drawn, fair or not

QUESTIONS = [Part(form.format(asked), answers) for form, rows in FAMILIES.items() for asked, answers in rows.items()]
ARITHMETIC = 40  # how many fresh sums and products lie among the questions: as many as of a large family
LEAST_RESULT = 20  # a smaller number could number a line or a paragraph


def questions(rng: random.Random) -> list[Part]:
    arithmetic = [sum_or_product(rng) for _ in range(ARITHMETIC)]
    return rng.sample(QUESTIONS + arithmetic, PARTS)


def sum_or_product(rng: random.Random) -> Part:
    result = 0
    while result < LEAST_RESULT:
        if rng.random() < 0.5:
            x, y = rng.randint(5, 50), rng.randint(5, 50)
            asks, result = f"What is {x} + {y}?", x + y
        else:
            x, y = rng.randint(3, 12), rng.randint(3, 12)
            asks, result = f"What is {x} times {y}?", x * y
    return Part(asks, [str(result)])


def definitions(rng: random.Random) -> list[Part]:
    """From six areas: within one area, a definition easily has a word that another one needs."""
    parts = []
    for area in rng.sample(list(DEFINITIONS), PARTS):
        word, keywords = rng.choice(list(DEFINITIONS[area].items()))
        parts.append(Part(f"Define: {word}.", keywords))
    return parts


def translations(rng: random.Random) -> list[Part]:
    """All into the same language."""
    language, words = rng.choice(list(TRANSLATIONS.items()))
    parts = []
    for word, translated in rng.sample(list(words.items()), PARTS):
        spellings = [spelling for answer in translated for spelling in with_spellings(answer)]
        parts.append(Part(f"Translate to {language}: {word}.", spellings))
    return parts


def functions(rng: random.Random) -> list[Part]:
    """That a function is there is all that counts; type hints may follow its name's bracket."""
    parts = []
    for asked in rng.sample(FUNCTIONS, PARTS):
        name = asked.split("(")[0]
        parts.append(Part(f"{asked}.", [f"def {name}", f"{name} = lambda"]))
    return parts


def sums(rng: random.Random) -> list[Part]:
    """Two or three lines need results of lines above; the others can be done at once."""
    names = "abcdef"
    which_depend = rng.sample(names[1:], rng.choice([2, 3]))
    values: dict[str, int] = {}
    parts = []
    for name in names:
        above = list(values)
        if name not in which_depend:
            x, y = rng.randint(11, 49), rng.randint(11, 49)
        elif len(above) >= 2 and rng.random() < 0.5:
            x, y = rng.sample(above, 2)
        else:
            x, y = rng.choice(above), rng.randint(11, 49)
        values[name] = values.get(x, x) + values.get(y, y)
        parts.append(Part(f"{name} = {x} + {y}", [str(values[name])]))
    return parts


def writing(rng: random.Random) -> list[Part]:
    """Two texts."""
    return [Part(rng.choice(FORMS).format(subject), SUBJECTS[subject]) for subject in rng.sample(list(SUBJECTS), 2)]


KINDS = {draw.__name__: draw for draw in (questions, definitions, translations, functions, sums, writing)}


# ---- files of sheets


def make_sheets(kind: str, count: int, seed: int) -> list[Sheet]:
    """The same seed gives the same sheets, and fewer of them where `count` is less."""
    rng = random.Random(seed)
    sheets = []
    while len(sheets) < count:
        sheet = Sheet(kind, KINDS[kind](rng))
        if is_fair(sheet):
            sheets.append(sheet)
    return sheets


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make sheets of small parts, a JSON object a line.")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all", help="all: each in turn (default)")
    parser.add_argument("--sheets", type=int, default=6, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--questions", type=int, metavar="N", help="so many sheets of questions instead")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    counts = dict.fromkeys(KINDS if options.kind == "all" else [options.kind], options.sheets)
    if options.questions is not None and "questions" in counts:
        counts["questions"] = options.questions
    lines = [sheet.line for kind, count in counts.items() for sheet in make_sheets(kind, count, options.seed)]
    options.out.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
