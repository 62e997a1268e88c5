"""A model that knows less of a text than a guess over the tokenizer's ids: most often the tokenizer is another one than it was trained with."""

from __future__ import annotations

import math

from .tokenizer import Tokenizer

MARGIN = 0.5  # nats


def worse_than_guessing(loss: float, tokenizer: Tokenizer) -> str | None:
    """The warning about a loss (nats a token) of a trained model that is above guessing, ln(vocabulary), by more than MARGIN; else None."""
    guess = math.log(tokenizer.vocab_size)
    if loss <= guess + MARGIN:
        return None
    return (f"WARNING: the loss is {loss:.2f}, worse than guessing: any of the tokenizer's {tokenizer.vocab_size:,} ids alike gives {guess:.2f}.\n"
            f"Was the model trained with another tokenizer than {tokenizer.name} (--tokenizer)? Is it the right model (--load_model)?")
