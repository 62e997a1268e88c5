"""Engines for tests of answers: of real models, and of a stand-in that says what it is told."""

import types

import torch

from src.inference.adapters import BASE
from src.inference.engine import Engine, Request
from src.inference.generate import stream
from src.inference.torch_decoder import TorchDecoder


class Scripted:
    """Stands in for a decoder of one row: says the given tokens one after another. Its state is the list of
    all tokens it was fed.
    """

    rows, adapters = 1, None

    def __init__(self, tokenizer, tokens=()):
        self.size, self.tokens = tokenizer.vocab_size, iter(tokens)
        self.model = types.SimpleNamespace(
            kernel="torch", arch=types.SimpleNamespace(vocab_size=tokenizer.vocab_size)
        )

    def logits(self):
        """Return the logits of the next token."""
        logits = torch.zeros(1, self.size + 1)
        logits[:, next(self.tokens, 0)] = 1
        logits[:, self.size] = 2  # an id of a padded model, for which there is no text
        return logits

    def read(self, ids, state, applied=BASE):
        return self.logits(), [*(state or []), *ids[0].tolist()]

    def state_after(self, ids, state, applied=BASE):
        return [*(state or []), *ids[0].tolist()]

    def put(self, row, state):
        self.state = list(state)

    def take(self, row):
        return list(self.state)

    def step(self, tokens, applied):
        self.state += tokens
        return self.logits()

    def refresh(self):
        pass


def scripted(tokenizer, tokens=()):
    return Engine(Scripted(tokenizer, tokens), tokenizer, chunk=10**6)


def engine_of(model, tokenizer, adapters=None):
    return Engine(TorchDecoder(model, 1, adapters), tokenizer, chunk=1024)


def run(generator):
    """(pieces, return value) of a generator."""
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


def greedy_text(engine, text, max_tokens, **request):
    """A greedy answer to a text."""
    return "".join(stream(engine, Request(engine.tokenizer.encode(text), max_tokens, **request)))
