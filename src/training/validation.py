"""Evaluations during a run: the loss on held-out documents, sample answers, and the best state so far."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress, say

from ..common.files import append_line, write_lines
from ..config.launcher import is_first_process
from ..data.answer_batches import collator
from ..data.encode import Encoder
from ..data.held_out import SAMPLE_CHARACTERS, SAMPLE_TOKENS, Units, evaluation_batches, questions
from ..data.leading_token import without_leading
from ..distributed.process_group import processes_of
from ..evaluation.answering import completed
from ..inference.engine import Engine
from ..inference.request import Answer, Request
from ..inference.torch_decoder import TorchDecoder
from ..model import RWKV
from ..objectives.base import Evaluated
from ..objectives.from_reference import ReferenceKl
from ..objectives.loss_metrics import metrics_of
from ..objectives.policy import undisturbed
from ..objectives.preferences.kto_baseline import baseline
from ..objectives.rewards.evaluation import RewardEvaluation
from .callbacks import StepReport, refuse_overwritten
from .validation_log import BEST, VALIDATION, best_trained, describe, is_over


class Watch(Callback):
    """Evaluates held-out documents before the first step, every `eval_steps` and after the last: a JSON line.

    `history` holds the lines up to the step that the run goes on from, and grows with it: which evaluation is
    the best one, and whether the run is over, are functions of it. `write` puts the trained tensors into a
    file; it is called on every rank.
    """

    def __init__(
        self,
        folder: str,
        history: list[dict],
        encoder: Encoder,
        write,
        report: StepReport,
    ):
        self.path, self.best_path = os.path.join(folder, VALIDATION), os.path.join(folder, BEST)
        self.history, self.encoder = history, encoder
        self.write, self.report = write, report
        self.kl: ReferenceKl | None = None  # where a preference has a reference

    def on_fit_start(self, trainer, module) -> None:
        """Take the reference's features, before a checkpoint is in the model."""
        if module.preference and module.preference.needs_reference:
            self.kl = ReferenceKl(module)
            self.kl.reference.start(trainer, module)

    def on_train_start(self, trainer, module) -> None:
        self.metrics = metrics_of(module.config)
        self.answering = None
        if module.config.on_rewards:
            self.answering = RewardEvaluation(self.encoder, module.rewards, module.config.reward_timeout)
        else:
            self.questions = questions(module.held_out, module.config.eval_samples, self.encoder)
        if trainer.is_global_zero:
            write_lines(self.path, self.history)
        self._if_due(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        # who asks for a stop does not want to wait: the evaluation is made when the run goes on
        if (index + 1) % module.accumulate == 0 and (
            trainer.global_step == module.total_steps or not trainer.should_stop
        ):
            self._if_due(trainer, module)

    def _if_due(self, trainer, module) -> None:
        step, every = trainer.global_step, module.config.eval_steps
        due = step in (0, module.total_steps) or every > 0 and step % every == 0
        if due and not any(line["step"] == step for line in self.history):
            stopped = not self._evaluate(trainer, module)
            self.report.start_clock(module)
            if stopped or is_over(self.history, module.config.early_stop):
                trainer.should_stop = True

    def _evaluate(self, trainer, module) -> bool:
        """Whether it was done.

        A run that is asked to stop leaves it to the run that goes on, except after its last step.
        """
        step = trainer.global_step
        with undisturbed(trainer.strategy.model, trainer.strategy.root_device):
            may_stop = step < module.total_steps
            found = self._measured(trainer, module, lambda: self.report.stop and may_stop)
        refuse_overwritten(trainer)
        if found is None:
            return False
        line = {
            "step": step,
            "loss": found.loss if math.isfinite(found.loss) else None,
            "tokens": found.tokens,
            **self.metrics.fields(found.units, found.metrics),
            "samples": found.samples,
        }
        self.history.append(line)
        if best_trained(self.history) is line:
            self._save(trainer, found.loss)
        if trainer.is_global_zero:
            append_line(self.path, line)
            for writer in self.report.writers:
                if line["loss"] is not None:
                    loss = {"validation/loss": found.loss}
                    writer.numbers(step, loss | self.metrics.numbers("validation", line))
                if found.samples:
                    writer.samples(step, found.samples)
            say("\n".join(describe(self.history, module.total_steps, self.metrics)))
        return True

    def _measured(self, trainer, module, is_stopped: Callable[[], bool]) -> Evaluated | None:
        """What the model is worth now; None for a run that is asked to stop."""
        if self.answering:
            samples, processes = module.config.eval_samples, processes_of(trainer)
            return self.answering.answers(module.model, module.evaluated, samples, processes, is_stopped)
        found = validation_loss(trainer, module.evaluated, is_stopped)
        if found is None:
            return None
        loss, metrics = found
        if self.kl:
            metrics["kl"] = self.kl.measure(trainer)
        decode, bos = self.encoder.tokenizer.decode, self.encoder.bos
        samples = [
            {
                "prompt": decode(without_leading(question.prompt, bos)),
                "answer": shortened(answer.text.strip(), SAMPLE_CHARACTERS, answer.cut),
                "right": shortened(decode(question.answer).strip(), SAMPLE_CHARACTERS),
            }
            for question, answer in zip(self.questions, self._answers(module.model), strict=True)
        ]
        return Evaluated(loss, metrics, module.evaluated.weight, module.evaluated.targets, samples)

    def _answers(self, model: RWKV) -> list[Answer]:
        """The greedy answers to the questions. Every rank makes all of them, in step."""
        if not self.questions:
            return []
        engine = Engine(TorchDecoder(model, len(self.questions)), self.encoder.tokenizer)
        requests = [
            Request(question.prompt, SAMPLE_TOKENS, characters=SAMPLE_CHARACTERS)
            for question in self.questions
        ]
        with Progress("answering", len(requests), "questions", is_first_process()) as bar:
            answers = dict(completed(engine, requests, bar))
        return [answers[place] for place in range(len(requests))]

    def _save(self, trainer, loss: float) -> None:
        """The best state so far, whole under its name or not at all; all ranks fail together."""
        error = None
        try:
            self.write(trainer, self.best_path, validation_loss=loss)
        except (UserError, OSError) as caught:
            error = str(caught)
        if error := trainer.strategy.broadcast(error):
            raise UserError(f"{error}; free some space and go on with --resume auto")


def shortened(text: str, characters: int, cut: bool = False) -> str:
    """A text of at most so many characters. A longer one ends in "…", and so does one that is `cut` already.

    Half a character, as a limit of tokens leaves it, is left out.
    """
    whole = text.rstrip("\ufffd")
    if whole == text and len(text) <= characters and not cut:
        return text
    return f"{whole[: characters - 1]}…"


def validation_loss(
    trainer, documents: Units, is_stopped: Callable[[], bool] = lambda: False
) -> tuple[float, dict[str, float]] | None:
    """(mean loss over all trained tokens of the documents, weighted, in nats, or over their units; the other
    means of a preference).

    Every rank takes part and gets the same numbers. None where on some rank is_stopped() between two batches.
    Packing and the number of processes do not change the result: rows don't see each other, each batch is
    computed by one process, and float64 has room enough for fp32 sums to be added without rounding, in any
    order.
    """
    strategy, preference = trainer.strategy, trainer.lightning_module.preference
    processes, device = processes_of(trainer), strategy.root_device
    weight = math.fsum(document.weight for document in documents)
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums: Tensor | None = None
    beside = {}
    try:
        if preference and not preference.paired:
            others = _batches(trainer, documents.others, weight, is_stopped)
            beside = {"baseline": baseline(others, trainer.lightning_module.policy)}
        for turn, batch in enumerate(_batches(trainer, documents, weight, is_stopped)):
            loss, metrics = strategy.validation_step(batch | beside, turn)
            total += loss
            if preference:
                sums = metrics if sums is None else sums + metrics
    except _Stopped:
        return None
    loss = float(processes.total(total)) / weight
    return loss, {} if sums is None else preference.means(processes.total(sums).tolist())


class _Stopped(Exception):
    """A rank was asked to stop between two batches; all of them raise it."""


def _batches(trainer, documents: Units, weight: float, is_stopped: Callable[[], bool]) -> Iterator[dict]:
    """The batches of this rank, as many as every other one has, on its device."""
    strategy, world, module = trainer.strategy, trainer.world_size, trainer.lightning_module
    batches = evaluation_batches(documents, module.config)
    collate = collator(documents, module.chunks.size, module.shared)
    with Progress("validation", len(documents), "documents", is_first_process()) as bar:
        for first in range(0, len(batches), world):
            stopped = torch.tensor(float(is_stopped()), device=strategy.root_device)
            if strategy.reduce(stopped, reduce_op="sum"):
                raise _Stopped
            # a rank without a batch takes one without a target: all of them must do the same operations
            mine = batches[first + trainer.global_rank] if first + trainer.global_rank < len(batches) else []
            # the longest of the rows that the ranks have now
            width = sum(document.inputs for document in batches[first][0])
            yield strategy.batch_to_device(collate(mine, weight) | {"width": width})
            bar.update(sum(len(row) for rows in batches[first : first + world] for row in rows))
