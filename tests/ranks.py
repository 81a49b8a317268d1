"""Processes that share a model, as torchrun starts them: here they are forked from one that has PyTorch loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from processes import answer_all_signals
from safetensors.torch import save_file
from util import Engine, configs, fill_at_random, relative_difference, run, schedules

from minihogwild import Config, evaluate, generate, load, replay
from minihogwild.backend import PyTorchBackend
from minihogwild.gpu.several import Ranks, SharedBackend, join
from minihogwild.hub.checkpoint import Extras, Stored, empty_weights, load_weights

COMMANDS = {"generate": generate, "evaluate": evaluate, "replay": replay}
SECONDS = 120


class Started:
    """So many ranks, each of which runs `function(*arguments)`; `wait` gives their exit codes, and what they said."""

    def __init__(self, count: int, folder: Path, function: Callable, *arguments: object):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ranks"])
        self.folder = folder
        # The store is ours, as it is torchrun's: it outlives all ranks.
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), wait_for_workers=False)
        self.processes = []
        for rank in range(count):
            given = (rank, count, self.store.port, folder, function, arguments)
            self.processes.append(context.Process(target=begin, args=given, daemon=True))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """The exit codes. A process that has not ended by then is killed, and its code is that."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def out(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def all_said(self) -> str:
        """What stands on standard error, of all of them."""
        return "".join(self.err(rank) for rank in range(len(self.processes)))


def begin(rank: int, count: int, port: int, folder: Path, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin = open(0)  # noqa: SIM115  to the end
    answer_all_signals()
    torch.set_num_threads(1)
    function(*arguments)


def command(module: str, *arguments: object) -> None:
    """A command of the package, as in a process of its own."""
    sys.argv = [module, *map(str, arguments)]
    sys.exit(COMMANDS[module].main())


# ---- the engine, on all ranks at once


def finish(ranks: Ranks, found: object, folder: Path) -> None:
    """Note what this rank has found, and end."""
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.wait_for_all()
    ranks.end(0)


def draw_models(examples: int, count: int) -> list[tuple]:
    """The same on all ranks: (config, extras, dtype, seed, page size, blocks, events).

    Each can be shared by `count` ranks. Where it has fewer heads of keys than that, some are repeated.
    """
    drawn = []
    extras = st.builds(Extras, biases=st.booleans(), out_bias=st.booleans(), qk_norms=st.booleans())
    dtypes = st.sampled_from([torch.float64, torch.float32])

    @seed(0)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], derandomize=False)
    @given(configs(), extras, dtypes, st.integers(0, 99), st.sampled_from([2, 5, 64]), schedules(5))
    def draw(shape, extras, dtype, number, page, schedule):
        H, K, F = shape.num_attention_heads, shape.num_key_value_heads, shape.moe_intermediate_size
        heads = H * count if count > K else H
        shape = replace(shape, num_attention_heads=heads, moe_intermediate_size=max(F, count))
        drawn.append((shape, extras, dtype, number, page, *schedule))

    draw()
    return drawn


def compare_models(folder: Path, examples: int) -> None:
    """Random models and schedules: the ranks' logits beside those of one process. Notes the differences, by dtype."""
    ranks = join("test")
    found = {"torch.float64": [], "torch.float32": []}
    drawn = draw_models(examples, ranks.count)
    for number, (shape, extras, dtype, random, page, blocks, events) in enumerate(drawn):
        whole, places = empty_weights(shape, dtype, "cpu", extras)
        fill_at_random(places, random)
        own = folder / f"{ranks.rank} {number}"
        own.mkdir()
        save_file({name: tensor.clone() for name, tensor in places.items()}, own / "model.safetensors")
        share = ranks.share_of(shape, None, None, torch.device("cpu"))
        weights = load_weights(own, shape, dtype, torch.device("cpu"), share=share)
        engine = Engine(share.config, weights, blocks, page, SharedBackend(PyTorchBackend(), ranks))
        ours = list(run(engine, events))
        theirs = list(run(Engine(shape, whole, blocks, page), events))
        found[str(dtype)].append(max(relative_difference(a, b) for a, b in zip(ours, theirs)))
    finish(ranks, found, folder)


def compare_folders(folder: Path, folders: dict[str, tuple[Path, int | None]], dtype: str, tokens: list[int]) -> None:
    """Models from files: differences, and bytes read and kept of each by this rank, beside those of one process."""
    ranks = join("test")
    found = {}
    for name, (path, quantize) in folders.items():
        with bytes_read() as whole_read:
            whole = load(path, dtype, "cpu", with_tokenizer=False, quantize=quantize)
        with bytes_read() as read:
            model = load(path, dtype, "cpu", with_tokenizer=False, quantize=quantize, ranks=ranks)
        difference = compare_one(model.config, model.weights, whole, ranks, tokens)
        found[name] = {
            "difference": difference,
            "read": sum(read) / sum(whole_read),
            "kept": model.weights.nbytes / whole.weights.nbytes,
        }
    finish(ranks, found, folder)


def compare_one(config: Config, weights, whole, ranks: Ranks, tokens: list[int]) -> float:
    blocks = ["common", "a", "b"]
    events = [
        {"do": "step", "views": [["common"]], "tokens": [tokens]},
        {"do": "step", "views": [["common", "b", "a"], ["common", "a", "b"]], "tokens": [tokens[:2], tokens[2:3]]},
        {"do": "move", "from": "a", "to": "common"},
        {"do": "step", "views": [["common", "b", "a"], ["common", "a", "b"]], "tokens": [tokens[3:4], tokens[4:5]]},
    ]
    ours = list(run(Engine(config, weights, blocks, backend=SharedBackend(PyTorchBackend(), ranks)), events))
    theirs = list(run(Engine(whole.config, whole.weights, blocks), events))
    return max(relative_difference(a, b) for a, b in zip(ours, theirs))


@contextmanager
def bytes_read():
    """A list, to which each tensor that is read from a file adds its size."""
    sizes = []
    original = Stored.read

    def read(self: Stored) -> torch.Tensor:
        tensor = original(self)
        sizes.append(tensor.nbytes)
        return tensor

    with patch.object(Stored, "read", read):
        yield sizes
