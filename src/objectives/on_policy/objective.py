"""On-policy distillation: the model answers, and a teacher tells what it would have written at each token.

It is --loss distill_on_policy. Answers are drawn as in a training on rewards, and take the same way to the
steps. But no reward judges them: each token has the KL from the teacher, over the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import recorded

from ...common.batch import Batch, Reads
from ...common.formatting import counted
from ...data.batches import Schedule
from ...data.examples import Examples
from ...data.held_out import FORWARD
from ...data.questions import LoadedQuestions, Questions, answer_limit
from ...data.tokenizer import Tokenizer
from ...model import RWKV
from ...model.batch_loss import batch_distillation
from ...model.reverse_kl import OnPolicyLoss
from ..base import Evaluation, Feed, TrainingData
from ..held_out_answers import RIGHT, SHOWN
from ..loss_metrics import LossMetrics, Shown, percent
from ..policy import Policy
from ..reference_model import TeacherBeside, reference_arch, relative_work
from ..rewards.objective import OnRewards
from ..rewards.sizes import FREE, have_answers, usual_length, within_row

OWN_ANSWERS = LossMetrics(
    {
        **RIGHT,
        "length": "length of an answer, tokens",
        "cut": "answers cut at --max_tokens",
        "entropy": "entropy per token",
        "draw_seconds": "drawing, seconds",
        "draw_tokens_per_second": "drawing, tokens/s",
        "train_tokens_per_second": "training, tokens/s",
    },
    shares=(*RIGHT, "cut"),
    bar=(Shown(("entropy",), lambda nats: f"entropy {nats:.2f}"),),
    line=(
        SHOWN,
        Shown(("length",), lambda tokens: f"length {tokens:.4g} tokens"),
        Shown(("cut",), lambda share: f"cut at --max_tokens {percent(share)}"),
        Shown(("entropy",), lambda nats: f"entropy {nats:.3g} per token"),
    ),
    heading="Drawn answers, of the training data",
    explanation="The loss is the KL from the teacher per token of these answers, in nats.",
)


class OnOwnAnswers(OnRewards):
    """Objective of --loss distill_on_policy. The loss of an evaluation is the KL on greedy answers."""

    metrics = OWN_ANSWERS
    called = "teacher"
    rate_share = 1.0

    @functools.cached_property
    def loss(self) -> OnPolicyLoss:
        return OnPolicyLoss(self.config.distill_temperature)

    def __call__(
        self, model: RWKV, batch: Batch, keep: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        teacher = self.loss.teacher(batch)
        loss = batch_distillation(model, batch, self.chunks, teacher)
        return loss, self.loss.sums(loss.device)

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        return self.loss.nats(loss)

    def means(self, sums: list[float]) -> dict[str, float]:
        found = super().means(sums)
        return {name: value for name, value in found.items() if name in self.metrics.titles}

    def defaults(self) -> Iterator[tuple[str, object, str]]:
        return iter(())

    def defaults_by_data(
        self, loaded: LoadedQuestions, tokenizer: Tokenizer
    ) -> Iterator[tuple[str, object, str]]:
        limit, reason = FREE, "the data have no reference answers, which would tell how long an answer is"
        if have_answers(loaded.questions):
            limit = answer_limit("exact", tokenizer, loaded.questions)
            reason = "1.25 times the longest reference answer, plus 16"
        ctx_len = self.config.value_or_zero("ctx_len")
        yield "max_tokens", *within_row(limit, reason, loaded, ctx_len)

    @property
    def needs_answers(self) -> bool:
        return False

    def estimated(self, examples: Questions, loaded: LoadedQuestions, tokenizer: Tokenizer) -> Questions:
        usual = usual_length(loaded, tokenizer, {}) if have_answers(loaded.questions) else math.inf
        return dataclasses.replace(examples, usual=usual)

    def reads(self) -> Reads:
        other = reference_arch(self.config.reference)
        dtype = torch.float32 if self.config.precision == "fp32" else torch.bfloat16
        return Reads(("teacher", "teacher_head"), 0, other.n_embd, other.vocab_size, dtype)

    @property
    def reading(self) -> float:
        own = reference_arch(self.config.load_model)
        return FORWARD * self.config.inner_steps * relative_work(self.config.reference, own)

    @property
    def description(self) -> str:
        """The loss with its settings: T^2 x the KL from big.pth, T 2, at each token of 8 answers ..."""
        config = self.config
        teacher = os.path.basename(recorded(config.reference).rstrip("/"))
        inner = f"; {config.inner_steps} steps on each draw" if config.inner_steps > 1 else ""
        return (
            f"{config.loss}, T^2 x the KL from {teacher}, T {config.distill_temperature:g}, at each token of"
            f" {counted(config.group_size, 'answer')} to a question, of at most"
            f" {counted(config.max_tokens, 'token')}{inner}"
        )

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        teacher = reference_arch(self.config.reference).describe()
        beside = f"teacher    {teacher}; stays beside the model, and reads each answer once a step"
        return [*super().lines(documents, schedule, arch), beside]

    def warnings(self, documents: Questions, tokenizer: Tokenizer) -> list[str]:
        return []

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        return dataclasses.replace(data, teacher=TeacherBeside(self.config, self.chunks, policy.device))

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        from ..rewards.rollouts import Rollouts  # the engine, which a plan need not load
        from .feed import TaughtFeed

        rollouts = Rollouts(policy.model, data.documents, data.encoder, data.rewards, self.config)
        return TaughtFeed(rollouts, schedule, steps, self, policy, data.teacher)

    def evaluation(self, module) -> Evaluation:
        from .evaluation import TaughtEvaluation

        data = module.data
        return TaughtEvaluation(data.encoder, data.rewards, self.config.reward_timeout)
