"""Training step, its Lightning module, and the Trainer that runs it under any strategy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from rwkv_miss.around_steps import AroundSteps

from ..common.batch import Batch
from ..common.device import PRECISIONS
from ..config import Settled
from ..config.launcher import launched
from ..data.batches import make_schedule
from ..distributed.consistency import agree
from ..distributed.process_group import processes_of
from ..distributed.processes import choose_interface
from ..model import RWKV
from ..sources.base import Feed, Source, TrainingData
from ..sources.policy import Policy
from ..sources.reference_model import reference_of
from .optimizer import adamw, learning_rate_factor, parameter_groups
from .resume import inputs


class ScaledFp16(MixedPrecision):
    """Precision plugin that scales the loss without autocast: a frozen base in fp16, an adapter in fp32."""

    def __init__(self, device: str):
        # from 65536 a short run would spend its first steps on finding a scale that fits
        super().__init__("16-mixed", device, torch.amp.GradScaler(device, init_scale=1024.0))

    def forward_context(self):
        return contextlib.nullcontext()

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        """Unscale the gradient before it is clipped. Lightning leaves both to a fused optimizer, which does
        only one.

        If the gradient overflowed, a fused optimizer does nothing, without a wait for that fact.
        """
        result = closure()
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return result


class FineTuning(pl.LightningModule):
    """Lightning module of a training.

    The loss of an optimizer step is taken over the whole step, whatever its micro-batches and ranks.
    """

    def __init__(
        self,
        model: RWKV,
        source: Source,
        data: TrainingData,
        total_steps: int,
        first_step: int = 0,
        history: Sequence[dict] = (),
    ):
        super().__init__()
        self.model, self.source, self.config = model, source, source.config
        everything = data.held_out if data.evaluated is None else data.evaluated
        self.data = dataclasses.replace(data, evaluated=everything)
        self.reference = reference_of(self.config.reference)
        self.total_steps, self.first_step = total_steps, first_step  # first_step are done already
        self.history = history  # the evaluations, which grow while the run goes
        self.around_steps = AroundSteps(model)
        self.step_loss: Tensor | float = 0.0  # loss of the step's micro-batches so far, on the device
        self.step_metrics: Tensor | None = None  # metrics of these micro-batches, where the source has any
        self.feed: Feed | None = None
        self.step_entries: dict[str, Any] = {}  # entries of every micro-batch of the step
        self.gradient_norm: Tensor | float = 0.0  # norm in the last step, before clipping, on the device

    def setup(self, stage: str) -> None:
        agree(self.config, self.inputs() | self._code(), self.first_step)
        # the number of processes is known from here on
        self.accumulate = self.config.accumulation
        documents, world = self.data.documents, self.trainer.world_size
        self.schedule = make_schedule(documents, self.config, world, self.source.schedule_type)
        reading = self.source.prompt_reading(documents, self.schedule, self.model.arch)
        self.shared = reading.shared  # the prompt of a pair is read once
        config = self.config
        # stage 3 shards the model later, see ReferenceAtStart
        if not config.strategy.startswith("deepspeed_stage_3"):
            self.read_reference()
        self.lr = config.lr_init
        self.lr_factor = learning_rate_factor(config, self.lr, self.total_steps, self.history)
        # now, while every parameter has its shape: ZeRO-3 takes it away
        factors = config.lr_map
        self.groups = parameter_groups(
            self.model, self.lr, config.weight_decay, config.state_learning_rate, factors
        )

    def read_reference(self) -> None:
        """Give the documents the values of the reference, if the loss needs them.

        The model is that before step 1, also in a resumed run: the state of a checkpoint comes later.
        """
        steps, shared = self.total_steps, self.shared
        self.data = self.source.with_reference(self.data, self.schedule, steps, self.policy, shared)

    @property
    def policy(self) -> Policy:
        """Make the policy of the model under the run's strategy."""
        strategy = self.trainer.strategy
        processes, whole = processes_of(self.trainer), strategy.model
        return Policy(strategy.predict_step, processes, self.model, whole, strategy.root_device)

    def train_dataloader(self) -> Feed:
        steps = range(self.first_step, self.total_steps)
        self.feed = self.source.feed(self.data, self.schedule, steps, self.policy, self.shared)
        return self.feed

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def configure_optimizers(self):
        optimizer = adamw(self.groups, self.config, self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_factor(self.first_step + step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient, and keep its norm from before. DeepSpeed does that itself."""
        if not hasattr(self.trainer.strategy, "deepspeed_engine"):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if index % self.accumulate == 0:
            self.step_entries = self.feed.before_step()
        torch.manual_seed(
            self.schedule.seed_of(self.trainer.global_step, index % self.accumulate, self.trainer.global_rank)
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Compute the micro-batch's share of the step's loss.

        It is scaled so that the mean over ranks and micro-batches is the step's loss.
        """
        completed, trained = batch.having(**self.step_entries), self.source.loss
        keep = self.feed.keep and functools.partial(self.feed.keep, index % self.accumulate)
        loss, metrics = trained(self.model, completed, self.source.chunks, keep)
        weight = batch.step_weight or 1.0
        self.step_loss += trained.reported(loss, metrics) / weight
        if len(metrics):
            before = self.feed.step_sums if self.step_metrics is None else self.step_metrics
            self.step_metrics = metrics if before is None else trained.joined(before, metrics)
        scaled = loss * (self.accumulate * self.trainer.world_size / weight)
        penalty = self.around_steps.penalty(self.gather)
        return scaled if penalty is None else scaled + penalty

    def gather(self, parameters: list[nn.Parameter]):
        """Show every rank the parameters whole, inside the block."""
        return whole_parameters(self.trainer, parameters)

    def validation_step(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Compute the source for a batch of held-out rows; held_out_loss.validation_loss() calls it."""
        return self.source.loss.held_out(self.model, batch, self.source.chunks)

    def predict_step(self, batch: Batch) -> Tensor:
        """Compute ln p of the trained tokens of a batch."""
        return self.source.chunks.log_probs(self.model, batch)

    def _code(self) -> dict[str, str | None]:
        """Hash the user's code, which all processes have to share. A resumed run may have another."""
        return {"file of --reward_file": self.data.rewards.digest} if self.data.rewards else {}

    def inputs(self) -> dict[str, str | None]:
        """Hash the inputs that a resumed run must find unchanged."""
        return inputs(self.model, self.data.documents, self.data.held_out, self.reference)


class ReferenceAtStart(pl.Callback):
    """Callback for the reference pass under stage 3: the model is sharded, no checkpoint loaded yet."""

    def on_fit_start(self, trainer, module) -> None:
        if module.config.strategy.startswith("deepspeed_stage_3"):
            module.read_reference()


def make_trainer(
    config: Settled, total_steps: int, callbacks: list[pl.Callback], first_step: int = 0
) -> pl.Trainer:
    """Make Lightning's Trainer for settings that are filled in; `first_step` steps are done already."""
    _quiet()
    environment = cluster_environment(config.num_nodes)
    if config.accelerator == "cpu" and config.num_nodes > 1:
        choose_interface(environment.main_address)
    plugins: list[Precision | ClusterEnvironment] = [environment]
    strategy = config.strategy
    if strategy.startswith("deepspeed"):
        if config.accelerator == "cpu":
            # read by deepspeed's import, which would choose a GPU if it saw one
            os.environ["DS_ACCELERATOR"] = "cpu"
        from ..distributed.deepspeed_strategy import AnywhereDeepSpeed

        dtype = torch.float32 if config.peft == "none" else PRECISIONS[config.precision]
        strategy = AnywhereDeepSpeed(strategy, config.micro_bsz, dtype, config.accelerator)
    elif strategy == "ddp" or config.world > 1:
        # every rank derives the same buffers, and a method's may be larger than its trained tensors
        strategy = DDPStrategy(broadcast_buffers=False)
    if config.precision == "fp16" and not config.strategy.startswith("deepspeed"):
        plugins.append(ScaledFp16("cuda" if config.accelerator == "gpu" else "cpu"))
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        plugins=plugins,
        max_steps=total_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulation,
        gradient_clip_val=config.grad_clip or None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        benchmark=False,
    )
    set_global_step(trainer, first_step)
    # Lightning asks rank 0 before each micro-batch whether it got SIGTERM, and waits for the answer. Signals
    # are StepReport's, and the ranks agree on the end of a run once a step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def set_global_step(trainer: pl.Trainer, step: int) -> None:
    """Make trainer.global_step, which has no setter, go on from this step."""
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = step


def cluster_environment(num_nodes: int) -> ClusterEnvironment:
    """Choose where Lightning reads ranks.

    By itself it would take the processes of `deepspeed` for its own, and requeue jobs of SLURM.
    """
    launch = launched()
    if launch is None:
        if num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # whatever an earlier job has left there
        return LightningEnvironment()
    return SLURMEnvironment(auto_requeue=False) if launch.by == "srun" else TorchElasticEnvironment()


@contextlib.contextmanager
def naming_the_killed(trainer: pl.Trainer):
    """Name the killed process among those that Lightning started, around Trainer.fit.

    The others see only a lost connection.
    """
    try:
        yield
    except Exception:
        # until the system has the exit code of a process whose connections it has just closed
        time.sleep(0.5)
        for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), 1):
            if (process.poll() or 0) < 0:
                print(
                    f"error: process {process.pid}, rank {rank} of this machine, was killed by"
                    f" {signal.Signals(-process.returncode).name}; where nobody did, the kernel does when"
                    " memory runs out",
                    file=sys.stderr,
                    flush=True,
                )
        raise


@contextlib.contextmanager
def whole_parameters(trainer: pl.Trainer, parameters: list[nn.Parameter]):
    """Show every rank the parameters whole, inside the block; under ZeRO-3 a rank has a share of each."""
    if not hasattr(trainer.strategy, "deepspeed_engine"):
        yield
        return
    from ..distributed.deepspeed_strategy import gathered

    with gathered(parameters):
        yield


def _quiet() -> None:
    """Silence the libraries' lines about themselves; their warnings about the run stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # this logger names the process that ended when it ends the others
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated.*")
    warnings.filterwarnings("ignore", ".*`torch.distributed.*is deprecated.*")  # calls by DeepSpeed
    warnings.filterwarnings("ignore", ".*will not actually clip gradients.*")  # DeepSpeed does
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
    # held-out data are evaluated by src/training/validation.py, at steps of its own
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
