"""From logits to the next token: temperature, top-k, top-p, min-p, in that order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy; top_k 0, top_p 1 and min_p 0 filter nothing."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest
    top_p: float = 1.0  # keep the fewest likeliest whose probabilities reach p
    min_p: float = 0.0  # keep those at least p times as likely as the likeliest (arXiv 2407.01082)

    def __post_init__(self):
        for name, ok, right in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
        ):
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)}: it must be {right}")


def sample(logits: torch.Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """One token id for each row of logits [W, V], drawn with that row's own stream (a CPU generator)."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    V = logits.shape[-1]
    top, ids = logits.float().topk(min(sampling.top_k or V, V))  # likeliest first
    p = ((top - top[:, :1]) / max(sampling.temperature, 1e-30)).softmax(-1)  # the smallest would be 0 in float32
    p = p.where((p.cumsum(-1) - p < sampling.top_p) & (p >= sampling.min_p * p[:, :1]), 0)
    reached = p.cumsum(-1)
    drawn = torch.stack([torch.rand(1, generator=stream) for stream in streams]).to(logits.device)
    # The clamp: should the product round up to the sum
    choice = torch.searchsorted(reached, drawn * reached[:, -1:], right=True).clamp(max=(p > 0).sum(-1, True) - 1)
    return ids.gather(-1, choice)[:, 0].tolist()
