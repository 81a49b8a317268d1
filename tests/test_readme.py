"""What the README shows is what one gets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *ROOT.glob("[!.]*/*/*.md")]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text())]


def test_the_loop_in_the_readme_runs(smollm2_folder, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 'load("HuggingFaceTB/SmolLM2-135M-Instruct")' in code
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2_folder)), {})
    assert capsys.readouterr().out.count(" | ") >= 30


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_links_lead_somewhere(page, link):
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    if heading:  # as code hosts name it
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_was_left_unfinished(page):
    assert "@@" not in page.read_text()
