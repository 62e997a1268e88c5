"""What a kind of training is to its steps and its evaluations: an Objective, and in a run its Feed.

An Objective has settings and no state. sft.py, preferences/ and rewards/ have one each, and kinds.py tells
which one a run has.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from rwkv_miss.errors import UserError

from ..config import Config
from ..data.batches import Batches, Schedule
from ..data.chat_template import Template
from ..data.encode import Encoder
from ..data.units import Units
from ..evaluation.rewards import Rewards
from ..model import RWKV
from ..model.log_probs import token_log_probs
from ..planning.step import chunks_of
from .policy import Policy


class BetweenSteps(UserError):
    """An error that all processes raise between two steps: what was done before can be saved."""


class StepSize(NamedTuple):
    """What a step has, over all processes."""

    tokens: int  # read
    targets: int  # trained; 0: no weight moves
    weight: float  # units: documents, pairs, questions


class Evaluated(NamedTuple):
    """What an evaluation found."""

    loss: float  # lower is better; it may be not finite
    metrics: dict[str, float]  # beside it, by the names of LossMetrics
    units: float  # that it is the mean of
    tokens: int  # that were predicted or drawn
    samples: list[dict[str, Any]]  # prompt, answer, right, and of a training on rewards reward


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run trains on, and what judges it."""

    documents: Units
    held_out: Units | None = None
    evaluated: Units | None = None  # those of held_out that evaluations look at; None: all
    # of a training on rewards
    encoder: Encoder | None = None  # which made the questions
    rewards: Rewards | None = None


class Feed:
    """The micro-batches of one rank in order, and what a step has beside them: here those of the data."""

    always_has_loss = False  # also without a trained token
    step_sums: Tensor | None = None  # metrics that the step under way has before its first micro-batch
    keep: Callable[[Tensor], None] | None = None  # takes ln p of a micro-batch's tokens, (n,)

    def __init__(self, batches: Batches, schedule: Schedule):
        self.batches, self.schedule = batches, schedule

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.batches)

    def before_step(self) -> dict:
        """Return what every micro-batch of the next step has beside its own."""
        return {}

    def size(self, step: int) -> StepSize:
        """Return the size of a step (0-based), which is the one under way."""
        schedule = self.schedule
        return StepSize(schedule.step_tokens(step), schedule.step_targets(step), schedule.step_weight(step))

    def may_stop_after(self, step: int) -> bool:
        """Tell whether a run may end after this step."""
        return True

    def waits_for(self, step: int) -> bool:
        """Tell whether the next step begins with work that needs this one's numbers."""
        return False

    def abandon(self) -> None:
        """Train no further on what was made by a state that is gone."""


class Evaluation:
    """The evaluations of a run. All processes take part."""

    def start(self, trainer) -> None:
        """Take what is gone later. The model is as before step 1, also in a resumed run."""

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        """Tell what the model is worth now. None where on some rank is_stopped() during the evaluation.

        Dropout and gradients are to be off.
        """
        raise NotImplementedError


class Objective(abc.ABC):
    """What a kind of training minimises, and what is beside it."""

    def __init__(self, config: Config):
        self.config, self.chunks = config, chunks_of(config)

    @property
    @abc.abstractmethod
    def loss(self) -> Any:
        """The loss with its settings, which are filled in: of ln p of trained tokens and their batch."""

    def __call__(
        self, model: RWKV, batch: dict, keep: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (the loss of a batch, summed over what its step's weight counts; sums of the metrics).

        The sums are float64, as means() takes them. `keep` gets ln p of the trained tokens, (n,). The batch's
        `width` is the length of the longest row that any rank has in its batch.
        """
        log_probs = token_log_probs(model, batch, self.chunks, batch.get("width", 0))
        if keep:
            keep(log_probs.detach())
        return self.loss(log_probs, batch)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sums of two micro-batches or processes together."""
        return self.loss.joined(a, b)

    def means(self, sums: list[float]) -> dict[str, float]:
        """Return the metrics by name."""
        return self.loss.means(sums) if sums else {}

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        """Return the data of a run of so many steps with the values of the reference, where the loss needs
        them.

        The model is as before step 1, also in a run that goes on. `shared`: a prompt is read once for its
        answers.
        """
        return data

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        """Make the micro-batches of these steps."""
        rank, chunk = policy.processes.rank, self.chunks.size
        batches = Batches(data.documents, schedule, steps.stop, rank, steps.start, chunk, shared)
        return Feed(batches, schedule)

    def before_evaluation(
        self, units: Units, batches: Callable[[Units], Iterator[dict]], policy: Policy
    ) -> dict:
        """Return what every batch of an evaluation of these units has beside its own."""
        return {}

    @abc.abstractmethod
    def evaluation(self, module) -> Evaluation:
        """Make the evaluations of a run, at its start."""

    def judge(self, template: Template) -> contextlib.AbstractContextManager[Rewards | None]:
        """Open what judges the answers of a run; None where it samples none."""
        return contextlib.nullcontext()

    def callbacks(self, folder: str) -> list:
        """Make the trainer's callbacks that write into the run's folder beside the report."""
        return []
