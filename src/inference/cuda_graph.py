"""GPU decoder with CUDA graphs: it records a token's launches once and replays them.

There is a graph for 1, 2, 4, ... rows. A token of a small model is hundreds of launches of a few
microseconds each. The CPU cannot launch them as fast as the GPU runs them. Prompts are read by the model.

A graph holds addresses: of the weights, of the rows' states, of the adapters that lie side by side
(adapter_stack.py) and of each row's shares of them. All but the weights are written to between two tokens, so
any mix of rows and adapters is the same graph. Not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import RWKV
from .adapter_stack import BASE, Applied, Mix, Owners, Stack, columns_of
from .adapters import Adapters
from .torch_decoder import TorchDecoder

# largest error, as a share of the largest logit; the graph has the same operations, but may add in another
# order
ALLOWED = 1e-2


class RowGraph(NamedTuple):
    """Graph of a token of some rows."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor  # (rows, V), where a replay writes them


class GraphedDecoder(TorchDecoder):
    """Decoder of a model on a GPU that replays a recorded graph for every token of its rows.

    The graph for twice as many rows is recorded when it is first needed; one that is too large serves too. So
    a step may spoil the states of rows B and beyond, until a state is put there. Rows with adapters have
    another graph, with room for those of adapters.stack. Raises RuntimeError if recording fails, or gives
    other logits than the model's.
    """

    def __init__(self, model: RWKV, rows: int, adapters: Adapters | None = None):
        super().__init__(model, rows, adapters)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.emb.weight.device)
        self._forget()

    def _forget(self) -> None:
        # held, so that no other tensor gets the address of one: refresh() compares addresses
        self.weights = [p.detach() for p in self.model.parameters()]
        self.graphs: dict[tuple[int, bool], RowGraph] = {}  # (rows, whether they have adapters)
        self.stack: Stack | None = None
        self.shares: dict[Owners, Tensor] = {}
        self.written: Tensor | None = None  # the scales of the written shares

    def refresh(self) -> None:
        """Drop the graphs, and the weights that they hold, if the model has other ones now.

        Rows keep their states, unless the model has another dtype.
        """
        now = list(self.model.parameters())
        same = len(now) == len(self.weights) and all(map(_is_same, now, self.weights))
        if same and self.adapters is not None:  # without `adapters` the linears' changes are unknown
            return
        if self.model.dtype != self.states.att_x.dtype:
            self.states = self._zeros()
        self._forget()

    def close(self) -> None:
        """Free the graphs' memory."""
        self._forget()

    @torch.no_grad()
    def step(self, tokens: Sequence[int], applied: Sequence[Applied]) -> Tensor:
        count = len(tokens)
        self.ids[:count].copy_(torch.tensor(tokens, dtype=torch.int64)[:, None])
        with_adapters = self.adapters is not None and self._put_shares(applied)
        graph, logits = self._graph(count, with_adapters)
        graph.replay()
        return logits[:count].to(torch.float32, copy=True)

    @torch.no_grad()
    def check(self) -> None:
        """Record the smallest and the largest graph of BASE. Raises RuntimeError if that fails."""
        for count in (1, self.rows):
            self._graph(count, self.adapters is not None and self._put_shares([BASE] * count))

    def _put_shares(self, applied: Sequence[Applied]) -> bool:
        """Write the rows' shares where graphs read them; returns False if no row has an adapter's factors."""
        stack, of_rows = self.adapters.stacked(applied)
        if not of_rows.any():
            return False
        if stack is not self.stack:
            self.graphs = {key: recorded for key, recorded in self.graphs.items() if not key[1]}
            self.stack, device = stack, self.ids.device
            self.shares = {
                owners: torch.zeros(self.rows, sum(count for _, count in owners), device=device)
                for owners in {columns.owners for columns in stack.columns.values()}
            }
            self.written = None
        if self.written is None or not torch.equal(of_rows, self.written):
            for owners, static in self.shares.items():
                static[: len(of_rows)].copy_(columns_of(owners, of_rows))
            self.written = of_rows
        return True

    def _graph(self, count: int, with_adapters: bool) -> RowGraph:
        """Return the smallest graph of at least `count` rows."""
        key = min(self.rows, 1 << (count - 1).bit_length()), with_adapters
        if key not in self.graphs:
            self.graphs[key] = self._record(*key)
        return self.graphs[key]

    def _record(self, count: int, with_adapters: bool) -> RowGraph:
        before = [part[:, :count].clone() for part in self.states]

        def restore() -> None:
            for part, values in zip(self.states, before, strict=True):
                part[:, :count].copy_(values)

        with self._showing(count, with_adapters):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # first calls of libraries allocate and choose: that must not be in the graph
            with torch.cuda.stream(stream):
                want = self._move_on(self.ids[:count])
            torch.cuda.current_stream().wait_stream(stream)
            restore()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._move_on(self.ids[:count])
        graph.replay()
        restore()
        # a row that overflows is ignored
        got, want = (torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (logits, want))
        error = (got - want).abs().max() / want.abs().max()
        if not bool(error <= ALLOWED):
            raise RuntimeError(f"for {count} rows its logits are {float(error):.0e} of the largest one off")
        return RowGraph(graph, logits)

    def _showing(self, count: int, with_adapters: bool) -> contextlib.AbstractContextManager[None]:
        """Let the linears add the changes that the graph of `count` rows reads, inside the block."""
        if self.adapters is None:
            return contextlib.nullcontext()
        columns = self.stack.columns if with_adapters else {}
        return self.adapters.showing(
            Mix(columns, {owners: static[:count] for owners, static in self.shares.items()})
        )


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.data_ptr() == before.data_ptr() and now.dtype == before.dtype
