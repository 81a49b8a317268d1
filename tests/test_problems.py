"""Sheets of small parts (examples/problems): made the same each time, fair, and right."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "problems"))

import bank
from make_problems import FUNCTIONS, KINDS, QUESTIONS, Part, Sheet, answered, is_fair, main, make_sheets

FOLDER = Path(bank.__file__).parent
SEEDS = st.integers(0, 2**32)
COMMITTED = {
    "tuning.jsonl": (1, 30, 6),
    "held-back.jsonl": (2, 60, 12),
}  # seed, sheets of questions, of each other kind


def made(path: Path, *arguments: object) -> bytes:
    main([*map(str, arguments), "--out", str(path)])
    return path.read_bytes()


def sheets_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stands_in(answer: str, text: str) -> bool:
    """The rule once more, without a pattern: the words of the answer, with no letter, digit or _ on either side."""
    text, answer = (" ".join(words.lower().split()) for words in (text, answer))
    for at in range(len(text)):
        before, after = text[:at][-1:], text[at + len(answer) :][:1]
        if text.startswith(answer, at) and not any(c.isalnum() or c == "_" for c in before + after):
            return True
    return False


# ---- who is right


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Tokyo", "It is TOKYO."),
        ("Buenos Aires", "**buenos\n  aires**"),
        ("eau", "l'eau"),
        ("12", "3 * 4=12, so"),
        ("def is_even", "def is_even(n: int) -> bool:"),
        ("1,000", "There are 1,000."),
    ],
)
def test_whole_words_answer(answer, text):
    assert answered(["something else", answer], text)
    assert stands_in(answer, text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [("12", "112"), ("12", "12th"), ("cat", "cats"), ("cold", "c old"), ("def add", "def add_all(x)"), ("a.b", "acb")],
)
def test_parts_of_words_do_not(answer, text):
    assert not answered(["something else", answer], text)
    assert not stands_in(answer, text)


# ---- every sheet


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=SEEDS)
def test_a_sheet_has_numbered_parts_and_answers_to_each(kind, seed):
    [sheet] = make_sheets(kind, 1, seed)
    fields = json.loads(sheet.line)
    assert list(fields) == ["problem", "kind", "answers"]
    assert fields["kind"] == kind
    lines = fields["problem"].split("\n")
    assert len(lines) == (2 if kind == "writing" else 6)
    assert [line.split(". ")[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    assert len(set(line.split(". ", 1)[1] for line in lines)) == len(lines)
    assert len(fields["answers"]) == len(lines)
    for answers in fields["answers"]:
        assert answers
        assert all(answer and answer == answer.strip() for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
@examples(10)
@given(seed=SEEDS)
def test_only_an_answer_to_a_part_answers_it(kind, seed):
    [sheet] = make_sheets(kind, 1, seed)
    for part in sheet.parts:
        for answer in part.answers:
            assert not stands_in(answer, sheet.problem)
            for other in sheet.parts:
                assert other is part or not any(stands_in(answer, text) for text in other.answers)


@pytest.mark.parametrize(
    "parts",
    [
        [Part("What is the opposite of hot?", ["cold"]), Part("What is the comparative of cold?", ["colder"])],
        [Part("a = 40 + 2", ["42"]), Part("b = 21 + 21", ["42"])],
        [Part("How many legs has a bird?", ["2"]), Part("What is 7 + 8?", ["15"])],
        [Part("On which continent is Peru?", ["South America"]), Part("Who discovered it?", ["america"])],
    ],
)
def test_a_sheet_that_is_not_fair_is_known(parts):
    assert not is_fair(Sheet("questions", parts))


@given(seed=SEEDS)
@examples(20)
def test_sums_are_right_and_some_need_others(seed):
    [sheet] = make_sheets("sums", 1, seed)
    values: dict[str, int] = {}
    for part in sheet.parts:
        exec(part.asks, {"__builtins__": {}}, values)
    assert list(values) == list("abcdef")
    assert [part.answers for part in sheet.parts] == [[str(value)] for value in values.values()]
    dependent = [part for part in sheet.parts if re.search("[a-f]", part.asks.split(" = ")[1])]
    assert 2 <= len(dependent) <= 3


@given(seed=SEEDS)
@examples(20)
def test_sums_and_products_among_the_questions_are_right(seed):
    for sheet in make_sheets("questions", 5, seed):
        for part in sheet.parts:
            if asked := re.fullmatch(r"What is (\d+ (?:\+|times) \d+)\?", part.asks):
                assert part.answers == [str(eval(asked[1].replace("times", "*")))]


# ---- the bank


def everything_asked() -> list[Part]:
    parts = [*QUESTIONS]
    parts += [Part(word, keywords) for words in bank.DEFINITIONS.values() for word, keywords in words.items()]
    parts += [Part(word, answers) for words in bank.TRANSLATIONS.values() for word, answers in words.items()]
    parts += [Part(form.format(of), words) for form in bank.FORMS for of, words in bank.SUBJECTS.items()]
    return parts


def test_no_part_answers_itself_so_all_are_drawn():
    for part in everything_asked():
        assert is_fair(Sheet("", [part])), part


def test_no_number_that_could_number_a_line_or_paragraph_is_an_answer():
    numbers = {answer for part in everything_asked() for answer in part.answers if answer.isdigit()}
    assert min(map(int, numbers)) >= 12


def test_the_bank_is_large_and_its_functions_have_names_of_their_own():
    assert len({part.asks for part in QUESTIONS}) == len(QUESTIONS) >= 250
    names = [re.match(r"\w+", asked)[0] for asked in FUNCTIONS]
    assert len(set(names)) == len(names)


def test_accents_may_be_missing():
    assert bank.with_spellings("Käse") == ["Käse", "Kase", "Kaese"]
    assert bank.with_spellings("weiß") == ["weiß", "weiss"]
    assert bank.with_spellings("montaña") == ["montaña", "montana"]
    assert bank.with_spellings("Hund") == ["Hund"]


# ---- the command, and the files that it made


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_a_seed_fixes_every_byte_and_another_seed_others(kind, tmp_path):
    asked = ["--kind", kind, "--sheets", 3]
    first = made(tmp_path / "1", *asked, "--seed", 5)
    assert made(tmp_path / "2", *asked, "--seed", 5) == first
    assert made(tmp_path / "3", *asked, "--seed", 6) != first
    kinds = [sheet["kind"] for sheet in sheets_in(tmp_path / "1")]
    assert kinds == [each for each in (KINDS if kind == "all" else [kind]) for _ in range(3)]


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_files_are_what_the_command_makes(name, tmp_path):
    seed, questions, sheets = COMMITTED[name]
    command = f"python examples/problems/make_problems.py --questions {questions} --sheets {sheets} --seed {seed}"
    assert f"{command} --out examples/problems/{name}" in (FOLDER / "README.md").read_text()
    again = made(tmp_path / name, "--questions", questions, "--sheets", sheets, "--seed", seed)
    assert (FOLDER / name).read_bytes() == again
    counts = {kind: 0 for kind in KINDS}
    for sheet in sheets_in(FOLDER / name):
        counts[sheet["kind"]] += 1
    assert counts == {kind: questions if kind == "questions" else sheets for kind in KINDS}


def test_no_committed_sheet_is_there_twice():
    problems = [sheet["problem"] for name in COMMITTED for sheet in sheets_in(FOLDER / name)]
    assert len(set(problems)) == len(problems)
