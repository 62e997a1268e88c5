"""Answers to many requests at once: rows of states, which requests take and leave between any two tokens.

A request waits, then its prompt is read, in chunks, and each of its answers takes a row of the decoder. With
every step() all rows get one token more. The weights are read once for all of them, and a row costs little
beside the first. What an answer says does not depend on who else has a row: a prompt is read alone and its
chunks end at multiples of `chunk`, a row's logits are its own, and its random numbers come of its own seed.

Nothing here looks at a clock. So processes that call step() alike stay together, as ZeRO-3 needs it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..model import State
from ..ops.native import nan_passes
from .adapters import BASE, Applied
from .answer_text import AnswerText
from .prefix_cache import PrefixCache
from .sampling import GREEDY, Drawn, FadedCounts, Row, Sampling, choose

Finish = Literal["", "stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be answered, and how."""

    tokens: Sequence[int]  # the prompt's, its leading token included; at least one
    max_tokens: int = 512
    sampling: Sampling = GREEDY
    seed: int = 0  # answer i of n draws its own random numbers, which (seed, i) alone decides
    stops: Sequence[str] = ()
    applied: Applied = BASE
    start: State | None = None  # the state before the prompt; None: the adapter's, or the model's own
    n: int = 1  # answers of this prompt, which is read once
    logprobs: int | None = None  # k: ln p of each token, and the k likeliest with theirs
    keep_state: bool = False  # whether Answer.state is wanted
    characters: float = math.inf  # an answer ends as soon as it has more


@dataclasses.dataclass(eq=False)
class Answer:
    """One of a request's answers, which grows with the steps of the engine until it has a `finish`."""

    request: Request
    index: int
    # what was drawn, also an end of document, and what a stop cut off
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # whole characters; what may be the beginning of a stop comes when it is known to be none
    finish: Finish = ""  # stop: end of document or a text of stops; length: max_tokens or characters
    error: UserError | None = None
    # of each token, where the request asks for it: see sampling.py
    logprobs: list[Drawn] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, whose state was at hand
    state: State | None = None  # with keep_state, at the end: it has read exactly the prompt and the text

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)


class _Prompt:
    """A prompt that is being read, and its answers that have no row yet."""

    def __init__(self, request: Request):
        self.request = request
        self.answers = collections.deque(Answer(request, i) for i in range(request.n))
        self.read = 0  # tokens
        self.state: State | None = None
        self.logits: Tensor | None = None  # (1, V) after the tokens read

    @property
    def is_read(self) -> bool:
        return self.read == len(self.request.tokens)


class _Running:
    """An answer that has a row of the decoder. The row's state has read all tokens but the last one."""

    def __init__(self, answer: Answer, tokenizer):
        request = answer.request
        self.answer, self.text = answer, AnswerText(tokenizer, request.stops)
        answer.tokens = self.text.tokens
        generator = torch.Generator().manual_seed(seed_of(request.seed, answer.index))
        self.drawing = Row(request.sampling, FadedCounts(request.sampling), generator, request.logprobs)
        # with keep_state, what the end may go back to: characters -> (tokens that were read, the state)
        self.states: dict[int, tuple[int, State]] = {}

    def forget_states(self) -> None:
        """Drop the states that an answer of at least the text shown so far does not go back to."""
        text = self.text
        if text.is_whole and not text.held:
            self.states.clear()
        oldest = max((known for known in self.states if known <= len(text.shown)), default=0)
        self.states = {known: kept for known, kept in self.states.items() if known >= oldest}


def seed_of(seed: int, index: int) -> int:
    """The seed of answer `index` to a request with this seed."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)[0])


class Engine:
    """Requests in, answers out, over the rows of a decoder (decoders.py).

    `chunk`: tokens of a prompt that are read at once. `reads_first`: a step reads prompts until all rows are
    taken, which answers most in a given time; else it reads at most one chunk, and nobody waits longer than
    that for the next token. `cache_bytes` are for states of prompts (prefix_cache.py).
    """

    def __init__(self, decoder, tokenizer, chunk: int = 256, reads_first: bool = True, cache_bytes: int = 0):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.chunk, self.reads_first = chunk, reads_first
        self.cache = PrefixCache(cache_bytes)
        self.prompts: collections.deque[_Prompt] = collections.deque()
        self.rows: list[_Running] = []  # row 0, 1, ... of the decoder

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return sum(len(prompt.answers) for prompt in self.prompts)

    @property
    def running(self) -> int:
        """Answers that have a row."""
        return len(self.rows)

    @property
    def idle(self) -> bool:
        return not self.rows and not self.prompts

    def submit(self, request: Request) -> list[Answer]:
        """The answers, empty so far. UserError for a request that can't be answered."""
        self._check(request)
        prompt = _Prompt(request)
        self.prompts.append(prompt)
        return list(prompt.answers)

    def cancel(self, answer: Answer) -> None:
        """End an answer, wherever it is: its row is free at once. One that is complete stays as it is."""
        if answer.finish:
            return
        answer.finish = "cancelled"
        self._leave([row for row, running in enumerate(self.rows) if running.answer is answer])
        for prompt in [prompt for prompt in self.prompts if answer in prompt.answers]:
            prompt.answers.remove(answer)
            if not prompt.answers:
                self.prompts.remove(prompt)

    def refresh(self) -> None:
        """Take over what changed of the model or its adapters, and forget what was read before."""
        self.decoder.refresh()
        self.cache.clear()

    def step(self) -> list[Answer]:
        """One turn: a token for every row, then prompts are read, as reads_first has it, into rows that are
        free. Returns the answers that changed.
        """
        with nan_passes():  # choose() names a model that overflows, by its logits
            changed = {id(answer): answer for answer in self._next_tokens()}
            while self.prompts and len(self.rows) < self.decoder.rows:
                for answer in self._read_chunk(self.prompts[0]):
                    changed[id(answer)] = answer
                if not self.reads_first:
                    break
        return list(changed.values())

    def run(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """The answers to each request as soon as all n are complete, whatever the order.

        Requests are taken as rows get free. UserError for one that can't be answered; it ends the others.
        """
        coming, open_ones = iter(requests), {}
        more = True
        try:
            while True:
                while more and self.waiting < self.decoder.rows - self.running:
                    if (request := next(coming, None)) is None:
                        more = False
                        break
                    answers = self.submit(request)
                    open_ones[id(answers[0].request)] = answers
                if not open_ones:
                    return
                for answer in self.step():
                    key = id(answer.request)
                    if key in open_ones and all(one.finish for one in open_ones[key]):
                        yield open_ones.pop(key)
        finally:
            for answers in open_ones.values():
                for answer in answers:
                    self.cancel(answer)

    def _check(self, request: Request) -> None:
        request.sampling.check()
        vocab, tokens = self.decoder.model.arch.vocab_size, request.tokens
        if not len(tokens):
            raise UserError("the prompt has no token; give some text, or a leading token")
        if outside := [token for token in tokens if not 0 <= token < vocab]:
            raise UserError(f"token {outside[0]} is not in the vocabulary of {vocab:,} tokens")
        for name, least in (("max_tokens", 1), ("n", 1)):
            if getattr(request, name) < least:
                raise UserError(f"{name} {getattr(request, name)}: expected {least} or more")
        if "" in request.stops:
            raise UserError("a stop is empty; give a text that ends answers, or none")
        if request.applied != BASE:
            if self.decoder.adapters is None:
                raise UserError(f"adapter {'+'.join(request.applied.names)}: no adapter was loaded")
            self.decoder.adapters.check(request.applied)

    def _read_chunk(self, prompt: _Prompt) -> list[Answer]:
        """Read a chunk of a prompt; after the last one its answers get rows. Returns those that changed."""
        try:
            if not prompt.is_read:
                self._read(prompt)
        except UserError as error:
            return self._fail(prompt, error)
        if not prompt.is_read:
            return []
        changed = []
        while prompt.answers and len(self.rows) < self.decoder.rows:
            changed.append(self._seat(prompt))
            prompt.answers.popleft()
        if not prompt.answers:
            self.prompts.remove(prompt)
        return changed

    def _read(self, prompt: _Prompt) -> None:
        request, length = prompt.request, len(prompt.request.tokens)
        of_request = request.applied, request.start, request.tokens
        if not prompt.read:
            lengths = [*range(self.chunk, length, self.chunk), length] if self.cache.limit else []
            read, found = self.cache.longest(*of_request, lengths)
            if found is not None:
                prompt.read, prompt.state, prompt.logits = read, found.state, found.logits
                for answer in prompt.answers:
                    answer.cached_tokens = read
                if prompt.is_read:
                    return
            else:
                prompt.state = self._start(request)
        end = min(length, prompt.read + self.chunk)
        ids = torch.tensor([list(request.tokens[prompt.read : end])], dtype=torch.int64)
        prompt.logits, prompt.state = self.decoder.read(ids, prompt.state, request.applied)
        prompt.read = end
        if self.cache.limit:
            self.cache.add(*of_request[:2], request.tokens[:end], prompt.state, prompt.logits)

    def _start(self, request: Request) -> State | None:
        """The state before the prompt; None: the model's own."""
        if request.start is not None or self.decoder.adapters is None:
            return request.start
        return self.decoder.adapters.start(request.applied)

    def _fail(self, prompt: _Prompt, error: UserError) -> list[Answer]:
        self.prompts.remove(prompt)
        for answer in prompt.answers:
            answer.finish, answer.error = "error", error
        return list(prompt.answers)

    def _seat(self, prompt: _Prompt) -> Answer:
        """Give the prompt's first answer the next row, and draw its first token."""
        running = _Running(prompt.answers[0], self.tokenizer)
        self.rows.append(running)
        self.decoder.put(len(self.rows) - 1, prompt.state)
        self._take_tokens([len(self.rows) - 1], prompt.logits)
        return running.answer

    def _next_tokens(self) -> list[Answer]:
        """A token for every row."""
        answers = [running.answer for running in self.rows]
        if answers:
            tokens = [answer.tokens[-1] for answer in answers]
            try:
                logits = self.decoder.step(tokens, [answer.request.applied for answer in answers])
            except UserError as error:
                for answer in answers:
                    answer.finish, answer.error = "error", error
                self._leave(range(len(answers)))
            else:
                self._take_tokens(range(len(answers)), logits)
        return answers

    def _take_tokens(self, rows: Sequence[int], logits: Tensor) -> None:
        """Draw a token for each of these rows from its logits; whoever is complete leaves."""
        # a padded model has ids that no text stands for
        logits = logits[:, : self.tokenizer.vocab_size]
        drawn = choose(logits, [self.rows[row].drawing for row in rows])
        for row, one in zip(rows, drawn, strict=True):
            self._take_token(row, one)
        self._leave([row for row in rows if self.rows[row].answer.finish])

    def _take_token(self, row: int, drawn: Drawn) -> None:
        running = self.rows[row]
        answer, text, request = running.answer, running.text, running.answer.request
        if drawn.error:
            answer.finish, answer.error = "error", drawn.error
            return
        running.drawing.seen.add(drawn.token)
        if request.logprobs is not None:
            answer.logprobs.append(drawn)
        # where the row's state is in the text, if it has read whole characters
        read = (text.length, len(text.tokens)) if text.is_whole else None
        text.push(drawn.token)
        if text.ended:
            answer.finish = "stop"
        elif len(text.tokens) >= request.max_tokens or text.length > request.characters:
            answer.finish = "length"
            text.close()
        answer.text = text.shown
        if request.keep_state:
            if read is not None and (answer.finish or text.held or not text.is_whole):
                running.states[read[0]] = read[1], self.decoder.take(row)
            if answer.finish:
                self._finish_state(running)
            else:
                running.forget_states()

    def _finish_state(self, running: _Running) -> None:
        """Put the state that has read exactly the prompt and the text into the answer."""
        answer, text = running.answer, running.text
        characters = max(known for known in running.states if known <= len(text.shown))
        tokens, answer.state = running.states[characters]
        if text.is_whole and not text.ended:
            rest = text.tokens[tokens:]
        else:  # a token that the end cuts was read, or is not to be: what is left of it has others
            rest = self.tokenizer.encode(text.shown[characters:])
        if rest:
            ids = torch.tensor([rest], dtype=torch.int64)
            answer.state = self.decoder.read(ids, answer.state, answer.request.applied)[1]

    def _leave(self, rows: Iterable[int]) -> None:
        """Free rows. The last ones move into their places, so that rows 0 to B - 1 are in use."""
        for row in sorted(rows, reverse=True):
            last = len(self.rows) - 1
            if row < last:
                self.decoder.move(last, row)
                self.rows[row] = self.rows[last]
            self.rows.pop()
