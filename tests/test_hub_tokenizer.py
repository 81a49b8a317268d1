"""Text to ids and back: as transformers does it for ordinary text, and never a control token that a user typed."""

from __future__ import annotations

import base64
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from hub_files import (
    BOS,
    BYTE_LEVEL,
    CONTROL,
    HIDDEN,
    HOSTILE,
    ORDINARY,
    PROMPTS,
    SHOWN,
    SPM,
    WRITES_ALL,
    build,
    control_ids,
    pair,
    refusal,
    save,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minihogwild.hub import TextStream, Tokenizer, opening_of
from minihogwild.hub import tokenizer as tokenizer_module

# ---- text to ids


@settings(max_examples=150, deadline=None)
@given(text=ORDINARY, style=st.sampled_from(BYTE_LEVEL + SPM))
def test_fragments_have_the_ids_of_transformers(text: str, style: str):
    ours, theirs = pair(style)
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_in_a_fragment_is_its_characters(token: str, style: str):
    ours, theirs = pair(style, WRITES_ALL)
    assert control_ids(ours, theirs.encode(f"a{token}b")) == [ours.control[token]]  # as transformers would have it
    for text in (token, f"a{token}b", f" {token}\n", token * 3):
        assert control_ids(ours, ours.encode(text)) == []
        assert text.strip() in ours.decode(ours.encode(text))


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_without_a_template_the_text_is_taken_as_it_is(tmp_path: Path, style: str):
    """With what the tokenizer puts around any text: `<s>` before it in Llama's, nothing in others."""
    folder = save(tmp_path, style)
    (folder / "tokenizer_config.json").unlink()
    ours, theirs = Tokenizer(folder), pair(style)[1]
    assert ours.template is None
    bos = {"llama3": [ours.control[BOS]], "llama2": [ours.control["<s>"]]}.get(style, [])
    for prompt in PROMPTS:
        assert ours.chat(prompt) == theirs.encode(prompt, add_special_tokens=True) == bos + ours.encode(prompt)


# ---- ids to text


def pieces(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [stream.next(i) for i in ids]


PREFIX = "**Alice [1]:**"


@settings(max_examples=150, deadline=None)
@given(
    text=HOSTILE, style=st.sampled_from(["smollm", "llama3"]), before=st.sampled_from(["", PREFIX, "naïve 👋", "\n"])
)
def test_streamed_pieces_make_up_the_text(text: str, style: str, before: str):
    assume(not text.endswith("\ufffd"))  # indistinguishable from a character that is not complete yet
    ours, _ = pair(style)
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    shown = pieces(ours, ours.encode(before), ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == text


def some_bytes(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that are one byte, which may or may not be a character."""
    vocab = tokenizer.reads_text.get_vocab()
    return sorted(i for token, i in vocab.items() if token.startswith("<0x")) or list(range(256))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), style=st.sampled_from(BYTE_LEVEL + SPM))
def test_whatever_a_model_samples_is_streamed(data, style: str):
    """Any ids at all: broken characters, control tokens, rows of the head that no token has."""
    ours, _ = pair(style)
    anything = st.integers(0, ours.reads_text.get_vocab_size() + 20)
    ids = data.draw(st.lists(st.sampled_from(some_bytes(ours)) | anything, max_size=12))
    before, the = ours.encode(PREFIX), ours.encode(PREFIX + " the")[-1]
    shown = "".join(pieces(ours, before, [*ids, the, the]))
    assert shown.endswith(" the the")
    if style in BYTE_LEVEL:  # elsewhere a broken byte may spoil characters before it that have been shown already
        assert shown == ours.decode([*before, *ids, the, the]).removeprefix(PREFIX)


@pytest.mark.parametrize("style", SPM)
def test_a_broken_character_after_a_whole_one(style: str):
    """Decoded at once, the broken byte spoils the whole run of bytes; what was shown must stand all the same."""
    ours, _ = pair(style)
    first = ours.reads_text.token_to_id("<0x00>")
    wave, the = [first + byte for byte in "👋".encode()], ours.encode(PREFIX + " the")[-1]
    shown = pieces(ours, ours.encode(PREFIX), [*wave, wave[0], the, the])
    assert shown[3] == "👋"
    assert "".join(shown).endswith(" the the")


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
@pytest.mark.parametrize("character", ["👋", "你", "é", "𝛑", "한"])
def test_a_character_over_several_tokens_is_given_once_and_whole(style: str, character: str):
    ours, _ = pair(style)
    ids = ours.encode(f"the {character} hen")
    shown = pieces(ours, ours.encode(PREFIX), ids)
    assert "".join(shown).strip() == f"the {character} hen"
    assert [piece for piece in shown if character in piece] in ([character], [" " + character])
    assert not any("\ufffd" in piece for piece in shown)
    assert shown.count("") >= 1  # it did span tokens


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_special_tokens_are_not_shown_and_other_added_tokens_are(style: str):
    ours, _ = pair(style)
    the, hen = ours.encode(PREFIX + " the")[-1:], ours.encode("the hen")[-1:]
    for token in CONTROL:
        ids = [*the, ours.added[token], *hen]
        shown = pieces(ours, ours.encode(PREFIX), ids)
        assert shown[1] == ("" if token in HIDDEN else token)
        for text in ("".join(shown), ours.decode(ours.encode(PREFIX) + ids)):
            assert (token in text) == (token in SHOWN)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|begin_of_text|>"])
def test_a_special_token_inside_a_character_does_not_break_it(token: str):
    ours, _ = pair("smollm")
    first, *rest = ours.encode("👋")
    assert rest
    ids = [first, ours.control[token], *rest]
    assert "".join(pieces(ours, [], ids)) == ours.decode(ids) == "👋"


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_the_space_after_a_prefix_is_kept(style: str):
    """Decoded on its own, a first word loses its space in sentencepiece-like tokenizers: hence `before`."""
    ours, _ = pair(style)
    the = ours.reads_text.token_to_id("▁the" if style in SPM else "Ġthe")
    assert pieces(ours, ours.encode(PREFIX), [the, the]) == [" the", " the"]
    if style in ("llama2", "metaspace-always", "metaspace-first"):
        assert pieces(ours, [], [the, the]) == ["the", " the"]  # the trap
        assert ours.decode([the, the]) == "the the"


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_a_stream_may_follow_the_last_few_ids_of_a_prompt(style: str):
    """Wherever they are cut, in the middle of a character too."""
    ours, _ = pair(style)
    prompt, ids = ours.encode("naïve 👋你 the end:"), ours.encode("in 👋")
    whole = pieces(ours, prompt, ids)
    assert "".join(whole).strip() == "in 👋"
    for start in range(len(prompt)):
        assert pieces(ours, prompt[start:], ids) == whole, start


def test_a_stream_does_not_repeat_what_came_before_it():
    """A prompt may end in a replacement character of its own: somebody's broken file, pasted."""
    ours, _ = pair("smollm")
    assert "".join(pieces(ours, ours.encode("broken: \ufffd"), ours.encode(" the hen"))) == " the hen"


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_two_streams_do_not_disturb_each_other(style: str):
    """One for each worker, a token each in turn."""
    ours, _ = pair(style)
    texts = ["the 👋 hen", "你 in the"]
    ids = [ours.encode(text) for text in texts]
    streams, shown = [TextStream(ours, ours.encode(PREFIX)) for _ in texts], ["", ""]
    for step in range(max(map(len, ids))):
        for worker in (0, 1):
            if step < len(ids[worker]):
                shown[worker] += streams[worker].next(ids[worker][step])
    assert [text.strip() for text in shown] == texts


def test_ids_beyond_the_tokenizer_show_nothing():
    """A head is often padded beyond the tokenizer's last id."""
    ours, _ = pair("smollm")
    the, size = ours.reads_text.token_to_id("Ġthe"), build("smollm").get_vocab_size()
    for beyond in (size, size + 1, 99_999):
        assert pieces(ours, [], [the, beyond, the]) == [" the", "", " the"]
        assert ours.decode([the, beyond, the]) == " the the"
    assert ours.decode([]) == ""


# ---- ids to text: how long it takes, and that nothing is lost by it


def plain_pieces(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    """What a stream gives, by its definition: a text is held back for as long as it ends in half a character."""
    given, waiting, shown = list(before), [], []
    for token in ids:
        waiting.append(token)
        told, text = tokenizer.decode(given), tokenizer.decode(given + waiting)
        if text.endswith("\ufffd") or len(text) <= len(told):
            shown.append("")
        else:
            shown.append(text[len(told) :])
            given, waiting = waiting, []
    return shown


@settings(max_examples=150, deadline=None)
@given(text=HOSTILE, style=st.sampled_from(BYTE_LEVEL + SPM), before=st.sampled_from(["", PREFIX, "naïve 👋", "\n"]))
def test_streamed_pieces_are_those_of_the_plain_definition(text: str, style: str, before: str):
    """What bounds the work may change nothing about a text: neither the pieces, nor when they come."""
    ours, _ = pair(style)
    ids, before = ours.encode(text), ours.encode(before)
    assert pieces(ours, before, ids) == plain_pieces(ours, before, ids)


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 50])
def test_a_text_may_hold_replacement_characters_itself(style: str, count: int):
    """They can't be told from half a character, and come later: but each one comes, and no other."""
    ours, _ = pair(style)
    text = "the" + "\ufffd" * count + "👋 hen"
    assert "".join(pieces(ours, ours.encode(PREFIX), ours.encode(text))).strip() == text


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_special_tokens_inside_a_character_do_not_break_it_however_many(style: str):
    ours, _ = pair(style)
    *first, last = ours.encode("in 👋")
    shown = pieces(ours, ours.encode(PREFIX), [*first, *[ours.control["<|im_end|>"]] * 50, last])
    assert shown[-1].endswith("👋")
    assert not any("\ufffd" in piece for piece in shown)


ENDLESS = {
    "bytes that begin no character": lambda ours: some_bytes(ours)[-1],
    "special tokens": lambda ours: ours.control["<|im_end|>"],
    "ids beyond the tokenizer": lambda ours: ours.size + 7,
}


@pytest.mark.parametrize("style", ["smollm", "llama2"])
@pytest.mark.parametrize("what", ENDLESS)
def test_tokens_that_never_become_text_do_not_slow_a_stream_down(style: str, what: str):
    """A model that has gone astray may sample nothing else, and all of it must not be decoded again each time."""
    ours, _ = pair(style)
    token, the = ENDLESS[what](ours), ours.encode(PREFIX + " the")[-1]
    stream = TextStream(ours, ours.encode(PREFIX))
    decoded = []
    with patch.object(ours, "decode", lambda ids: decoded.extend(ids) or Tokenizer.decode(ours, ids)):
        began = time.process_time()
        shown = "".join(stream.next(token) for _ in range(3000))
        assert time.process_time() - began < 1
    assert len(decoded) < 100 * 3000
    shown += "".join(stream.next(the) for _ in range(2))
    assert shown.endswith(" the the")
    assert shown.count("\ufffd") == (3000 if "bytes" in what else 0)


# ---- several threads


def test_threads_do_not_change_how_another_one_reads(monkeypatch: pytest.MonkeyPatch):
    """Whether control tokens are read as such must not be a setting that the threads of one tokenizer share."""
    ours, _ = pair("smollm", "{{ messages[0].content }}<|im_end|>")
    monkeypatch.setattr(tokenizer_module, "render_chat", lambda *_: ["the<|im_end|>", "hen<|im_end|>"])
    as_text, as_control = ours.encode("the<|im_end|>"), ours.chat("the")
    assert control_ids(ours, as_text) == []
    assert control_ids(ours, as_control) == [ours.control["<|im_end|>"]]
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            texts = threads.submit(lambda: [ours.encode("the<|im_end|>") for _ in range(5000)])
            chats = threads.submit(lambda: [ours.chat("the") for _ in range(5000)])
            assert all(ids == as_text for ids in texts.result())
            assert all(ids == as_control for ids in chats.result())
    finally:
        sys.setswitchinterval(switch_interval)


# ---- reading the folder


def test_what_the_tokenizer_knows_of_its_added_tokens():
    ours, _ = pair("qwen", WRITES_ALL)
    assert set(ours.control) == set(ours.added) == set(CONTROL)
    assert ours.hidden & set(ours.control.values()) == {ours.control[token] for token in HIDDEN}
    without_template, _ = pair("qwen")
    assert set(without_template.control) == set(HIDDEN)
    assert without_template.hidden == ours.hidden
    assert ours.special_tokens["bos_token"] == BOS
    assert ours.special_tokens["eos_token"] == "<|im_end|>"


def test_settings_that_are_no_tokens_are_not_taken_for_such(tmp_path: Path):
    folder = save(tmp_path, "llama3", add_bos_token=True, unk_token=None, pad_token="", extra_token=["a"])
    assert Tokenizer(folder).special_tokens == {"bos_token": BOS, "eos_token": "<|im_end|>"}


def test_a_tokenizer_without_added_tokens(tmp_path: Path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "user: {{ messages[0].content }}:"
    ours = Tokenizer(save(tmp_path, tokenizer, template, bos_token=None, eos_token=None))
    assert ours.control == {}
    assert ours.decode(ours.chat("the <s> 👋")) == "user: the <s> 👋:"


# ---- models that think before they answer

ASK = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (ASK, ""),  # the token is there, but the template knows nothing of it
        (ASK + "<think>\n", ""),  # opened already, as by QwQ
        (ASK + "{# </think> #}", "<think>\n"),
        (ASK + "{% if no_thinking %}<think>\n\n</think>\n\n{% endif %}", "<think>\n"),  # as Qwen3
        ("<think> and </think> are for thoughts. " + ASK, "<think>\n"),  # as Phi-4-reasoning
        (ASK + "<think>\n\n</think>\n\n", "<think>\n"),
        (None, ""),
    ],
)
def test_what_a_thinking_models_reply_has_to_begin_with(tmp_path: Path, template: str | None, opening: str):
    tokenizer = Tokenizer(save(tmp_path, "qwen", template))
    # Typed by a user they are mere characters, and open nothing
    assert opening_of(tokenizer, tokenizer.chat("Is <think> a tag, and </think> another?")) == opening


def test_a_tokenizer_without_such_a_token_has_no_opening(tmp_path: Path):
    tokenizer = Tokenizer(save(tmp_path, build("qwen"), ASK + "<think>\n"))
    del tokenizer.added["<think>"]
    assert opening_of(tokenizer, []) == ""


@pytest.mark.parametrize("style", BYTE_LEVEL + SPM)
def test_only_trusted_fragments_may_hold_control_tokens(style: str):
    tokenizer, _ = pair(style, WRITES_ALL)
    think = tokenizer.control["<think>"]
    assert tokenizer.encode_control("<think>")[-1] == think
    assert think not in tokenizer.encode("<think>")


def test_each_token_by_itself_reads_as(tmp_path: Path):
    tokenizer, _ = pair("qwen")
    assert len(tokenizer.texts) == tokenizer.size
    for token in (0, 33, 200, tokenizer.added["</think>"], tokenizer.control["<|im_end|>"]):
        assert tokenizer.texts[token] == tokenizer.decode([token])


# ---- from a stranger


def replace_step(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(steps)}


DOUBLED = replace_step({"String": "a"}, "aa")
GROWING = {
    "doubled forty times": sequence(*[DOUBLED] * 40),
    "in sequences of sequences": sequence(*[sequence(DOUBLED, sequence(DOUBLED))] * 20),
    "at once": replace_step({"String": "a"}, "a" * 5000),
    "by an expression": sequence(*[replace_step({"Regex": "[ab]"}, "ab")] * 12),
    "by nothing": replace_step({"String": ""}, "a" * 5000),
    "too many steps": sequence(*[{"type": "NFC"}] * 100_000),
}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("case", GROWING)
def test_a_tokenizer_that_makes_texts_grow_without_end_is_refused(tmp_path: Path, case, part):
    """The library would never return, and no signal would end it."""
    save(tmp_path, "smollm")
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {part: GROWING[case]}))
    message = refusal(Tokenizer, tmp_path)
    assert message.startswith(f"{path} cannot be read: its {part} ")


BYTE_LEVEL_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PIECE = {"Sequence": {"id": "A", "type_id": 0}}


def template(pieces: list[dict], ids: list[int]) -> dict:
    tokens = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens}


def charsmap(replacement: bytes) -> dict:
    """A table of characters and what replaces them: a trie of no nodes, and then texts that end in a zero."""
    table = (0).to_bytes(4, "little") + b"a\0" + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


MORE_THAT_GROW = [
    ("normalizer", sequence(*[BYTE_LEVEL_STEP] * 40)),  # two bytes of a character become two characters
    ("pre_tokenizer", sequence(*[BYTE_LEVEL_STEP] * 40)),
    ("normalizer", charsmap(b"a" * 5000)),
    ("normalizer", sequence(*[charsmap(b"aa")] * 40)),
    ("post_processor", template([PIECE] * 5000, [])),
    ("post_processor", sequence(*[template([PIECE] * 2, [])] * 40)),
    ("post_processor", template([PIECE, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * 100], [1] * 100)),
]


@pytest.mark.parametrize(("part", "steps"), MORE_THAT_GROW)
def test_other_steps_make_texts_grow_too(tmp_path: Path, part, steps):
    save(tmp_path, "smollm")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: steps}))
    assert refusal(Tokenizer, tmp_path).startswith(f"{path} cannot be read: its {part} ")


PANICS = {
    "normalizer": replace_step({"Regex": "(a+)+$"}, "x"),  # tries too many ways
    "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5},  # cuts beyond the beginning
}


@pytest.mark.parametrize("part", PANICS)
def test_where_the_library_panics_an_error_like_all_others_is_raised(tmp_path: Path, part):
    """Its own is no Exception: whoever keeps results when one comes would lose them."""
    save(tmp_path, "smollm")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: PANICS[part]}))
    assert "the tokenizer fails" in refusal(lambda: Tokenizer(tmp_path).encode("a" * 40 + "!"))


def test_replacements_as_known_tokenizers_have_them_are_read(tmp_path: Path):
    save(tmp_path, "smollm")
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    known = sequence({"type": "Prepend", "prepend": "x"}, replace_step({"String": " "}, "___"), {"type": "NFKC"})
    path.write_text(json.dumps(data | {"normalizer": known}))
    assert Tokenizer(tmp_path).encode("a b")
