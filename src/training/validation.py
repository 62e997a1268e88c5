"""Evaluations during a run, and the best state so far."""

from __future__ import annotations

import math
import os

from lightning.pytorch.callbacks import Callback

from rwkv_miss.errors import UserError
from rwkv_miss.progress import say

from ..common.files import append_line, write_lines
from .callbacks import StepReport, refuse_overwritten
from .validation_log import (
    BEST,
    VALIDATION,
    best_trained,
    describe,
    is_known_by_heart,
    is_over,
    may_know_by_heart,
)


class Watch(Callback):
    """Callback that evaluates held-out documents before the first step, every `eval_steps` and after the
    last.

    Each evaluation is a JSON line. `history` holds the lines up to the step that the run goes on from, and
    grows: the best evaluation, and whether the run is over, are functions of it. `write` puts the trained
    tensors into a file; it is called on every rank.
    """

    def __init__(
        self,
        folder: str,
        history: list[dict],
        write,
        report: StepReport,
    ):
        self.path, self.best_path = os.path.join(folder, VALIDATION), os.path.join(folder, BEST)
        self.history, self.write, self.report = history, write, report

    def on_fit_start(self, trainer, module) -> None:
        """Start before a checkpoint is in the model."""
        self.evaluation = module.source.evaluation(module)
        self.evaluation.start(trainer)

    def on_train_start(self, trainer, module) -> None:
        self.metrics = module.source.loss.metrics
        if trainer.is_global_zero:
            write_lines(self.path, self.history)
        self._if_due(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        # a run that is asked to stop ends soon: the evaluation is made when it is resumed
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
        """Evaluate, and tell whether it was done.

        A run that is asked to stop leaves it to the resumed run, except after its last step.
        """
        step = trainer.global_step
        may_stop = step < module.total_steps
        with module.policy.undisturbed():
            found = self.evaluation.measure(trainer, lambda: self.report.stop and may_stop)
        refuse_overwritten(trainer)
        if found is None:
            return False
        line = {
            "step": step,
            "loss": found.loss if math.isfinite(found.loss) else None,
            "tokens": found.tokens,
            **self.metrics.fields(found.examples, found.metrics),
            **found.answers,
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

    def _save(self, trainer, loss: float) -> None:
        """Save the best state so far, whole under its name or not at all; all ranks fail together."""
        error = None
        try:
            self.write(trainer, self.best_path, validation_loss=loss)
        except (UserError, OSError) as caught:
            error = str(caught)
        if error := trainer.strategy.broadcast(error):
            raise UserError(f"{error}; free some space and go on with --resume auto")


class ByHeart(Callback):
    """Callback that ends a run with nothing held out when it knows its data by heart."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step, total, config = trainer.global_step, module.total_steps, module.config
        if (index + 1) % module.accumulate == 0 and may_know_by_heart(config, step, total):
            known = trainer.is_global_zero and is_known_by_heart(config, step, total)
            trainer.should_stop |= trainer.strategy.broadcast(known)
