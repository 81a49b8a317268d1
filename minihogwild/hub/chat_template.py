"""Chat templates: programs by whoever made the model folder, rendered in a process of their own.

They may loop for ever, or ask for all the memory there is: so they get ten seconds, half a gigabyte, and a sandbox.
"""

import json
import subprocess
import sys
from pathlib import Path

from ..errors import InputError, refusing
from ..files import read_json

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


def read_chat_template(folder: Path) -> tuple[dict[str, str], str | None]:
    """(special tokens by name, such as `bos_token`; the chat template or None), as the folder gives them."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    with refusing(f"{path}: chat_template is neither text nor a list of texts by name"):
        template = default_template(settings.get("chat_template"))
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        with refusing(f"{own_file} cannot be read"):
            template = own_file.read_text("utf-8")
    return special_tokens_in(settings), template


def default_template(value: object) -> object:
    """Of a list of templates the default one. A value that is no text at all is refused when it is rendered."""
    if not isinstance(value, list):
        return value
    by_name = {entry["name"]: entry["template"] for entry in value}
    return by_name.get("default")


def special_tokens_in(settings: dict) -> dict[str, str]:
    """Those that tokenizer_config.json names: each as its text, or as an object with the text as `content`."""
    special_tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        is_named = isinstance(text, str) and text != ""
        if name.endswith("_token") and is_named:
            special_tokens[name] = text
    return special_tokens
