"""A training run from settings to files: check, load, plan, train, save."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files.mapped import naming_changed_files
from rwkv_miss.interrupts import EXIT_CODE
from rwkv_miss.progress import print_notes

from . import ops
from .common.device import PRECISIONS
from .common.files import read_lines
from .config import Config, save
from .config.launcher import is_first_process
from .config.reward_rules import check_own_functions
from .data.chat_template import Template
from .data.fetch import fetch_files, pinned_names
from .distributed.watchdog import Watchdog, watchdog
from .evaluation.rewards import Rewards
from .planning.base_model import build_model, read_base, reference_of, template_of_run
from .planning.job import (
    Data,
    Job,
    check_data_files,
    choose_device,
    choose_evaluation,
    choose_rate,
    device_here,
    plan_steps,
    read_data,
    run_cost,
)
from .planning.throughput import speed_here
from .reporting import plan_text
from .reporting.early_warning import early_warning
from .reporting.run_end import finish, is_summed_up
from .training.loggers import check_wandb, open_writers
from .training.outputs import write_new_model, writer
from .training.rate_search import RateSearch, recorded_search, search_table
from .training.resume import (
    check_inputs,
    earlier_settings,
    find_checkpoint,
    inherit,
    inputs,
    keep_rows_per_step,
    reward_note,
    settings_of_first_process,
)
from .training.run_folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    RATE_SEARCH,
    checkpoint_step,
    folder_of_run,
    output_path,
    remove_leftovers,
    restore_best,
)
from .training.sample_log import SAMPLES
from .training.validation_log import BEST, VALIDATION, best_trained, is_over


def main(config: Config, origins: dict[str, str]) -> None:
    """Run the settings in this process, which may be one of several.

    It looks into the run's folder only when that is held.
    """
    started = process_start()
    with naming_changed_files(), watchdog(config) as others, folder_of_run(config.proj_dir, others):
        run(config, origins, started, others)


def run(config: Config, origins: dict[str, str], started: float, others: Watchdog | None) -> None:
    """All of main() in the held folder.

    What can be wrong with the settings is found before the first step, and before a file is written.
    """
    before = earlier_settings(config)
    if before:
        inherit(config, origins, before)
    check_own_functions(config)
    fetch_files(config, names_of_hub(config, before, others), is_first_process())
    arch, tokenizer = read_base(config, origins)
    device = device_here(config, arch.head_size)
    choose_device(config, origins, device)
    template = template_of_run(config, origins, tokenizer)
    if config.init_only:
        if is_first_process():
            write_new_model(config, arch, tokenizer)
        return
    check_data_files(config)
    if config.wandb and is_first_process():
        check_wandb(config.wandb)
    resume_from = find_checkpoint(config, before)
    if before:
        keep_rows_per_step(config, before)
    data = read_data(config, origins, tokenizer, template)
    reward_digest = try_rewards(config, template, data)
    schedule = plan_steps(config, origins, arch, device, data)
    evaluated = choose_evaluation(config, origins, schedule, data.held_out, before)
    choose_rate(config, origins, arch, device, schedule)
    # before the model is there: what is timed shall not count among the run's memory
    if is_first_process():
        speed = speed_here(arch, config, schedule)
        cost = run_cost(config, arch, device, schedule, data, evaluated, speed)
    torch.manual_seed(config.random_seed)
    model = build_model(config, arch, device.kernel, PRECISIONS[config.precision], resume_from)
    job = Job(config, origins, device, tokenizer, template, data, evaluated, schedule, model)

    first_step = checkpoint_step(resume_from) if resume_from else 0
    history = read_lines(os.path.join(config.proj_dir, VALIDATION), first_step) if resume_from else []
    over = first_step >= job.steps or is_over(history, config.early_stop)
    notes = []
    if resume_from:
        check_inputs(resume_from, inputs(model, data.documents, data.held_out, reference_of(config)))
        if config.on_rewards and (note := reward_note(resume_from, reward_digest)):
            notes.append(f"note:      {note}")
    plan = []
    if is_first_process():
        resumed = plan_text.resume(job, before, resume_from, over)
        short = [*notes, *plan_text.plan(job, cost, [] if over else resumed)]
        plan = [*short, *plan_text.details(job)]
        last = resumed if over else []  # that there is nothing to do is said at the end, where it is seen
        print("\n".join([*(plan if config.verbose else short), *last]), flush=True)
        if resume_from:
            put_best_back(config, history)
    if over:
        if is_first_process() and not is_summed_up(config, first_step):  # killed after its last step
            finish(config, origins, plan, first_step, job.steps)
        return
    train(job, plan, started, history, resume_from)


def try_rewards(config: Config, template: Template, data: Data) -> str | None:
    """The hash of --reward_file, if there is one. UserError where rewards cannot judge these questions."""
    with rewards_of(config, template) as rewards:
        if not rewards:
            return None
        notes = rewards.check([*data.documents, *data.held_out])
        if is_first_process():
            print_notes(notes)
        return rewards.digest


def rewards_of(config: Config, template: Template) -> contextlib.AbstractContextManager[Rewards | None]:
    """What judges the answers of a run, to be closed; None where it draws none."""
    return Rewards.of(config, template) if config.on_rewards else contextlib.nullcontext()


def names_of_hub(config: Config, before: Config | None, others: Watchdog | None) -> dict[str, str]:
    """The settings that name files of the hub, with the same commits in every process."""
    if others and not is_first_process():
        return others.wait_for_hub_commits()
    names = pinned_names(config, before or settings_of_first_process(config))
    if others:
        others.tell_hub_commits(names)
    return names


def put_best_back(config: Config, history: list[dict]) -> None:
    """Have best.pth be that of the history: it may be of a step that the run has yet to do again."""
    folder = config.proj_dir
    note = restore_best(os.path.join(folder, BEST), os.path.join(folder, CHECKPOINTS), best_trained(history))
    if note:
        print(f"note:      {note}", flush=True)


def train(job: Job, plan: list[str], started: float, history: list[dict], resume_from: str | None) -> None:
    """Do the steps and write the files. `history` has the evaluations so far, and gets those to come."""
    from .training.forgetting import Forgetting
    from .training.trainer import FineTuning, ReferenceAtStart, TrainingData, make_trainer

    config = job.config
    if is_first_process():
        prepare_folder(job, resume_from)

    def complete(step: int) -> bool:
        return step >= job.steps or is_over(history, config.early_stop)

    first_step = checkpoint_step(resume_from) if resume_from else 0
    report, *watch, saver = reporters(job, started, history, resume_from)
    forgetting = Forgetting(job.tokenizer, config.load_model, complete)
    trainer = make_trainer(
        config, job.steps, [ReferenceAtStart(), report, *watch, forgetting, saver], first_step
    )
    begun = time.perf_counter()
    with rewards_of(config, job.template) as rewards:
        found = job.data
        data = TrainingData(found.documents, found.held_out, job.evaluated, found.encoder, rewards)
        module = FineTuning(job.model, config, data, job.steps, first_step, RateSearch(job).run)
        do_steps(trainer, module, report)
    if trainer.is_global_zero:
        measured = {
            "fit_seconds": time.perf_counter() - begun,
            "command_to_first_step_seconds": report.first_step_seconds,
            "peak_memory_bytes": report.peak_memory,
        }
        if forgetting.result is not None:
            measured["forgetting"] = forgetting.result
        finish(config, job.origins, plan, trainer.global_step, job.steps, measured)
    if not complete(trainer.global_step):
        sys.exit(EXIT_CODE)  # so that a script does not go on with a half-trained adapter


def prepare_folder(job: Job, resume_from: str | None) -> None:
    """Remove what a killed run left, and write the settings."""
    config, folder = job.config, job.config.proj_dir
    best_file = os.path.join(folder, BEST)
    remove_leftovers(output_path(config), best_file, os.path.join(folder, CHECKPOINTS))
    if not resume_from:  # of a run that was killed before its first checkpoint
        for name in (BEST, VALIDATION, RATE_SEARCH, SAMPLES):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    save(config, job.origins, os.path.join(folder, CONFIG), search_table(recorded_search(folder)))


def reporters(job: Job, started: float, history: list[dict], resume_from: str | None) -> list:
    """The callbacks that write: the StepReport, DrawnSamples where the answers are the model's own, a Watch
    where documents are held out, and the Saver.

    The Saver is last, so that the checkpoint of a step comes after the step's evaluation.
    """
    from .training.callbacks import Saver, StepReport
    from .training.drawn_samples import DrawnSamples
    from .training.rollback import LastGood
    from .training.validation import Watch

    config, folder = job.config, job.config.proj_dir
    checkpoints = os.path.join(folder, CHECKPOINTS)
    last_good = LastGood(
        config.rollback_steps, config.spike_sigmas, checkpoints if config.peft == "none" else None
    )
    first_step = checkpoint_step(resume_from) if resume_from else 0
    writers = open_writers(config, first_step) if is_first_process() else []
    trained_with = job.tokenizer if config.load_model else None
    path = os.path.join(folder, METRICS)
    report = StepReport(path, job.steps, started, last_good, writers, trained_with, early_warning)
    write = writer(config, job.model, job.data.encoder)
    watch = Watch(folder, history, job.data.encoder, write, report)
    saver = Saver(
        checkpoints,
        output_path(config),
        config.save_steps,
        config.save_total_limit,
        write,
        last_good,
        resume_from,
    )
    samples = [DrawnSamples(folder)] if config.on_rewards else []
    return [report, *samples, *([watch] if job.data.held_out else []), saver]


def do_steps(trainer, module, report) -> None:
    """Trainer.fit, with its ways to end told in our words."""
    from .training.trainer import naming_the_killed

    try:
        # NaN passes, as LastGood judges the steps
        with ops.nan_passes(), naming_the_killed(trainer), report.answering_signals():
            trainer.fit(module)
    except SystemExit:  # Lightning's answer to the second Ctrl-C, with another code
        sys.exit(EXIT_CODE)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory ran out; lower --micro_bsz, then set --grad_cp 2 or 1, then --quant nf4, which"
            " adapters can do with, then lower --ctx_len"
        ) from None


def process_start() -> float:
    """Seconds since the epoch at which this process was started, imports included."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = float(stat.read().rpartition(")")[2].split()[19])
            return time.time() - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.time()
