"""A driver for a `Run` that lets no GPU wait for the host: a step begins before the tokens of the last one are read.

What was sampled stays on the device, and is fed from there. While the device computes with it, the host reads it, turns
it into text, and decides what follows. So all that `drive` does is done here too, in the same order for the run, one
step later. A step may turn out to be in vain: the tokens that it was begun without have solved the problem.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import Cache
from ..model import step_on_device
from ..workers import Feed, Run, sample_rows, take_step, with_logits


@dataclass
class InFlight:
    """A step that was begun and decided on, and whose sampled tokens the host has not read."""

    logits: Tensor  # [W, V]
    token_ids: Tensor  # [n], on the device
    host_copy: Tensor  # [n], on its way to the host,
    has_arrived: torch.cuda.Event | None  # and this tells when it is there; None on a CPU, where it is

    def read(self) -> list[int]:
        """Wait for these ids, and for nothing that the GPU was given to do after them."""
        if self.has_arrived is not None:
            self.has_arrived.synchronize()
        return self.host_copy.tolist()


def drive_ahead(run: Run, cache: Cache) -> Iterator[dict]:
    """`workers.drive`, one step ahead of what is known. Yields the same events."""
    in_flight = None
    while True:
        if in_flight is not None and run.next_feed_depends_on_tokens:
            # No further step: what is fed now, if anything, depends on these tokens.
            yield from learn(run, in_flight)
            in_flight = None
        feed = run.next_feed()
        yield from run.tell_waiting()
        if feed is None:
            if in_flight is not None:  # a signal has just asked for an end
                yield from learn(run, in_flight)
            break
        if run.asked_to_stop:
            continue
        if feed.stage != "work":
            for _, event in take_step({"": feed}, {"": run}, cache):
                yield event
            continue

        began = time.perf_counter()
        logits = begin_step(run, cache, feed, in_flight)
        run.seconds += time.perf_counter() - began
        if in_flight is not None:
            yield from learn(run, in_flight)  # while the GPU computes
            in_flight = None
            if run.answered:
                continue  # the step that has just begun is in vain
        began = time.perf_counter()
        in_flight = decide_and_sample(run, cache, logits)
        run.seconds += time.perf_counter() - began


def begin_step(run: Run, cache: Cache, feed: Feed, in_flight: InFlight | None) -> Tensor:
    """Logits [W, V] of a step that is being computed."""
    for block in feed.drops:
        cache.drop(block)
    flat = [token for ids in feed.tokens for token in ids]
    unknown = [row for row, token in enumerate(flat) if token is None]
    tokens = torch.tensor([0 if token is None else token for token in flat]).to(cache.device, non_blocking=True)
    if unknown:
        sampled = in_flight.token_ids.clamp_min(0)  # -1, where logits were not numbers, is told when it is read
        if len(unknown) == len(flat):
            tokens = sampled
        else:
            tokens[torch.tensor(unknown).to(cache.device, non_blocking=True)] = sampled
    counts = [len(ids) for ids in feed.tokens]
    return step_on_device(feed.views, counts, tokens, run.model.weights, run.model.config, cache)


def decide_and_sample(run: Run, cache: Cache, logits: Tensor) -> InFlight:
    decision = run.decide()
    for source, target in decision.moves:
        cache.move(source, target)
    token_ids = sample_rows(logits, decision).to(cache.device)
    host_copy = token_ids.to("cpu", non_blocking=True)
    has_arrived = None
    if cache.device.type == "cuda":
        has_arrived = torch.cuda.Event()
        has_arrived.record()
    return InFlight(logits, token_ids, host_copy, has_arrived)


def learn(run: Run, in_flight: InFlight) -> Iterator[dict]:
    began = time.perf_counter()
    events = run.learn(in_flight.read())
    run.seconds += time.perf_counter() - began
    yield from with_logits(events, in_flight.logits)
