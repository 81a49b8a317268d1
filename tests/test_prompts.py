"""How a worker's text is read (paragraphs, answers), and how the words of a run are filled in and overridden."""

import json
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_files import refusal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from refusals import refused

from minihogwild.prompts import NAMES, BoxedAnswer, Prompts, boxed, fill, load_prompts, paragraph_closed, says_done

SENTENCE = "The sum is 5."


@contextmanager
def less_than_a_second() -> Iterator[None]:
    """By the clock of this process: other programs of a busy machine do not count."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 1


# ---- paragraphs: the blank line


@pytest.mark.parametrize(
    "blank",
    ["\n\n", "\n \n", "\n\t \n", "\n\n\n", "\n\n\n\n\n", " \n\n", "  \n  \n", "\n\n  ", "\n \n \n ", "\r\n\r\n"],
)
def test_a_blank_line_after_a_sentence_closes(blank):
    assert paragraph_closed(SENTENCE + blank)


@pytest.mark.parametrize("end", ["", " ", "\n", "\n   ", "  \n", "\t", "\r\n", "\\n\\n"])
def test_without_a_blank_line_nothing_closes(end):
    assert not paragraph_closed(SENTENCE + end)


def test_a_blank_line_closes_in_whatever_pieces_it_comes():
    for pieces in (["\n\n"], ["\n", "\n"], ["\n", " ", "\n"], [" \n", " \n"], [".\n", "\n"]):
        text, closed = "So", []
        for piece in [".", *pieces]:
            text += piece
            closed.append(paragraph_closed(text))
        assert closed == [False] * len(pieces) + [True], pieces  # with the last piece, and no sooner


@pytest.mark.parametrize("text", ["", "\n\n", "\n\n\n", "   \n\n", "\n \n", "**\n\n", '"\n\n', "``\n\n", ")\n\n"])
def test_a_blank_line_after_nothing_closes_nothing(text):
    assert not paragraph_closed(text)


def test_only_the_last_paragraph_counts():
    assert not paragraph_closed("One is done.\n\nTwo is not")
    assert not paragraph_closed("One is done.\n\nTwo is not\n\n")
    assert paragraph_closed("a heading\n\nThen a sentence.\n\n")


# ---- paragraphs: the sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "Done.",
        "Done!",
        "Done?",
        "Done…",
        "Done...",
        "Really?!",
        "Really‽",
        "Really⁉",
        "終わりました。",
        "終わり！",
        "終わり？",
        "終わり．",
        "ｵﾜﾘ｡",
        "समाप्त।",
        "समाप्त॥",
        "هل انتهينا؟",
        "کام ختم ہوا۔",
        "Վերջ։",
        "አለቀ።",
        "ပြီးပါပြီ။",
        "ចប់។",
        "ᠲᠡᠭᠦᠰᠪᠡ᠃",
    ],
)
def test_sentences_end_in_many_scripts(sentence):
    assert paragraph_closed(sentence + "\n\n")
    assert not paragraph_closed(sentence)
    assert not paragraph_closed(sentence[:-1].rstrip(".?") + "\n\n")  # the same words without their end


@pytest.mark.parametrize(
    "text", ["So", "So,", "So:", "So;", "So -", "So 3.14", "1. One", "# A heading", "a = b", "x\\\\"]
)
def test_what_is_no_sentence_does_not_close(text):
    assert not paragraph_closed(text + "\n\n")


@pytest.mark.parametrize(
    "sentence",
    [
        '"Stop."',
        "'Stop.'",
        "“Stop.”",
        "‘Stop.’",
        "„Halt.“",
        "«Да.»",
        "»Ja.«",
        "(Stop.)",
        "[Stop.]",
        "{Stop.}",
        "「はい。」",
        "『はい。』",
        "（はい。）",
        "*Stop.*",
        "**Stop.**",
        "_Stop._",
        "__Stop.__",
        "***Stop.***",
        "~~Stop.~~",
        "`Stop.`",
        '**("Stop.")**',
        '(He said: "*Stop!*")',
        "( Stop. )",
    ],
)
def test_closing_quotes_brackets_and_emphasis_are_looked_through(sentence):
    assert paragraph_closed(sentence + "\n\n")
    assert not paragraph_closed(sentence.replace(".", "").replace("!", "").replace("。", "") + "\n\n")


def test_opening_brackets_are_not_looked_through():
    assert not paragraph_closed("Stop. (\n\n")
    assert not paragraph_closed("Stop. [\n\n")


# ---- paragraphs: code fences


@pytest.mark.parametrize(
    "text",
    [
        "```\nx = 1\n```",
        "```python\nx = 1\n```",
        "Look:\n```python\nx = 1\n\ny = 2\n```",
        "~~~\nx = 1\n~~~",
        "~~~ python\nx = 1\n~~~",
        "````\n```\nx\n```\n````",  # a shorter fence inside is code
        "~~~~\n~~~\n~~~~",
        "```\nx\n`````",  # a longer one closes
        "```\n~~~\n```",  # the other kind is code
        "~~~\n```\n~~~",
        "- so:\n  ```\n  x\n  ```",  # in a list
        "```\nx\n```  ",
        "```\nx\n```\n```\ny\n```",
        "```\n```",
        "```\nx\n```\nThat is it.",
        "Use ```x``` here.",
        "```\necho $$\n```",  # no formula
    ],
)
def test_closed_fences_close(text):
    assert paragraph_closed(text + "\n\n")
    assert not paragraph_closed(text + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "```\nx = 1.",
        "```python\nprint('Done.')",
        "```",
        "~~~\nx.",
        "````\n```\nx.\n```",
        "```\n~~~\nx.\n~~~",
        "~~~~\n~~~\nx.\n~~~",
        "~~~~~\nx.\n~~~~",
        "~~~\nx.\n```",
        "```\nx\n```\nand\n```\ny.",  # the second is open
        "```\n```python\nx.",  # a closing fence has nothing after it
        "```\n``\nx.",
        "```\n$$x$$",
        "  ```\n  x.",
    ],
)
def test_nothing_closes_inside_an_open_fence(text):
    assert not paragraph_closed(text + "\n\n")


def test_text_after_a_closed_fence_needs_its_own_end():
    assert not paragraph_closed("```\nx\n```\nand so\n\n")
    assert paragraph_closed("```\nx\n```\nand so.\n\n")


def test_backticks_around_words_at_the_start_of_a_line_are_no_fence():
    assert paragraph_closed("```x = 1``` sets x.\n\n")  # CommonMark: what opens a fence has no backtick after it


# ---- paragraphs: formulas


@pytest.mark.parametrize(
    "text",
    [
        "$$x = 1$$",
        "$$\nx = 1\n$$",
        "So $$x$$",
        "$$a$$ and $$b$$",
        "$$\nx = 1\n\ny = 2\n$$",
        "$$x$$.",
        "It costs 5$.",
        "It is $x$.",
        "```\n$$\n```\n$$x$$",  # the one in code does not count
    ],
)
def test_closed_formulas_close(text):
    assert paragraph_closed(text + "\n\n")
    assert not paragraph_closed(text + "\n")


@pytest.mark.parametrize("text", ["$$", "$$x = 1.", "$$\nx = 1.", "$$a$$ and $$b.", "```\n$$\n```\n$$\nx."])
def test_nothing_closes_inside_an_open_formula(text):
    assert not paragraph_closed(text + "\n\n")


def test_text_after_a_formula_needs_its_own_end():
    assert not paragraph_closed("$$x$$ so\n\n")
    assert not paragraph_closed("so $x$\n\n")


# ---- paragraphs: properties

words = st.text('ab 1é日,.!?()"*_:-\n', max_size=30)  # prose: no fences and no formulas
code = st.lists(st.sampled_from(["", "x = 1.", "``", "``` y", "$$", "  Done.", "~~~", "\t"]), max_size=4)
blanks = st.sampled_from(["\n\n", "\n \n", " \n\t\n", "\n\n\n", "\n\n "])


@st.composite
def closed_parts(draw) -> str:
    """Something that ends a paragraph, as a line or several of its own."""
    kind = draw(st.sampled_from(["sentence", "code", "formula"]))
    if kind == "sentence":
        return draw(st.text("ab 日", max_size=8)) + "x" + draw(st.sampled_from([".", "?", "。", "।", '."', ".)**"]))
    if kind == "formula":
        return "$$" + draw(st.text("xy+ \n.", min_size=1, max_size=8)) + "$$"
    fence = draw(st.sampled_from(["````", "`````", "````py"]))
    return "\n".join([fence, *draw(code), fence.removesuffix("py")])


@given(before=words, part=closed_parts(), blank=blanks)
def test_prose_in_front_keeps_a_closed_paragraph_closed(before, part, blank):
    assert paragraph_closed(part + blank)
    assert paragraph_closed(before + "\n" + part + blank)


@given(
    st.lists(
        st.sampled_from([".", "x", " ", "\n", "\n\n", "```", "~~~", "$$", '"', "**", "。", "\t", "\r"]), max_size=14
    ).map("".join)
)
def test_text_without_a_blank_line_at_its_end_is_never_closed(text):
    white = text[len(text.rstrip()) :]
    if white.count("\n") < 2:
        assert not paragraph_closed(text)
    assert not paragraph_closed(text.rstrip())


@given(parts=st.lists(closed_parts(), max_size=3), inside=words, opening=st.sampled_from(["```", "~~~", "$$"]))
def test_nothing_that_is_open_closes(parts, inside, opening):
    assert not paragraph_closed("\n".join([*parts, opening, inside]) + "\n\n")


def closed_slowly(text: str) -> bool:
    """`paragraph_closed` line by line, as CommonMark reads fences."""
    if text[len(text.rstrip()) :].count("\n") < 2:
        return False
    open_fence, prose = "", []
    for line in text.rstrip().split("\n"):
        words = line.strip()
        marks = words[: len(words) - len(words.lstrip(words[:1]))] if words[:1] in ("`", "~") else ""
        after = words[len(marks) :]
        if open_fence:
            if marks.startswith(open_fence) and not after:
                open_fence = ""
                prose.append(".")
        elif len(marks) >= 3 and "`" not in after:
            open_fence = marks
        else:
            prose.append(line)
    *pairs, last = "\n".join(prose).split("$$")  # text, formula, text, formula, ..., text
    if open_fence or len(pairs) % 2:
        return False
    if pairs:
        last = "." + last
    last = last.rstrip()
    while last and last[-1] in "\"'*_~`) ":
        last = last[:-1]
    return last != "" and last[-1] in ".?。"


sentences = ["x.", "y", "z?)**", "。", "", "", "$$x$$", "so $$x$$.", "``", "~~"]
fences = ["```", "```", "````", "~~~", "~~~~", "```py", "~~~py", "  ``` ", "``` x", "```x``` y."]
formulas = ["$$", "$$", "a $$ b", "$$ c."]
# A fence inside an open formula could be read either way
some_lines = st.sampled_from([fences, formulas]).flatmap(
    lambda marks: st.lists(st.sampled_from([*sentences, *marks]), max_size=12)
)


@examples(1000)
@given(lines=some_lines, blank=st.sampled_from(["", "\n", "\n\n", "\n\n", "\n \n"]))
def test_fences_and_formulas_line_by_line(lines, blank):
    text = "\n".join(lines) + blank
    assert paragraph_closed(text) == closed_slowly(text)


LONG_TEXTS = {
    "blank lines": ["\n"] * 3_000 + ["x"] * 3_000,
    "headings": ["So", "\n\n"] * 500,
    "spaces": [" "] * 6_000 + ["\n\n"],
    "spaces in blank lines": [".", "\n"] + [" \t"] * 3_000 + ["\n"],
    "backticks": ["`"] * 6_000 + ["\n\n"],
    "fences": ["```\n"] * 3_000 + ["\n"],
    "dollars": ["$$"] * 3_000 + ["\n\n"],
    "brackets": ["Stop."] + [")"] * 6_000 + ["\n\n"],
    "list items": ["1.) "] * 3_000 + ["\n\n"],
}


@pytest.mark.parametrize("pieces", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_a_long_paragraph_takes_no_time_to_judge(pieces):
    """After each of its tokens, as a run does."""
    text = ""
    with less_than_a_second():
        for piece in pieces:
            text += piece
            paragraph_closed(text)


# ---- boxed answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"So $\boxed{ 5 }$.", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{{x}}}", "{{x}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x }", r"\left\{ x"),
        (r"\boxed{x \}}", r"x \}"),
        (r"\boxed{a \\}", r"a \\"),  # a line break, then the end
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{1} and \boxed{2}", "1"),
        (r"\boxed{1 and \boxed{2}", "2"),  # the first is never completed
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{} and \boxed{4}", "4"),  # an empty one is no answer
        (r"\boxed{  } and \boxed{4}", "4"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5", None),
        (r"\boxed{{5}", None),
        (r"\boxed{5\}", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        (r"\fbox{5}", None),
        (r"\boxedx{5}", None),
        ("", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


plain = st.text(string.ascii_letters + string.digits + " +-=,.\n日", min_size=1, max_size=5)
balanced = st.recursive(
    plain | st.sampled_from([r"\{", r"\}", r"\\", r"\frac", r"\,"]),
    lambda inner: st.lists(inner, max_size=4).map("".join) | inner.map(lambda text: "{" + text + "}"),
    max_leaves=8,
)


@given(before=st.text("ab{} \n", max_size=10), content=balanced, after=st.text("ab{}\\ ", max_size=10))
def test_any_balanced_content_round_trips_and_nothing_shorter_is_an_answer(before, content, after):
    text = before + r"\boxed{" + content + "}"
    expected = content.strip() or None
    assert boxed(text) == expected
    if expected:
        assert boxed(text + after) == expected
    for length in range(len(before), len(text)):
        assert boxed(text[:length]) is None


some_boxes = st.lists(
    st.sampled_from(
        ["\\boxed{", "\\boxed {", "\\boxed", "\\box", "ed{", "{", "}", "}}", "\\", "\\\\", "\\{", "\\}", " ", "5", "x"]
    ),
    max_size=14,
).map("".join)


@examples(500)
@given(text=some_boxes, data=st.data())
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(text, data):
    """Whatever the cuts, also inside of `\\boxed{`: what is found first is the answer of the text that far."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    reader = BoxedAnswer()
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        answer = reader.read(text[start:end])
        assert answer == boxed(text[:end])
        if answer is not None:
            return  # the first one counts: nothing more is read


LONG_BOXES = {
    "a box that is never closed": ["\\boxed{"] + ["{}"] * 3_000,
    "boxes in boxes that are never closed": ["\\boxed{{}"] * 3_000,
    "a box in pieces": [*"\\boxed{{}"] * 3_000,
    "empty boxes": ["\\boxed{", "}"] * 3_000,
    "closing braces": ["}"] * 6_000,
    "opening braces": ["{"] * 6_000 + ["}"] * 6_000,
    "backslashes": ["\\"] * 6_000 + ["}"],
}


@pytest.mark.parametrize("pieces", LONG_BOXES.values(), ids=LONG_BOXES)
def test_a_long_text_takes_no_time_to_search(pieces):
    """Token by token, as a run does. None of these has an answer."""
    reader = BoxedAnswer()
    with less_than_a_second():
        assert not any(reader.read(piece) for piece in pieces)


# ---- filling in


def test_fill_puts_values_in_and_fills_them_no_further():
    assert fill("{a}-{b}", a="{b}", b="{a}") == "{b}-{a}"
    assert fill("{a}{a}", a=3) == "33"


@pytest.mark.parametrize(
    "text", [r"\boxed{}", r"\frac{1}{2}", r"\boxed{x}", "{unknown}", "{ a }", "{", "}", "{{}}", "{}"]
)
def test_fill_leaves_other_braces(text):
    assert fill(text, a="A") == text


def test_fill_fills_inside_other_braces():
    assert fill(r"\boxed{{a}}", a="A") == r"\boxed{A}"


@given(value=st.text(max_size=20))
def test_fill_takes_values_as_they_are(value):
    assert fill("<{value}>{other}", value=value, other=value) == f"<{value}>{value}"  # backslashes are no references


# ---- the words themselves


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("All done.", True),
        (" So that is it. all DONE.\n\n", True),
        ("All done", False),
        ("All done. Bob?", False),
        ("", False),
        ("Overall done.", False),
        ("(All done.", True),
    ],
)
def test_a_worker_says_that_nothing_is_left_at_the_end_of_its_text(text, ended):
    assert says_done(text, "All done.") == ended
    assert not says_done(text, "")  # no such words, so nobody says them


def test_the_default_words_fit_together():
    words = Prompts()
    assert len(words.names) >= 16
    assert len(set(words.names)) == len(words.names)
    assert words.names[:3] == ("Alice", "Bob", "Carol")
    assert fill(words.prefix, name="Alice", number=3) == "**Alice [3]:**"
    assert boxed(words.cue + "5}") == "5"
    assert boxed(words.together) is None
    together = fill(words.together, n=3, names="Alice, Bob, Carol", first="Alice", problem="{n} + \\frac{1}{2}?")
    assert together.count("{n} + \\frac{1}{2}?") == 1
    assert "3 " in together
    assert "Alice, Bob, Carol" in together
    assert "\\boxed{}" in together
    assert fill(words.alone, problem="{n}?") == "{n}?"


@pytest.fixture
def prompts_file(tmp_path):
    def write(content: object) -> object:
        path = tmp_path / "words.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def test_a_file_overrides_what_it_gives_and_nothing_else(prompts_file):
    words = load_prompts(prompts_file({"check": " Again?", "names": ["Ann", "Ben"], "boxed": False}))
    assert words == Prompts(check=" Again?", names=("Ann", "Ben"), boxed=False)
    assert words.cue == Prompts().cue
    assert load_prompts(prompts_file({})) == Prompts()
    assert Prompts().names == tuple(NAMES.split())


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ({"colour": "red"}, "colour"),
        ({"check": "x", "colour": "red", "Cue": "y"}, "colour"),
        ({"check": 5}, "check"),
        ({"check": None}, "check"),
        ({"prefix": ["a"]}, "prefix"),
        ({"boxed": 1}, "boxed"),
        ({"boxed": "true"}, "boxed"),
        ({"names": "Alice"}, "names"),
        ({"names": {"a": 1}}, "names"),
        ({"names": ["Alice", 5]}, "names"),
        ({"names": ["Alice", ""]}, "names"),
        ({"names": ["Alice", "Bob", "Alice"]}, "names"),
        ({"roles": "You argue."}, "roles must be a list"),
        ({"roles": ["You argue.", 5]}, "roles must be texts"),
        ({"names": ["Ann"], "roles": ["a", "b"]}, "2 roles, but only 1 names"),
        ({"unaware": ["Ann"]}, "Ann"),
        ({"head_start": -1}, "head_start"),
        ({"head_start": 1001}, "head_start"),
        ({"banned": ["#", ""]}, "banned"),
        ({"banned": "#"}, "banned"),
        ({"banned": ["\ud800"]}, "banned"),
        ({"opening": None}, "opening"),
        ({"may_end": 0}, "may_end"),
        ({"finisher_tokens": 0}, "finisher_tokens"),
        ({"finisher_tokens": 1.5}, "finisher_tokens"),
        ({"done": ["All done."]}, "done"),
        ({"done": "All done.\n"}, "done"),
        ({"done": "."}, "done"),
        ({"header_own": "a\nb", "separator": {"x": "a\nb"}}, "separator"),
        ([], "words.json"),
        ("text", "words.json"),
        (b"", "words.json"),
        (b'{"check": "x"', "words.json"),
        (b"{'check': 'x'}", "words.json"),
        (b'{"check": "\xff"}', "words.json"),
        (b"[" * 100_000, "words.json"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_the_culprit(prompts_file, content, culprit):
    with refused(culprit):
        load_prompts(prompts_file(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with refused(path.name):
            load_prompts(path)


EXAMPLES = sorted((Path(__file__).parents[1] / "examples/words").glob("*.json"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_words_of_the_examples_can_be_read(file):
    words = load_prompts(file)
    assert "{problem}" in words.together
    assert words != Prompts()


# ---- words that would never reach a model, or reach it as they are spelled


@pytest.mark.parametrize("field", ["together", "alone"])
@pytest.mark.parametrize("words", ["Solve it together.", "", "{Problem}", "{ problem }"])
def test_words_without_the_problem_are_refused(field, words):
    message = refusal(Prompts, **{field: words})
    assert f"{field} must contain {{problem}}" in message


@pytest.mark.parametrize(
    ("field", "words", "unknown"),
    [
        ("together", "{problem} for {workers}", "workers"),
        ("together", "Solve together: {prompt}", "prompt"),
        ("alone", "{question} {problem}", "question"),
        ("alone", "{problem} {name}", "name"),
        ("prefix", "{worker}:", "worker"),
        ("prefix", "{names} {number}:", "names"),
        ("roles", ("You are {name}.", "You are {names}."), "names"),
    ],
)
def test_an_unknown_field_in_braces_is_named(field, words, unknown):
    message = refusal(Prompts, **{field: words})
    assert f"{field}: {{{unknown}}} is not filled in, only {{" in message


@pytest.mark.parametrize(
    "words",
    [
        r"\boxed{answer}",
        r"\text{one two}",
        "x_{max} + y^{min}",
        r"\frac{ab}{cd}",
        "{x}",
        "{}",
        "{A, B}",
        r"\{set\}",
        "{1, 2}",
    ],
)
def test_braces_of_formulas_stay(words):
    assert Prompts(together=words + " {problem}").together.startswith(words)


def test_no_names_at_all():
    assert refusal(Prompts, names=()).endswith("names must hold at least one")


def test_a_prompts_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "words.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"together": "{problem}!"}).encode())
    assert load_prompts(path).together == "{problem}!"
