"""GRPO's loss, from the log-probabilities of answers that the model has drawn, and from their rewards.

A *group* is the answers to one question. In the formulas p is a token's probability under the model now, old
its probability before the first step on these answers, drawn the probability that the engine drew it with,
ref its probability under the reference, and A the advantage of the token's answer:

    token = -w min(r A, clip(r, 1 - low, 1 + high) A) + beta r k,    r = p / old,  w = min(old / drawn, CAP),
                                                                     k = ref / p - ln(ref / p) - 1

w is detached. k is the estimate of the KL of arXiv 2402.03300, eq. 4. r in front of k has a gradient too, so
the gradient of the term is the KL's own, also if r is 1 (arXiv 2512.02556); k alone has the gradient of the
other KL, from the reference to the model.

All of it is computed in float64, as in preference_loss.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.batch import Batch

# Largest weight of a token that the engine drew with another probability than training computes. It is that
# of truncated importance sampling in https://fengyao.notion.site/off-policy-rl and its libraries; TRL's is 3.
CAP = 2.0
# ln of the largest ratio. The gradient goes on as at this one: it still pushes the token, and fp32 holds it.
LARGEST = 20.0
ROUNDING = 1e-12  # relative difference up to which rewards count as equal
DEVIATION = 1e-4  # added to a group's standard deviation, as in TRL

# Sums over micro-batches and processes; the first is a maximum, and the rewards by name follow. means() turns
# them into metrics.
METRICS = (
    "gap_max",  # the largest |ln old - ln drawn|
    # of the answers that were drawn and scored
    "answers",
    "groups",
    "dead_groups",  # of equal rewards
    "failed_groups",  # whose rewards failed; they count nowhere else
    "reward",  # summed over answers
    "spread",  # standard deviation, summed over groups
    "length",  # tokens of each answer
    "cut",  # answers that were cut
    "entropy",  # -ln drawn of each token
    # of drawing
    "draws",  # processes that drew
    "draw_seconds",  # of each of them
    "drawn_tokens",
    # of training
    "tokens",
    "clipped",  # tokens that the clip keeps from going on
    "gap",  # |ln old - ln drawn| of each token
    "kl",  # of each token that has a reference
    "kl_tokens",
)


def advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Compute how much better each answer is than its group: (P, G) from rewards (P, G) float64.

    The group's mean is subtracted. With `scale` the rest is divided by the standard deviation (of a sample,
    with DEVIATION). Answers of a group with equal rewards have exactly 0.
    """
    found = rewards - rewards.mean(1, keepdim=True)
    if scale:
        found = found / (rewards.std(1, keepdim=True) + DEVIATION)
    # the mean of equal numbers may be off by a rounding
    return found.masked_fill(dead(rewards)[:, None], 0.0)


def dead(rewards: Tensor) -> Tensor:
    """Find the groups with nothing to learn from: (P,) bool for rewards (P, G), true if all are equal.

    They may differ by the rounding of a sum: 0.1 + 0.2 is not 0.3.
    """
    high, low = rewards.amax(1), rewards.amin(1)
    return high - low <= ROUNDING * torch.maximum(high.abs(), low.abs())


class DrawnAnswers:
    """Sums over drawn answers for the metrics of a loss on them. A step's loss is divided by divisor()."""

    rewards: tuple[str, ...] = ()  # their names

    def divisor(self, answers: int, tokens: int) -> float:
        """Return the divisor of a step's summed loss: the tokens of all answers, at least 1."""
        return max(float(tokens), 1.0)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Name the entries of sums()."""
        return (*METRICS, *map(reward_metric, self.rewards))

    def sums(self, device: torch.device | str = "cpu", **values: Tensor | float) -> Tensor:
        """Put values by name into (len(metrics),) float64, with 0 elsewhere."""
        places = {name: place for place, name in enumerate(self.metrics)}
        found = torch.zeros(len(places), dtype=torch.float64, device=device)
        for name, value in values.items():
            found[places[name]] = value
        return found

    @staticmethod
    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Join the sums of two micro-batches or processes."""
        return torch.cat([torch.maximum(a[:1], b[:1]), a[1:] + b[1:]])

    def means(self, sums: Sequence[float]) -> dict[str, float]:
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
        of = dict(zip(self.metrics, sums, strict=True))

        def mean(name: str, count: str) -> float:
            return of[name] / of[count] if of[count] else math.nan

        found = {
            "reward": mean("reward", "answers"),
            **{name: mean(name, "answers") for name in map(reward_metric, self.rewards)},
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


@dataclasses.dataclass(frozen=True)
class GrpoLoss(DrawnAnswers):
    """GRPO's loss with its settings.

    | kind    | loss of a step                                                   | arXiv      |
    |---------|------------------------------------------------------------------|------------|
    | dapo    | the mean over the tokens of all answers                          | 2503.14476 |
    | grpo    | the mean over the tokens of an answer, and then over the answers | 2402.03300 |
    | dr_grpo | the sum over all tokens, by answers and max_tokens               | 2503.20783 |
    """

    kind: str  # dapo, grpo or dr_grpo
    clip_low: float
    clip_high: float
    beta: float  # of the KL; 0: none
    max_tokens: int  # the longest answer that may be drawn
    rewards: tuple[str, ...] = ()  # their names, for the metrics

    def divisor(self, answers: int, tokens: int) -> float:
        """Return the divisor of a step's summed loss; `tokens` are those of all answers.

        Dead groups count. It is at least 1, for a step without answers.
        """
        of_kind = {"dapo": tokens, "grpo": answers, "dr_grpo": answers * self.max_tokens}
        return max(float(of_kind[self.kind]), 1.0)

    def __call__(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (the summed loss of a batch, for divisor(); the sums of `metrics`), both float64.

        log_probs (n,) are ln p. The batch has `answer` (n,) int64, each token's answer; `advantage` (A,), of
        each answer; and `drawn` (n,), `old` (n,) or None, `reference` (n,) or None, the logarithms of the
        formulas' terms. Without `old` it is log_probs, as in the first step on drawn answers. With
        `reference` the KL is measured, and with beta trained. Without answers the loss is 0, with a graph.
        """
        if self.beta and batch.reference is None and len(log_probs):
            raise ValueError(f"beta {self.beta}: the batch has no `reference`, the reference's ln p")
        new, answer = log_probs.double(), batch.answer
        old = new.detach() if batch.old is None else batch.old.double()
        advantage, gap = batch.advantage.double()[answer], old - batch.drawn.double()
        ratio = bounded_exp(new - old)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        weight = gap.clamp(max=math.log(CAP)).exp()
        losses = -weight * torch.minimum(ratio * advantage, clipped * advantage)
        kl = new.new_zeros(0)
        if batch.reference is not None:
            kl = ratio * kl_estimate(batch.reference.double() - new)
        if self.beta:
            losses = losses + self.beta * kl
        if self.kind == "grpo":
            # not bincount: the plan counts memory on tensors without values, where that does not run
            tokens = losses.new_zeros(len(batch.advantage)).index_add(0, answer, torch.ones_like(losses))
            losses = losses / tokens[answer]
        loss = losses.sum()
        with torch.no_grad():
            held = (ratio < 1 - self.clip_low) & (advantage < 0)
            held |= (ratio > 1 + self.clip_high) & (advantage > 0)
            return loss, self.sums(
                new.device,
                gap_max=gap.abs().amax() if len(gap) else 0.0,
                tokens=len(new),
                clipped=held.sum(),
                gap=gap.abs().sum(),
                kl=kl.sum(),
                kl_tokens=len(kl),
            )


def reward_metric(name: str) -> str:
    """Name the metric of one of several rewards."""
    return f"reward_{name}"


def bounded_exp(exponents: Tensor) -> Tensor:
    """Compute exp up to LARGEST. Beyond it value and gradient stay as there."""
    return (exponents + (exponents.clamp(max=LARGEST) - exponents).detach()).exp()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Estimate the KL by k3 of http://joschu.net/blog/kl-approx.html, from ln(ref / p): never negative."""
    return bounded_exp(log_ratio) - log_ratio - 1
