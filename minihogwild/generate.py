"""Workers that solve one problem together: the generation loop, and the command that runs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .cache import PAGE, Cache
from .config import InputError
from .layouts import COMMON, FINISHER, LAYOUTS, OTHERS, OWN, SEPARATOR
from .load import DTYPES, Model, load
from .memory import allocating
from .model import forward
from .prompts import Prompts, boxed, fill, load_prompts, paragraph_closed
from .sampling import Sampling, sample
from .text import Stream

PREFILL_CHUNK = 256  # tokens of the prompt that a step takes at most,
PREFILL_SCORES = 2**25  # and the attention scores of one layer: what bounds the memory of a long prompt
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
    tokens: int = 0  # how many of them were sampled
    paragraphs: list[str] = field(default_factory=list)  # sampled text of each, the last one still growing
    stream: Stream | None = None
    active: bool = True
    begins: bool = True  # `pending` is a prefix
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
        most = min(len(words.names), 16)
        if not 1 <= workers <= most:
            raise InputError(f"workers is {workers}: it must be from 1 to {most}")
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
        self.finisher_room = len(self.cue) + FINISHER_TOKENS if self.asks_for_answer else 0
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
        self.finishers_answer: str | None = None
        self.stopped_by: str | None = None

    @property
    def answer(self) -> str | None:
        """The first found, of the lowest worker; where they are independent, the majority's."""
        found = [answer for answer in (*(w.answer for w in self.workers), self.finishers_answer) if answer is not None]
        most_common = found[:1] if self.shared else [answer for answer, _ in Counter(found).most_common(1)]
        return most_common[0] if found else None

    def __iter__(self) -> Iterator[Event]:
        if any(self.cache.lengths.values()):
            raise RuntimeError("a Run runs once: make another")
        yield from self._prefill()
        while not self._stops():
            yield from self._step()
        yield from self._finish()

    def _prefill(self) -> Iterator[Event]:
        """The prompt in chunks, then all headers in one step. Neither is ever computed again."""
        limit, spare = self.model.config.context, self.finisher_room + len(self.workers)
        if len(self.prompt) + sum(map(len, self.headers.values())) + spare > limit:
            raise InputError(f"the prompt is {len(self.prompt)} tokens long, too long for a context of {limit}")
        steps, start = [], 0
        while start < len(self.prompt):
            scores = self.model.config.num_attention_heads * (start + PREFILL_CHUNK)  # of one token, in one layer
            stop = start + max(1, min(PREFILL_CHUNK, PREFILL_SCORES // scores))
            steps.append(([[COMMON]], [self.prompt[start:stop]]))
            start = stop
        if headers := {block: ids for block, ids in self.headers.items() if ids}:
            steps.append(([[COMMON, block] for block in headers], list(headers.values())))
        for views, tokens in steps:
            logits = self._feed(views, tokens)
            sampled: list[int | None] = [None] * len(views)
            if not self.shared and views is steps[-1][0]:  # each worker goes on from the prompt's last row
                sampled = sample(logits.expand(len(self.workers), -1), self.sampling, [w.random for w in self.workers])
            yield {"do": "step", "views": views, "tokens": tokens, "sampled": sampled}
        begun = [self._begin(worker) for worker in self.workers]
        if self.shared:
            yield from begun
        else:
            for worker, token in zip(self.workers, sampled):
                yield from self._take(worker, token)

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
        scores = plan.mask.numel() * config.num_attention_heads * plan.mask.itemsize  # bytes; with their softmax and
        nbytes = int(scores * (2 + config.head_dim / PAGE))  # the rotated queries they are the most of a step
        with allocating(nbytes, f"a step of {len(flat)} tokens", self.model.device):
            return forward(flat, self.model.weights, config, self.cache, plan)

    def _begin(self, worker: Worker) -> Event:
        """Queue the prefix of the worker's next paragraph."""
        worker.paragraphs.append("")
        text = fill(self.words.prefix, name=worker.name, number=len(worker.paragraphs)) if self.shared else ""
        worker.pending = self.model.tokenizer.encode(text)
        if self.since_check >= CHECK_AFTER and len(self.workers) > 1:
            self.since_check = 0
            text += self.words.check
            worker.pending += self.model.tokenizer.encode(self.words.check)
        worker.token_ids += worker.pending
        worker.begins = True
        worker.stream = self.model.tokenizer.stream(worker.pending or self.prompt[-8:])
        return {"do": "begin", "worker": worker.name, "text": text}

    def _take(self, worker: Worker, token: int) -> list[Event]:
        """Give a worker the token sampled for it, to be fed in the next step."""
        worker.pending = [token]
        worker.token_ids.append(token)
        worker.tokens += 1
        worker.begins = False
        text = worker.stream.next(token)
        worker.paragraphs[-1] += text
        if self.words.boxed and "}" in text and (answer := boxed("".join(worker.paragraphs))):
            worker.answer = answer
            worker.active = self.shared  # alone, it would have stopped here
        return [{"do": "text", "worker": worker.name, "text": text}] if text else []

    def _move(self, worker: Worker) -> Event:
        self.cache.move(worker.name, COMMON)
        return {"do": "move", "from": worker.name, "to": COMMON}

    def _stops(self) -> bool:
        answered = any(worker.answer for worker in self.workers)
        if not any(worker.active for worker in self.workers):
            self.stopped_by = "answer" if answered else "retired"
        elif answered and self.shared:
            self.stopped_by = "answer"
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

        lengths = [length(self.views[name], 0) for name in active]
        if self.asks_for_answer:
            lengths += [length(view, 1) + self.finisher_room for view in self.finishers.values()]
        return max(lengths) > self.model.config.context

    def _finish(self) -> Iterator[Event]:
        """Where there is no answer and the prompt asks for one: ask for it, over all that has been written.

        What was sampled last and has not been fed goes in together with the cue.
        """
        lacking: list[str | None] = [None] if self.shared else [w.name for w in self.workers if w.answer is None]
        if not self.asks_for_answer or (self.shared and self.answer is not None):
            return
        late = [worker for worker in self.workers if worker.active and not worker.begins]
        views = [self.views[worker.name] for worker in late] + [self.finishers[who] for who in lacking]
        tokens = [worker.pending for worker in late] + [self.cue for _ in lacking]
        written: dict[str | None, list[int]] = {who: [] for who in lacking}
        while lacking:
            logits = self._feed(views, tokens)[-len(lacking) :]
            self.finisher_steps += 1
            ids = logits.argmax(-1).tolist()
            yield {"do": "step", "views": views, "tokens": tokens, "sampled": [None] * (len(views) - len(ids)) + ids}
            for who, token in zip(lacking, ids):
                written[who].append(token)
            lacking = [who for who in lacking if not self._finished(who, written[who])]
            views, tokens = [self.finishers[who] for who in lacking], [written[who][-1:] for who in lacking]
        for who, ids in written.items():
            yield {"do": "finisher", "worker": who, "text": self.words.cue + self.model.tokenizer.decode(ids)}

    def _finished(self, who: str | None, written: list[int]) -> bool:
        answer = boxed(self.words.cue + self.model.tokenizer.decode(written))
        if who is None:
            self.finishers_answer = answer
        else:
            next(worker for worker in self.workers if worker.name == who).answer = answer
        return answer is not None or written[-1] in self.model.eos or len(written) >= FINISHER_TOKENS

    def summary(self) -> dict:
        """The result so far, ready for JSON. `text` holds prefixes too, `paragraphs` only what was sampled."""
        tokens = sum(worker.tokens for worker in self.workers)
        own = ("forward_steps", "finisher_steps", "seconds", "answer", "stopped_by", "seed")
        of_worker = ("name", "token_ids", "tokens", "paragraphs", "answer")
        decode = self.model.tokenizer.decode
        return {
            "model": self.model.name,
            "layout": self.layout_name,
            "sampling": vars(self.sampling),
            "prompt_tokens": len(self.prompt),
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
            "ms_per_step": 1000 * self.seconds / max(self.forward_steps, 1),
            **{key: getattr(self, key) for key in own},
            "workers": [
                {**{key: getattr(worker, key) for key in of_worker}, "text": decode(worker.token_ids)}
                for worker in self.workers
            ],
        }


# ---- the command


CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may write any; no terminal should obey


class Printer:
    """Prints a run's text as it grows: one worker as it comes, several line by line with the name before it."""

    def __init__(self, names: list[str]):
        self.unfinished = dict.fromkeys(names, "")

    def show(self, event: Event) -> None:
        name, text = event.get("worker"), CONTROL_CODES.sub("", event.get("text", ""))
        if event["do"] == "text" and len(self.unfinished) == 1:
            print(text, end="", flush=True)
        elif event["do"] == "text":
            *lines, self.unfinished[name] = (self.unfinished[name] + text).split("\n")
            self.say(name, lines)
        elif event["do"] in ("begin", "retire"):
            self.flush([name])
        elif event["do"] == "finisher":
            self.flush(list(self.unfinished))
            if len(self.unfinished) == 1:
                print()
            self.say(f"finisher of {name}" if name else "finisher", text.split("\n"))

    def flush(self, names: list[str]) -> None:
        for name in names:
            self.say(name, [self.unfinished[name]])
            self.unfinished[name] = ""

    def say(self, name: str, lines: list[str]) -> None:
        for line in filter(str.strip, lines):
            print(f"{name}: {line.strip()}", flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minihogwild",
        description="Several workers, one language model, one shared attention cache (arXiv 2504.06261).",
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the problem; without it, or as -, it is read from standard input")
    add("--model", required=True, help="a model folder, or the name of a hub repository")
    add("--workers", type=int, default=2, choices=range(1, 17), metavar="N", help="1 to 16 (default: 2)")
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
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("no prompt: give it as an argument, or on standard input")
    if given in (None, "-"):
        given = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        given.encode()  # an argument may hold stray bytes too
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8") from None
    if not given.strip():
        raise InputError("the prompt is empty")
    return given


def command(options: argparse.Namespace) -> int:
    if options.json:
        folder = options.json.absolute().parent
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"--json {options.json}: cannot be written there")
    prompt = read_prompt(options.prompt)
    prompts = load_prompts(options.prompts) if options.prompts else None
    chosen = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    Sampling(**chosen)  # refuses what is wrong before a model is loaded
    model = load(options.model, options.dtype, options.device)
    sampling = replace(model.sampling, **chosen)
    run = Run(model, prompt, options.workers, options.layout, options.max_steps, sampling, options.seed, prompts)
    printer = Printer([worker.name for worker in run.workers])
    failure: BaseException | None = None
    try:
        for event in run:
            printer.show(event)
    except (KeyboardInterrupt, InputError, torch.OutOfMemoryError) as error:
        failure = error  # what has been written until then is kept
    printer.flush(list(printer.unfinished))
    if len(run.workers) == 1 or run.answer is not None:
        print()
    if run.answer is not None:
        print("Answer:", CONTROL_CODES.sub("", run.answer), flush=True)
    if failure and not isinstance(failure, KeyboardInterrupt):
        raise failure
    result = run.summary()
    print(summary_line(result, interrupted=failure is not None), file=sys.stderr)
    if options.json:
        write_json(options.json, result)
    return 130 if failure else 0


def summary_line(result: dict, interrupted: bool) -> str:
    by_worker = ", ".join(f"{worker['name']} {worker['tokens']}" for worker in result["workers"])
    finisher = f" + {result['finisher_steps']} of the finisher" if result["finisher_steps"] else ""
    return (
        f"\n{result['forward_steps']} forward steps{finisher}, {result['tokens']} tokens ({by_worker}), "
        f"{result['tokens_per_second']:.1f} tokens/s, {result['ms_per_step']:.1f} ms per step; "
        f"stopped by {'you' if interrupted else result['stopped_by']}"
    )


def write_json(path: Path, result: dict) -> None:
    """Write beside, then rename: the file is whole, or as it was."""
    text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text, "utf-8")
        return
    path = path.resolve()
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """The command `minihogwild`. Exit code 2, with one line on standard error, for what can't be done."""
    logging.basicConfig(format="minihogwild: %(message)s")
    options = arguments().parse_args(argv)
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks is no reason to stop
    try:
        return command(options)
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"minihogwild: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
