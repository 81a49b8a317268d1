"""What a folder says of added tokens: in tokenizer.json, and around it.

As transformers reads it: tokenizer_config.json may list them (`added_tokens_decoder`), or else, in older folders,
added_tokens.json and special_tokens_map.json do; and whatever is named as a special token (`eos_token`, ...) is one.
"""

from pathlib import Path

import tokenizers

from ..errors import refusing, require
from ..files import read_json_if_there

# Lists of further special tokens: the older name, and the newer
LISTS = ("additional_special_tokens", "extra_special_tokens")
DECODER = "added_tokens_decoder"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def read_added_tokens(folder: Path, data: dict) -> tuple[list[dict], dict[str, str]]:
    """(added tokens, as tokenizer.json spells them; the texts of special tokens by name, such as `bos_token`).

    `data` is tokenizer.json. Tokens that only another file lists come last, in the order of their ids.
    """
    settings = read_json_if_there(folder / "tokenizer_config.json")
    tokens = {token["content"]: dict(token) for token in data.get("added_tokens") or []}
    listed = {}
    if DECODER in settings:
        with refusing(f"{folder / 'tokenizer_config.json'}: {DECODER} must be tokens by their ids"):
            for number, token in settings[DECODER].items():
                listed[token["content"]] = PLAIN | token | {"id": int(number)}
    else:
        settings = settings | read_json_if_there(folder / "special_tokens_map.json")
        path = folder / "added_tokens.json"
        for content, number in read_json_if_there(path).items():
            require(type(number) is int, f"{path}: the id of {content!r} must be a whole number, not {number!r}")
            listed[content] = PLAIN | {"content": content, "id": number}
    for content, token in sorted(listed.items(), key=lambda item: item[1]["id"]):
        known = tokens.get(content, token)
        one, other = token["id"], known["id"]
        require(one == other, f"{folder}: {content!r} is token {one} in one file, {other} in another")
        tokens[content] = known | token
    names = special_tokens_in(settings)
    for content in [*names.values(), *further_special_tokens(settings)]:
        # The id of one that is not listed is not known yet: it may stand in the vocabulary
        tokens.setdefault(content, PLAIN | {"content": content, "id": None, "normalized": False})["special"] = True
    return list(tokens.values()), names


def special_tokens_in(settings: dict) -> dict[str, str]:
    """Those that a file names: each as its text, or as an object with the text as `content`."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):  # by names of their own; else it is a list
        named |= extra
    texts = {name: text_of(value) for name, value in named.items()}
    return {name: text for name, text in texts.items() if text}


def further_special_tokens(settings: dict) -> list[str]:
    texts = []
    for name in LISTS:
        value = settings.get(name)
        if isinstance(value, list):
            texts += [text_of(token) for token in value]
    return [text for text in texts if text]


def text_of(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def with_ids(tokens: list[dict], tokenizer: tokenizers.Tokenizer) -> list[dict]:
    """The tokens, those without an id with the one that `tokenizer`, which knows all that have one, gives them."""
    free = tokenizer.get_vocab_size()
    found = []
    for token in tokens:
        if token["id"] is None:
            number = tokenizer.token_to_id(token["content"])
            if number is None:
                number, free = free, free + 1
            token = token | {"id": number}
        found.append(token)
    return found


def require_ids(tokens: list[dict], tokenizer: tokenizers.Tokenizer) -> None:
    """Raise InputError where a token would not have the id that a file gives it: the library numbers them in a row."""
    for token in tokens:
        content, listed = token["content"], token["id"]
        number = tokenizer.token_to_id(content)
        require(number == listed, f"{content!r} is listed as token {listed}, but would be {number}: ids are missing")
