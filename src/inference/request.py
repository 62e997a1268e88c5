"""Requests to the engine (engine.py), and its answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from rwkv_miss.errors import UserError

from ..model import State
from .adapters import BASE, Applied
from .constraint import AnswerForm
from .logit_changes import NO_CHANGES, LogitChanges
from .prompt_logprobs import ScoredToken
from .sampling import GREEDY, Drawn, Sampling

Finish = Literal["", "stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """Request to the engine."""

    tokens: Sequence[int]  # the prompt's, its BOS included; at least one
    max_tokens: int = 512  # 0: only the prompt is read
    sampling: Sampling = GREEDY
    seed: int = 0  # answer i of n draws its random numbers from (seed, i) alone
    stops: Sequence[str] = ()
    applied: Applied = BASE
    start: State | None = None  # the state before the prompt; None: the adapter's, or the model's own
    n: int = 1  # answers of this prompt, which is read once
    logprobs: int | None = None  # k: ln p of each token, and of the k likeliest
    prompt_logprobs: int | None = None  # k, as above, for the prompt: all its tokens are read then
    keep_state: bool = False  # whether Answer.state is needed
    characters: float = math.inf  # an answer ends as soon as it has more of them
    # The cache keeps the state after the answer for the next turn of its conversation, and this prompt may
    # begin with one of an earlier answer. Its last bits are those of single tokens, not of chunks.
    continues: bool = False
    form: AnswerForm | None = None  # the answers' form; stops count only where it may end
    # made on the logits before a token is drawn; stops count from its min_tokens on, unless there is a form
    changes: LogitChanges = NO_CHANGES

    @property
    def wants_state_alone(self) -> bool:
        """Tell whether only the state is wanted, for other requests, which read on as after any chunk."""
        return self.keep_state and not self.max_tokens

    def check(self, vocab_size: int) -> None:
        """Raise UserError for numbers that make no sense."""
        self.sampling.check()
        if not len(self.tokens):
            raise UserError("the prompt has no token; give some text, or a BOS")
        if outside := [token for token in self.tokens if not 0 <= token < vocab_size]:
            raise UserError(f"token {outside[0]} is not in the vocabulary of {vocab_size:,} tokens")
        for name, least in (("max_tokens", 0), ("n", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: expected {least} or more")
        if self.wants_state_alone and self.prompt_logprobs is not None:
            raise UserError("keep_state with max_tokens 0 gives a state alone; leave out prompt_logprobs")
        if "" in self.stops:
            raise UserError("a stop is empty; give a text that ends answers, or none")


@dataclasses.dataclass(eq=False)
class Answer:
    """Answer of a request, which grows with the steps of the engine until it has a `finish`."""

    request: Request
    index: int
    # drawn tokens, with an end of document, and with those that a stop cut off
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # whole characters, without a possible beginning of a stop
    # stop: end of document, a text of stops, a complete form; length: max_tokens, characters, or a form that
    # became too complex
    finish: Finish = ""
    stop: str = ""  # the text of stops that ended the answer
    error: UserError | None = None
    logprobs: list[Drawn] = dataclasses.field(default_factory=list)  # one for each token, if asked for
    # one for each of the prompt's tokens, if asked for: complete before the first token of the answer
    prompt_logprobs: Sequence[ScoredToken] = ()
    cached_tokens: int = 0  # tokens of the prompt whose state was cached
    state: State | None = None  # with keep_state, at the end: it has read exactly the prompt and the text

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)

    @property
    def cut(self) -> bool:
        """Tell whether it reached the limit of its length before its end."""
        return self.finish == "length"

    def generator(self) -> torch.Generator:
        """Make the random numbers of this answer, from the first one on."""
        seed = np.random.SeedSequence([self.request.seed % 2**64, self.index]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed[0]))
