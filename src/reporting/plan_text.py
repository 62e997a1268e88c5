"""Plan as a run prints it before its first step, and its details in run_card.md."""

from __future__ import annotations

import dataclasses

from rwkv_miss.adapter import METHODS
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.files.hub_names import recorded
from rwkv_miss.merging.rounding import percent
from rwkv_miss.progress import duration_text
from rwkv_miss.targets import layers_text
from rwkv_miss.version import version_line

from ..common.formatting import counted, size_text
from ..config import FIELDS, Config, command
from ..config.schema import CHOSEN
from ..data.bos import describe_bos
from ..data.chat_template import Template
from ..data.held_out import evaluations
from ..data.released import modes_note
from ..data.rwkv_template import RwkvTemplate
from ..model import RWKV
from ..model.batch_loss import Chunks, state_bytes
from ..planning.defaults import chosen_rate, share_of_time
from ..planning.launches import slow_line
from ..planning.plan import Cost, Plan
from ..training.loggers import absent_writers, places_to_watch
from ..training.optimizer import learning_rate_factor
from ..training.run_folder import ADAPTER, MODEL, adapter_of_step, checkpoint_step, output_path
from ..training.validation_log import learns_by_heart
from .data_text import cut_warnings, documents_line, held_out, long_texts, rows, sources
from .document_text import example_sample, short_example
from .run_card import CARD

LINES = 14  # the most lines of a plan
FAR = 5  # a rate on drawn answers this many times the chosen one gets a warning
HOUR = 3600  # seconds; a run on a CPU that takes longer gets advice
LABEL = 11  # characters that a line begins with

OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW with moments in 8 bits"}


def plan(run: Plan, model: RWKV, cost: Cost, resumed: list[str]) -> list[str]:
    """Say what the run trains, on what, how, where and for how long, in at most LINES lines.

    `resumed` are the lines of resume().
    """
    config, device = run.settings, run.device
    processes = ""
    if config.world > 1:
        processes = f", {counted(config.world, 'process', 'processes')} ({config.strategy})"
    reason = device.precision_reason.removeprefix("auto: ")
    output = ADAPTER if config.peft != "none" else MODEL
    places = places_to_watch(config.proj_dir, config.wandb)
    watch = f"; watch: {'; '.join(places)}" if places else ""
    slow = slow_line(run)
    where = " on each GPU" if device.accelerator == "gpu" else ""
    if not where and config.devices > 1:
        where = f" for {counted(config.devices, 'process', 'processes')}"
    lines = [
        *([f"warning    {device.unseen}"] if device.unseen else []),
        *filter(None, [slow]),
        f"rwkv-miss  {version_line()}",
        f"{base(run, frozen_bytes(model))}; tokenizer {run.tokenizer.name}",
        documents_line(run),
        *released_modes(config.load_model, run.template),
        steps(run),
        *run.source.lines(run.data.documents, run.schedule, run.arch),
        f"trained    {trained(config.peft, model)}{unseen(config)}",
        f"rates      {rates(run)}{far_above(run)}",
        f"device     {device.accelerator}, {device.precision} ({reason}){processes}",
        needs(cost, where),
        evaluation(run, cost),
        f"files      in {config.proj_dir}: {output}, {CARD}{kept(run, model)}{watch}",
        *resumed,
        *warnings(run, cost),
        *advice(run, cost),
        f"sample     {short_example(run.data.documents[0], run.tokenizer)}",
    ]
    if len(lines) <= LINES:
        return lines
    # the surplus shares the last line but one, as nothing of it may be dropped
    first, rest, last = lines[: LINES - 2], lines[LINES - 2 : -1], lines[-1]
    return [*first, rest[0][:LABEL] + "; ".join(line[LABEL:] for line in rest), last]


def kept(run: Plan, model: RWKV) -> str:
    """Say how many adapters of --save_steps stay, and their bytes; "" for none."""
    every = run.settings.save_steps
    if run.settings.peft == "none" or not 0 < every <= run.steps:
        return ""
    size = size_text(sum(tensor.nbytes for tensor in adapter_tensors(model).values()))
    return f", {run.steps // every} {adapter_of_step('N')} of {size} each"


def template_text(template: Template) -> str:
    """Name the template, and how it writes tools."""
    tools = f" (tools in the form {template.tools.name})" if isinstance(template, RwkvTemplate) else ""
    return f"{template.name}{tools}"


def released_modes(load_model: str, template: Template) -> list[str]:
    """Write the line about the modes of a released G1 model; [] for any other base."""
    note = modes_note(load_model, template)
    return [f"template   {note}"] if note else []


def details(run: Plan, model: RWKV) -> list[str]:
    """Write the lines that the plan has no room for: for run_card.md, and for the terminal with --verbose."""
    config, device, schedule = run.settings, run.device, run.schedule
    documents, held = run.data.documents, run.data.held_out
    digests = {"base": model.base_fingerprint, "tokens and mask": documents.digest}
    if held:
        digests["held out"] = held.digest
    return [
        *sources(run),
        *long_texts(documents, config.ctx_len),
        *chunks(
            run.source.chunks,
            max(schedule.lengths),
            state_bytes(model.arch, config.micro_bsz, model.head.weight.itemsize),
        ),
        *held_out(run),
        f"optimizer  {OPTIMIZERS[config.optimizer]}, clip {config.grad_clip:g}, strategy {config.strategy}",
        f"kernel     wkv {device.kernel}: {device.kernel_reason}",
        *absent_writers(),
        f"template   {template_text(run.template)}{asks_otherwise(run.template)};"
        f" {describe_bos(run.data.encoder.bos)}",
        "sample     trained part between the marks:",
        example_sample(documents[0], run.tokenizer),
        *chosen(run),
        f"hashes     {', '.join(f'{name} {digest}' for name, digest in digests.items())}",
    ]


def frozen_bytes(model: RWKV) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def trained(peft: str, model: RWKV) -> str:
    """Say how much of the model is trained, and by which method. The share is of the base's parameters."""
    if peft == "none":
        return f"all {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"
    report = model.injection
    count, total = report.trainable, report.total
    also = f", and {', '.join(report.also_trained())} of the base" if report.train_parts else ""
    return f"{count:,} of {total:,} parameters ({percent(count / total)}): {method(peft, model)}{also}"


def unseen(config: Config) -> str:
    """Name the adapter that the run begins with, or why parts are trained that nobody asked for; else ""."""
    if config.init_adapter:
        return f"; begins with {config.init_adapter}"
    kind, _, reason = config.origin_of("train_parts").partition(": ")
    return f", as {reason}" if kind == CHOSEN and config.train_parts else ""


def method(peft: str, model: RWKV) -> str:
    """Describe the adapter: its rank and the options that are not defaults."""
    report = model.injection
    usual = vars(METHODS[peft].Options())
    options = report.options.items()
    shown = {name: value for name, value in options if name == "rank" or value != usual.get(name)}
    described = "".join(f", {name} {value}" for name, value in shown.items() if value not in ({}, False, ""))
    linears = len(report.linears) - len(report.rows)
    where = f" in {counted(linears, 'matrix', 'matrices')}" if linears else ""
    if report.layers is not None:
        where += f" of layers {layers_text(report.layers)}"
    return f"{peft}{described}{where}"


def rates(run: Plan) -> str:
    """Describe the learning rates."""
    config, total = run.settings, run.steps
    shape = f"{config.lr_schedule}, warm-up {config.warmup_steps}"
    final = config.lr_init * learning_rate_factor(config, config.lr_init, total)(total - 1)
    rate_of_state = config.state_learning_rate
    if config.lr_schedule == "plateau":
        shape += ", half after each evaluation that is no better"
    of_states = f", initial state {rate_of_state:g}" if rate_of_state else ""
    kind, _, reason = config.origin_of("lr_init").partition(": ")
    why = f"; {reason}" if kind == CHOSEN else ""
    return f"lr {config.lr_init:g} to {final:g} ({shape}){of_states}{why}"


def far_above(run: Plan) -> str:
    """Warn if a rate on drawn answers is far above the one that would be chosen; else ""."""
    config = run.settings
    if not config.draws_answers:
        return ""
    if config.lr_init <= FAR * (chosen := chosen_rate(config, run.arch)):
        return ""
    return f"; {config.lr_init / chosen:.3g} times the chosen rate, {chosen:g}: rewards may collapse"


def needs(cost: Cost, where: str) -> str:
    """Write the line of the plan about memory and time."""
    most = "at most about" if cost.provided else "about"  # drawn answers are counted at their greatest length
    memory = f"{most} {size_text(cost.memory)} of memory{where}, of {size_text(cost.room)} that may be used"
    if not cost.seconds:
        return f"needs      {memory}"
    named = [f"{time} for {part}" for part, time in cost.parts.items()]
    of_that = f", of which {' and '.join(named)}" if named else ""
    granted = f" ({cost.provided})" if cost.provided else ""
    time = f"about {duration_text(cost.seconds)} from the command to its end"
    return f"needs      {memory}; {time}{of_that}{granted}"


def evaluation(run: Plan, cost: Cost) -> str:
    """Write the line of the plan about evaluations: the loss on some of the held-out documents, or the
    answers to some of the questions."""
    config, held, evaluated = run.settings, len(run.data.held_out), len(run.evaluated)
    source = run.source
    words, facts = source.loss.words, source.loss.facts
    word = words.example
    if not held:
        return (
            f"evaluation none: no {word}s are held out (--eval_file FILE or --eval_split 0.05"
            " would tell what the run is worth)"
        )
    every = f", every {counted(config.eval_steps, 'step')}" if config.eval_steps > 0 else ""
    stop = ""
    if config.early_stop > 0:
        stop = f"; early stop after {counted(config.early_stop, 'evaluation')} without a better one"
    times, answers = evaluations(run.steps, config.eval_steps), ""
    if facts.asks_samples and (
        asked := source.cost.chosen_questions(
            run.data.held_out, run.data.encoder, run.schedule, run.steps, times
        )
    ):
        answers = f" and {counted(len(asked), 'greedy answer')}"
    return (
        f"evaluation {words.evaluation} {evaluated:,} of {counted(held, f'held-out {word}')}{answers}, "
        f"{times} times: before the training{every} and at its end; "
        f"{percent(cost.evaluation)} of the training's work{stop}"
    )


def warnings(run: Plan, cost: Cost) -> list[str]:
    """List what in the data, the device or the settings is probably not intended."""
    config, device, documents = run.settings, run.device, run.data.documents
    of_loss = run.source.warnings(documents, run.tokenizer)
    texts = [*run.data.found.warnings(), *cut_warnings(documents, config.ctx_len), *of_loss]
    if bad := run.data.found.bad:
        are = "is" if bad == 1 else "are"
        texts.append(f"{counted(bad, 'row')} cannot be used and {are} left out; {CARD} has the first")
    if config.warmup_steps >= run.steps:
        texts.append(
            f"the warm-up, {counted(config.warmup_steps, 'step')}, is as long as the run: "
            "the full learning rate is never used"
        )
    if cost.memory > cost.room:
        texts.append("memory may run out; python -m scripts.plan with the same flags says what to change")
    if device.accelerator == "cpu" and device.kernel == "torch" and device.kernel_reason.startswith("auto: "):
        texts.append(f"slow: {device.kernel_reason.removeprefix('auto: ')}")
    return [f"warning    {text}" for text in texts]


def advice(run: Plan, cost: Cost) -> list[str]:
    """Say what fewer layers with adapters would save, where a CPU takes longer than an hour."""
    config, layers = run.settings, run.arch.n_layer
    slow = run.device.accelerator == "cpu" and cost.seconds > HOUR
    if not slow or config.peft == "none" or config.layers or layers < 4:
        return []
    trained = sum(run.schedule.targets) / sum(run.schedule.lengths)
    half, quarter = (
        f"--layers last:{count} takes about {share_of_time(run.arch, count, trained):.2f}"
        for count in (layers // 2, layers // 4)
    )
    return [f"advice     this takes more than an hour: a step with {half} of the time, with {quarter}"]


def base(run: Plan, held: float) -> str:
    """Write the line of the plan about the base, of which `held` bytes are frozen."""
    config = run.settings
    quantised = f"; its layers in {config.quant}, {size_text(held)} in all" if config.quant != "none" else ""
    return f"model      {recorded(config.load_model) or 'new model'}: {run.arch.describe()}{quantised}"


def asks_otherwise(template: Template) -> str:
    """Say what a chat reads before an answer and the training does not, if anything."""
    if not template.asked_only:
        return ""
    return f"; asks with {template.asked_only!r}, which it does not write before an answer without thoughts"


def steps(run: Plan) -> str:
    """Return the line of the plan about its optimizer steps and their rows.

    A given number of steps is more passes where documents share rows.
    """
    config, schedule, total, documents = run.settings, run.schedule, run.steps, len(run.data.documents)
    passes, source = total / schedule.steps_per_pass, run.source
    length = ""
    if config.epoch_steps and documents > len(schedule.rows):
        passes_alone = total * schedule.rows_per_step / documents
        length = f" ({passes_alone:.3g} if each row had one document, --packing 0)"
    if config.epoch_count > 1 and not config.epoch_steps:
        length = f": one pass makes {counted(schedule.steps_per_pass, 'step')}"
    most = ""
    if config.early_stop > 0:
        score = "loss falls" if source.loss.metrics.by_loss else "reward rises"
        flat = f"held-out {score} no further"
        end = "data are known by heart" if learns_by_heart(config) else flat
        length, most = f"{length}; ends when the {end}", "at most "
    return (
        f"steps      {most}{counted(total, 'step')} of"
        f" {counted(schedule.rows_per_step, source.loss.words.row)} "
        f"(micro_bsz {config.micro_bsz} x accumulate {schedule.accumulate} x devices {config.world}), "
        f"{passes:.3g} {'pass' if passes == 1 else 'passes'} over the data{length}; {rows(run)}"
    )


def chunks(chunks: Chunks, width: int, each: int) -> list[str]:
    """Write the line of the plan about rows in chunks.

    The longest row has `width` tokens. A state of a micro-batch has `each` bytes.
    """
    if not chunks.size:
        return []
    stops = f"stops at every {chunks.truncate} tokens" if chunks.truncate else "is exact"
    return [
        f"chunks     of {chunks.size} tokens, at most {chunks.count(width):,} in a row of {width:,}; the"
        f" gradient {stops}; up to {counted(chunks.states(width), 'state')} of {each / 1e6:.3g} MB are kept,"
        f" {chunks.states(width) * each / 1e6:,.3g} MB in all"
    ]


def chosen(run: Plan) -> list[str]:
    """Write the lines of the plan about the program's choices, and the command with all of them."""
    config = run.settings
    by_reason: dict[str, list[str]] = {}
    for name in FIELDS:
        kind, _, reason = config.origin_of(name).partition(": ")
        # accelerator, precision and kernel have lines of their own
        if kind == CHOSEN and name not in ("accelerator", "precision", "wkv"):
            value = getattr(config, name)
            by_reason.setdefault(reason, []).append(f"{name} {'none' if value == '' else value}")
    lines = [f"{', '.join(settings)}: {reason}" for reason, settings in by_reason.items()]
    labels = ["chosen", *[""] * len(lines)]
    chosen = [f"{label:<10} {line}" for label, line in zip(labels, lines)]
    return [*chosen, f"in full    {command(config)}"]


def resume(run: Plan, over: bool) -> list[str]:
    """Write the lines of the plan about a resumed run: its checkpoint, and what is different now."""
    config, before, path = run.settings, run.before, run.resume_from
    if over:
        step = checkpoint_step(path)
        what = f"has all {counted(run.steps, 'step')} already, and a larger --epoch_count would add some"
        if step < run.steps:
            what = f"ended at step {step} by --early_stop, and --early_stop 0 would let it go on"
        if step > run.steps:
            what = f"has {counted(step, 'step')}, more than the {run.steps:,} that are asked for"
        output = output_path(config.proj_dir, config.peft)
        return [f"resume     {path} {what}; nothing to train. Output: {output}"]
    if before is None and config.resume != "auto":
        return []
    if before is None:
        return [f"resume     no checkpoint in {config.proj_dir}: from the beginning"]
    lines = [
        f"resume     from {path}; the weights, the optimizer and the order of the data go on where they were"
    ]
    changed = [
        f"{name} {getattr(before, name)} -> {getattr(config, name)}"
        for name in ("strategy", "devices", "num_nodes", "micro_bsz")
        if getattr(before, name) != getattr(config, name)
    ]
    if changed:
        lines.append(
            f"           {', '.join(changed)}: a step keeps its {counted(run.schedule.rows_per_step, 'row')},"
            f" accumulate is {run.schedule.accumulate}"
        )
    planned, done = before.total_steps(run.schedule.steps_per_pass), checkpoint_step(path)
    if planned != run.steps and config.lr_schedule != "plateau":  # which has no length
        rate = config.lr_init
        # an earlier version left the schedule open, which meant cos
        shaped = dataclasses.replace(before, lr_schedule=before.lr_schedule or "cos")
        was = rate * learning_rate_factor(shaped, before.lr_init, planned)(done - 1)
        now = rate * learning_rate_factor(config, rate, run.steps)(done)
        lines.append(
            f"           {counted(planned, 'step')} -> {run.steps:,}: the learning rate was {was:.2g} in step"
            f" {done:,} and is {now:.2g} in step {done + 1:,}, as its schedule is now that of"
            f" {counted(run.steps, 'step')}"
        )
    return lines
