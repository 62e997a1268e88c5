"""Lines of the plan and the cards about a loss on preferences."""

from __future__ import annotations

import os

from rwkv_miss.files.hub_names import recorded

from ...common.formatting import counted
from ...config import Config
from ...data.preferences import Preferences
from ...model.preference_loss import PreferenceLoss


def describe_loss(config: Config, loss: PreferenceLoss) -> str:
    """Describe the loss with its settings and what it compares with.

    "dpo, beta 0.1, log p summed, with 1 x the NLL of the chosen answer; reference: the base, adapter off"
    """
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
    return f"{', '.join(said)}; {_describe_reference(config, loss)}"


def _describe_reference(config: Config, loss: PreferenceLoss) -> str:
    if not loss.needs_reference:
        return "no reference"
    if config.reference:
        return f"reference: {os.path.basename(recorded(config.reference).rstrip('/'))}"
    return "reference: the base" + (", adapter off" if config.peft != "none" else "")


def loss_warnings(loss: PreferenceLoss, documents: Preferences) -> list[str]:
    """Tell what of the loss, or of what it compares, is probably not meant so."""
    preferred, count = int(documents.chosen.sum()), counted(len(documents.chosen), "answer")
    if preferred == len(documents.chosen):  # never of pairs
        return [f"all {count} have label true: nothing says what to avoid; --loss sft may be meant"]
    if not preferred:
        return [f"all {count} have label false: nothing says what to prefer, and the model may be lost"]
    if loss.sft_weight != 0:
        return []
    return [
        f"--sft_weight 0: nothing keeps the chosen answers likely, and --loss {loss.kind} may lose them"
        " while its accuracy rises; watch log p of the chosen, and right answers"
    ]
