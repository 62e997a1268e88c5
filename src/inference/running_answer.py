"""Running answer, which has a row of a decoder: its text, its random numbers, states to go back to."""

from __future__ import annotations

import torch

from ..data.tokenizer import Tokenizer
from ..model import State
from .answer_text import AnswerText
from .logit_changes import NO_CHANGES, ChangedLogits
from .request import Answer
from .row_decoder import RowDecoder
from .sampling import Drawn, FadedCounts, RowInputs


class RunningAnswer:
    """Answer that has a row. The row's state has read the prompt and all its tokens but the last one.

    Answer.state must have read exactly the prompt and the text. The row's own state goes beyond that if a
    stop or half a character is cut off, so it is copied where one may have begun: `states`, characters of the
    text -> (tokens read, the state after them).
    """

    def __init__(self, answer: Answer, tokenizer: Tokenizer):
        request = answer.request
        self.answer, self.tokenizer = answer, tokenizer
        constraint = request.form.start(request.stops) if request.form else None
        changes, changed = request.changes, None
        self.text = AnswerText(tokenizer, request.stops, constraint, changes.min_tokens)
        answer.tokens = self.text.tokens
        if changes != NO_CHANGES:
            sizes = tokenizer.vocab_size, tokenizer.eod
            changed = ChangedLogits(changes, request.tokens, answer.tokens, *sizes)
        seen = FadedCounts(request.sampling)
        self.drawing = RowInputs(
            request.sampling, seen, answer.generator(), request.logprobs, constraint, changed
        )
        self.keeps_state = request.keep_state or request.continues
        self.states: dict[int, tuple[int, State]] = {}
        self.read: list[int] = []  # the tokens of the answer that the final state has read

    def take(self, drawn: Drawn, decoder: RowDecoder, row: int) -> None:
        """Take the next token. Raises UserError for one that the tokenizer has no text for."""
        answer, text, request = self.answer, self.text, self.answer.request
        if drawn.error:
            raise drawn.error
        if text.constraint and text.constraint.exhausted:
            return self._give_up()
        self.drawing.seen.add(drawn.token)
        if request.logprobs is not None:
            answer.logprobs.append(drawn)
        # the number of characters that the row's state has read, if it has read whole ones
        characters = text.length if text.is_whole else None
        text.push(drawn.token)
        if text.ended:
            answer.finish, answer.stop = "stop", text.stop
        elif len(text.tokens) >= request.max_tokens or text.length > request.characters:
            answer.finish = "length"
            text.close()
        answer.text = text.shown
        if not self.keeps_state:
            return
        if characters is not None and (answer.finish or text.held or not text.is_whole):
            self.states[characters] = len(text.tokens) - 1, decoder.take(row)
        if answer.finish:
            self._finish_state(decoder)
        else:
            self._forget_states()

    def _give_up(self) -> None:
        """End the answer without the token just drawn, and without its state."""
        self.text.close()
        self.answer.text, self.answer.finish = self.text.shown, "length"

    def _forget_states(self) -> None:
        """Drop the states that an answer of at least the text shown so far can't go back to."""
        text = self.text
        if text.is_whole and not text.held:
            self.states.clear()
        oldest = max((known for known in self.states if known <= len(text.shown)), default=0)
        self.states = {known: kept for known, kept in self.states.items() if known >= oldest}

    def _finish_state(self, decoder: RowDecoder) -> None:
        """Put the state that has read exactly the prompt and the text into the answer."""
        text = self.text
        characters = max(known for known in self.states if known <= len(text.shown))
        count, state = self.states[characters]
        if text.is_whole and not text.ended:
            rest = text.tokens[count:]
        else:  # the end cuts a token: the rest of the text has other tokens
            rest = self.tokenizer.encode(text.shown[characters:])
        if rest:
            ids = torch.tensor([rest], dtype=torch.int64)
            _, state = decoder.read(ids, state, self.answer.request.applied)
        self.read, self.answer.state = [*text.tokens[:count], *rest], state
