"""What the plan and the cards say of a loss on preferences, and of what is left out of its data."""

from __future__ import annotations

import os

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import recorded

from ..common.formatting import counted
from ..config import Config
from ..data.batches import Schedule
from ..data.formats import places_text
from ..data.preferences import Preferences
from ..data.questions import Questions
from ..data.units import Units
from ..planning.job import Data
from ..planning.step import preference_of, prompt_reading, unit_of
from .reward_text import describe_rewards, reward_lines


def loss_unit(config: Config) -> str:
    """Name what a loss is the mean of: "per token", or "per pair"."""
    return "per token" if config.loss == "sft" else f"per {unit_of(config)}"


def held_out_units(config: Config) -> str:
    """The plural of unit_of(), of what is not trained on."""
    return f"held-out {unit_of(config)}s"


def describe_loss(config: Config) -> str:
    """The loss with its settings and what it compares with.

    "dpo, beta 0.1, log p summed, with 1 x the NLL of the chosen answer; reference: the base, adapter off"
    """
    if config.on_rewards:
        return describe_rewards(config)
    loss = preference_of(config)
    said = [loss.kind]
    if loss.kind != "orpo":
        said.append(f"beta {loss.beta:g}")
    if loss.kind == "dpo":
        said.append("log p per token" if loss.average else "log p summed")
    if loss.kind == "simpo":
        said.append(f"gamma {loss.gamma:g}")
    if loss.kind == "orpo":
        said.append(f"lambda {loss.orpo_lambda:g}")
    if loss.label_smoothing:
        said.append(f"label smoothing {loss.label_smoothing:g}")
    if loss.kind == "kto":
        said.append(f"weights {loss.desirable_weight:g} and {loss.undesirable_weight:g}")
    said.append(
        f"with {loss.sft_weight:g} x the NLL of the chosen answer" if loss.sft_weight else "without NLL"
    )
    return f"{', '.join(said)}; {describe_reference(config)}"


def describe_reference(config: Config) -> str:
    """Which model a loss compares with."""
    if not preference_of(config).needs_reference:
        return "no reference"
    if config.reference:
        return f"reference: {os.path.basename(recorded(config.reference).rstrip('/'))}"
    return "reference: the base" + (", adapter off" if config.peft != "none" else "")


def loss_lines(config: Config, documents: Units, schedule: Schedule, arch: Arch) -> list[str]:
    """The lines of the plan about a loss on preferences or rewards and how prompts are read; none for
    supervised training.
    """
    if config.on_rewards:
        return reward_lines(config, arch)
    if not config.on_preferences:
        return []
    units = len(documents) / schedule.steps_per_pass
    said = describe_loss(config)
    if preference_of(config).needs_reference:
        said += f", read once before step 1 and kept in {kept_in(config)}"
    if config.loss == "kto":
        said += f"; {int(documents.chosen.sum()):,} of {counted(len(documents), 'answer')} to be preferred"
    prompts = prompt_reading(config, documents, schedule, arch).explanation
    return [
        f"loss       {said}; about {counted(round(units), unit_of(config))} in a step",
        *([f"prompts    {prompts}"] if prompts else []),
    ]


def kept_in(config: Config) -> str:
    """Where the values of the reference are."""
    return config.proj_dir if config.data_cache == "none" else "--data_cache"


def left_out(config: Config, found: Data) -> str:
    """What of the rows teaches nothing or does not fit, for the end of a line; nothing where all do."""
    parts = [too_long_text(config, found.documents)]
    for file in found.found.files.values():
        for reason, (count, places) in file.left_out.items():
            parts.append(f"{counted(count, 'row')} in which {reason}: {places_text(count, places)}")
    told = "; ".join(filter(None, parts))
    return f"; left out: {told}" if told else ""


def too_long_text(config: Config, documents: Units) -> str:
    """The units that --ctx_len leaves out, and where the first of them are; nothing where all fit."""
    if isinstance(documents, Questions) and documents.too_long:
        return documents.too_long_text(config.ctx_len)
    if not isinstance(documents, Preferences) or not documents.too_long:
        return ""
    places = places_text(documents.too_long, documents.too_long_places)
    what = f"{counted(documents.too_long, documents.unit)} of more than --ctx_len {config.ctx_len} tokens"
    return f"{what}{', both answers counted' if documents.paired else ''}: {places}"


def loss_warnings(config: Config, documents: Units) -> list[str]:
    """What of the loss, or of what it compares, is probably not meant so."""
    if config.loss == "kto":
        preferred, count = int(documents.chosen.sum()), counted(len(documents), "answer")
        if preferred == len(documents):
            return [f"all {count} have label true: nothing says what to avoid; --loss sft may be meant"]
        if not preferred:
            return [f"all {count} have label false: nothing says what to prefer, and the model may be lost"]
    if config.on_preferences and not config.sft_weight:
        return [
            f"--sft_weight 0: nothing keeps the chosen answers likely, and --loss {config.loss} may lose them"
            " while its accuracy rises; watch log p of the chosen, and right answers"
        ]
    return []
