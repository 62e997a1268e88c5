"""Losses on preferences between answers, from the log-probabilities of their tokens.

In the formulas c is the chosen answer, r the rejected one, p(y) the probability of an answer y under the
model, ref(y) that under the reference model, |y| the number of its tokens with the end, and s the logistic
function. A is the number of answers of a batch, n that of their tokens.

All of it is computed in float64, which costs nothing beside the model. Policy and reference are subtracted
token by token before the sum: if they are equal, it is exactly 0, in whatever order a device adds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.batch import Batch

# Sums over the answers of micro-batches and processes; means() turns them into metrics.
WITH_REFERENCE = ("dpo", "ipo", "kto")  # losses whose rewards are against a reference
METRICS = (
    "chosen",  # number of answers
    "rejected",
    "pairs",  # examples of two answers
    "singles",  # examples of one answer
    "nll",  # per token, of the chosen answers
    "logp_chosen",
    "logp_rejected",
    "reward_chosen",
    "reward_rejected",
    "reward_right",  # examples
    "raw_right",  # pairs
    "baseline",  # one of each single
)

# the highest mean log-probability of an answer that has odds: fp32 has none nearer to 0
NEAREST = -(2.0**-24)


class Answers(NamedTuple):
    """Input of the losses from the answers of a batch; all (A,) float64."""

    logp: Tensor  # ln p, summed over the tokens
    ratio: Tensor  # ln p - ln ref, summed; without a reference ln p
    tokens: Tensor  # number of tokens

    @classmethod
    def of(cls, log_probs: Tensor, batch: Batch) -> Answers:
        """Compute it from log_probs (n,) and a batch of collate_answers()."""
        answer, empty = batch.answer, log_probs.new_zeros(len(batch.chosen), dtype=torch.float64)
        log_probs, reference = log_probs.double(), batch.reference

        def summed(values: Tensor) -> Tensor:
            return empty.index_add(0, answer, values)

        logp = summed(log_probs)
        ratio = logp if reference is None else summed(log_probs - reference)
        return cls(logp, ratio, summed(torch.ones_like(log_probs)))


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Loss on preferences with its settings.

    | kind  | loss of an example, with b for beta                                          | arXiv      |
    |-------|-------------------------------------------------------------------------|------------|
    | dpo   | -ln s(b (ln p(c) - ln ref(c) - (ln p(r) - ln ref(r))))                  | 2305.18290 |
    | ipo   | ((ln p(c) - ln ref(c))/|c| - (ln p(r) - ln ref(r))/|r| - 1/(2 b))^2     | 2310.12036 |
    | simpo | -ln s(b (ln p(c)/|c| - ln p(r)/|r|) - gamma)                            | 2405.14734 |
    | orpo  | -lambda ln s(ln odds(c) - ln odds(r)), odds(y) = p / (1 - p) of         | 2403.07691 |
    |       | ln p = ln p(y)/|y|                                                      |            |
    | kto   | w s(-b (ln p(y) - ln ref(y) - baseline)) of a desirable answer, and     | 2402.01306 |
    |       | w s(b (ln p(y) - ln ref(y) - baseline)) of an undesirable one           |            |

    Each adds sft_weight times the cross entropy of the chosen answer, -ln p(c)/|c|. With `average` dpo uses
    means over tokens, as ipo does. `label_smoothing` is that of smoothed().
    """

    kind: str  # dpo, ipo, orpo, simpo or kto
    beta: float
    sft_weight: float  # of the chosen answer's cross entropy, per token
    average: bool  # dpo: the mean of an answer's log-probabilities, not their sum
    label_smoothing: float
    gamma: float  # simpo's margin
    orpo_lambda: float
    desirable_weight: float
    undesirable_weight: float

    @property
    def needs_reference(self) -> bool:
        """Tell whether the log-probabilities of a reference model are needed."""
        return self.kind in WITH_REFERENCE

    @property
    def paired(self) -> bool:
        """Tell whether an example is a pair of answers; else it is one answer with a label."""
        return self.kind != "kto"

    def __call__(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (the loss, summed over a batch's examples; the sums of METRICS (len(METRICS),)); float64.

        log_probs (n,) are ln p of the answers' tokens. The batch is that of collate_answers(): answer (n,)
        has the answer of each token, chosen (A,) tells the chosen answers; in pairs 2i is chosen and 2i + 1
        rejected. Each answer has a token. `reference` (n,) are ln ref, for losses that need it. kto reads
        `baseline`, a number that is the same for all examples of a step. Without examples the loss is 0,
        with a graph.
        """
        answers, chosen = Answers.of(log_probs, batch), batch.chosen
        if self.needs_reference and batch.reference is None and len(chosen):
            raise ValueError(f"{self.kind}: the batch has no `reference`, the reference's log-probabilities")
        cross_entropy = -answers.logp / answers.tokens
        if self.paired:
            losses, cross_entropy = self._pair_losses(answers), cross_entropy[0::2]
        else:
            losses = self._single_losses(answers, chosen, batch.baseline)
            cross_entropy = torch.where(chosen, cross_entropy, 0.0)
        loss = losses.sum()
        if self.sft_weight:
            loss = loss + self.sft_weight * cross_entropy.sum()
        with torch.no_grad():
            return loss, self._metric_sums(answers, batch)

    def scores(self, answers: Answers) -> Tensor:
        """Compute the scores that the loss compares: (A,), the sum or the mean of ln p, or of ln p - ln
        ref."""
        scores = answers.ratio if self.needs_reference else answers.logp
        averaged = self.kind in ("ipo", "simpo", "orpo") or self.average
        return scores / answers.tokens if averaged else scores

    def _pair_losses(self, answers: Answers) -> Tensor:
        """Compute the loss of each pair, (A / 2,)."""
        scores = self.scores(answers)
        chosen, rejected = scores[0::2], scores[1::2]
        if self.kind == "ipo":
            return (chosen - rejected - 1 / (2 * self.beta)).square()
        if self.kind == "orpo":
            return -self.orpo_lambda * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
        margin = self.beta * (chosen - rejected)
        if self.kind == "simpo":
            margin = margin - self.gamma
        return smoothed(margin, self.label_smoothing)

    def _single_losses(self, answers: Answers, desirable: Tensor, baseline: Tensor | float) -> Tensor:
        """Compute the loss of each answer, (A,): a desirable one should be far above the baseline."""
        reward = self.beta * (self.scores(answers) - baseline)
        weight = torch.full_like(reward, self.undesirable_weight)
        weight = weight.masked_fill(desirable, self.desirable_weight)
        return weight * torch.sigmoid(torch.where(desirable, -reward, reward))  # 1 - s(x) = s(-x)

    def _metric_sums(self, answers: Answers, batch: Batch) -> Tensor:
        chosen = batch.chosen
        rewards = (self.orpo_lambda if self.kind == "orpo" else self.beta) * self.scores(answers)
        baseline = 0.0
        if self.paired:
            right = above(rewards[0::2] - rewards[1::2])
            raw_right = above(answers.logp[0::2] - answers.logp[1::2])
        else:
            baseline = batch.baseline
            better = rewards - self.beta * baseline
            right, raw_right = above(torch.where(chosen, better, -better)), chosen[:0]

        def of(side: Tensor, values: Tensor) -> Tensor:
            return torch.where(side, values, 0.0)

        examples = len(chosen) // 2 if self.paired else len(chosen)
        sums = {
            "chosen": chosen,
            "rejected": ~chosen,
            "pairs": examples if self.paired else 0,
            "singles": 0 if self.paired else examples,
            "nll": of(chosen, -answers.logp / answers.tokens),
            "logp_chosen": of(chosen, answers.logp),
            "logp_rejected": of(~chosen, answers.logp),
            "reward_chosen": of(chosen, rewards),
            "reward_rejected": of(~chosen, rewards),
            "reward_right": right,
            "raw_right": raw_right,
            "baseline": 0 if self.paired else examples * baseline,
        }
        values = [torch.as_tensor(sums[name], dtype=torch.float64, device=chosen.device) for name in METRICS]
        return torch.stack([value.sum() for value in values])

    @staticmethod
    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Join the sums of two micro-batches or processes."""
        return a + b

    @staticmethod
    def means(sums: Sequence[float]) -> dict[str, float]:
        """Compute the metrics by name from the sums of METRICS; NaN for the mean of nothing.

        | name                            | mean of what                                              |
        |---------------------------------|-----------------------------------------------------------|
        | nll                             | the cross entropy of the chosen answers, per token        |
        | logp_chosen, logp_rejected      | ln p, summed over an answer                               |
        | reward_chosen, reward_rejected  | beta (orpo: lambda) times what the loss compares, scores()|
        | margin                          | the difference of these two                               |
        | reward_accuracy                 | pairs whose chosen answer has the higher reward; of kto,  |
        |                                 | answers that are on their side of the baseline            |
        | raw_accuracy, not of kto        | pairs whose chosen answer has the higher ln p, summed     |
        | baseline, of kto                | the baseline                                              |

        A tie counts as half.
        """
        of = dict(zip(METRICS, sums, strict=True))

        def mean(name: str, count: str) -> float:
            return of[name] / of[count] if of[count] else math.nan

        reward = {side: mean(f"reward_{side}", side) for side in ("chosen", "rejected")}
        examples = of["pairs"] + of["singles"]
        found = {
            "nll": mean("nll", "chosen"),
            "logp_chosen": mean("logp_chosen", "chosen"),
            "logp_rejected": mean("logp_rejected", "rejected"),
            "reward_chosen": reward["chosen"],
            "reward_rejected": reward["rejected"],
            "margin": reward["chosen"] - reward["rejected"],
            "reward_accuracy": of["reward_right"] / examples if examples else math.nan,
        }
        if of["pairs"]:
            found["raw_accuracy"] = mean("raw_right", "pairs")
        if of["singles"]:
            found["baseline"] = mean("baseline", "singles")
        return found


def above(difference: Tensor) -> Tensor:
    """Count 1 where a difference is above 0 and a half where it is 0."""
    return (difference > 0) + 0.5 * (difference == 0)


def smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """Compute -ln s(margin), assuming that a share e of the pairs is the wrong way round.

    That is -(1 - e) ln s(x) - e ln s(-x), the conservative DPO of https://ericmitchell.ai/cdpo.pdf.
    """
    loss = -F.logsigmoid(margin)
    return (1 - smoothing) * loss - smoothing * F.logsigmoid(-margin) if smoothing else loss


def log_odds(logp: Tensor) -> Tensor:
    """Compute ln(p / (1 - p)) from ln p in float64, finite, and with a finite gradient, at p = 1 too."""
    # the gradient ignores the clamp: an answer that is too likely has the largest one
    logp = logp + (logp.clamp(max=NEAREST) - logp).detach()
    return logp - torch.log(-torch.expm1(logp))
