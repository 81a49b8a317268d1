"""A decode step of several workers, beside what memory allows: the bytes it must read, at copy speed.

    python benchmarks/decode.py --shape qwq-32b --layers 16
    python benchmarks/decode.py MODEL --dtype float32 --workers 1,2,4 --contexts 128,1024
    torchrun --nproc-per-node 2 benchmarks/decode.py --shape qwq-32b

Takes a model's folder, or a shape with random weights, and runs on a GPU where there is one. The context is a common
block; each worker has a block of its own after it. Shown are the median of all steps but the very first, which compiles
and records; of the first fifty of them alone; and what the host does for a step, on its own clock, in those fifty. With
--whole, the same beside a whole run: sampling, step ends, moves and text. The last line is one JSON object.

Under torchrun several GPUs share the model, and what memory allows is that of rank 0. Shown besides are the same steps
with sums by NCCL alone, and without any sums, whose results are nonsense; and of each rank how long it took to load (or
to invent) its part, and the memory that it then had at most.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from minihogwild import Cache, Config, LayerKind, Model, Rope, Run, Sampling, Weights, load
from minihogwild.backend import PyTorchBackend, choose_backend
from minihogwild.commands import ranks_started
from minihogwild.gpu.several import Ranks, SharedBackend, join
from minihogwild.hub import DTYPES, Tokenizer
from minihogwild.hub.checkpoint import Extras, empty_weights
from minihogwild.hub.quantized import Awq, Packed, Plain, Rounded
from minihogwild.model import step_on_device
from minihogwild.packed import EightBit, FourBit, Stacked
from minihogwild.plan import bytes_of_token
from minihogwild.weights import Dense, Matrix

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

FIRST = 50  # steps that are shown by themselves


@dataclass
class Shape:
    """The numbers of a well-known model."""

    V: int
    E: int
    F: int
    L: int
    H: int
    K: int
    D: int
    rope: Rope
    tied: bool = False
    biases: bool = False
    qk_norms: bool = False
    experts: int = 0  # of a layer
    experts_of_token: int = 0


LLAMA_3_ROPE = Rope("llama3", 500000.0, 8.0, 8192, 1.0, 4.0)
SHAPES = {
    "qwq-32b": Shape(152064, 5120, 27648, 64, 40, 8, 128, Rope(rope_theta=1e6), biases=True),
    "qwen3-30b-a3b": Shape(
        151936, 2048, 768, 48, 32, 4, 128, Rope(rope_theta=1e6), qk_norms=True, experts=128, experts_of_token=8
    ),
    "qwen3-8b": Shape(151936, 4096, 12288, 36, 32, 8, 128, Rope(rope_theta=1e6), qk_norms=True),
    "llama-3.1-8b": Shape(128256, 4096, 14336, 32, 32, 8, 128, LLAMA_3_ROPE),
    "llama-3.3-70b": Shape(128256, 8192, 28672, 80, 64, 8, 128, LLAMA_3_ROPE),
    "smollm2-135m": Shape(49152, 576, 1536, 30, 9, 3, 64, Rope(rope_theta=1e5), tied=True),
}

STORAGES = {
    "plain": Plain(),
    "8": Rounded(8),
    "4": Rounded(4),
    "awq": Packed(Awq(group=128), stored=["lm_head.weight"], dtype_of_scale=torch.float16),  # the head is plain
}


def main() -> None:
    options = arguments().parse_args()
    ranks = None
    if ranks_started() > 1:
        if options.whole:
            sys.exit("--whole: it runs in one process alone")
        ranks = join("decode")
        if ranks.rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end
    torch.manual_seed(0)
    device = torch.device(options.device)
    speed = copy_speed(device)  # before there is a model: its copies are large
    began = time.perf_counter()
    config, weights = load_or_invent(options, ranks)
    load_seconds = time.perf_counter() - began
    dtype = weights.embed.dtype
    backends = backends_of(device, dtype, ranks)
    machine = {"device": name_of(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(*(f"{key} {value}" for key, value in machine.items()), sep=" · ")

    token_bytes = bytes_of_token(config, dtype)
    print(f"{options.model or options.shape}, {config.num_hidden_layers} layers, {options.dtype}, {options.weights}")
    print(f"copy speed {speed / 1e9:.0f} GB/s; the model has {weights.nbytes / 1e9:.3f} GB, ", end="")
    print(f"{token_bytes} bytes a token\n")
    heads = "workers  context   reference        step   ratio   first 50   host of those   tokens/s   step(W)/step(1)"
    print("   ".join([heads, *(way for way in backends if way != "step")]))
    results = []
    ms_of_first = {}  # by context: of the first number of workers
    for context in options.contexts:
        for workers in options.workers:
            by_way = {}
            for way, backend in backends.items():
                by_way[way] = measure(config, weights, workers, context, options.steps, backend)
            measured = by_way.pop("step")
            others = {way: of_way.ms for way, of_way in by_way.items()}
            weight_bytes = bytes_read_of(weights, config, workers)
            reference = 1e3 * (weight_bytes + measured.tokens * token_bytes) / speed
            ms_of_first.setdefault(context, measured.ms)
            result = {
                "workers": workers,
                "context": context,
                "reference_ms": reference,
                "ms": measured.ms,
                "ratio": measured.ms / reference,
                "first_ms": measured.first_ms,
                "host_ms": measured.host_ms,
                "tokens_per_second": 1e3 * workers / measured.ms,
                "cost": measured.ms / ms_of_first[context],
            }
            print("{:7} {:8} {:8.3f} ms {:8.3f} ms {:7.3f} {:7.3f} ms {:12.3f} ms {:10.1f} {:17.3f}".format(
                *result.values()), end="")  # fmt: skip
            print("".join(f"   {ms:{len(way) - 3}.3f} ms" for way, ms in others.items()), flush=True)
            results.append({key: round(value, 4) for key, value in (result | others).items()})
    if options.whole:
        add_whole_runs(results, config, weights, options.steps)
    of_ranks = tell_of_ranks(ranks, load_seconds, weights, device)
    made = {"copy_bytes_per_second": round(speed), "weight_bytes": weights.nbytes, "cache_bytes_per_token": token_bytes}
    made["ranks"] = of_ranks
    print(json.dumps({**vars(options), **machine, "layers": config.num_hidden_layers, **made, "results": results}))
    if ranks is not None:
        ranks.end(0)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", help="a model folder")
    add("--shape", choices=SHAPES, default="smollm2-135m", help="random weights (default: smollm2-135m)")
    add("--layers", type=int, metavar="N", help="of the shape: only so many")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--weights", choices=STORAGES, default="plain", help="of the shape: how they are stored (default: plain)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=numbers, default=[1, 4, 8], metavar="N,N", help="default: 1,4,8")
    add("--contexts", type=numbers, default=[1024, 16384], metavar="N,N", help="default: 1024,16384")
    add("--steps", type=int, default=100, metavar="N", help="measured for each, at least 50 (default: 100)")
    add("--whole", action="store_true", help="time whole runs too, sampled at temperature 0.6, top-k 40, top-p 0.95")
    return parser


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def backends_of(device: torch.device, dtype: torch.dtype, ranks: Ranks | None) -> dict[str, PyTorchBackend]:
    """What is measured, by name; "step", the usual one, among them."""
    usual = choose_backend(device, dtype, ranks=ranks)
    if ranks is None:
        return {"step": usual}
    ways = {"without sums": WithoutSums(choose_backend(device, dtype), ranks)}
    if device.type == "cuda":
        ways["sums by NCCL"] = SumsOfNccl(choose_backend(device, dtype), ranks)
    return ways | {"step": usual}


class WithoutSums(SharedBackend):
    """All else that ranks do: what it computes is nonsense."""

    def reduce(self, x: Tensor) -> Tensor:
        return x


class SumsOfNccl(SharedBackend):
    def reduce(self, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        return x


def tell_of_ranks(ranks: Ranks | None, load_seconds: float, weights: Weights, device: torch.device) -> list[dict]:
    """Of each rank: seconds to load, bytes of its weights, and the most memory that it has had, here and on a GPU."""
    own = {"load_seconds": round(load_seconds, 2), "weight_bytes": weights.nbytes}
    own["host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        own["gpu_bytes"] = torch.cuda.max_memory_allocated()
    if ranks is None:
        return [own]
    of_ranks = {ranks.rank: own} | ranks.exchange(own)
    print()
    for rank, numbers in of_ranks.items():
        print(f"rank {rank}:", ", ".join(f"{name} {number:,}" for name, number in numbers.items()))
    return list(of_ranks.values())


def load_or_invent(options: argparse.Namespace, ranks: Ranks | None = None) -> tuple[Config, Weights]:
    if options.model:
        loaded = load(options.model, options.dtype, options.device, ranks=ranks)
        return loaded.config, loaded.weights
    shape = SHAPES[options.shape]
    layers = shape.L if options.layers is None else options.layers
    config = Config(
        vocab_size=shape.V,
        hidden_size=shape.E,
        intermediate_size=shape.F,
        num_attention_heads=shape.H,
        num_key_value_heads=shape.K,
        head_dim=shape.D,
        rms_norm_eps=1e-5,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.tied,
        rope=shape.rope,
        layer_kinds=(LayerKind(experts=shape.experts > 0),) * layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_of_token,
        moe_intermediate_size=shape.F,
        norm_topk_prob=True,
    )
    storage = STORAGES[options.weights]
    dtype = DTYPES[options.dtype]
    extras = Extras(biases=shape.biases, qk_norms=shape.qk_norms)
    if ranks is None:
        weights, _ = empty_weights(config, dtype, options.device, extras, storage)
    else:
        format = storage.format if isinstance(storage, Packed) else None
        quantize = storage.bits if isinstance(storage, Rounded) else None
        share = ranks.share_of(config, format, quantize, torch.device(options.device))
        weights, _ = share.empty_weights(dtype, options.device, extras, storage)
        config = share.config
    parts = [weights.embed, weights.norm, weights.head]
    for layer in weights.layers:
        parts += vars(layer).values()
    parts.sort(key=lambda part: not isinstance(part, Tensor))  # first what all ranks have, and so the same numbers
    for part in parts:
        fill_at_random(part)
    return config, weights


def fill_at_random(part: Tensor | Matrix | None) -> None:
    """Numbers of the size that a model's have."""
    if isinstance(part, Tensor) and part.dim() == 1:
        part.normal_(1, 0.1)
    elif isinstance(part, Tensor):
        part.normal_(0, part.shape[-1] ** -0.5)
    elif isinstance(part, Dense):
        fill_at_random(part.tensor)
    elif isinstance(part, Stacked):
        for matrix in part.parts:
            fill_at_random(matrix)
    elif isinstance(part, EightBit):
        part.codes.random_(-127, 128)
        part.scale.fill_(part.codes.shape[-1] ** -0.5 / 64)
    elif isinstance(part, FourBit):
        limits = torch.iinfo(part.codes.dtype)
        part.codes.random_(limits.min, limits.max)
        part.scale.fill_(part.shape[1] ** -0.5 / 4)
        part.zero.random_(7, 10)


def bytes_read_of(weights: Weights, config: Config, workers: int) -> float:
    """All that a step reads; of the embedding, that is a few rows; of experts, those that somebody chooses."""
    total = weights.norm.nbytes + weights.head.nbytes
    for layer in weights.layers:
        total += layer.nbytes
        if layer.router is not None:
            not_chosen = (1 - config.num_experts_per_tok / config.num_experts) ** workers  # where all are alike
            total -= not_chosen * (layer.gate_up.nbytes + layer.down.nbytes)
    return total


@dataclass
class Measured:
    ms: float  # of a step, the median
    first_ms: float  # of the first fifty after the one that compiles and records
    host_ms: float  # what the host needed for each of those
    tokens: int  # in the cache, at the end


@torch.no_grad()  # as `forward`, so that both are compiled once
def measure(
    config: Config, weights: Weights, workers: int, context: int, steps: int, backend: PyTorchBackend | None = None
) -> Measured:
    """Steps of so many workers. What is sampled is fed, as in a run, and the host does not wait for it."""
    device = weights.embed.device
    names = [f"worker {w}" for w in range(workers)]
    cache = Cache(config, ["common", *names], weights.embed.dtype, device, backend)
    cache.extend([["common"], *([name] for name in names)], [context, *[1] * workers])
    for kv in cache.layers:
        kv.keys.normal_()
        kv.values.normal_()
    views = [["common", *(name for name in names if name != own), own] for own in names]
    tokens = torch.randint(config.vocab_size, (workers,), device=device)
    marks = []
    host_seconds = []
    for _ in range(max(steps, FIRST) + 2):
        began = time.perf_counter()
        logits = step_on_device(views, [1] * workers, tokens, weights, config, cache)
        host_seconds.append(time.perf_counter() - began)
        tokens = logits.argmax(-1)
        marks.append(mark(device))
    step_ms = [1e3 * seconds for seconds in seconds_between(marks, device)]  # the step that compiles is no gap
    return Measured(
        ms=median(step_ms),
        first_ms=median(step_ms[:FIRST]),
        host_ms=1e3 * median(host_seconds[1 : FIRST + 1]),
        tokens=sum(cache.lengths.values()),
    )


def add_whole_runs(results: list[dict], config: Config, weights: Weights, steps: int) -> None:
    print("\nworkers  context   whole run, a step   ratio to the bare step")
    for result in results:
        took = 1e3 * time_whole_run(config, weights, result["workers"], result["context"], steps)
        result["whole_ms"] = round(took, 4)
        result["whole_ratio"] = round(took / result["ms"], 4)
        print("{workers:7} {context:8} {whole_ms:16.3f} ms {whole_ratio:24.3f}".format(**result), flush=True)


def time_whole_run(config: Config, weights: Weights, workers: int, context: int, steps: int) -> float:
    """Median seconds from step to step of a run, text and all, with a prompt of about `context` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.save_tokenizer(Path(folder))  # of bytes: what random weights write needs no better one
        tokenizer = Tokenizer(Path(folder))
        sampling = Sampling(temperature=0.6, top_k=40, top_p=0.95)
        model = Model(folder, Path(folder), config, weights, tokenizer, sampling, eos=frozenset())
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


def seconds_between(marks: list, device: torch.device) -> list[float]:
    if device.type != "cuda":
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, the best of ten large copies."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        began = mark(device)
        target.copy_(source)
        ended = mark(device)
        [seconds] = seconds_between([began, ended], device)
        best = min(best, seconds)
    nbytes = 2 * source.nbytes
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that nvidia-smi shows what the model takes
    return nbytes / best


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
