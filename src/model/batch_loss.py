"""Loss of a batch. Its rows are run whole, or in chunks, so that rows of any length fit into memory.

A chunk is a function (state before, parameters) -> (its result, state after). The result is its share of the
loss, or it is numbers for each of its trained tokens (log_probs.py). The forward keeps the state before each
chunk and nothing else. The backward walks the chunks from the last to the first, recomputes each from its
state, and passes the gradient of that state on to the chunk before. This is the gradient of the whole row:
the same numbers in the same operations, summed in another order.

For autograd the batch is one function of the parameters, which get their gradients once, however many chunks
there are. So DDP's and ZeRO's reductions take place once in a backward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_miss.files.checkpoint import Arch

from ..common.batch import Batch
from .loss import LogitLoss
from .rwkv import RWKV, LayerState, State


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of `size` tokens in which rows are run (0: whole rows).

    `truncate`, a multiple of `size`: the gradient is cut before every token at a multiple of it (0: nowhere,
    exact). `sparse`: of n chunks only every sqrt(n)-th keeps its state; the others are recomputed.
    """

    size: int = 0
    truncate: int = 0
    sparse: bool = False

    def count(self, width: int) -> int:
        """Count the chunks of a row of `width` tokens."""
        return -(-width // self.size) if self.size else 1

    def states(self, width: int) -> int:
        """Return the largest number of states that are kept at a time for a row of `width` tokens."""
        n = self.count(width)
        stride = self.stride(n)
        return 0 if n == 1 else -(-n // stride) - 1 + stride - 1

    def stride(self, count: int) -> int:
        """Return the number of chunks from one kept state to the next."""
        return math.isqrt(count - 1) + 1 if self.sparse else 1

    def loss(self, model: RWKV, batch: Batch) -> Tensor:
        """Sum the weighted loss of the trained tokens of a batch.

        `batch` is made by data/collate.collate() for chunks of this size. The result is differentiable in the
        model's trained parameters.
        """
        return run_rows(model, batch, self, part_loss)

    def sums(self, model: RWKV, batch: Batch, logit_loss: LogitLoss) -> Tensor:
        """Add up the sums of a loss of all logits over the trained tokens, each weighted.

        Its numbers for these tokens are batch.teacher. All else is as for loss().
        """

        def part_sums(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
            x, state = part_features(model, part, state)
            of_part = logit_loss._replace(numbers=part.teacher)
            return model.logit_sums(x, part.targets, part.weights, of_part), state

        return run_rows(model, batch, self, part_sums)

    def log_probs(self, model: RWKV, batch: Batch) -> Tensor:
        """Compute ln p of each trained token, (n,) in at least fp32, in the order of batch.targets.

        `batch` is as for run_rows(); its weights are not read.

        The result is differentiable in the model's trained parameters, through the states after prompts, too.
        Equal rows give the same numbers with and without shared prompts, except with dropout: answers that
        share a prompt share its dropped entries.
        """
        return run_rows(model, batch, self, part_log_probs, each=True)

    def features(self, model: RWKV, batch: Batch) -> Tensor:
        """Return the head's input for each trained token, (n, C), in the order of log_probs()."""
        return run_rows(model, batch, self, part_features, each=True)

    def top_log_probs(self, model: RWKV, batch: Batch, count: int, temperature: float) -> Tensor:
        """Compute loss.top_of() for each trained token, (n, 2 count + 1), without gradient, in the order of
        log_probs()."""

        def top(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
            x, state = part_features(model, part, state)
            return model.top_log_probs(x, count, temperature), state

        return run_rows(model, batch, self, top, each=True)


def state_bytes(arch: Arch, batch: int, itemsize: int) -> int:
    """Count the bytes of the state of `batch` rows.

    The WKV state is fp32. The last inputs of both mixes of every layer have `itemsize` bytes a number.
    """
    return batch * arch.n_layer * (4 * arch.dim_att * arch.head_size + 2 * arch.n_embd * itemsize)


# (model, a part of the rows, the state before it) -> (its sums or numbers for each token, the state after)
Part = Callable[[RWKV, Batch, State | None], tuple[Tensor, State]]


def run_rows(model: RWKV, batch: Batch, chunks: Chunks, part: Part, each: bool = False) -> Tensor:
    """Apply `part` to the rows of a batch, whole or in chunks.

    Results of the chunks are summed. With `each` they are numbers for each of a chunk's trained tokens,
    (n, ...), and are concatenated. `batch` and the gradients are those of Chunks.loss().

    A batch with `prompts` (P, S) has them read once: its rows `ids` are answers, and row i goes on from
    the state after prompt prompt_of[i], so its first token is the prompt's last. Prompts are padded on the
    left, and `prompt_reset` (P, S) is true where a padded one begins. Such rows are whole.
    """
    if batch.prompts is not None:
        if chunks.size:
            raise ValueError(f"prompts are shared by whole rows, not by chunks of {chunks.size} tokens")
        return part(model, batch, after_prompts(model, batch))[0]
    if batch.chunk != chunks.size:
        raise ValueError(
            f"the batch was made for chunks of {batch.chunk} tokens, expected {chunks.size}; give"
            " collate() the chunk"
        )
    count = chunks.count(batch.width or batch.ids.shape[1])
    if count == 1:
        return part(model, batch, None)[0]
    walk = _Walk(model, batch, chunks, count, torch.initial_seed(), part, each)
    if not torch.is_grad_enabled():
        return walk.forward()[0]
    return _InChunks.apply(walk, *(p for p in model.parameters() if p.requires_grad))


def after_prompts(model: RWKV, batch: Batch) -> State:
    """Compute the state before each row of a batch with `prompts`: the state after its prompt."""
    prompts, of = batch.prompts, batch.prompt_of
    nothing = of.new_empty(0)  # no output is wanted, and the last layer computes none
    _, state = model.features(prompts, None, batch.prompt_reset, nothing)
    return [LayerState(*(t.index_select(0, of) for t in layer)) for layer in state]


def part_loss(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
    """Return (weighted loss of the trained tokens of a part of the rows, summed; state after the part).

    `state` is the state before the part, None at the beginning of the rows.
    """
    x, state = part_features(model, part, state)
    return model.loss(x, part.targets, part.weights), state


def part_log_probs(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
    """Return (ln p of the trained tokens of a part of the rows, state after the part), as part_loss()."""
    x, state = part_features(model, part, state)
    return model.log_probs(x, part.targets), state


def part_features(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
    """Return the head's input for the part's trained tokens, and the state after the part."""
    # the head, and the part of the last layer that only the head reads, run on the tokens that carry loss
    return model.features(part.ids, state, part.reset, part.where)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Walk over the chunks of a batch, forward and backward."""

    model: RWKV
    batch: Batch
    chunks: Chunks
    count: int
    seed: int
    part: Part
    each: bool

    def run(self, i: int, state: State | None) -> tuple[Tensor, State]:
        """Run chunk i: (its result, state after it). Dropout depends on the place: recomputing draws the
        same."""
        ids, part = self.batch.ids, self.batch.part(i)
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            torch.manual_seed((self.seed + i) % 2**63)
            return self.part(self.model, part, state)

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Run all chunks: (their result, the kept states but the initial one, as a flat list of tensors)."""
        results, state, kept = [], None, []
        for i in range(self.count):
            if i and i % self.chunks.stride(self.count) == 0:
                kept += _flat(state)
            result, state = self.run(i, state)
            state = _own(state)
            results.append(result)
        return torch.cat(results) if self.each else sum(results), kept

    def backward(
        self, kept: Sequence[Tensor], parameters: Sequence[Tensor], dresult: Tensor
    ) -> list[Tensor | None]:
        """Compute the gradients of the parameters; None for one that no chunk uses."""
        gradients: list[Tensor | None] = [None] * len(parameters)
        begins = [None, *_states(kept, self.model.arch.n_layer)]
        stride = self.chunks.stride(self.count)
        dstate: list[Tensor | None] = []
        for segment, state in reversed(list(enumerate(begins))):
            first = segment * stride
            states = [state]
            for i in range(first, min(first + stride, self.count) - 1):
                states.append(_own(self.run(i, states[-1])[1]))
            for i in reversed(range(first, first + len(states))):
                of_chunk = dresult[self.batch.trained_of(i)] if self.each else dresult
                new, dstate = self.chunk_backward(i, states.pop(), parameters, of_chunk, dstate)
                gradients = [_added(a, b) for a, b in zip(gradients, new, strict=True)]
        return gradients

    def chunk_backward(
        self,
        i: int,
        state: State | None,
        parameters: Sequence[Tensor],
        dresult: Tensor,
        dafter: list[Tensor | None],
    ):
        """Compute (gradients of the parameters by chunk i, gradient of the state before it).

        `dresult` is the gradient of its result, `dafter` that of the state after it. The gradient of a state
        has None for a tensor that none reaches.
        """
        crosses = i > 0 and not (self.chunks.truncate and i * self.chunks.size % self.chunks.truncate == 0)
        before = [] if state is None else [t.detach() for t in _flat(state)]
        # a gradient of a state below all that is trained would reach nothing
        reached = before[len(LayerState._fields) * self.model.first_trained() :] if crosses else []
        for tensor in reached:
            tensor.requires_grad_()
        with torch.enable_grad():
            result, after = self.run(i, next(_states(before, self.model.arch.n_layer), None))
        ends = [
            (x, dx)
            for x, dx in ((result, dresult), *zip(_flat(after), dafter))
            if dx is not None and x.requires_grad
        ]
        if not ends:  # only a tuned initial state is trained, and no gradient of this chunk reaches it
            return [None] * len(parameters), []
        outputs, their_gradients = zip(*ends, strict=True)
        gradients = torch.autograd.grad(outputs, [*parameters, *reached], their_gradients, allow_unused=True)
        below = [None] * (len(before) - len(reached))
        return gradients[: len(parameters)], [*below, *gradients[len(parameters) :]]


class _InChunks(torch.autograd.Function):
    """Autograd function of a walk: its result, as a function of the trained parameters."""

    @staticmethod
    def forward(ctx, walk: _Walk, *parameters: Tensor) -> Tensor:
        ctx.walk, ctx.parameters = walk, parameters
        result, kept = walk.forward()
        ctx.save_for_backward(*kept)  # freed with the graph, also while the result lives on
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dresult: Tensor):
        return None, *ctx.walk.backward(ctx.saved_tensors, ctx.parameters, dresult)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two gradients, where None is no gradient."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _flat(state: State) -> list[Tensor]:
    return [t for layer in state for t in layer]


def _states(tensors: Sequence[Tensor], n_layer: int):
    """Invert _flat() for states one after the other."""
    size = len(LayerState._fields) * n_layer
    for start in range(0, len(tensors), size):
        layers = tensors[start : start + size]
        yield [LayerState(*layers[i : i + 3]) for i in range(0, size, 3)]


def _own(state: State) -> State:
    """Copy a state into memory of its own: its tensors are views into a whole chunk's."""
    return [LayerState(*(t.clone() for t in layer)) for layer in state]
