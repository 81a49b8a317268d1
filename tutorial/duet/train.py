"""Trains duet from scratch, on one GPU: `python tutorial/duet/train.py --out minihogwild/duet`.

The engine feeds a transcript step by step; here all of its tokens go through the model at once. A token has two homes:
the block that its worker wrote it to, and, once its paragraph has moved, the common block. So each token's key is
there twice, rotated to either place, and a mask says which of the two a row may see: the first from the step in which
it was fed until the paragraph moved, the second from then on. As in the engine, a query is rotated once per block.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sheets import END, LATE, Encoder, Row, make_sheet, make_tokenizer, save_words, transcript
from torch import Tensor

from minihogwild import Config, Weights, load
from minihogwild.hub.checkpoint import empty_weights
from minihogwild.hub.config_json import parse_config
from minihogwild.layouts import COMMON, LAYOUTS, block_of
from minihogwild.prompts import NAMES
from minihogwild.weights import Dense

DEFAULT_PROBLEM_SEED = 354  # of two workers one waits for the other
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # no two batches are of one size


# ---- transcripts as tensors


@dataclass
class Batch:
    """Transcripts of one layout and number of workers. Z transcripts, B blocks (the common one first), T rows.

    Rows lie by block, in the order in which they were written; a block has as many as it needs in any transcript,
    and some that are not used.
    """

    sizes: list[int]  # [B]: rows of each block
    moves: bool  # do paragraphs move at all
    views: Tensor  # [B, B]: does the block's writer see that block
    tokens: Tensor  # [Z, T]
    targets: Tensor  # [Z, T]
    index: Tensor  # [Z, T]: in the own block
    home: Tensor  # [Z, T]: in the common block, once moved
    step: Tensor  # [Z, T]: in which it is fed; late where the row is not used
    moved: Tensor  # [Z, T]: the step after which the row's paragraph moves
    choice: Tensor  # [Z, T]: 1 where the target is a choice
    distance: Tensor  # [Z, T, B]: from a block's start to the row, in the row's view

    def to(self, device: str) -> "Batch":
        return Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


UNUSED = Row(0, "", 0, 2 * LATE)
ALIGN = 8  # rows: so that matrices are what the tensor cores like


def views_of(layout: str, names: list[str]) -> dict[str, list[str]]:
    """What is seen by whoever writes to a block: headers see the prompt, and themselves."""
    views = {COMMON: [COMMON], **{header: [COMMON, header] for header in LAYOUTS[layout].headers}}
    blocks = [block_of(name) for name in names]
    for own in blocks:
        others = [block for block in blocks if block != own]
        views[own] = LAYOUTS[layout].view(own, others)
    return views


def by_block(rows: list[Row], team: list[str], layout: str) -> dict[str, list[Row]]:
    """The rows of each block; the common one first, then headers, then the workers', the longest first."""
    blocks = {block: [] for block in views_of(layout, team)}
    for row in rows:
        blocks[row.block].append(row)
    workers = sorted(map(block_of, team), key=lambda block: len(blocks[block]), reverse=True)
    first = [block for block in blocks if block not in workers]
    return {block: blocks[block] for block in first + workers}


def arrange(transcripts: list[dict[str, list[Row]]]) -> tuple[list[int], list[list[Row]]]:
    """(how many rows each block gets, all T rows of each transcript)"""
    sizes = [max(map(len, blocks)) for blocks in zip(*(blocks.values() for blocks in transcripts))]
    sizes = [-(-size // ALIGN) * ALIGN for size in sizes]
    return sizes, [
        [row for size, rows in zip(sizes, blocks.values()) for row in rows + [UNUSED] * (size - len(rows))]
        for blocks in transcripts
    ]


def make_batch(transcripts: list[list[Row]], teams: list[list[str]], layout: str) -> Batch:
    blocks_of = [by_block(rows, team, layout) for rows, team in zip(transcripts, teams)]
    sizes, arranged = arrange(blocks_of)
    B = len(sizes)
    block = torch.arange(B).repeat_interleave(torch.tensor(sizes))
    fields, distances = [], []
    for rows, blocks, team in zip(arranged, blocks_of, teams):
        of_row = [(r.token, r.target, r.index, r.home, r.step, r.moved, r.choice) for r in rows]
        fields.append(torch.tensor(of_row, dtype=torch.int32))
        _, _, index, _, step, moved, _ = fields[-1].long().unbind(1)

        # Lengths of all blocks after the writes of each step
        used, gone = step < LATE, moved < LATE
        lengths = torch.zeros(B, int(step[used].max()) + 2, dtype=torch.int64)
        lengths.index_put_((block[used], step[used]), torch.tensor(1), accumulate=True)
        lengths.index_put_((block[gone], moved[gone] + 1), torch.tensor(-1), accumulate=True)
        lengths[0].index_put_((moved[gone] + 1,), torch.tensor(1), accumulate=True)
        lengths = lengths.cumsum(1)
        order, views = {name: b for b, name in enumerate(blocks)}, views_of(layout, team)
        begins = torch.zeros(B, *lengths.shape, dtype=torch.int64)  # of a block in the view of each block's writer
        for name, view in views.items():
            seen = torch.tensor([order[other] for other in view])
            begins[order[name], seen[1:]] = lengths[seen[:-1]].cumsum(0)
        now = step.where(used, 0)
        distances.append((begins[block, block, now] + index)[:, None] - begins[block, :, now])
    return Batch(
        sizes,
        LAYOUTS[layout].paragraphs,
        torch.tensor([[other in views[name] for other in blocks] for name in blocks]),
        *torch.stack(fields).unbind(2),
        distance=torch.stack(distances).int(),
    )


def visible(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which keys each row sees, [Z, T, T] each: where they were written; where they have moved to."""
    step, moved, index = (field[:, :, None] for field in (batch.step, batch.moved, batch.index))
    written, leaves, place = (field[:, None] for field in (batch.step, batch.moved, batch.index))
    block = torch.arange(len(batch.sizes), device=step.device).repeat_interleave(
        torch.tensor(batch.sizes, device=step.device)
    )
    own = block[:, None] == block
    same = own & (moved == leaves) & (index >= place) & (written < LATE)
    others = ~own & batch.views[block][:, block] & (written <= step) & (step <= leaves)
    used = step < LATE
    return used & (same | others), used & (leaves < step)


# ---- the forward


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., D] by angles [..., D / 2]; never in less than float32."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores + mask).softmax(-1)


if torch.cuda.is_available():  # one pass over the memory each
    turn, masked_softmax = (torch.compile(function, dynamic=True) for function in (turn, masked_softmax))


def forward(batch: Batch, weights: Weights, config: Config) -> Tensor:
    """Logits [Z, T, V] after every token of the transcripts."""
    H, D = config.num_attention_heads, config.head_dim
    assert config.num_key_value_heads == H  # no groups: this is for duet
    x = F.embedding(batch.tokens, weights.embed)  # [Z, T, E]
    frequencies = config.rope.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)

    def turns(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None] * frequencies
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    to_row, to_index, to_home = turns(batch.distance), turns(batch.index), turns(batch.home)
    mixed_precision = torch.is_autocast_enabled(x.device.type)
    sees = torch.cat(visible(batch)[: 1 + batch.moves], -1)[:, None]  # [Z, 1, T, T or 2T]
    sees[..., 0] |= ~sees.any(-1)  # rows that are not used see something: no NaN
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16 if mixed_precision else x.dtype, device=x.device)
    mask.masked_fill_(~sees, -math.inf)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)

    for layer in weights.layers:
        qkv = F.linear(norm(x, layer.attn_norm), layer.qkv.tensor)
        q, k, v = qkv.unflatten(-1, (3 * H, D)).chunk(3, -2)  # [Z, T, H, D]
        queries = turn(q[:, :, None] / D**0.5, *to_row).permute(2, 0, 3, 1, 4).unbind()  # B times [Z, H, T, D]
        # Where they were written, a block's keys meet the queries that are rotated for it;
        keys = turn(k, *to_index).permute(0, 2, 3, 1).split(batch.sizes, -1)  # B times [Z, H, D, S]
        scores = [query @ of_block for query, of_block in zip(queries, keys)]
        if batch.moves:  # where they have moved to, those for the common block
            scores.append(queries[0] @ turn(k, *to_home).permute(0, 2, 3, 1))
            v = torch.cat((v, v), 1)
        with torch.autocast(x.device.type, enabled=False):  # else softmax would be float32: twice the traffic
            attention = masked_softmax(torch.cat(scores, -1), mask)
            mixed = attention @ v.transpose(1, 2).to(attention.dtype)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer.out.tensor)
        gate, up = F.linear(norm(x, layer.mlp_norm), layer.gate_up.tensor).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer.down.tensor)
    return F.linear(norm(x, weights.norm), weights.head.tensor)


# ---- training


SETTINGS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# (layout, workers): how often. No other number of workers is ever seen, nor are more than 14 lines.
LESSONS = {
    ("combined", 1): 2, ("combined", 2): 6, ("combined", 3): 7, ("combined", 4): 8, ("combined", 6): 3,
    ("independent", 1): 2,
}  # fmt: skip
SLIPS = 0.1  # how often the expert errs in every other transcript, so that duet learns to go on from its own errors


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with a learning rate that rises for 200 batches and then falls with the clock."""

    minutes: float
    rate: float  # at its highest
    most_digits: tuple[int, ...]  # of the numbers of a sheet: one of these
    choice: float  # how much a choice (which line, mine or taken, wait or go on) weighs in the loss; other tokens: 1


# Choices are hardest to learn, and short sums hold more of them. Then what is left to learn are long sums.
PHASES = (Phase(9.3, 1e-3, (1, 1, 3), 10), Phase(5.4, 6e-4, (1, 3, 3, 3), 5))


class Lessons(torch.utils.data.IterableDataset):
    """Batches without end, each of one layout and number of workers. Seed and number of loaders fix them."""

    def __init__(self, seed: object, size: int, most_digits: tuple[int, ...]):
        self.seed, self.size, self.most_digits = seed, size, most_digits

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        encode, names = Encoder(make_tokenizer()), NAMES.split()[:8]
        while True:
            (layout, workers) = rng.choices(list(LESSONS), LESSONS.values())[0]
            most_digits, slips = rng.choice(self.most_digits), rng.choice([0, SLIPS])
            lesson = []
            for _ in range(4 * self.size):
                lines = rng.choice([12, 12, 12, rng.randint(1, 14)])
                first = rng.choice([0, rng.randint(0, 26 - lines)])  # any letters, so that longer sheets are no news
                dependent = rng.choice([1 / 3, 1 / 3, 1 / 3, rng.uniform(0, 0.6)])
                sheet = make_sheet(rng, lines, dependent, first, most_digits)
                team = sorted(rng.sample(names, workers))  # any of eight names, so that a larger team has no new ones
                lesson.append((transcript(sheet, team, layout, encode, rng, slips)[0], team))
            lesson.sort(key=lambda pair: len(pair[0]))  # batches of one length, or most of it would be padding
            parts = [zip(*lesson[n : n + self.size]) for n in range(0, len(lesson), self.size)]
            batches = [make_batch(transcripts, teams, layout) for transcripts, teams in parts]
            for _ in range(2):  # twice: writing them takes longer than learning from them
                yield from rng.sample(batches, len(batches))


def initialise(config: Config, seed: int) -> Weights:
    """Float32 weights of the usual size: normal, 0.02, those that write to the residual smaller; norms are 1."""
    weights, parts = empty_weights(config, torch.float32, "cpu")
    numbers = torch.Generator().manual_seed(seed)
    for name, part in parts.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = 0.02 / (2 * config.num_hidden_layers) ** 0.5 if writes else 0.02
        part.copy_(torch.ones(part.shape) if part.dim() == 1 else scale * torch.randn(part.shape, generator=numbers))
    return weights


def trainable(weights: Weights, device: str) -> Weights:
    for holder in (weights, *weights.layers):
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, value.to(device).requires_grad_())
            elif isinstance(value, Dense):
                setattr(holder, name, Dense(value.tensor.to(device).requires_grad_()))
    weights.head = Dense(weights.embed)
    return weights


def parameters(weights: Weights) -> list[Tensor]:
    found = [weights.embed, weights.norm]  # the head is the embedding once more
    for layer in weights.layers:
        for value in vars(layer).values():
            if value is not None:
                found.append(value.tensor if isinstance(value, Dense) else value)
    return found


def save(weights: Weights, config: Config, folder: Path) -> None:
    """A model folder as any other."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, parts = empty_weights(config, torch.bfloat16, "cpu")
    with torch.no_grad():
        for target, source in zip(parameters(stored), parameters(weights), strict=True):
            target.copy_(source)
    save_file({name: part.clone() for name, part in parts.items()}, folder / "model.safetensors", {"format": "pt"})
    end = make_tokenizer().token_to_id(END)
    settings = SETTINGS | {"vocab_size": config.vocab_size, "bos_token_id": None, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_words(folder, str(make_sheet(random.Random(DEFAULT_PROBLEM_SEED))))


def train(weights: Weights, config: Config, phase: Phase, lessons: Lessons, loaders: int) -> None:
    device = weights.embed.device.type
    matrices = [p for p in parameters(weights) if p.dim() == 2]
    vectors = [p for p in parameters(weights) if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device == "cuda")
    began, losses = time.time(), []
    for n, batch in enumerate(torch.utils.data.DataLoader(lessons, None, num_workers=loaders)):
        passed = (time.time() - began) / (60 * phase.minutes)
        if passed >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = phase.rate * min(1, (n + 1) / 200) * max(0.01, min(1, 1.25 * (1 - passed)))
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = forward(batch, weights, config)
        flat = logits.float().flatten(0, 1), batch.targets.long().flatten()
        loss = F.cross_entropy(*flat, ignore_index=-100, reduction="none").view_as(batch.targets)
        weight = (batch.targets >= 0) * (1 + (phase.choice - 1) * batch.choice)
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters(weights), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
        if n % 100 == 0:
            wrong = ((logits.argmax(-1) != batch.targets) & (batch.targets >= 0)).float()
            tokens, choices = (float((wrong * rows).sum() / len(wrong)) for rows in (1, batch.choice))
            told = f"batch {n:6d}  loss {torch.stack(losses[-100:]).mean():.5f}"
            told += f"  wrong in a transcript: {tokens:.3f} tokens, {choices:.3f} of them choices"
            print(f"{time.time() - began:6.0f} s  {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains duet.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--batch", type=int, default=64, help="transcripts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loaders", type=int, default=7, help="processes that write transcripts")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        choices=range(len(PHASES)),
        help="1: only the second phase, from the weights in --out",
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config = parse_config(SETTINGS | {"vocab_size": make_tokenizer().get_vocab_size()})
    weights = initialise(config, options.seed)
    for n, phase in list(enumerate(PHASES))[options.first :]:
        if n > 0:
            weights = load(options.out, "float32", "cpu").weights
        lessons = Lessons(f"{options.seed} {n}", options.batch, phase.most_digits)
        train(trainable(weights, device), config, phase, lessons, options.loaders)
        save(weights, config, options.out)


if __name__ == "__main__":
    main()
