"""A training run from settings to files: check, load, plan, train, save."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import torch

from rwkv_miss.errors import UserError

from . import config as configuration
from . import describe, ops
from .base import build_model, read_base
from .checkpoints import checkpoint_step, remove_leftovers
from .config import Config
from .device import DTYPES
from .files import is_first_process, read_lines
from .folder import alone_in, require_folder
from .history import VALIDATION, is_over
from .infctx import state_bytes
from .outputs import CHECKPOINTS, CONFIG, METRICS, finish, is_summed_up, output_path, write_new_model, writer
from .prepare import check_data_files, choose_device, device_here, plan_steps, read_data
from .processes import check_world
from .resume import earlier_settings, find_checkpoint, inherit, keep_rows_per_step
from .template import recorded_template
from .writers import check_wandb, describe_writers, open_writers

STOPPED = 130  # exit code of a run that was asked to stop and saved, as shells have it for Ctrl-C


def main(config: Config, origins: dict[str, str]) -> None:
    """Run the settings. Everything that can be wrong with them is found before the first step and before a file is written."""
    with contextlib.ExitStack() as held:
        run(config, origins, held)


def run(config: Config, origins: dict[str, str], held: contextlib.ExitStack) -> None:
    """main(); what the run holds until its end goes into `held`."""
    started = process_start()
    check_world(config)
    before = earlier_settings(config)
    if before:
        inherit(config, origins, before)
    arch, tokenizer = read_base(config)
    device = device_here(config, arch.head_size)
    choose_device(config, origins, device)
    template = recorded_template(config.template, tokenizer, config.load_model)
    if config.init_only:
        require_folder(config.proj_dir)
        return write_new_model(config, arch, tokenizer)
    check_data_files(config)
    require_folder(config.proj_dir)
    if config.wandb and is_first_process():
        check_wandb(config.wandb)
    resume_from = find_checkpoint(config, before)
    if before:
        keep_rows_per_step(config, before)
    data = read_data(config, origins, tokenizer, template)
    documents, held_out = data.documents, data.held_out
    schedule = plan_steps(config, origins, arch, device, documents)

    torch.manual_seed(config.random_seed)
    model = build_model(config, arch, device.kernel, DTYPES[config.precision])

    from . import trainer as training  # lightning: seconds of import that wrong settings need not pay
    from .callbacks import Saver, StepReport
    from .forgetting import Forgetting
    from .rollback import LastGood
    from .watch import Watch

    total_steps = config.epoch_count * (config.epoch_steps or schedule.steps_per_pass)
    final = config.lr_init * training.learning_rate_factor(config, total_steps)(total_steps - 1)
    plan = [
        f"base       {config.load_model or 'new model'}: {arch.describe()}",
        f"adapter    {describe.training(config, model)}",
        *data.found.lines(),
        *describe.data(config, documents, schedule),
        *describe.chunks(training.chunks_of(config), max(schedule.lengths), state_bytes(arch, config.micro_bsz, model.head.weight.itemsize)),
        *describe.held_out(config, held_out),
        describe.steps(config, schedule, total_steps),
        f"optimizer  AdamW, lr {config.lr_init:g} to {final:g} ({config.lr_schedule}, warm-up {config.warmup_steps}), clip {config.grad_clip:g}"
        + (f", initial state {state_lr:g}" if (state_lr := configuration.state_learning_rate(config)) else ""),
        f"device     {device.accelerator}, {device.precision} ({device.precision_reason}), strategy {config.strategy}",
        f"kernel     wkv {device.kernel}: {device.kernel_reason}",
        describe_writers(config),
        f"template   {template.name}, loss on {describe.mask(config.loss_mask)}",
        f"tokenizer  {tokenizer.name}; first sample, trained part between the marks:",
        describe.sample(documents.rows[0], tokenizer),
    ]
    plan += describe.chosen(config, origins)
    if config.warmup_steps >= total_steps:
        plan.append(f"warning    the warm-up, {config.warmup_steps} steps, is as long as the run: the full learning rate is never used")
    plan.append(f"hashes     base {model.base_fingerprint}, tokens and mask {documents.digest}"
                + (f", held out {held_out.digest}" if held_out.rows else ""))
    first_step = checkpoint_step(resume_from) if resume_from else 0
    history = read_lines(os.path.join(config.proj_dir, VALIDATION), first_step) if resume_from else []

    def complete(step: int) -> bool:
        return step >= total_steps or is_over(history, config.early_stop)

    finished = complete(first_step)
    if finished:
        what = f"has all {total_steps} steps already" if first_step >= total_steps else f"ended at step {first_step} by --early_stop"
        plan.append(f"resume     {resume_from} {what}; nothing to train. Output: {output_path(config)}")
    elif before:
        total_before = before.epoch_count * (before.epoch_steps or schedule.steps_per_pass)
        plan += describe.resume(config, before, resume_from, total_before, total_steps)
    elif config.resume == "auto":
        plan.append(f"resume     no checkpoint in {config.proj_dir}: from the beginning")
    if is_first_process():
        print("\n".join(plan), flush=True)
    if finished:
        if is_first_process() and not is_summed_up(config, first_step):  # killed after its last step
            finish(config, plan, first_step, total_steps)
        return

    os.makedirs(config.proj_dir, exist_ok=True)
    if is_first_process():
        held.enter_context(alone_in(config.proj_dir))
        remove_leftovers(config.proj_dir, os.path.join(config.proj_dir, CHECKPOINTS))
        configuration.save(config, origins, os.path.join(config.proj_dir, CONFIG))
    half = DTYPES[config.precision] if config.peft == "none" and config.precision != "fp32" else None
    module = training.FineTuning(model, config, documents, held_out, total_steps, half, first_step)
    checkpoints = os.path.join(config.proj_dir, CHECKPOINTS)
    last_good = LastGood(config.rollback_steps, config.spike_sigmas, checkpoints if config.peft == "none" else None)
    report = StepReport(os.path.join(config.proj_dir, METRICS), total_steps, started, last_good,
                        open_writers(config, first_step) if is_first_process() else [])
    save = writer(config, model, tokenizer, template, training)
    saver = Saver(checkpoints, output_path(config), config.save_steps, config.save_total_limit, save, last_good, resume_from)
    forgetting = Forgetting(tokenizer, config.load_model, complete)
    # a checkpoint of a step comes after the step's evaluation
    callbacks = [report, *([Watch(config.proj_dir, history, tokenizer, save, report)] if held_out.rows else []), forgetting, saver]
    trainer = training.make_trainer(config, total_steps, callbacks, first_step)
    begun = time.perf_counter()
    try:
        with ops.nan_passes(), training.naming_the_killed(trainer):  # LastGood judges the steps
            trainer.fit(module)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory ran out; lower --micro_bsz, then set --grad_cp 1, then lower --ctx_len") from None
    if trainer.is_global_zero:
        measured = {"fit_seconds": time.perf_counter() - begun, "command_to_first_step_seconds": report.first_step_seconds,
                    "peak_memory_bytes": report.peak_memory}
        finish(config, plan, trainer.global_step, total_steps, measured | ({} if forgetting.result is None else {"forgetting": forgetting.result}))
    if not complete(trainer.global_step):
        sys.exit(STOPPED)  # so that a script does not go on with a half-trained adapter


def process_start() -> float:
    """Seconds since the epoch at which this process was started, imports included."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = float(stat.read().rpartition(")")[2].split()[19])
            return time.time() - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.time()
