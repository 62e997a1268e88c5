"""Conversation: its turns, and the model's state after them."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import NamedTuple

import torch

from rwkv_miss.errors import UserError

from ..data.bos import with_bos
from ..data.chat_template import Template
from ..data.rwkv_template import DEFAULT, RwkvTemplate
from ..data.tokenizer import Tokenizer
from ..model import State
from .engine import Answer, Engine, Request
from .generate import stream
from .sampling import Sampling


class Turn(NamedTuple):
    """Turn of a user, or results of tools, with the answer."""

    messages: list[dict]
    pieces: list[str]  # the model's input for the turn, each piece tokenised on its own
    # whether the pieces are the conversation from its beginning: for the first turn, and if a template
    # rewrote the conversation
    whole: bool


class Conversation:
    """Chat whose state is kept between turns, so that every turn costs only its own tokens.

    `state` is the state after the first `read` of the `turns`. The other turns are read before the next
    answer. `bos` are the ids that it begins with. `generator` gives every answer its seed.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        template: Template = DEFAULT,
        system: str = "",
        bos: tuple[int, ...] = (),
    ):
        self.engine, self.sampling, self.template = engine, sampling, template
        self.system, self.bos = system, bos
        self.generator = torch.Generator().manual_seed(0)
        self.tools: list[dict] = []
        self.reset()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def reset(self) -> None:
        """Start again without turns; only the random numbers go on."""
        self.turns: list[Turn] = []
        self.last_template = self.template  # the template of the last turn
        self.read_again()

    def read_again(self) -> None:
        """Forget the state, because the model's weights changed: the next answer reads all turns again."""
        self.state: State | None = None
        self.read = 0
        self.earlier: tuple[State | None, int] = None, 0  # `state` and `read` before the last answer

    def use_tools(self, tools: list[dict]) -> None:
        """Start again with these tools. Raises UserError for tools that the template can't write."""
        if tools:
            self.template.segments([{"role": "user", "content": "?"}], tools)
        self.tools = tools
        self.reset()

    @property
    def calls(self) -> list[dict]:
        """Return the tool calls of the last answer, as in OpenAI's API."""
        return self.turns[-1].messages[-1].get("tool_calls", []) if self.turns else []

    @property
    def messages(self) -> list[dict]:
        """The conversation so far, as {"role", "content"}, with "tool_calls" in answers that have some."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + [message for turn in self.turns for message in turn.messages]

    def undo(self) -> None:
        """Take back the last turn. Raises UserError if there is none."""
        if not self.turns:
            raise UserError("there is no turn to take back")
        self.turns.pop()
        if self.read > len(self.turns):
            self.state, self.read = self.earlier
            self.earlier = None, 0

    def twin(self, seed: int) -> Conversation:
        """Return a copy of the conversation with its own random numbers. Turns of the copy are not turns
        of the original."""
        other = copy.copy(self)
        other.turns, other.generator = list(self.turns), torch.Generator().manual_seed(seed)
        return other

    def unread(self) -> tuple[State | None, list[str]]:
        """Return (the state to go on from, the pieces of the turns that it does not hold)."""
        first = max((i for i, turn in enumerate(self.turns) if turn.whole), default=0)
        state, start = (self.state, self.read) if self.read > first else (None, first)
        return state, [piece for turn in self.turns[start:] for piece in turn.pieces]

    def answer(self, new: str | list[dict], max_tokens: int = 512) -> Generator[str, None, None]:
        """Yield the model's answer, in pieces, to a user's words or to messages of the roles user and tool.

        If it is interrupted or closed, the text so far is the answer.
        """
        new = [{"role": "user", "content": new}] if isinstance(new, str) else new
        goes_on = self.turns and turns_alike(self.template, self.last_template)
        pieces = self.template.next_turn(self.messages, new, self.tools) if goes_on else None
        whole = pieces is None
        before, unread = (None, []) if whole else self.unread()
        if whole:
            pieces = self._anew(new)
        ids = [token for piece in [*unread, *pieces] for token in self.tokenizer.encode(piece)]
        if before is None:
            ids = with_bos(ids, self.bos)
        parts: list[str] = []
        request = Request(
            ids,
            max_tokens,
            self.sampling,
            seed=int(torch.randint(2**63 - 1, (), generator=self.generator)),
            stops=self.template.stops,
            start=before,
            keep_state=True,
        )
        try:
            answer = yield from _noted(stream(self.engine, request), parts)
        except (KeyboardInterrupt, GeneratorExit):
            if parts:
                self._add(new, pieces, whole, "".join(parts))
            raise
        self._add(new, pieces, whole, answer.text)
        self.earlier = self.state, self.read
        self.state, self.read = answer.state, len(self.turns)

    def _anew(self, new: list[dict]) -> list[str]:
        """Write the pieces of the whole conversation. Raises UserError for turns without a form."""
        try:
            segments = self.template.segments([*self.messages, *new], self.tools, ask=True)
            return [piece for piece, _ in segments]
        except UserError as error:
            if not self.turns:
                raise
            raise UserError(
                f"the turns so far can't be written in template {self.template.name}: {error}. Take back the"
                " turn that it is about, begin a new conversation, or choose the earlier template"
            ) from None

    def _add(self, new: list[dict], pieces: list[str], whole: bool, said: str) -> None:
        text = (self.template.opening + said).strip()
        content, calls = self.template.parse(text) if self.tools else (text, [])
        message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
        self.turns.append(Turn([*new, message], [*pieces, said], whole))
        self.last_template = self.template


def turns_alike(one: Template, other: Template) -> bool:
    """Tell whether both write turns in the same form, so that one can go on after the other."""
    forms = [
        template.form if isinstance(template, RwkvTemplate) else template.record for template in (one, other)
    ]
    return forms[0] == forms[1]


def _noted(pieces: Generator[str, None, Answer], into: list[str]) -> Generator[str, None, Answer]:
    """Yield the same pieces and return the same value, with a copy of each piece."""
    while True:
        try:
            into.append(next(pieces))
        except StopIteration as end:
            return end.value
        yield into[-1]
