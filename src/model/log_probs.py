"""Log-probabilities of a batch's trained tokens, the input of preference losses.

Rows are run whole or in chunks, as for the training loss (batch_loss.py). Or the prompts of
the batch are read once, and the answers go on from the states after them.
"""

from __future__ import annotations

from torch import Tensor

from .batch_loss import Chunks, Part, run_rows
from .rwkv import RWKV, LayerState, State


def token_log_probs(model: RWKV, batch: dict, chunks: Chunks, width: int = 0) -> Tensor:
    """Compute ln p of each trained token, (n,) in at least fp32, in the order of batch["targets"].

    `batch`, `chunks` and `width` are as for batch_loss(); its weights are not read. A batch with "prompts"
    (P, S) int64 has them read once: its rows "ids" are answers, and row i goes on from the state after prompt
    prompt_of[i], so its first token is the prompt's last. Prompts are padded on the left, and "prompt_reset"
    (P, S) bool is true where a padded one begins. Such rows are whole.

    The result is differentiable in the model's trained parameters, through the states after prompts, too.
    Equal rows give the same numbers with and without shared prompts, except with dropout: answers that share
    a prompt share its dropped entries.
    """
    return _of_tokens(model, batch, chunks, width, part_log_probs)


def token_features(model: RWKV, batch: dict, chunks: Chunks, width: int = 0) -> Tensor:
    """Return the head's input for each trained token, (n, C), in token_log_probs()' order."""
    return _of_tokens(model, batch, chunks, width, part_features)


def top_log_probs(
    model: RWKV, batch: dict, chunks: Chunks, width: int, count: int, temperature: float
) -> Tensor:
    """Compute distillation_loss.Teacher.numbers for each trained token, (n, 2 count + 1), without gradient,
    in token_log_probs()' order."""

    def top(model: RWKV, part: dict, state: State | None) -> tuple[Tensor, State]:
        x, state = part_features(model, part, state)
        return model.top_log_probs(x, count, temperature), state

    return _of_tokens(model, batch, chunks, width, top)


def _of_tokens(model: RWKV, batch: dict, chunks: Chunks, width: int, part: Part) -> Tensor:
    if "prompts" not in batch:
        return run_rows(model, batch, chunks, width, part, each=True)
    if chunks.size:
        raise ValueError(f"prompts are shared by whole rows, not by chunks of {chunks.size} tokens")
    return part(model, batch, after_prompts(model, batch))[0]


def part_log_probs(model: RWKV, part: dict, state: State | None) -> tuple[Tensor, State]:
    """Return (ln p of the trained tokens of a part of the rows, state after the part).

    `state` is the state before the part, None at the beginning of the rows.
    """
    x, state = part_features(model, part, state)
    return model.log_probs(x, part["targets"]), state


def part_features(model: RWKV, part: dict, state: State | None) -> tuple[Tensor, State]:
    """Return the head's input for the part's trained tokens, and the state after the part."""
    return model.features(part["ids"], state, part["reset"], part["where"])


def after_prompts(model: RWKV, batch: dict) -> State:
    """Compute the state before each row of a batch with "prompts": the state after its prompt."""
    prompts, of = batch["prompts"], batch["prompt_of"]
    nothing = of.new_empty(0)  # no output is wanted, and the last layer computes none
    _, state = model.features(prompts, None, batch["prompt_reset"], nothing)
    return [LayerState(*(t.index_select(0, of) for t in layer)) for layer in state]
