"""Problems with known answers, whether what was written is right, and what is told of many results."""

from __future__ import annotations

import gc
import io
import json
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path

import math_verify
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from math_verify.errors import TimeoutException
from matplotlib.figure import Figure
from refusals import refused
from rich.console import Console

from minihogwild import scoring
from minihogwild.scoring import (
    ASK_FOR_BOX,
    ASK_FOR_BOXES,
    PartsFound,
    Problem,
    asked,
    is_same_answer,
    joined,
    read_problems,
    repeats,
    share_right,
    stands_in,
)
from minihogwild.show import results
from minihogwild.show.results import NOTHING, Progress, by_setting, draw, passes_until_right, right_by, share, table

# ---- reading


def read(path: Path, *lines: str) -> list[Problem]:
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return read_problems(path)


def test_problems_of_both_kinds(tmp_path):
    lines = [
        '{"problem": "6 * 7?", "answer": "42"}',
        "",
        '{"problem": "1/2?", "answer": 0.5, "level": "easy"}',
        '{"problem": "日?\\n2?", "answers": [["Tokyo"], ["eight", "8"]]}',
    ]
    assert read(tmp_path / "file", *lines) == [
        Problem("6 * 7?", expected=("42",)),
        Problem("1/2?", expected=("0.5",)),
        Problem("日?\n2?", parts=(("Tokyo",), ("eight", "8"))),
    ]


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@examples(60)
@given(
    entries=st.lists(
        st.fixed_dictionaries({"problem": texts, "answer": texts})
        | st.fixed_dictionaries({"problem": texts, "answers": st.lists(st.lists(texts, min_size=1), min_size=1)}),
        min_size=1,
    ),
    ascii_only=st.booleans(),
)
@example(entries=[{"problem": "a\u2028b", "answer": "1"}], ascii_only=False)
@example(entries=[{"problem": "a\x85b", "answer": "1"}], ascii_only=False)
def test_whatever_json_may_hold_is_read(tmp_path_factory, entries, ascii_only):
    """JSON escapes only what is below a space: a line separator of Unicode's may stand in a text, as it is."""
    lines = [json.dumps(entry, ensure_ascii=ascii_only) for entry in entries]
    problems = read(tmp_path_factory.mktemp("problems") / "file", *lines)
    assert [problem.text for problem in problems] == [entry["problem"] for entry in entries]
    for problem, entry in zip(problems, entries, strict=True):
        assert problem.expected == ((entry["answer"],) if "answer" in entry else ())
        assert problem.parts == tuple(map(tuple, entry.get("answers", ())))


def test_a_box_is_asked_for_where_an_answer_is_expected():
    assert asked(Problem("a?", expected=("1",))) == "a?" + ASK_FOR_BOX
    assert asked(Problem("a? In \\boxed{}.", expected=("1",))) == "a? In \\boxed{}."
    assert asked(Problem("a?", parts=(("1",),))) == "a?"


@given(count=st.integers(1, 5), number=st.integers(1, 7))
def test_joined_problems_are_all_there_in_their_order(count, number):
    problems = [Problem(f"problem {n}?", expected=(str(n),)) for n in range(number)]
    groups = joined(problems, count)
    assert [answer for group in groups for answer in group.expected] == [str(n) for n in range(number)]
    assert [len(group.expected) for group in groups[:-1]] == [count] * (len(groups) - 1)
    assert 1 <= len(groups[-1].expected) <= count
    if count == 1:
        assert groups == problems
        return
    for group in groups:
        wanted = [f"{place}. problem {n}?" for place, n in enumerate(group.expected, 1)]
        assert group.text == "\n\n".join(wanted) + ASK_FOR_BOXES
        assert asked(group) == group.text


def test_parts_are_not_joined():
    with refused("--join", "'answer'"):
        joined([Problem("a?", expected=("1",)), Problem("b?", parts=(("1",),))], 2)


# ---- is it right? Texts in which something must stand


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def stands_plainly(text: str, alternatives: tuple[str, ...], at_end: bool) -> bool:
    """The same as `stands_in`, place by place."""
    text = ("|" + text + "|").split()  # the bars keep white space at both ends
    text = " ".join(text)[1:-1].lower()
    for alternative in alternatives:
        words = " ".join(alternative.split()).lower()
        for begin in range(len(text)):
            end = begin + len(words)
            if text[begin:end] != words or (begin > 0 and is_word(text[begin - 1])):
                continue
            before, after = text[:begin], text[end:]
            if words[0].isdigit() and before and before[-1] in ".,/-":
                continue  # a part of another number
            if words[-1].isdigit() and after and after[0] in ".,/":
                after = after[1:]  # either the end of a sentence, or a number goes on
                if after and after[0].isdigit():
                    continue
                if after or at_end:
                    return True
            elif (not after and at_end) or (after and not is_word(after[0])):
                return True
    return False


some_text = st.text("aB42 \n\t.,/-=é_", max_size=25)
some_words = st.text("aB42 \n.-=é_", min_size=1, max_size=4).filter(str.strip)
some_alternatives = st.lists(some_words, min_size=1, max_size=3).map(tuple)


@examples(600)
@given(text=some_text, alternatives=some_alternatives, at_end=st.booleans())
def test_stands_in_is_what_it_says(text, alternatives, at_end):
    assert stands_in(text, alternatives, at_end) == stands_plainly(text, alternatives, at_end)


@examples(300)
@given(before=some_text, after=some_text, words=some_words, data=st.data())
def test_what_has_been_put_in_is_found(before, after, words, data):
    """In capitals or not, with more white space or less, and whatever alternatives come before it."""
    spelled = data.draw(st.sampled_from([words, words.upper(), words.swapcase()]))
    spelled = data.draw(st.sampled_from(["  ", "\n", " \t\n"])).join(spelled.split())
    others = data.draw(st.lists(some_words, max_size=2))
    assert stands_in(f"{before} {spelled} {after}", (*others, words))


@examples(300)
@given(text=some_text, more=some_text, alternatives=some_alternatives)
def test_what_has_been_found_is_never_taken_back(text, more, alternatives):
    if stands_in(text, alternatives, at_end=False):
        assert stands_in(text + more, alternatives, at_end=False)
    assert stands_in(text, alternatives, at_end=True) == stands_in(text + "\n", alternatives, at_end=False)


@pytest.mark.parametrize(
    ("text", "words", "stands"),
    [
        ("It is 42.", "4", False),
        ("It is 0.8.", "8", False),
        ("It is 8.5.", "8", False),
        ("It is -8.", "8", False),
        ("It is 3/8.", "8", False),
        ("It is 1,200.", "200", False),
        ("It is 8. And 9.", "8", True),
        ("8, 9, and so on", "8", True),
        ("It is 42.", "2", False),
        ("It is 4.", "4", True),
        ("It is (4)", "4", True),
        ("a_4", "4", False),
        ("é4", "4", False),
        ("So TOKYO\n is it", "tokyo is", True),
        ("To kyo", "Tokyo", False),
        ("a = 67\n", "a = 67", True),
        ("aa = 67\n", "a = 67", False),
        ("a+b", "a.b", False),  # no pattern
        ("a  +\tb", "a + b", True),
    ],
)
def test_whole_words_are_looked_for(text, words, stands):
    for at_end in (True, False):
        assert stands_in(text + "\n", (words,), at_end) == stands
    assert stands_in(text, ("no", words)) == stands


def test_what_is_still_being_written_is_not_there_yet():
    assert not stands_in("It is 4", ("4",), at_end=False)
    assert stands_in("It is 4", ("4",), at_end=True)
    assert stands_in("It is 4 ", ("4",), at_end=False)
    assert stands_in("4, or 4", ("4",), at_end=False)  # the first is enough


@st.composite
def writing(draw) -> list[tuple[int, str, bool]]:
    """What `look` is shown in a run: (forward steps, a paragraph so far, is it whole?), of paragraphs in turns."""
    shown, step = [], 0
    paragraphs = [""] * draw(st.integers(1, 3))
    for _ in range(draw(st.integers(0, 12))):
        step += draw(st.integers(0, 2))
        number = draw(st.integers(0, len(paragraphs) - 1))
        paragraphs[number] += draw(st.sampled_from(["4", "2", "a", "B", " ", "\n", ". ", "a 4", "42"]))
        is_whole = draw(st.sampled_from([False, False, True]))
        shown.append((step, paragraphs[number], is_whole))
        if is_whole:
            paragraphs[number] = ""
    return shown


@examples(300)
@given(shown=writing(), parts=st.lists(some_alternatives, min_size=1, max_size=4).map(tuple))
@example(shown=[(1, "4", False), (2, "42", False)], parts=(("4",),))
@example(shown=[(1, "4", False), (2, "4", True)], parts=(("4",),))
@example(shown=[(1, "4 ", False), (2, "4 a", False)], parts=(("4",), ("a",)))
def test_parts_are_found_when_they_first_stand_there(shown, parts):
    found = PartsFound(parts)
    for step, paragraph, is_whole in shown:
        found.look(paragraph, step, is_whole)
    for number, alternatives in enumerate(parts):
        steps = [step for step, text, is_whole in shown if stands_plainly(text, alternatives, is_whole)]
        assert found.found_at[number] == min(steps, default=None)
    for budget in range(30):
        by_then = [at is not None and at <= budget for at in found.found_at]
        assert found.share(budget) == pytest.approx(sum(by_then) / len(parts))


@examples(200)
@given(parts=st.lists(some_alternatives, min_size=1, max_size=4).map(tuple), paragraphs=st.lists(some_text, max_size=5))
def test_repeats_are_paragraphs_beyond_the_first_that_give_a_part(parts, paragraphs):
    wanted = 0
    for alternatives in parts:
        giving = [text for text in paragraphs if stands_plainly(text, alternatives, at_end=True)]
        wanted += len(giving[1:])
    assert repeats(parts, paragraphs) == wanted


def test_repeats():
    parts = (("four", "4"), ("2",), ("9",))
    assert repeats(parts, ["4", "four.", "4 and 2", "7"]) == 2
    assert repeats(parts, ["4 4 4", "2"]) == 0
    assert repeats(parts, []) == 0


# ---- is it right? Answers in boxes


@pytest.fixture
def no_math_verify(monkeypatch):
    monkeypatch.setattr(scoring, "HAS_MATH_VERIFY", False)


@pytest.mark.parametrize(
    ("given_answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "1/2"),
        ("1,000", "1000"),
        ("42.0", "42"),
        ("x = 5", "5"),
        ("2x + 1", "1 + 2x"),
        ("\\{1, 2\\}", "\\{2, 1\\}"),
        ("\\text{Paris}", "Paris"),
        ("50\\%", "50"),
        ("\\dfrac{\\pi}{2}", "\\pi / 2"),
    ],
)
def test_the_same_mathematics_in_other_letters(given_answer, expected, monkeypatch):
    assert is_same_answer(given_answer, expected)
    monkeypatch.setattr(scoring, "HAS_MATH_VERIFY", False)
    assert not is_same_answer(given_answer, expected)


@pytest.mark.parametrize("has_math_verify", [True, False])
@pytest.mark.parametrize(
    ("given_answer", "expected", "same"),
    [
        ("42", "42", True),
        (" 4 2\n", "42", True),
        ("Tokyo", "Tokyo", True),
        ("the east", "theeast", True),
        ("東京", "東京", True),
        ("(3, 4)", "(3,4)", True),
        ("\\frac{", "\\frac{", True),  # letter by letter
        ("41", "42", False),
        ("-42", "42", False),
        ("4", "42", False),
        ("\\frac{1}{2}", "\\frac{2}{1}", False),
        ("(4,3)", "(3,4)", False),
        ("Osaka", "Tokyo", False),
        ("東京", "京都", False),
        ("", "42", False),
    ],
)
def test_the_same_and_other_answers(given_answer, expected, same, has_math_verify, monkeypatch):
    monkeypatch.setattr(scoring, "HAS_MATH_VERIFY", has_math_verify)
    assert is_same_answer(given_answer, expected) is same


@pytest.mark.parametrize(("one", "other"), [("Kyoto", "Tokyo"), ("left", "felt"), ("no", "on")])
def test_a_word_is_no_product_of_its_letters(one, other):
    """Where it is taken for one, all words of the same letters are the same answer."""
    assert is_same_answer(one, other) is False


JUNK = ["\\frac{", "}{", "$", "$$", "\\", "{", "\\boxed{", "\\sqrt[", "^", "\x00\x1b[2J", "\ud800", "\\end{x}", ";"]


@pytest.mark.parametrize("junk", JUNK, ids=ascii)
def test_junk_is_no_answer_and_no_failure(junk):
    assert is_same_answer(junk, "42") is False
    assert is_same_answer("42", junk) is False


@examples(60)
@given(junk=st.text("\\{}$^_()[]frac12+-;,. x", max_size=12), other=st.sampled_from(["42", "x+1", "Tokyo"]))
def test_no_text_is_a_failure(junk, other):
    began = time.monotonic()
    assert is_same_answer(junk, other) in (True, False)
    assert is_same_answer(other, junk) in (True, False)
    assert is_same_answer(junk, junk) is True
    assert time.monotonic() - began < 25


@pytest.fixture
def no_garbage_collection():
    """math-verify's clock rings once, by an exception: where that falls into a collector's callback, it is lost."""
    gc.disable()
    yield
    gc.enable()


ENDLESS = ["{" * 5000, "10!!!!"]  # to be parsed, and to be compared


@pytest.mark.parametrize("answer", ENDLESS, ids=["parsed", "compared"])
@pytest.mark.usefixtures("no_garbage_collection")
def test_what_could_take_for_ever_is_given_up(answer, monkeypatch):
    """Here after a second, so that the test is fast; the slow sibling has the time that it really takes."""
    monkeypatch.setattr(math_verify, "parse", partial(math_verify.parse, parsing_timeout=1))
    monkeypatch.setattr(math_verify, "verify", partial(math_verify.verify, timeout_seconds=1))
    began = time.monotonic()
    assert is_same_answer(answer, "42") is False
    assert time.monotonic() - began < 6


@pytest.mark.slow
@pytest.mark.parametrize("answer", [*ENDLESS, "(1+" * 2000, "x" * 20_000, "1" * 20_000, "9^{9^{9^{9}}}"], ids=range(6))
@pytest.mark.usefixtures("no_garbage_collection")
def test_what_could_take_for_ever_takes_some_seconds(answer):
    for pair in ((answer, "42"), ("42", answer)):
        began = time.monotonic()
        assert is_same_answer(*pair) is False
        assert time.monotonic() - began < 20


def test_what_takes_too_long_is_not_shown_to_the_terminal_as_it_is(monkeypatch, caplog):
    """math-verify logs the text that it gives up on, and a model may have written any: no terminal should obey it."""

    def times_out(**_):
        def decorated(_):
            def raising(*_, **__):
                raise TimeoutException

            return raising

        return decorated

    monkeypatch.setattr("math_verify.parser.timeout", times_out)
    assert is_same_answer("\x1b[2Jgone\x07", "42") is False
    assert "\x1b" not in caplog.text
    assert len(caplog.text) < 1200


@examples(100)
@given(
    expected=st.lists(st.sampled_from("1234"), min_size=1, max_size=4).map(tuple),
    answers=st.lists(st.sampled_from(["1", " 2", "3 ", "4", "", "9"]), min_size=1, max_size=5),
)
def test_the_share_that_is_right_counts_each_in_its_place(expected, answers):
    if len(expected) == 1:
        answers = answers[:1]
    right = 0
    for place, answer in enumerate(expected):
        right += place < len(answers) and answers[place].strip() == answer
    assert share_right(";".join(answers), expected) == pytest.approx(right / len(expected))


def test_one_answer_is_not_split_and_none_is_wrong():
    assert share_right(None, ("1",)) == share_right(None, ("1", "2")) == 0
    assert share_right("a;b", ("a;b",)) == 1
    assert share_right("1; \\frac{1}{2}", ("1", "0.5")) == 1
    assert share_right("2; 1", ("1", "2")) == 0
    assert share_right("1", ("1", "2")) == 0.5


@pytest.mark.usefixtures("no_math_verify")
def test_shares_without_math_verify():
    assert share_right("1; 1/2", ("1", "0.5")) == 0.5


# ---- when was it right?


def boxed_entry(right: dict[int, float], steps: int, stopped_by: str, problem: int = 0, **more: object) -> dict:
    entry = {"problem": problem, "workers": 1, "layout": "independent", "seed": 0, "tokens": steps}
    entry |= {"forward_steps": steps, "stopped_by": stopped_by}
    return entry | {"right": {str(budget): share for budget, share in right.items()}} | more


def parts_entry(found_at: list[int | None], problem: int = 0, **more: object) -> dict:
    entry = {"problem": problem, "workers": 1, "layout": "independent", "seed": 0, "tokens": 7, "repeats": 0}
    return entry | {"found_at": found_at} | more


@pytest.mark.parametrize(
    ("right", "steps", "stopped_by", "passes"),
    [
        ({3: 0, 6: 0, 9: 0}, 9, "steps", math.inf),
        ({3: 0, 6: 1, 9: 1}, 9, "steps", 6),
        ({3: 0, 6: 0, 9: 1}, 9, "steps", 9),
        ({3: 0, 6: 0.5, 9: 0.5}, 9, "steps", math.inf),  # a half of it is not it
        ({3: 1, 6: 1, 9: 1}, 2, "answer", 2),  # before all budgets
        ({3: 0, 6: 1, 9: 1}, 4, "answer", 4),  # between
        ({3: 0, 6: 1, 9: 1}, 6, "answer", 6),
        ({3: 0, 6: 0, 9: 1}, 9, "answer", 9),
        ({3: 0, 6: 0, 9: 0}, 4, "answer", math.inf),  # a wrong one
        ({3: 0, 6: 0.5, 9: 0.5}, 4, "answer", math.inf),
        ({3: 0, 6: 1, 9: 1}, 5, "retired", 6),  # it was asked for there
        ({3: 0, 9: 0, 12: 1}, 12, "context", 12),
        ({9: 0, 12: 1, 100: 1}, 20, "retired", 12),  # numbers, not texts, are in order
    ],
)
def test_passes_until_an_answer_is_right(right, steps, stopped_by, passes):
    assert passes_until_right(boxed_entry(right, steps, stopped_by)) == passes


@pytest.mark.parametrize(
    ("right", "steps", "passes"),
    [
        ({3: 1, 6: 1, 9: 1}, 7, 3),  # a worker boxed at last what had been said when it was asked for
        ({3: 1, 6: 1, 9: 0}, 7, 3),  # or something else, that is wrong: but the right one had come
    ],
)
def test_an_answer_that_was_right_at_an_earlier_budget_had_come_then(right, steps, passes):
    """It counts where workers write no answer at all, until no steps are left; so it counts where they do, later."""
    assert passes_until_right(boxed_entry(right, 9, "steps")) == passes
    assert passes_until_right(boxed_entry(right, steps, "answer")) == passes


@examples(200)
@given(found_at=st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=13))
def test_parts_are_right_when_five_of_six_are_there(found_at):
    passes = passes_until_right(parts_entry(found_at))
    enough = [n for n in range(31) if 6 * sum(at is not None and at <= n for at in found_at) >= 5 * len(found_at)]
    assert passes == min(enough, default=math.inf)


@examples(200)
@given(found_at=st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=6), passes=st.integers(0, 40))
def test_parts_are_right_at_any_number_of_passes(found_at, passes):
    found = [at for at in found_at if at is not None and at <= passes]
    assert right_by(parts_entry(found_at), passes) == pytest.approx(len(found) / len(found_at))


def test_a_boxed_answer_is_right_at_a_budget():
    entry = boxed_entry({3: 0, 6: 0.5}, 6, "steps")
    assert (right_by(entry, 3), right_by(entry, 6)) == (0, 0.5)


# ---- many results


shares = st.sampled_from([0.0, 1 / 3, 0.5, 1.0])


@examples(60)
@given(by_problem=st.lists(st.lists(shares, min_size=1, max_size=3), min_size=1, max_size=8))
def test_the_mean_and_an_interval_around_it(by_problem):
    entries = [boxed_entry({5: s}, 5, "steps", problem=n) for n, of_one in enumerate(by_problem) for s in of_one]
    mean, half_width = share(entries, 5)
    means = [statistics.fmean(of_one) for of_one in by_problem]
    assert mean == pytest.approx(statistics.fmean(means))
    assert 0 <= half_width <= (max(means) - min(means)) / 2 + 1e-12
    if len(set(means)) == 1:
        assert half_width == pytest.approx(0, abs=1e-12)
    assert share(entries, 5) == (mean, half_width)  # the same each time


@pytest.mark.parametrize(("number", "right"), [(40, 20), (40, 4), (100, 90), (250, 100)])
def test_the_interval_is_that_of_95_percent(number, right):
    """Of problems that are right or wrong as a whole, so many are right in a draw as the binomial distribution says."""
    entries = [boxed_entry({5: float(n < right)}, 5, "steps", problem=n) for n in range(number)]
    random.Random(1).shuffle(entries)
    mean, half_width = share(entries, 5)
    assert mean == pytest.approx(right / number)
    p = right / number
    below, quantiles = 0.0, []
    for count in range(number + 1):
        before = below
        below += math.comb(number, count) * p**count * (1 - p) ** (number - count)
        quantiles += [count for limit in (0.025, 0.975) if before < limit <= below]
    low, high = quantiles
    assert half_width == pytest.approx((high - low) / 2 / number, abs=1.1 / number)


def test_seeds_of_one_problem_are_no_further_problems():
    """However often two problems are run, they are two: draws of both the one, or both the other, are among them."""
    entries = [boxed_entry({5: float(n)}, 5, "steps", problem=n, seed=seed) for n in (0, 1) for seed in range(50)]
    assert share(entries, 5) == (0.5, 0.5)


def test_results_come_together_by_setting():
    of = {key: [] for key in [(1, "independent"), (2, "combined"), (2, "independent"), (10, "combined")]}
    entries = []
    for seed in range(3):
        for workers, layout in reversed(of):
            entry = boxed_entry({5: 1}, 5, "steps", workers=workers, layout=layout, seed=seed)
            of[workers, layout].append(entry)
            entries.append(entry)
    assert list(by_setting(entries).items()) == list(of.items())


def test_a_table_without_results():
    assert table([], [5, 10]) == "no results"
    assert by_setting([]) == {}


def cells(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert set(rows[1]) == {"---"}
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_a_table():
    entries = [
        boxed_entry({5: 0, 10: 1}, 7, "answer", workers=2, layout="combined"),
        boxed_entry({5: 0, 10: 1}, 9, "answer", workers=2, layout="combined", problem=1),
        boxed_entry({5: 0, 10: 0}, 10, "steps"),
        boxed_entry({5: 0, 10: 1}, 10, "steps", problem=1),
        boxed_entry({5: 0, 10: 0}, 10, "steps", problem=2),
    ]
    header, one, two = cells(table(entries, [5, 10]))
    assert header[:5] == ["workers", "layout", "runs", "right by 5", "right by 10"]
    assert header[5:] == ["passes until right", "tokens", "done twice"]
    assert one[:4] == ["1", "independent", "3", "0.0 ± 0.0 %"]
    assert one[4].startswith("33.3 ± ")
    assert one[5:] == [NOTHING, "10", NOTHING]  # most of them never were
    assert two == ["2", "combined", "2", "0.0 ± 0.0 %", "100.0 ± 0.0 %", "8", "8", NOTHING]


def test_a_table_of_parts():
    entries = [parts_entry([3, 9], repeats=1), parts_entry([None, 6], problem=1, repeats=0)]
    _, row = cells(table(entries, [5, 10]))
    assert row == ["1", "independent", "2", "25.0 ± 25.0 %", "75.0 ± 25.0 %", NOTHING, "7", "0.50"]
    _, row = cells(table(entries[:1], [5, 10]))
    assert row[-3:] == ["9", "7", "1.00"]


@pytest.mark.parametrize("in_parts", [True, False])
def test_the_curves_of_a_figure(tmp_path, monkeypatch, in_parts):
    """Of parts there is a value at each number of passes, of boxed answers at the budgets."""
    entries = []
    for workers, layout in ((1, "independent"), (2, "combined"), (2, "independent")):
        for problem in range(2):
            setting = {"workers": workers, "layout": layout, "problem": problem}
            if in_parts:
                entries.append(parts_entry([2 + workers, 4 * problem + 3, None], **setting))
            else:
                entries.append(boxed_entry({4: problem, 8: 1}, 8, "steps", **setting))
    drawn = []
    save = Figure.savefig

    def saving(figure: Figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saving)
    draw(entries, [4, 8], tmp_path / "figure.svg", "a title")
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()
    [axes] = drawn[0].axes
    assert axes.get_title() == "a title"
    curves = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(curves) == ["1 worker", "2 workers, combined", "2 workers, independent"]
    for curve, group in zip(curves.values(), by_setting(entries).values(), strict=True):
        passes, percent = curve.get_data()
        assert list(passes) == (list(range(9)) if in_parts else [4, 8])
        for number, value in zip(passes, percent, strict=True):
            assert value == pytest.approx(100 * statistics.fmean(right_by(entry, number) for entry in group))
    assert curves["2 workers, independent"].get_linestyle() != curves["2 workers, combined"].get_linestyle()


# ---- progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_is_shown_progress(monkeypatch, is_terminal):
    shown = io.StringIO()
    made = partial(Console, file=shown, force_terminal=is_terminal, width=150)
    monkeypatch.setattr(results, "Console", lambda **_: made())
    entries = []
    with Progress(2, entries, [5]) as progress:
        assert (progress.live is not None) == is_terminal
        entries.append(boxed_entry({5: 1}, 5, "steps", workers=2, layout="combined"))
        progress.show(entries)
        progress.advance()
        if is_terminal:
            progress.live.refresh()
    if is_terminal:
        for words in ("combined", "100.0", "1/2", "batches"):
            assert words in shown.getvalue()
    else:
        assert shown.getvalue() == ""
