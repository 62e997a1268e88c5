"""Rules about which settings belong to which --loss; a loss has its own rules in its file."""

from __future__ import annotations

from rwkv_miss.errors import UserError

from ..losses import LOSSES, options_of
from ..losses.base import check_options
from .schema import Config

# settings that choose the trained tokens; compared or drawn answers are trained as wholes
OF_SUPERVISED = ("loss_mask", "think_weight", "prompt_weight")


def check_loss(config: Config) -> None:
    """Check that every setting of a loss belongs to the chosen one, and that a model answers."""
    check_options(config)
    if config.has_teacher and not config.reference:
        raise UserError(
            f"--loss {config.loss} needs a teacher: give the file of a larger or better model with the same"
            " vocabulary as --reference, or train without one with --loss sft"
        )
    if config.is_supervised:
        LOSSES[config.loss].check(config)
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
    LOSSES[config.loss].check(config)


def check_by_hand(config: Config) -> None:
    """Check the rules that depend on a setting's origin.

    A --beta of the command line is above 0; a config.yaml has 0 if the choice is left to the loss. grpo's is
    0 without a KL. Code is named only on the command line, so that nobody else's settings run it.
    """
    by_hand = config.loss in options_of()["beta"][1] and config.origins.get("beta") == "command line"
    if by_hand and config.loss != "grpo" and (beta := config.settled().beta) <= 0:
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
