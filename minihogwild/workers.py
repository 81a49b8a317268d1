"""Workers that solve one problem together: the generation loop, without the model.

A `Run` computes nothing. It says what it wants to be fed, and is told what came of it:

    while (feed := run.next_feed()) is not None:
        logits = ...                                 # one forward pass: rows of feed.views, fed with feed.tokens
        decision = run.decide()                      # who retires, whose paragraph has closed, who samples
        ...                                          # decision.moves, in the cache
        token_ids = ...                              # one from each row in decision.rows
        events = run.learn(token_ids)                # what has happened, for whoever watches

`drive` does that with a model and a cache, `drive_together` for several runs at once, and a test with a script. One
other order is allowed where `can_run_ahead`, and unless `next_feed_depends_on_tokens`: the next `next_feed` may come
before `learn` (decide, next_feed, learn, decide, ...). gpu/pipeline.py uses it, so that a GPU need not wait.
`for event in Run(...)` takes the right driver. Events are dicts:

    {"do": "step", "views", "tokens", "sampled"}   a forward pass (None: nothing was sampled from that row)
    {"do": "move", "from", "to", "worker"}         a finished paragraph went to the common block
    {"do": "drop", "block"}                        a block was emptied: what a finisher wrote at a budget
    {"do": "begin", "worker", "text"}              a prefix was queued (empty where workers are independent)
    {"do": "text", "worker", "text"}               readable text grew; of a finisher, the cue comes first
    {"do": "retire", "worker"}                     the worker has ended its text

The steps, moves and drops, in order, are a schedule that can be replayed.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mode

import torch
from torch import Tensor

from .backend import PyTorchBackend
from .cache import Cache
from .errors import refusing, require, require_kind, whole_number
from .hub import END_OF_THINK, Model, TextStream, opening_of
from .layouts import (
    COMMON,
    LAYOUTS,
    answer_block_of,
    block_of,
    last_token_block_of,
    role_block_of,
    with_last_tokens,
    with_role,
)
from .model import step
from .prompts import BoxedAnswer, Prompts, fill, paragraph_closed, prompts_of, says_done
from .sampling import Sampling, sample

CHECK_AFTER = 1024  # tokens sampled by all workers between two redundancy checks
MOST_WORKERS = 16
GREEDY = Sampling()


@dataclass
class Writer:
    """A worker, or a finisher: what it sees, what it has written, and what it feeds next."""

    name: str  # as readers know it; its block has a name of its own
    view: list[str]  # the blocks that it sees, in order; the last is the one it writes to
    random: torch.Generator  # its own random numbers: what others draw changes nothing
    stream: TextStream | None = None  # token ids to text, of the paragraph that it is writing
    to_feed: list[int | None] = field(default_factory=list)  # in the next step; [None]: sampled, and not yet known
    feeds_sampled: bool = False  # `to_feed` is a token that it has sampled, and no prefix
    token_ids: list[int] = field(default_factory=list)  # all of its own: a worker's prefixes, and what it sampled
    sampled: int = 0  # how many of them it sampled
    paragraphs: list[str] = field(default_factory=list)  # the sampled text of each, a finisher's after its cue
    answer_reader: BoxedAnswer = field(default_factory=BoxedAnswer)  # looks for an answer in all of that
    answer: str | None = None  # never an empty text
    active: bool = True  # takes part in the next step

    @property
    def block(self) -> str:
        return self.view[-1]


@dataclass
class Feed:
    """What is to be fed in the next forward pass."""

    views: list[list[str]]
    tokens: list[list[int | None]]  # None: the id sampled last for this worker, which is not known yet
    stage: str  # prompt, work or finisher
    writers: list[Writer | None]  # by row; None where nothing follows, as for the prompt
    drops: list[str] = field(default_factory=list)  # blocks to be emptied before the pass


@dataclass
class Decision:
    """What follows from a forward pass: first what its driver is to do, then what the run will tell of it."""

    sampling: Sampling  # how tokens are to be sampled,
    rows: list[int] = field(default_factory=list)  # from which rows of the logits,
    writers: list[Writer] = field(default_factory=list)  # and for whom
    moves: list[tuple[str, str]] = field(default_factory=list)  # blocks, from and to: to be made before the next pass
    banned: Tensor | None = None  # ids [n] that must not be sampled, on the model's device
    first_rows: list[int] = field(default_factory=list)  # of `rows`, by their index: where a paragraph begins
    banned_first: Tensor | None = None  # ids [n] that must not be sampled there

    stage: str = "work"  # as in Feed
    step_event: dict = field(default_factory=dict)
    consequences: list[dict] = field(default_factory=list)  # events that come after it
    beginnings: list["Beginning"] = field(default_factory=list)  # of new paragraphs: noted when the step is told

    @property
    def generators(self) -> list[torch.Generator]:
        return [writer.random for writer in self.writers]


@dataclass
class Beginning:
    """A paragraph that a worker is about to begin.

    Its prefix is queued when that is decided; but the paragraph belongs to what the worker has written, which `summary`
    shows at any time, only from when the step is told.
    """

    worker: Writer
    prefix: list[int]  # token ids
    event: dict


class Run:
    """One problem, some workers, and the loop; `summary()` tells the result, at any time.

    Raises InputError for what can't be run.
    """

    def __init__(
        self,
        model: Model,
        problem: str,
        workers: int = 2,
        layout: str | None = None,  # None: combined, or independent for one worker
        max_steps: int = 1024,
        sampling: Sampling | None = None,  # None: the model's own
        seed: int = 0,
        prompts: Prompts | None = None,  # None: the model's own, or the default
        backend: PyTorchBackend | None = None,  # None: the fastest that there is
        # Numbers of forward steps, increasing, after which a finisher is asked. What follows does not depend on that,
        # but for the end of the context, where finishers need room
        budgets: tuple[int, ...] = (),
    ):
        require_kind(model, Model, "the model")
        workers = whole_number(workers, "workers")
        max_steps = whole_number(max_steps, "max_steps")
        seed = whole_number(seed, "seed")
        require(isinstance(problem, str), f"the problem must be a text, not {problem!r}")
        self.words = prompts_of(model.folder) if prompts is None else prompts
        require_kind(self.words, Prompts, "prompts")
        self.sampling = model.sampling if sampling is None else sampling
        require_kind(self.sampling, Sampling, "sampling")
        self.backend = model.backend if backend is None else backend
        if layout is None:
            layout = "combined" if workers > 1 else "independent"
        most = min(len(self.words.names), MOST_WORKERS)
        require(1 <= workers <= most, f"workers is {workers}: it must be from 1 to {most}")
        require(layout in [*LAYOUTS], f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
        require(max_steps >= 1, f"max_steps is {max_steps}: it must be at least 1")
        require(0 <= seed < 2**32, f"seed is {seed}: it must be from 0 to 2**32 - 1")
        with refusing("budgets must be a tuple of whole numbers"):
            budgets = tuple(whole_number(budget, "a budget") for budget in budgets)
        in_order = list(budgets) == sorted(set(budgets)) and all(1 <= budget <= max_steps for budget in budgets)
        require(in_order, f"budgets are {list(budgets)}: they must increase, from 1 to max_steps, {max_steps}")
        require(self.words.boxed or not budgets, "budgets ask for a boxed answer, and these words have `boxed` off")
        self.model = model
        self.problem = problem
        self.layout = layout
        self.rules = LAYOUTS[layout]
        self.max_steps = max_steps
        self.seed = seed
        self.shared = self.rules.prefix  # workers who know of each other begin with their names; others need none

        names = list(self.words.names[:workers])
        text = prompt_text(self.words, layout, workers, problem)
        self._require_may_fit(text)
        self.prompt = model.tokenizer.chat(text)  # token ids
        require(problem.strip(), "the prompt is empty")
        require(self.prompt, f"{model.folder}: its chat template, or its tokenizer, makes nothing of the prompt")
        if self.shared:
            self.prompt = self.prompt + self._opening()
        # Headers and roles: token ids, by block
        self.fixed_texts = {block: self._encode(self.words.headers[block]) for block in self.rules.headers}
        if self.shared:
            for name, role in zip(names, self.words.roles):
                self.fixed_texts[role_block_of(name)] = self._encode(fill(role, name=name, problem=problem))
        self.workers = [self._make_worker(name, names) for name in names]
        self.budgets = budgets
        asks_for_answer = bool(budgets) or (self.words.boxed and "\\boxed" in text)
        self.finishers = self._make_finishers() if asks_for_answer else []
        self.answer_at: dict[int, str | None] = {}  # by budget, of those that have been reached while workers wrote
        self._set_bans()
        writers = self.workers + self.finishers
        self.blocks = [COMMON, *self.fixed_texts, *(writer.block for writer in writers)]
        if budgets:
            self.blocks += [last_token_block_of(name) for name in names]

        self.lengths = dict.fromkeys(self.blocks, 0)  # of all blocks, after what has been fed and moved
        self.forward_steps = 0  # of the workers: without the prompt's and the finishers'
        self.finisher_steps = 0
        self.steps_begun = 0  # of the workers, handed out by `next_feed`; `forward_steps` counts those learned
        self.sampled_since_check = 0
        self.seconds = 0.0  # of the forward steps and all that goes with them, without prefill and finisher
        self.stopped_by: str | None = None
        self.history: list[dict] = []  # all events so far but those of text

        self._has_cache = False
        self.asked_to_stop = False
        self._require_prompt_fits()
        self._feeds = self._plan_feeds()
        self._fed: Feed | None = None  # the last one; decided on next
        self._decision: Decision | None = None  # the last one; its tokens are learned next
        self._waiting_events: list[dict] = []  # told by `tell_waiting`, or else by the next `learn`
        self._to_drop: list[str] = []  # blocks, before the next pass

    def _encode(self, text: str) -> list[int]:
        self._require_may_fit(text)
        return self.model.tokenizer.encode(text)

    def _require_may_fit(self, text: str) -> None:
        """Raise InputError for a text that no context holds, before it is turned into tokens, which takes memory."""
        context = self.model.config.context
        most = context * self.model.tokenizer.longest
        require(len(text) <= most, f"a text of {len(text):,} characters is too long for a context of {context}")

    def _make_worker(self, name: str, names: list[str]) -> Writer:
        others = [block_of(other) for other in names if other != name and name not in self.words.unaware]
        view = self.rules.view(block_of(name), others)
        if role_block_of(name) in self.fixed_texts:
            view = with_role(view, role_block_of(name))
        # No two seeds share a worker's stream
        random = torch.Generator().manual_seed(self.seed * MOST_WORKERS + names.index(name))
        return Writer(name, view, random)

    def _make_finishers(self) -> list[Writer]:
        """One who sees all workers; where they are independent, one for each."""
        names = [worker.name for worker in self.workers]
        seen_by = {"finisher": names}
        if not self.shared:
            seen_by = {f"finisher of {name}": [name] for name in names}
        finishers = []
        taken = list(names)
        for finisher, seen in seen_by.items():
            while finisher in taken:  # a worker may be called so too, and readers must tell them apart
                finisher += "'"
            taken.append(finisher)
            view = [COMMON, *(block_of(name) for name in seen), answer_block_of(finisher)]
            cue = self._encode(self.words.cue)
            draws_nothing = torch.Generator()  # finishers are greedy
            finishers.append(Writer(finisher, view, draws_nothing, to_feed=cue))
        return finishers

    def _opening(self) -> list[int]:
        """Token ids that the reply begins with, before any worker writes."""
        text = self.words.opening
        if text == "auto":
            text = opening_of(self.model.tokenizer, self.prompt)
        self._require_may_fit(text)
        return self.model.tokenizer.encode_control(text)

    def _set_bans(self) -> None:
        """What workers who share may not sample; and what not where a paragraph begins: no empty line."""
        self.banned = self._banned_tokens() if self.shared else []
        self.banned_first = []
        if self.shared and not self.words.may_end:
            self.banned_first = self.model.tokenizer.line_breaks
        banned_somewhere = {*self.banned, *self.banned_first}
        is_some_left = len(banned_somewhere) < self.model.config.vocab_size
        require(is_some_left, "the bans leave no token that could be sampled")
        # Where they are needed at each step
        device = self.model.device
        self._banned_on_device = torch.tensor(self.banned, dtype=torch.int64, device=device)
        self._banned_first_on_device = torch.tensor(self.banned_first, dtype=torch.int64, device=device)

    def _banned_tokens(self) -> list[int]:
        """Ids that no worker may sample: what ends a text or has none, and what the words forbid besides."""
        tokenizer = self.model.tokenizer
        banned = set()
        if not self.words.may_end:
            vocabulary = range(self.model.config.vocab_size)
            banned.update(token for token in self.model.eos if token in vocabulary)  # a folder may name any number
            banned.update(tokenizer.without_text)
            banned.update(vocabulary[tokenizer.size :])  # many a vocabulary is padded
            if END_OF_THINK in tokenizer.added:
                banned.add(tokenizer.added[END_OF_THINK])
        if self.words.banned:
            for token, text in enumerate(tokenizer.texts):
                if any(part in text for part in self.words.banned):
                    banned.add(token)
        return sorted(banned)

    def __iter__(self) -> Iterator[dict]:
        """Run it; yields events. A step's event also holds its "logits", [W, V]."""
        cache = self.new_cache()
        if self.model.device.type == "cuda" and self.can_run_ahead:
            from .gpu.pipeline import drive_ahead  # not above: without a GPU, nothing of it is imported

            return self._in(cache, drive_ahead(self, cache))
        return self._in(cache, drive(self, cache))

    def _in(self, cache: Cache, events: Iterator[dict]) -> Iterator[dict]:
        """These events; then the cache is free for the next run. (Not where this one fails: it may hold NaN.)"""
        yield from events
        self.model.idle_cache = cache

    def new_cache(self) -> Cache:
        """A cache with this run's blocks, for a driver. A Run runs once, and so this can be asked for once."""
        if self._has_cache:
            raise RuntimeError("a Run runs once: make another")
        self._has_cache = True
        return self.model.cache_for(self.blocks, self.backend)

    # ---- what it wants

    def next_feed(self) -> Feed | None:
        """What to feed in the next forward pass; None when all is done.

        Raises RuntimeError where it depends on tokens that were sampled and not learned.
        """
        if self._decision is not None and self.next_feed_depends_on_tokens and not self.asked_to_stop:
            raise RuntimeError("next_feed depends on tokens that have not been learned")
        if self.asked_to_stop:
            self.stopped_by = "interrupt"
            return None
        self._fed = next(self._feeds, None)
        if self._fed is not None:
            self._fed.drops = self._dropped()
            for view, ids in zip(self._fed.views, self._fed.tokens):
                self.lengths[view[-1]] += len(ids)
        return self._fed

    def _dropped(self) -> list[str]:
        """The blocks that are to be emptied now."""
        drops = self._to_drop
        self._to_drop = []
        for block in drops:
            self.lengths[block] = 0
            self._waiting_events.append({"do": "drop", "block": block})
        return drops

    def stop(self) -> None:
        """Ask it to end when the step that is under way has been told: no other follows, nor a finisher."""
        self.asked_to_stop = True

    def _plan_feeds(self) -> Iterator[Feed]:
        """A run from beginning to end."""
        yield from self._feed_prompt()
        for worker in self.workers:
            beginning = self._begin_paragraph(worker)
            self._note(beginning)
            self._waiting_events.append(beginning.event)
        while self.reason_to_stop() is None:
            if self.steps_begun in self.budgets:
                yield from self._ask_at_budget()
            self.steps_begun += 1
            yield feed_of(self._writing_workers(), "work")
        self.stopped_by = self.reason_to_stop()
        if not self.asked_to_stop:  # a signal may have come just now
            yield from self._feed_finishers(self.finishers, {})

    def _writing_workers(self) -> list[Writer]:
        """The active workers, without those whose turn to begin has not come: see `head_start` in prompts.py."""
        head_start = self.words.head_start if self.shared else 0
        active = self._active_workers()
        begun = []
        for number, worker in enumerate(self.workers):
            begins_after = number * head_start
            if worker.active and self.steps_begun > begins_after:
                begun.append(worker)
        return begun or active[:1]  # where all before it have retired, the next one need not wait

    def _feed_prompt(self) -> Iterator[Feed]:
        """The prompt in chunks, then all headers and roles in one step. None of it is ever computed again."""
        # Independent workers sample their first tokens from the prompt's last one. Each feeds it itself, to its own
        # block: see `_begin_paragraph`.
        prompt = self.prompt if self.shared else self.prompt[:-1]
        chunk = self.backend.prefill_chunk(len(self.prompt), self.model.config)
        for start in range(0, len(prompt), chunk):
            yield Feed([[COMMON]], [prompt[start : start + chunk]], "prompt", [None])
        fixed_texts = {block: ids for block, ids in self.fixed_texts.items() if ids}
        if fixed_texts:
            views = [[COMMON, block] for block in fixed_texts]
            yield Feed(views, list(fixed_texts.values()), "prompt", [None] * len(fixed_texts))

    def _ask_at_budget(self) -> Iterator[Feed]:
        """Ask finishers in the midst of the run; all that this writes is dropped before the next step.

        Each worker's last token has been sampled, and will be fed in that step. The finishers are to see it all the
        same, as they would if the run ended here. So a copy is fed to a block of its own.
        """
        last_tokens = {worker.block: last_token_block_of(worker.name) for worker in self._with_unfed_token()}
        finishers = self._make_finishers()
        yield from self._feed_finishers(finishers, last_tokens)
        self.answer_at[self.steps_begun] = self._answer_with(finishers)
        written = [*last_tokens.values(), *(finisher.block for finisher in finishers)]
        self._to_drop = [block for block in written if self.lengths[block] > 0]

    def _feed_finishers(self, finishers: list[Writer], last_tokens: dict[str, str]) -> Iterator[Feed]:
        """Where there is no answer yet: ask for it, over all that has been written.

        What was sampled last and has not been fed goes in together with the cue: to the worker's own block, or to the
        one that `last_tokens` gives for it.
        """
        answered = [worker.block for worker in self.workers if worker.answer]
        writing = []
        for finisher in finishers:
            if not any(block in answered for block in finisher.view):
                finisher.view = with_last_tokens(finisher.view, last_tokens)
                writing.append(finisher)
                self._open_finisher(finisher)
        if not writing:
            return
        feed = feed_of(self._with_unfed_token() + writing, "finisher")
        workers = len(feed.views) - len(writing)
        feed.views = [with_last_tokens(view, last_tokens) for view in feed.views[:workers]] + feed.views[workers:]
        feed.writers = [None] * workers + writing
        yield feed
        while writing := [finisher for finisher in writing if finisher.active]:
            yield feed_of(writing, "finisher")

    def _with_unfed_token(self) -> list[Writer]:
        """The workers whose last token has been sampled, and not fed yet."""
        return [worker for worker in self._active_workers() if worker.feeds_sampled]

    def _open_finisher(self, finisher: Writer) -> None:
        cue = self.words.cue
        finisher.paragraphs = [cue]
        finisher.answer_reader.read(cue)
        finisher.stream = TextStream(self.model.tokenizer, finisher.to_feed)
        self._waiting_events.append({"do": "text", "worker": finisher.name, "text": cue})

    # ---- what follows from a forward pass

    def decide(self) -> Decision:
        """What each writer does after the pass that was fed last, judged by the last token that it has fed."""
        feed = self._fed
        decision = Decision(self.sampling, stage=feed.stage)
        if feed.stage == "finisher":
            decision.sampling = GREEDY
        elif self.banned:  # a finisher may end, like any chat
            decision.banned = self._banned_on_device
        decision.step_event = {
            "do": "step",
            "views": feed.views,
            "tokens": self._tokens_fed(feed),
            "sampled": [None] * len(feed.views),  # `learn` puts them in
        }
        for row, writer in enumerate(feed.writers):
            if writer is None:
                continue
            if feed.stage == "work" and self._has_ended(writer):
                self._retire(writer, decision)
            elif feed.stage == "work" and self._has_closed_paragraph(writer):
                self._move_to_common(writer, decision)
                beginning = self._begin_paragraph(writer)
                decision.beginnings.append(beginning)
                decision.consequences.append(beginning.event)
            else:
                if feed.stage == "work" and not writer.feeds_sampled and self.banned_first:
                    decision.first_rows.append(len(decision.rows))
                    decision.banned_first = self._banned_first_on_device
                decision.rows.append(row)
                decision.writers.append(writer)
                if feed.stage == "work":
                    self.sampled_since_check += 1
        for writer in decision.writers:  # from here on, what they have fed stands in the event alone
            writer.to_feed = [None]
            writer.feeds_sampled = True
        self._decision = decision
        return decision

    def _has_ended(self, worker: Writer) -> bool:
        """Was the token that it has just fed an end-of-sequence of its own, or has it said that nothing is left?"""
        if not worker.feeds_sampled:
            return False
        says_done_here = self.shared and says_done(worker.paragraphs[-1], self.words.done)
        return says_done_here or worker.to_feed[-1] in self.model.eos

    def _has_closed_paragraph(self, worker: Writer) -> bool:
        return self.rules.paragraphs and paragraph_closed(worker.paragraphs[-1])

    def _tokens_fed(self, feed: Feed) -> list[list[int]]:
        """Of a feed, with ids in the place of those that were not known when it was made: they are in `to_feed` by now.

        Rows without a writer have no such ids: they are only fed when all is known.
        """
        known = []
        for writer, ids in zip(feed.writers, feed.tokens):
            by_now = writer.to_feed if None in ids else ids
            known.append(list(by_now))
        return known

    def _retire(self, worker: Writer, decision: Decision) -> None:
        worker.active = False
        decision.consequences.append({"do": "retire", "worker": worker.name})
        if self.rules.moves_retired:
            self._move_to_common(worker, decision)

    def _move_to_common(self, worker: Writer, decision: Decision) -> None:
        decision.moves.append((worker.block, COMMON))
        self.lengths[COMMON] += self.lengths[worker.block]
        self.lengths[worker.block] = 0
        decision.consequences.append({"do": "move", "from": worker.block, "to": COMMON, "worker": worker.name})

    def _begin_paragraph(self, worker: Writer) -> "Beginning":
        """Queue the prefix of the worker's next paragraph. What it has written is as it was, until `_note`."""
        encode = self.model.tokenizer.encode
        text = ""
        prefix = []
        if self.shared:
            text = fill(self.words.prefix, name=worker.name, number=len(worker.paragraphs) + 1)
            prefix = encode(text)
            if self.sampled_since_check >= CHECK_AFTER and len(self.workers) > 1:
                self.sampled_since_check = 0
                text += self.words.check
                prefix += encode(self.words.check)
        worker.feeds_sampled = False
        if prefix:
            worker.to_feed = prefix
            worker.stream = TextStream(self.model.tokenizer, prefix)
        else:
            worker.to_feed = self.prompt[-1:]
            some_before = self.prompt[-8:]  # enough to tell how the next token reads
            worker.stream = TextStream(self.model.tokenizer, some_before)
        return Beginning(worker, prefix, {"do": "begin", "worker": worker.name, "text": text})

    def _note(self, beginning: "Beginning") -> None:
        """From here on the paragraph belongs to what the worker has written."""
        beginning.worker.paragraphs.append("")
        beginning.worker.token_ids += beginning.prefix

    def learn(self, token_ids: list[int]) -> list[dict]:
        """The ids that were sampled, one for each of the last decision's rows. Returns the events of that step.

        Raises InputError for an id of -1: the logits were not numbers.
        """
        decision = self._decision
        self._decision = None
        for writer, token in zip(decision.writers, token_ids, strict=True):
            self._require_sound(token, writer, decision)
        for beginning in decision.beginnings:
            self._note(beginning)
        texts = []
        for row, writer, token in zip(decision.rows, decision.writers, token_ids):
            decision.step_event["sampled"][row] = token
            text = self._take(writer, token)
            if text:
                texts.append({"do": "text", "worker": writer.name, "text": text})
            if decision.stage == "finisher":
                # Nobody reads on after a finisher: its end-of-sequence need not be fed.
                ended = token in self.model.eos or writer.sampled == self.words.finisher_tokens
                writer.active = not ended and writer.answer is None
        if decision.stage == "work":
            self.forward_steps += 1
        elif decision.stage == "finisher":
            self.finisher_steps += 1
        return self._tell([decision.step_event, *decision.consequences, *texts])

    def tell_waiting(self) -> list[dict]:
        """Events that belong to no step, such as the workers' beginning: `next_feed` may bring some.

        Who does not ask for them gets them with the next `learn`.
        """
        return self._tell([])

    def _tell(self, events: list[dict]) -> list[dict]:
        """These events, behind those that had to wait; all but text is kept."""
        told = self._waiting_events + events
        self._waiting_events = []
        self.history += [event for event in told if event["do"] != "text"]
        return told

    def _require_sound(self, token: int, writer: Writer, decision: Decision) -> None:
        whose = f"step {self.forward_steps + 1}: {writer.name}'s"
        if decision.stage == "finisher":
            whose = "the finisher's"
        require(token >= 0, f"{whose} logits are NaN or infinite: try float32")

    def _take(self, writer: Writer, token: int) -> str:
        """Give a writer the token that was sampled for it; the readable text that this completes."""
        writer.to_feed = [token]
        writer.token_ids.append(token)
        writer.sampled += 1
        text = writer.stream.next(token)
        writer.paragraphs[-1] += text
        if self.words.boxed and writer.answer is None:
            writer.answer = writer.answer_reader.read(text)
            if writer.answer and not self.shared:
                writer.active = False  # alone, it would have stopped here
        return text

    def _answers_by_budget(self) -> dict[int, str | None]:
        """The answer at each budget. A run that has come to its end has its last answer from then on."""
        answers = dict(self.answer_at)
        if self.stopped_by in ("answer", "retired", "steps", "context"):
            for budget in self.budgets:
                answers.setdefault(budget, self.answer)
        return answers

    # ---- when to stop

    @property
    def answer(self) -> str | None:
        """That of the first worker, in their order, that has one; where they are independent, the most frequent one."""
        return self._answer_with(self.finishers)

    def _answer_with(self, finishers: list[Writer]) -> str | None:
        found = [writer.answer for writer in self.workers + finishers if writer.answer]
        if not found:
            return None
        return found[0] if self.shared else mode(found)

    @property
    def answered(self) -> bool:
        """Is the problem solved? Where workers are independent, each is to have its answer, or to have retired."""
        anyone = any(worker.answer for worker in self.workers)
        return anyone and (self.shared or not self._active_workers())

    @property
    def can_run_ahead(self) -> bool:
        """May a step begin before the tokens of the one before are known? At most the last one is then thrown away.

        Not where several workers are independent: one that has just answered drops out while others go on, and the step
        that began without knowing that would hold a row too many.
        """
        return self.shared or len(self.workers) == 1

    def _active_workers(self) -> list[Writer]:
        return [worker for worker in self.workers if worker.active]

    @property
    def next_feed_depends_on_tokens(self) -> bool:
        """Must what was sampled last be learned before `next_feed` is asked?"""
        return self.reason_to_stop() is not None or self.steps_begun in self.budgets

    def reason_to_stop(self) -> str | None:
        """Why no further forward step follows; None: one does."""
        if self.asked_to_stop:
            return "interrupt"
        if self.answered:
            return "answer"
        if not self._active_workers():
            return "retired"
        if self.steps_begun >= self.max_steps:
            return "steps"
        if self._outgrows_context(self.lengths):
            return "context"
        return None

    def _require_prompt_fits(self) -> None:
        lengths = dict.fromkeys(self.blocks, 0)
        lengths[COMMON] = len(self.prompt)
        for block, ids in self.fixed_texts.items():
            lengths[block] = len(ids)
        fits = not self._outgrows_context(lengths)
        context = self.model.config.context
        others = sum(len(ids) for ids in self.fixed_texts.values())
        parts = f"the prompt is {len(self.prompt)} tokens long"
        if others > 0:
            parts += f", headers and roles {others}"
        if self.finishers:
            parts += f", a finisher's answer up to {self.words.finisher_tokens}"
        require(fits, f"{parts}: too long for a context of {context}")

    def _outgrows_context(self, lengths: dict[str, int]) -> bool:
        """From blocks this long, would a view outgrow the context in a step, or leave the finisher no room after it?"""
        after_step = dict(lengths)
        for worker in self._active_workers():
            after_step[worker.block] += len(worker.to_feed)
        with_sampled = dict(after_step)  # in that step, to be fed together with the finisher's cue
        for worker in self._active_workers():
            with_sampled[worker.block] += 1
        context = self.model.config.context
        # Where a finisher may follow, what is sampled in that step is fed too, if it is the last one.
        fed = with_sampled if self.finishers else after_step
        for worker in self._active_workers():
            if sum(fed[block] for block in worker.view) > context:
                return True
        for finisher in self.finishers:
            seen = sum(with_sampled[block] for block in finisher.view)
            if seen + len(finisher.to_feed) + self.words.finisher_tokens > context:
                return True
        return False

    # ---- the result

    def summary(self) -> dict:
        """The result so far, ready for JSON. `text` holds prefixes too, `paragraphs` what was sampled."""
        tokens = sum(worker.sampled for worker in self.workers)
        spoken = [finisher for finisher in self.finishers if finisher.sampled]
        return {
            "model": self.model.name,
            "sampling": vars(self.sampling),
            "forward_steps": self.forward_steps,
            "finisher_steps": self.finisher_steps,
            "seconds": self.seconds,
            "answer": self.answer,
            "answers_by_budget": self._answers_by_budget(),
            "stopped_by": self.stopped_by,
            "layout": self.layout,
            "seed": self.seed,
            "prompt_tokens": len(self.prompt),
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
            "ms_per_step": 1000 * self.seconds / max(self.forward_steps, 1),
            "workers": [self._summary_of(worker) for worker in self.workers],
            "finishers": [self._summary_of(finisher) for finisher in spoken],
        }

    def _summary_of(self, writer: Writer) -> dict:
        return {
            "name": writer.name,
            "answer": writer.answer,
            "tokens": writer.sampled,
            "token_ids": writer.token_ids,
            "paragraphs": writer.paragraphs,
            "text": self.model.tokenizer.decode(writer.token_ids),
        }


def prompt_text(words: Prompts, layout: str, workers: int, problem: str) -> str:
    """What a model's chat template is given."""
    names = words.names[:workers]
    template = words.together if LAYOUTS[layout].prefix else words.alone
    return fill(template, problem=problem, n=workers, names=", ".join(names), first=names[0])


def feed_of(writers: list[Writer], stage: str) -> Feed:
    views = [writer.view for writer in writers]
    tokens = [writer.to_feed for writer in writers]
    return Feed(views, tokens, stage, list(writers))


def drive(run: Run, cache: Cache) -> Iterator[dict]:
    """Run to the end, a step at a time. Yields the run's events; a step's event also holds its "logits", [W, V]."""
    for _, event in drive_together({"": run}, cache):
        yield event


def drive_together(runs: dict[str, Run], cache: Cache) -> Iterator[tuple[str, dict]]:
    """Several runs of one model, each to its end: a forward pass takes a step of each. Yields (key, event).

    All have their blocks in one cache, where a run's key in `runs` stands before the names of its blocks. So no run
    sees another's; each goes as it would alone, up to the rounding of larger products. (Attention goes over the whole
    pool for each row: what it costs grows with the square of the number of runs.)
    """
    going_on = dict(runs)
    while going_on:
        feeds = {}
        for key, run in list(going_on.items()):
            feed = run.next_feed()
            for event in run.tell_waiting():
                yield key, event
            if feed is None:
                del going_on[key]
            elif not run.asked_to_stop:  # by whoever has just read these events
                feeds[key] = feed
        prompts = [key for key, feed in feeds.items() if feed.stage == "prompt"]
        for key in prompts:  # one by one: what a step takes for attention grows with the square of what it is fed
            feed = feeds.pop(key)
            yield from take_step({key: feed}, runs, cache)
        if feeds:
            yield from take_step(feeds, runs, cache)


def take_step(feeds: dict[str, Feed], runs: dict[str, Run], cache: Cache) -> Iterator[tuple[str, dict]]:
    """One step of some of the runs: feed, decide, sample, learn. Yields (key, what happened in it)."""
    began = time.perf_counter()
    views, tokens = [], []
    for key, feed in feeds.items():
        for block in feed.drops:
            cache.drop(key + block)
        views += [[key + block for block in view] for view in feed.views]
        tokens += feed.tokens
    model = next(iter(runs.values())).model  # all have the same
    logits = step(views, tokens, model.weights, model.config, cache)

    logits_of = dict(zip(feeds, logits.split([len(feed.views) for feed in feeds.values()])))
    sampled = {}
    for key in feeds:
        decision = runs[key].decide()
        for source, target in decision.moves:
            cache.move(key + source, key + target)
        sampled[key] = sample_rows(logits_of[key], decision)
    events = {key: runs[key].learn(sampled[key].tolist()) for key in feeds}
    seconds = time.perf_counter() - began
    for key, feed in feeds.items():
        if feed.stage == "work":
            runs[key].seconds += seconds
        for event in with_logits(events[key], logits_of[key]):
            yield key, event


def sample_rows(logits: Tensor, decision: Decision) -> Tensor:
    """One id [n] int64 for each of the decision's rows of logits [W, V]."""
    if not decision.rows:
        return torch.zeros(0, dtype=torch.int64)
    rows = torch.tensor(decision.rows).to(logits.device, non_blocking=True)
    chosen = logits[rows]  # a copy: what is recorded of a step are the logits without bans
    if decision.banned is not None:
        chosen.index_fill_(1, decision.banned, -torch.inf)  # (as an assignment it would wait for the device)
    for row in decision.first_rows:
        chosen[row].index_fill_(0, decision.banned_first, -torch.inf)
    return sample(chosen, decision.sampling, decision.generators)


def with_logits(events: list[dict], logits: Tensor) -> Iterator[dict]:
    for event in events:
        if event["do"] == "step":
            yield {**event, "logits": logits}
        else:
            yield event
