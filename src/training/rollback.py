"""Going back to the last good state when a loss is not finite, or jumps, and on with the next step."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from rwkv_miss import read_checkpoint
from rwkv_miss.errors import UserError

from .run_folder import checkpoint_step, list_checkpoints
from .training_state import read_state, write_state

WINDOW, ENOUGH = 50, 20  # losses that a spike is judged by, and how many of them are enough to judge
TRIES = 3  # times that a run goes back to the same state


class LastGood:
    """Keeps the last good state, judges every step, and goes back.

    A state is good once the next step's loss, which is its own, was fine. An adapter's is kept in memory
    every `every` steps; in full training (`folder` is given) it is the newest checkpoint. Going back restores
    the trained tensors and the optimizer. The step is not taken back: the data that led to the trouble are
    left behind, the learning rate and all later steps stay in their places.
    """

    def __init__(self, every: int, sigmas: float, folder: str | None = None):
        self.every, self.sigmas, self.folder = every, sigmas, folder
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.good: tuple[int, Mapping[str, Tensor]] | None = None
        self.unproven: tuple[int, Mapping[str, Tensor]] | None = None
        self.target, self.tries = -1, 0

    def start(self, trainer: pl.Trainer) -> None:
        """The state that the run begins or goes on with is good."""
        self.good = self._copy(trainer)

    def _copy(self, trainer: pl.Trainer) -> tuple[int, Mapping[str, Tensor]] | None:
        if not self.every or self.folder:
            return None
        return trainer.global_step, {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in read_state(trainer)
        }

    def fault(self, loss: float) -> str | None:
        """What is wrong with a step's loss, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.sigmas and len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            # 1.4826 makes the median absolute deviation of normal noise its standard deviation
            bound = median + self.sigmas * 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            if loss > bound:
                return f"the loss is {loss:.4f}, above {bound:.4f}, the bound by --spike_sigmas"
        return None

    def after_step(self, trainer: pl.Trainer, loss: float, norm: float) -> int | None:
        """Judge the step that was just done, on every rank alike.

        Returns the step whose state is back in place, None where all is well. UserError when there is nothing
        to go back to, or going back did not help.
        """
        fault, step = self.fault(loss), trainer.global_step
        if fault is None:
            self.losses.append(loss)
            if self.unproven:
                self.good, self.unproven = self.unproven, None
            if math.isfinite(norm):
                if self.every and step % self.every == 0:
                    self.unproven = self._copy(trainer)
                return None
            fault = "the gradient is not finite"
        self.unproven = None
        good = self._newest_checkpoint() if self.every and self.folder else self.good
        if good and good[0] != self.target:
            self.target, self.tries = good[0], 0
        if not good or self.tries == TRIES:
            tried = f", also from the state of step {self.target} again" if self.tries else ""
            raise UserError(
                f"{fault} at step {step}{tried}: the run diverged; lower --lr_init. What was saved before is"
                " unchanged"
            )
        self.tries += 1
        write_state(trainer, good[1])
        if trainer.is_global_zero:
            print(
                f"note: {fault} at step {step}; back to the state of step {good[0]}, and on with step"
                f" {step + 1} (try {self.tries} of {TRIES})",
                flush=True,
            )
        return good[0]

    def _newest_checkpoint(self) -> tuple[int, Mapping[str, Tensor]] | None:
        paths = list_checkpoints(self.folder)
        return (checkpoint_step(paths[-1]), read_checkpoint(paths[-1])) if paths else None
