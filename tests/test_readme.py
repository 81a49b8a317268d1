"""What the README shows is what one gets."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_in_the_readme_runs(smollm2_folder, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 'load("HuggingFaceTB/SmolLM2-135M-Instruct")' in code
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2_folder)), {})
    assert capsys.readouterr().out.count(" | ") >= 30


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (Path(__file__).parent.parent / link).exists()


def test_no_page_was_left_unfinished():
    root = Path(__file__).parent.parent
    for page in (root / "README.md", *root.glob("*/README.md"), *root.glob("*/*/README.md")):
        assert "@@" not in page.read_text(), page
