"""The lines of the plan that a run prints before its first step."""

from __future__ import annotations

from rwkv_miss.checkpoint import Arch

from .checkpoints import checkpoint_step
from .choices import CHOSEN
from .config import Config, command
from .data import Document, Documents, Schedule
from .infctx import Chunks, chunks_of, state_bytes
from .learning_rate import learning_rate_factor, state_learning_rate
from .model import RWKV
from .outputs import output_path
from .prepare import Job, steps_of
from .words import counted, size_text
from .writers import describe_writers


def plan(job: Job) -> list[str]:
    """What the run trains, on what, how and where."""
    config, device, schedule, documents, held = job.config, job.device, job.schedule, job.data.documents, job.data.held_out
    model = job.model
    final = config.lr_init * learning_rate_factor(config, job.steps)(job.steps - 1)
    state_rate = state_learning_rate(config)
    lines = [
        base(config, model.arch, sum(p.nbytes for p in model.parameters() if not p.requires_grad)),
        f"adapter    {training(config, model)}",
        *job.data.found.lines(),
        *data(config, documents, schedule),
        *chunks(chunks_of(config), max(schedule.lengths), state_bytes(model.arch, config.micro_bsz, model.head.weight.itemsize)),
        *held_out(config, held),
        steps(config, schedule, job.steps),
        f"optimizer  AdamW, lr {config.lr_init:g} to {final:g} ({config.lr_schedule}, warm-up {config.warmup_steps}), clip {config.grad_clip:g}"
        + (f", initial state {state_rate:g}" if state_rate else ""),
        f"device     {device.accelerator}, {device.precision} ({device.precision_reason}), strategy {config.strategy}",
        f"kernel     wkv {device.kernel}: {device.kernel_reason}",
        describe_writers(config),
        f"template   {job.template.name}, loss on {mask(config.loss_mask)}",
        f"tokenizer  {job.tokenizer.name}; first sample, trained part between the marks:",
        sample(documents.rows[0], job.tokenizer),
        *chosen(config, job.origins),
    ]
    if config.warmup_steps >= job.steps:
        lines.append(f"warning    the warm-up, {counted(config.warmup_steps, 'step')}, is as long as the run: the full learning rate is never used")
    digests = {"base": model.base_fingerprint, "tokens and mask": documents.digest} | ({"held out": held.digest} if held.rows else {})
    return [*lines, f"hashes     {', '.join(f'{name} {digest}' for name, digest in digests.items())}"]


def base(config: Config, arch: Arch, held: float) -> str:
    """The line of the plan about the base, of which `held` bytes are frozen."""
    quantised = f"; its layers in {config.quant}, {size_text(held)} in all" if config.quant != "none" else ""
    return f"base       {config.load_model or 'new model'}: {arch.describe()}{quantised}"


def training(config: Config, model: RWKV) -> str:
    if config.peft == "none":
        return f"none: all {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained"
    chosen = ", ".join(f"{name} {value}" for name, value in model.injection.options.items() if value not in ({}, False, ""))
    return f"{config.peft} {chosen}: {model.injection.line()}".replace(" :", ":")


def data(config: Config, documents: Documents, schedule: Schedule) -> list[str]:
    """Lines of the plan about the data, with a warning where rows are cut or teach nothing."""
    rows = documents.rows
    lines = [f"data       {counted(len(rows), 'document')}, {counted(documents.tokens, 'token')}, loss on {documents.targets:,}"]
    if config.packing:
        full = sum(schedule.lengths) / (len(schedule.rows) * config.ctx_len)
        lines.append(f"packing    {counted(len(schedule.rows), 'row')} of {config.ctx_len} tokens, {full:.1%} full; documents in a row do not "
                     "see each other")
    if documents.split:
        lines.append(f"long texts {counted(documents.split, 'text')} of more than --ctx_len {config.ctx_len} tokens, cut into several documents, "
                     "each of which begins with the last token of the one before")
    if documents.cut:
        lines.append(f"warning    {documents.cut:,} of {counted(len(rows), 'document')} cut at --ctx_len {config.ctx_len}: "
                     f"{counted(documents.cut_tokens, 'token')} lost")
    empty = int((documents.row_targets == 0).sum())
    if empty:
        lines.append(f"warning    {empty:,} of {counted(len(rows), 'document')} without any trained token left: nothing is learned there")
    return lines


def steps(config: Config, schedule: Schedule, total: int) -> str:
    """The line of the plan about its optimizer steps."""
    passes = total / schedule.steps_per_pass
    return (f"plan       {counted(total, 'step')} of {counted(schedule.rows_per_step, 'row')} (micro_bsz {config.micro_bsz} x accumulate "
            f"{schedule.accumulate} x devices {config.world}), {passes:.3g} {'pass' if passes == 1 else 'passes'} over the data")


def chunks(chunks: Chunks, width: int, each: int) -> list[str]:
    """The line of the plan about rows in chunks, of which the longest has `width` tokens and a state of a micro-batch has `each` bytes."""
    if not chunks.size:
        return []
    stops = f"stops at every {chunks.truncate} tokens" if chunks.truncate else "is exact"
    return [f"chunks     of {chunks.size} tokens, at most {chunks.count(width):,} in a row of {width:,}; the gradient {stops}; up to "
            f"{counted(chunks.states(width), 'state')} of {each / 1e6:.3g} MB are kept, {chunks.states(width) * each / 1e6:,.3g} MB in all"]


def chosen(config: Config, origins: dict[str, str]) -> list[str]:
    """Lines of the plan about what was left to the program, and the command that says it all."""
    by_reason: dict[str, list[str]] = {}
    for name, origin in origins.items():
        kind, _, reason = origin.partition(": ")
        if kind == CHOSEN and name not in ("accelerator", "precision", "wkv"):  # which have lines of their own
            by_reason.setdefault(reason, []).append(f"{name} {getattr(config, name)}")
    lines = [f"{', '.join(settings)}: {reason}" for reason, settings in by_reason.items()]
    return [f"{'chosen' if i == 0 else '':<10} {line}" for i, line in enumerate(lines)] + [f"in full    {command(config)}"]


def mask(loss_mask: str) -> str:
    """What is trained, in words."""
    return {"assistant": "the assistant's turns and on plain text", "all": "everything"}.get(loss_mask, f"what follows {loss_mask!r}")


def held_out(config: Config, held_out: Documents) -> list[str]:
    """Line of the plan about the documents that are not trained on, if there are any."""
    if not held_out.rows:
        return []
    cut = f", {held_out.cut:,} of them cut" if held_out.cut else ""
    every = f", every {counted(config.eval_steps, 'step')}" if config.eval_steps else ""
    stop = f", early stop after {counted(config.early_stop, 'evaluation')} without a better one" if config.early_stop else ""
    return [f"held out   {counted(len(held_out.rows), 'document')} of {config.eval_file or config.data_file}{cut}, loss on "
            f"{counted(held_out.targets, 'token')} before the training{every} and at its end; {counted(config.eval_samples, 'sample')}{stop}"]


def resume(job: Job, before: Config | None, path: str | None, over: bool) -> list[str]:
    """Lines of the plan about a run that goes on from a checkpoint: from where, and what is different from here."""
    config = job.config
    if over:
        step = checkpoint_step(path)
        what = f"has all {counted(job.steps, 'step')} already" if step >= job.steps else f"ended at step {step} by --early_stop"
        return [f"resume     {path} {what}; nothing to train. Output: {output_path(config)}"]
    if before is None:
        return [f"resume     no checkpoint in {config.proj_dir}: from the beginning"] if config.resume == "auto" else []
    lines = [f"resume     from {path}; the weights, the optimizer and the order of the data go on where they were"]
    changed = [f"{name} {getattr(before, name)} -> {getattr(config, name)}" for name in ("strategy", "devices", "num_nodes", "micro_bsz")
               if getattr(before, name) != getattr(config, name)]
    if changed:
        lines.append(f"           {', '.join(changed)}: a step keeps its {counted(job.schedule.rows_per_step, 'row')}, accumulate is "
                     f"{job.schedule.accumulate}")
    planned = steps_of(before, job.schedule)
    if planned != job.steps:
        lines.append(f"           {counted(planned, 'step')} -> {job.steps:,}: from here on the learning rate follows the schedule of "
                     f"{counted(job.steps, 'step')}")
    return lines


def sample(row: Document, tokenizer, limit: int = 600) -> str:
    """A document decoded, its trained parts between the marks."""
    text, inside = "", False
    decoder = tokenizer.decoder()
    for token, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        if trained != inside:
            text += decoder.flush() + ("«" if trained else "»")
            inside = trained
        text += decoder.push(token)
    end = list(tokenizer.eod)
    silent = row.ids[-len(end) :].tolist() == end and not tokenizer.decode(end)  # World's end of document has no text
    text += decoder.flush() + ("␃" if silent else "") + ("»" if inside else "")
    shown = text if len(text) <= limit else f"{text[:limit]} ... ({len(row.ids)} tokens)"
    # a NUL, the end of document of bytes and utf16, would make a log a binary file
    return "\n".join(f"    | {line}" for line in shown.replace("\0", "␀").splitlines())
