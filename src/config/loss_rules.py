"""Rules about which settings belong to which --loss, and rules of the losses on preferences."""

from __future__ import annotations

from rwkv_miss.errors import UserError

from ..common.option import AUTO, Auto
from .loss_settings import DRAWING, LOSSES, TAUGHT
from .schema import Config

GRPO = ("grpo",)
# settings of one loss or some: its losses, and the value under the others
OF_LOSSES = {
    "beta": (
        ("dpo", "ipo", "simpo", "kto", "grpo"),
        {"orpo": "orpo weighs its odds ratio with --orpo_lambda"},
    ),
    "sft_weight": (LOSSES, {}),
    "loss_average": (
        ("dpo",),
        dict.fromkeys(
            ("ipo", "orpo", "simpo", "kto"), "ipo, orpo and simpo always take the mean, and kto the sum"
        )
        | {"grpo": "grpo has --grpo_type"},
    ),
    "label_smoothing": (("dpo", "simpo"), {}),
    "simpo_gamma": (("simpo",), {}),
    "orpo_lambda": (("orpo",), {}),
    "desirable_weight": (("kto",), {}),
    "undesirable_weight": (("kto",), {}),
    "reference": (
        (*TAUGHT, "dpo", "ipo", "kto", "grpo"),
        dict.fromkeys(("orpo", "simpo"), "orpo and simpo compare with no other model"),
    ),
    "distill_temperature": (TAUGHT, {}),
    **dict.fromkeys(("distill_top", "distill_mix"), (("distill",), {})),
    **dict.fromkeys(("group_size", "max_tokens", "inner_steps"), (DRAWING, {})),
    **dict.fromkeys(
        (
            "rewards",
            "reward_file",
            "reward_regex",
            "reward_length",
            "reward_timeout",
            "grpo_type",
            "clip_low",
            "clip_high",
            "advantage_scale",
        ),
        (GRPO, {}),
    ),
}
# settings that choose the trained tokens; compared or drawn answers are trained as wholes
OF_SUPERVISED = ("loss_mask", "think_weight", "prompt_weight")


def check_loss(config: Config) -> None:
    """Check that every setting of a loss belongs to the chosen one, and that a model answers."""
    for name, (losses, instead) in OF_LOSSES.items():
        if config.loss not in losses and getattr(config, name) != getattr(Config(), name):
            other = f"; {instead[config.loss]}" if config.loss in instead else ""
            value = getattr(config, name)
            if isinstance(value, dict):
                value = ",".join(f"{key}={item}" for key, item in value.items())
            raise UserError(
                f"--{name} {value} has no meaning with --loss {config.loss}: it is for"
                f" {', '.join(losses)}{other}; drop it, or choose another --loss"
            )
    if config.has_teacher and not config.reference:
        raise UserError(
            f"--loss {config.loss} needs a teacher: give the file of a larger or better model with the same"
            " vocabulary as --reference, or train without one with --loss sft"
        )
    if config.is_supervised:
        return
    for name in OF_SUPERVISED:
        if getattr(config, name) != getattr(Config(), name):
            what = "compares whole answers" if config.on_preferences else "trains on the answers it draws"
            raise UserError(
                f"--{name} {getattr(config, name)} has no meaning with --loss {config.loss}, which {what}:"
                " all their tokens count, and no others; drop it"
            )
    if not config.load_model:
        raise UserError(
            f"--loss {config.loss} needs a model that answers already: give --load_model, or train a new one"
            " with --loss sft first"
        )
    if config.on_preferences:
        check_preference(config.loss, config.sft_weight)


def check_preference(loss: str, sft_weight: float | Auto) -> None:
    """Check the weight of the cross entropy beside a preference."""
    if sft_weight is not AUTO and sft_weight < 0:
        raise UserError(f"--sft_weight {sft_weight:g}: must be a weight, 0 or more; -1 leaves it to the loss")
    if loss == "orpo" and sft_weight not in (AUTO, 1):
        raise UserError(
            f"--sft_weight {sft_weight:g} has no meaning with --loss orpo, whose cross entropy has the"
            " weight 1; --orpo_lambda weighs the odds ratio against it"
        )


def check_by_hand(config: Config) -> None:
    """Check the rules that depend on a setting's origin.

    A --beta of the command line is above 0; a config.yaml has 0 if the choice is left to the loss. grpo's is
    0 without a KL. Code is named only on the command line, so that nobody else's settings run it.
    """
    losses = OF_LOSSES["beta"][0]
    by_hand = config.loss in losses and config.origins.get("beta") == "command line"
    if by_hand and config.loss != "grpo" and (beta := config.value_or_zero("beta")) <= 0:
        raise UserError(
            f"--beta {beta:g}: must be above 0; leave it out for the usual one of --loss {config.loss}"
        )
    where = config.origins.get("reward_file")
    if config.reward_file and where != "command line":
        raise UserError(
            f"{where} has reward_file {config.reward_file}, whose code would be run: only the command line"
            " may name it. If you trust the file, add --reward_file"
            f" {config.reward_file} to the command; else remove the line"
        )
