"""A decode step of several workers, beside what memory allows: the bytes it must read, at copy speed.

    python benchmarks/decode.py --shape qwq-32b --layers 16
    python benchmarks/decode.py MODEL --dtype float32 --workers 1,2,4 --contexts 128,1024

Takes a model's folder, or a shape with random weights, and runs on a GPU where there is one. The context is a common
block; each worker has a block of its own after it. With --whole, the same beside a whole run: sampling, step ends,
moves and text. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from minihogwild import Cache, Config, Model, Rope, Sampling, load
from minihogwild.generate import Run
from minihogwild.load import DTYPES, empty_weights
from minihogwild.model import step
from minihogwild.text import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

LLAMA3 = Rope("llama3", 500000.0, 8.0, 8192, 1.0, 4.0)
SHAPES = {  # V, E, F, L, H, K, D; tied head, biases, q/k norms
    "qwq-32b": ((152064, 5120, 27648, 64, 40, 8, 128), False, True, False, Rope(rope_theta=1e6)),
    "qwen3-8b": ((151936, 4096, 12288, 36, 32, 8, 128), False, False, True, Rope(rope_theta=1e6)),
    "llama-3.1-8b": ((128256, 4096, 14336, 32, 32, 8, 128), False, False, False, LLAMA3),
    "smollm2-135m": ((49152, 576, 1536, 30, 9, 3, 64), True, False, False, Rope(rope_theta=1e5)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    add = parser.add_argument
    add("model", nargs="?", help="a model folder")
    add("--shape", choices=SHAPES, help="random weights (default: smollm2-135m)")
    add("--layers", type=int, metavar="N", help="of the shape: only so many")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=numbers, default=[1, 4, 8], metavar="N,N", help="default: 1,4,8")
    add("--contexts", type=numbers, default=[1024, 16384], metavar="N,N", help="default: 1024,16384")
    add("--steps", type=int, default=60, metavar="N", help="measured for each (default: 60)")
    add("--whole", action="store_true", help="time whole runs too, sampled at temperature 0.6, top-k 40, top-p 0.95")
    options = parser.parse_args()
    torch.manual_seed(0)
    config, weights, dtype = model(options)
    device = torch.device(options.device)
    machine = {"device": name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(*(f"{key} {value}" for key, value in machine.items()), sep=" · ")

    speed = copy_speed(device)
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None]
    nbytes = sum(tensor.nbytes for tensor in [*layers, weights.norm, weights.head])  # of embed, a few rows
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    print(f"{options.model or options.shape}, {config.num_hidden_layers} layers, {options.dtype}")
    print(f"copy speed {speed / 1e9:.0f} GB/s; a step reads {nbytes / 1e9:.3f} GB of weights, {token} bytes a token\n")
    print("workers  context   reference        step   ratio   tokens/s   step(W) / step(1)   growth with context")
    results, ms = [], {}
    for context in options.contexts:
        for workers in options.workers:
            seconds, length = measure(config, weights, dtype, device, workers, context, options.steps)
            reference = 1e3 * (nbytes + length * token) / speed
            ms[workers, context] = took = 1e3 * seconds
            cost, growth = took / ms[options.workers[0], context], took / ms[workers, options.contexts[0]]
            row = (workers, context, reference, took, took / reference, 1e3 * workers / took, cost, growth)
            print("{:7} {:8} {:8.3f} ms {:8.3f} ms {:7.3f} {:10.1f} {:19.3f} {:21.3f}".format(*row), flush=True)
            keys = ("workers", "context", "reference_ms", "ms", "ratio", "tokens_per_second", "cost", "growth")
            results.append(dict(zip(keys, (round(number, 4) for number in row))))
    if options.whole:
        print("\nworkers  context   whole run, a step   ratio to the bare step")
        for result in results:
            took = 1e3 * whole(config, weights, result["workers"], result["context"], options.steps)
            result |= {"whole_ms": round(took, 4), "whole_ratio": round(took / result["ms"], 4)}
            print("{workers:7} {context:8} {whole_ms:16.3f} ms {whole_ratio:24.3f}".format(**result), flush=True)
    made = {"copy_bytes_per_second": round(speed), "weight_bytes": nbytes, "cache_bytes_per_token": token}
    print(json.dumps({**vars(options), **machine, "layers": config.num_hidden_layers, **made, "results": results}))


def model(options: argparse.Namespace) -> tuple:
    """(Config, Weights, dtype)"""
    if options.model:
        loaded = load(options.model, options.dtype, options.device)
        return loaded.config, loaded.weights, loaded.dtype
    options.shape = options.shape or "smollm2-135m"
    (V, E, F, L, H, K, D), tied, biases, qk_norms, rope = SHAPES[options.shape]
    config = Config(V, E, F, options.layers or L, H, K, D, 1e-5, 40960, tied, rope)
    dtype = DTYPES[options.dtype]
    weights, parts = empty_weights(config, dtype, options.device, biases, qk_norms)
    for part in parts.values():
        part.normal_(1, 0.1) if part.dim() == 1 else part.normal_(0, part.shape[1] ** -0.5)
    return config, weights, dtype


@torch.no_grad()  # as `forward`, so that both are compiled once
def measure(config, weights, dtype, device, workers: int, context: int, steps: int) -> tuple[float, int]:
    """Median seconds of a step, and how many tokens the cache then holds. What is sampled is fed, as in a run."""
    names = [f"worker {w}" for w in range(workers)]
    cache = Cache(config, ["common", *names], dtype, device)
    cache.extend([["common"], *([name] for name in names)], [context, *[1] * workers])
    for tensor in cache.keys + cache.values:
        tensor.normal_()
    views = [["common", *(name for name in names if name != own), own] for own in names]
    tokens, fed = torch.randint(config.vocab_size, (workers,), device=device), [[-1 - w] for w in range(workers)]
    marks = []
    for _ in range(steps + 6):  # the first record the step, and go unmeasured
        tokens = step(views, fed, weights, config, cache, tokens).argmax(-1)
        marks.append(mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        marks = [marks[0].elapsed_time(event) / 1e3 for event in marks]
    return median(after - before for before, after in pairwise(marks[5:])), sum(cache.lengths.values())


def whole(config, weights, workers: int, context: int, steps: int) -> float:
    """Median seconds from step to step of a run, text and all, with a prompt of about `context` tokens."""
    with tempfile.TemporaryDirectory() as name:
        tiny.save_tokenizer(Path(name))  # of bytes: what random weights write needs no better one
        sampling = Sampling(temperature=0.6, top_k=40, top_p=0.95)
        model = Model(name, Path(name), config, weights, Tokenizer(Path(name)), sampling, eos=frozenset())
        words = len(Run(model, "a", workers).prompt)
        run = Run(model, "a" * max(1, context - words + 1), workers, max_steps=steps + 6)
        marks = []
        for event in run:
            if event["do"] == "step" and run.forward_steps and not run.finisher_steps:
                marks.append(time.perf_counter())
    return median(after - before for before, after in pairwise(marks[5:]))


def mark(device: torch.device):
    """Now: for a GPU an event in its stream, so that the host runs ahead of it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, the best of ten large copies."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        began = mark(device)
        target.copy_(source)
        ended = mark(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            began, ended = 0, began.elapsed_time(ended) / 1e3
        best = min(best, ended - began)
    return 2 * source.nbytes / best


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
