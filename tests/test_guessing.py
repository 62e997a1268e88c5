"""A loss worse than guessing is told once, for a base that was trained; tests/test_data.py has the run."""

import math

from src.guessing import MARGIN, worse_than_guessing
from src.tokenizer import load_tokenizer


def test_worse_than_guessing_over_the_tokenizers_ids():
    tokenizer = load_tokenizer("bytes", 65536)
    assert worse_than_guessing(math.log(256) + MARGIN, tokenizer) is None
    assert worse_than_guessing(10.41, tokenizer) == (
        "WARNING: the loss is 10.41, worse than guessing: any of the tokenizer's 256 ids alike gives 5.55.\n"
        "Was the model trained with another tokenizer than bytes (--tokenizer)? Is it the right model (--load_model)?")
