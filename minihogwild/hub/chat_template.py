"""Chat templates: programs by whoever made the model folder, rendered in a process of their own.

They may loop for ever, or ask for all the memory there is: so they get ten seconds, half a gigabyte, and a sandbox.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from ..errors import InputError, refusing, require
from ..files import read_json_if_there, require_file

PROGRAM = Path(__file__).with_name("render_template.py")
SECONDS = 10  # that a template may take
LENGTH = 2**20  # characters that it may add to those of the prompts


@refusing("the chat template fails")
def render_chat(template: str, special_tokens: dict[str, str], prompts: list[str]) -> list[str]:
    """For each prompt, the conversation that opens with it and asks for the reply.

    Raises InputError where the template fails, takes too long or needs too much.
    """
    longest_prompt = max(len(prompt) for prompt in prompts)
    request = {
        "template": template,
        "special_tokens": special_tokens,
        "prompts": prompts,
        "allowed": LENGTH + 10 * longest_prompt,  # a template may repeat the prompt
    }
    try:
        done = subprocess.run(
            [sys.executable, "-X", "utf8", str(PROGRAM)],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"it takes more than {SECONDS} seconds") from None
    if done.returncode != 0:
        reason = done.stderr[-500:]
        raise InputError(reason if reason else "it crashes, or needs too much memory")
    return json.loads(done.stdout)


def read_chat_template(folder: Path) -> str | None:
    """The chat template, as the folder gives it; None where it has none."""
    several = folder / "additional_chat_templates"
    files = {path.stem: path for path in several.glob("*.jinja")}
    if os.path.lexists(folder / "chat_template.jinja"):
        files.setdefault("default", folder / "chat_template.jinja")
    if files:
        with refusing(several):
            require_default(files)
        own_file = files["default"]
        with refusing(f"{own_file} cannot be read"):
            require_file(own_file)
            return own_file.read_text("utf-8")
    # Last the file of a model that sees: its language part, taken out, has the template nowhere else
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        with refusing(f"{path}: chat_template"):
            template = default_template(read_json_if_there(path).get("chat_template"))
        if template is not None:
            return template
    return None


def default_template(value: object) -> str | None:
    """Of several templates, by name or as a list of such, the default one."""
    if value is None or isinstance(value, str):
        return value
    with refusing("it is neither a text nor texts by name"):
        by_name = value if isinstance(value, dict) else {entry["name"]: entry["template"] for entry in value}
        require_default(by_name)
    require(isinstance(by_name["default"], str), f"the default one must be a text, not {by_name['default']!r}")
    return by_name["default"]


def require_default(by_name: Collection[str]) -> None:
    names = ", ".join(sorted(by_name))
    require("default" in by_name, f"of several ({names}), none is called default")
