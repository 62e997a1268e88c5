"""What the engine asks of a decoder. cpu_decoder.py, cuda_graph.py and torch_decoder.py have one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..model import RWKV, State
from .adapters import BASE, Adapters, Applied


class RowDecoder(Protocol):
    """The states of `rows` rows, and the next tokens of all of them together.

    Logits may be those of a model that overflows: whoever chooses a token looks.
    """

    model: RWKV
    adapters: Adapters | None  # what requests choose from
    rows: int

    def read(self, ids: Tensor, state: State | None, applied: Applied = BASE) -> tuple[Tensor, State]:
        """ids (1, T) int64 -> logits (1, V) fp32 after the last token, and the state after it.

        The given state stays as it is; None is the one that the model's documents start from.
        """

    def read_together(self, ids: Tensor, reset: Tensor | None) -> tuple[Tensor, State]:
        """P prompts of BASE, ids (P, T) int64, T >= 2 -> logits (P, V) fp32 after the last tokens, and the
        states after them, of P rows.

        Shorter ones are padded on the left. `reset` (P, T) bool is true where they begin, which is before
        their last token; None where none is shorter.
        """

    def state_after(self, ids: Tensor, state: State | None, applied: Applied = BASE) -> State:
        """As read(), where no logits are wanted: of a chunk that others follow."""

    def put(self, row: int, state: State) -> None:
        """Copy a state of one row into `row`."""

    def take(self, row: int) -> State:
        """A copy of a row's state."""

    def move(self, source: int, target: int) -> None:
        """Put the state of row `source` into row `target` too."""

    def step(self, tokens: Sequence[int], applied: Sequence[Applied]) -> Tensor:
        """The next token of rows 0 ... B - 1 -> logits (B, V) fp32; their states move on in place."""

    def refresh(self) -> None:
        """Take over what changed of the model or its adapters."""

    def close(self) -> None:
        """Free what is held: threads, graphs."""
