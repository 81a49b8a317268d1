"""Time per decode step: W workers over one common prompt, against transformers' cached decode of W such sequences.

And against the linear reference: every weight matrix, as it is stored, times one row, nothing else. All three run in
one process and take turns, so that a busy machine slows all. Ratios are medians too. With --quantize our weights are
rounded, and theirs are not. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import sys
import timeit
from pathlib import Path
from statistics import median

import torch
import transformers

from minihogwild import Cache, Model, forward, load

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import smollm2

PROMPT, CHUNK = 1024, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quantize", type=int, choices=[8, 4], help="round our weights to so many bits")
    parser.add_argument("--steps", type=int, default=60, help="measured of each, for each number of workers")
    options = parser.parse_args()
    folder = options.model or smollm2.folder()
    machine = {"cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(*(f"{key} {value}" for key, value in machine.items()), sep=" · ")

    ours = load(folder, options.dtype, "cpu", quantize=options.quantize)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype).eval()
    floor = 1e3 * sum(parameter.nbytes for parameter in theirs.parameters()) / copy_speed()
    stored = f"{options.dtype}, our weights in {options.quantize} bits" if options.quantize else options.dtype
    print(f"{Path(folder).name}, {stored}, prompt of {PROMPT} tokens, medians of {options.steps} steps")
    print(f"to read the weights once, at copy speed: {floor:.1f} ms\n")
    print("workers   minihogwild   transformers   ratio   linear reference   ratio")
    results = []
    for workers in (1, 2, 4):
        seconds = measure(ours, theirs, workers, options.steps)
        our, their, linear = (1e3 * median(column) for column in zip(*seconds))
        to_theirs, to_linear = (median(step[0] / step[n] for step in seconds) for n in (1, 2))
        print(
            f"{workers:7} {our:10.1f} ms {their:11.1f} ms {to_theirs:7.2f} {linear:15.1f} ms {to_linear:7.2f}",
            flush=True,
        )
        names = ("workers", "ms", "transformers_ms", "ratio", "linear_ms", "linear_ratio")
        numbers = (workers, our, their, to_theirs, linear, to_linear)
        results.append({name: round(number, 3) for name, number in zip(names, numbers)})
    print(json.dumps({**vars(options), "model": Path(folder).name, "prompt": PROMPT, **machine, "results": results}))


@torch.inference_mode()
def measure(ours: Model, theirs, workers: int, steps: int) -> list[tuple[float, float, float]]:
    """(our seconds, theirs, the linear reference's) of each decode step."""
    prompt = torch.randint(ours.config.vocab_size, (PROMPT,))
    names = [f"worker {w}" for w in range(workers)]
    views = [["prompt", *(name for name in names if name != own), own] for own in names]
    cache, past = Cache(ours.config, ["prompt", *names], ours.dtype), transformers.DynamicCache(config=theirs.config)
    for chunk in prompt.split(CHUNK):
        forward(chunk, ours.weights, ours.config, cache, cache.extend([["prompt"]], [len(chunk)]))
    theirs(prompt[None], past_key_values=past, logits_to_keep=1)
    past.batch_repeat_interleave(workers)
    E, F = ours.config.hidden_size, ours.config.intermediate_size
    mixed = ours.config.num_attention_heads * ours.config.head_dim
    products = [(ours.weights.head, torch.randn(1, E, dtype=ours.dtype))]
    for layer in ours.weights.layers:
        for matrix, columns in ((layer.qkv, E), (layer.out, mixed), (layer.gate_up, E), (layer.down, F)):
            products.append((matrix, torch.randn(1, columns, dtype=ours.dtype)))
    step = {
        "ours": lambda: forward(tokens, ours.weights, ours.config, cache, cache.extend(views, [1] * workers)),
        "theirs": lambda: theirs(tokens[:, None], past_key_values=past),
        "linear": lambda: [matrix.times(row) for matrix, row in products],
    }
    times = []
    for n in range(steps):
        tokens = torch.randint(ours.config.vocab_size, (workers,))
        seconds = {who: timeit.timeit(step[who], number=1) for who in sorted(step, reverse=n % 2 == 0)}
        times.append(tuple(seconds[who] for who in step))
    return times


def copy_speed() -> float:
    """Bytes per second, read and written."""
    source, target = torch.ones(2, 2**26)
    return 2 * source.nbytes / min(timeit.repeat(lambda: target.copy_(source), number=1, repeat=10))


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else "unknown"


if __name__ == "__main__":
    main()
