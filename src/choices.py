"""What is chosen for the user, as pure functions of sizes: of the settings, the model, the data and the free memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from .config import Config

CHUNK = 512  # tokens of a chunk that is suggested


def cheapest_fix(config: Config, precision: str, tokens: int, fits: Callable[[Config], bool]) -> dict[str, object] | None:
    """The settings to change so that a run fits, the cheapest first; {} where it fits as it is, None where nothing helps.

    Fewer rows at once with more passes in a step cost nothing, so they are tried with every other remedy. `precision` is that of the base,
    `tokens` the longest row.
    """
    for changes in _remedies(config, precision, tokens):
        changed = dataclasses.replace(config, **changes)
        for rows, passes in _halvings(changed):
            if fits(dataclasses.replace(changed, micro_bsz=rows, accumulate_grad_batches=passes)):
                fewer = {} if rows == config.micro_bsz else {"micro_bsz": rows}
                # --global_bsz makes the number of passes by itself
                return fewer | ({"accumulate_grad_batches": passes} if fewer and not config.global_bsz else {}) | changes
    return None


def _halvings(config: Config) -> Iterator[tuple[int, int]]:
    """(micro_bsz, accumulate_grad_batches) with the same rows in a step, the most rows at once first."""
    rows, passes = config.micro_bsz, config.accumulate_grad_batches
    yield rows, passes
    while rows % 2 == 0:
        rows, passes = rows // 2, passes * 2
        yield rows, passes


def _remedies(config: Config, precision: str, tokens: int) -> Iterator[dict[str, object]]:
    """Changes beside micro_bsz, each with those before it: recomputing costs a forward, chunks another, bf16 digits, sharing speed."""
    changes: dict[str, object] = {}
    yield changes
    if not config.grad_cp:
        changes = changes | {"grad_cp": True}
        yield changes
    row = min(tokens, config.ctx_len)
    if config.chunk_ctx == 0 and row > CHUNK:
        changes = changes | {"chunk_ctx": CHUNK}
        yield changes
    if precision == "fp32" and config.peft != "none":
        changes = changes | {"precision": "bf16"}
        yield changes
    if config.devices * config.num_nodes > 1 and not config.strategy.startswith("deepspeed_stage_3"):
        changes = changes | {"strategy": "deepspeed_stage_3"}
        yield changes
