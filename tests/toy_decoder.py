"""A decoder whose states are numbers: thousands of tokens in a second, for tests of the engine's order."""

import types

import torch

from rwkv_miss import UserError
from src.inference.adapters import BASE
from src.inference.sampling import FadedCounts, RowInputs, choose
from src.model import LayerState

STATES = 997  # a prime, so that every token leads somewhere else
OVERFLOWS = slice(13, 20)  # in these states the logits are not finite


class ToyAdapters:
    """An adapter moves the state by its scale; another one begins elsewhere."""

    def check(self, applied):
        if {*applied.names} - {"a", "b"}:
            raise UserError(f"there is no adapter {applied.names}")

    def start(self, applied):
        return toy_state(5) if "b" in applied.names else None


def toy_state(number):
    return [LayerState(*torch.tensor([[number]] * 3))]


def after(number, token, applied=BASE):
    """The state after a token."""
    return (number * 31 + token * 7 + 1 + int(applied.scale * 100) * len(applied.names)) % STATES


class Toy:
    """`table` (STATES, V) are the logits in each state."""

    def __init__(self, tokens, vocab_size, rows, overflows=True):
        generator = torch.Generator().manual_seed(0)
        self.rows, self.adapters = rows, ToyAdapters()
        self.model = types.SimpleNamespace(kernel="torch", arch=types.SimpleNamespace(vocab_size=vocab_size))
        self.table = torch.full((STATES, vocab_size), -torch.inf)
        self.table[:, tokens] = 2 * torch.randn(STATES, len(tokens), generator=generator)
        if overflows:
            self.table[OVERFLOWS] = torch.nan
        self.states = [0] * rows
        self.read_tokens = []  # tokens of each call

    def read(self, ids, state, applied=BASE):
        state = self.state_after(ids, state, applied)
        return self.table[int(state[0].att_x)][None], state

    def state_after(self, ids, state, applied=BASE):
        self.read_tokens.append(ids.shape[1])
        return toy_state(self._fed(int(state[0].att_x) if state else 0, ids[0].tolist(), applied))

    def put(self, row, state):
        self.states[row] = int(state[0].att_x)

    def take(self, row):
        return toy_state(self.states[row])

    def move(self, source, target):
        self.states[target] = self.states[source]

    def step(self, tokens, applied):
        for row, (token, one) in enumerate(zip(tokens, applied, strict=True)):
            self.states[row] = after(self.states[row], token, one)
        return self.table[self.states[: len(tokens)]]

    def refresh(self):
        pass

    def by_hand(self, answer, tokenizer):
        """(tokens, text, finish, state) of an answer's request, token by token, without the engine.

        The state is that of prompt and text; None where the text has no tokens of its own.
        """
        request, tokens, text, finish = answer.request, [], "", ""
        decoder = tokenizer.decoder()
        start = request.start or self.adapters.start(request.applied) or toy_state(0)
        first = number = self._fed(int(start[0].att_x), request.tokens, request.applied)
        row = RowInputs(request.sampling, FadedCounts(request.sampling), answer.generator(), request.logprobs)
        while not finish:
            drawn = choose(self.table[number][None, : tokenizer.vocab_size], [row], native_code=False)[0]
            if drawn.error:
                finish = "error"
                break
            tokens.append(drawn.token)
            row.seen.add(drawn.token)
            number = after(number, drawn.token, request.applied)
            size = len(tokenizer.eod)
            is_end = len(tokens) % size == 0 and tuple(tokens[-size:]) == tokenizer.eod
            text += "" if is_end else decoder.push(drawn.token)
            places = [text.find(stop) for stop in request.stops if stop in text]
            if is_end or places:
                text, finish = text[: min(places, default=len(text))], "stop"
            elif len(tokens) == request.max_tokens or len(text) > request.characters:
                finish = "length"
        if finish == "error" or "\ufffd" in text:
            return tokens, None if finish == "error" else text, finish, None
        return tokens, text, finish, self._fed(first, tokenizer.encode(text), request.applied)

    def _fed(self, number, tokens, applied):
        for token in tokens:
            number = after(number, token, applied)
        return number
