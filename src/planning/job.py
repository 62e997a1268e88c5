"""What is known of a run before its weights are read: the device, the data, and what is chosen from both."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

import numpy as np
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch

from .. import ops
from ..common.available_memory import all_memory, free_memory
from ..common.device import choose_accelerator, choose_precision
from ..common.formatting import counted, size_text
from ..config import Config, accumulation, is_automatic
from ..config.launcher import local_rank
from ..data.batches import Schedule, make_schedule
from ..data.chat_template import Template
from ..data.dataset import Documents, Loaded, load
from ..data.encode import Encoder
from ..data.formats import Reading, Report, sources
from ..data.held_out import (
    EVALUATION,
    FORWARD,
    USUAL_SAMPLE_TOKENS,
    affordable,
    evaluations,
    hold_out,
    in_hash_order,
    paid_for,
    questions,
)
from ..data.leading_token import leading_token
from ..data.questions import LoadedQuestions, QuestionReader, Questions
from ..data.tokenizer import Tokenizer
from ..data.units import Units
from .defaults import (
    GUESSED,
    choose_batch,
    choose_eval_steps,
    choose_length,
    choose_loss,
    first_guess,
    held_out_share,
    row_length,
    search_size,
)
from .draft import Draft
from .memory import USABLE, fullest_rows, largest_batch, largest_shared, memory_parts, needed, reference_arch
from .own_answers import (
    evaluation_work,
    largest_groups,
    longest_answer,
    needs_right,
    tokens_of_draws,
    training_work,
    usual_length,
)
from .step import preference_of, prompt_reading, tokens_of_layouts, unit_of
from .throughput import Speed, Work

# the oldest torch for rows in chunks under stage 3; 2.7 fails, 2.13 works, none between them was tried
STAGE_3_CHUNKS = (2, 8)


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a run is, with the reasons for the precision and the kernel."""

    accelerator: str
    precision: str
    precision_reason: str
    kernel: str
    kernel_reason: str
    memory: int = 0  # bytes; 0: what memory_of() finds
    here: bool = True  # False for a device that is only described


@dataclasses.dataclass(frozen=True)
class Data:
    """The documents of a run, and what was found while they were read."""

    documents: Units  # to train on
    held_out: Units
    found: Report
    encoder: Encoder  # which made the documents


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to begin: what was typed, and what was chosen for it. No weight is read yet."""

    typed: Config
    settings: Config  # with what was chosen for the rest; lr_init is open where a search is to find it
    origins: Mapping[str, str]  # of each setting: who chose its value, and why
    before: Config | None  # the settings of the run that this one goes on with
    resume_from: str | None  # its newest checkpoint
    arch: Arch
    device: Device
    tokenizer: Tokenizer
    template: Template
    data: Data
    reward_digest: str | None  # the hash of --reward_file
    schedule: Schedule
    evaluated: Units  # those of Data.held_out whose loss is taken

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_of(self.settings, self.schedule)


def steps_of(config: Config, schedule: Schedule) -> int:
    """Optimizer steps of a run with these settings on the rows of the schedule."""
    return config.epoch_count * (config.epoch_steps or schedule.steps_per_pass)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run takes, as an estimate."""

    memory: float  # bytes that it needs
    room: float  # bytes that it may use
    tokens: float  # to train on, repeated ones included
    evaluation: float  # the time of all evaluations without sample answers, as a share of the training's
    seconds: float  # of the whole run; 0 where no speed is known
    evaluation_seconds: float  # of these, what the evaluations take with sample answers
    search_seconds: float  # of these, what the search for a learning rate takes at most
    reference_seconds: float  # of these, what the pass of the reference takes, where none is kept already
    drawing_seconds: float = 0.0  # of these, what drawing the answers takes that are trained on
    provided: str = ""  # what the time takes for granted, as "if ..."


def run_cost(plan: Plan, speed: Speed) -> Cost:
    """The cost of a run at this speed."""
    config, arch, device, schedule = plan.settings, plan.arch, plan.device, plan.schedule
    data, evaluated = plan.data, plan.evaluated
    memory = needed(estimate(config, arch, schedule, data.documents), config, device.accelerator)
    room = USABLE * memory_of(device, config.world)
    tokens, steps = trained_tokens(config, schedule), plan.steps
    times = evaluations(config, steps) if evaluated else 0
    if isinstance(data.documents, Questions):
        tokens = schedule.repeats * sum(tokens_of_draws(schedule, steps, data.documents))
        work = training_work(config, schedule, steps, data.documents)
        read = sum(evaluation_work(evaluated) if times else [], start=Work(0)).times(times)
        seconds = [part.seconds(speed) if speed.tokens else 0.0 for part in (work + read, read)]
        drawing = Work(0, work.drawn).seconds(speed) if speed.tokens else 0.0
        share = read.total / work.total
        return Cost(memory, room, tokens, share, *seconds, 0.0, 0.0, drawing, provided(data.documents))
    share = share_read(config, arch, schedule, data.documents)
    held_out_tokens = float((evaluated.lengths - 1).sum()) * share
    read = FORWARD * times * held_out_tokens * readings(config)
    training = tokens * share * (1 + FORWARD * (readings(config) - 1))
    asked = questions(data.held_out, config.eval_samples, data.encoder) if times else []
    seconds = evaluation_seconds = search_seconds = reference_seconds = 0.0
    if speed.tokens:
        prompts = FORWARD * times * sum(len(question.prompt) for question in asked)
        answers = times * USUAL_SAMPLE_TOKENS * speed.answer if asked else 0.0
        evaluation_seconds = (read + prompts) / speed.tokens + answers
        if is_automatic(config, "lr_init"):
            size = search_size(steps)
            part = size.trials * size.steps / steps
            search_seconds = (1 + EVALUATION) * part * training / speed.tokens
        once = tokens * share * min(1.0, schedule.steps_per_pass / steps)
        reference_seconds = reference_work(config, arch, once + held_out_tokens) / speed.tokens
        seconds = training / speed.tokens + evaluation_seconds + search_seconds + reference_seconds
    parts = (evaluation_seconds, search_seconds, reference_seconds)
    return Cost(memory, room, tokens, read / training, seconds, *parts)


def provided(asked: Questions) -> str:
    """What an estimate of the time takes for granted."""
    if asked.usual >= asked.max_tokens:
        return f"if answers have all {counted(asked.max_tokens, 'token')}; shorter ones take less"
    return f"if answers are about as long as the right ones, {counted(round(asked.usual), 'token')}"


def share_read(config: Config, arch: Arch, schedule: Schedule, documents: Units) -> float:
    """The part of the tokens that is read; less than all where the prompts of pairs are read once."""
    if not prompt_reading(config, documents, schedule, arch).shared:
        return 1.0
    separate, shared = tokens_of_layouts(documents, schedule)
    return shared / separate


def readings(config: Config) -> int:
    """How often a unit is looked at: under kto once more with another prompt, for the baseline."""
    return 2 if config.loss == "kto" else 1


def reference_work(config: Config, arch: Arch, tokens: float) -> float:
    """The pass of the reference over so many tokens, as tokens of the training."""
    loss = preference_of(config)
    if loss is None or not loss.needs_reference:
        return 0.0
    size = 1.0
    if config.reference:
        other = reference_arch(config)
        size = other.n_layer * other.n_embd**2 / (arch.n_layer * arch.n_embd**2)
    return FORWARD * size * readings(config) * tokens


def device_here(config: Config, head_size: int) -> Device:
    """The device at hand. Raises UserError where what is asked for is not here."""
    check_packages(config)
    accelerator = choose_accelerator(config.accelerator, config.devices)
    if accelerator == "gpu" and local_rank():
        # kernels are tested on the GPU of this process, which takes no memory of another's
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    kernel = ops.choose(config.wkv, "cuda" if accelerator == "gpu" else "cpu", head_size)
    return Device(accelerator, *choose_precision(config.precision, accelerator, config.strategy), *kernel)


def check_packages(config: Config) -> None:
    """A UserError where DeepSpeed is absent, and where torch is too old for chunks under stage 3.

    The one backward of a row in chunks needs gradient accumulators that older versions lack.
    """
    if config.strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"--strategy {config.strategy} needs the package deepspeed, which runs on Linux; pip install"
            " deepspeed, or use auto or ddp"
        )
    stage_3 = config.strategy.startswith("deepspeed_stage_3")
    if config.chunk_ctx and stage_3 and torch.__version__ < STAGE_3_CHUNKS:
        needed = ".".join(map(str, STAGE_3_CHUNKS))
        raise UserError(
            f"--chunk_ctx with --strategy {config.strategy} needs torch {needed} or newer, here it is"
            f" {torch.__version__}; "
            f'pip install "torch>={needed}", or use --strategy deepspeed_stage_2 or ddp'
        )


def choose_device(draft: Draft, device: Device) -> None:
    """Fill in what the device and the method decide."""
    draft.choose("accelerator", device.accelerator, "the device at hand")
    draft.choose("precision", device.precision, device.precision_reason.removeprefix("auto: "))
    draft.choose("wkv", device.kernel, device.kernel_reason.removeprefix("auto: "))


def check_data_files(config: Config) -> None:
    """A UserError for data that are not there or of no known format; only the files' beginnings are read."""
    for path in filter(None, (config.data_file, config.eval_file)):
        sources(path, Reading.of(config))


def read_data(draft: Draft, tokenizer: Tokenizer, template: Template) -> Data:
    """Read the data, and fill in what the loss has of its own, the length of rows and the share that is held
    out.
    """
    choose_loss(draft)
    config = draft.config
    found = Report(config.on_bad_row, "; --on_bad_row skip leaves such rows out")
    bos = leading_token(config.bos, tokenizer, config.load_model)
    encoder = Encoder(tokenizer, template, config.loss_mask, bos, config.think_weight, config.prompt_weight)
    loaded = load_file(config, config.data_file, encoder, found)
    if config.on_rewards:
        draft.choose("max_tokens", *longest_answer(config, loaded, tokenizer))
        answer = draft.config.max_tokens - 1  # the first token is read after the last one of the prompt
        length = row_length(loaded.longest + answer, config.chunk_ctx, 0, "question with its answer")
    else:
        length = row_length(loaded.longest, config.chunk_ctx, loaded.texts, unit_of(config))
    draft.choose("ctx_len", *length)
    documents = units_of(draft.config, loaded)
    draft.choose("eval_split", *held_out_share(config, len(documents)))
    config = draft.config

    def load_held_out(path: str) -> Units:
        units = units_of(config, load_file(config, path, encoder, found))
        if isinstance(units, Questions) and units.too_long:
            found.notes.append(f"left out   {units.too_long_text(config.ctx_len)}")
        return units

    train, held_out = hold_out(config, documents, load_held_out)
    if config.eval_file and (both := len(documents) - len(train)):
        alike = "word for word" if config.loss == "sft" else "whose prompts are"
        found.notes.append(
            f"left out   {counted(both, unit_of(config))} of {config.data_file}, {alike} in"
            f" {config.eval_file} too"
        )
    if isinstance(loaded, LoadedQuestions):
        usual = usual_length(config, loaded, tokenizer)
        train, held_out = (dataclasses.replace(part, usual=usual) for part in (train, held_out))
    return Data(train, held_out, found, encoder)


def load_file(config: Config, path: str, encoder: Encoder, found: Report) -> Loaded | LoadedQuestions:
    """Read --data_file or --eval_file."""
    reading, seed = Reading.of(config), config.random_seed
    if config.on_rewards:
        return QuestionReader(encoder, reading, found, needs_right(config)).load(path, seed)
    return load(path, encoder, config.data_cache, reading, found, seed)


def units_of(config: Config, loaded: Loaded | LoadedQuestions) -> Units:
    """What a run with these settings has of a file."""
    if isinstance(loaded, LoadedQuestions):
        return loaded.units(config.ctx_len, config.group_size, config.max_tokens)
    return loaded.units(config.ctx_len)


def trained_tokens(config: Config, schedule: Schedule) -> float:
    """Tokens of all steps of a run."""
    passes = steps_of(config, schedule) / schedule.steps_per_pass
    return passes * schedule.repeats * sum(schedule.lengths)


def choose_evaluation(
    draft: Draft, schedule: Schedule, held_out: Units, before: Config | None = None
) -> Units:
    """The held-out documents whose loss is taken, with their number filled in.

    `before` are the settings of a run that goes on.
    """
    if not held_out:
        return held_out
    order, config = in_hash_order(held_out, draft.config.random_seed), draft.config
    steps = steps_of(config, schedule)
    if isinstance(held_out, Questions):
        costs = np.array([work.total for work in evaluation_work(held_out.take(order))])
        budget = EVALUATION * training_work(config, schedule, steps, held_out).total
        # a run that goes on without them so far has no others
        if not (before and is_automatic(before, "eval_steps")):
            choose_eval_steps(draft, steps, budget / costs[: config.eval_docs or None].sum())
        fits = paid_for(costs, budget / evaluations(draft.config, steps))
    else:
        times = evaluations(config, steps) * readings(config)
        fits = affordable(held_out, order, trained_tokens(config, schedule), times)
    if fits < len(order):
        of_all = counted(len(order), f"held-out {unit_of(config)}")
        reason = f"of {of_all}, so that all evaluations take at most a tenth of the run"
    else:
        reason = f"all held-out {unit_of(config)}s take less than a tenth of the run"
    draft.choose("eval_docs", min(fits, len(order)), reason)
    return held_out.take(np.sort(order[: draft.config.eval_docs]))


def estimate(
    config: Config, arch: Arch, schedule: Schedule, documents: Units | None = None
) -> dict[str, float]:
    """Bytes by part on one device. The batch's size is that of `config`, not of the schedule.

    Without the documents it is that of separate rows of one document, also for pairs whose prompts are read
    once.
    """
    if isinstance(documents, Questions):
        row, targets, shared = largest_groups(documents, config)
    else:
        row, targets = largest_batch(schedule, config)
        shared = None
    if config.on_preferences and documents is not None:
        sized = dataclasses.replace(schedule, micro_bsz=config.micro_bsz, accumulate=accumulation(config))
        if prompt_reading(config, documents, sized, arch).shared:
            shared = largest_shared(documents, sized)
    inside = fullest_rows(documents, schedule, config) if isinstance(documents, Documents) else ()
    kernel, precision = config.wkv, config.precision
    return memory_parts(arch, config, config.accelerator, kernel, precision, row, targets, shared, inside)


def memory_of(device: Device, world: int) -> int:
    """Bytes that a run of `world` processes may use on its device.

    Several processes must choose alike, each by itself. What is free differs between them, so they take all
    of the device's memory.
    """
    if device.memory:
        return device.memory
    return free_memory(device.accelerator) if world == 1 else all_memory(device.accelerator)


def plan_steps(draft: Draft, arch: Arch, device: Device, data: Data) -> Schedule:
    """The steps of the run, with the batch and the length filled in."""
    config = draft.config
    single_rows = dataclasses.replace(config, micro_bsz=1, accumulate_grad_batches=1, global_bsz=0)
    one_by_one = make_schedule(data.documents, single_rows, config.world)

    def bytes_needed(tried: Config) -> float:
        return needed(estimate(tried, arch, one_by_one, data.documents), tried, device.accelerator)

    room = USABLE * memory_of(device, config.world)
    choose_batch(draft, len(one_by_one.rows), bytes_needed, room)
    config = draft.config
    schedule = dataclasses.replace(one_by_one, micro_bsz=config.micro_bsz, accumulate=accumulation(config))
    choose_length(draft, schedule.steps_per_pass, bool(data.held_out))
    return schedule


def choose_rate(draft: Draft, arch: Arch, device: Device, schedule: Schedule) -> None:
    """Fill in the first guess where no search for the learning rate is possible; else it stays open.

    run_cost() and the plan come after it: to them an open rate means a search.
    """
    config = draft.config
    if is_automatic(config, "lr_init") and (obstacle := no_search(config, arch, device, schedule)):
        reason = f"{GUESSED}; no search: {obstacle}"
        draft.choose("lr_init", first_guess(config, arch), reason)


def no_search(config: Config, arch: Arch, device: Device, schedule: Schedule) -> str:
    """Why a run can't have a search for its learning rate; nothing where it can.

    In a trial every process trains the whole model by itself, without ZeRO.
    """
    steps = steps_of(config, schedule)
    if config.on_rewards:
        return "a trial of a few steps has too few rewards to tell one rate from another"
    if search_size(steps) is None:
        return f"{counted(steps, 'step')} {'is' if steps == 1 else 'are'} too few to try rates in"
    deepspeed = config.strategy.startswith("deepspeed")
    if config.strategy.startswith("deepspeed_stage_3"):
        return f"under --strategy {config.strategy} no process has the whole model"
    if config.peft == "none" or deepspeed:
        alone = dataclasses.replace(config, strategy="auto")
        parts = estimate(alone, arch, schedule)
        # beside an adapter the run has more copies than this later, for --rollback_steps
        copy = parts["trained"] if config.peft == "none" and device.accelerator == "cpu" else 0.0
        size = needed(parts | {"copy": copy}, alone, device.accelerator)
        room = USABLE * memory_of(device, config.world)
        if size > room:
            return f"a trial needs {size_text(size)} of memory, and {size_text(room)} may be used"
    return ""
