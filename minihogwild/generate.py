"""Workers that solve one problem together: the generation loop, and the command that runs it."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode

import torch
from huggingface_hub.utils import disable_progress_bars
from rich import get_console
from torch import Tensor

from .cache import Cache
from .commands import CONTROL_CODES, Parser, require_writable, run_command, spare_threads, write_whole
from .config import require
from .layouts import COMMON, FINISHER, LAYOUTS
from .load import DTYPES, Model, load
from .model import step
from .prompts import Prompts, boxed, fill, load_prompts, paragraph_closed, prompts_of
from .replay import digest, schedule_json
from .sampling import Sampling, sample
from .text import Stream

PREFILL_CHUNK = 256  # tokens of the prompt that a step takes at most (where kernels keep no scores: 1024),
PREFILL_SCORES = 2**25  # and the attention scores of one layer: what bounds the memory of a long prompt
CHECK_AFTER = 1024  # tokens sampled by all workers between two redundancy checks
FINISHER_TOKENS = 64


@dataclass
class Writer:
    """Who writes to a block (a worker, a finisher, the prompt): what it has written, and what it feeds next."""

    name: str
    view: list[str]  # blocks; the last is its own
    pending: list[int] = field(default_factory=list)  # fed in the next step: what it begins with, or one sampled token
    begins: bool = True  # `pending` was not sampled
    random: torch.Generator | None = None
    stream: Stream | None = None
    token_ids: list[int] = field(default_factory=list)  # all of its own: prefixes and sampled
    tokens: int = 0  # how many of them were sampled
    paragraphs: list[str] = field(default_factory=list)  # sampled text of each (after a finisher's cue); the last grows
    active: bool = True
    answer: str | None = None


class Run:
    """One problem, `workers` writers, one cache. Iterate over a Run to run it; it yields events as they happen:

        {"do": "step", "views", "tokens", "sampled"}   a forward pass (None: nothing was sampled from that row)
        {"do": "move", "from", "to"}                   a finished paragraph went to the common block
        {"do": "begin", "worker", "text"}              a prefix was queued (empty where workers are independent)
        {"do": "text", "worker", "text"}               readable text grew; of a finisher, the cue comes first
        {"do": "retire", "worker"}                     the worker has ended its text

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
        self.words = words = prompts or prompts_of(model.folder)
        most = min(len(words.names), 16)
        require(1 <= workers <= most, f"workers is {workers}: it must be from 1 to {most}")
        self.layout = layout or ("combined" if workers > 1 else "independent")
        require(self.layout in LAYOUTS, f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
        require(max_steps >= 1, f"max_steps is {max_steps}: it must be at least 1")
        require(0 <= seed < 2**32, f"seed is {seed}: it must be from 0 to 2**32 - 1")
        self.model, self.max_steps, self.seed = model, max_steps, seed
        self.sampling = sampling or model.sampling
        self.rules = LAYOUTS[self.layout]
        self.shared = self.rules.prefix  # else the workers know nothing of each other

        names, encode = words.names[:workers], model.tokenizer.encode
        text = words.together if self.shared else words.alone
        text = fill(text, problem=problem, n=workers, names=", ".join(names), first=names[0])
        self.prompt = model.tokenizer.chat(text)
        require(problem.strip() and self.prompt, "the prompt is empty")
        self.headers = [Writer(block, [COMMON, block], encode(words.headers[block])) for block in self.rules.headers]
        self.workers = [Writer(name, self.rules.view(name, [n for n in names if n != name])) for name in names]
        for w, worker in enumerate(self.workers):
            worker.random = torch.Generator().manual_seed(seed * 16 + w)  # no two seeds share a worker's stream
        asked = words.boxed and "\\boxed" in text
        seen = {FINISHER: names} if self.shared else {f"{FINISHER} of {name}": [name] for name in names}
        self.finishers = [Writer(name, [COMMON, *seen[name], name], encode(words.cue)) for name in seen if asked]
        blocks = [COMMON, *(writer.name for writer in self.headers + self.workers + self.finishers)]
        self.cache = Cache(model.config, blocks, model.dtype, model.device)

        self.forward_steps = self.finisher_steps = self.since_check = 0
        self.logits: Tensor | None = None  # [W, V], of the step that was last yielded
        # The next step begins before the host has read what was drawn after the last one: a GPU need not wait.
        self.ahead = model.device.type == "cuda" and (self.shared or workers == 1)
        self.drawn: Tensor | None = None  # the ids last sampled, one for each row of which any was; see `model.step`
        self.outstanding: tuple | None = None  # a step that was not told yet
        self.seconds = 0.0  # of the forward steps and all that goes with them, without prefill and finisher
        self.stopped_by: str | None = None

    @property
    def answer(self) -> str | None:
        """The first found, of the lowest worker; where they are independent, the majority's (of a tie, the first)."""
        found = [writer.answer for writer in self.workers + self.finishers if writer.answer]
        return mode(found[:1] if self.shared else found) if found else None

    def __iter__(self) -> Iterator[dict]:
        if any(self.cache.lengths.values()):
            raise RuntimeError("a Run runs once: make another")
        yield from self._prefill()
        yield from [self._begin(worker) for worker in self.workers]
        while not self._reason_to_stop():
            yield from self._step()
        yield from self._learn()
        self.stopped_by = self._reason_to_stop()
        yield from self._finish()

    def _prefill(self) -> Iterator[dict]:
        """The prompt in chunks, then all headers in one step. Neither is ever computed again."""
        config = self.model.config
        lengths = {COMMON: len(self.prompt), **{header.name: len(header.pending) for header in self.headers}}
        too_long = f"the prompt is {len(self.prompt)} tokens long, too long for a context of {config.context}"
        require(not self._outgrows(lengths), too_long)
        # Alone, a worker goes on from the prompt's last token: each feeds it to a block of its own.
        prompt = self.prompt if self.shared else self.prompt[:-1]
        # So that the longest step, the last, has no more scores than it may
        chunk = max(1, min(PREFILL_CHUNK, PREFILL_SCORES // (config.num_attention_heads * len(self.prompt))))
        chunk = 1024 if self.cache.static else chunk
        steps = [[Writer(COMMON, [COMMON], prompt[start : start + chunk])] for start in range(0, len(prompt), chunk)]
        steps.append([header for header in self.headers if header.pending])
        for writers in filter(None, steps):
            event, self.logits = self._feed(writers)
            yield event

    def _step(self) -> Iterator[dict]:
        """One forward pass of all active workers, and what follows from it for each."""
        began = time.perf_counter()
        active = [worker for worker in self.workers if worker.active]
        event, logits = self._feed(active)
        told = self._learn() if self.ahead else []  # of the step before, while a GPU computes this one
        if not self._answered():  # else this step was in vain
            follows, rows = [], []
            for row, worker in enumerate(active):
                if worker.pending[-1] in self.model.eos and not worker.begins:
                    worker.active = False
                    follows.append({"do": "retire", "worker": worker.name})
                    follows += [self._move(worker)] if self.rules.moves_retired else []
                elif self.rules.paragraphs and paragraph_closed(worker.paragraphs[-1]):
                    follows += [self._move(worker), self._begin(worker)]
                else:
                    self.since_check += 1
                    rows.append(row)
            ids = self._draw(logits, rows, [active[row] for row in rows]) if rows else list
            self.outstanding = event, logits, follows, rows, active, ids
            told = told if self.ahead else self._learn()
        self.seconds += time.perf_counter() - began
        yield from told

    def _draw(self, logits: Tensor, rows: list[int], workers: list[Writer]) -> Callable[[], list[int]]:
        """Sample the next tokens of some rows. They may be fed before the host knows them: calling the result waits."""
        chosen = torch.tensor(rows).to(logits.device, non_blocking=True)
        self.drawn = sample(logits[chosen], self.sampling, [worker.random for worker in workers])
        for n, worker in enumerate(workers):
            worker.pending, worker.begins = [-1 - n], False
        return to_host(self.drawn)

    def _learn(self) -> list[dict]:
        """The last step's events, with the tokens that were drawn after it; none where they have been told."""
        if not self.outstanding:
            return []
        (event, self.logits, follows, rows, active, ids), self.outstanding = self.outstanding, None
        self.forward_steps += 1
        for row, token in zip(rows, ids()):
            worker = active[row]
            unsound = f"step {self.forward_steps}: {worker.name}'s logits are NaN or infinite: try float32"
            require(token >= 0, unsound)
            event["sampled"][row] = worker.pending[0] = token  # where it has been fed already, also in that event
            follows += self._take(worker, token)
        return [event, *follows]

    def _feed(self, writers: list[Writer]) -> tuple[dict, Tensor]:
        """Feed what each writer has pending. Returns the event (what is sampled is yet to be put in) and the logits."""
        views, tokens = [writer.view for writer in writers], [writer.pending for writer in writers]
        logits = step(views, tokens, self.model.weights, self.model.config, self.cache, self.drawn)
        return {"do": "step", "views": views, "tokens": tokens, "sampled": [None] * len(views)}, logits

    def _begin(self, worker: Writer) -> dict:
        """Queue the prefix of the worker's next paragraph."""
        worker.paragraphs.append("")
        text = fill(self.words.prefix, name=worker.name, number=len(worker.paragraphs)) if self.shared else ""
        prefix = self.model.tokenizer.encode(text)
        if self.shared and self.since_check >= CHECK_AFTER and len(self.workers) > 1:
            self.since_check = 0
            text += self.words.check
            prefix += self.model.tokenizer.encode(self.words.check)
        worker.token_ids += prefix
        worker.pending, worker.begins = prefix or self.prompt[-1:], True
        worker.stream = Stream(self.model.tokenizer, prefix or self.prompt[-8:])
        return {"do": "begin", "worker": worker.name, "text": text}

    def _take(self, writer: Writer, token: int) -> list[dict]:
        """Give a writer the token that was sampled for it."""
        writer.token_ids.append(token)
        writer.tokens += 1
        text = writer.stream.next(token)
        writer.paragraphs[-1] += text
        if self.words.boxed and "}" in text and (answer := boxed("".join(writer.paragraphs))):
            writer.answer = answer
            writer.active = self.shared  # alone, it would have stopped here
        return [{"do": "text", "worker": writer.name, "text": text}] if text else []

    def _move(self, worker: Writer) -> dict:
        self.cache.move(worker.name, COMMON)
        return {"do": "move", "from": worker.name, "to": COMMON}

    def _answered(self) -> bool:
        """Is the problem solved? Where the workers are independent, each is to have its answer, or to have retired."""
        answered = any(worker.answer for worker in self.workers)
        return answered and (self.shared or not any(worker.active for worker in self.workers))

    def _reason_to_stop(self) -> str | None:
        if self._answered():
            return "answer"
        if not any(worker.active for worker in self.workers):
            return "retired"
        if self.forward_steps + bool(self.outstanding) >= self.max_steps:
            return "steps"
        return "context" if self._outgrows(self.cache.lengths) else None

    def _outgrows(self, lengths: dict[str, int]) -> bool:
        """From blocks this long, would a view outgrow the context in a step, or leave the finisher no room after it?"""
        active = [worker for worker in self.workers if worker.active]
        lengths = Counter(lengths) + Counter({worker.name: len(worker.pending) for worker in active})
        after = lengths + Counter(worker.name for worker in active)  # what is sampled in that step, and not yet fed
        most = [sum(lengths[block] for block in worker.view) for worker in active]
        for finisher in self.finishers:
            most.append(sum(after[block] for block in finisher.view) + len(finisher.pending) + FINISHER_TOKENS)
        return max(most) > self.model.config.context

    def _finish(self) -> Iterator[dict]:
        """Where there is no answer and the prompt asks for one: ask for it, over all that has been written.

        What was sampled last and has not been fed goes in together with the cue.
        """
        answered = {worker.name for worker in self.workers if worker.answer}
        writing = [finisher for finisher in self.finishers if not answered.intersection(finisher.view)]
        for finisher in writing:
            finisher.paragraphs, finisher.stream = [self.words.cue], Stream(self.model.tokenizer, finisher.pending)
            yield {"do": "text", "worker": finisher.name, "text": self.words.cue}
        feeding = [worker for worker in self.workers if worker.active and not worker.begins] + writing
        while writing:
            event, self.logits = self._feed(feeding)
            self.finisher_steps += 1
            last = self.logits[-len(writing) :]
            require((last < torch.inf).all(), "the finisher's logits are NaN or infinite: try float32")
            event["sampled"][-len(writing) :] = ids = last.argmax(-1).tolist()
            yield event
            for finisher, token in zip(writing, ids):
                finisher.pending = [token]
                yield from self._take(finisher, token)
                ended = token in self.model.eos or finisher.tokens == FINISHER_TOKENS
                finisher.active = not (ended or finisher.answer)
            writing = feeding = [finisher for finisher in writing if finisher.active]

    def summary(self) -> dict:
        """The result so far, ready for JSON. `text` holds prefixes too, `paragraphs` what was sampled."""
        own = ("forward_steps", "finisher_steps", "seconds", "answer", "stopped_by", "layout", "seed")
        of_writer = ("name", "answer", "tokens", "token_ids", "paragraphs")
        result = {"model": self.model.name, "sampling": vars(self.sampling), **{key: getattr(self, key) for key in own}}
        result["prompt_tokens"] = len(self.prompt)
        result["tokens"] = sum(worker.tokens for worker in self.workers)
        result["tokens_per_second"] = result["tokens"] / self.seconds if self.seconds else 0.0
        result["ms_per_step"] = 1000 * self.seconds / max(self.forward_steps, 1)
        for kind, writers in (("workers", self.workers), ("finishers", [f for f in self.finishers if f.tokens])):
            result[kind] = [{key: getattr(writer, key) for key in of_writer} for writer in writers]
            for writer in result[kind]:
                writer["text"] = self.model.tokenizer.decode(writer["token_ids"])
        return result


def to_host(ids: Tensor) -> Callable[[], list[int]]:
    """Begin to copy ids to the host. The result waits for them alone, not for what the GPU is given to do next."""
    if ids.device.type != "cuda":
        return ids.tolist
    host = ids.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return lambda: done.synchronize() or host.tolist()


# ---- the command


DUET = Path(__file__).with_name("duet")
PACE = 15  # steps a second that an eye can follow


class Printer:
    """Prints a run's text as it grows: one worker's as it comes, several workers' line by line, each with its name."""

    def __init__(self, workers: list[str]):
        self.workers = workers
        self.growing = dict.fromkeys(workers, "")  # by writer: its unfinished line

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *_) -> None:
        self.end(list(self.growing))

    def show(self, event: dict) -> None:
        if event["do"] == "text":
            self.write(event["worker"], CONTROL_CODES.sub("", event["text"]))
        elif "worker" in event and len(self.workers) > 1:
            self.end([event["worker"]])

    def write(self, name: str, text: str) -> None:
        if len(self.workers) == 1:
            print(text, end="", flush=True)
            return
        if name not in self.workers:  # a finisher speaks after all of them
            self.end(self.workers)
        *lines, self.growing[name] = (self.growing.get(name, "") + text).split("\n")
        for line in filter(str.strip, lines):
            print(f"{name}: {line.strip()}", flush=True)

    def end(self, names: list[str]) -> None:
        """End the lines that these are writing."""
        for name in names:
            self.write(name, "\n")


def arguments() -> Parser:
    parser = Parser("minihogwild", description="Several workers, one language model, one shared attention cache.")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the problem; -: standard input; none: that, else the model's own")
    add("--model", default=str(DUET), help="a model folder, or a hub repository's name (default: duet, bundled)")
    add("--workers", type=int, default=2, choices=range(1, 17), metavar="N", help="1 to 16 (default: 2)")
    add("--layout", choices=LAYOUTS, help="what workers see of each other (default: combined; independent for one)")
    add("--max-steps", type=int, default=1024, metavar="N", help="forward passes after the prompt (default: 1024)")
    add("--temperature", type=float, help="0 takes the likeliest token (default: the model's, as the next three)")
    add("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="keep the fewest likeliest tokens that reach probability P; 1: all")
    add("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest; 0: all")
    add("--seed", type=int, default=0, help="same seed, same text, on the same machine and dtype (default: 0)")
    add("--prompts", type=Path, metavar="FILE", help="the words that make workers cooperate, as JSON")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: config.json's")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--pace", type=float, metavar="N", help=f"at most N steps a second; 0: any (default: {PACE} on a terminal)")
    add("--plain", action="store_true", help="on a terminal too, print line by line and draw nothing")
    add("--json", type=Path, metavar="FILE", help="write the result, with each worker's text and token ids")
    add("--record", type=Path, metavar="FILE", help="write the run's schedule, for minihogwild.replay")
    add("--trace", type=Path, metavar="FILE", help="write an HTML page: what each worker saw and attended to, by step, "
        "layer and head (where that is too much for a page: by layer, or on average)")  # fmt: skip
    return parser


def read_prompt(given: str | None, default: str) -> str:
    if given in (None, "-"):
        nobody = sys.stdin is None or (given is None and sys.stdin.isatty())
        read = "" if nobody else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        given = default if given is None and not read.strip() else read
    require(given.strip(), "the prompt is empty: give it as an argument, or on standard input")
    return given


def command(options: argparse.Namespace) -> int:
    written = {"--json": options.json, "--record": options.record, "--trace": options.trace}
    for option, path in written.items():
        if path:
            others = [written[other] for other in written if other != option]
            require_writable(path, option, options.prompts, *others, *Path(options.model).glob("*"))
    terminal = bool(sys.stdout and sys.stdout.isatty())
    drawn = terminal and not options.plain and get_console().is_interactive  # not where TERM is dumb
    if options.plain or (terminal and not drawn):
        disable_progress_bars()
    pace = options.pace if options.pace is not None else PACE * terminal
    require(pace == 0 or 0.01 <= pace < float("inf"), f"pace is {pace}: it must be 0 (none), or 0.01 or more")
    chosen = {key: value for key in vars(Sampling()) if (value := getattr(options, key)) is not None}
    Sampling(**chosen)  # refuses what is wrong before a model is loaded
    prompts = load_prompts(options.prompts) if options.prompts else None
    prompt = read_prompt(options.prompt, default := (prompts or prompts_of(Path(options.model))).problem)
    model = load(options.model, options.dtype, options.device)
    spare_threads(model.config)
    sampling = replace(model.sampling, **chosen)
    run = Run(model, prompt, options.workers, options.layout, options.max_steps, sampling, options.seed, prompts)
    run.ahead = run.ahead and not pace  # while we pause, nobody would note how long the step took
    if options.prompt is None and prompt == default:
        print(CONTROL_CODES.sub("", prompt), end="\n\n", flush=True)
    due, recorded = time.monotonic(), []
    view = Printer([worker.name for worker in run.workers])
    if drawn:
        from .live import Panes  # not above: where nothing is drawn, nothing of it is imported

        view = Panes(view, prompt, len(run.prompt))
    try:
        with view:
            for event in run:
                hashed = options.record and event["do"] == "step"
                if (options.record or options.trace) and event["do"] != "text":
                    recorded.append(event | ({"digest": digest(run.logits)} if hashed else {}))
                if event["do"] == "step" and pace:
                    time.sleep(max(0, due - time.monotonic()))
                    due = max(due, time.monotonic()) + 1 / pace
                view.show(event)
    except KeyboardInterrupt:  # what has been written until then is kept
        run.stopped_by = "interrupt"
    report(run, result := run.summary())
    blocks = [*run.cache.lengths]
    del run  # the page's replay needs room for a cache of its own
    if options.json:
        write_whole(options.json, [json.dumps(result, ensure_ascii=False, indent=2).encode(), b"\n"])
    if options.record:
        write_whole(options.record, [schedule_json(blocks, recorded)])
    if options.trace:
        from .trace import page  # not above: what watches is no part of the engine

        write_whole(options.trace, [page(blocks, recorded, model, result)])
    return 130 if result["stopped_by"] == "interrupt" else 0


def report(run: Run, result: dict) -> None:
    """The answer, for standard output; figures, for standard error."""
    if run.answer:
        print("\nAnswer:", CONTROL_CODES.sub("", run.answer), flush=True)
    by_worker = ", ".join(f"{worker.name} {worker.tokens}" for worker in run.workers)
    finisher = f" + {run.finisher_steps} of the finisher" if run.finisher_steps else ""
    print(
        f"\n{run.forward_steps} forward steps{finisher}, {result['tokens']} tokens ({by_worker}), "
        f"{result['tokens_per_second']:.1f} tokens/s, {result['ms_per_step']:.1f} ms per step; "
        f"stopped by {run.stopped_by}",
        file=sys.stderr,
    )


def main(argv: list[str] | None = None) -> int:
    """The command `minihogwild`."""
    return run_command(command, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
