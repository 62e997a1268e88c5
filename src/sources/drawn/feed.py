"""The batches of a training on rewards, whose answers the model samples for each step, or for some of them.

A rollout phase is for `inner_steps` optimizer steps. All questions of a step go through one engine in each
process. Then the processes add up what they have, and share out the groups evenly, each over its
micro-batches. A group that trains nothing is left out. The step is divided by all answers all the same, so
that only the time changes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_miss import disabled
from rwkv_miss.adapter import only_linears_change
from rwkv_miss.errors import UserError

from ...common.batch import Batch
from ...data.answer_batches import GROUP, collate_answers
from ...data.answer_example import AnswerGroup
from ...data.batches import Schedule
from ...evaluation.rewards import Failed
from ...losses._drawn import DrawnLoss, reward_metric
from ..base import BetweenSteps, Feed, Source, StepSize
from ..policy import Policy, policy_of
from ..reference_model import build_reference, reference_of
from .rollouts import Group, Rollouts

KL_EVERY = 10  # phases, of which the KL of one is measured where none is trained


class AllFailed(BetweenSteps):
    """No group of a phase has rewards."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """Totals of a phase over all processes."""

    answers: float = 0  # scored answers
    tokens: float = 0  # tokens of the scored answers
    groups: float = 0  # scored groups
    failed: float = 0  # groups whose rewards failed
    trained: float = 0  # tokens of answers in the batches
    read: float = 0  # tokens of the batches
    broken: float = 0  # processes whose model overflows

    def tensor(self) -> Tensor:
        """Return (7,) float64, in the order of the fields."""
        return torch.tensor(dataclasses.astuple(self), dtype=torch.float64)


class Reference:
    """Reference of a draw: ln p by the base, or by the model of --reference. None without both."""

    def __init__(self, source: Source, policy: Policy):
        config = source.config
        self.trained = config.beta > 0
        self.log_probs = None
        model, other = policy.model, reference_of(config.reference)
        if only_linears_change(model) and (other is None or other.fingerprint == model.base_fingerprint):
            self.log_probs = functools.partial(_without_adapter, policy)
        elif other:
            built = build_reference(config).to(policy.device)
            self.log_probs = policy_of(built, source.chunks).log_probs

    def of(self, batch: Batch, phase: int) -> Tensor | None:
        """Return (n,) if the KL of this phase is trained or measured."""
        due = self.log_probs and (self.trained or phase % KL_EVERY == 0)
        return self.log_probs(batch) if due else None


def _without_adapter(policy: Policy, batch: Batch) -> Tensor:
    with disabled(policy.model):
        return policy.log_probs(batch)


class RolloutFeed(Feed):
    """The micro-batches of one rank in order, on its device, which Lightning iterates over.

    They are as those of data.batches.Batches, but of rollouts. At the first micro-batch of a phase the model
    draws the answers, as it is then.
    """

    always_has_loss = True  # groups of equal rewards have the loss 0

    def __init__(
        self,
        rollouts: Rollouts,
        schedule: Schedule,
        steps: range,
        source: Source,
        policy: Policy,
    ):
        self.rollouts, self.schedule, self.steps, self.policy = rollouts, schedule, steps, policy
        self.loss: DrawnLoss = source.loss
        self.rewards, self.chunk = rollouts.rewards, source.chunks.size
        self.shared = not self.chunk  # the prompt is read once for its answers, see prompt_reading()
        self.first_group: Group | None = None  # the newest phase's, for samples.jsonl
        self.totals = Totals()
        self.batches: list[Batch] = []
        self.phase_sums: Tensor | None = None  # metrics of this rank's newest phase
        # metrics of the step under way: phase_sums, in the first step of a phase with the drawing time
        self.step_sums: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps) * self.schedule.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps:
            if step % self.schedule.repeats == 0:
                self._sample(step)
            else:
                self.step_sums = self.phase_sums
            for micro in range(self.schedule.accumulate):
                yield self.batches[micro]

    def keep(self, micro: int, log_probs: Tensor) -> None:
        """Keep ln p of the tokens of a step's micro-batch, as the training has them, (n,): the `old` of all
        steps of a phase are those of its first.
        """
        batch = self.batches[micro]
        if batch.old is None:
            batch.old = log_probs.detach()

    def size(self, step: int) -> StepSize:
        totals = self.totals
        return StepSize(int(totals.read), int(totals.trained), totals.groups + totals.failed)

    def waits_for(self, step: int) -> bool:
        # drawing waits for the GPU anyway, and a model that is about to be rolled back should draw nothing
        return step % self.schedule.repeats == 0

    may_stop_after = waits_for  # a checkpoint has no answers in it, so the next step has to sample new ones

    def abandon(self) -> None:
        """Drop the answers of the newest phase after a rollback: the model that drew them is gone."""
        self.totals = dataclasses.replace(self.totals, trained=0, read=0)
        self._share_out([])

    def _sample(self, step: int) -> None:
        phase, begun = step // self.schedule.repeats, time.perf_counter()
        places = [
            place
            for micro in range(self.schedule.accumulate)
            for row in self.schedule.micro_rows(step, micro, self.policy.processes.rank)
            for place in self.schedule.rows[row]
        ]
        groups: list[Group] = []
        error = None
        with self.policy.undisturbed():
            try:
                groups = self.rollouts.groups(phase, places)
            except UserError as caught:
                error = caught
            seconds = time.perf_counter() - begun
            examples = [group.example() for group in groups if self._is_trained(group)]
            self.totals = self._totals(groups, examples, error)
            self._check(step, groups, error)
            self.first_group = groups[0] if groups else None
            self.phase_sums = self._sums(groups)
            sampled = {"draws": 1, "draw_seconds": seconds, "drawn_tokens": sum(g.tokens for g in groups)}
            self.step_sums = self.phase_sums + self.loss.sums(self.policy.device, **sampled)
            self._share_out(self._share_of(examples))
            self._complete(phase)

    def _is_trained(self, group: Group) -> bool:
        """Tell whether a group has something to learn from."""
        return True

    def _complete(self, phase: int) -> None:
        """Add further entries to the batches of a phase."""

    def _totals(self, groups: list[Group], examples: list[AnswerGroup], error: UserError | None) -> Totals:
        scored = [group for group in groups if not group.failed]
        of_process = Totals(
            answers=sum(len(group.answers) for group in scored),
            tokens=sum(group.tokens for group in scored),
            groups=len(scored),
            failed=len(groups) - len(scored),
            trained=sum(example.targets for example in examples),
            read=sum(_read(example, self.shared) for example in examples),
            broken=float(error is not None),
        )
        device = self.policy.device
        return Totals(*self.policy.processes.total(of_process.tensor().to(device)).tolist())

    def _check(self, step: int, groups: list[Group], error: UserError | None) -> None:
        """Raise UserError on all ranks if one of them could not sample, or no group has rewards."""
        if self.totals.broken:
            raise error or UserError(
                f"the model of another process overflows in the rollouts of step {step + 1}"
            )
        if not self.totals.groups:
            reasons = [group.scored.reason for group in groups if isinstance(group.scored, Failed)]
            raise AllFailed(
                f"step {step + 1}: the rewards of all {self.totals.failed:.0f} groups failed"
                + (f", the first one's: {reasons[0]}" if reasons else "")
                + "; what was done before is saved. Mend the reward, and go on with --resume auto"
            )

    def _sums(self, groups: list[Group]) -> Tensor:
        """Sum the metrics of all scored answers, also of dead groups. The time is added elsewhere."""
        scored = [group for group in groups if not group.failed]
        answers = [answer for group in scored for answer in group.answers]
        totals = [group.scored.total for group in scored]
        by_name = zip(
            self.rewards.names,
            sum((group.scored.values.sum(0) for group in scored), torch.zeros(len(self.rewards.names))),
        )
        return self.loss.sums(
            self.policy.device,
            answers=len(answers),
            groups=len(scored),
            dead_groups=sum(not group.live for group in scored),
            failed_groups=len(groups) - len(scored),
            reward=sum(float(total.sum()) for total in totals),
            spread=sum(float(total.std()) for total in totals if len(total) > 1),
            length=sum(len(answer.tokens) for answer in answers),
            cut=sum(answer.cut for answer in answers),
            entropy=-sum(float(one.sum(dtype=np.float64)) for group in scored for one in group.log_probs),
            **{reward_metric(name): float(value) for name, value in by_name},
        )

    def _share_of(self, examples: list[AnswerGroup]) -> list[AnswerGroup]:
        """Return the groups that this process trains on: an equal share of all, alike in length.

        Otherwise a process with only live groups would make the others wait.
        """
        processes = self.policy.processes
        everyone = itertools.chain.from_iterable(processes.gathered(examples))
        by_length = sorted(everyone, key=lambda example: max(answer.inputs for answer in example.answers))
        return by_length[processes.rank :: processes.world]

    def _share_out(self, examples: list[AnswerGroup]) -> None:
        """Make the micro-batches of groups in the order of their lengths: as few as can be, evenly full.

        The others are empty.
        """
        weight = self.loss.divisor(self.totals.answers, self.totals.tokens)
        full = -(-len(examples) // self.schedule.micro_bsz)
        self.batches = []
        for micro in range(self.schedule.accumulate):
            begin, end = (min(n, full) * len(examples) // max(full, 1) for n in (micro, micro + 1))
            rows = [[example] for example in examples[begin:end]]
            batch = collate_answers(rows, weight, self.chunk, self.shared, GROUP)
            self.batches.append(batch.to(self.policy.device))


class RewardFeed(RolloutFeed):
    """Feed of answers with rewards, and with ln p of their reference where the KL is trained or measured."""

    def __init__(self, *drawn: Any, reference: Reference):
        super().__init__(*drawn)
        self.reference = reference

    def _is_trained(self, group: Group) -> bool:
        return not group.failed and (group.live or self.loss.options.beta > 0)

    def _complete(self, phase: int) -> None:
        for batch in self.batches:
            batch.reference = self.reference.of(batch, phase)


def _read(example: AnswerGroup, shared: bool) -> int:
    """Count the tokens of a group in a batch; a prompt that is read once counts once."""
    once = (len(example.prompt) - 1) * (len(example.answers) - 1)
    return example.inputs - once if shared else example.inputs
