"""The engine against transformers: tiny random models, saved by it, loaded by `load`, logits compared.

Transformers takes angles in float32: at position 2,000 they are off by about 1e-4 rad, which alone moves logits
by more than the 1e-5 asked for here. So its tables of cosines and sines are first held against ours, to the
precision they have; then it computes with the same tables made in float64, and its logits must be ours.
At the first positions, where its own angles are good enough, nothing of it is exchanged.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from minihogwild import Cache, Model, forward, load
from minihogwild.hub import checkpoint
from minihogwild.rope import attention_factor, inverse_frequencies

LENGTH = 2000
EARLY = 64  # positions at which float32 angles are good enough for TOLERANCE
TOLERANCE = 1e-5  # of the logits' standard deviation
# Where logits are compared. What lies between two of them is one chunk: of 1 to 37 tokens.
ENDS = [*range(1, 21), *range(22, 41, 2), *range(43, EARLY + 1, 7), *range(100, LENGTH - 20, 37)]
ENDS += range(LENGTH - 20, LENGTH + 1, 4)

SIZES = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}  # heads of 12
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # more than 48 / 4
FUSED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 12, as E / H has it
MQA = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28}


def yarn(**keys):
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512, **keys}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES = {
    "llama": LlamaConfig(**SIZES, **MHA),
    "llama tied": LlamaConfig(**SIZES, **MQA, tie_word_embeddings=True, rms_norm_eps=1e-2),
    "llama theta": LlamaConfig(**SIZES, **GQA, rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "llama attention_bias": LlamaConfig(**SIZES, **GQA, attention_bias=True),
    "llama linear": LlamaConfig(**SIZES, **GQA, rope_parameters=LINEAR),
    "llama llama3": LlamaConfig(**SIZES, **GQA, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(original_max_position_embeddings=2048)),
    "llama yarn attention_factor": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(attention_factor=1.3)),
    "llama yarn mscale": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(mscale=1.5, mscale_all_dim=0.4)),
    "llama yarn one mscale": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(mscale=3.0)),  # alone it does nothing
    "llama yarn betas": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(beta_fast=12.0, beta_slow=3.0)),
    "llama yarn truncate": LlamaConfig(**SIZES, **GQA, rope_parameters=yarn(truncate=False)),
    "llama yarn all": LlamaConfig(
        **SIZES,
        **MQA,
        rope_parameters=yarn(
            attention_factor=1.1, mscale=1.5, mscale_all_dim=0.4, beta_fast=9.0, beta_slow=0.7, truncate=False
        ),
    ),
    "qwen2": Qwen2Config(**SIZES, **MHA),
    "qwen2 tied": Qwen2Config(**SIZES, **MQA, tie_word_embeddings=True),
    "qwen2 yarn": Qwen2Config(**SIZES, **GQA, rope_parameters=yarn()),
    "qwen3": Qwen3Config(**SIZES, **MQA),
    "qwen3 tied yarn": Qwen3Config(
        **SIZES,
        **GQA,
        tie_word_embeddings=True,
        rope_parameters=yarn(rope_theta=1e6, factor=2.0, original_max_position_embeddings=1024),
    ),
    "mistral": MistralConfig(**SIZES, **MHA, sliding_window=None),
    "mistral theta": MistralConfig(
        **SIZES, **GQA, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "phi3": Phi3Config(**SIZES, **FUSED, pad_token_id=0),
    "seed_oss": SeedOssConfig(**SIZES, **GQA, attention_out_bias=True),
    "seed_oss without biases": SeedOssConfig(**SIZES, **MQA, attention_bias=False, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SIZES | {"num_hidden_layers": 5}, **FUSED, pad_token_id=0),
    "smollm3 list": SmolLM3Config(
        **SIZES, **MHA, no_rope_layers=[0, 1], tie_word_embeddings=False, pad_token_id=0, rope_parameters=yarn()
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **GQA, **MOE),
    "qwen3_moe normalised": Qwen3MoeConfig(**SIZES, **GQA, **MOE, norm_topk_prob=True),
    "qwen3_moe first layer dense": Qwen3MoeConfig(**SIZES, **MQA, **MOE, norm_topk_prob=True, mlp_only_layers=[0]),
    "qwen3_moe every second layer, tied yarn": Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 3},
        **GQA,
        **MOE | {"num_experts_per_tok": 1},
        decoder_sparse_step=2,
        tie_word_embeddings=True,
        rope_parameters=yarn(),
    ),
}
# Each family, and each rope type, once; what differs from these in one key alone is slow
FAST = ["llama", "llama tied", "llama linear", "llama llama3", "llama yarn all", "qwen2", "qwen3 tied yarn", "mistral"]
FAST += ["qwen3_moe every second layer, tied yarn", "phi3", "seed_oss", "smollm3"]


@dataclass
class Pair:
    """One case: transformers' model, the folder that it was saved to, and what `load` made of that folder."""

    theirs: PreTrainedModel
    folder: Path
    ours: Model
    ids: Tensor  # [LENGTH]


class ExactAngles(nn.Module):
    """Takes the place of a transformers model's rotary module: the same tables, from angles in float64."""

    def __init__(self, ours: Model):
        super().__init__()
        self.rope, self.frequencies = ours.config.rope, inverse_frequencies(ours.config.rope, ours.config.head_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        m = attention_factor(self.rope)
        return (angles.cos() * m).to(x.dtype), (angles.sin() * m).to(x.dtype)


@pytest.fixture(
    scope="module", params=[case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def pair(request, tmp_path_factory) -> Pair:
    theirs = random_model(CASES[request.param], seed=list(CASES).index(request.param))
    folder = tmp_path_factory.mktemp("model")
    save(theirs, folder)
    return Pair(theirs, folder, load(folder, device="cpu"), torch.randint(SIZES["vocab_size"], (LENGTH,)))


def random_model(config, seed: int) -> PreTrainedModel:
    """No weight is left as transformers draws it: biases 0, norms 1, and attention next to uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape)
        if name.endswith("bias"):
            drawn *= 0.5
        elif "norm" in name:  # q and k norms decide how sharp Qwen3's attention is
            drawn = (1.3 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1) + 0.3 * drawn
        elif "embed" not in name:
            gain = 1.3 if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")) else 1
            drawn *= gain * parameter.shape[-1] ** -0.5
        parameter.copy_(drawn)
    return model


def save(model: PreTrainedModel, folder: Path, **how) -> None:
    model.save_pretrained(folder, **how)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))


def their_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids[None]).logits[0]  # [T, V]


@pytest.fixture(scope="module")
def exact_logits(pair) -> Tensor:
    """Transformers' logits at ENDS, with exact angles."""
    rotary = pair.theirs.model.rotary_emb
    pair.theirs.model.rotary_emb = ExactAngles(pair.ours)
    logits = their_logits(pair.theirs, pair.ids)
    pair.theirs.model.rotary_emb = rotary
    return logits[torch.tensor(ENDS) - 1]


def our_logits(model: Model, ids: Tensor, moved_at: int | None = None) -> Tensor:
    """Logits [len(ENDS), V], the text in one block, or in paragraphs that move to it at `moved_at` tokens or more."""
    cache = Cache(model.config, ["text", "paragraph"], model.dtype)
    rows = []
    for start, end in zip([0, *ENDS], ENDS):
        view = ["text", "paragraph"] if moved_at else ["text"]
        plan = cache.extend([view], [end - start])
        rows.append(forward(ids[start:end], model.weights, model.config, cache, plan)[0])
        if moved_at and cache.lengths["paragraph"] >= moved_at:
            cache.move("paragraph", "text")
    return torch.stack(rows)


def worst(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the logits' standard deviation."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.std()).item()


def test_rotations_are_those_of_transformers(pair):
    """Up to the error of float32: a few 1e-7 of a frequency, and so LENGTH times that in an angle."""
    rotary, rope = pair.theirs.model.rotary_emb, pair.ours.config.rope
    frequencies = inverse_frequencies(rope, pair.ours.config.head_dim)
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=4e-7, atol=0)
    assert rotary.attention_scaling == pytest.approx(attention_factor(rope), rel=1e-12)
    positions, x = torch.arange(LENGTH)[None], torch.zeros(1)
    for theirs, exact in zip(rotary(x, positions), ExactAngles(pair.ours)(x, positions)):
        torch.testing.assert_close(theirs, exact, rtol=0, atol=4e-7 * LENGTH * rotary.attention_scaling)


def test_first_logits_are_those_of_transformers(pair):
    early = [end for end in ENDS if end <= EARLY]
    theirs = their_logits(pair.theirs, pair.ids[:EARLY])
    assert worst(our_logits(pair.ours, pair.ids)[: len(early)], theirs[torch.tensor(early) - 1]) <= TOLERANCE


@pytest.mark.parametrize("moved_at", [None, 90], ids=["one block", "moved paragraphs"])
def test_logits_are_those_of_transformers_with_exact_angles(pair, exact_logits, moved_at):
    assert worst(our_logits(pair.ours, pair.ids, moved_at), exact_logits) <= TOLERANCE


def test_attention_matters(pair, exact_logits):
    """Else the tests here would agree whatever attention did: other orders of the context must move the logits."""
    for length in (EARLY, LENGTH):
        shuffled = torch.cat((pair.ids[torch.randperm(length - 1)], pair.ids[length - 1 : length]))
        straight, moved = exact_logits[ENDS.index(length)], their_logits(pair.theirs, shuffled)[-1]
        assert (moved - straight).norm() >= 0.1 * straight.norm()


WITHOUT_EFFECT = [  # one mscale without the other; both, where attention_factor is given
    ("llama yarn one mscale", "mscale"),
    ("llama yarn all", "mscale"),
    ("llama yarn all", "mscale_all_dim"),
    ("phi3", "partial_rotary_factor"),  # of which one value is supported (test_hub_config.py)
]
ROPE_KEYS = [(case, key) for case, config in CASES.items() for key in config.rope_parameters if key != "rope_type"]


@pytest.mark.parametrize(("case", "key"), [pair for pair in ROPE_KEYS if pair not in WITHOUT_EFFECT])
def test_rope_keys_matter(case, key):
    """Else a key that `load` drops would go unnoticed: another value must move transformers' logits, by far."""
    model = random_model(CASES[case], seed=0)
    ids = torch.randint(SIZES["vocab_size"], (500,))
    before = their_logits(model, ids)
    changed = CASES[case].to_dict()
    value = changed["rope_parameters"][key]
    changed["rope_parameters"][key] = not value if isinstance(value, bool) else type(value)(value * 2)
    model.model.rotary_emb = type(model.model.rotary_emb)(type(CASES[case])(**changed))
    assert worst(their_logits(model, ids), before) >= 1000 * TOLERANCE


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_older_form_of_config_json_is_read_alike(pair, tmp_path, type_key):
    older = shutil.copytree(pair.folder, tmp_path / "older")
    settings = json.loads((older / "config.json").read_text())
    rope = settings.pop("rope_parameters")  # what makes it the newer form
    kind = rope.pop("rope_type")
    settings |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": settings.pop("dtype")}
    if rope.get("original_max_position_embeddings") == settings["max_position_embeddings"]:
        del rope["original_max_position_embeddings"]  # its default
    if "num_local_experts" in settings:
        settings["num_experts"] = settings.pop("num_local_experts")
    if settings["model_type"] == "llama" and settings["head_dim"] == 48 // settings["num_attention_heads"]:
        del settings["head_dim"]  # its default
    settings["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    (older / "config.json").write_text(json.dumps(settings))
    assert load(older, device="cpu").config == pair.ours.config
    theirs = AutoConfig.from_pretrained(older).rope_parameters  # so that this is a form that exists
    assert theirs.items() >= pair.theirs.config.rope_parameters.items()


def test_a_trained_length_beside_the_rope_parameters_means_what_it_means_to_transformers(tmp_path):
    config = LlamaConfig(**SIZES, **GQA, original_max_position_embeddings=512, rope_parameters=yarn())
    save(random_model(config, seed=0), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["original_max_position_embeddings"] == 512
    del settings["rope_parameters"]["original_max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    ours = load(tmp_path, device="cpu").config
    frequencies = inverse_frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=4e-7, atol=0)


def test_experts_in_one_tensor_are_the_same_model(tmp_path):
    """As transformers writes them where it is not asked for the format that they came in."""
    theirs = random_model(CASES["qwen3_moe"], seed=0)
    for name, how in {"usual": {}, "in one": {"save_original_format": False}}.items():
        save(theirs, tmp_path / name, **how)
    usual, in_one = (load(tmp_path / name, device="cpu") for name in ("usual", "in one"))
    names = checkpoint.open_file(tmp_path / "in one" / "model.safetensors")
    assert any(tensor.name.endswith("mlp.experts.gate_up_proj") for tensor in names)
    ids = torch.arange(LENGTH) % SIZES["vocab_size"]
    assert torch.equal(our_logits(in_one, ids), our_logits(usual, ids))


def test_sharded_checkpoint_is_the_same_model(pair, tmp_path):
    save(pair.theirs, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    sharded = load(tmp_path, device="cpu")
    assert sharded.config == pair.ours.config
    assert torch.equal(our_logits(sharded, pair.ids), our_logits(pair.ours, pair.ids))
