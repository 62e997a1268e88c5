"""Losses on preferences between answers, from the log-probabilities of their tokens.

A loss is one file of this folder: its formula for an example. In the formulas c is the chosen answer, r the
rejected one, p(y) the probability of an answer y under the model, ref(y) that under the reference model, |y|
the number of its tokens with the end, and s the logistic function. A is the number of answers of a batch, n
that of their tokens.

The loss is computed in float64, which costs nothing compared with the model. Policy and reference are
subtracted token by token before the sum: if they are equal, it is exactly 0, in whatever order a device adds.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.errors import UserError

from ..common.batch import Batch, Reads
from ..common.option import AUTO
from .base import PAIRS, Default, Facts, LogProbLoss, Settings, Words
from .metrics import RIGHT, SHOWN, LossMetrics, Panel, Shown, percent

# The rate of a preference without cross entropy, relative to a supervised training's: in TRL 1e-6 and 2e-5;
# 1/10 and 1/30 were measured on small models (docs/preferences.md).
RATE_SHARE = 1 / 20
# Sums over the answers of micro-batches and processes; means() turns them into metrics.
SUMS = (
    "chosen",  # number of answers
    "rejected",
    "pairs",  # examples of two answers
    "singles",  # examples of one answer
    "nll",  # cross entropy per token of the chosen answers
    "logp_chosen",
    "logp_rejected",
    "reward_chosen",
    "reward_rejected",
    "reward_right",  # examples
    "raw_right",  # pairs
    "baseline",  # one of each single
)

# options of the formula -> what a loss without them has in their place
NO_AVERAGE = {"loss_average": "ipo, orpo and simpo always take the mean, and kto the sum"}
NO_REFERENCE = {"reference": "orpo and simpo compare with no other model"}

# the highest mean log-probability of an answer that has odds: fp32 has none nearer to 0
NEAREST = -(2.0**-24)

ACCURACIES = ("reward_accuracy", "raw_accuracy")  # the raw one for a loss without a reference

PREFERENCES = LossMetrics(
    {
        **RIGHT,
        "reward_accuracy": "reward accuracy",
        "raw_accuracy": "raw accuracy",
        "margin": "margin of the rewards",
        "reward_chosen": "reward of the chosen answer",
        "reward_rejected": "reward of the rejected answer",
        "logp_chosen": "log p of the chosen answer",
        "logp_rejected": "log p of the rejected answer",
        "nll": "NLL of the chosen answer, per token",
        "kl": "KL to the reference on a few answers, per token",
        "baseline": "KTO's baseline",
    },
    shares=(*RIGHT, *ACCURACIES),
    bar=(
        Shown(ACCURACIES, lambda share: f"accuracy {share:.0%}"),
        Shown(("margin",), lambda margin: f"margin {margin:.2g}"),
    ),
    line=(
        SHOWN,
        Shown(ACCURACIES, lambda share: f"accuracy {percent(share)}"),
        Shown(("margin",), lambda margin: f"margin {margin:.3g}"),
        Shown(("logp_chosen",), lambda nats: f"log p of a chosen answer {nats:.1f}"),
        Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
    ),
    loss_of="pair",
    nats=("nll", "the loss of the chosen answers"),
    picture="preferences.png",
    panels=(
        Panel("rewards", ("reward_chosen", "reward_rejected", "margin")),
        Panel("accuracy", ACCURACIES),
        Panel("log p of an answer", ("logp_chosen", "logp_rejected")),
        Panel("per token", ("nll", "kl")),
    ),
    caption="rewards, accuracies, log p and KL over the steps",
    heading="Preferences, of the training data",
    explanation=(
        "An accuracy is the share of pairs whose chosen answer wins: by its reward, which is against the"
        " reference, or, raw, by its own log p. A high one alone proves nothing: the chosen answers"
        " should not get less likely."
    ),
)


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


class PreferenceLoss(LogProbLoss):
    """Loss on answers. It adds sft_weight times the cross entropy of the chosen answer, -ln p(c)/|c|."""

    data, source = PAIRS, "pairs.source"
    paired: ClassVar[bool] = True  # an example is two answers; else it is one with a label
    averaged: bool = False  # whether answers are compared by their means over tokens
    usual_beta: ClassVar[float] = 0.1
    words = Words("pair", "whose prompts are")
    helps: ClassVar[dict[str, str]] = {"reference": "the reference model"}

    @property
    def metrics(self) -> LossMetrics:
        return dataclasses.replace(PREFERENCES, loss_of=self.words.example)

    @property
    def facts(self) -> Facts:
        """A preference alone gets a smaller rate than what has the cross entropy of right answers in it."""
        return Facts(rate_share=RATE_SHARE if self.options.sft_weight == 0 else 1.0)

    @classmethod
    def defaults(cls, config: Settings) -> Iterator[Default]:
        beta = config.beta
        if config.is_automatic("beta") and "beta" in {f.name for f in dataclasses.fields(cls.Options)}:
            beta = cls.usual_beta
            yield "beta", beta, f"the usual one of --loss {cls.name}"
        yield "sft_weight", *cls.usual_weight(beta)

    @classmethod
    def usual_weight(cls, beta: float) -> tuple[float, str]:
        """Choose (sft_weight, why)."""
        return 1.0, "keeps the right answers likely, which the preference alone does not"

    @classmethod
    def check(cls, config: Settings) -> None:
        weight = config.sft_weight
        if weight is not AUTO and weight < 0:
            raise UserError(f"--sft_weight {weight:g}: must be a weight, 0 or more; -1 leaves it to the loss")

    def judge(self) -> PreferenceLoss:
        """Return the loss with the cross entropy of the chosen answers at weight 1 or more.

        A preference alone is the smaller the higher the rate, also where the right answers get lost.
        """
        if self.options.sft_weight >= 1:
            return self
        return type(self)(dataclasses.replace(self.options, sft_weight=1.0))

    def reads(self) -> Reads:
        reference = ("reference",) if self.needs_reference else ()
        # how many answers there are is not known; what there is of each is a few numbers
        return Reads(("answer", "chosen", *reference), answers=2)

    def settings(self) -> list[str]:
        """Describe the settings of the formula."""
        return [f"beta {self.options.beta:g}"]

    @property
    def description(self) -> str:
        """The loss with its settings.

        "dpo, beta 0.1, log p summed, with 1 x the NLL of the chosen answer"
        """
        weight = self.options.sft_weight
        nll = f"with {weight:g} x the NLL of the chosen answer" if weight else "without NLL"
        return ", ".join([self.name, *self.settings(), nll])

    def reference_text(self, peft: str) -> str:
        """Say what the loss compares with."""
        if not self.needs_reference:
            return "no reference"
        if self.options.reference:
            return f"reference: {self.options.reference_name}"
        return "reference: the base" + (", adapter off" if peft != "none" else "")

    # the formula

    @abc.abstractmethod
    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each example, from the scores() of answers (A,)."""

    @property
    def scale(self) -> float:
        """A reward is this many times what the loss compares."""
        return self.options.beta

    def from_log_probs(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (the loss, summed over a batch's examples; its SUMS (len(SUMS),)); float64.

        log_probs (n,) are ln p of the answers' tokens. Each answer has a token. Without examples the loss is
        0, with a graph.
        """
        answers, chosen = Answers.of(log_probs, batch), batch.chosen
        if self.needs_reference and batch.reference is None and len(chosen):
            raise ValueError(f"{self.name}: the batch has no `reference`, the reference's log-probabilities")
        losses = self.example_losses(self.scores(answers), batch)
        cross_entropy = -answers.logp / answers.tokens
        cross_entropy = cross_entropy[0::2] if self.paired else torch.where(chosen, cross_entropy, 0.0)
        loss = losses.sum()
        if self.options.sft_weight:
            loss = loss + self.options.sft_weight * cross_entropy.sum()
        with torch.no_grad():
            return loss, self._metric_sums(answers, batch)

    def scores(self, answers: Answers) -> Tensor:
        """Compute the scores that the loss compares: (A,), the sum or the mean of ln p, or of ln p - ln
        ref."""
        scores = answers.ratio if self.needs_reference else answers.logp
        return scores / answers.tokens if self.averaged else scores

    def _metric_sums(self, answers: Answers, batch: Batch) -> Tensor:
        chosen = batch.chosen
        rewards = self.scale * self.scores(answers)
        baseline = 0.0
        if self.paired:
            right = above(rewards[0::2] - rewards[1::2])
            raw_right = above(answers.logp[0::2] - answers.logp[1::2])
        else:
            baseline = batch.baseline
            better = rewards - self.options.beta * baseline
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
        values = [torch.as_tensor(sums[name], dtype=torch.float64, device=chosen.device) for name in SUMS]
        return torch.stack([value.sum() for value in values])

    def means(self, sums: list[float]) -> dict[str, float]:
        """Compute the metrics by name from the sums of SUMS; NaN for the mean of nothing.

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
        of = dict(zip(SUMS, sums, strict=True))

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
