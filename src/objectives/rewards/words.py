"""Text of the plan and the cards about a loss on rewards."""

from __future__ import annotations

import os

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import recorded

from ...common.formatting import counted
from ...config import Config
from ...data.questions import Questions, text_length
from ...data.tokenizer import Tokenizer
from .sizes import rollouts_at_once


def describe_rewards(config: Config) -> str:
    """Describe the loss with its settings.

    "grpo (dapo), 8 answers to a question, of at most 24 tokens; reward exact + 0.5 partial, against the mean
    of a question's answers, in units of their spread; clip 0.2 and 0.28; no KL"
    """
    terms = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in config.rewards.items()
    ).replace("+ -", "- ")
    scale = ", in units of their spread" if config.advantage_scale == "group" else ""
    inner = f"; {config.inner_steps} steps on each draw" if config.inner_steps > 1 else ""
    return (
        f"grpo ({config.grpo_type}), {config.group_size} answers to a question, of at most"
        f" {counted(config.max_tokens, 'token')}; reward {terms}, against the mean of a"
        f" question's answers{scale}; clip"
        f" {config.clip_low:g} and {config.clip_high:g}{inner}; {_describe_kl(config)}"
    )


def long_answers(asked: Questions, tokenizer: Tokenizer) -> str:
    """Say how many reference answers can't be drawn, as they and an end are too long; "" if all can."""
    lengths = [text_length(tokenizer, question.right) for question in asked.questions]
    if not (long := sum(length >= asked.max_tokens for length in lengths)):
        return ""
    return (
        f"{long:,} of {counted(len(lengths), 'right answer')} {'has' if long == 1 else 'have'} more tokens"
        f" than --max_tokens {asked.max_tokens}, so that {'it' if long == 1 else 'they'} can't be drawn"
    )


def _describe_kl(config: Config) -> str:
    if not config.beta:
        return "no KL"
    if config.reference:
        return f"KL {config.beta:g} to {os.path.basename(recorded(config.reference).rstrip('/'))}"
    return f"KL {config.beta:g} to the base, adapter off"


def reward_lines(config: Config, arch: Arch) -> list[str]:
    """Write the lines of the plan about the loss and how prompts are read."""
    rows = rollouts_at_once(config, arch, config.precision, config.accelerator)
    read = f"is read once for its {config.group_size} answers, to draw them and to train on them"
    if config.chunk_ctx:
        read = "is read once to draw, and before each answer to train on it, as rows run in chunks"
    return [
        f"loss       {describe_rewards(config)}",
        f"prompts    each {read}; {counted(rows, 'answer')} are drawn at once, at temperature 1",
    ]
