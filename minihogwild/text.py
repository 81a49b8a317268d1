"""Text to token ids and back: the tokenizer and the chat template of a model folder.

What a user types is text. Control tokens (`<|im_end|>`, `<think>`, ...) come from the template alone;
spelled out in a prompt they are encoded as the characters they are.
"""

import json
import re
import secrets
import subprocess
import sys
from pathlib import Path

import tokenizers

from .config import InputError, refusing, require

TEMPLATE = Path(__file__).with_name("template.py")
TEMPLATE_SECONDS, TEMPLATE_LENGTH = 10, 2**20  # that a chat template may take; characters that it may add


class Tokenizer:
    """A folder's tokenizer.json, and its chat template if it has one (else `template` is None)."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        data = read_json(path)
        with refusing(f"{path} cannot be read"):
            added = [token for token in data.get("added_tokens") or [] if token["content"].strip()]
            self.control = {token["content"]: token["id"] for token in added}
            self.at_control = re.compile("|".join(map(re.escape, self.control)) or "(?!)")
            self.hidden = {token["id"] for token in added if token["special"]}  # not shown in decoded text
            # `encode_special_tokens` reads special tokens as plain text. For that all control tokens must count as
            # special: some checkpoints mark `<think>` or even `<|User|>` as ordinary added tokens.
            for token in added:
                token["special"] = True
            data["truncation"] = data["padding"] = None
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        self.size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        self.mark = secrets.token_hex(16)  # stands in no text: see `chat`
        self.tokenizer.add_tokens([tokenizers.AddedToken(self.mark, normalized=False)])
        self.hidden.add(self.tokenizer.token_to_id(self.mark))  # models whose vocabulary is padded may sample it
        self.special, self.template = chat_settings(folder)

    def encode(self, text: str, whole: bool = False, control: bool = False) -> list[int]:
        """Token ids of a fragment of text, or of a `whole`, with what the tokenizer puts around that.

        Only where `control` says so are control tokens read as such. Raises InputError for half a character.
        """
        self.tokenizer.encode_special_tokens = not control
        with refusing(f"not valid UTF-8: {text[:200]!r}"):
            return self.tokenizer.encode(text, add_special_tokens=whole).ids

    def chat(self, prompt: str) -> list[int]:
        """Token ids of a conversation that opens with `prompt` and asks for the reply.

        Without a chat template: the text as it is. Raises InputError where the template fails, or where with this
        prompt it gives other control tokens than with any.
        """
        if self.template is None:
            return self.encode(prompt, whole=True)
        # A mark breaks each control token that the user typed. All else is encoded as the ecosystem does it.
        broken = self.at_control.sub(lambda typed: typed[0][0] + self.mark + typed[0][1:], prompt)
        texts = render({"template": self.template, "special": self.special, "prompts": [broken, "a"]})
        ids, harmless = (self.encode(text, control=True) for text in texts)
        control = {*self.control.values()}
        ours, expected = ([i for i in row if i in control] for row in (ids, harmless))
        require(ours == expected, "the prompt would bring control tokens of its own into the chat")
        return [i for i in ids if i != self.tokenizer.token_to_id(self.mark)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden], skip_special_tokens=False)


class Stream:
    """Text of the tokens that follow the ids in `before`: each character once, when all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]):
        self.tokenizer, self.told, self.new = tokenizer, list(before), []

    def next(self, token: int) -> str:
        """The text that `token` completes, "" if none. Special tokens have no text."""
        # What a token reads as depends on the ones before it (a first token may lose its space)
        self.new.append(token)
        told, text = (self.tokenizer.decode(ids) for ids in (self.told, self.told + self.new))
        if text.endswith("\ufffd") or len(text) <= len(told):
            return ""
        self.told, self.new = self.new, []
        return text[len(told) :]


@refusing("the chat template fails")
def render(given: dict) -> list[str]:
    """`template.render`, in a process of its own: it may loop for ever, or ask for all the memory there is."""
    given = given | {"allowed": TEMPLATE_LENGTH + 10 * max(map(len, given["prompts"]))}
    child, told = [sys.executable, "-X", "utf8", str(TEMPLATE)], json.dumps(given)
    try:
        done = subprocess.run(child, input=told, capture_output=True, encoding="utf-8", timeout=TEMPLATE_SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"it takes more than {TEMPLATE_SECONDS} seconds") from None
    require(done.returncode == 0, done.stderr[-500:] or "it crashes, or needs too much memory")
    return json.loads(done.stdout)


def chat_settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """(special tokens by name, such as `bos_token`; the chat template or None)."""
    path, own_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(path) if path.exists() else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in settings.items()}
    special = {name: text for name, text in texts.items() if name.endswith("_token") and text and isinstance(text, str)}
    template = settings.get("chat_template")
    with refusing(f"{path}: chat_template is neither text nor a list of texts by name"):
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    with refusing(f"{own_file} cannot be read"):
        if own_file.exists():
            template = own_file.read_text("utf-8")
    return special, template


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    with refusing(f"{path} cannot be read"):
        require(path.is_file() or not path.exists(), "it is not a file")  # a pipe would wait for ever
        data = json.loads(path.read_text("utf-8"))
    require(isinstance(data, dict), f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data
