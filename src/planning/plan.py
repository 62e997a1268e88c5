"""Plan of a run before its weights are read: the device, the data, and the choices from both."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util

import numpy as np
import torch
from torch.torch_version import TorchVersion

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.progress import duration_text

from .. import ops
from ..common.available_memory import all_memory, free_memory
from ..common.device import choose_accelerator, choose_precision, unseen_gpu
from ..common.first_process import is_first_process
from ..common.formatting import counted
from ..common.moments import adamw_of_8_bits
from ..config import Config, Settled
from ..config.launcher import local_rank
from ..data.batches import Schedule, make_schedule
from ..data.bos import bos_ids
from ..data.chat_template import Template
from ..data.contradictions import contradictions
from ..data.dataset import Loaded
from ..data.encode import Encoder
from ..data.examples import Examples
from ..data.formats import Reading, Report, sources
from ..data.held_out import evaluations, hold_out, in_hash_order, paid_for
from ..data.tokenizer import Tokenizer
from ..losses import Loss
from ..sources import source_of
from ..sources.base import Source, TrainingData
from ..sources.estimates import Speed
from .defaults import (
    GUESSED,
    choose_batch,
    choose_eval_steps,
    choose_length,
    choose_loss,
    chosen_rate,
    held_out_share,
    row_length,
)
from .draft import Draft
from .memory import USABLE, memory_parts, needed

# the oldest torch for rows in chunks under stage 3; 2.7 fails, 2.13 works, none between them was tried
STAGE_3_CHUNKS = (2, 8)
BITSANDBYTES = "0.50"  # the oldest that was tried
PROMPTS_COUNTED = 1000  # documents; of fewer the prompts are counted, because many may have the same


@dataclasses.dataclass(frozen=True)
class Device:
    """Device of a run, with the reasons for the precision and the kernel."""

    accelerator: str
    precision: str
    precision_reason: str
    kernel: str
    kernel_reason: str
    memory: int = 0  # bytes; 0: memory_of() finds it
    here: bool = True  # False for a device that is only described
    unseen: str = ""  # about a GPU that is here, and that torch does not see


@dataclasses.dataclass(frozen=True)
class Data:
    """Documents of a run, and the findings of reading them."""

    documents: Examples  # to train on
    held_out: Examples
    found: Report
    encoder: Encoder  # the encoder that made the documents


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of a run: what was typed, and what was chosen for it. No weight is read yet."""

    typed: Config
    settings: Settled  # with all choices
    before: Settled | None  # the settings of the run that this one resumes
    resume_from: str | None  # the newest checkpoint of that run
    arch: Arch
    device: Device
    tokenizer: Tokenizer
    template: Template
    data: Data
    reward_digest: str | None  # the hash of --reward_file
    schedule: Schedule
    evaluated: Examples  # examples of Data.held_out that evaluations read
    source: Source  # source of the examples, with the loss

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.settings.total_steps(self.schedule.steps_per_pass)

    def with_loss(self, loss: Loss) -> Plan:
        """Return the plan with a loss of the user's own. The settings stay those of --loss."""
        return dataclasses.replace(self, source=self.source.having(loss=loss))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Estimated cost of a run."""

    memory: float  # bytes that it needs
    room: float  # bytes that it may use
    tokens: float  # to train on, with repetitions
    evaluation: float  # the time of all evaluations without sample answers, as a share of the training's
    seconds: float  # time of the whole run; 0 if no speed is known
    evaluation_seconds: float  # part of `seconds` spent in evaluations, with sample answers
    reference_seconds: float  # part of `seconds`: the pass of the reference, unless its values are there
    drawing_seconds: float = 0.0  # part of `seconds`: drawing the answers that are trained on
    loading_seconds: float = 0.0  # part of `seconds` without work on tokens: imports, the data, pictures
    provided: str = ""  # the assumption of the time, as "if ..."
    called: str = "reference"  # name of the model of --reference

    def with_loading(self, seconds: float) -> Cost:
        """Add the seconds of loading, if the time of the rest is known."""
        if not self.seconds:
            return self
        return dataclasses.replace(self, seconds=self.seconds + seconds, loading_seconds=seconds)

    @property
    def parts(self) -> dict[str, str]:
        """Parts of the run other than its steps -> their time in words; parts without any are left out."""
        seconds = {
            "loading": self.loading_seconds,
            "evaluation": self.evaluation_seconds,
            f"the {self.called}": self.reference_seconds,
            "drawing": self.drawing_seconds,
        }
        return {part: duration_text(time) for part, time in seconds.items() if time}


def run_cost(plan: Plan, speed: Speed) -> Cost:
    """Estimate the cost of a run at this speed."""
    config, arch, device, schedule = plan.settings, plan.arch, plan.device, plan.schedule
    documents, steps, source = plan.data.documents, plan.steps, plan.source
    memory = needed(estimate(config, arch, schedule, documents), config.devices, device.accelerator)
    room = USABLE * memory_of(device, config.world)
    data = TrainingData(documents, plan.data.held_out, plan.evaluated, plan.data.encoder)
    times = evaluations(steps, config.eval_steps) if plan.evaluated else 0
    found = source.cost.times(data, arch, schedule, steps, times, speed)
    return Cost(
        memory=memory,
        room=room,
        tokens=found.tokens,
        evaluation=found.evaluation_share,
        seconds=found.training + found.evaluation + found.reference,
        evaluation_seconds=found.evaluation,
        reference_seconds=found.reference,
        drawing_seconds=found.sampling,
        provided=found.provided,
        called=source.loss.words.reference,
    )


def device_here(config: Config, head_size: int) -> Device:
    """Describe the device at hand. Raises UserError if the requested one is not here."""
    check_packages(config.strategy, config.chunk_ctx)
    check_optimizer(config.optimizer)
    accelerator = choose_accelerator(config.accelerator, config.devices)
    if accelerator == "gpu" and local_rank():
        # kernels are tested on the GPU of this process, which takes no memory of another's
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    kernel = ops.choose(config.wkv, "cuda" if accelerator == "gpu" else "cpu", head_size)
    precision = choose_precision(config.precision, accelerator, config.strategy)
    return Device(accelerator, *precision, *kernel, unseen=unseen_gpu() if accelerator == "cpu" else "")


def check_packages(strategy: str, chunk_ctx: int) -> None:
    """Raise UserError if DeepSpeed is absent, or if torch is too old for chunks under stage 3.

    The single backward of a row in chunks needs gradient accumulators that older versions lack.
    """
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"--strategy {strategy} needs the package deepspeed, which runs on Linux; pip install"
            " deepspeed, or use auto or ddp"
        )
    stage_3 = strategy.startswith("deepspeed_stage_3")
    if chunk_ctx and stage_3 and torch.__version__ < STAGE_3_CHUNKS:
        needed = ".".join(map(str, STAGE_3_CHUNKS))
        raise UserError(
            f"--chunk_ctx with --strategy {strategy} needs torch {needed} or newer, here it is"
            f" {torch.__version__}; "
            f'pip install "torch>={needed}", or use --strategy deepspeed_stage_2 or ddp'
        )


def check_optimizer(optimizer: str) -> None:
    """Raise UserError if the package of the 8-bit optimizer is absent, too old, or does not work here."""
    if optimizer != "adamw8bit":
        return
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or TorchVersion(version) < BITSANDBYTES:
        seen = f", here is {version}" if version else ", which is not installed"
        raise UserError(
            f"--optimizer adamw8bit needs the package bitsandbytes, {BITSANDBYTES} or newer{seen}; pip"
            f" install 'bitsandbytes>={BITSANDBYTES}', or use --optimizer adamw"
        )
    try:
        adamw_of_8_bits()
    except Exception as error:  # whatever a broken installation raises
        raise UserError(
            f"--optimizer adamw8bit needs bitsandbytes, and importing {version} fails here"
            f" ({type(error).__name__}: {error}); mend the installation, or use --optimizer adamw"
        ) from None


def choose_device(draft: Draft, device: Device) -> None:
    """Fill in the settings that the device and the method decide."""
    draft.choose("accelerator", device.accelerator, "the device at hand")
    draft.choose("precision", device.precision, device.precision_reason.removeprefix("auto: "))
    draft.choose("wkv", device.kernel, device.kernel_reason.removeprefix("auto: "))


def check_data_files(config: Config) -> None:
    """Raise UserError for absent data or an unknown format; only the files' beginnings are read."""
    for path in filter(None, (config.data_file, config.eval_file)):
        sources(path, Reading.of(config))


def read_data(draft: Draft, tokenizer: Tokenizer, template: Template) -> Data:
    """Read the data, and fill in the loss's own settings, the length of rows and the held-out share."""
    choose_loss(draft)
    config = draft.config
    found = Report(config.on_bad_row, "; --on_bad_row skip leaves such rows out")
    bos = bos_ids(config.bos, tokenizer, config.load_model)
    encoder = Encoder(tokenizer, template, config.loss_mask, bos, config.think_weight, config.prompt_weight)
    loaded = draft.source.load(config.data_file, encoder, found)
    if isinstance(loaded, Loaded) and is_first_process():
        found.contradictions = contradictions(loaded)
    for choice in draft.source.defaults_by_data(loaded, tokenizer):
        draft.choose(*choice)
    longest, texts, word = draft.source.longest(loaded)
    draft.choose("ctx_len", *row_length(longest, config.chunk_ctx, texts, word))
    documents = draft.source.examples(loaded)
    word, eval_steps = draft.source.loss.words.example, config.settled().eval_steps
    count = len(documents)
    if count < PROMPTS_COUNTED:  # examples with one prompt are held out together
        count = len({part.tobytes() for part in documents.held_out_by()})
    draft.choose("eval_split", *held_out_share(count, word, config.eval_file, eval_steps))
    config, source = draft.config, draft.source

    def load_held_out(path: str) -> Examples:
        examples = source.examples(source.load(path, encoder, found))
        if left_out := examples.too_long_text(config.ctx_len):
            found.notes.append(f"left out   {left_out}")
        return examples

    train, held_out = hold_out(config, documents, load_held_out)
    if config.eval_file and (both := len(documents) - len(train)):
        found.notes.append(
            f"left out   {counted(both, word)} of {config.data_file}, {source.loss.words.duplicate} in"
            f" {config.eval_file} too"
        )
    train, held_out = (source.cost.estimated(part, loaded, tokenizer) for part in (train, held_out))
    return Data(train, held_out, found, encoder)


def choose_evaluation(
    draft: Draft, schedule: Schedule, held_out: Examples, goes_without: bool = False
) -> Examples:
    """Choose the held-out documents for evaluations, and fill in their number.

    `goes_without`: the run is resumed, and has had no evaluations between the first and the last.
    """
    if not held_out:
        return held_out
    order, config = in_hash_order(held_out, draft.config.random_seed), draft.config
    steps, source = config.total_steps(schedule.steps_per_pass), draft.source
    costs = source.cost.evaluation_costs(held_out.take(order))
    budget = source.cost.evaluation_budget(held_out, schedule, steps)
    if source.loss.facts.evaluations_between and not goes_without:
        taken = costs[: config.settled().eval_docs or None]
        choose_eval_steps(draft, steps, budget / taken.sum())
    fits = paid_for(costs, budget / evaluations(steps, config.settled().eval_steps))
    if fits < len(order):
        of_all = counted(len(order), f"held-out {source.loss.words.example}")
        reason = f"of {of_all}, so that all evaluations take at most a tenth of the run"
    else:
        reason = f"all held-out {source.loss.words.example}s take less than a tenth of the run"
    draft.choose("eval_docs", min(fits, len(order)), reason)
    return held_out.take(np.sort(order[: draft.config.eval_docs]))


def estimate(
    config: Config, arch: Arch, schedule: Schedule, documents: Examples | None = None
) -> dict[str, float]:
    """Estimate the bytes by part on one device. The batch's size is that of `config`, not of the schedule.

    Without the documents, rows are counted as separate and of one document, also for pairs with prompts read
    once.
    """
    source = source_of(config)
    sizes = source.cost.largest_batch(schedule, documents, arch)
    kernel, precision = config.wkv, config.precision
    return memory_parts(
        arch,
        config,
        config.accelerator,
        kernel,
        precision,
        sizes.row,
        sizes.targets,
        sizes.shared,
        sizes.documents,
        values=source.cost.reference_bytes(schedule, arch),
    )


def memory_of(device: Device, world: int) -> int:
    """Count the bytes that a run of `world` processes may use on its device.

    Several processes must choose alike, each by itself. The free memory differs between them, so they count
    all of the device's memory.
    """
    if device.memory:
        return device.memory
    return free_memory(device.accelerator) if world == 1 else all_memory(device.accelerator)


def plan_steps(draft: Draft, arch: Arch, device: Device, data: Data) -> Schedule:
    """Make the steps of the run, with the batch and the length filled in."""
    config = draft.config
    single_rows = dataclasses.replace(config, micro_bsz=1, accumulate_grad_batches=1, global_bsz=0)
    schedule_type = draft.source.schedule_type
    one_by_one = make_schedule(data.documents, single_rows, config.world, schedule_type)

    def bytes_needed(tried: Config) -> float:
        return needed(estimate(tried, arch, one_by_one, data.documents), tried.devices, device.accelerator)

    room = USABLE * memory_of(device, config.world)
    choose_batch(draft, len(one_by_one.rows), bytes_needed, room)
    config = draft.config
    schedule = dataclasses.replace(one_by_one, micro_bsz=config.micro_bsz, accumulate=config.accumulation)
    choose_length(draft, schedule.steps_per_pass, len(data.documents), bool(data.held_out))
    if config.save_steps < 0:
        of_passes = -config.save_steps * schedule.steps_per_pass
        draft.put(save_steps=-(-of_passes // config.inner_steps) * config.inner_steps)
    return schedule


def choose_rate(draft: Draft, arch: Arch) -> None:
    """Fill in the learning rate."""
    draft.choose("lr_init", chosen_rate(draft.config, arch), GUESSED)
