"""Interface of a decoder for the engine. cpu_decoder.py, cuda_graph.py and torch_decoder.py have one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..model import RWKV, State
from .adapters import BASE, Adapters, Applied
from .prompt_logprobs import EachLogits


class RowDecoder(Protocol):
    """Decoder with the states of `rows` rows, which computes the next tokens of all of them together.

    Logits may not be finite, if the model overflows: the choice of a token checks that. `each`, if given,
    gets the other logits in order, (n, V) in at least fp32 of some tokens at a time. States may be more exact
    then.
    """

    model: RWKV
    adapters: Adapters | None  # adapters that requests choose from
    rows: int

    def read(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> tuple[Tensor, State]:
        """Read ids (1, T) int64: logits (1, V) fp32 after the last token, and the state after it.

        The given state stays as it is; None is the one that the model's documents start from.
        """

    def read_together(self, ids: Tensor, reset: Tensor | None) -> tuple[Tensor, State]:
        """Read P prompts of BASE, ids (P, T) int64, T >= 2: logits (P, V) fp32 after the last tokens, and the
        states after them, of P rows.

        Shorter ones are padded on the left. `reset` (P, T) bool is true where they begin, which is before
        their last token; None if none is shorter.
        """

    def state_after(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> State:
        """Read a chunk that others follow, as read() does but without logits, except for `each`."""

    def put(self, row: int, state: State) -> None:
        """Copy a state of one row into `row`."""

    def take(self, row: int) -> State:
        """Copy a row's state."""

    def move(self, source: int, target: int) -> None:
        """Put the state of row `source` into row `target` too."""

    def step(self, tokens: Sequence[int], applied: Sequence[Applied]) -> Tensor:
        """Run the next token of rows 0 ... B - 1: logits (B, V) fp32; their states change in place."""

    def refresh(self) -> None:
        """Take over changes of the model or its adapters."""

    def close(self) -> None:
        """Free the held resources: threads, graphs."""
