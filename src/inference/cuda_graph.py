"""One token after another on a GPU: a `GraphedDecoder` records a token's launches once and replays them.

This is a CUDA graph. A token of a small model is hundreds of launches of a few microseconds each. The CPU
cannot launch them as fast as the GPU runs them. A decoder is called as the model is, `logits, state =
decoder.next_logits(ids, state)`, and its states are the model's. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import RWKV, LayerState, State

# error, as a share of the largest logit; the graph has the same operations, but may add in another order
ALLOWED = 1e-2


class GraphedDecoder:
    """A model on a GPU that reads prompts as before and replays a recorded graph for every single token.

    It works on one sequence at a time. The graph holds the addresses of the weights. When the model gets
    other tensors, as from Adapters.use, refresh() has the graph recorded again.
    """

    def __init__(self, model: RWKV):
        self.model = model
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=model.emb.weight.device)
        self.refresh()

    def refresh(self) -> None:
        """Drop the graph, and with it the weights that it holds; the next single token records another."""
        arch, weight = self.model.arch, self.model.emb.weight
        width = torch.zeros(arch.n_layer, 1, arch.n_embd, dtype=self.model.dtype, device=weight.device)
        wkv = torch.zeros(arch.n_layer, 1, arch.n_head, arch.head_size, arch.head_size, device=weight.device)
        self.before = [width, wkv, width.clone()]  # the parts of a state, of all layers
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def emb(self):
        return self.model.emb

    @torch.no_grad()
    def next_logits(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """ids (1, T) int64 -> logits (1, V) after the last token, and the state after it.

        The given state stays as it is.
        """
        if ids.shape != (1, 1) or state is None:
            return self.model.next_logits(ids, state)
        self.ids.copy_(ids)
        for static, parts in zip(self.before, zip(*state, strict=True), strict=True):
            static.copy_(torch.stack(parts))
        if self.graph is None:
            self._record()
        self.graph.replay()
        logits, *after = (t.clone() for t in self.result)
        return logits, [LayerState(*parts) for parts in zip(*after, strict=True)]

    @torch.no_grad()
    def check(self) -> None:
        """Record the graph; RuntimeError where that fails, or where its logits are not the model's."""
        first = torch.ones_like(self.ids)
        _, state = self.model.next_logits(self.ids.clone())
        want, got = self.model.next_logits(first, state)[0].float(), self.next_logits(first, state)[0].float()
        error = float((got - want).abs().max() / want.abs().max())
        if not error < ALLOWED:
            raise RuntimeError(f"its logits are {error:.0e} of the largest one off")

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # what libraries allocate and choose on their first call must not be in the graph
        with torch.cuda.stream(stream):
            self._token()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self._token()

    def _token(self) -> list[Tensor]:
        """[logits (1, V), the parts of the state after self.ids, of all layers]."""
        x, state = self.model.features(
            self.ids, [LayerState(*parts) for parts in zip(*self.before, strict=True)]
        )
        return [self.model.head(x[:, -1]), *(torch.stack(parts) for parts in zip(*state, strict=True))]
