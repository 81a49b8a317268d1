"""Chat templates: programs by whoever made the model folder, each rendered in a process of its own.

They may loop for ever, or ask for all the memory there is: so they get ten seconds, half a gigabyte, and a sandbox. To
start a process takes longer than to render: so it stays, for the next prompt.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

from ..errors import InputError, refusing, require
from ..files import read_json_if_there, require_file

PROGRAM = Path(__file__).with_name("render_template.py")
SECONDS = 10  # that a template may take
LENGTH = 2**20  # characters that it may add to those of the prompts

# The process that has rendered a template last, by that template: it may do so again
waiting: dict[str, subprocess.Popen] = {}


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
    process = waiting.pop(template, None)
    if process is None or process.poll() is not None:  # there is none, or somebody has ended it
        process = start_process()
    answer = answer_of(process, request)
    if "failure" in answer:
        raise InputError(answer["failure"][-500:])
    for other in waiting.values():  # one is enough: few use several models in turn
        other.kill()
        other.communicate()
    waiting.clear()
    waiting[template] = process
    return answer["texts"]


def start_process() -> subprocess.Popen:
    """It ends by itself when its standard input does, as when this process has ended."""
    return subprocess.Popen(
        [sys.executable, "-X", "utf8", str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a crash's last words
        encoding="utf-8",
    )


def answer_of(process: subprocess.Popen, request: dict) -> dict:
    """{"texts": ...} or {"failure": why}; after a failure the process has ended."""
    took_too_long = threading.Event()

    def end_it():
        took_too_long.set()
        process.kill()

    limit = threading.Timer(SECONDS, end_it)
    limit.start()
    answer = {"failure": "it crashes, or needs too much memory"}
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
    except (OSError, ValueError):  # it has ended, perhaps in the middle of its answer
        if took_too_long.is_set():
            answer = {"failure": f"it takes more than {SECONDS} seconds"}
    finally:  # also where Ctrl-C comes
        limit.cancel()
        if "failure" in answer:
            process.kill()
            process.communicate()
    return answer


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
