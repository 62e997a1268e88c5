"""Interface of a source of examples to the plan, the steps and evaluations: a Source, and in a run its Feed.

A Source has settings and a loss, and no state. Modules of this folder have one each as their SOURCE, and a
loss names its module.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch

from ..common.batch import Batch, Reads
from ..common.formatting import counted
from ..config import Config
from ..data.batches import Batches, Schedule
from ..data.chat_template import Template
from ..data.dataset import Loaded, load
from ..data.encode import Encoder
from ..data.examples import Examples
from ..data.formats import Reading, Report
from ..data.held_out import EVALUATION, FORWARD, USUAL_SAMPLE_TOKENS, SampleQuestion, questions
from ..data.tokenizer import Tokenizer
from ..evaluation.rewards import Rewards
from ..losses import Loss, loss_of
from ..model.batch_loss import Chunks
from .estimates import BatchSizes, Speed, Times, largest_batch
from .held_out_answers import MOST_ASKED, affordable, limit_of
from .policy import Policy
from .reference_model import LiveTeacher


class BetweenSteps(UserError):
    """Error that all processes raise between two steps: the steps before can be saved."""


class StepSize(NamedTuple):
    """Size of a step, over all processes."""

    tokens: int  # read
    targets: int  # trained; 0: no weight moves
    weight: float  # examples: documents, pairs, questions


class Evaluated(NamedTuple):
    """Result of an evaluation."""

    loss: float  # lower is better; it may be not finite
    metrics: dict[str, float]  # other metrics, by the names of LossMetrics
    examples: float  # the number of examples in the mean
    tokens: int  # predicted or drawn tokens
    samples: list[dict[str, Any]]  # prompt, answer, right, and for a training on rewards reward
    answers: Mapping[str, Any] = MappingProxyType({})  # results of in_common() and Judge for greedy answers


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Data of a run, for training and evaluations."""

    documents: Examples
    held_out: Examples | None = None
    evaluated: Examples | None = None  # examples of held_out that evaluations read; None: all
    # for a training on rewards
    encoder: Encoder | None = None  # the encoder that made the questions
    rewards: Rewards | None = None
    teacher: LiveTeacher | None = None  # teacher of a training on drawn answers


class Feed:
    """Micro-batches of one rank in order, and a step's extra values: here the data's own batches."""

    always_has_loss = False  # also without a trained token
    step_sums: Tensor | None = None  # metrics that the step under way has before its first micro-batch
    # takes ln p of the tokens, (n,), of a step's micro-batch, by its number
    keep: Callable[[int, Tensor], None] | None = None

    def __init__(self, batches: Batches, schedule: Schedule):
        self.batches, self.schedule = batches, schedule

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def before_step(self) -> dict[str, Any]:
        """Return entries that every micro-batch of the next step has besides."""
        return {}

    def size(self, step: int) -> StepSize:
        """Return the size of a step (0-based), which is under way."""
        schedule = self.schedule
        return StepSize(schedule.step_tokens(step), schedule.step_targets(step), schedule.step_weight(step))

    def may_stop_after(self, step: int) -> bool:
        """Tell whether a run may end after this step."""
        return True

    def waits_for(self, step: int) -> bool:
        """Tell whether the next step begins with work that needs this one's numbers."""
        return False

    def abandon(self) -> None:
        """Drop everything that a rolled-back state has made."""


class Evaluation:
    """Evaluations of a run. All processes take part."""

    def start(self, trainer) -> None:
        """Compute values that training would lose. The model is as before step 1, also in a resumed run."""

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        """Measure the model. None if on some rank is_stopped() during the evaluation.

        The caller turns dropout and gradients off.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PromptReading:
    """Decision whether a prompt is read once for all its answers, and its reason ("": there is no choice)."""

    shared: bool = False
    explanation: str = ""


class SourceCost:
    """Cost of a run on examples of a source."""

    def __init__(self, source: Source):
        self.source, self.config, self.loss = source, source.config, source.loss

    def estimated(self, examples: Examples, loaded: Loaded, tokenizer: Tokenizer) -> Examples:
        """Return the examples with numbers from all loaded data, for the estimate of the time."""
        return examples

    def largest_batch(self, schedule: Schedule, documents: Examples | None, arch: Arch) -> BatchSizes:
        """Return the sizes of the largest micro-batch. Without documents it has separate rows of one each."""
        return BatchSizes(*largest_batch(schedule, self.config.ctx_len, self.config.micro_bsz))

    def reference_bytes(self, schedule: Schedule, arch: Arch) -> int:
        """Count the bytes of a reference's values that every process keeps, where they are many."""
        return 0

    def sampled_at_once(self, arch: Arch, precision: str, accelerator: str) -> int:
        """Count the answers that a process samples at once for a step."""
        return 0

    def sampling_bytes(self, arch: Arch, precision: str, accelerator: str) -> int:
        """Count the bytes that sampling these answers takes."""
        return 0

    def trained_tokens(self, schedule: Schedule, steps: int) -> float:
        """Count the tokens of all steps of a run."""
        return steps / schedule.steps_per_pass * schedule.repeats * sum(schedule.lengths)

    def share_read(self, documents: Examples, schedule: Schedule, arch: Arch) -> float:
        """Return the part of the tokens that is read; less than all where prompts of pairs are read once."""
        return 1.0

    def reference_work(self, arch: Arch, trained: float, held_out: float) -> float:
        """Count the reference's pass over the tokens of training and of evaluations as trained tokens."""
        return 0.0

    def evaluation_costs(self, held_out: Examples) -> np.ndarray:
        """Return the work of evaluating each example, (n,), as trained tokens."""
        return FORWARD * (held_out.lengths - 1)

    def evaluation_budget(self, held_out: Examples, schedule: Schedule, steps: int) -> float:
        """Return the budget of all evaluations of a run, in trained tokens."""
        return EVALUATION * self.trained_tokens(schedule, steps) / self.loss.facts.passes

    def chosen_questions(
        self, held_out: Examples, encoder: Encoder, schedule: Schedule, steps: int, evaluations: int
    ) -> list[SampleQuestion]:
        """Choose the questions of every evaluation: --eval_samples, up to MOST_ASKED to count right answers.

        All answers take at most a tenth of the run. The first ones are the samples.
        """
        samples = self.config.eval_samples
        if not samples:
            return []
        candidates = questions(held_out, max(MOST_ASKED, samples), encoder)
        budget = self.evaluation_budget(held_out, schedule, steps) / evaluations
        more = [question for question in candidates[samples:] if not question.is_text]
        return candidates[:samples] + more[: affordable(candidates[:samples], more, budget)]

    def times(
        self, data: TrainingData, arch: Arch, schedule: Schedule, steps: int, evaluations: int, speed: Speed
    ) -> Times:
        """Estimate the times of a run with `evaluations` evaluations."""
        tokens, share = self.trained_tokens(schedule, steps), self.share_read(data.documents, schedule, arch)
        passes = self.loss.facts.passes
        held_out_tokens = float((data.evaluated.lengths - 1).sum()) * share
        read = FORWARD * evaluations * held_out_tokens * passes
        training = tokens * share * (1 + FORWARD * (passes - 1))
        if not speed.tokens:
            return Times(tokens, read / training)
        asked = []
        if evaluations:
            asked = self.chosen_questions(data.held_out, data.encoder, schedule, steps, evaluations)
        prompts = FORWARD * evaluations * sum(len(question.prompt) for question in asked)
        tokens_of_answer = min(limit_of(asked), USUAL_SAMPLE_TOKENS) if asked else 0
        answers = evaluations * tokens_of_answer * speed.answer
        once = tokens * share * min(1.0, schedule.steps_per_pass / steps)
        reference = self.reference_work(arch, once, held_out_tokens) / speed.tokens
        evaluation = (read + prompts) / speed.tokens + answers
        return Times(tokens, read / training, training / speed.tokens, evaluation, reference)


class Source(abc.ABC):
    """Source of the examples that a loss is taken on: what is read or drawn, and how it is evaluated."""

    cost_type = SourceCost
    schedule_type = Schedule  # decides the order of the rows in each pass, also in a reference's pass

    def __init__(self, config: Config, loss: Loss | None = None):
        self.config, self.loss = config, loss or loss_of(config)
        self.chunks = Chunks(config.chunk_ctx, config.truncate_ctx, config.state_cp)

    # before a run

    def defaults_by_data(self, loaded: Loaded, tokenizer: Tokenizer) -> Iterator[tuple[str, object, str]]:
        """Yield (setting, value, why) for settings that the data decide."""
        return iter(())

    def load(self, path: str, encoder: Encoder, found: Report) -> Loaded:
        """Read --data_file or --eval_file."""
        config = self.config
        return load(path, encoder, config.data_cache, Reading.of(config), found, config.random_seed)

    def longest(self, loaded: Loaded) -> tuple[int, int, str]:
        """Return (inputs of the longest row that is needed, inputs of all running text, what the row is)."""
        return loaded.longest, loaded.texts, self.loss.words.example

    def examples(self, loaded: Loaded) -> Examples:
        """Return the examples of a file that fit into rows of ctx_len."""
        return loaded.examples(self.config.ctx_len)

    def prompt_reading(self, documents: Examples, schedule: Schedule, arch: Arch) -> PromptReading:
        """Tell how prompts are read in a run.

        Shared prompts are read in a pass of their own, and both they and the answers are padded to the
        longest of the micro-batch. Separate rows are packed and need one pass. The result depends on the
        settings, the data and the model's width alone, so that every rank and every resume has the same.
        """
        return PromptReading()

    def reads(self) -> Reads:
        """Name the entries of a step's batch that are read in addition to the tokens."""
        return self.loss.reads()

    def having(self, config: Config | None = None, loss: Loss | None = None) -> Source:
        """Return the source with other settings, which leave the loss as it is, or with another loss."""
        return type(self)(config or self.config, loss or self.loss)

    @property
    def cost(self) -> SourceCost:
        return self.cost_type(self)

    # in words

    @property
    def description(self) -> str:
        """The loss with its settings; "" for --loss sft."""
        return self.loss.description

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        """Return the plan's lines about the loss and how prompts are read."""
        return [f"loss       {said}"] if (said := self.description) else []

    def warnings(self, documents: Examples, tokenizer: Tokenizer) -> list[str]:
        """Return warnings about likely mistakes in the loss or in its data."""
        return []

    @abc.abstractmethod
    def trained_text(self, documents: Examples) -> str:
        """Tell how many of the documents' tokens are trained, to follow the number of documents."""

    def evaluated_text(self, evaluated: Examples) -> str:
        """Tell what evaluations do with these examples."""
        examples = counted(len(evaluated), self.loss.words.example)
        return f"the loss is on {counted(evaluated.targets, 'token')} of {examples}"

    # in a run

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        """Return the data of a run of `steps` steps with the reference's values, if the loss needs them.

        The model is as before step 1, also in a resumed run. `shared`: a prompt is read once for its
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
        self, examples: Examples, batches: Callable[[Examples], Iterator[Batch]], policy: Policy
    ) -> dict[str, Any]:
        """Return entries that every batch in an evaluation of these examples has besides."""
        return {}

    @abc.abstractmethod
    def evaluation(self, module) -> Evaluation:
        """Make the evaluations of a run, at its start."""

    def judge(self, template: Template) -> contextlib.AbstractContextManager[Rewards | None]:
        """Open the judge of a run's answers; None if it samples none."""
        return contextlib.nullcontext()

    def callbacks(self, folder: str) -> list:
        """Make the trainer's callbacks that write into the run's folder in addition to the report."""
        return []
