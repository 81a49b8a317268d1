"""Makes the vectors: tiny models, schedules, and the oracle's logits for them. `python vectors/make.py --out DIR`

models/NAME          an ordinary model folder, random weights, each exact in bfloat16
schedules/NAME.json  each shows something new; `together` nearly all
logits/MODEL/SCHEDULE.safetensors   what `minihogwild.replay --oracle` writes
inside.safetensors   the first layer's attention in one step of `together`, model `llama`, in float64
"""

import argparse
import json
import random
import sys
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from minihogwild import load
from minihogwild.attention import append, positions_of
from minihogwild.cache import Cache
from minihogwild.hub.checkpoint import Extras, empty_weights
from minihogwild.hub.config_json import parse_config
from minihogwild.oracle import Oracle
from minihogwild.replay import main as replay
from minihogwild.replay import schedule_json
from minihogwild.rope import attention_scale, rotate

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import packed_files

V = 64
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "yarn": {"model_type": "llama", "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},  # biases
    "qwen3": {"model_type": "qwen3"},  # norms of q and k
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "phi3": {"model_type": "phi3"},  # q, k and v in one tensor, gate and up in another
    "seed_oss": {"model_type": "seed_oss", "attention_out_bias": True},  # biases of q, k, v and out
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": False},  # a layer not rotated
    # One small layer, so that positions past 100,000 take seconds
    "long": {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 16, "max_position_embeddings": 131072,
        "rope_scaling": {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
# Models in 4 bits: the format (one of packed_files.FORMATS), in groups of 32 columns
PACKED = {"awq": "awq", "gptq": "gptq", "compressed-tensors": "asymmetric"}


# ---- models


def make_model(folder: Path, settings: dict) -> None:
    settings = {**SHAPE, **settings}
    folder.mkdir(parents=True)
    config = parse_config(settings)
    kind = settings["model_type"]
    extras = Extras(
        biases=kind in ("qwen2", "seed_oss"),
        out_bias=settings.get("attention_out_bias", False),
        qk_norms=kind in ("qwen3", "qwen3_moe"),
        fused=kind == "phi3",
    )
    _, parts = empty_weights(config, torch.float32, "cpu", extras)
    numbers, tensors = torch.Generator().manual_seed(crc32(folder.name.encode())), {}
    for name, part in parts.items():
        noise = torch.randn(part.shape, generator=numbers)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif part.dim() == 1 or "embed" in name:
            value = noise
        else:  # large enough that where a token stands moves the logits
            value = 1.5 * noise / part.shape[-1] ** 0.5
        tensors[name] = value.bfloat16().float()
    save_model(folder, settings, tensors)


def make_packed_model(folder: Path, kind: str) -> None:
    """A Llama whose matrices, but for the head, are packed; what is plain is exact in bfloat16."""
    settings = {**SHAPE, "intermediate_size": 64, "model_type": "llama", "tie_word_embeddings": False}
    made = packed_files.pack(settings, kind, 32, seed=crc32(folder.name.encode()))
    tensors = {}
    for name, tensor in made.tensors.items():
        is_plain = name in made.meant
        tensors[name] = tensor.bfloat16().float() if is_plain else tensor
    folder.mkdir(parents=True)
    save_model(folder, made.config, tensors)


def save_model(folder: Path, settings: dict, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    words = {f"w{n}": n for n in range(settings["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"), pretty=False)


# ---- schedules


class Script:
    """A schedule as it is written down: `step` with what each feeds, `move`."""

    def __init__(self, seed: int, vocabulary: int = V):
        self.rng, self.vocabulary, self.events = random.Random(seed), vocabulary, []

    def step(self, *feeds: tuple[str, int]) -> "Script":
        """Each feed: a view, block names with spaces between, and how many random tokens."""
        tokens = [[self.rng.randrange(self.vocabulary) for _ in range(count)] for _, count in feeds]
        self.events.append({"do": "step", "views": [view.split() for view, _ in feeds], "tokens": tokens})
        return self

    def move(self, source: str, target: str) -> "Script":
        self.events.append({"do": "move", "from": source, "to": target})
        return self


def schedules() -> dict[str, Script]:
    alone = [("prompt alice", 1), ("prompt bob", 1)]
    both = [("prompt bob alice", 1), ("prompt alice bob", 1)]
    made = {name: Script(seed) for seed, name in enumerate(
        ["prefill", "two_workers", "same_step", "ragged", "move", "move_seen", "asymmetric", "together"]
    )}  # fmt: skip
    made["prefill"].step(("prompt", 9)).step(("prompt", 1)).step(("prompt", 70)).step(("prompt", 5))
    made["two_workers"].step(("prompt", 6)).step(*alone).step(*alone).step(*alone)
    made["same_step"].step(("prompt", 6)).step(*both).step(*both).step(*both)
    made["ragged"].step(("prompt", 6)).step(("prompt bob alice", 3), both[1]).step(both[0], ("prompt alice bob", 4))
    made["ragged"].step(*both)
    made["move"].step(("prompt", 6)).step(("prompt alice", 5)).step(("prompt alice", 1)).move("alice", "prompt")
    made["move"].step(("prompt alice", 2)).step(("prompt alice", 1))
    made["move_seen"].step(("prompt", 6)).step(*both).step(("prompt bob alice", 3), both[1]).move("bob", "prompt")
    made["move_seen"].step(*both).move("alice", "prompt").step(*both).step(*both)
    made["asymmetric"].step(("prompt", 6)).step(("notes", 4))
    uneven = [("prompt notes bob alice", 1), ("notes prompt bob", 1), ("alice prompt carol", 2)]
    made["asymmetric"].step(*uneven).step(*uneven).step(uneven[0]).step(uneven[2], uneven[1])
    together(made["together"])
    made["long"] = Script(99, 10)
    for _ in range(50):  # each part sees itself alone: quick, however long the whole becomes
        made["long"].step(("part", 2020)).move("part", "prompt")
    made["long"].step(*both).step(("prompt bob alice", 3), both[1]).move("alice", "prompt").step(*both).step(*both)
    return made


def together(script: Script) -> None:
    """What a run of three workers might do: everything at once."""
    rng, team = script.rng, ["alice", "bob", "carol"]
    script.step(("prompt", 40)).step(("prompt", 33)).step(("prompt others", 3), ("prompt own", 2))
    view = {name: " ".join(["prompt", "others", *(n for n in team if n != name), "own", name]) for name in team}
    written = dict.fromkeys(team, 0)
    for _ in range(40):
        active = rng.sample(team, rng.randint(1, 3))
        counts = {name: 4 if written[name] == 0 else rng.choice([1, 1, 1, 1, 2]) for name in active}
        script.step(*((view[name], count) for name, count in counts.items()))
        for name, count in counts.items():
            written[name] += count
            if written[name] > rng.randint(5, 15):
                script.move(name, "prompt")
                written[name] = 0


# ---- the inside of one layer


def inside(folder: Path, schedule: dict) -> dict[str, Tensor]:
    """All of the first layer's attention, in the first step after a move where one of several workers feeds several."""
    model = load(folder, "float64", "cpu", with_tokenizer=False)
    oracle = Oracle(model.config, model.weights, schedule["blocks"])
    cache = Cache(model.config, schedule["blocks"], torch.float64)
    moved = False
    for index, event in enumerate(schedule["events"]):
        if event["do"] == "move":
            oracle.move(event["from"], event["to"])
            cache.move(event["from"], event["to"])
            moved = True
            continue
        views, tokens = event["views"], event["tokens"]
        counts = [len(ids) for ids in tokens]
        found = {"event": torch.tensor(index), **first_attention(views, tokens, oracle, cache)}
        oracle.step(views, tokens)
        if moved and len(views) > 1 and max(counts) > 1:
            return {name: tensor.contiguous() for name, tensor in found.items()}
    raise AssertionError("the schedule has no such step")


def first_attention(views: list[list[str]], tokens: list[list[int]], oracle: Oracle, cache: Cache) -> dict[str, Tensor]:
    """Write a step to the cache's first layer, and give all that its attention computes, each under a name.

    Unrotated queries, keys and values are the oracle's; what follows is said here anew, block by block.
    """
    config, kv = cache.config, cache.layers[0]
    plan = cache.extend(views, [len(ids) for ids in tokens])
    x = oracle.embed[torch.tensor([token for ids in tokens for token in ids])]
    q, k, v = oracle.project(x, oracle.layers[0])
    frequencies = cache.frequencies[config.layer_kinds[0]]
    positions = positions_of(plan, frequencies, None, torch.float64)
    append(kv, k, v, positions)

    T, H, D = q.shape
    K = config.num_key_value_heads
    rotated_q = rotate(q[:, None], *positions.query_rotation)  # [T, B, H, D]
    found = {"q": q, "k": k, "v": v, "offset": plan.offset, "visible": plan.visible, "rotated_q": rotated_q}
    scores, values = [], []
    blocks = list(dict.fromkeys(block for view in views for block in view))
    for b, block in enumerate(blocks):
        N, pages = cache.lengths[block], cache.pages[block]
        block_keys = kv.keys[pages].transpose(1, 2).flatten(0, 1)[:N]  # [N, K, D], as they are stored
        block_values = kv.values.view(K, -1, cache.page_size, D)[:, pages].flatten(1, 2)[:, :N].transpose(0, 1)
        q_by_group = rotated_q[:, b].view(T, K, H // K, D)
        products = torch.einsum("tkgd,nkd->tkgn", q_by_group, block_keys).flatten(1, 2)  # [T, H, N]
        not_visible = torch.arange(N) >= plan.visible[:, b, None]  # [T, N]
        scaled = attention_scale(config, config.layer_kinds[0]) * products
        scores.append(scaled.masked_fill(not_visible[:, None], -torch.inf))
        values.append(block_values)
        found[f"keys.{block}"] = block_keys
        found[f"values.{block}"] = block_values
    found["scores"] = torch.cat(scores, -1)  # [T, H, N of all blocks]
    found["weights"] = found["scores"].softmax(-1)
    weights_by_group = found["weights"].view(T, K, H // K, -1)
    found["output"] = torch.einsum("tkgn,nkd->tkgd", weights_by_group, torch.cat(values)).flatten(1, 2)  # [T, H, D]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the vectors.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that has none of it")
    out = parser.parse_args().out
    scripts = schedules()
    (out / "schedules").mkdir(parents=True)
    for name, script in scripts.items():
        views = [view for event in script.events if event["do"] == "step" for view in event["views"]]
        blocks = list(dict.fromkeys(block for view in views for block in view))
        (out / "schedules" / f"{name}.json").write_bytes(schedule_json(blocks, script.events))
    for name, settings in CONFIGS.items():
        make_model(out / "models" / name, settings)
    for name, kind in PACKED.items():
        make_packed_model(out / "models" / name, kind)
    for name in [*CONFIGS, *PACKED]:
        (out / "logits" / name).mkdir(parents=True)
        for schedule in ["long"] if name == "long" else scripts.keys() - {"long"}:
            paths = [
                str(out / "schedules" / f"{schedule}.json"),
                "--out",
                str(out / "logits" / name / f"{schedule}.safetensors"),
            ]
            assert replay([*paths, "--model", str(out / "models" / name), "--oracle", "--device", "cpu"]) == 0
    together = json.loads((out / "schedules" / "together.json").read_text())
    save_file(inside(out / "models" / "llama", together), out / "inside.safetensors")


if __name__ == "__main__":
    main()
