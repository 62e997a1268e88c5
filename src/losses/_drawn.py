"""Losses on answers that the model draws: their sums, metrics and words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import QUESTIONS, Facts, Loss, Words

# Sums over micro-batches and processes; the first is a maximum, and the rewards by name follow. means() turns
# them into metrics.
SUMS = (
    "gap_max",  # the largest |ln old - ln drawn|
    # about the answers that were drawn and scored
    "answers",
    "groups",
    "dead_groups",  # groups of equal rewards
    "failed_groups",  # groups whose rewards failed; they count nowhere else
    "reward",  # summed over answers
    "spread",  # standard deviation, summed over groups
    "length",  # tokens of each answer
    "cut",  # answers that were cut
    "entropy",  # -ln drawn of each token
    # about drawing
    "draws",  # processes that drew
    "draw_seconds",  # seconds of each of these processes
    "drawn_tokens",
    # about training
    "tokens",
    "clipped",  # tokens that the clip keeps from going on
    "gap",  # |ln old - ln drawn| of each token
    "kl",  # KL of each token that has a reference
    "kl_tokens",
)


class DrawnLoss(Loss):
    """Loss on drawn answers. A step's loss is divided by divisor()."""

    data, source = QUESTIONS, "drawn.rewarded"
    words = Words(
        "question",
        "whose prompts are",
        row="question",
        content="question with its answers",
        evaluation="greedy answers to",
    )
    # a question or two of a step may be dead; drawing takes longer than training; samples are some of the
    # answers that are counted anyway; each rollout phase is looked at
    facts = Facts(
        usual_rows=16,
        has_small_steps=False,
        usual_steps=200,
        evaluations_between=5,
        asks_samples=False,
        keeps_reference=True,
    )
    reward_names: tuple[str, ...] = ()

    def inner_text(self) -> str:
        """Say how many steps there are on a draw, if several."""
        count = self.options.inner_steps
        return f"; {count} steps on each draw" if count > 1 else ""

    def divisor(self, answers: int, tokens: int) -> float:
        """Return the divisor of a step's summed loss: the tokens of all answers, at least 1."""
        return max(float(tokens), 1.0)

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Name the entries of sums()."""
        return (*SUMS, *map(reward_metric, self.reward_names))

    def sums(self, device: torch.device | str = "cpu", **values: Tensor | float) -> Tensor:
        """Put values by name into (len(sum_names),) float64, with 0 elsewhere."""
        places = {name: place for place, name in enumerate(self.sum_names)}
        found = torch.zeros(len(places), dtype=torch.float64, device=device)
        for name, value in values.items():
            found[places[name]] = value
        return found

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """Join sums: the first one is a maximum."""
        return torch.cat([torch.maximum(a[:1], b[:1]), a[1:] + b[1:]])

    def means(self, sums: list[float]) -> dict[str, float]:
        """Compute the metrics by name from sums(); NaN for the mean of nothing.

        | name                   | what                                                                   |
        |------------------------|------------------------------------------------------------------------|
        | reward, reward_NAME    | the mean over the answers: in all, and of each reward without its      |
        |                        | weight                                                                 |
        | reward_std             | the standard deviation in a group, in the mean                         |
        | dead_groups            | the share of the groups whose rewards are equal                        |
        | failed_groups          | how many had no rewards                                                |
        | length, cut            | tokens of an answer; the share of answers that were cut                |
        | entropy                | -ln p of the drawn tokens, in the mean                                 |
        | clip                   | the share of the trained tokens that the clip keeps from going on      |
        | engine_gap, .._gap_max | how far ln p of training and drawing are apart: the mean, the largest  |
        | kl, where measured     | the KL to the reference, per token                                     |
        | draw_seconds           | the seconds of drawing of a process, and the tokens of all of them per |
        | draw_tokens_per_second | second; where answers were drawn                                       |
        """
        of = dict(zip(self.sum_names, sums, strict=True))

        def mean(name: str, count: str) -> float:
            return of[name] / of[count] if of[count] else math.nan

        found = {
            "reward": mean("reward", "answers"),
            **{name: mean(name, "answers") for name in map(reward_metric, self.reward_names)},
            "reward_std": mean("spread", "groups"),
            "dead_groups": mean("dead_groups", "groups"),
            "failed_groups": of["failed_groups"],
            "length": mean("length", "answers"),
            "cut": mean("cut", "answers"),
            "entropy": mean("entropy", "length"),
            "clip": mean("clipped", "tokens"),
            "engine_gap": mean("gap", "tokens"),
            "engine_gap_max": of["gap_max"] if of["tokens"] else math.nan,
        }
        if of["kl_tokens"]:
            found["kl"] = mean("kl", "kl_tokens")
        if of["draws"]:
            seconds = mean("draw_seconds", "draws")
            found["draw_seconds"] = seconds
            found["draw_tokens_per_second"] = of["drawn_tokens"] / seconds if seconds else math.nan
        return found


def reward_metric(name: str) -> str:
    """Name the metric of one of several rewards."""
    return f"reward_{name}"
