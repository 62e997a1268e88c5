"""Metrics of a training on preferences, beside the loss."""

from __future__ import annotations

from ..held_out_answers import RIGHT, SHOWN
from ..loss_metrics import LossMetrics, Panel, Shown, percent

ACCURACIES = ("reward_accuracy", "raw_accuracy")  # the raw one for a loss without a reference

PREFERENCES = LossMetrics(
    {
        **RIGHT,
        "reward_accuracy": "reward accuracy",
        "raw_accuracy": "raw accuracy",
        "margin": "margin of the rewards",
        "reward_chosen": "reward of the chosen answer",
        "reward_rejected": "reward of the rejected answer",
        "logp_chosen": "log p of the chosen answer",
        "logp_rejected": "log p of the rejected answer",
        "nll": "NLL of the chosen answer, per token",
        "kl": "KL to the reference on a few answers, per token",
        "baseline": "KTO's baseline",
    },
    shares=(*RIGHT, *ACCURACIES),
    bar=(
        Shown(ACCURACIES, lambda share: f"accuracy {share:.0%}"),
        Shown(("margin",), lambda margin: f"margin {margin:.2g}"),
    ),
    line=(
        SHOWN,
        Shown(ACCURACIES, lambda share: f"accuracy {percent(share)}"),
        Shown(("margin",), lambda margin: f"margin {margin:.3g}"),
        Shown(("logp_chosen",), lambda nats: f"log p of a chosen answer {nats:.1f}"),
        Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
    ),
    loss_of="pair",
    nats=("nll", "the loss of the chosen answers"),
    picture="preferences.png",
    panels=(
        Panel("rewards", ("reward_chosen", "reward_rejected", "margin")),
        Panel("accuracy", ACCURACIES),
        Panel("log p of an answer", ("logp_chosen", "logp_rejected")),
        Panel("per token", ("nll", "kl")),
    ),
    caption="rewards, accuracies, log p and KL over the steps",
    heading="Preferences, of the training data",
    explanation=(
        "An accuracy is the share of pairs whose chosen answer wins: by its reward, which is against the"
        " reference, or, raw, by its own log p. A high one alone proves nothing: the chosen answers"
        " should not get less likely."
    ),
)
