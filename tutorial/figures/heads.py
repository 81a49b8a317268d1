"""Draws heads.svg: which heads of an untrained chat model look at the other worker when a worker chooses what to do.

That is the moment at which its prefix ("Bob:") has been fed, and the first token after it is chosen: what the other is
writing is to be left to the other. Needs Qwen2.5-Coder-1.5B-Instruct (tests/qwen.py), and some minutes on a CPU.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import qwen  # noqa: E402

from minihogwild import Model, Run, load  # noqa: E402
from minihogwild.backend import PyTorchBackend  # noqa: E402
from minihogwild.prompts import Prompts  # noqa: E402
from minihogwild.show.trace import Onlooker, Tokens, count_fed, index_of_beginning, replay_watched  # noqa: E402

SHEET = """\
1. Which chemical element has the symbol H?
2. Which language do most people in Iceland speak?
3. What is the chemical symbol of gold?
4. What is the comparative of old?
5. Which language do most people in Hungary speak?
6. How many legs do three ants have together?"""
WORDS = Prompts(
    together="{problem}\n\n{names} answer these questions together, each in one short sentence. Every question is "
    "answered once.",
    header_others="\n\n",
    header_own="\n\n",
    prefix="{name}:",
    banned=("Alice", "Bob"),  # nobody speaks in the other's name
    boxed=False,
)
STEPS = 27


def main() -> None:
    model = load(qwen.folder(), "float32", "cpu")
    run = Run(model, SHEET, 2, max_steps=STEPS, prompts=WORDS)
    for _ in run:
        pass
    for worker in run.workers:
        print(worker.name, worker.paragraphs)
    choosing, writing = [], []
    for is_choice, share in shares_given_to_the_other(run, model):
        (choosing if is_choice else writing).append(share)
    choosing, writing = torch.stack(choosing).mean(0), torch.stack(writing).mean(0)  # [L, H]
    tell(choosing, writing)
    draw(choosing, writing)


def shares_given_to_the_other(run: Run, model: Model) -> Iterator[tuple[bool, Tensor]]:
    """Of each row while both write: is it one that chooses what to do; and the weight on the other's text, [L, H]."""
    schedule = {"blocks": run.blocks, "events": [e for e in run.history if e["do"] in ("step", "move")]}
    layers: list[Tensor] = []  # of the step that is looked at, [T, H, slots] each
    before_anybody_writes = run.history[: index_of_beginning(run.history)]
    onlooker = Onlooker(PyTorchBackend(), count_fed(before_anybody_writes), layers.append)
    texts = [worker.block for worker in run.workers]
    for event in replay_watched(schedule, model, onlooker, Tokens(run.blocks)):
        if layers and len(event["views"]) == 2:
            weights = torch.stack(layers)  # [L, T, H, slots]
            columns = list(dict.fromkeys(block for view in event["views"] for block in view))
            column_of_slot = onlooker.plan.page_block.repeat_interleave(onlooker.plan.page_size)
            last_rows = onlooker.plan.last.tolist()
            for row, view, ids, sampled in zip(last_rows, event["views"], event["tokens"], event["sampled"]):
                [other] = [block for block in texts if block != view[-1]]
                share = weights[:, row, :, column_of_slot == columns.index(other)].sum(-1)
                if sampled is not None:
                    yield len(ids) > 1, share
        layers.clear()


def tell(choosing: Tensor, writing: Tensor) -> None:
    """The heads that give most to the other at a choice, and what they give while they write."""
    H = choosing.shape[1]
    print(f"mean over all heads: {choosing.mean():.3f} when choosing, {writing.mean():.3f} when writing")
    for index in choosing.flatten().topk(8).indices.tolist():
        layer, head = divmod(index, H)
        print(
            f"layer {layer + 1:2} head {head + 1:2}: {choosing[layer, head]:.2f} when choosing, "
            f"{writing[layer, head]:.2f} when writing"
        )


def draw(choosing: Tensor, writing: Tensor) -> None:
    figure, both = plt.subplots(1, 2, figsize=(7, 5), layout="constrained", sharey=True)
    titles = ["when it chooses what to do", "while it writes"]
    for axes, title, shares in zip(both, titles, (choosing, writing)):
        axes.grid(False)
        image = axes.imshow(shares, cmap="YlOrRd", vmin=0, vmax=choosing.max(), aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="head")
        axes.set_xticks(range(0, shares.shape[1], 2), range(1, shares.shape[1] + 1, 2))
        axes.set_yticks(range(0, len(shares), 3), range(1, len(shares) + 1, 3))
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both, pad=0.02, label="attention given to what the other is writing")
    figure.savefig(HERE / "heads.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.style.use(HERE / "chapters.mplstyle")
    main()
