"""The tutorial: each chapter, run from its top to its end, prints what it shows, and draws the figures that it shows.

python -m pytest tests/test_tutorial.py --update-examples     writes anew what they print, and their figures
"""

import re
import shutil
import time
from pathlib import Path

import matplotlib
import pytest
from pytest_examples import EvalExample, find_examples

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted([*(ROOT / "tutorial").glob("[0-9]*.md"), *(ROOT / "tutorial").glob("workshop-*.md")])
TIMED = 'test="timing"'  # in a block's first line: what it prints differs from machine to machine


def mirror(folder: Path) -> Path:
    """The repository, but with a folder of its own for figures."""
    (folder / "tutorial/figures").mkdir(parents=True)
    for path in [*ROOT.iterdir(), *(ROOT / "tutorial").iterdir(), *(ROOT / "tutorial/figures").glob("*.mplstyle")]:
        if not (folder / path.relative_to(ROOT)).exists():
            (folder / path.relative_to(ROOT)).symlink_to(path)
    return folder / "tutorial"


def texts(figure: Path) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", figure.read_text("utf-8"), re.S)


# The first ones are fast, and cover the machinery of all
PARAMETERS = [pytest.param(path, marks=[] if path.stem[0] in "1234" else pytest.mark.slow) for path in CHAPTERS]


@pytest.mark.parametrize("chapter", PARAMETERS, ids=[path.stem for path in CHAPTERS])
def test_chapter(chapter: Path, eval_example: EvalExample, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(mirror(tmp_path / "minihogwild"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # a figure that has not changed is the same file
    matplotlib.use("agg")
    eval_example.set_config(line_length=120)
    began, names = time.process_time(), {}
    for example in find_examples(chapter):
        if TIMED in example.prefix and not eval_example.update_examples:
            names = eval_example.run(example, module_globals=names)
        elif eval_example.update_examples:
            names = eval_example.run_print_update(example, module_globals=names)
        else:
            names = eval_example.run_print_check(example, module_globals=names)
    assert time.process_time() - began < 90
    drawn = {path.name: path for path in Path("figures").iterdir() if not path.is_symlink()}
    for name, path in drawn.items():
        if eval_example.update_examples:
            shutil.copy(path, ROOT / "tutorial/figures")
        assert texts(path) == texts(ROOT / "tutorial/figures" / name), name
    shown = re.findall(r"\(figures/(\S+?)\)", chapter.read_text("utf-8"))
    assert drawn.keys() <= set(shown), "it draws what it does not show"
    assert all((ROOT / "tutorial/figures" / name).exists() for name in shown)


def test_there_are_chapters_and_a_workshop():
    assert len(CHAPTERS) == 10
