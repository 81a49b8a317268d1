"""Problems with known answers, and whether what a run wrote is right.

A file of problems has a JSON object in each line, of one of two kinds:

    {"problem": "What is 6 times 7?", "answer": "42"}
    {"problem": "1. ...\\n2. ...", "answers": [["Tokyo"], ["eight", "8"]]}

`answer` is compared with what the run boxes. `answers` has a list for each part of a job; a part is right as soon as
one of its alternatives stands in what the workers have written.
"""

import functools
import json
import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .errors import refusing, require
from .files import require_file

HAS_MATH_VERIFY = find_spec("math_verify") is not None
ASK_FOR_BOX = "\n\nPut the final answer inside \\boxed{}."
ASK_FOR_BOXES = "\n\nPut all the answers, in this order and separated by semicolons, inside one \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """What workers are asked, and what is right: `expected` boxed answers, or `parts` that are looked for in texts."""

    text: str
    expected: tuple[str, ...] = ()  # one; or those of several problems that were joined
    parts: tuple[tuple[str, ...], ...] = ()  # alternatives for each part


# ---- reading


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file. Raises InputError with the number of the line that is wrong."""
    with refusing(f"{path} cannot be read"):
        require_file(path)
        lines = path.read_text("utf-8-sig").split("\n")  # nothing else ends a line of JSON
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with refusing(f"{path}: line {number}"):
                problems.append(problem_of(json.loads(line)))
    require(problems, f"{path}: there is no problem in it")
    return problems


def problem_of(entry: object) -> Problem:
    require(isinstance(entry, dict), 'a problem must be an object, as {"problem": "...", "answer": "..."}')
    text = entry.get("problem")
    require(isinstance(text, str) and text.strip(), "'problem' must be a text")
    has_answer, has_answers = "answer" in entry, "answers" in entry
    require(has_answer != has_answers, "there must be either 'answer' or 'answers'")
    if has_answer:
        answer = entry["answer"]
        is_one = isinstance(answer, (str, int, float)) and not isinstance(answer, bool) and str(answer).strip()
        require(is_one, f"'answer' must be a text or a number, not {answer!r}")
        return Problem(text, expected=(str(answer),))
    return Problem(text, parts=parts_of(entry["answers"]))


def parts_of(answers: object) -> tuple[tuple[str, ...], ...]:
    are_lists = isinstance(answers, list) and answers and all(isinstance(part, list) and part for part in answers)
    require(are_lists, "'answers' must be a list of lists of texts, none of them empty")
    for part in answers:
        for alternative in part:
            is_text = isinstance(alternative, str) and alternative.strip()
            require(is_text, f"'answers' holds {alternative!r}, which is no text")
    return tuple(tuple(part) for part in answers)


def joined(problems: list[Problem], count: int) -> list[Problem]:
    """Each `count` problems that follow each other as one: solved together, in one prompt."""
    if count == 1:
        return problems
    require(all(problem.expected for problem in problems), "--join needs problems with an 'answer'")
    groups = []
    for start in range(0, len(problems), count):
        group = problems[start : start + count]
        texts = [f"{number}. {problem.text}" for number, problem in enumerate(group, 1)]
        expected = [answer for problem in group for answer in problem.expected]
        groups.append(Problem("\n\n".join(texts) + ASK_FOR_BOXES, tuple(expected)))
    return groups


def asked(problem: Problem) -> str:
    """The text for a run: it asks for a box where the answer is to be boxed."""
    if not problem.expected or "\\boxed" in problem.text:
        return problem.text
    return problem.text + ASK_FOR_BOX


# ---- is it right?


def share_right(answer: str | None, expected: tuple[str, ...]) -> float:
    """The share of expected answers that a boxed answer gives, each in its place."""
    if answer is None:
        return 0.0
    given = answer.split(";") if len(expected) > 1 else [answer]
    right = [is_same_answer(ours, theirs) for ours, theirs in zip(given, expected)]
    return sum(right) / len(expected)


def is_same_answer(given: str, expected: str) -> bool:
    """Are they equal, letter by letter but for spaces, or as mathematics?

    The latter is left to `math-verify`, where it is installed.
    """
    if "".join(given.split()) == "".join(expected.split()):
        return True
    words = [text.strip().lower() for text in (given, expected)]
    if all(word.isalpha() for word in words):  # not for math-verify, which would read products of letters
        return words[0] == words[1]
    if not HAS_MATH_VERIFY:
        return False
    from math_verify import parse, verify  # not above: it is an extra

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it would print whole answers
    # It takes what it can't parse for no answer, and gives up after some seconds.
    return verify(parse(f"${expected}$"), parse(f"${given}$"))


def stands_in(text: str, alternatives: tuple[str, ...], at_end: bool = True) -> bool:
    """Does one of them stand in the text, as whole words or numbers? Case and the amount of white space don't matter.

    With `at_end` off, not where the text ends with it: while that is being written, "4" may yet become "42" or "4.5".
    """
    text = re.sub(r"\s+", " ", text)
    return any(pattern.search(text) for pattern in patterns(alternatives, at_end))


@functools.cache
def patterns(alternatives: tuple[str, ...], at_end: bool) -> list[re.Pattern]:
    """One for each alternative: see `stands_in`."""
    found = []
    for alternative in alternatives:
        words = " ".join(alternative.split())
        before, after = r"(?<!\w)", r"(?!\w)"
        something_follows = r"(?=.)"
        if words[0].isdigit():
            before = r"(?<![\w.,/-])"  # not the end of 0.8, 1,008, 3/8 or -8
        if words[-1].isdigit():
            after = r"(?!\w|[.,/]\d)"  # not the beginning of 8.5
            something_follows = r"(?=[^.,/]|[.,/].)"
        if not at_end:
            after += something_follows
        found.append(re.compile(before + re.escape(words) + after, re.IGNORECASE))
    return found


class PartsFound:
    """When each part of a job was first there in the workers' texts, watched while a run goes on."""

    def __init__(self, parts: tuple[tuple[str, ...], ...]):
        self.parts = parts
        self.found_at: list[int | None] = [None] * len(parts)  # forward steps

    def look(self, paragraph: str, forward_steps: int, is_whole: bool) -> None:
        """See which parts have come with this step, to a paragraph that somebody is writing, or has just ended."""
        for number, alternatives in enumerate(self.parts):
            if self.found_at[number] is None and stands_in(paragraph, alternatives, at_end=is_whole):
                self.found_at[number] = forward_steps

    def share(self, budget: int) -> float:
        """The share of parts that were there after so many forward steps."""
        return share_found(self.found_at, budget)


def share_found(found_at: list[int | None], passes: int) -> float:
    """The share of parts that were there after so many forward steps; None: it never came."""
    by_then = [at for at in found_at if at is not None and at <= passes]
    return len(by_then) / len(found_at)


def repeats(parts: tuple[tuple[str, ...], ...], paragraphs: list[str]) -> int:
    """How many paragraphs give a part that another paragraph gives too: work that was done twice."""
    too_many = 0
    for alternatives in parts:
        times = sum(stands_in(text, alternatives) for text in paragraphs)
        too_many += max(0, times - 1)
    return too_many
