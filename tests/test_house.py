"""The house: who may import whom. A file imports only what stands above it here, so it can be read in this order."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minihogwild"
ORDER = [
    "errors",
    "files",
    "interrupts",
    "config",
    "weights",
    "packed",
    "rope",
    "attention",
    "backend",
    "cache",
    "model",
    "gpu",
    "sampling",
    "layouts",
    "hub",
    "gpu.several",  # reads a part of a model, by what the hub's files do
    "prompts",
    "workers",
    "gpu.pipeline",  # a driver for a Run
    "oracle",
    "commands",
    "replay",
    "compare",
    "scoring",
    "show",
    "plan",
    "generate",
    "evaluate",
]
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(module: str) -> str:
    """The room of ORDER that a module, such as hub.tokenizer, lies in."""
    return module if module in ORDER else module.split(".")[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[str]:
    """Modules of the package that a file imports when it is imported itself; not those inside of functions."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = path.parents[node.level - 1].relative_to(PACKAGE)
        names = [node.module] if node.module else [alias.name for alias in node.names]
        found += [".".join([*folder.parts, name]) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_what_stands_above_it(path):
    here = ORDER.index(room_of(module_of(path)))
    for module in imports_of(path):
        if room_of(module) == ORDER[here]:
            continue  # within a drawer, as its files like
        assert ORDER.index(room_of(module)) < here, f"{module_of(path)} imports {module}"


def test_the_oracle_shares_nothing_with_the_engine_but_numbers_and_tensors():
    assert {*imports_of(PACKAGE / "oracle.py")} == {"config", "weights"}


def test_the_engine_knows_nothing_about_text():
    """From token ids to tokens: no tokenizer, no words, no terminal."""
    for module in ORDER[: ORDER.index("hub")]:
        if (PACKAGE / f"{module}.py").exists():
            assert not {room_of(name) for name in imports_of(PACKAGE / f"{module}.py")} & {"hub", "prompts", "show"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    return done.stdout.strip()


def test_the_package_is_imported_without_pytorch():
    """So a command can speak, or be interrupted, before it is loaded."""
    assert run_python("import sys, minihogwild, minihogwild.interrupts; print('torch' in sys.modules)") == "False"


def test_all_that_the_package_offers_is_there():
    code = "import minihogwild as m; print(*sorted(getattr(m, name).__name__ for name in m.__all__))"
    names = "Cache Config InputError Layer LayerKind Model Plan Rope Run Sampling Weights forward load sample step"
    assert run_python(code) == names


def test_what_is_not_there_is_said():
    import minihogwild

    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = minihogwild.nothing_of_that_name


def test_a_run_on_a_cpu_imports_neither_kernels_nor_panes_nor_the_page():
    code = (
        "import sys; from minihogwild.generate import main; main(['--max-steps', '2', '--device', 'cpu']);"
        "print(sorted({'triton', 'rich.live'} & sys.modules.keys()"
        " | {name for name in sys.modules if name.startswith(('minihogwild.gpu', 'minihogwild.show.'))}))"
    )
    assert run_python(code).splitlines()[-1] == "['minihogwild.show.lines']"
