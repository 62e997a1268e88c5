"""Training on preferences: --loss dpo, ipo, orpo, simpo and kto."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from rwkv_miss.files.checkpoint import Arch

from ... import ops
from ...common.batch import Batch
from ...common.formatting import counted
from ...data.batches import Schedule
from ...data.examples import Examples
from ...data.held_out import FORWARD
from ...data.preferences import Preferences
from ...data.tokenizer import Tokenizer
from ..base import Evaluated, Feed, PromptReading, Source, SourceCost, TrainingData
from ..estimates import BatchSizes, largest_shared
from ..held_out_loss import HeldOutLoss
from ..policy import Policy
from ..reference_model import ReferenceKl, relative_work
from ..reference_pass import ReferencePass
from .kto_baseline import WithBaseline, baseline
from .prompt_reading import LEAST_GAIN, PASS_COST, tokens_of_layouts


class PairCost(SourceCost):
    """Cost of answers, whose prompts may be read once, and of a reference's pass over them."""

    def share_read(self, documents: Examples, schedule: Schedule, arch: Arch) -> float:
        if not self.source.prompt_reading(documents, schedule, arch).shared:
            return 1.0
        separate, shared = tokens_of_layouts(documents, schedule)
        return shared / separate

    def largest_batch(self, schedule: Schedule, documents: Examples | None, arch: Arch) -> BatchSizes:
        config, sizes = self.config, super().largest_batch(schedule, documents, arch)
        if documents is None:
            return sizes
        sized = dataclasses.replace(schedule, micro_bsz=config.micro_bsz, accumulate=config.accumulation)
        if not self.source.prompt_reading(documents, sized, arch).shared:
            return sizes
        return dataclasses.replace(sizes, shared=largest_shared(documents, sized))

    def reference_work(self, arch: Arch, trained: float, held_out: float) -> float:
        if not self.loss.needs_reference:
            return 0.0
        work = FORWARD * relative_work(self.config.reference, arch) * self.loss.facts.passes
        return work * (trained + held_out)


class PairSource(Source):
    """Pairs of answers, or under kto single ones."""

    cost_type = PairCost

    def prompt_reading(self, documents: Examples, schedule: Schedule, arch: Arch) -> PromptReading:
        if not documents.paired:
            return PromptReading()
        if self.config.chunk_ctx:
            return PromptReading(False, "each answer is read after its own prompt: rows run in chunks")
        separate, shared = tokens_of_layouts(documents, schedule)
        second = PASS_COST["gpu" if self.config.accelerator == "gpu" else "cpu"] / arch.n_embd
        if separate + second > LEAST_GAIN * (shared + 2 * second):
            return PromptReading(
                True,
                f"a prompt is read once for both answers: {shared:,.0f} tokens a micro-batch in the place of"
                f" {separate:,.0f}, padding included",
            )
        return PromptReading(
            False,
            f"each answer is read after its own prompt: a prompt read once would make {shared:,.0f} tokens of"
            f" the {separate:,.0f} of a micro-batch, and a second pass costs as much as {second:,.0f}",
        )

    @property
    def description(self) -> str:
        """The loss with its settings and what it compares with."""
        return f"{self.loss.description}; {self.loss.reference_text(self.config.peft)}"

    def lines(self, documents: Preferences, schedule: Schedule, arch: Arch) -> list[str]:
        config, said = self.config, self.description
        if self.loss.needs_reference:
            kept_in = config.proj_dir if config.data_cache == "none" else "--data_cache"
            said += f", read once before step 1 and kept in {kept_in}"
        if not self.loss.paired:
            of_all = f"of {counted(len(documents), 'answer')}"
            said += f"; {int(documents.chosen.sum()):,} {of_all} to be preferred"
        in_a_step = counted(round(len(documents) / schedule.steps_per_pass), self.loss.words.example)
        prompts = self.prompt_reading(documents, schedule, arch).explanation
        return [
            f"loss       {said}; about {in_a_step} in a step",
            *([f"prompts    {prompts}"] if prompts else []),
        ]

    def warnings(self, documents: Preferences, tokenizer: Tokenizer) -> list[str]:
        preferred, count = int(documents.chosen.sum()), counted(len(documents.chosen), "answer")
        if preferred == len(documents.chosen):  # never of pairs
            return [f"all {count} have label true: nothing says what to avoid; --loss sft may be meant"]
        if not preferred:
            return [f"all {count} have label false: nothing says what to prefer, and the model may be lost"]
        if self.config.sft_weight != 0:
            return []
        return [
            f"--sft_weight 0: nothing keeps the chosen answers likely, and --loss {self.loss.name} may lose"
            " them while its accuracy rises; watch log p of the chosen, and right answers"
        ]

    def trained_text(self, documents: Preferences) -> str:
        return f", {documents.targets:,} of them in answers"

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        if not self.loss.needs_reference:
            return data
        with policy.undisturbed(), ops.nan_passes():
            reference = ReferencePass(self, shared, policy)
            read = functools.partial(reference.training, schedule=schedule, steps=steps)
            documents = self._with_values(data.documents, read, "the training data")
            evaluated = self._with_values(data.evaluated, reference.all, "the held-out data")
            return dataclasses.replace(data, documents=documents, evaluated=evaluated)

    def _with_values(self, documents: Preferences, read: Callable[..., np.ndarray], what: str) -> Preferences:
        """Add values to the documents, and under kto to their mismatched examples."""
        if not len(documents):
            return documents
        with_values = documents.with_reference(read(documents, what=what))
        if self.loss.paired:
            return with_values
        others = documents.mismatched()
        others = others.with_reference(read(others, what=f"{what}, with other prompts"))
        return dataclasses.replace(with_values, others=others)

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        feed = super().feed(data, schedule, steps, policy, shared)
        if self.loss.paired:
            return feed
        return WithBaseline(feed.batches, schedule, steps, policy, self.chunks.size)

    def before_evaluation(
        self, examples: Examples, batches: Callable[[Examples], Iterator[Batch]], policy: Policy
    ) -> dict:
        return {} if self.loss.paired else {"baseline": baseline(batches(examples.others), policy)}

    def evaluation(self, module) -> HeldOutLoss:
        return WithKl(module) if self.loss.needs_reference else HeldOutLoss(module)


SOURCE = PairSource


class WithKl(HeldOutLoss):
    """Evaluations with the KL to the reference as a further metric."""

    def __init__(self, module):
        super().__init__(module)
        self.kl = ReferenceKl(module)

    def start(self, trainer) -> None:
        self.kl.reference.start(trainer, self.module)

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        evaluated = super().measure(trainer, is_stopped)
        if evaluated:
            evaluated.metrics["kl"] = self.kl.measure(trainer)
        return evaluated
