"""Engine for many requests at once: rows of states, which requests take and leave between any two tokens.

A request waits, then its prompt is read, in chunks, and each of its answers takes a row of the decoder. With
every step() all rows get one token more. The weights are read once for all of them, and each row after the
first costs little. An answer does not depend on the other rows: a prompt is read alone and its chunks end at
multiples of `chunk`, a row's logits are its own, and its random numbers come from its own seed. (Many short
prompts may be read faster as one batch: see `together`.)

Nothing here reads a clock. So processes that call step() alike stay together, as ZeRO-3 needs it. Only
forms have a deadline (constraint.py): they are for the server, which is one process.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.mapped import check_mapped

from ..data.collate import padded_left
from ..data.tokenizer import Tokenizer
from ..model import LayerState, State
from ..ops.native import nan_passes
from .adapters import BASE
from .prefix_cache import PrefixCache, StateKind
from .prompt_logprobs import PromptLogprobs
from .request import Answer, Request
from .row_decoder import RowDecoder
from .running_answer import RunningAnswer
from .sampling import choose, runs_native


class _Prompt:
    """Prompt that is being read, and its answers that have no row yet."""

    def __init__(self, request: Request, vocab_size: int):
        self.request = request
        self.answers = collections.deque(Answer(request, i) for i in range(request.n))
        self.kind = StateKind(request.applied, request.start)
        self.read = 0  # tokens that were read
        self.state: State | None = None
        self.logits: Tensor | None = None  # (1, V), once all is read
        self.logprobs: PromptLogprobs | None = None  # if asked for
        if (count := request.prompt_logprobs) is not None:
            self.logprobs = PromptLogprobs(request.tokens, count, vocab_size)
            for answer in self.answers:
                answer.prompt_logprobs = self.logprobs.scores

    @property
    def is_read(self) -> bool:
        return self.read == len(self.request.tokens)


class Engine:
    """Engine over the rows of a decoder (row_decoder.py).

    `chunk`: tokens of a prompt that are read at once. `reads_first`: a step reads prompts until all rows are
    taken, which answers most in a given time; else it reads at most one chunk, of one prompt after the other,
    and nobody waits longer than that for the next token. `cache_bytes` are for states of prompts
    (prefix_cache.py). `together`: the most tokens, with padding, of waiting prompts that are read as one
    batch, if rows are free for their answers. The last bits of their states then depend on which ones are
    read together. It has no use with a cache.
    """

    def __init__(
        self,
        decoder: RowDecoder,
        tokenizer: Tokenizer,
        chunk: int = 256,
        reads_first: bool = True,
        cache_bytes: int = 0,
        together: int = 0,
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.native_code = runs_native(decoder.model.kernel)  # for choosing tokens
        self.chunk, self.reads_first, self.together = chunk, reads_first, together
        self.cache = PrefixCache(cache_bytes)
        self.prompts: collections.deque[_Prompt] = collections.deque()
        self.rows: list[RunningAnswer] = []  # row 0, 1, ... of the decoder

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
        """Queue a request and return its answers, empty so far. Raises UserError for an impossible one."""
        self._check(request)
        prompt = _Prompt(request, self.tokenizer.vocab_size)
        self.prompts.append(prompt)
        return list(prompt.answers)

    def cancel(self, answer: Answer) -> None:
        """End an answer, wherever it is: its row is free at once. A complete one stays as it is."""
        if answer.finish:
            return
        answer.finish = "cancelled"
        self._leave([row for row, running in enumerate(self.rows) if running.answer is answer])
        for prompt in [prompt for prompt in self.prompts if answer in prompt.answers]:
            prompt.answers.remove(answer)
            if not prompt.answers:
                self.prompts.remove(prompt)

    def refresh(self) -> None:
        """Take over changes of the model or its adapters, and forget prompts that were read before."""
        self.decoder.refresh()
        self.cache.clear()

    def reset(self) -> None:
        """Drop all requests, as after a step that failed: nothing that it left half done is used again."""
        self.prompts.clear()
        self.rows.clear()
        self.refresh()

    def step(self) -> list[Answer]:
        """Run a token for every row, then read prompts into free rows, by reads_first.

        Returns the answers that changed. Raises ChangedFile if the model's file was overwritten.
        """
        check_mapped()
        with nan_passes():  # choose() reports NaN in the logits, and names the model
            changed = {id(answer): answer for answer in self._next_tokens()}
            while self.prompts and len(self.rows) < self.decoder.rows:
                self._read_together()
                prompt = self.prompts[0]
                for answer in self._read_chunk(prompt):
                    changed[id(answer)] = answer
                if not self.reads_first:
                    self._pass_on(prompt)
                    break
        return list(changed.values())

    def run(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """Yield the answers to each request as soon as all n are complete, in any order.

        Requests are taken as rows become free. Raises UserError for an impossible one, which ends the others.
        """
        coming, unfinished = iter(requests), {}  # id of an answer -> all that its request gets
        more = True
        try:
            while True:
                while more and self.waiting < self.decoder.rows - self.running:
                    if (request := next(coming, None)) is None:
                        more = False
                        break
                    answers = self.submit(request)
                    unfinished.update({id(answer): answers for answer in answers})
                if not unfinished:
                    return
                for answer in self.step():
                    answers = unfinished.get(id(answer))
                    if answers and all(one.finish for one in answers):
                        for one in answers:
                            del unfinished[id(one)]
                        yield answers
        finally:
            for answer in [answer for answers in unfinished.values() for answer in answers]:
                self.cancel(answer)

    def _check(self, request: Request) -> None:
        request.check(self.decoder.model.arch.vocab_size)
        request.changes.check(self.tokenizer.vocab_size)
        if request.applied != BASE:
            if self.decoder.adapters is None:
                raise UserError(f"adapter {'+'.join(request.applied.names)}: no adapter was loaded")
            self.decoder.adapters.check(request.applied)

    def _read_chunk(self, prompt: _Prompt) -> list[Answer]:
        """Read a chunk of a prompt; after the last one its answers get rows. Returns the changed ones."""
        try:
            if not prompt.is_read:
                self._read(prompt)
        except UserError as error:
            return self._fail(prompt, error)
        if not prompt.is_read:
            return []
        if not prompt.request.max_tokens:
            return self._end(prompt)
        changed = []
        while prompt.answers and len(self.rows) < self.decoder.rows:
            changed += self._seat(prompt)
        if not prompt.answers:
            self.prompts.remove(prompt)
        return changed

    def _read_together(self) -> None:
        """Read the prompts at the front in one batch, if there are several."""
        batch, longest, free = [], 0, self.decoder.rows - len(self.rows)
        for prompt in self.prompts if self.together else ():
            request = prompt.request
            longest = max(longest, len(request.tokens))
            begun = prompt.read or len(request.tokens) < 2 or prompt.logprobs
            apart = begun or request.start is not None or request.applied != BASE
            if apart or free < 1 or (len(batch) + 1) * longest > self.together:
                break
            batch.append(prompt)
            free -= len(prompt.answers)
        if len(batch) < 2:
            return
        ids, reset = padded_left([prompt.request.tokens for prompt in batch])
        logits, state = self.decoder.read_together(ids, reset)
        for row, prompt in enumerate(batch):
            prompt.read, prompt.logits = len(prompt.request.tokens), logits[row : row + 1]
            prompt.state = [LayerState(*(part[row : row + 1] for part in layer)) for layer in state]

    def _pass_on(self, prompt: _Prompt) -> None:
        """Let another prompt read the next chunk, so that a short one does not wait for a long one's end.

        At most as many take turns as there are rows: each of them has a state.
        """
        if not prompt.is_read and prompt in self.prompts:
            self.prompts.remove(prompt)
            self.prompts.insert(self.decoder.rows - 1, prompt)

    def _read(self, prompt: _Prompt) -> None:
        tokens = prompt.request.tokens
        if not prompt.read:
            self._begin(prompt)
            if prompt.is_read:
                return
        end = min(len(tokens), (prompt.read // self.chunk + 1) * self.chunk)
        ids = torch.tensor([list(tokens[prompt.read : end])], dtype=torch.int64)
        arguments = [ids, prompt.state, prompt.request.applied]
        if prompt.logprobs:
            arguments.append(prompt.logprobs.add)
        if end == len(tokens) and not prompt.request.wants_state_alone:
            prompt.logits, prompt.state = self.decoder.read(*arguments)
        else:
            prompt.state = self.decoder.state_after(*arguments)
        prompt.read = end
        whole_state = end == len(tokens) and prompt.request.wants_state_alone  # no other prompt can use it
        # with log-probabilities a prompt's states may have other bits: see RowDecoder
        if self.cache.limit and not prompt.logprobs and not whole_state:
            self.cache.add(prompt.kind, tokens[:end], prompt.state, prompt.logits)

    def _begin(self, prompt: _Prompt) -> None:
        """Begin with the cache's longest state of the prompt, or with the state before it."""
        prompt.state = self._start(prompt.request)
        if not self.cache.limit or prompt.logprobs:
            return
        tokens, kinds = prompt.request.tokens, [prompt.kind]
        if prompt.request.continues:
            kinds.append(prompt.kind._replace(after_answer=True))
        lengths = [*range(self.chunk, len(tokens), self.chunk)]
        if not prompt.request.wants_state_alone:
            lengths.append(len(tokens))
        for kind in kinds:
            read, hit = self.cache.longest(kind, tokens, lengths)
            if read > prompt.read:
                prompt.kind, prompt.read, prompt.state, prompt.logits = kind, read, hit.state, hit.logits
        for answer in prompt.answers:
            answer.cached_tokens = prompt.read

    def _start(self, request: Request) -> State | None:
        """Return the state before the prompt; None: the model's own."""
        if request.start is not None or self.decoder.adapters is None:
            return request.start
        return self.decoder.adapters.start(request.applied)

    def _fail(self, prompt: _Prompt, error: UserError) -> list[Answer]:
        self.prompts.remove(prompt)
        for answer in prompt.answers:
            answer.finish, answer.error = "error", error
        return list(prompt.answers)

    def _end(self, prompt: _Prompt) -> list[Answer]:
        """End the answers without a token."""
        self.prompts.remove(prompt)
        for answer in prompt.answers:
            answer.finish = "length"
            answer.state = prompt.state if prompt.request.keep_state else None
        return list(prompt.answers)

    def _seat(self, prompt: _Prompt) -> list[Answer]:
        """Give the prompt's first answers the rows that are free, and draw their first tokens."""
        first = len(self.rows)
        rows = range(first, min(first + len(prompt.answers), self.decoder.rows))
        seated = [prompt.answers.popleft() for _ in rows]
        self.rows += [RunningAnswer(answer, self.tokenizer) for answer in seated]
        self.decoder.put(first, prompt.state)
        for row in rows[1:]:
            self.decoder.move(first, row)
        self._take_tokens(rows, prompt.logits.expand(len(rows), -1))
        return seated

    def _next_tokens(self) -> list[Answer]:
        """Run a token for every row."""
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
        """Draw a token for each of these rows from its logits; complete answers leave."""
        # a padded model has ids that no text stands for
        logits = logits[:, : self.tokenizer.vocab_size]
        drawn = choose(logits, [self.rows[row].drawing for row in rows], self.native_code)
        for row, one in zip(rows, drawn, strict=True):
            running = self.rows[row]
            answer = running.answer
            try:
                running.take(one, self.decoder, row)
            except UserError as error:
                answer.finish, answer.error = "error", error
            if answer.finish and answer.request.continues and answer.state is not None:
                self._keep(running)
        self._leave([row for row in rows if self.rows[row].answer.finish])

    def _keep(self, running: RunningAnswer) -> None:
        """Put the state after an answer into the cache, for the next turn of its conversation."""
        request = running.answer.request
        kind = StateKind(request.applied, request.start, after_answer=True)
        self.cache.add(kind, [*request.tokens, *running.read], running.answer.state, None)

    def _leave(self, rows: Iterable[int]) -> None:
        """Free rows. The last rows move into their places, so that rows 0 to B - 1 are in use."""
        for row in sorted(rows, reverse=True):
            last = len(self.rows) - 1
            if row < last:
                self.decoder.move(last, row)
                self.rows[row] = self.rows[last]
            self.rows.pop()
