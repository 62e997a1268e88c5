"""What happens around the steps: the progress bar and metrics.jsonl, saving, and stopping on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time

import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

import rwkv_miss
from rwkv_miss.errors import UserError

from .files import write_text


class StepReport(Callback):
    """Once per optimizer step: the loss over all ranks, one JSON line, the bar, and the decision to stop."""

    def __init__(self, path: str, total: int, started: float):
        self.path, self.total, self.started = path, total, started
        self.stop = False
        self.first_step_seconds: float | None = None

    def on_train_start(self, trainer, module) -> None:
        self.rank_zero = trainer.is_global_zero
        self.bar = tqdm(total=self.total, initial=trainer.global_step, disable=not (self.rank_zero and sys.stderr.isatty()), unit="step")
        if self.rank_zero:
            _keep_lines(self.path, trainer.global_step)
        self.clock = time.perf_counter()
        # Ctrl-C, a scheduler's end of time, a closed terminal; Windows has no SIGHUP
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        self.before = {number: signal.signal(number, self._ask_to_stop) for number in numbers}

    def _ask_to_stop(self, signum, frame) -> None:
        """The first signal ends the run after its current step and saves; the second one is Python's own."""
        self.stop = True
        signal.signal(signum, signal.default_int_handler)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if (index + 1) % module.accumulate:
            return
        step = trainer.global_step
        # one reduction carries the loss and the wish of any rank to stop
        total = trainer.strategy.reduce(torch.tensor([float(module.step_loss), float(self.stop)], device=module.device), reduce_op="sum")
        loss, self.stop = float(total[0]), bool(total[1])
        module.step_loss = 0.0
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: the run diverged; lower --lr_init. What was saved before is unchanged")
        rwkv_miss.on_step(module.model, step, self.total)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if self.first_step_seconds is None:
            self.first_step_seconds = time.time() - self.started
        if self.rank_zero:
            tokens = module.schedule.step_tokens(step - 1)
            line = {
                "step": step, "loss": loss, "lr": module.lr * module.lr_factor(step - 1), "tokens": tokens,
                "trained_tokens": module.schedule.step_targets(step - 1), "seconds": seconds, "tokens_per_second": tokens / seconds,
            }
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"{self.path} could not be written ({error.strerror})") from None
            self.bar.set_postfix_str(f"loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_second']:.0f} tok/s")
            self.bar.update()
            if not sys.stderr.isatty() and (step % max(1, self.total // 20) == 0 or step == 1):
                print(f"step {step}/{self.total} loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_second']:.0f} tokens/s", flush=True)
        trainer.should_stop = trainer.should_stop or self.stop

    def on_train_end(self, trainer, module) -> None:
        self.bar.close()
        self._restore_signals()

    def on_exception(self, trainer, module, exception) -> None:
        self._restore_signals()

    def _restore_signals(self) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)


def _keep_lines(path: str, steps: int) -> None:
    """Drop the metrics of steps that a resumed run does again, and a last line that a crash cut off."""
    kept = ""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError), open(path, encoding="utf-8") as file:
        for line in file:
            if json.loads(line)["step"] > steps:
                break
            kept += line
    write_text(path, kept)


class Saver(Callback):
    """Every save_steps, at the end and when asked to stop: the trained tensors, and a checkpoint to resume from.

    `write` puts the trained tensors into their file; it is called on every rank, inside which rank 0 writes.
    """

    def __init__(self, folder: str, every: int, write):
        self.folder, self.every, self.write = folder, every, write
        self.saved = -1

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        boundary = (index + 1) % module.accumulate == 0
        if boundary and (trainer.should_stop or step == module.total_steps or (self.every and step % self.every == 0)):
            self.save(trainer)

    def save(self, trainer) -> None:
        """Write under a temporary name, then rename; older checkpoints go only after that."""
        step = trainer.global_step
        if step == self.saved:
            return
        self.write(trainer, step)
        final, temporary = os.path.join(self.folder, f"step-{step:08d}"), os.path.join(self.folder, f".step-{step:08d}")
        if trainer.is_global_zero:
            os.makedirs(self.folder, exist_ok=True)
            _remove(temporary)
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(temporary)
        except (OSError, RuntimeError) as error:
            _remove(temporary)
            if isinstance(error, RuntimeError) and "file write failed" not in str(error):  # torch's words for a full disk
                raise
            raise UserError(f"checkpoint {final} could not be written ({error}); free some space and go on with --resume auto") from error
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _remove(final)
            os.replace(temporary, final)
            for name in os.listdir(self.folder):
                if name.startswith("step-") and name != os.path.basename(final):
                    _remove(os.path.join(self.folder, name))
        trainer.strategy.barrier()
        self.saved = step


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
