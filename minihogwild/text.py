"""Text to token ids and back: the tokenizer and the chat template of a model folder.

What a user types is text. Control tokens (`<|im_end|>`, `<think>`, ...) come from the template alone;
spelled out in a prompt they are encoded as the characters they are.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import DecodeStream

from .config import InputError


class Tokenizer:
    """A folder's tokenizer.json, and its chat template if it has one (else `template` is None)."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        data = read_json(path)
        added = data.get("added_tokens") or []
        self.control = {token["content"]: token["id"] for token in added if token["content"].strip()}
        self.hidden = {token["id"] for token in added if token["special"]}  # not shown in decoded text
        # `encode_special_tokens` reads special tokens as plain text. For that all control tokens must count as
        # special: some checkpoints mark `<think>` or even `<|User|>` as ordinary added tokens.
        for token in added:
            token["special"] = bool(token["content"].strip())
        try:
            self.tokenizer = HFTokenizer.from_str(json.dumps(data))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{path}: not a tokenizer that `tokenizers` can read: {error}") from error
        self.tokenizer.encode_special_tokens = True
        self.special, self.template = chat_settings(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a fragment of text; none is a control token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, prompt: str) -> list[int]:
        """Token ids of a conversation that opens with `prompt` and asks for the reply.

        Without a chat template: the text as it is, with what the tokenizer puts around any text.
        Raises InputError where the template fails, or does more with the prompt than to trim and show it.
        """
        if self.template is None:
            return self.tokenizer.encode(prompt).ids
        # Where does the template end and the user begin? A mark that no template contains tells.
        mark = secrets.token_hex(16)
        before, *more = self._render(mark).split(mark)
        rendered = self._render(prompt)
        if len(more) != 1 or not (rendered.startswith(before) and rendered.endswith(more[0])):
            raise InputError("the chat template does not show the user's message once, as it is")
        [after] = more
        content = rendered[len(before) : len(rendered) - len(after)]
        # Cut the template's own words at its control tokens. The user's text stays in one piece with the plain
        # text around it, so that it is tokenised as it would be in the whole.
        pattern = "|".join(sorted(map(re.escape, self.control), key=len, reverse=True)) or "(?!)"
        head, tail = re.split(f"({pattern})", before), re.split(f"({pattern})", after)
        pieces = [*head[:-1], head[-1] + content + tail[0], *tail[1:]]  # plain, control, plain, ...
        ids = []
        for n, piece in enumerate(pieces):
            ids += [self.control[piece]] if n % 2 else self.encode(piece)
        return ids

    def stream(self, before: list[int]) -> DecodeStream:
        """Decodes token by token what follows the ids in `before`; see `next_text`."""
        return DecodeStream(ids=before)

    def next_text(self, stream: DecodeStream, token: int) -> str:
        """The text that `token` completes: "" for a special token, and until a character's bytes are all there."""
        return "" if token in self.hidden else stream.step(self.tokenizer, token) or ""

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden], skip_special_tokens=False)

    def _render(self, prompt: str) -> str:
        # The environment that the ecosystem renders chat templates in: transformers' apply_chat_template.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        messages = [{"role": "user", "content": prompt}]
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InputError(f"the chat template fails: {error}") from error


def chat_settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """(special tokens by name, such as `bos_token`; the chat template or None)."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    special = {}
    for name, value in settings.items():
        if name.endswith("_token") and value:
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
    own_file = folder / "chat_template.jinja"
    template = own_file.read_text("utf-8") if own_file.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return special, template


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError names the file where it is missing or something else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data
