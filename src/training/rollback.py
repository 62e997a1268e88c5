"""Rollback to the last good state when a loss is not finite, or jumps; then the next step follows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from rwkv_miss import read_checkpoint
from rwkv_miss.errors import UserError

from .run_folder import checkpoint_step, list_checkpoints
from .training_state import read_state, write_state

WINDOW, ENOUGH = 50, 20  # losses that a spike is judged by, and the number that is enough
TRIES = 3  # times that a run goes back to the same state


@dataclasses.dataclass(frozen=True)
class Kept:
    """State after a step, as training_state.read_state() gives it."""

    step: int
    tensors: Mapping[str, Tensor]


class LastGood:
    """Last good state: it judges every step, and goes back.

    A state is good once the next step's loss, which measures it, was fine. An adapter's is kept in main
    memory every `every` steps; in full training (`folder` is given) it is the newest checkpoint. Going back
    restores the trained tensors and the optimizer. The step counter is not taken back: the data that led to
    the trouble are skipped, and the learning rate and all later steps stay in their places.

    A GPU copies a state during its other work, on a stream of its own. So before_update() has to be called
    before the state is changed in place.
    """

    def __init__(self, every: int, sigmas: float, folder: str | None = None):
        self.every, self.sigmas, self.folder = every, sigmas, folder
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.good: Kept | None = None
        # several if steps are judged after the next one was begun
        self.unproven: deque[Kept] = deque()
        self.target, self.tries = -1, 0
        self.stream: torch.cuda.Stream | None = None

    def start(self, trainer: pl.Trainer) -> None:
        """Take the first state, of a new or a resumed run, as good."""
        device = trainer.strategy.root_device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.every and not self.folder:
            self.good = self._copy(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        """Keep the state after the step that was just done, if it is time."""
        if self.every and not self.folder and trainer.global_step % self.every == 0:
            self.unproven.append(self._copy(trainer))

    def before_update(self) -> None:
        """Make a GPU finish its copy before its next work, without waiting here."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    def _copy(self, trainer: pl.Trainer) -> Kept:
        tensors = {}
        for name, tensor in read_state(trainer):
            if self.stream and tensor.is_cuda:
                # each on its own, as ZeRO gathers the next one on the way
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    tensors[name] = tensor.detach().to("cpu", non_blocking=True)  # which is pinned memory
                tensor.record_stream(self.stream)
            else:
                tensors[name] = tensor.detach().to("cpu", copy=True)
        return Kept(trainer.global_step, tensors)

    def fault(self, loss: float) -> str | None:
        """Say what is wrong with a step's loss, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.sigmas and len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            # 1.4826 makes the median absolute deviation of normal noise its standard deviation
            bound = median + self.sigmas * 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            if loss > bound:
                return f"the loss is {loss:.4f}, above {bound:.4f}, the bound by --spike_sigmas"
        return None

    def judge(self, trainer: pl.Trainer, step: int, loss: float, norm: float) -> int | None:
        """Judge a step by its loss and the norm of its gradient, on every rank alike.

        Returns the step whose state was restored, None if all is well. Later steps that were made already are
        undone, too. Raises UserError if there is nothing to go back to, or going back did not help.
        """
        fault = self.fault(loss)
        if fault is None:
            self.losses.append(loss)
            while self.unproven and self.unproven[0].step < step:
                self.good = self.unproven.popleft()
            if math.isfinite(norm):
                return None
            fault = "the gradient is not finite"
        self.unproven.clear()
        good = self._newest_checkpoint() if self.every and self.folder else self.good
        if good and good.step != self.target:
            self.target, self.tries = good.step, 0
        if not good or self.tries == TRIES:
            tried = f", also from the state of step {self.target} again" if self.tries else ""
            raise UserError(
                f"{fault} at step {step}{tried}: the run diverged; lower --lr_init. What was saved before is"
                " unchanged"
            )
        self.tries += 1
        if self.stream:
            self.stream.synchronize()  # ZeRO cuts the copies on the CPU
        write_state(trainer, good.tensors)
        if trainer.is_global_zero:
            print(
                f"note: {fault} at step {step}; back to the state of step {good.step}, and on with step"
                f" {trainer.global_step + 1} (try {self.tries} of {TRIES})",
                flush=True,
            )
        return good.step

    def _newest_checkpoint(self) -> Kept | None:
        paths = list_checkpoints(self.folder)
        return Kept(checkpoint_step(paths[-1]), read_checkpoint(paths[-1])) if paths else None
