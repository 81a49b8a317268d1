"""What rounding a model's weights to 8 or 4 bits costs: how far its probabilities are from those of the whole model.

    python benchmarks/rounding.py MODEL

The model answers problems, greedily, in the checkpoint's dtype. The rounded ones are fed the same tokens, and at each
of them the two probability distributions are compared: their KL divergence in nats, and whether the likeliest token is
the same. Then the rounded ones answer by themselves. All problems are answered at the same time, each by a worker who
sees nothing of the others. The last line is one JSON object.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minihogwild import Cache, Model, load, step
from minihogwild.scoring import read_problems

PROBLEMS = Path(__file__).parents[1] / "examples/problems/held-back.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--problems", type=Path, default=PROBLEMS, help="JSON lines with a problem each")
    parser.add_argument("--count", type=int, default=20, help="problems (default: 20)")
    parser.add_argument("--tokens", type=int, default=60, help="of each answer (default: 60)")
    options = parser.parse_args()
    problems = [problem.text for problem in read_problems(options.problems)[: options.count]]

    model = load(options.model, device="cpu")
    whole = Answers(model, problems)
    answers = whole.greedy(options.tokens)
    print(f"{Path(options.model).name}, {model.dtype}, {len(problems)} answers of {options.tokens} tokens")
    print("weights   KL, mean   likeliest token the same   answers the same   tokens until they differ, mean")
    results = []
    for bits in (8, 4):
        rounded = Answers(load(options.model, device="cpu", quantize=bits), problems)
        divergences, agreements = compare(whole.fed(answers), rounded.fed(answers))
        own = rounded.greedy(options.tokens)
        common = [common_length(ours, theirs) for ours, theirs in zip(own, answers)]
        result = {
            "bits": bits,
            "kl": sum(divergences) / len(divergences),
            "same_token": sum(agreements) / len(agreements),
            "same_answers": sum(length == options.tokens for length in common),
            "common_tokens": sum(common) / len(common),
        }
        results.append(result)
        print("{bits} bits {kl:12.5f} {same_token:26.3f} {same_answers:18} {common_tokens:32.1f}".format(**result))
    print(json.dumps({**vars(options), "problems": str(options.problems), "results": results}))


@dataclass
class Answers:
    """A model, and the problems that it is to answer."""

    model: Model
    problems: list[str]

    def start(self) -> tuple[Cache, list[list[str]], Tensor]:
        """(a cache with all prompts; the view of each answer; its first logits, [W, V])."""
        names = [f"answer {number}" for number in range(len(self.problems))]
        cache = Cache(self.model.config, names, self.model.dtype, self.model.device)
        logits = []
        for name, problem in zip(names, self.problems):
            logits.append(self.step([[name]], [self.model.tokenizer.chat(problem)], cache))
        return cache, [[name] for name in names], torch.cat(logits)

    def step(self, views: list[list[str]], tokens: list[list[int]], cache: Cache) -> Tensor:
        return step(views, tokens, self.model.weights, self.model.config, cache).float()

    def greedy(self, count: int) -> list[list[int]]:
        """So many tokens of each answer; what stands after its end counts too."""
        cache, views, logits = self.start()
        answers = [[] for _ in views]
        for _ in range(count):
            chosen = logits.argmax(-1).tolist()
            for answer, token in zip(answers, chosen):
                answer.append(token)
            logits = self.step(views, [[token] for token in chosen], cache)
        return answers

    def fed(self, answers: list[list[int]]) -> list[Tensor]:
        """The logits [W, V] before each token of these answers, whatever the model itself would have said."""
        cache, views, logits = self.start()
        found = []
        for tokens in zip(*answers):
            found.append(logits)
            logits = self.step(views, [[token] for token in tokens], cache)
        return found


def compare(whole: list[Tensor], rounded: list[Tensor]) -> tuple[list[float], list[bool]]:
    """(KL divergence, is the likeliest token the same) at each token of each answer."""
    divergences, agreements = [], []
    for ours, theirs in zip(rounded, whole):
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        agreements += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
    return divergences, agreements


def common_length(ours: list[int], theirs: list[int]) -> int:
    for length, (one, other) in enumerate(zip(ours, theirs)):
        if one != other:
            return length
    return len(ours)


if __name__ == "__main__":
    main()
