"""A loss worse than guessing is told once, for a base that was trained; tests/test_data.py has the run."""

import math

import pytest

from src.data.tokenizer import load_tokenizer
from src.evaluation.guessing import ENOUGH, MARGIN, doubt_of_answers, doubt_of_text, worse_than_guessing
from src.model import RWKV


def test_worse_than_guessing_over_the_tokenizers_ids():
    tokenizer = load_tokenizer("bytes", 65536)
    assert worse_than_guessing(math.log(256) + MARGIN, tokenizer) is None
    assert (
        worse_than_guessing(10.41, tokenizer)
        == "WARNING: the loss is 10.41, worse than guessing: any of the tokenizer's 256 ids alike gives"
        " 5.55.\n"
        "Was the model trained with another tokenizer than bytes (--tokenizer)? Is it the right model? If it"
        " knows one task only, as the demo's does, this is usual with other data."
    )


@pytest.mark.parametrize("scale,doubted", [(0.1, False), (30.0, True)])
def test_texts_and_answers_that_are_long_enough_tell(checkpoint, scale, doubted):
    """A model that is sure of the wrong token, and one that is sure of none."""
    model, tokenizer = RWKV.load(checkpoint(7, vocab_size=256)), load_tokenizer("bytes", 256)
    model.head.weight.data *= scale
    ids = tokenizer.encode("What does a model say that knows nothing of it?")
    assert bool(doubt_of_text(model, tokenizer, ids)) == doubted
    assert doubt_of_text(model, tokenizer, ids[: ENOUGH - 1]) is None
    assert bool(doubt_of_answers(model, tokenizer, [(ids, ids), (ids, ids[:3])])) == doubted
    assert doubt_of_answers(model, tokenizer, [(ids, ids[:3])]) is None
