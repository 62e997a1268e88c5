"""Rules of losses on drawn answers: rewards exist, steps end with their draws, and a model can draw."""

from __future__ import annotations

import math
import re

from rwkv_miss.errors import UserError, did_you_mean
from rwkv_miss.methods.whole_tensors import split_parts

from ..losses.grpo import REWARDS
from .schema import Config

# rewards with a setting of their own, which is set exactly if they are used
OF_REWARDS = {"regex": "reward_regex", "length": "reward_length"}


def check_rewards(config: Config) -> None:
    """Check all these rules but one, if a resumed run does not name its --reward_file.

    Such a run calls check_own_functions() once it has the settings of the run so far, which name the file.
    """
    if config.draws_answers:
        check_draws(config)
    if not config.on_rewards:
        return
    if config.group_size < 2:
        raise UserError(
            "--group_size 1: a rollout is compared with the other rollouts of its question; give at least 2"
        )
    rewards, longest = config.settled().rewards, config.settled().max_tokens
    check_weights(rewards)
    if config.resume != "auto" or config.reward_file:
        check_own_functions(rewards, config.reward_file)
    for name, setting in OF_REWARDS.items():
        given = getattr(config, setting)
        if name in rewards and not given:
            raise UserError(f"--rewards {name} needs --{setting}; give it, or drop the reward")
        if given and name not in rewards:
            raise UserError(
                f"--{setting} {given} has no meaning without the reward {name}: add {name}=1 to --rewards, or"
                " drop the flag"
            )
    check_regex(config.reward_regex)
    if config.reward_length >= longest > 0:
        raise UserError(
            f"--reward_length {config.reward_length} is not below --max_tokens {longest}, where"
            " answers are cut: no answer would be too long; lower it, or raise --max_tokens"
        )
    if config.spike_sigmas:
        raise UserError(
            f"--spike_sigmas {config.spike_sigmas:g} has no meaning with --loss grpo, whose loss jumps from"
            " step to step and cannot show a bad step; drop it. The run watches its rewards, and warns"
        )
    check_reference_of_kl(config)


def check_weights(rewards: dict[str, float]) -> None:
    """Check that weights are numbers, and that one counts."""
    for name, weight in rewards.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"--rewards {name}: must be a weight such as 0.5, got {weight!r}")
    if rewards and not any(rewards.values()):
        raise UserError(
            f"--rewards {','.join(f'{name}=0' for name in rewards)}: no reward has a weight, so that"
            " there is nothing to learn; give one of them a weight above 0"
        )


def check_own_functions(rewards: dict[str, float], reward_file: str) -> None:
    """Check that a reward that is not built in is a function of --reward_file."""
    own = [name for name in rewards if name not in REWARDS]
    if "std" in own:
        raise UserError("--rewards std: reward_std is the spread of a group; give the function another name")
    for name in own:
        if reward_file and name.isidentifier():
            continue
        wish = f", or --reward_file FILE.py with a function {name}"
        if not name.isidentifier():
            wish = "; a function of --reward_file has a Python name"
        raise UserError(
            f"--rewards {name}: expected one of {', '.join(REWARDS)}{wish}{did_you_mean(name, REWARDS)}"
        )
    if reward_file and not own:
        raise UserError(
            f"--reward_file {reward_file} has no meaning without a reward of its own: name its"
            " function in --rewards, as in --rewards NAME=1, or drop the flag"
        )


def check_regex(pattern: str) -> None:
    """Check that the pattern can be compiled."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--reward_regex {pattern!r} is not a regular expression of Python: {error}; correct it"
        ) from None


def check_draws(config: Config) -> None:
    """Check that every process has the model that it draws from, that rows are of one question, and that
    work without answers falls between two draws."""
    if config.strategy.startswith("deepspeed_stage_3"):
        raise UserError(
            f"--strategy {config.strategy} has no whole model in any process, which --loss {config.loss}"
            " needs for its rollouts; use ddp, deepspeed_stage_1 or _2"
        )
    if not config.packing:
        raise UserError(
            f"--packing 0 has no meaning with --loss {config.loss}, whose questions never share a row; drop"
            " it"
        )
    for name in ("save_steps", "eval_steps", "epoch_steps"):
        steps = getattr(config.settled(), name)
        if steps > 0 and steps % config.inner_steps:
            raise UserError(
                f"--{name} {steps} is not a multiple of --inner_steps {config.inner_steps}, the steps on the"
                f" same answers; give --{name} {-(-steps // config.inner_steps) * config.inner_steps}"
            )


def check_reference_of_kl(config: Config) -> None:
    """Check that a KL has a reference model, and that a reference is used."""
    beta = config.settled().beta
    if config.reference and not beta:
        raise UserError(
            f"--reference {config.reference} has no meaning with --loss grpo without a KL; give --beta 0.04,"
            " for example, or drop it"
        )
    if not beta or config.reference:
        return
    for flag, changes in (
        (f"--peft {config.peft}", config.peft in ("none", "state")),
        (f"--train_parts {config.train_parts}", bool(split_parts(config.settled().train_parts))),
    ):
        if changes:
            raise UserError(
                f"--beta {beta:g} needs the base model, and {flag} changes the model itself, which can't be"
                f" switched off like an adapter; give --reference {config.load_model}"
            )
