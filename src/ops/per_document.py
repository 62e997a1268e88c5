"""Packed rows whose documents start from a given state: every document becomes a row of its own.

The kernels zero the state where a document starts. A tuned initial state must stand there instead, with its
gradient from every document of a row. The tensor-core forms cannot take it as an argument, because their
chunks hold several documents in one matrix. So the documents are cut out and given to the kernel in groups of
similar length, each with its own initial state and without resets. Any kernel can do that, the gradients are
autograd's, and a group is padded to less than twice its tokens. Padding stands after a document and leaves
the state as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST_GROUP = 16  # documents up to this length share a group
# The raw decay of a token that keeps the whole state, in both versions: exp(-exp(-30)) and
# exp(-0.6 sigmoid(-30)) are 1 in fp32.
DECAY_OF_PADDING = -30.0


class DocumentGroup(NamedTuple):
    """Documents of similar length: D of them, the longest with L tokens."""

    tokens: Tensor  # (D, L) int64, places in the flattened rows (B * T,); B * T, one past the end, is padding
    rows: Tensor  # (D,) int64, the row of each document
    reset: Tensor  # (D,) bool; not set for the rest of a document that began before the row


class Layout(NamedTuple):
    """Places of packed rows' documents in the groups, and the way back."""

    groups: list[DocumentGroup]
    places: Tensor  # (B * T,) int64, each token's output among those of all groups, padding included
    last: Tensor  # (B,) int64, each row's last document among those of all groups


@functools.lru_cache(maxsize=1)  # every layer asks for the same resets, which are hashed by identity
def layout(reset: Tensor) -> Layout:
    """Find the layout of rows whose documents start where `reset` (B, T) bool is set.

    Token 0 of a row begins a document in any case, a new one or the rest of one. This does not wait for a GPU
    if the batch came with its resets on the CPU, as Batch.to() leaves them.
    """
    B, T = reset.shape
    on_cpu = getattr(reset, "on_cpu", None)
    if on_cpu is None:
        on_cpu = reset.cpu()

    def sent(x: Tensor) -> Tensor:
        # a copy from pinned memory does not wait
        return x.pin_memory().to(reset.device, non_blocking=True) if reset.is_cuda else x

    begins = on_cpu.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().flatten()
    length = torch.diff(first, append=torch.tensor([B * T]))
    size = torch.maximum(2 ** torch.ceil(torch.log2(length.double())), torch.tensor(float(SHORTEST_GROUP)))
    resets = on_cpu.flatten()[first]
    groups, places, order, before = [], torch.empty(B * T, dtype=torch.int64), [], 0
    for one in size.unique():
        chosen = (size == one).nonzero().flatten()
        step = torch.arange(int(length[chosen].max()))
        inside = step < length[chosen, None]
        tokens = torch.where(inside, first[chosen, None] + step, B * T)
        places[tokens[inside]] = before + inside.flatten().nonzero().flatten()
        before += tokens.numel()
        order.append(chosen)
        groups.append(DocumentGroup(*map(sent, (tokens, first[chosen] // T, resets[chosen]))))
    ends = torch.cat(order).argsort()[(first + length) % T == 0]
    return Layout(groups, sent(places), sent(ends))


def by_document(
    wkv: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    s0: Tensor | None,
    reset: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run rows whose documents start from `initial_state` (H, N, N): y (B, T, H, N), the rows' states.

    `wkv(inputs, state)` computes rows of one document. s0 (B, H, N, N) is the state before a row's first
    token, None if each row begins with a document.
    """
    B, T, H, N = inputs["r"].shape
    plan = layout(reset)

    def with_padding(name: str, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(0, 1), x.new_full((1, H, N), DECAY_OF_PADDING if name == "w" else 0.0)])

    tokens = {name: with_padding(name, x) for name, x in inputs.items() if name != "u"}
    ys, states = [], []
    for group in plan.groups:
        state = initial_state.expand(len(group.rows), H, N, N)
        if s0 is not None:
            state = torch.where(group.reset[:, None, None, None], state, s0[group.rows])
        index = group.tokens.flatten()
        cut = {name: x.index_select(0, index).view(*group.tokens.shape, H, N) for name, x in tokens.items()}
        y, state = wkv({name: cut.get(name, x) for name, x in inputs.items()}, state)
        ys.append(y.flatten(0, 1))
        states.append(state)
    y = torch.cat(ys).index_select(0, plan.places).view(B, T, H, N)
    return y, torch.cat(states).index_select(0, plan.last)
