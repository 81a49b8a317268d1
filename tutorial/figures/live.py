"""Draws live.svg: a terminal while `python -m minihogwild.generate` runs, when a worker is waiting for another."""

import io
import re
import time
from pathlib import Path

import rich

from minihogwild import Run, load
from minihogwild.generate import DUET
from minihogwild.prompts import prompts_of
from minihogwild.show.lines import Lines
from minihogwild.show.panes import Panes

STEPS, WIDTH, HEIGHT = 196, 100, 31
PACE = 15  # steps a second


def main() -> None:
    rich.reconfigure(file=io.StringIO(), record=True, force_terminal=True, width=WIDTH, height=HEIGHT)
    run = Run(load(DUET, device="cpu"), prompts_of(DUET).problem)
    panes = Panes(Lines([worker.name for worker in run.workers]), run)
    for event in run:
        panes.show(event)
        if event["do"] == "step":
            time.sleep(1 / PACE)
        if panes.steps == STEPS:
            break
    console = rich.get_console()
    console.print(panes.frame(), end="")
    svg = console.export_svg(title="python -m minihogwild.generate", unique_id="live")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts from the network
    svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    Path(__file__).with_name("live.svg").write_text(svg)


if __name__ == "__main__":
    main()
