"""Workers that solve one problem together: the generation loop, and the command that runs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from .cache import Cache
from .config import InputError
from .layouts import COMMON, FINISHER, LAYOUTS, OTHERS, OWN, SEPARATOR
from .load import DTYPES, Model, load
from .memory import allocating
from .model import forward
from .prompts import Prompts, boxed, fill, load_prompts, paragraph_closed
from .sampling import Sampling, sample

PREFILL_CHUNK = 256  # tokens of the prompt that a step takes at most,
PREFILL_SCORES = 2**26  # and the attention scores of one layer: what bounds the memory of a long prompt
CHECK_AFTER = 1024  # tokens sampled by all workers between two redundancy checks
FINISHER_TOKENS = 64

Event = dict  # see Run


@dataclass
class Worker:
    """One writer: what it has written, and what it feeds in the next step."""

    name: str
    random: torch.Generator
    pending: list[int] = field(default_factory=list)  # fed in the next step: a prefix, or one sampled token
    token_ids: list[int] = field(default_factory=list)  # all of its own: prefixes and sampled
    sampled: int = 0  # how many of them were sampled
    paragraphs: list[str] = field(default_factory=list)  # sampled text of each, the last one still growing
    decoder: DecodeStream | None = None
    active: bool = True
    begins: bool = True  # what it feeds next is a prefix
    answer: str | None = None


class Run:
    """One problem, `workers` writers, one cache. Iterate over a Run to run it; it yields events as they happen:

        {"do": "step", "views", "tokens", "sampled"}   a forward pass (None: nothing was sampled from that row)
        {"do": "move", "from", "to"}                   a finished paragraph went to the common block
        {"do": "begin", "worker", "text"}              a prefix was queued
        {"do": "text", "worker", "text"}               readable text grew
        {"do": "retire", "worker"}                     the worker has ended its text
        {"do": "finisher", "worker", "text"}           the finisher wrote; worker is None where it speaks for all

    The steps and moves, in order, are a schedule that can be replayed. `summary()` tells the result, at any time.
    Raises InputError for what can't be run.
    """

    def __init__(
        self,
        model: Model,
        problem: str,
        workers: int = 2,
        layout: str | None = None,  # combined, or independent for one worker
        max_steps: int = 1024,
        sampling: Sampling | None = None,  # the model's own
        seed: int = 0,
        prompts: Prompts | None = None,  # the model's own, or the default
    ):
        own_prompts = model.folder / "prompts.json"
        self.words = words = prompts or (load_prompts(own_prompts) if own_prompts.exists() else Prompts())
        if not 1 <= workers <= len(words.names):
            raise InputError(f"workers is {workers}: it must be from 1 to {len(words.names)}")
        self.layout_name = layout or ("combined" if workers > 1 else "independent")
        if self.layout_name not in LAYOUTS:
            raise InputError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
        if max_steps < 1:
            raise InputError(f"max_steps is {max_steps}: it must be at least 1")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}: it must be from 0 to 2**32 - 1")
        if not problem.strip():
            raise InputError("the prompt is empty")
        self.model, self.max_steps, self.seed = model, max_steps, seed
        self.sampling = model.sampling if sampling is None else sampling
        self.layout = LAYOUTS[self.layout_name]
        self.shared = self.layout.prefix  # else the workers know nothing of each other

        names = list(words.names[:workers])
        text = words.together if self.shared else words.alone
        text = fill(text, problem=problem, n=workers, names=", ".join(names), first=names[0])
        encode = model.tokenizer.encode
        self.prompt = model.tokenizer.chat(text)
        headers = {OTHERS: words.header_others, OWN: words.header_own, SEPARATOR: words.separator}
        self.headers = {block: encode(headers[block]) for block in self.layout.headers}
        self.cue = encode(words.cue)
        self.asks_for_answer = words.boxed and "\\boxed" in text
        self.views = {name: self.layout.view(name, [n for n in names if n != name]) for name in names}
        if self.shared:
            self.finishers = {None: [COMMON, *names, FINISHER]}
        else:
            self.finishers = {name: [COMMON, name, f"{FINISHER} {name}"] for name in names}
        blocks = [COMMON, *self.headers, *names, *(view[-1] for view in self.finishers.values())]
        self.cache = Cache(model.config, blocks, model.dtype, model.device)

        # Streams of different seeds and workers are all different
        randoms = [torch.Generator().manual_seed(seed * 16 + w) for w in range(workers)]
        self.workers = [Worker(name, random) for name, random in zip(names, randoms)]
        self.forward_steps = self.finisher_steps = self.since_check = 0
        self.seconds = 0.0  # of the forward steps and all that goes with them, without prefill and finisher
        self.answer: str | None = None
        self.stopped_by: str | None = None

    def __iter__(self) -> Iterator[Event]:
        yield from self._prefill()
        while not self._stops():
            yield from self._step()
        if self.stopped_by != "answer" or not self.shared:
            yield from self._finish()
        if not self.shared:
            answers = [worker.answer for worker in self.workers if worker.answer is not None]
            self.answer = Counter(answers).most_common(1)[0][0] if answers else None

    def _prefill(self) -> Iterator[Event]:
        """The prompt in chunks, then all headers in one step. Neither is ever computed again."""
        limit, spare = self.model.config.context, self._finisher_room() + len(self.workers)
        if len(self.prompt) + spare > limit:
            raise InputError(f"the prompt is {len(self.prompt)} tokens long, too long for a context of {limit}")
        chunks, start = [], 0
        while start < len(self.prompt):
            row = self.model.config.num_attention_heads * (start + PREFILL_CHUNK)  # scores of one token
            stop = start + max(1, min(PREFILL_CHUNK, PREFILL_SCORES // row))
            chunks.append(self.prompt[start:stop])
            start = stop
        for tokens in chunks[:-1]:
            self._feed([[COMMON]], [tokens])
            yield {"do": "step", "views": [[COMMON]], "tokens": [tokens], "sampled": [None]}
        logits = self._feed([[COMMON]], chunks[-1:])
        if self.shared:
            yield {"do": "step", "views": [[COMMON]], "tokens": chunks[-1:], "sampled": [None]}
            yield from self._prefill_headers()
            for worker in self.workers:
                yield self._begin(worker)
        else:  # each worker goes on from the prompt's last row
            ids = sample(logits.expand(len(self.workers), -1), self.sampling, [w.random for w in self.workers])
            yield {"do": "step", "views": [[COMMON]], "tokens": chunks[-1:], "sampled": ids}
            for worker, token in zip(self.workers, ids):
                worker.paragraphs, worker.decoder = [""], self.model.tokenizer.stream(self.prompt[-8:])
                yield from self._take(worker, token)

    def _prefill_headers(self) -> Iterator[Event]:
        headers = {block: ids for block, ids in self.headers.items() if ids}
        if headers:
            views, tokens = [[COMMON, block] for block in headers], list(headers.values())
            self._feed(views, tokens)
            yield {"do": "step", "views": views, "tokens": tokens, "sampled": [None] * len(views)}

    def _step(self) -> Iterator[Event]:
        """One forward pass of all active workers, and what follows from it for each."""
        began = time.perf_counter()
        active = [worker for worker in self.workers if worker.active]
        views, tokens = [self.views[worker.name] for worker in active], [worker.pending for worker in active]
        logits = self._feed(views, tokens)
        self.forward_steps += 1
        events, rows = [], []
        for row, worker in enumerate(active):
            if worker.pending[-1] in self.model.eos:
                worker.active = False
                events.append({"do": "retire", "worker": worker.name})
                if self.layout.moves_retired:
                    events.append(self._move(worker))
            elif self.layout.paragraphs and paragraph_closed(worker.paragraphs[-1]):
                events += [self._move(worker), self._begin(worker)]
            else:
                self.since_check += 1
                rows.append(row)
        sampled: list[int | None] = [None] * len(active)
        if rows:
            ids = sample(logits[rows], self.sampling, [active[row].random for row in rows])
            for row, token in zip(rows, ids):
                sampled[row] = token
                events += self._take(active[row], token)
        self.seconds += time.perf_counter() - began
        yield {"do": "step", "views": views, "tokens": tokens, "sampled": sampled}
        yield from events

    def _feed(self, views: list[list[str]], tokens: list[list[int]]) -> Tensor:
        flat = torch.tensor([token for ids in tokens for token in ids], device=self.model.device)
        plan = self.cache.extend(views, [len(ids) for ids in tokens])
        config = self.model.config
        scores = plan.mask.numel() * config.num_attention_heads * 4  # bytes; they and their softmax are the most of it
        with allocating(2 * scores, f"a step of {len(flat)} tokens", self.model.device):
            return forward(flat, self.model.weights, config, self.cache, plan)

    def _begin(self, worker: Worker) -> Event:
        """Queue the prefix of the worker's next paragraph."""
        worker.paragraphs.append("")
        text = fill(self.words.prefix, name=worker.name, number=len(worker.paragraphs))
        worker.pending = self.model.tokenizer.encode(text)
        if self.since_check >= CHECK_AFTER and len(self.workers) > 1:
            self.since_check = 0
            text += self.words.check
            worker.pending += self.model.tokenizer.encode(self.words.check)
        worker.token_ids += worker.pending
        worker.begins = True
        worker.decoder = self.model.tokenizer.stream(worker.pending)
        return {"do": "begin", "worker": worker.name, "text": text}

    def _take(self, worker: Worker, token: int) -> Iterator[Event]:
        """Give a worker the token sampled for it, to be fed in the next step."""
        worker.pending = [token]
        worker.token_ids.append(token)
        worker.sampled += 1
        worker.begins = False
        if text := self.model.tokenizer.next_text(worker.decoder, token):
            worker.paragraphs[-1] += text
            yield {"do": "text", "worker": worker.name, "text": text}
        if self.words.boxed and "}" in text and (answer := boxed("".join(worker.paragraphs))):
            worker.answer = answer
            if self.answer is None and self.shared:
                self.answer = answer
            if not self.shared:
                worker.active = False  # alone, it would have stopped here

    def _move(self, worker: Worker) -> Event:
        self.cache.move(worker.name, COMMON)
        return {"do": "move", "from": worker.name, "to": COMMON}

    def _stops(self) -> bool:
        if self.answer is not None:
            self.stopped_by = "answer"
        elif not any(worker.active for worker in self.workers):
            self.stopped_by = "answer" if any(worker.answer for worker in self.workers) else "retired"
        elif self.forward_steps >= self.max_steps:
            self.stopped_by = "steps"
        elif self._outgrows():
            self.stopped_by = "context"
        return self.stopped_by is not None

    def _outgrows(self) -> bool:
        """Would a view outgrow the context in the next step, or leave the finisher no room after it?"""
        active = {worker.name: worker for worker in self.workers if worker.active}

        def length(view: list[str], more: int) -> int:
            pending = sum(len(active[block].pending) + more for block in view if block in active)
            return sum(self.cache.lengths[block] for block in view) + pending

        longest = max(length(self.views[name], 0) for name in active)
        finishers = max(length(view, 1) for view in self.finishers.values()) + self._finisher_room()
        return max(longest, finishers if self.asks_for_answer else 0) > self.model.config.context

    def _finisher_room(self) -> int:
        return len(self.cue) + FINISHER_TOKENS if self.asks_for_answer else 0

    def _finish(self) -> Iterator[Event]:
        """Where there is no answer and the prompt asks for one: ask for it, over all that has been written.

        What was sampled last and has not been fed goes in together with the cue.
        """
        lacking = [w.name for w in self.workers if w.answer is None] if not self.shared else [None]
        if not self.asks_for_answer or not lacking:
            return
        late = [w for w in self.workers if w.active and not w.begins]
        views = [self.views[w.name] for w in late] + [self.finishers[who] for who in lacking]
        tokens = [w.pending for w in late] + [self.cue for _ in lacking]
        written: dict[str | None, list[int]] = {who: [] for who in lacking}
        going = lacking
        while going:
            logits = self._feed(views, tokens)[-len(going) :]
            self.finisher_steps += 1
            ids = logits.argmax(-1).tolist()
            yield {"do": "step", "views": views, "tokens": tokens, "sampled": [None] * (len(views) - len(ids)) + ids}
            for who, token in zip(going, ids):
                written[who].append(token)
            going = [who for who in going if not self._finished(who, written[who])]
            views, tokens = [self.finishers[who] for who in going], [written[who][-1:] for who in going]
        for who in lacking:
            yield {"do": "finisher", "worker": who, "text": self.words.cue + self.model.tokenizer.decode(written[who])}

    def _finished(self, who: str | None, written: list[int]) -> bool:
        answer = boxed(self.words.cue + self.model.tokenizer.decode(written))
        if who is None:
            self.answer = answer
        else:
            next(worker for worker in self.workers if worker.name == who).answer = answer
        return answer is not None or written[-1] in self.model.eos or len(written) >= FINISHER_TOKENS

    def summary(self) -> dict:
        """The result so far, ready for JSON. `text` holds prefixes too, `paragraphs` only what was sampled."""
        tokens = sum(worker.sampled for worker in self.workers)
        return {
            "model": self.model.name,
            "layout": self.layout_name,
            "seed": self.seed,
            "sampling": vars(self.sampling),
            "prompt_tokens": len(self.prompt),
            "forward_steps": self.forward_steps,
            "finisher_steps": self.finisher_steps,
            "tokens": tokens,
            "seconds": self.seconds,
            "ms_per_step": 1000 * self.seconds / max(self.forward_steps, 1),
            "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
            "answer": self.answer,
            "stopped_by": self.stopped_by,
            "workers": [
                {
                    "name": worker.name,
                    "text": self.model.tokenizer.decode(worker.token_ids),
                    "token_ids": worker.token_ids,
                    "tokens": worker.sampled,
                    "paragraphs": worker.paragraphs,
                    "answer": worker.answer,
                }
                for worker in self.workers
            ],
        }


# ---- the command


class Printer:
    """Prints a run's text as it grows: one worker as it comes, several line by line with the name before it."""

    def __init__(self, names: list[str]):
        self.lines = {name: "" for name in names}

    def show(self, event: Event) -> None:
        if event["do"] == "text" and len(self.lines) == 1:
            print(event["text"], end="", flush=True)
        elif event["do"] == "text":
            *lines, self.lines[event["worker"]] = (self.lines[event["worker"]] + event["text"]).split("\n")
            self.print_lines(event["worker"], lines)
        elif event["do"] in ("move", "retire"):
            self.flush([event.get("worker") or event["from"]])
        elif event["do"] == "finisher":
            self.flush(list(self.lines))
            of = f" of {event['worker']}" if event["worker"] else ""
            print(f"(finisher{of}) {event['text'].strip()}", flush=True)

    def flush(self, names: list[str]) -> None:
        if len(self.lines) > 1:
            for name in names:
                self.print_lines(name, [self.lines[name]])
                self.lines[name] = ""

    def print_lines(self, name: str, lines: list[str]) -> None:
        for line in lines:
            if line.strip():
                print(f"{name}: {line.strip()}", flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minihogwild",
        description="Several workers, one language model, one shared attention cache (arXiv 2504.06261).",
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the problem; without it, or as -, it is read from standard input")
    add("--model", required=True, help="a model folder, or the name of a hub repository")
    add("--workers", type=int, default=2, metavar="N", help="1 to 16 (default: 2)")
    add("--layout", choices=LAYOUTS, help="what workers see of each other (default: combined; independent for one)")
    add("--max-steps", type=int, default=1024, metavar="N", help="forward passes after the prompt (default: 1024)")
    add("--temperature", type=float, help="0 takes the likeliest token (default: the model's, as the next three)")
    add("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="keep the fewest likeliest tokens that reach probability P; 1: all")
    add("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest; 0: all")
    add("--seed", type=int, default=0, help="same seed, same text, on the same machine and dtype (default: 0)")
    add("--prompts", type=Path, metavar="FILE", help="the words that make workers cooperate, as JSON")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: the checkpoint's")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--json", type=Path, metavar="FILE", help="write the result, with each worker's text and token ids")
    return parser


def read_prompt(given: str | None) -> str:
    if given not in (None, "-"):
        prompt = given
    elif sys.stdin is None or (given is None and sys.stdin.isatty()):
        raise InputError("no prompt: give it as an argument, or on standard input")
    else:
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if not prompt.isprintable() and any("\ud800" <= char <= "\udfff" for char in prompt):
        raise InputError("the prompt is not valid UTF-8")
    return prompt


def command(options: argparse.Namespace) -> int:
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        raise InputError(f"--json {options.json}: cannot be written there")
    prompt = read_prompt(options.prompt)
    prompts = load_prompts(options.prompts) if options.prompts else None
    model = load(options.model, options.dtype, options.device)
    chosen = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    sampling = replace(model.sampling, **{key: value for key, value in chosen.items() if value is not None})
    run = Run(model, prompt, options.workers, options.layout, options.max_steps, sampling, options.seed, prompts)
    printer = Printer([worker.name for worker in run.workers])
    interrupted = False
    try:
        for event in run:
            printer.show(event)
    except KeyboardInterrupt:
        interrupted = True
    printer.flush(list(printer.lines))
    if len(run.workers) == 1 or run.answer is not None:
        print()
    if run.answer is not None:
        print(f"Answer: {run.answer}", flush=True)
    result = run.summary()
    print(summary_line(result, interrupted), file=sys.stderr)
    if options.json:
        write_json(options.json, result)
    return 130 if interrupted else 0


def summary_line(result: dict, interrupted: bool) -> str:
    by_worker = ", ".join(f"{worker['name']} {worker['tokens']}" for worker in result["workers"])
    finisher = f" + {result['finisher_steps']} of the finisher" if result["finisher_steps"] else ""
    return (
        f"\n{result['forward_steps']} forward steps{finisher}, {result['tokens']} tokens ({by_worker}), "
        f"{result['tokens_per_second']:.1f} tokens/s, {result['ms_per_step']:.1f} ms per step; "
        f"stopped by {'you' if interrupted else result['stopped_by']}"
    )


def write_json(path: Path, result: dict) -> None:
    """Write beside, then rename: the file is whole or as it was."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", "utf-8")
    beside.replace(path)


def main(argv: list[str] | None = None) -> int:
    """The command `minihogwild`. Exit code 2, with one line on standard error, for what can't be done."""
    logging.basicConfig(format="minihogwild: %(message)s")
    options = arguments().parse_args(argv)
    try:
        return command(options)
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError) as error:
        print(f"minihogwild: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
