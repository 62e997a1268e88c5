"""A training run from settings to files: check, load, plan, train, save."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time

import torch

import rwkv_miss
from rwkv_miss.checkpoint import Arch, read_checkpoint, require_writable, write_checkpoint
from rwkv_miss.errors import UserError

from . import config as configuration
from . import ops
from .checkpoints import checkpoint_step, list_checkpoints, remove_leftovers
from .config import Config, accumulation
from .data import Document, Documents, Schedule, load_documents
from .device import DTYPES, choose_accelerator, choose_precision
from .files import is_first_process, read_lines, write_text
from .formats import Reading, Report
from .held_out import hold_out
from .history import BEST, VALIDATION, is_over, loss_text
from .infctx import Chunks, state_bytes
from .model import RWKV, VERSIONS, read_model_file
from .run_card import CARD, CURVE, card, draw_losses
from .template import Template, recorded_template
from .tokenizer import WORLD_MODEL, load_tokenizer, recorded_tokenizer
from .writers import check_wandb, describe_writers, open_writers

ADAPTER, MODEL, METRICS, CONFIG, SUMMARY = "adapter.pth", "model.pth", "metrics.jsonl", "config.yaml", "run.json"
NEW_MODEL = "rwkv-init.pth"  # RWKV-LM's name
CHECKPOINTS = "checkpoints"
STOPPED = 130  # exit code of a run that was asked to stop and saved, as shells have it for Ctrl-C


def main(config: Config, origins: dict[str, str]) -> None:
    """Run the settings. Everything that can be wrong with them is found before the first step and before a file is written."""
    started = process_start()
    world = check_world(config)
    accelerator = choose_accelerator(config.accelerator, config.devices)
    precision, precision_reason = choose_precision(config.precision, accelerator, config.strategy)
    arch, tokenizer = read_base(config)
    template = recorded_template(config.template, tokenizer, config.load_model)
    require_writable(os.path.join(existing_part(config.proj_dir), ADAPTER))
    if config.init_only:
        return write_new_model(config, arch, tokenizer)
    if config.wandb and is_first_process():
        check_wandb(config.wandb)
    resume_from, before = find_checkpoint(config)
    if before:
        keep_rows_per_step(config, before)
    documents, held_out, found = read_data(config, tokenizer, template)
    kernel, kernel_reason = ops.choose(config.wkv, "cuda" if accelerator == "gpu" else "cpu", arch.head_size)

    torch.manual_seed(config.random_seed)
    model, lr = build_model(config, arch, kernel, DTYPES[precision])
    model.grad_cp = config.grad_cp

    from . import trainer as training  # lightning: seconds of import that wrong settings need not pay
    from .callbacks import Saver, StepReport
    from .forgetting import Forgetting
    from .rollback import LastGood
    from .watch import Watch

    schedule = training.make_schedule(documents, config, world)
    total_steps = config.epoch_count * (config.epoch_steps or schedule.steps_per_pass)
    final = lr * training.learning_rate_factor(config, total_steps, lr)(total_steps - 1)
    plan = [
        f"base       {config.load_model or 'new model'}: {arch.describe()}",
        f"adapter    {describe_training(config, model)}",
        *found.lines(),
        *describe_data(config, documents, schedule),
        *describe_chunks(training.chunks_of(config), max(schedule.lengths), state_bytes(arch, config.micro_bsz, model.head.weight.itemsize)),
        *describe_held_out(config, held_out),
        f"plan       {total_steps} steps of {schedule.rows_per_step} rows (micro_bsz {config.micro_bsz} x accumulate {schedule.accumulate} x "
        f"devices {world}), {total_steps / schedule.steps_per_pass:.3g} passes over the data",
        f"optimizer  AdamW, lr {lr:g} to {final:g} ({config.lr_schedule}, warm-up {config.warmup_steps}), clip {config.grad_clip:g}"
        + (f", initial state {state_lr:g}" if (state_lr := configuration.state_learning_rate(config)) else ""),
        f"device     {accelerator}, {precision} ({precision_reason}), strategy {config.strategy}",
        f"kernel     wkv {kernel}: {kernel_reason}",
        describe_writers(config),
        f"template   {template.name}, loss on {describe_mask(config.loss_mask)}",
        f"tokenizer  {tokenizer.name}; first sample, trained part between the marks:",
        show_sample(documents.rows[0], tokenizer),
    ]
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
        plan += describe_resume(config, before, resume_from, total_before, total_steps)
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
        remove_leftovers(config.proj_dir, os.path.join(config.proj_dir, CHECKPOINTS))
        configuration.save(config, origins, os.path.join(config.proj_dir, CONFIG))
    half = DTYPES[precision] if config.peft == "none" and precision != "fp32" else None
    module = training.FineTuning(model, config, lr, documents, held_out, total_steps, half, first_step)
    checkpoints = os.path.join(config.proj_dir, CHECKPOINTS)
    last_good = LastGood(config.rollback_steps, config.spike_sigmas, checkpoints if config.peft == "none" else None)
    report = StepReport(os.path.join(config.proj_dir, METRICS), total_steps, started, last_good,
                        open_writers(config, first_step) if is_first_process() else [])
    save = writer(config, model, tokenizer, template, training)
    saver = Saver(checkpoints, output_path(config), config.save_steps, config.save_total_limit, save, last_good, resume_from)
    forgetting = Forgetting(tokenizer, config.load_model, complete)
    # a checkpoint of a step comes after the step's evaluation
    callbacks = [report, *([Watch(config.proj_dir, history, tokenizer, save, report)] if held_out.rows else []), forgetting, saver]
    trainer = training.make_trainer(config, accelerator, total_steps, precision, callbacks, first_step)
    begun = time.perf_counter()
    try:
        with ops.nan_passes():  # LastGood judges the steps
            trainer.fit(module)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory ran out; lower --micro_bsz, then set --grad_cp 1, then lower --ctx_len") from None
    if trainer.is_global_zero:
        measured = {"fit_seconds": time.perf_counter() - begun, "command_to_first_step_seconds": report.first_step_seconds,
                    "peak_memory_bytes": report.peak_memory}
        finish(config, plan, trainer.global_step, total_steps, measured | ({} if forgetting.result is None else {"forgetting": forgetting.result}))
    if not complete(trainer.global_step):
        sys.exit(STOPPED)  # so that a script does not go on with a half-trained adapter


def read_data(config: Config, tokenizer, template: Template) -> tuple[Documents, Documents, Report]:
    """(training data, held-out data, what was found while they were read)."""
    reading = Reading.of(config)
    found = Report(config.on_bad_row, "; --on_bad_row skip leaves such rows out")

    def load(path: str) -> Documents:
        return load_documents(path, tokenizer, config.ctx_len, template, config.loss_mask, config.data_cache, reading, found, config.random_seed)

    return *hold_out(config, load), found


def check_world(config: Config) -> int:
    """Number of processes of the run; a launcher that started another number is a UserError."""
    world = config.devices * config.num_nodes
    launched = int(os.environ.get("WORLD_SIZE", world))
    if launched != world:
        raise UserError(f"the launcher started {launched} processes, but --devices x --num_nodes is {world}; make them equal")
    return world


def process_start() -> float:
    """Seconds since the epoch at which this process was started, imports included."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = float(stat.read().rpartition(")")[2].split()[19])
            return time.time() - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.time()


def existing_part(folder: str) -> str:
    """The folder, or its nearest parent that exists: where it will be made."""
    folder = os.path.abspath(folder)
    return folder if os.path.exists(folder) else existing_part(os.path.dirname(folder))


def read_base(config: Config):
    """(Arch, tokenizer) from the checkpoint's header, or from the size flags of a new model.

    No weight is read yet, but names, shapes, adapter options and targets are checked against them, on a model without memory.
    """
    if not config.load_model:
        return new_arch(config)
    tensors = read_model_file(config.load_model)
    arch = Arch.detect(tensors)
    configuration.check_sizes(config, arch)
    with torch.device("meta"):
        model = RWKV(arch)
    model.check(tensors, config.load_model)
    if config.peft != "none":
        options, targets = configuration.adapter_options(config)
        rwkv_miss.inject(model, config.peft, targets, config.train_parts, **options)
    return arch, recorded_tokenizer(config.tokenizer, config.eod, arch.vocab_size, config.load_model)


def new_arch(config: Config):
    """(Arch, tokenizer) of a new model: RWKV-LM's sizes for --n_layer and --n_embd, and the tokenizer's vocabulary."""
    vocab = config.vocab_size
    if config.tokenizer in ("auto", "world"):
        vocab = vocab or WORLD_MODEL
    tokenizer = load_tokenizer(config.tokenizer, vocab or sys.maxsize, config.eod)
    head_size = config.head_size or 64
    inner = config.dim_att or config.n_embd
    if inner % head_size:
        raise UserError(f"the width of the time mix, {inner}, is not a multiple of --head_size {head_size}")
    if config.version == "x070" and inner != config.n_embd:
        raise UserError(f"--dim_att {inner} differs from --n_embd {config.n_embd}; RWKV-7 has them equal")
    version = int(config.version[2])
    dim_ffn, ranks = VERSIONS[version].default_sizes(config.n_embd)
    arch = Arch(
        version=version, vocab_size=vocab or tokenizer.vocab_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=inner // head_size,
        head_size=head_size, dim_att=inner, dim_ffn=config.dim_ffn or dim_ffn, ranks=ranks, layer0_value_residual=version == 7,
    )
    return arch, tokenizer


def write_new_model(config: Config, arch: Arch, tokenizer) -> None:
    """--init_only: the initialisation as a file."""
    path = os.path.join(config.proj_dir, NEW_MODEL)
    if os.path.exists(path):
        raise UserError(f"{path} is there already; give it as --load_model, or choose another --proj_dir")
    torch.manual_seed(config.random_seed)
    os.makedirs(config.proj_dir, exist_ok=True)
    described = {"format": "rwkv-miss trained", "step": 0, "tokenizer": tokenizer.name, "eod": config.eod}
    write_checkpoint(path, whole_model(config, RWKV(arch)), described)
    print(f"wrote {path}: {arch.describe()}, not trained yet; go on with --load_model {path} --peft none")


def build_model(config: Config, arch: Arch, kernel: str, dtype: torch.dtype) -> tuple[RWKV, float]:
    """The model with its adapter, and the learning rate: the one asked for, else the method's own."""
    full = config.peft == "none"
    if config.load_model:
        # what is trained stays fp32, and in full training that is everything; ZeRO-3 converts each tensor when it shares it out
        mapped = config.strategy.startswith("deepspeed_stage_3")
        model = RWKV.load(config.load_model, None if mapped else torch.float32 if full else dtype, kernel=kernel)
    else:
        model = RWKV(arch, kernel)
    if full:
        return model, config.lr_init or (configuration.FULL_LR if config.load_model else configuration.NEW_MODEL_LR)
    options, targets = configuration.adapter_options(config)
    rwkv_miss.inject(model, config.peft, targets, config.train_parts, **options)
    return model, config.lr_init or rwkv_miss.METHODS[config.peft].default_lr


# settings that a resumed run may change without becoming another run: how a step is computed, how many there are, what is kept
MAY_CHANGE = {
    "proj_dir", "resume", "data_cache", "eval_steps", "eval_samples", "early_stop", "wandb", "save_steps", "save_total_limit", "rollback_steps",
    "spike_sigmas", "grad_cp", "chunk_ctx", "state_cp", "wkv", "accelerator",
    "strategy", "devices", "num_nodes", "micro_bsz", "accumulate_grad_batches", "global_bsz", "epoch_count", "epoch_steps",
}


def find_checkpoint(config: Config) -> tuple[str | None, Config | None]:
    """The checkpoint to go on from and the settings that it was made with, or (None, None).

    A run that would overwrite another one, or resume with a changed plan, is a UserError.
    """
    paths = list_checkpoints(os.path.join(config.proj_dir, CHECKPOINTS))
    if config.resume != "auto" or not paths:
        # without its summary the output comes from a run that was killed before its first checkpoint was complete
        cut_off = config.resume == "auto" and not os.path.exists(os.path.join(config.proj_dir, SUMMARY))
        outputs = [path for path in (os.path.join(config.proj_dir, BEST), output_path(config)) if os.path.exists(path)]
        if is_first_process() and not cut_off and (paths or outputs):
            raise UserError(f"{config.proj_dir} holds a run already ({os.path.basename((paths or outputs)[-1])}); "
                            + ("go on with --resume auto, or " if paths else "it has no checkpoint to resume from; ") + "choose another --proj_dir")
        return None, None
    file = os.path.join(config.proj_dir, CONFIG)
    before = Config(**configuration.read_yaml(file))
    for name in configuration.FIELDS:
        if name not in MAY_CHANGE and getattr(before, name) != getattr(config, name):
            raise UserError(f"--resume auto: the run in {config.proj_dir} has {name} {getattr(before, name)}, now it is {getattr(config, name)}; "
                            f"resume with --config {file} --resume auto, or choose another --proj_dir")
    return paths[-1], before


def keep_rows_per_step(config: Config, before: Config) -> None:
    """Choose the accumulation with which a step has as many rows as it had before; a UserError where there is none."""

    def at_once(c: Config) -> int:
        return c.micro_bsz * c.devices * c.num_nodes

    rows = at_once(before) * accumulation(before)
    now = at_once(config) * accumulation(config)
    if now == rows:
        return
    what = f"--resume auto: a step of the run in {config.proj_dir} has {rows} rows"
    if config.global_bsz or config.accumulate_grad_batches > 1:
        raise UserError(f"{what}, now it has {now}; drop --global_bsz and --accumulate_grad_batches, which are then chosen to fit, "
                        "or choose another --proj_dir")
    if rows % at_once(config):
        raise UserError(f"{what}, which is not a multiple of micro_bsz x devices x num_nodes = {at_once(config)}; choose a --micro_bsz that fits")
    config.global_bsz = rows


def describe_resume(config: Config, before: Config, path: str, total_before: int, total: int) -> list[str]:
    """Lines of the plan about a run that goes on: from where, and what is different from here."""
    lines = [f"resume     from {path}; the weights, the optimizer and the order of the data go on where they were"]
    changed = [f"{name} {getattr(before, name)} -> {getattr(config, name)}" for name in ("strategy", "devices", "num_nodes", "micro_bsz")
               if getattr(before, name) != getattr(config, name)]
    if changed:
        rows = config.micro_bsz * config.devices * config.num_nodes * accumulation(config)
        lines.append(f"           {', '.join(changed)}: a step keeps its {rows} rows, accumulate is {accumulation(config)}")
    if total != total_before:
        lines.append(f"           {total_before} steps -> {total}: the learning rate follows the schedule of {total} steps from here on")
    return lines


def describe_training(config: Config, model: RWKV) -> str:
    if config.peft == "none":
        return f"none: all {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained"
    return f"{config.peft} {model.injection.options}: {model.injection.line()}"


def describe_data(config: Config, documents: Documents, schedule: Schedule) -> list[str]:
    """Lines of the plan about the data, with a warning where rows are cut or teach nothing."""
    rows = documents.rows
    lines = [f"data       {len(rows):,} documents, {documents.tokens:,} tokens, loss on {documents.targets:,}"]
    if config.packing:
        full = sum(schedule.lengths) / (len(schedule.rows) * config.ctx_len)
        lines.append(f"packing    {len(schedule.rows):,} rows of {config.ctx_len} tokens, {full:.1%} full; documents in a row do not see each other")
    if documents.split:
        lines.append(f"long texts {documents.split:,} texts are longer than --ctx_len {config.ctx_len} and become several documents, "
                     "each of which begins with the last token of the one before")
    if documents.cut:
        lines.append(f"warning    {documents.cut:,} of {len(rows):,} documents are longer than --ctx_len {config.ctx_len} and are cut; "
                     f"{documents.cut_tokens:,} tokens are lost")
    empty = int((documents.row_targets == 0).sum())
    if empty:
        lines.append(f"warning    {empty:,} of {len(rows):,} documents have no trained token left and teach nothing")
    return lines


def describe_chunks(chunks: Chunks, width: int, each: int) -> list[str]:
    """The line of the plan about rows in chunks, of which the longest has `width` tokens and a state of a micro-batch has `each` bytes."""
    if not chunks.size:
        return []
    stops = f"stops at every {chunks.truncate} tokens" if chunks.truncate else "is exact"
    return [f"chunks     of {chunks.size} tokens, at most {chunks.count(width):,} in a row of {width:,}; the gradient {stops}; up to "
            f"{chunks.states(width):,} states of {each / 1e6:.3g} MB are kept, {chunks.states(width) * each / 1e6:,.3g} MB in all"]


def describe_mask(loss_mask: str) -> str:
    """What is trained, in words."""
    return {"assistant": "the assistant's turns and on plain text", "all": "everything"}.get(loss_mask, f"what follows {loss_mask!r}")


def describe_held_out(config: Config, held_out: Documents) -> list[str]:
    """Line of the plan about the documents that are not trained on, if there are any."""
    if not held_out.rows:
        return []
    cut = f", {held_out.cut:,} of them cut" if held_out.cut else ""
    every = f", every {config.eval_steps} steps" if config.eval_steps else ""
    stop = f", early stop after {config.early_stop} evaluations without a better one" if config.early_stop else ""
    return [f"held out   {len(held_out.rows):,} documents of {config.eval_file or config.data_file}{cut}, loss on {held_out.targets:,} tokens "
            f"before the training{every} and at its end; {config.eval_samples} samples{stop}"]


def show_sample(row: Document, tokenizer, limit: int = 600) -> str:
    """A document decoded, its trained parts between the marks."""
    text, inside = "", False
    decoder = tokenizer.decoder()
    for token, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        if trained != inside:
            text += decoder.flush() + ("«" if trained else "»")
            inside = trained
        text += decoder.push(token)
    text += decoder.flush() + ("»" if inside else "")
    shown = text if len(text) <= limit else f"{text[:limit]} ... ({len(row.ids)} tokens)"
    # a NUL, the end of document of bytes and utf16, would make a log a binary file
    return "\n".join(f"    | {line}" for line in shown.replace("\0", "␀").splitlines())


def output_path(config: Config) -> str:
    return os.path.join(config.proj_dir, MODEL if config.peft == "none" else ADAPTER)


def writer(config: Config, model: RWKV, tokenizer, template: Template, training):
    """The function that is called on every rank to write the trained tensors or, in full training, the whole model; keywords become metadata."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "numpy")} | {"python": platform.python_version()}
    made_with = {"tokenizer": tokenizer.name, "eod": config.eod, "template": template.record, "versions": versions}

    def write(trainer, path: str, **described) -> None:
        described |= {"step": trainer.global_step, **made_with}
        if config.peft != "none":
            with training.whole_parameters(trainer, [p for p in model.parameters() if p.requires_grad]):
                if trainer.is_global_zero:
                    rwkv_miss.save_adapter(model, path, **described)
            return
        items = whole_model(config, model, lambda p: training.whole_parameters(trainer, [p]))
        try:
            if trainer.is_global_zero:
                write_checkpoint(path, items, {"format": "rwkv-miss trained", **described})
        finally:
            for _ in items:
                pass  # every rank takes part in what is gathered, also when rank 0 can't write

    return write


def whole_model(config: Config, model: RWKV, gather=contextlib.nullcontext):
    """(name, tensor) of a fully trained model, one in memory at a time: the base's key order, shapes and dtypes, or bf16 for a new model.

    Inside `gather(parameter)` the parameter is whole; all ranks must walk through.
    """
    trained = dict(model.named_parameters())
    like = read_checkpoint(config.load_model) if config.load_model else dict.fromkeys(trained)
    for name, base in like.items():
        with gather(trained[name]):
            p = trained[name].detach()
            yield name, p.to(torch.bfloat16) if base is None else p.to("cpu", base.dtype).view_as(base)


def is_summed_up(config: Config, step: int) -> bool:
    """Whether the end of the run at this step has been written down."""
    path = os.path.join(config.proj_dir, SUMMARY)
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file)["steps"] == step


def finish(config: Config, plan: list[str], step: int, total_steps: int, measured: dict | None = None) -> None:
    """The loss curve, run.json, at the end of the training run_card.md, and the next command.

    `measured` is what only the process knows that trained: it is absent for a run that was killed after its last step.
    """
    with open(os.path.join(config.proj_dir, METRICS), encoding="utf-8") as file:
        metrics = [line for line in map(json.loads, file) if line["loss"] is not None]
    history = read_lines(os.path.join(config.proj_dir, VALIDATION), step)
    draw_losses(metrics, history, os.path.join(config.proj_dir, CURVE))
    summary = {
        "steps": step, "planned_steps": total_steps, "loss_first": metrics[0]["loss"], "loss_last": metrics[-1]["loss"],
        "train_seconds": sum(line["seconds"] for line in metrics), **(measured or {}), "output": output_path(config),
    }
    if history:
        summary |= {"validation_first": history[0]["loss"], "validation_last": history[-1]["loss"]}
    top = os.path.join(config.proj_dir, BEST)
    if os.path.exists(top):
        kept = rwkv_miss.read_metadata(top)
        summary |= {"best": top, "best_step": kept["step"], "validation_best": kept["validation_loss"]}
    over = is_over(history, config.early_stop)
    if step >= total_steps or over:
        write_text(os.path.join(config.proj_dir, CARD), card(config, plan, summary, metrics, history))
    write_text(os.path.join(config.proj_dir, SUMMARY), json.dumps(summary, indent=1))  # the last file: what is_summed_up() looks at
    early = f"ended early, after {config.early_stop} evaluations that were no better than the best one"
    state = "done" if step >= total_steps else early if over else "stopped, go on with --resume auto"
    start = f"first step {measured['command_to_first_step_seconds']:.1f} s after the command; " if measured else ""
    print(f"{state}: step {step} of {total_steps}, loss {summary['loss_first']:.4f} to {summary['loss_last']:.4f}; "
          f"{start}wrote {summary['output']}")
    if step >= total_steps or over:
        print(f"read it:   {os.path.join(config.proj_dir, CARD)}")
    chosen = summary["output"]
    if "best" in summary:
        print(f"best:      {top}, step {summary['best_step']}, validation loss {summary['validation_best']:.4f}; "
              f"before training {loss_text(history[0])}, at the end {loss_text(history[-1])}")
        chosen = top if summary["best_step"] < step else chosen
    if config.peft == "none":
        print(f"try it:    python -m demo.chat --model {chosen}")
    else:
        print(f"merge it:  python -m rwkv_miss merge --base {config.load_model} --adapter {chosen} --out merged.pth")
