"""Text to token ids and back: the tokenizer of a model folder.

What a user types is text. Control tokens (`<|im_end|>`, `<think>`, ...) come from the chat template alone; spelled out
in a prompt they are encoded as the characters they are.
"""

import base64
import json
import re
import secrets
from functools import cached_property
from pathlib import Path

import tokenizers

from ..errors import refusing, require
from ..files import is_unicode, read_json
from .added_tokens import read_added_tokens, require_ids, with_ids
from .chat_template import read_chat_template, render_chat
from .limits import in_time, panics_kept_back

NEUTRAL = "·x0-+=~^"  # one of these begins no control token
THINK, END_OF_THINK = "<think>", "</think>"
VARIANTS = 3  # of a conversation: see `_render`
SECONDS = 30  # for one text; the longest take a few
TRIED = 1000  # tokens that are decoded beforehand
MOST_STEPS = 100  # of a normalizer and the like; known ones have ten
MOST_GROWTH = 1000  # times that they may make a text longer


class Tokenizer:
    """A folder's tokenizer.json, and its chat template if it has one (else `template` is None).

    Control tokens are those that are marked special, and others that the chat template itself writes, such as
    `<think>`. Several threads may use one.
    """

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        data = read_json(path)
        self.template = read_chat_template(folder)
        with refusing(f"{path} cannot be read"):
            require_modest(data)
            added, self.special_tokens = read_added_tokens(folder, data)
            data["truncation"] = None
            data["padding"] = None
            if any(token["id"] is None for token in added):
                added = with_ids(added, self._build(data, [token for token in added if token["id"] is not None]))
            self.added: dict[str, int] = {token["content"]: token["id"] for token in added}
            self.control: dict[str, int] = {}  # the ids of control tokens, by their text
            self.hidden: set[int] = set()  # the ids of special tokens, which decoded text does not show
            for token in added:
                if token["special"]:
                    self.hidden.add(token["id"])
                if is_control(token, self.template):
                    self.control[token["content"]] = token["id"]
                    token["special"] = True  # only special tokens can be read as plain text
            # How control tokens are read is a setting of a whole tokenizer. If it were changed for each text, then
            # another thread's text might be read in the wrong way. So there are two tokenizers.
            self.reads_text = self._build(data, added)
            self.reads_text.encode_special_tokens = True  # as text, that is
            self.reads_control = self._build(data, added)
            require_ids(added, self.reads_control)
        self.size = 1 + max(self.reads_text.get_vocab().values(), default=-1)
        model_ids = self.reads_text.get_vocab(with_added_tokens=False).values()
        self.last_of_model = max(model_ids, default=-1)  # the last id that is not an added token's
        self.rendered: dict[str, list[str]] = {}  # by prompt

        # A mark stands in no text: see `chat`. Where ids are missing, the library would give it one of those.
        self.mark = secrets.token_hex(16)
        self.reads_control.add_tokens([tokenizers.AddedToken(self.mark, normalized=False)])
        self.mark_id = self.reads_control.token_to_id(self.mark)
        require(self.mark_id >= self.size, f"{path}: ids are missing below {self.size}: {self.mark_id} is one")

        # A decoder that panics does so with some of these as a rule. Later, each token would have to wait for that.
        with panics_kept_back():
            for token in range(min(self.size, TRIED)):
                self.decode([token])

    @staticmethod
    def _build(data: dict, added: list[dict]) -> tokenizers.Tokenizer:
        with refusing(f"tokenizers {tokenizers.__version__} cannot, which a newer version may"), panics_kept_back():
            return tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": added}))

    def encode(self, text: str, whole: bool = False) -> list[int]:
        """Token ids of a fragment of text, or of a `whole`, with what the tokenizer puts around that.

        Control tokens in it are read as the characters they are. Raises InputError for half a character.
        """
        return encode_with(self.reads_text, text, whole)

    def encode_control(self, text: str) -> list[int]:
        """Token ids of a fragment in which control tokens, such as `<think>`, are what they look like."""
        return encode_with(self.reads_control, text)

    def chat(self, prompt: str) -> list[int]:
        """Token ids of a conversation that opens with `prompt` and asks for the reply.

        Without a chat template: the text as it is. Raises InputError where the template fails, or where it makes
        control tokens of what the user typed.
        """
        if self.template is None:
            return self.encode(prompt, whole=True)
        if prompt not in self.rendered:
            self.rendered[prompt] = self._render([prompt])
        text, *neutral_texts = self.rendered[prompt]
        ids = encode_with(self.reads_control, text)
        control = self._control_ids_in(ids)
        same = any(control == self._control_ids_in(encode_with(self.reads_control, other)) for other in neutral_texts)
        require(same, "the prompt would bring control tokens of its own into the chat")
        return [token for token in ids if token != self.mark_id]

    def render_ahead(self, prompts: list[str]) -> None:
        """Make the conversations of many prompts at once, so that `chat` has them."""
        missing = [prompt for prompt in prompts if prompt not in self.rendered]
        if self.template is not None and missing:
            texts = self._render(missing)
            for n, prompt in enumerate(missing):
                self.rendered[prompt] = texts[VARIANTS * n : VARIANTS * (n + 1)]

    def _render(self, prompts: list[str]) -> list[str]:
        """For each prompt its conversation, and two in which no part of it can become part of a control token.

        A template may look for words of the user's, such as `/no_think`, and write other control tokens then. It does
        so in those two as well, or at least in one: they are marked at the prompt's beginning, and at its end.
        """
        variants = []
        for prompt in prompts:
            neutral = self._without_beginnings(prompt)
            variants += [self._break_control_tokens(prompt), self.mark + neutral, neutral + self.mark]
        return render_chat(self.template, self.special_tokens, variants)

    def _break_control_tokens(self, prompt: str) -> str:
        """The prompt with a mark inside each control token that the user typed.

        What stands before a mark, and after it, is encoded as the ecosystem does it; the mark's own id is then taken
        out.
        """
        if not self.control:
            return prompt

        def break_token(typed: re.Match) -> str:
            first_character, rest = typed[0][0], typed[0][1:]
            return first_character + self.mark + rest

        any_control_token = "|".join(re.escape(text) for text in self.control)
        return re.sub(any_control_token, break_token, prompt)

    def _without_beginnings(self, prompt: str) -> str:
        """The prompt with another character in the place of each with which a control token begins."""
        beginnings = {text[0] for text in self.control}
        other = next(character for character in NEUTRAL if character not in beginnings)
        return prompt.translate({ord(beginning): other for beginning in beginnings})

    def _control_ids_in(self, ids: list[int]) -> list[int]:
        control_ids = set(self.control.values())
        return [token for token in ids if token in control_ids]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        shown = [token for token in ids if token not in self.hidden]
        with refusing("the tokenizer fails"):
            return self.reads_text.decode(shown, skip_special_tokens=False)

    def name_of(self, token: int) -> str | None:
        """How the tokenizer spells one token, also a special one; None for an id that it does not have."""
        return self.reads_text.id_to_token(token)

    @cached_property
    def texts(self) -> list[str]:
        """What each token reads as by itself, by its id."""
        return [self.decode([token]) for token in range(self.size)]

    @property
    def eos(self) -> set[int]:
        """The id of the token that it names as end-of-sequence, if any."""
        text = self.special_tokens.get("eos_token")
        return {self.added[text]} if text in self.added else set()

    @cached_property
    def longest(self) -> int:
        """Characters of a text that become one token, at most."""
        return max(map(len, self.reads_text.get_vocab()), default=1)

    @cached_property
    def without_text(self) -> list[int]:
        """Its ids that `has_text` denies."""
        return [token for token in range(self.size) if not self.has_text(token)]

    @cached_property
    def line_breaks(self) -> list[int]:
        """Ids of tokens that are white space with a line break."""
        return [token for token, text in enumerate(self.texts) if "\n" in text and not text.strip()]

    def has_text(self, token: int) -> bool:
        """Special tokens have none, nor have ids that the tokenizer lacks: many a vocabulary is padded."""
        return token not in self.hidden and self.name_of(token) is not None


def is_control(token: dict, template: str | None) -> bool:
    """Is an added token marked special, or else written by the template, as `<think>` or `<|User|>` in many?

    A mere word is no control token, also where a template holds it; nor are runs of spaces, which some tokenizers add.
    """
    text = token["content"]
    if not text.strip():
        return False
    if template is None:
        return token["special"]
    is_word = text.strip().isalnum()
    is_written = text in template and not is_word
    opens_or_ends_thoughts = text in (THINK, END_OF_THINK) and "think>" in template
    return token["special"] or is_written or opens_or_ends_thoughts


def encode_with(tokenizer: tokenizers.Tokenizer, text: str, whole: bool = False) -> list[int]:
    require(is_unicode(text), f"not valid UTF-8: {text[:200]!r}")
    with refusing("the tokenizer fails"), panics_kept_back():
        # `encode` would not let other threads run meanwhile
        [encoded] = in_time(lambda: tokenizer.encode_batch([text], add_special_tokens=whole), SECONDS)
    return encoded.ids


# ---- models that think before they answer


def opening_of(tokenizer: Tokenizer, chat: list[int]) -> str:
    """What must be added to a chat's ids so that the reply begins as that of a model that thinks first; "" for others.

    Such a model has the token `<think>`, and a template that speaks of it. Many templates end with it already.
    """
    thinks = THINK in tokenizer.added and "think>" in (tokenizer.template or "")
    if not thinks:
        return ""
    marks = [tokenizer.added.get(THINK), tokenizer.added.get(END_OF_THINK)]
    found = [token for token in chat if token in marks]
    is_open = found != [] and found[-1] == tokenizer.added[THINK]
    return "" if is_open else THINK + "\n"


# ---- ids to text, one by one

INCOMPLETE = "\ufffd"  # what bytes decode to that are no character, or not yet; a text may hold it itself
LONGEST_CHARACTER = 4  # tokens of a character in the making, at most: one for each of its bytes
MOST_WAITING = 16  # tokens that are kept together; of more, the first are no character in the making


class TextStream:
    """Text of the tokens that follow the ids in `before`: each character once, when all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]):
        self.tokenizer = tokenizer
        # What a token reads as depends on its neighbours: a first token, for one, may lose its space.
        self.before = list(before)  # tokens whose text has been given, or came before
        self.waiting: list[int] = []  # tokens whose text has not

    def next(self, token: int) -> str:
        """The text that `token` completes, "" if none. Special tokens have no text."""
        if not self.tokenizer.has_text(token):
            return ""
        self.waiting.append(token)
        text = self._text_of(self.waiting)
        half_a_character = text.endswith(INCOMPLETE)
        if text and not half_a_character:
            self.before = self.waiting
            self.waiting = []
            return text
        if len(self.waiting) == MOST_WAITING:
            return self._give_first()
        return ""

    def _text_of(self, ids: list[int]) -> str:
        """The text that these add to that of `before`."""
        given = self.tokenizer.decode(self.before)
        whole = self.tokenizer.decode(self.before + ids)
        return whole[len(given) :]

    def _give_first(self) -> str:
        """The text of all but the last few, which may yet become a character.

        Else each token that follows would have more and more tokens decoded with it. All but the last few are twelve:
        where a text holds U+FFFD itself, which is three bytes, they are whole ones.
        """
        first, last = self.waiting[:-LONGEST_CHARACTER], self.waiting[-LONGEST_CHARACTER:]
        text = self._text_of(first)
        self.before = first
        self.waiting = last
        return text


def require_modest(data: dict) -> None:
    """Raise InputError where replacements, one after the other, could make a short text fill all memory.

    The library never returns from that, and no signal ends it. (Whatever else is wrong, it says itself.)
    """
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        steps = steps_of(data.get(name))
        require(len(steps) <= MOST_STEPS, f"its {name} has {len(steps)} steps: {MOST_STEPS} are the most")
        growth = 1.0
        for step in steps:
            growth *= growth_of(step)
        require(growth <= MOST_GROWTH, f"its {name} may make a text {growth:.3g} times as long")


def steps_of(part: object) -> list[dict]:
    """What is done to a text, one after the other: a sequence may hold others."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = [each for value in part.values() if isinstance(value, list) for each in value]
    return [step for each in inner for step in steps_of(each)]


def growth_of(step: dict) -> float:
    """How many times as long a text may become by a step, at the most; those not named here add little."""
    kind = step.get("type")
    if kind == "Replace":
        return growth_of_replacement(step["pattern"], step["content"])
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])  # as to a text of one character
    if kind == "ByteLevel":
        return 2.0  # a byte becomes a character of two
    if kind == "BertNormalizer":
        return 3.0  # a Chinese character gets a space on either side
    if kind == "Precompiled":
        return longest_replacement(step["precompiled_charsmap"])
    if kind == "TemplateProcessing":
        return length_of_template(step)
    return 1.0


def growth_of_replacement(pattern: dict, content: str) -> float:
    replaced = pattern.get("String", "x")  # an expression may match a single character
    return max(1.0, len(content) / max(1, len(replaced)))


def longest_replacement(charsmap: str) -> float:
    """Of a table of characters and what replaces them: the size of a trie, the trie, and texts that end in a zero."""
    table = base64.b64decode(charsmap)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1.0, *map(len, texts.split(b"\0")))


def length_of_template(step: dict) -> float:
    """How often the text stands in it, and how many tokens are put around that."""
    length = 0.0
    for piece in step["single"]:
        special = piece.get("SpecialToken")
        length += len(step["special_tokens"][special["id"]]["ids"]) if special else 1
    return max(1.0, length)
