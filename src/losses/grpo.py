"""GRPO: the loss of drawn answers from their log-probabilities and rewards, --loss grpo.

A *group* is the answers to one question. In the formulas p is a token's probability under the model now, old
its probability before the first step on these answers, drawn the probability that the engine drew it with,
ref its probability under the reference, and A the advantage of the token's answer:

    token = -w min(r A, clip(r, 1 - low, 1 + high) A) + beta r k,    r = p / old,  w = min(old / drawn, CAP),
                                                                     k = ref / p - ln(ref / p) - 1

w is detached. k is the estimate of the KL of arXiv 2402.03300, eq. 4. r in front of k has a gradient too, so
the gradient of the term is the KL's own, also if r is 1 (arXiv 2512.02556); k alone has the gradient of the
other KL, from the reference to the model.

All of it is computed in float64, as in _preference.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..common.batch import Batch, Reads
from ..common.formatting import counted
from ..common.option import AUTO, opt
from . import options
from ._drawn import DrawnLoss
from .base import Default, LogProbLoss, Settings, register
from .metrics import LossMetrics, Panel, Shown, percent

# built-in rewards (src/evaluation/rewards.py); others are functions of --reward_file
REWARDS = ("exact", "number", "boxed", "math_verify", "partial", "regex", "length")
CLIP_HIGH = 0.28  # DAPO's, arXiv 2503.14476: rare tokens may become likelier faster than others rarer
# Largest weight of a token that the engine drew with another probability than training computes. It is that
# of truncated importance sampling in https://fengyao.notion.site/off-policy-rl and its libraries; TRL's is 3.
CAP = 2.0
# ln of the largest ratio. The gradient goes on as at this one: it still pushes the token, and fp32 holds it.
LARGEST = 20.0
ROUNDING = 1e-12  # relative difference up to which rewards count as equal
DEVIATION = 1e-4  # added to a group's standard deviation, as in TRL


@register
class Grpo(LogProbLoss, DrawnLoss):
    """GRPO's loss.

    | grpo_type | loss of a step                                                   | arXiv      |
    |-----------|------------------------------------------------------------------|------------|
    | dapo      | the mean over the tokens of all answers                          | 2503.14476 |
    | grpo      | the mean over the tokens of an answer, and then over the answers | 2402.03300 |
    | dr_grpo   | the sum over all tokens, by answers and max_tokens               | 2503.20783 |
    """

    name = "grpo"
    about = "the model answers questions, and learns from the rewards of its answers (docs/rewards.md)"
    # on the demo's model 3e-3 learns and 1e-2 collapses; a supervised training has 3e-3
    facts = dataclasses.replace(DrawnLoss.facts, rate_share=1 / 2)
    helps = {
        "reference": "the model that the KL is taken to",
        "beta": "the weight of the KL to the reference. Left out: 0, no KL",
    }
    instead = {"loss_average": "grpo has --grpo_type"}

    @dataclasses.dataclass(frozen=True)
    class Options(options.Draws, options.Reference, options.Beta):
        rewards: dict = opt(
            {},
            "what a rollout is rewarded for, with weights: exact=1,partial=0.5. A name alone has the"
            " weight 1. exact, number, boxed or math_verify: 1 for a right answer, judged as by"
            " scripts.evaluate. partial: the share of characters in the right place. regex: 1 if"
            " --reward_regex is found. length: 0, and less for rollouts above --reward_length. Another"
            " name: the function of this name in --reward_file. A reward of weight 0 is shown and not"
            " trained on. Empty: exact=1",
            automatic=True,
            bare=1.0,
        )
        reward_file: str = opt(
            "",
            "a Python file with functions NAME(prompt, answers, right). Each returns a list of"
            " numbers, one for each answer; right is the reference answer. Parameters cut and tokens after"
            " these get which answers were cut, and their tokens. The file's code is run, so only the command"
            " line can name it, and no YAML file",
            operator=True,
        )
        reward_regex: str = opt("", "the regular expression of --rewards regex, searched for in the rollout")
        reward_length: int = opt(
            0,
            "the longest rollout, in tokens, that --rewards length gives 0. A longer one gets less,"
            " down to -1 at --max_tokens",
            low=0,
        )
        reward_timeout: float = opt(
            10.0,
            "seconds that the functions of --reward_file have for the rollouts of one question. Then"
            " they are stopped, and the question is left out of the step",
            low=0.1,
            high=1e6,
        )
        grpo_type: str = opt(
            "dapo",
            "how the losses of tokens are put together. dapo: the mean over all tokens of the step."
            " grpo: the mean over an answer, then over the answers, so that a token of a long answer counts"
            " less. dr_grpo: the sum over --max_tokens, then the mean over the answers",
            choices=("dapo", "grpo", "dr_grpo"),
        )
        clip_low: float = opt(
            0.2,
            "a token that has lost more than this share of its probability since the rollout is not"
            " pushed down any further",
            alias=("epsilon",),
            low=0,
            high=1,
        )
        clip_high: float = opt(
            0.0,
            "a token that has gained more than this share of its probability since the rollout is"
            " not pushed up any further. 0: 0.28 for --grpo_type dapo, else the value of --clip_low",
            alias=("epsilon_high",),
            automatic=True,
            low=0,
            high=1e30,
        )
        advantage_scale: str = opt(
            "auto",
            "how advantages are scaled. group: the rewards of a question, minus their mean, are"
            " divided by their standard deviation. none: they are not divided. auto: none for --grpo_type"
            " dr_grpo, else group",
            choices=("auto", "group", "none"),
            automatic=True,
        )

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(self.options.rewards)

    @property
    def metrics(self) -> LossMetrics:
        rewards = self.options.rewards
        return reward_metrics({} if rewards is AUTO else rewards)

    @classmethod
    def defaults(cls, config: Settings) -> Iterator[Default]:
        of_type = f"as in the paper of --grpo_type {config.grpo_type}"
        yield "rewards", {"exact": 1.0}, "the reference answer, and nothing else"
        wider = config.grpo_type == "dapo" and config.clip_low < CLIP_HIGH
        high, reason = (CLIP_HIGH, of_type) if wider else (config.clip_low, "as --clip_low")
        yield "clip_high", high, reason
        yield "advantage_scale", "none" if config.grpo_type == "dr_grpo" else "group", of_type
        yield "beta", 0.0, "no KL, as rewards are checked and not learned"

    @property
    def description(self) -> str:
        """The loss with its settings.

        "grpo (dapo), 8 answers to a question, of at most 24 tokens; reward exact + 0.5 partial, against the
        mean of a question's answers, in units of their spread; clip 0.2 and 0.28; no KL"
        """
        given = self.options
        terms = " + ".join(
            name if weight == 1 else f"{weight:g} {name}" for name, weight in given.rewards.items()
        ).replace("+ -", "- ")
        scale = ", in units of their spread" if given.advantage_scale == "group" else ""
        return (
            f"grpo ({given.grpo_type}), {given.group_size} answers to a question, of at most"
            f" {counted(given.max_tokens, 'token')}; reward {terms}, against the mean of a question's"
            f" answers{scale}; clip {given.clip_low:g} and {given.clip_high:g}{self.inner_text()};"
            f" {self._kl_text()}"
        )

    def _kl_text(self) -> str:
        beta, reference = self.options.beta, self.options.reference
        if not beta:
            return "no KL"
        if reference:
            return f"KL {beta:g} to {self.options.reference_name}"
        return f"KL {beta:g} to the base, adapter off"

    def reads(self) -> Reads:
        names = ["answer", "advantage", "drawn"]
        names += ["old"] * (self.options.inner_steps > 1) + ["reference"] * (self.options.beta > 0)
        return Reads(tuple(names), answers=self.options.group_size)

    def divisor(self, answers: int, tokens: int) -> float:
        """Return the divisor of a step's summed loss; `tokens` are those of all answers.

        Dead groups count. It is at least 1, for a step without answers.
        """
        of_type = {"dapo": tokens, "grpo": answers, "dr_grpo": answers * self.options.max_tokens}
        return max(float(of_type[self.options.grpo_type]), 1.0)

    def from_log_probs(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (the summed loss of a batch, for divisor(); the sums of `sum_names`), both float64.

        log_probs (n,) are ln p. The batch has `answer` (n,) int64, each token's answer; `advantage` (A,), of
        each answer; and `drawn` (n,), `old` (n,) or None, `reference` (n,) or None, the logarithms of the
        formulas' terms. Without `old` it is log_probs, as in the first step on drawn answers. With
        `reference` the KL is measured, and with beta trained. Without answers the loss is 0, with a graph.
        """
        given, beta = self.options, self.options.beta
        if beta and batch.reference is None and len(log_probs):
            raise ValueError(f"beta {beta}: the batch has no `reference`, the reference's ln p")
        new, answer = log_probs.double(), batch.answer
        old = new.detach() if batch.old is None else batch.old.double()
        advantage, gap = batch.advantage.double()[answer], old - batch.drawn.double()
        ratio = bounded_exp(new - old)
        clipped = ratio.clamp(1 - given.clip_low, 1 + given.clip_high)
        weight = gap.clamp(max=math.log(CAP)).exp()
        losses = -weight * torch.minimum(ratio * advantage, clipped * advantage)
        kl = new.new_zeros(0)
        if batch.reference is not None:
            kl = ratio * kl_estimate(batch.reference.double() - new)
        if beta:
            losses = losses + beta * kl
        if given.grpo_type == "grpo":
            # not bincount: the plan counts memory on tensors without values, where that does not run
            tokens = losses.new_zeros(len(batch.advantage)).index_add(0, answer, torch.ones_like(losses))
            losses = losses / tokens[answer]
        loss = losses.sum()
        with torch.no_grad():
            held = (ratio < 1 - given.clip_low) & (advantage < 0)
            held |= (ratio > 1 + given.clip_high) & (advantage > 0)
            return loss, self.sums(
                new.device,
                gap_max=gap.abs().amax() if len(gap) else 0.0,
                tokens=len(new),
                clipped=held.sum(),
                gap=gap.abs().sum(),
                kl=kl.sum(),
                kl_tokens=len(kl),
            )


def reward_metrics(names: Iterable[str]) -> LossMetrics:
    """Describe the metrics of drawn answers that are scored by these rewards."""
    each = {f"reward_{name}": f"reward: {name}, without its weight" for name in names}
    return LossMetrics(
        {
            "reward": "reward of an answer",
            **(each if len(each) > 1 else {}),
            "reward_std": "its spread in a group",
            "dead_groups": "groups of equal rewards, which teach nothing",
            "failed_groups": "groups whose reward failed",
            "failed": "answers whose reward failed",
            "length": "length of an answer, tokens",
            "cut": "answers cut at --max_tokens",
            "entropy": "entropy per token",
            "kl": "KL to the reference per token, estimated",
            "clip": "tokens that are clipped",
            "engine_gap": "log p of training and engine, mean difference",
            "engine_gap_max": "the same, largest",
            "draw_seconds": "drawing, seconds",
            "draw_tokens_per_second": "drawing, tokens/s",
            "train_tokens_per_second": "training, tokens/s",
        },
        shares=("dead_groups", "cut", "clip"),
        faults=("failed_groups", "failed"),
        bar=(
            Shown(("reward",), lambda reward: f"reward {reward:.2f}"),
            Shown(("dead_groups",), lambda share: f"equal rewards {share:.0%}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.2f}"),
        ),
        line=(
            Shown(("reward",), lambda reward: f"reward {reward:.3f}"),
            Shown(("dead_groups",), lambda share: f"groups of equal rewards {percent(share)}"),
            Shown(("length",), lambda tokens: f"length {tokens:.4g} tokens"),
            Shown(("cut",), lambda share: f"cut at --max_tokens {percent(share)}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.3g} per token"),
            Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
            Shown(
                ("failed", "failed_groups"),
                lambda count: f"rewards failed {count:.0f}" if count else "",
                of="units",
            ),
        ),
        score="reward",
        picture="rewards.png",
        panels=(
            Panel("reward", ("reward", *(each if len(each) > 1 else ()))),
            Panel("share", ("dead_groups", "cut", "clip")),
            Panel("length of an answer (tokens)", ("length",)),
            Panel("per token", ("entropy", "kl")),
        ),
        caption="reward, groups of equal rewards, length, entropy and KL over the steps",
        heading="Drawn answers, of the training data",
        explanation=(
            "A group is the answers to one question. Where all get the same reward it teaches nothing: they"
            " are all right, or all wrong. So a model that has learnt all and one that is lost look alike"
            " but for their reward. An entropy near 0 means that the model has stopped trying anything else."
        ),
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


def bounded_exp(exponents: Tensor) -> Tensor:
    """Compute exp up to LARGEST. Beyond it value and gradient stay as there."""
    return (exponents + (exponents.clamp(max=LARGEST) - exponents).detach()).exp()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Estimate the KL by k3 of http://joschu.net/blog/kl-approx.html, from ln(ref / p): never negative."""
    return bounded_exp(log_ratio) - log_ratio - 1
