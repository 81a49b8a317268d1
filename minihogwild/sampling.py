"""From logits to the next token: temperature, top-k, top-p, min-p, in that order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import require


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy; top_k 0, top_p 1 and min_p 0 filter nothing."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest
    top_p: float = 1.0  # keep the fewest likeliest whose probabilities reach p
    min_p: float = 0.0  # keep those at least p times as likely as the likeliest (arXiv 2407.01082)

    def __post_init__(self):
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        require(0 <= t < float("inf"), f"temperature is {t}: it must be 0 (greedy) or more")
        require(k >= 0, f"top_k is {k}: it must be 0 (off) or more")
        require(0 < p <= 1, f"top_p is {p}: it must be above 0, at most 1 (off)")
        require(0 <= m <= 1, f"min_p is {m}: it must be from 0 (off) to 1")


def sample(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> Tensor:
    """One token id for each row of logits [W, V], drawn with that row's own stream (a CPU generator): [W] int64.

    -1 where a logit is NaN or inf: told with the ids, so that a GPU is not waited for twice.
    """
    sound = (logits < torch.inf).all(-1)
    if sampling.temperature == 0:
        return logits.argmax(-1).where(sound, -1)
    V = logits.shape[-1]
    top, ids = logits.float().topk(min(sampling.top_k or V, V))  # likeliest first
    p = ((top - top[:, :1]) / max(sampling.temperature, 1e-30)).softmax(-1)  # the smallest would be 0 in float32
    p = p.where((p.cumsum(-1) - p < sampling.top_p) & (p >= sampling.min_p * p[:, :1]), 0)
    reached = p.cumsum(-1)
    drawn = torch.stack([torch.rand(1, generator=s) for s in streams]).to(logits.device, non_blocking=True)
    choice = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
    choice = choice.minimum((p > 0).sum(-1, True) - 1)  # should the product round up to the sum
    return ids.gather(-1, choice.clamp(min=0))[:, 0].where(sound, -1)
