"""Model folders in the hub's own format, and tokenizers as found there, small: what the tests of hub/ share."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from minihogwild import InputError
from minihogwild.hub import Tokenizer
from minihogwild.hub import tokenizer as tokenizer_module
from minihogwild.hub.render_template import render

CPU = torch.device("cpu")
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
# Of Phi-3: the modules that are one there, in the order of their rows
FUSED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258


# ---- making folders


def without(mapping: dict, *keys: str) -> dict:
    return {key: value for key, value in mapping.items() if key not in keys}


def sparse(config: dict, i: int) -> bool:
    """Whether layer i has experts."""
    moe = config["model_type"] == "qwen3_moe"
    return moe and i not in config["mlp_only_layers"] and (i + 1) % config["decoder_sparse_step"] == 0


def make_tensors(config: dict, biases=False, qk_norms=False, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under the hub's names, all different: random numbers."""
    E, V, D = (config[key] for key in ("hidden_size", "vocab_size", "head_dim"))
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (E,),
            "post_attention_layernorm.weight": (E,),
            "self_attn.q_proj.weight": (H * D, E),
            "self_attn.k_proj.weight": (K * D, E),
            "self_attn.v_proj.weight": (K * D, E),
            "self_attn.o_proj.weight": (E, H * D),
        }
        F, mlps = config["intermediate_size"], ["mlp"]
        if sparse(config, i):
            layer |= {"mlp.gate.weight": (config["num_experts"], E)}
            F, mlps = config["moe_intermediate_size"], [f"mlp.experts.{n}" for n in range(config["num_experts"])]
        for mlp in mlps:
            layer |= {f"{mlp}.{part}_proj.weight": (F, E) for part in ("gate", "up")}
            layer |= {f"{mlp}.down_proj.weight": (E, F)}
        if config["model_type"] == "phi3":
            for fused, parts in FUSED.items():
                rows = sum(layer.pop(part)[0] for part in parts)
                layer[fused] = (rows, E)
        if biases:
            layer |= {"self_attn.q_proj.bias": (H * D,)}
            layer |= {f"self_attn.{p}_proj.bias": (K * D,) for p in "kv"}
        if qk_norms:
            layer |= {f"self_attn.{p}_norm.weight": (D,) for p in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    random = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def byte_tokenizer() -> HFTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), "utf-8")


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> list[str]:
    """Several safetensors files and their index; returns the files' names."""
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return names


def split(tensors: dict, parts: int) -> list[dict]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::parts]} for i in range(parts)]


def make_folder(folder: Path, config: dict, tensors: dict, shards: int = 1, generation: dict | None = None) -> Path:
    """A whole model folder, as downloaded from the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "bos_token": None})
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, split(tensors, shards))
    return folder


BROKEN_JSON = {
    "cut off": b'{"model_type": "llama", ',
    "empty": b"",
    "not JSON": b"<!DOCTYPE html><html>\n<body>\n</body></html>",
    "a list": b'["model_type", "llama"]',
    "a number": b"17",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "very deep": b'{"a":' * 200_000,
}


class Hub:
    """Stands in for `snapshot_download`: notes what was asked for, and gives a local folder or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | BaseException):
        self.answer = answer
        self.calls = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name: [])

    def download(self, repo_id: str, **options) -> str:
        self.calls.append((repo_id, options))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return str(self.answer)


# ---- what the tests ask of them


def refusal(call, *args, **kwargs) -> str:
    """The message of the InputError that the call raises: one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    return message


def assert_holds(weights, saved: dict[str, torch.Tensor], config: dict, dtype=None) -> None:
    """Every saved number stands where forward() will look for it."""
    H, K, D = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    left = {name: tensor.to(dtype or tensor.dtype) for name, tensor in saved.items()}

    def same(tensor, name):
        wanted = left.pop(name)
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name

    same(weights.embed, "model.embed_tokens.weight")
    same(weights.norm, "model.norm.weight")
    if not config["tie_word_embeddings"]:
        same(weights.head.tensor, "lm_head.weight")
    assert len(weights.layers) == config["num_hidden_layers"]
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        same(layer.attn_norm, at + "input_layernorm.weight")
        same(layer.mlp_norm, at + "post_attention_layernorm.weight")
        same(layer.qkv.tensor[: H * D], at + "self_attn.q_proj.weight")
        same(layer.qkv.tensor[H * D : (H + K) * D], at + "self_attn.k_proj.weight")
        same(layer.qkv.tensor[(H + K) * D :], at + "self_attn.v_proj.weight")
        same(layer.out.tensor, at + "self_attn.o_proj.weight")
        mlps, F = {"mlp": (layer.gate_up.tensor, layer.down.tensor)}, config["intermediate_size"]
        if sparse(config, i):
            same(layer.router, at + "mlp.gate.weight")
            pairs = zip(layer.gate_up.tensor, layer.down.tensor, strict=True)
            F = config["moe_intermediate_size"]
            mlps = {f"mlp.experts.{n}": pair for n, pair in enumerate(pairs)}
        for mlp, (gate_up, down) in mlps.items():
            same(gate_up[:F], f"{at}{mlp}.gate_proj.weight")
            same(gate_up[F:], f"{at}{mlp}.up_proj.weight")
            same(down, f"{at}{mlp}.down_proj.weight")
        if layer.qkv_bias is not None:
            same(layer.qkv_bias[: H * D], at + "self_attn.q_proj.bias")
            same(layer.qkv_bias[H * D : (H + K) * D], at + "self_attn.k_proj.bias")
            same(layer.qkv_bias[(H + K) * D :], at + "self_attn.v_proj.bias")
        if layer.q_norm is not None:
            same(layer.q_norm, at + "self_attn.q_norm.weight")
            same(layer.k_norm, at + "self_attn.k_norm.weight")
    assert not left, "saved, but nowhere in the weights"


def free_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=nbytes, total=2 * nbytes))


# ---- tokenizers as found on the hub, small

BOS = "<|begin_of_text|>"
HIDDEN = [BOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
SHOWN = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]  # added, but not special: as Qwen3 and R1 have them
CONTROL = HIDDEN + SHOWN
WRITES_ALL = "{# " + " ".join(SHOWN) + " #}{{ messages[0].content }}"  # a template that makes control tokens of SHOWN
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "Ċ Ċ", ". Ċ", "< |", "| >", "i m", "ð Ł", "Ġ ðŁ", "ä ½", "* *", "Ġ Ġ"]
SPM_MERGES = ["▁ t", "h e", "▁t he", "▁ h", "▁h e", "i n", "< s", "</ s", "< /", "* *", "▁ ▁", "\n \n"]


def build(style: str) -> HFTokenizer:
    if style in ("smollm", "qwen", "llama3"):
        merges = [tuple(pair.split(" ")) for pair in MERGES]
        vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        tokenizer = HFTokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
        if style == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if style == "qwen":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
    else:  # Llama 2 and its kin: spaces become ▁, bytes only where there is no character
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        characters = list("▁ abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;*[]/<>|_{}%'\n")
        merges = [tuple(pair.split(" ")) for pair in SPM_MERGES]
        merges.sort(key=lambda pair: len("".join(pair)))
        vocab = ["<unk>", *bytes_, *characters, *map("".join, merges)]
        vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
        tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if style == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.decoder = decoders.Sequence(to_text)
        else:
            scheme = style.removeprefix("metaspace-")
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            tokenizer.decoder = decoders.Sequence(to_text[:3])
            if scheme != "never":
                tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in HIDDEN])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in SHOWN])
    if style in ("llama3", "llama2"):
        bos = BOS if style == "llama3" else "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


BYTE_LEVEL = ["smollm", "qwen", "llama3"]
SPM = ["llama2", "metaspace-always", "metaspace-first", "metaspace-never"]


def save(folder: Path, style: str | HFTokenizer, template: object = None, file: str | None = None, **more) -> Path:
    """A folder with tokenizer.json, `template` in tokenizer_config.json and `file` in chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    (build(style) if isinstance(style, str) else style).save(str(folder / "tokenizer.json"))
    given = {"chat_template": template} if template is not None else {}
    given |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": "<|im_end|>", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(given), "utf-8")
    if file is not None:
        (folder / "chat_template.jinja").write_text(file, "utf-8")
    return folder


class Theirs:
    """The same folder, read by transformers."""

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast  # not above: it takes seconds

        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def chat(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return self.tokenizer.apply_chat_template(messages, **options)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


@functools.cache
def pair(style: str, template: str | None = None) -> tuple[Tokenizer, Theirs]:
    """One folder, read by us and by them; made once."""
    with tempfile.TemporaryDirectory() as name:
        folder = save(Path(name), style, template)
        return Tokenizer(folder), Theirs(folder)


# ---- texts

PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "  spaces   around\t",
    "\n\n\nlines\n\n",
    "\n\n",
    "",
    "in the inn, 12345 hens: it's 'the' end.",
    "日本語 and 你好, 👋🏽 naïve e\u0301 ﬁ",
    "{{ 7 * 7 }} {% raw %} {# no #} {% for %}",
    "<b>&amp;</b> <| im_end |> <|im_ end|> </ s>",
    "\x00\x1f\u2028\u00a0▁ ▁",
    "x" * 500,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
WORDS = [".", "the", "in", "👋", "你", "é", "<|", "|>", "<", ">", "im_end", "s", "/", "▁", "**"]
PIECES = st.sampled_from([*WORDS, " the", " ", "  ", "\n", "\n\n"])
ORDINARY = st.one_of(TEXT, st.lists(PIECES | TEXT, max_size=12).map("".join)).filter(
    lambda text: not any(token in text for token in CONTROL)
)
HOSTILE = st.lists(st.sampled_from(CONTROL) | PIECES | TEXT, min_size=1, max_size=8).map("".join)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control.values()]


# ---- templates


def in_this_process(template: str, special_tokens: dict[str, str], prompts: list[str]) -> list[str]:
    return render(template, special_tokens, prompts, allowed=2**20)


# For many examples: templates are rendered in this process, not each in one of its own
here = patch.object(tokenizer_module, "render_chat", in_this_process)
