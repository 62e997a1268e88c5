"""The settings of a step as the model takes them: chunks, the loss, the dtype, and how prompts are read."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from rwkv_miss.files.checkpoint import Arch

from ..common.device import PRECISIONS
from ..config import Config
from ..data.batches import Schedule
from ..data.preferences import Preferences
from ..data.units import Units
from ..model.batch_loss import Chunks
from ..model.grpo_loss import GrpoLoss
from ..model.preference_loss import PreferenceLoss

# What a pass through the layers costs beside its tokens, in tokens times n_embd. A wider model needs longer
# for a token, and as long for what comes with each operator. The CPU's number was measured at width 96
# (docs/speed.md); the GPU's is an estimate from its launches.
PASS_COST = {"cpu": 32_000, "gpu": 2_000_000}
LEAST_GAIN = 1.05  # prompts are shared where that is faster by so much at least
SAMPLED_STEPS = 32  # so many steps of the first pass are looked at


def chunks_of(config: Config) -> Chunks:
    """How rows are cut into chunks."""
    return Chunks(config.chunk_ctx, config.truncate_ctx, config.state_cp)


def preference_of(config: Config) -> PreferenceLoss | None:
    """The loss on preferences, once its settings are filled in; None with another --loss."""
    if not config.on_preferences:
        return None
    return PreferenceLoss(
        config.loss,
        beta=config.beta,
        sft_weight=config.sft_weight,
        average=config.loss_average == "mean",
        label_smoothing=config.label_smoothing,
        gamma=config.simpo_gamma,
        orpo_lambda=config.orpo_lambda,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def grpo_of(config: Config) -> GrpoLoss | None:
    """The loss on rewards, once its settings are filled in; None with another --loss."""
    if not config.on_rewards:
        return None
    return GrpoLoss(
        config.grpo_type,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta=config.beta,
        max_tokens=config.max_tokens,
        rewards=tuple(config.rewards),
    )


def unit_of(config: Config) -> str:
    """What a training example is called: "document", of a preference "pair" or, under kto, "answer"; under
    grpo "question".
    """
    return {"sft": "document", "kto": "answer", "grpo": "question"}.get(config.loss, "pair")


def dtype_of(config: Config) -> torch.dtype | None:
    """The dtype that full training computes in, on parameters in fp32. None: an adapter's, that of the base.

    It is the model's `computes_in`. There is no torch.autocast: it would decide for each operator, and return
    fp32 from some on a GPU, so that all after them is fp32.
    """
    return PRECISIONS[config.precision] if config.peft == "none" else None


@dataclasses.dataclass(frozen=True)
class PromptReading:
    """Whether a prompt is read once for all its answers, and why, for the plan ("": there is no choice)."""

    shared: bool = False
    explanation: str = ""


def prompt_reading(config: Config, documents: Units, schedule: Schedule, arch: Arch) -> PromptReading:
    """How prompts are read in a run.

    Shared prompts are read in a pass of their own, and both they and the answers are padded to the longest of
    the micro-batch. Separate rows are packed and need one pass. The result depends on the settings, the data
    and the model's width alone, so that every rank and every resume has the same.
    """
    if config.on_rewards:
        return PromptReading(not config.chunk_ctx)
    if not config.on_preferences or not documents.paired:
        return PromptReading()
    if config.chunk_ctx:
        return PromptReading(False, "each answer is read after its own prompt: rows run in chunks")
    separate, shared = tokens_of_layouts(documents, schedule)
    second = PASS_COST["gpu" if config.accelerator == "gpu" else "cpu"] / arch.n_embd
    if separate + second > LEAST_GAIN * (shared + 2 * second):
        return PromptReading(
            True,
            f"a prompt is read once for both answers: {shared:,.0f} tokens a micro-batch in the place of"
            f" {separate:,.0f}, padding included",
        )
    return PromptReading(
        False,
        f"each answer is read after its own prompt: a prompt read once would make {shared:,.0f} tokens of the"
        f" {separate:,.0f} of a micro-batch, and a second pass costs as much as {second:,.0f}",
    )


def tokens_of_layouts(preferences: Preferences, schedule: Schedule) -> tuple[float, float]:
    """Tokens of the mean micro-batch, padding included: of separate rows, and with shared prompts."""
    prompts, answers = preferences.prompt_lengths, preferences.answers.lengths - preferences.prompt_lengths
    separate, shared, count = 0, 0, 0
    all_steps = schedule.steps_per_pass
    sampled = np.linspace(0, all_steps - 1, min(SAMPLED_STEPS, all_steps)).astype(int)
    for step in np.unique(sampled).tolist():
        for group in range(schedule.accumulate * schedule.world):
            rows = schedule.micro_rows(step, *divmod(group, schedule.world))
            if not rows:
                continue
            pairs = np.array([unit for row in rows for unit in schedule.rows[row]])
            separate += len(rows) * max(schedule.lengths[row] for row in rows)
            # an answer's row begins with the last token of its prompt, and ends before its own last one
            longest = max(answers[2 * pairs].max(), answers[2 * pairs + 1].max())
            shared += len(pairs) * (max(1, prompts[2 * pairs].max() - 1) + 2 * longest)
            count += 1
    return separate / count, shared / count
