"""From logits to the next token: temperature, top-k, then top-p and min-p.

The last two are both measured on the probabilities that top-k has left, which sum to 1: so their order does not matter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import require, require_kind

SORTED_FIRST = 8192  # how many of the likeliest tokens are sorted; the order of the rest seldom matters


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy; top_k 0, top_p 1 and min_p 0 filter nothing."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest
    top_p: float = 1.0  # keep the fewest likeliest whose probabilities reach p
    min_p: float = 0.0  # keep those at least p times as likely as the likeliest (arXiv 2407.01082)

    def __post_init__(self):
        for name, value in vars(self).items():
            require(isinstance(value, (int, float)), f"{name} is {value!r}: it must be a number")
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        require(0 <= t < float("inf"), f"temperature is {t}: it must be 0 (greedy) or more")
        require(k >= 0, f"top_k is {k}: it must be 0 (off) or more")
        require(0 < p <= 1, f"top_p is {p}: it must be above 0, at most 1 (off)")
        require(0 <= m <= 1, f"min_p is {m}: it must be from 0 (off) to 1")


def sample(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> Tensor:
    """One token id for each row of logits [W, V], drawn with that row's own stream (a CPU generator): [W] int64.

    -1 where a logit is NaN or +inf, and no exception: so one read from a GPU brings the ids, or that they failed.
    Raises InputError for arguments of another kind.
    """
    require_sampled(logits, sampling, streams)
    sound = (logits < torch.inf).all(-1)  # false for NaN too
    if sampling.temperature == 0:
        return logits.argmax(-1).where(sound, -1)
    probabilities, ids = likeliest_first(logits.float(), sampling)
    probabilities = filtered(probabilities, sampling)

    # Walk along the tokens until their probabilities have added up to a random part of the whole. A float32 sum stops
    # growing when it comes to tiny probabilities, and such tokens would never be drawn; but mps has no float64.
    widest = torch.float32 if logits.device.type == "mps" else torch.float64
    reached = probabilities.cumsum(-1, dtype=widest)
    uniform = torch.stack([torch.rand(1, generator=stream) for stream in streams])  # [W, 1]
    whole = reached[:, -1:]  # [W, 1]
    part = uniform.to(logits.device, non_blocking=True) * whole
    choice = torch.searchsorted(reached, part, right=True)  # right: a part of 0 passes by tokens of probability 0
    # Never past the last token that was kept, the first to reach the whole: where logits are NaN, or should a product
    # round up to the whole, the search would end behind all tokens.
    last_kept = (reached < whole).sum(-1, keepdim=True)
    choice = choice.minimum(last_kept)
    return ids.gather(-1, choice)[:, 0].where(sound, -1)


def require_sampled(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> None:
    is_matrix = isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 0
    require(is_matrix and logits.is_floating_point(), "logits must be a tensor [W, V] of numbers with a fraction")
    require_kind(sampling, Sampling, "sampling")
    are_streams = isinstance(streams, list) and all(isinstance(stream, torch.Generator) for stream in streams)
    right = are_streams and len(streams) == len(logits)
    require(right, f"streams must be a list with a torch.Generator for each of {len(logits)} rows")


def likeliest_first(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities at this temperature, and the ids of their tokens, both [W, n], sorted as far as is needed.

    To sort a vocabulary of 150,000 takes a CPU far longer than all else here. With top-p, only those that it may keep
    are needed. Without it, the order of the unlikely ones does not matter: they follow behind the sorted ones, in the
    vocabulary's order (which also lists the sorted ones once more, with probability 0). So n is k with top-k, with
    top-p SORTED_FIRST or V, and else SORTED_FIRST + V.
    """
    V = logits.shape[-1]
    if sampling.top_k:
        logits, ids = logits.topk(min(sampling.top_k, V))
        return softmax_at(sampling.temperature, logits), ids

    probabilities = softmax_at(sampling.temperature, logits)
    first_ids = logits.topk(min(SORTED_FIRST, V)).indices
    first = probabilities.gather(-1, first_ids)
    if sampling.top_p < 1:
        # On a GPU always all: sorting is cheap there, and to ask whether these are enough would make the host wait.
        enough = logits.device.type == "cpu" and bool((first.sum(-1) > sampling.top_p).all())
        if not enough:
            first_ids = logits.topk(V).indices
            first = probabilities.gather(-1, first_ids)
        return first, first_ids  # top-p drops all others
    others = probabilities.scatter(-1, first_ids, 0.0)  # those in `first` must not count twice
    every_id = torch.arange(V, device=logits.device).expand_as(others)
    return torch.cat((first, others), -1), torch.cat((first_ids, every_id), -1)


def softmax_at(temperature: float, logits: Tensor) -> Tensor:
    # The likeliest is at 0, and stays there however small the temperature; others may go to -inf, which is right.
    distance = logits - logits.amax(-1, keepdim=True)
    not_zero = max(temperature, 1e-30)  # far above where float32 ends, so that 0 is never divided by 0
    return (distance / not_zero).softmax(-1)


def filtered(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [W, n], the likeliest first, with 0 for those that top-p and min-p leave out.

    Both leave out the unlikely ones, so it is the same in which order they are asked.
    """
    kept = probabilities >= sampling.min_p * probabilities[:, :1]
    if sampling.top_p < 1:
        # The sum of all likelier tokens: with top-p, all of these are sorted. float32 will do: a rounding may only move
        # the border by a token.
        before = probabilities.cumsum(-1) - probabilities
        kept &= before < sampling.top_p
    return probabilities.where(kept, 0)
