"""Training run from settings to files: check, load, plan, train, save."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from rwkv_miss.adapter import only_linears_change
from rwkv_miss.errors import UserError
from rwkv_miss.files.mapped import naming_changed_files
from rwkv_miss.files.model_files import reading_once
from rwkv_miss.files.output import whole_file
from rwkv_miss.interrupts import EXIT_CODE
from rwkv_miss.progress import Progress, print_notes

from . import ops
from .common.device import PRECISIONS, grow_segments
from .common.files import read_lines, write_text
from .common.first_process import is_first_process
from .common.freed_memory import freed_memory_kept
from .common.startup import Start
from .config import Config, Settled, save
from .config.launcher import starts_others
from .config.parse import checked
from .config.reward_rules import check_own_functions
from .config.schema import SCRIPT_NOTES
from .data.chat_template import Template
from .data.fetch import fetch_files, pinned_names
from .distributed.watchdog import Watchdog, watchdog
from .model import RWKV
from .planning.base_model import build_model, choose_train_parts, new_arch, read_base, template_of_run
from .planning.defaults import choose_no_evaluations
from .planning.draft import Draft
from .planning.plan import (
    Data,
    Device,
    Plan,
    check_data_files,
    choose_device,
    choose_evaluation,
    choose_rate,
    device_here,
    memory_of,
    plan_steps,
    read_data,
    run_cost,
)
from .planning.throughput import speed_here
from .reporting import plan_text
from .reporting.diagnosis import Warnings
from .reporting.run_end import finish, is_summed_up
from .sources import source_of
from .sources.base import Source, TrainingData
from .sources.drawn import SAMPLES
from .sources.reference_model import reference_of
from .training.loggers import check_wandb, open_writers
from .training.outputs import write_new_model, writer
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
    ROWS,
    checkpoint_step,
    folder_of_run,
    output_path,
    remove_leftovers,
    require_folder,
    restore_best,
    say_running,
)
from .training.validation_log import BEST, VALIDATION, best_trained, is_known_by_heart, is_over

if TYPE_CHECKING:
    from lightning.pytorch import Callback


# In later ones no batch needs much more memory. A run that has saved nothing can begin again.
FIRST_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a plan."""

    settings: Settled  # settings of the plan
    step: int  # optimizer steps that are done
    is_complete: bool  # False: stopped before the end, and --resume auto goes on


def main(typed: Config) -> None:
    """Run the settings in this process, which may be one of several.

    It looks into the run's folder only when that is held.
    """
    start = Start.of_process()
    watched = watchdog(typed.devices, typed.num_nodes)
    once, changes = reading_once(), naming_changed_files()
    with once, changes, watched as others, folder_of_run(typed.proj_dir, others):
        write_script_notes(typed)
        if typed.init_only:
            if is_first_process():
                write_new_model(typed, *new_arch(typed))
            return
        with Progress("reading the base and the data", shown=is_first_process()):
            plan = prepare(typed, others=others)
        result = train_in_folder(plan, start)
    if not result.is_complete:
        sys.exit(EXIT_CODE)  # so that a script does not go on with a half-trained adapter


def write_script_notes(typed: Config) -> None:
    """Write the notes about a script of another trainer, also for a run that a later error ends."""
    if not is_first_process():
        return
    path = os.path.join(typed.proj_dir, SCRIPT_NOTES)
    if typed.script_notes:
        write_text(path, "".join(f"{note}\n" for note in typed.script_notes))
    else:
        with contextlib.suppress(FileNotFoundError):  # notes of another command
            os.remove(path)


def prepare(
    typed: Config,
    *,
    rows: Iterable[dict] | None = None,
    for_run: bool = True,
    device: Callable[[Config, int], Device] = device_here,
    others: Watchdog | None = None,
) -> Plan:
    """Choose what was left to the program. Wrong settings are found here, before the run writes a file.

    `rows` are the data where --data_file is empty; they become a file in the run's folder. `for_run=False`
    leaves out what only a run needs: its folder, the user's code. `device` returns the device for settings
    and a head size. `others` are the processes of other machines.
    """
    if rows is not None:
        typed = with_rows(typed, rows)
    typed = checked(typed)
    draft, earlier = Draft(typed), earlier_settings(typed.proj_dir, typed.resume)
    if earlier:
        inherit(draft, earlier)
    before = earlier and earlier.settings
    check_own_functions(draft.config.settled().rewards, draft.config.reward_file)
    draft.put(**fetch_files(names_of_hub(draft.config, before, others), is_first_process()))
    arch, tokenizer = read_base(draft)
    found = device(draft.config, arch.head_size)
    choose_device(draft, found)
    template = template_of_run(draft, tokenizer)
    check_data_files(draft.config)
    if for_run and typed.wandb and is_first_process():
        check_wandb(typed.wandb)
    resume_from = find_checkpoint(draft.config, before) if for_run else None
    if before:
        keep_rows_per_step(draft, before.rows_per_step, before.accumulation)
    data = read_data(draft, tokenizer, template)
    choose_train_parts(draft, arch, data.documents, tokenizer)
    reward_digest = try_rewards(draft.source, template, data) if for_run else None
    found = dataclasses.replace(found, memory=memory_of(found, typed.world))  # read once: it changes
    schedule = plan_steps(draft, arch, found, data)
    goes_without = before is not None and not before.eval_steps
    evaluated = choose_evaluation(draft, schedule, data.held_out, goes_without)
    choose_rate(draft, arch)
    choose_no_evaluations(draft)
    settings = draft.config.settled()
    return Plan(
        typed=typed,
        settings=settings,
        before=before,
        resume_from=resume_from,
        arch=arch,
        device=found,
        tokenizer=tokenizer,
        template=template,
        data=data,
        reward_digest=reward_digest,
        schedule=schedule,
        evaluated=evaluated,
        source=source_of(settings),
    )


def with_rows(config: Config, rows: Iterable[dict]) -> Config:
    """Write rows as rows.jsonl in the run's folder, and have the settings name that file."""
    if config.data_file:
        raise UserError(f"data_file {config.data_file} and rows were given; drop one of them")
    require_folder(config.proj_dir)
    os.makedirs(config.proj_dir, exist_ok=True)
    path = os.path.join(config.proj_dir, ROWS)
    with whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    return dataclasses.replace(config, data_file=path)


def train(plan: Plan, callbacks: Sequence[Callback] = ()) -> Result:
    """Do what a plan says, and write the files of the run, whose folder nobody else uses meanwhile.

    `callbacks` are Lightning's. They are called after the report of a step, and before its checkpoint.
    """
    start = Start(time.time())
    with naming_changed_files(), folder_of_run(plan.settings.proj_dir, None):
        if find_checkpoint(plan.settings, plan.before) != plan.resume_from:
            raise UserError(f"{plan.settings.proj_dir} has changed since prepare(); make the plan again")
        write_script_notes(plan.settings)
        return train_in_folder(plan, start, callbacks)


def train_in_folder(plan: Plan, start: Start, callbacks: Sequence[Callback] = ()) -> Result:
    """Do train() in a folder that is locked already."""
    config, resume_from = plan.settings, plan.resume_from
    if config.accelerator == "gpu":
        grow_segments()
    # before the model is there: the memory of this timing must not count as the run's
    with Progress("timing this machine", shown=is_first_process()):
        cost = run_cost(plan, speed_here(plan)) if is_first_process() else None
    torch.manual_seed(config.random_seed)
    with Progress("loading the base", shown=is_first_process()):
        model = build_model(config, plan.arch, plan.device.kernel, PRECISIONS[config.precision], resume_from)
    first_step = checkpoint_step(resume_from) if resume_from else 0
    history = read_lines(os.path.join(config.proj_dir, VALIDATION), first_step) if resume_from else []
    over = is_complete(plan, first_step, history)
    notes = []
    if resume_from:
        found = inputs(model, plan.data.documents, plan.data.held_out, reference_of(config.reference))
        check_inputs(resume_from, found)
        if note := reward_note(resume_from, plan.reward_digest):
            notes.append(f"note:      {note}")
    shown = []
    if cost:
        cost = cost.with_loading(start.loading(starts_others(config)))
        resumed = plan_text.resume(plan, over)
        short = [*notes, *plan_text.plan(plan, model, cost, [] if over else resumed)]
        shown = [*short, *plan_text.details(plan, model)]
        last = resumed if over else []  # a run with nothing to do says so at the end, where it is seen
        print("\n".join([*(shown if config.verbose else short), *last]), flush=True)
        if resume_from:
            put_best_back(config.proj_dir, history)
    if not over:
        try:
            return do_steps(plan, model, shown, start.at, history, callbacks)
        except torch.OutOfMemoryError:  # in a first step, see fit()
            del model  # with the traceback, which ends here, nothing holds what is on the GPU
        gc.collect()
        torch.cuda.empty_cache()
        return train_in_folder(with_half_micro_batch(plan), start, callbacks)
    if is_first_process() and not is_summed_up(config.proj_dir, first_step):  # killed after its last step
        finish(config, shown, first_step, plan.steps)
    return Result(config, first_step, True)


def with_half_micro_batch(plan: Plan) -> Plan:
    """Plan the same steps with half the rows at once and twice the passes, and say so."""
    config = plan.settings
    now, passes = config.micro_bsz // 2, config.accumulation * 2
    reason = f"the GPU's memory did not suffice for {config.micro_bsz} rows at once"
    print(
        f"note:      the GPU's memory ran out; beginning again with micro_bsz {now} and"
        f" accumulate_grad_batches {passes} in place of {config.micro_bsz} and {config.accumulation}, which"
        " makes the same steps",
        flush=True,
    )
    draft = Draft(config)
    draft.change("micro_bsz", now, reason)
    if not config.global_bsz:  # else the accumulation follows from --global_bsz
        draft.change("accumulate_grad_batches", passes, reason)
    schedule = dataclasses.replace(plan.schedule, micro_bsz=now, accumulate=passes)
    source = plan.source.having(draft.config)
    return dataclasses.replace(plan, settings=draft.config, schedule=schedule, source=source)


def try_rewards(source: Source, template: Template, data: Data) -> str | None:
    """Check that rewards can judge these questions, or raise UserError; return --reward_file's hash."""
    with source.judge(template) as rewards:
        if not rewards:
            return None
        notes = rewards.check([*data.documents, *data.held_out], data.encoder.tokenizer)
        if is_first_process():
            print_notes(notes)
        return rewards.digest


def names_of_hub(config: Config, before: Config | None, others: Watchdog | None) -> dict[str, str]:
    """Return the settings that name files of the hub, with the same commits in every process."""
    if others and not is_first_process():
        return others.wait_for_hub_commits()
    names = pinned_names(config, before or settings_of_first_process(config.proj_dir))
    if others:
        others.tell_hub_commits(names)
    return names


def put_best_back(folder: str, history: list[dict]) -> None:
    """Restore the history's best.pth: the present one may be of a step that the run has yet to repeat."""
    note = restore_best(os.path.join(folder, BEST), os.path.join(folder, CHECKPOINTS), best_trained(history))
    if note:
        print(f"note:      {note}", flush=True)


def do_steps(
    plan: Plan,
    model: RWKV,
    shown: list[str],
    started: float,
    history: list[dict],
    callbacks: Sequence[Callback],
) -> Result:
    """Do the steps and write the files. `history` has the evaluations so far, and gets those to come.

    `shown` are the lines of the plan, for the run card.
    """
    with Progress("loading the trainer", shown=is_first_process()):
        from .training.forgetting import Forgetting
        from .training.trainer import FineTuning, ReferenceAtStart, make_trainer

    config = plan.settings
    if is_first_process():
        prepare_folder(plan)
        say_running(config.proj_dir, steps=plan.steps, plan=shown)

    first_step = checkpoint_step(plan.resume_from) if plan.resume_from else 0
    report, *watch, saver = reporters(plan, model, started, history)
    # the base is only there for a measure if nothing but linears is adapted
    linears_alone = not config.init_adapter or only_linears_change(model)
    base = config.load_model if linears_alone else ""
    forgetting = Forgetting(plan.tokenizer, base, lambda step: is_complete(plan, step, history))
    trainer = make_trainer(
        config, plan.steps, [ReferenceAtStart(), report, *watch, forgetting, *callbacks, saver], first_step
    )
    begun = time.perf_counter()
    with plan.source.judge(plan.template) as rewards:
        found = plan.data
        data = TrainingData(found.documents, found.held_out, plan.evaluated, found.encoder, rewards)
        module = FineTuning(model, plan.source, data, plan.steps, first_step, history)
        fit(trainer, module, report)
    step = trainer.global_step
    if trainer.is_global_zero:
        measured = {
            "fit_seconds": time.perf_counter() - begun,
            "command_to_first_step_seconds": report.first_step_seconds,
            "peak_memory_bytes": report.peak_memory,
            "mapped_file_bytes": report.mapped_files,
        }
        if forgetting.result is not None:
            measured["forgetting"] = forgetting.result
        with Progress("drawing the curves and writing the cards"):
            finish(config, shown, step, plan.steps, measured)
    return Result(config, step, is_complete(plan, step, history))


def is_complete(plan: Plan, step: int, history: list[dict]) -> bool:
    """Tell whether a run with these evaluations is over after a step."""
    early = is_over(history, plan.settings.early_stop)
    return step >= plan.steps or early or is_known_by_heart(plan.settings, step, plan.steps)


def prepare_folder(plan: Plan) -> None:
    """Remove what a killed run left, and write the settings."""
    config, folder = plan.settings, plan.settings.proj_dir
    output, best_file = output_path(folder, config.peft), os.path.join(folder, BEST)
    remove_leftovers(output, best_file, os.path.join(folder, CHECKPOINTS))
    if not plan.resume_from:  # the run was killed before its first checkpoint
        for name in (BEST, VALIDATION, SAMPLES):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    save(config, os.path.join(folder, CONFIG))


def reporters(plan: Plan, model: RWKV, started: float, history: list[dict]) -> list:
    """Make the callbacks that write: the StepReport, the source's, a Watch if documents are held out, else
    ByHeart, and the Saver.

    The Saver is last, so that the checkpoint of a step comes after the step's evaluation.
    """
    from .training.callbacks import Saver, StepReport
    from .training.rollback import LastGood
    from .training.validation import ByHeart, Watch

    config, folder, resume_from = plan.settings, plan.settings.proj_dir, plan.resume_from
    checkpoints = os.path.join(folder, CHECKPOINTS)
    last_good = LastGood(
        config.rollback_steps, config.spike_sigmas, checkpoints if config.peft == "none" else None
    )
    first_step = checkpoint_step(resume_from) if resume_from else 0
    writers = open_writers(config, first_step) if is_first_process() else []
    trained_with = plan.tokenizer if config.load_model else None
    path = os.path.join(folder, METRICS)
    report = StepReport(path, plan.steps, started, last_good, writers, trained_with, Warnings)
    write = writer(config, model, plan.data.encoder)
    saver = Saver(
        checkpoints,
        output_path(folder, config.peft),
        config.save_steps,
        config.save_total_limit,
        write,
        last_good,
        resume_from,
    )
    watch = Watch(folder, history, write, report) if plan.data.held_out else ByHeart()
    return [report, *plan.source.callbacks(folder), watch, saver]


def fit(trainer, module, report) -> None:
    """Run Trainer.fit, and describe its ends in our words.

    OutOfMemoryError means that the run can begin again with half the micro batch. Several processes end: one
    that waits for the others' gradients cannot be told to begin again.
    """
    from .training.trainer import naming_the_killed

    try:
        # NaN passes, as LastGood judges the steps
        with ops.nan_passes(), naming_the_killed(trainer), report.answering_signals(), freed_memory_kept():
            trainer.fit(module)
    except SystemExit:  # Lightning's answer to the second Ctrl-C, with another code
        sys.exit(EXIT_CODE)
    except torch.OutOfMemoryError:
        config, done = module.config, trainer.global_step - module.first_step
        halves = config.micro_bsz % 2 == 0
        if halves and config.world == 1 and done < min(FIRST_STEPS, config.save_steps or FIRST_STEPS):
            raise
        first = "lower --micro_bsz"
        if halves:
            first = f"give --micro_bsz {config.micro_bsz // 2}"
            if not config.global_bsz:
                first += f" --accumulate_grad_batches {config.accumulation * 2}"
            first += " for the same steps"
        raise UserError(
            f"the GPU's memory ran out; {first}, then set --grad_cp 2 or 1, then --quant nf4, if an adapter"
            " is trained, then lower --ctx_len"
        ) from None
