"""Callbacks around the steps: the progress bar and metrics.jsonl, saving, and stopping on Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import rwkv_miss
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import RUN_FORMAT
from rwkv_miss.files.mapped import ChangedFile, change_of_mapped
from rwkv_miss.interrupts import answer
from rwkv_miss.progress import LINE, LINE_SHARE, Progress, duration_text, say

from ..common.device import mapped_files, peak_memory
from ..common.files import append_line, read_lines, write_lines
from ..common.first_process import is_first_process
from ..common.late_reading import DeviceMoment, LateNumbers
from ..config import Settled
from ..data.tokenizer import Tokenizer
from ..distributed.process_group import over_ranks, processes_of
from ..evaluation.guessing import worse_than_guessing
from ..sources.base import BetweenSteps, StepSize
from .loggers import Writer
from .rollback import LastGood
from .run_folder import checkpoint_name, keep_adapter, keep_best, remove_old
from .training_state import gradient_norm, read_state, whole_gradient, write_state
from .validation_log import BEST, may_know_by_heart

# The terminal gives Ctrl-C to all processes, and a launcher passes it on to those that it started, as SIGTERM
# too: what comes within these seconds of the first signal is the same request.
ONE_REQUEST = 1.0

Warnings = Callable[[Settled, list[dict]], Callable[[dict], str | None]]


def works_behind(device: torch.device) -> bool:
    """Tell whether a device works asynchronously, behind the program."""
    return device.type == "cuda"


def scalar(number: Tensor | float, device: torch.device) -> Tensor:
    """Make an fp32 tensor without dimensions from a number, without waiting for the device."""
    if torch.is_tensor(number):
        return number.detach().to(device, torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)


@dataclasses.dataclass
class Done:
    """Optimizer step that was made and is not yet reported.

    `rolled_back_to`: the step whose state replaced this one's.
    """

    step: int
    begin: DeviceMoment
    end: DeviceMoment
    size: StepSize
    numbers: LateNumbers  # loss, share of the ranks that want to go on, norm of the gradient, sums of metrics
    rolled_back_to: int | None = None


def refuse_overwritten(trainer) -> None:
    """Raise ChangedFile in all processes if one of them sees that a file of the base was overwritten."""
    for change in filter(None, processes_of(trainer).gathered(change_of_mapped())):
        raise ChangedFile(change)


class StepReport(Callback):
    """Report of every optimizer step: the loss over all ranks, one JSON line, the bar, and the decision to
    stop.

    On a GPU a step is reported and judged when the next one has been started, so that the GPU never waits.
    Before an evaluation, a checkpoint and the end all steps are reported.

    `tokenizer` is that of a base that was trained with it; None: the model is new. `warnings`, of the
    settings and the lines so far, is a function of each new line: the warning to say after it, if any.
    """

    def __init__(
        self,
        path: str,
        total: int,
        started: float,
        last_good: LastGood,
        writers: list[Writer],
        tokenizer: Tokenizer | None = None,
        warnings: Warnings = lambda config, before: lambda line: None,
    ):
        self.path, self.total, self.started = path, total, started
        self.last_good, self.writers, self.tokenizer = last_good, writers, tokenizer
        self.warnings = warnings
        self.bar = Progress("starting the trainer", shown=is_first_process())
        self.training = self.stop = False
        self.asked = 0.0  # time of the request to stop, on the monotonic clock
        self.inner_steps = 1  # steps on the same drawn answers
        self.unread: deque[Done] = deque()
        self.first_step_seconds: float | None = None
        # memory of the rank with the largest peak, in bytes; 0 if unknown
        self.peak_memory = self.mapped_files = 0

    def on_train_start(self, trainer, module) -> None:
        self.rank_zero = trainer.is_global_zero
        # a pipe gets lines of its own
        shown = self.rank_zero and sys.stderr.isatty()
        self.bar.close()
        self.bar = Progress("training", self.total, "steps", shown, done=trainer.global_step, delay=0).start()
        if self.rank_zero:
            # a resumed run does the steps after its checkpoint again
            before = read_lines(self.path, trainer.global_step)
            write_lines(self.path, before)
            self.metrics = module.source.loss.metrics
            self.early_warning = self.warnings(module.config, before)
        self.inner_steps = module.config.inner_steps
        self.last_good.start(trainer)
        self.begun = self.last_line = time.perf_counter()
        self.steps_here = 0
        self.start_clock(module)
        self._take_signals()  # again: Lightning has its own for SIGTERM

    def start_clock(self, module) -> None:
        """Restart the step timer."""
        self.begin = DeviceMoment(module.device)

    @contextlib.contextmanager
    def answering_signals(self):
        """Handle Ctrl-C, a scheduler's end of time and a closed terminal, around Trainer.fit.

        There is always a bar, until the trainer starts that of the steps.
        """
        before = self._take_signals()
        self.bar.start()
        try:
            yield
        finally:
            self.bar.close()
            for number, handler in before.items():
                # a launcher's late SIGTERM must not cost the files that a stopped run is writing
                if not self.stop or number == signal.SIGINT:
                    signal.signal(number, handler)

    def _take_signals(self) -> dict:
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        return {number: signal.signal(number, self._ask_to_stop) for number in numbers}

    def _ask_to_stop(self, signum, frame) -> None:
        """Handle a signal: the first one ends the run after its step (grpo: after all steps on one draw), and
        saves.

        Ctrl-C after more than ONE_REQUEST ends it now; the other signals do not, as launchers and schedulers
        repeat them. Before the first step any signal ends the run.
        """
        if not self.training:  # nothing of ours needs to be put away
            self._tell(b"\ninterrupted before the first step; the same command starts again\n")
            os._exit(128 + signum)
        if self.stop:
            if signum != signal.SIGINT or time.monotonic() < self.asked + ONE_REQUEST:
                return
            self._tell(b"\nended within a step; what was saved before is unchanged\n")
            answer(signum, frame)
        self.stop, self.asked = True, time.monotonic()
        steps = b"the steps on these answers" if self.inner_steps > 1 else b"this step"
        self._tell(b"\nstopping after %s and saving; press Ctrl-C again to quit now without saving\n" % steps)

    def _tell(self, text: bytes) -> None:
        """Write a text by the system's own call, as the signal may have interrupted print()."""
        if is_first_process():
            os.write(2, text)

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.training = True
        self.at_boundary = (index + 1) % module.accumulate == 0

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.last_good.before_update()
        # before the gradient is clipped; under DeepSpeed Lightning calls this for every micro-batch
        if self.at_boundary and not module.feed.size(trainer.global_step).targets:
            # else momentum and weight decay would move the weights; the schedule sets the rate again after
            # the step
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        elif self.at_boundary:
            gradient_of = functools.partial(whole_gradient, trainer)
            module.around_steps.before(trainer.global_step + 1, self.total, gradient_of, module.gather)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not self.at_boundary:
            return
        step = trainer.global_step
        done = self._send(trainer, module)
        self.unread.append(done)
        if done.size.targets:
            module.around_steps.after(step, self.total, module.gather)
        if not self._read(trainer, module):
            self.last_good.keep(trainer)

    def _send(self, trainer, module) -> Done:
        """Return the step that was just done, with its numbers on their way to the CPU."""
        # one sum over all ranks has the loss, the share of them that want to go on, which is NaN where one
        # sees that the base was overwritten, and whether a gradient is not finite
        going_on = math.nan if change_of_mapped() else float(not self.stop) / trainer.world_size
        mine = [module.step_loss, going_on, gradient_norm(trainer)]
        numbers = torch.stack([scalar(number, module.device) for number in mine])
        # not by the strategy, which makes the ranks wait for each other first
        if module.step_metrics is not None:
            numbers = torch.cat([numbers, module.step_metrics.float()])
            numbers = over_ranks(numbers, len(mine), module.source.loss.joined, trainer.world_size)
        elif trainer.world_size > 1:
            torch.distributed.all_reduce(numbers)
        module.step_loss, module.step_metrics = 0.0, None
        begin, self.begin = self.begin, DeviceMoment(module.device)
        step = trainer.global_step
        return Done(step, begin, self.begin, module.feed.size(step - 1), LateNumbers(numbers))

    def _read(self, trainer, module) -> bool:
        """Read the steps that are due, and judge them; returns whether the run went back."""
        went_back = False
        behind = 0 if self._is_needed(trainer, module) else 1
        # a rank's request to stop becomes known here
        while len(self.unread) > (0 if trainer.should_stop else behind):
            went_back |= self._judge(trainer, module, self.unread.popleft())
        return went_back

    def _is_needed(self, trainer, module) -> bool:
        """Tell whether the numbers of the last step are needed now, or are there.

        Those of a GPU are read a step later, when it has its next work already.
        """
        step, config = trainer.global_step, module.config
        looked_at = any(n > 0 and step % n == 0 for n in (config.save_steps, config.eval_steps))
        looked_at |= module.feed.waits_for(step) or may_know_by_heart(config, step, self.total)
        stopping = trainer.should_stop or self.stop and trainer.world_size == 1
        first_or_last = self.first_step_seconds is None or step == self.total
        return not works_behind(module.device) or looked_at or stopping or first_or_last

    def _judge(self, trainer, module, done: Done) -> bool:
        """Report a step; returns whether the run went back."""
        step = done.step
        loss, going_on, norm, *sums = done.numbers.read()
        if math.isnan(going_on):
            refuse_overwritten(trainer)
        # an undone step came from a bad state, and its loss tells nothing of the restored one
        went_back = False
        if done.size.targets and done.rolled_back_to is None:
            done.rolled_back_to = self.last_good.judge(trainer, step, loss, norm)
            went_back = done.rolled_back_to is not None
            for later in self.unread:
                later.rolled_back_to = done.rolled_back_to
            if went_back:
                module.feed.abandon()
        if self.first_step_seconds is None:
            self.first_step_seconds = time.time() - self.started
        if self.rank_zero:
            line = self._line(module, done, loss, module.source.loss.means(sums) if sums else {})
            if done.rolled_back_to is not None:
                line["rolled_back_to"] = done.rolled_back_to
            append_line(self.path, line)
            self._remark(line, loss)
            shown = ("loss", "lr", "tokens_per_second")
            values = {f"train/{name}": line[name] for name in shown if line[name] is not None}
            for writer in self.writers:
                writer.numbers(step, values | self.metrics.numbers("train", line))
            self._show(line, loss, time.perf_counter())
        if module.feed.may_stop_after(step):
            # not self.stop, which a signal may just have set on this rank alone
            stopped = round(going_on * trainer.world_size) < trainer.world_size
            trainer.should_stop = trainer.should_stop or stopped
        return went_back

    def _line(self, module, done: Done, loss: float, metrics: dict[str, float]) -> dict:
        """Make a step's line of metrics.jsonl: loss and metrics."""
        size, seconds = done.size, done.end.seconds_since(done.begin)
        has_loss = size.targets or module.feed.always_has_loss
        if drawing := metrics.get("draw_seconds"):
            metrics["train_tokens_per_second"] = size.tokens / max(seconds - drawing, 1e-9)
        return {
            "step": done.step,
            "loss": loss if has_loss and math.isfinite(loss) else None,
            "lr": module.lr * module.lr_factor(done.step - 1),
            "tokens": size.tokens,
            "trained_tokens": size.targets,
            "seconds": seconds,
            "tokens_per_second": size.tokens / seconds,
            **self.metrics.fields(size.weight, metrics),
        }

    def _remark(self, line: dict, loss: float) -> None:
        """Warn about an odd step."""
        step = line["step"]
        # a training on rewards has many such steps; it counts them
        if not line["trained_tokens"] and self.metrics.by_loss:
            say(f"note: step {step} has no trained token; it has no loss, and no weight moved")
        elif step == 1 and self.tokenizer and self.metrics.nats:
            # only a cross entropy can be compared with the vocabulary
            name, words = self.metrics.nats
            nats = loss if name == "loss" else line.get(name)
            if nats is not None and (doubt := worse_than_guessing(nats, self.tokenizer, words)):
                say(doubt)
        if warning := self.early_warning(line):
            say(warning)

    def _show(self, line: dict, loss: float, now: float) -> None:
        """Update the bar, or print a line now and then if there is none."""
        step = line["step"]
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        # if all groups are dead, nothing is read to be trained, but answers are drawn
        if not line["tokens"] and (drawing := line.get("draw_tokens_per_second")):
            speed = f"{drawing:,.0f} tokens/s drawn"
        said = f"{self.metrics.step_text(line, loss)}, lr {line['lr']:.2e}, {speed}"
        if not self.steps_here:  # the first step has extra work, and its time says nothing
            self.bar.warm_up()
            self.begun = now
        self.bar.update(min(self.steps_here, 1), f"{self.metrics.bar_text(line)}, {speed}")
        self.steps_here += 1
        due = now - self.last_line > max(LINE, LINE_SHARE * (now - self.begun))
        if not sys.stderr.isatty() and (due or step % max(1, self.total // 20) == 0 or step == 1):
            self.last_line = now
            left = ""
            if measured := self.steps_here - 1:
                seconds = (now - self.begun) / measured * (self.total - step)
                left = f", {duration_text(seconds)} left"
            print(f"step {step}/{self.total} {said}{left}", flush=True)

    def on_train_end(self, trainer, module) -> None:
        # one slot for each rank, so that a sum is enough
        memory = torch.zeros(trainer.world_size, 2, dtype=torch.float64, device=module.device)
        memory[trainer.global_rank, 0] = peak_memory(module.device)
        memory[trainer.global_rank, 1] = mapped_files()
        of_ranks = trainer.strategy.reduce(memory, reduce_op="sum").long().tolist()
        self.peak_memory, self.mapped_files = max(of_ranks)
        self._close(failed=False)

    def on_exception(self, trainer, module, exception) -> None:
        self._close(failed=True)

    def _close(self, failed: bool) -> None:
        for writer in self.writers:
            writer.close(failed)


class Saver(Callback):
    """Callback that saves the trained tensors, and a checkpoint to resume from.

    It does so every `every` steps, at the end, and when the run is asked to stop. `write` puts the trained
    tensors into the file `output`; it is called on every rank, and rank 0 writes. A run that goes on from
    `resume_from` gets its state back before its first step. The newest `keep` checkpoints stay.
    """

    def __init__(
        self,
        folder: str,
        output: str,
        every: int,
        keep: int,
        write,
        last_good: LastGood,
        resume_from: str | None = None,
    ):
        self.folder, self.output, self.every, self.keep, self.write = folder, output, every, keep, write
        self.last_good, self.resume_from = last_good, resume_from
        self.saved = -1

    def on_fit_start(self, trainer, module) -> None:
        if not self.resume_from:
            return
        kept = rwkv_miss.read_metadata(self.resume_from)
        write_state(trainer, rwkv_miss.read_checkpoint(self.resume_from))
        trainer.precision_plugin.load_state_dict(kept["loss_scaling"])
        self.last_good.losses.extend(kept["recent_losses"])

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        boundary = (index + 1) % module.accumulate == 0
        if boundary and (
            trainer.should_stop or step == module.total_steps or (self.every and step % self.every == 0)
        ):
            self.save(trainer)

    def on_exception(self, trainer, module, exception) -> None:
        """Keep what was done before an error between two steps."""
        if isinstance(exception, BetweenSteps) and trainer.global_step > module.first_step:
            self.save(trainer)

    def save(self, trainer) -> None:
        """Write the output, then the checkpoint, each whole under its name or not at all.

        Older checkpoints go only after that.
        """
        step, module = trainer.global_step, trainer.lightning_module
        if step == self.saved:
            return
        state = read_state(trainer)
        error = None
        try:
            self.write(trainer, self.output)
            if trainer.is_global_zero:
                if self.every > 0 and step % self.every == 0 and module.config.peft != "none":
                    keep_adapter(self.output, step)
                os.makedirs(self.folder, exist_ok=True)
                rwkv_miss.write_checkpoint(
                    os.path.join(self.folder, checkpoint_name(step)),
                    state,
                    {
                        "format": RUN_FORMAT,
                        "step": step,
                        "output": os.path.basename(self.output),
                        "inputs": module.inputs(),
                        "reward_file": module.data.rewards and module.data.rewards.digest,
                        "loss_scaling": trainer.precision_plugin.state_dict(),
                        "recent_losses": list(self.last_good.losses),
                    },
                )
                remove_old(self.folder, self.keep)
                keep_best(os.path.join(os.path.dirname(self.output), BEST), self.folder)
        except (UserError, OSError) as caught:
            error = str(caught)
        for _ in state:
            pass  # every rank takes part in what is gathered, also when rank 0 can't write
        if error := trainer.strategy.broadcast(error):
            raise UserError(f"{error}; free some space and go on with --resume auto")
        self.saved = step
