"""Draws reading.svg: Bob needs what Alice is writing. What each of his tokens attends to on her line, as it grows."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from minihogwild import Run, load
from minihogwild.generate import DUET
from minihogwild.layouts import block_of
from minihogwild.show.trace import attention_of, fed

HERE = Path(__file__).parent
SHEET = "a = 646 + 784\nb = 3 + 1\nc = a + b"


def main() -> None:
    model = load(DUET, "float32", "cpu")
    run = Run(model, SHEET)
    events = [event for event in run if event["do"] in ("step", "move")]
    schedule = {"blocks": run.blocks, "events": events}
    writer, ids = zip(*((block, token) for block, tokens in fed(events) for token in tokens))
    words = [model.tokenizer.decode([token]).strip(" ").replace("\n", "↵") for token in ids]

    alice, bob = ([n for n in range(len(ids)) if writer[n] == block_of(name)] for name in ("Alice", "Bob"))
    line = alice[words_at(words, alice, "a") : words_at(words, alice, ".↵↵") + 1]  # a = 646 + 784: …, so a = 1430.
    start = words_at(words, bob, "c")
    reading = bob[start : start + words_at(words, bob[start:], "0") + 1]  # c = a + b = ……1430
    seen = torch.zeros(len(reading), model.config.num_hidden_layers, model.config.num_attention_heads, len(line))
    for row, token in enumerate(reading):
        weights = attention_of(token, schedule, model)  # [L, H, N]
        written = [n for n in line if n < weights.shape[2]]
        seen[row, :, :, : len(written)] = weights[:, :, written]
        seen[row, :, :, len(written) :] = torch.nan
    strongest = seen.nan_to_num().sum(-1).mean(0)  # [L, H]: of all that a head gives, what it gives to this line
    layer, head = divmod(strongest.argmax().item(), strongest.shape[1])
    draw(
        {
            "mean of all layers and heads": seen.mean((1, 2)),
            f"layer {layer + 1}, head {head + 1}": seen[:, layer, head],
        },
        [words[n] for n in line],
        [words[n] for n in reading],
    )


def words_at(words: list[str], numbers: list[int], word: str) -> int:
    """Where among these tokens a word comes first."""
    return next(n for n, number in enumerate(numbers) if words[number] == word)


def draw(panels: dict[str, Tensor], columns: list[str], rows: list[str]) -> None:
    figure, both = plt.subplots(2, 1, figsize=(8.5, 8), layout="constrained")
    colours = plt.get_cmap("YlOrRd").with_extremes(bad="#80889155")  # what was not yet written
    for axes, (title, weights) in zip(both, panels.items()):
        axes.grid(False)
        image = axes.imshow(weights, cmap=colours, vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(title)
        axes.set_xticks(range(len(columns)), columns, family="monospace", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, family="monospace", fontsize=8)
        axes.set_xlabel("Alice's line (grey: she had not written it yet)")
        axes.set_ylabel("Bob's line, a token a step, downwards")
        figure.colorbar(image, ax=axes, pad=0.02, label="attention weight")
    figure.savefig(HERE / "reading.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.style.use(HERE / "chapters.mplstyle")
    main()
