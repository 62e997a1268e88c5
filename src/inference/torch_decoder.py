"""Torch decoder of many rows: any RWKV on any device, also one in training with its adapters.

It is a RowDecoder (row_decoder.py says what its methods do), as the native one (cpu_decoder.py) and the one
of CUDA graphs (cuda_graph.py) are; decoders.py chooses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import RWKV, LayerState, State
from .adapters import BASE, Adapters, Applied
from .prompt_logprobs import EachLogits, give_logits


class TorchDecoder:
    """Decoder by the model's own forward, over `rows` states.

    Rows with another adapter than BASE need `adapters`. The model is used as it is: the caller has put it
    into eval mode, and under ZeRO-3 every process makes the same calls.
    """

    def __init__(self, model: RWKV, rows: int, adapters: Adapters | None = None):
        self.model, self.rows, self.adapters = model, rows, adapters
        self.states = self._zeros()

    def _zeros(self) -> LayerState:
        """Make the states of all rows; each part has all layers, (L, rows, ...)."""
        arch, rows, device, dtype = self.model.arch, self.rows, self.model.emb.weight.device, self.model.dtype
        width = torch.zeros(arch.n_layer, rows, arch.n_embd, device=device, dtype=dtype)
        heads = arch.n_head, arch.head_size, arch.head_size
        exact = torch.promote_types(dtype, torch.float32)
        wkv = torch.zeros(arch.n_layer, rows, *heads, device=device, dtype=exact)
        return LayerState(width, wkv, width.clone())

    @torch.no_grad()
    def read(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> tuple[Tensor, State]:
        if each and ids.shape[1] > 1:
            state, ids = self.state_after(ids[:, :-1], state, applied, each), ids[:, -1:]
        with self._with([applied]):
            return self._next(ids, self._ready(state))

    @torch.no_grad()
    def read_together(self, ids: Tensor, reset: Tensor | None) -> tuple[Tensor, State]:
        device = self.model.emb.weight.device
        return self._next(ids, None, None if reset is None else reset.to(device))

    @torch.no_grad()
    def state_after(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> State:
        ids = ids.to(self.model.emb.weight.device)
        wanted = torch.arange(0 if each else ids.shape[1] - 1, ids.shape[1], device=ids.device)
        with self._with([applied]):
            x, state = self.model.features(ids, self._ready(state), wanted=wanted)
            if each:
                give_logits(self.model, x, each)
        return state

    def _ready(self, state: State | None) -> State | None:
        """Cast a state to the dtype of the model's activations."""
        if state is None:
            return None
        to = self.model.dtype
        return [layer._replace(att_x=layer.att_x.to(to), ffn_x=layer.ffn_x.to(to)) for layer in state]

    def put(self, row: int, state: State) -> None:
        for own, parts in zip(self.states, zip(*state, strict=True), strict=True):
            torch._foreach_copy_([of_layer[row] for of_layer in own], [part[0] for part in parts])

    def take(self, row: int) -> State:
        return self._layers([part[:, row : row + 1].clone() for part in self.states])

    def move(self, source: int, target: int) -> None:
        for part in self.states:
            part[:, target].copy_(part[:, source])

    @torch.no_grad()
    def step(self, tokens: Sequence[int], applied: Sequence[Applied]) -> Tensor:
        with self._with(applied):
            return self._move_on(torch.tensor(tokens, dtype=torch.int64)[:, None])

    def _move_on(self, ids: Tensor) -> Tensor:
        """Run the next token (B, 1) of the first rows: logits (B, V)."""
        before = self._layers([part[:, : len(ids)] for part in self.states])
        logits, after = self._next(ids, before)
        for part in LayerState._fields:
            old, new = ([getattr(layer, part) for layer in state] for state in (before, after))
            torch._foreach_copy_(old, new)  # a GPU launches once for all layers
        return logits

    def _next(self, ids: Tensor, state: State | None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        logits, after = self.model.next_logits(ids.to(self.model.emb.weight.device), state, reset)
        return logits.float(), after

    def _with(self, applied: Sequence[Applied]) -> contextlib.AbstractContextManager[None]:
        return self.adapters.rows(applied) if self.adapters else contextlib.nullcontext()

    def _layers(self, parts: list[Tensor]) -> State:
        """Turn parts of a state with all layers, (L, B, ...), into a state."""
        return [LayerState(*of_layer) for of_layer in zip(*(part.unbind() for part in parts), strict=True)]

    def refresh(self) -> None:
        """Do nothing: no copy of the model is kept here."""

    def close(self) -> None:
        """Free nothing but tensors."""
