"""Common parts of the tests of losses: small models, packed rows, heads and their inputs."""

import itertools

import pytest
import torch

import rwkv_miss
from src.model import RWKV
from src.model.loss import softmax_loss_

from .conftest import close, make_arch, random_tensors

# document starts inside chunks of 8, at their first and at their last token, and a chunk with three of them
ROWS = [[5, 3, 1, 2, 12, 7, 5], [35], [15, 1, 8], [1]]

VOCAB = 31  # the vocabulary of head_inputs()

# a block reads 4096 logits at a time: one number each, or vectors of 4 where V is a multiple of 4
LOGITS = [(3, 1), (3, 5), (4, 67), (2, 4096), (3, 4097), (3, 12292), (1, 20487), (2, 32772)]
# relative error of gradients, and of the half-precision ones their rounding
GRADIENT_ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

# rows in blocks of 5: no block, a part of one, a whole one, and two with a part
head_rows = pytest.mark.parametrize("rows", [0, 1, 5, 13])
head_kinds = pytest.mark.parametrize(
    "trained, native, exact",
    [(False, False, False), (True, True, False), (False, True, False), (True, False, True)],
)


def make_model(version, dtype=torch.float64, kernel="torch", peft=True, **sizes):
    model = RWKV(make_arch(version, **sizes), kernel)
    model.load_state_dict(random_tensors(model.arch))
    if peft:
        rwkv_miss.inject(model, "miss", rank=7)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:  # MiSS begins at zero
                    p.normal_(std=0.05)
    return model.to(dtype)


def make_batch(lengths, vocab=67, seed=0, weighted=False):
    """Packed rows: lengths[i] are those of the documents of row i; about half of the tokens are trained, none
    behind a row's end, by `weights` (B, T) that are not 0. `weighted`: from 0.1 to 3.1, else 1.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(map(sum, lengths))
    shape = len(lengths), size
    ids, targets = (torch.randint(vocab, shape, generator=generator) for _ in range(2))
    mask, reset = torch.rand(shape, generator=generator) < 0.5, torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(lengths):
        mask[i, sum(row) :] = False
        reset[i, list(itertools.accumulate(row))[:-1]] = True
    weights = mask * (0.1 + 3 * torch.rand(shape, generator=generator)) if weighted else mask
    return {"ids": ids, "targets": targets, "weights": weights, "reset": reset if reset.any() else None}


def same(got, want, ratio):
    close("loss", got[0], want[0], ratio)
    for name, gradient in want[1].items():
        if gradient is None:
            assert got[1][name] is None, name
        else:
            close(name, got[1][name], gradient, ratio)


class Tuned(RWKV):
    """The initial state is a parameter, as in state tuning."""

    def __init__(self, arch):
        super().__init__(arch)
        self.start = torch.nn.Parameter(
            torch.randn(arch.n_layer, arch.n_head, arch.head_size, arch.head_size)
        )

    def initial_state(self, batch):
        zeros = super().initial_state(batch)
        return [
            layer._replace(wkv=start.expand(batch, -1, -1, -1))
            for layer, start in zip(zeros, self.start, strict=True)
        ]


def tuned_model():
    """float64, of which only the initial state is trained."""
    model = Tuned(make_arch(7)).double()
    model.load_state_dict(random_tensors(model.arch), strict=False)
    model.requires_grad_(False).start.requires_grad_()
    return model


def head_inputs(rows, dtype, trained):
    """(x (rows, 11), weight (VOCAB, 11), targets (rows,)); the weight has a gradient where it is trained."""
    torch.manual_seed(0)
    x = torch.randn(rows, 11).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, 11).to(dtype).requires_grad_(trained)
    return x, weight, torch.randint(VOCAB, (rows,))


def adapted_head(method, rows):
    """(model, x (rows, C), targets (rows,), what has a gradient); the adapter on the head is not zero."""
    torch.manual_seed(0)
    model = RWKV(make_arch(7, n_layer=1))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, ["head", "att.key"], rank=4)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.normal_(std=0.1)
    x = torch.randn(rows, model.arch.n_embd, requires_grad=True)
    return model, x, torch.randint(67, (rows,)), [x, *trained]


def exact_loss(logits, targets, weights=None):
    """(losses, gradient) in float64."""
    gradient = logits.double()
    return softmax_loss_(gradient, targets, None if weights is None else weights.double()), gradient


def random_logits(rows, vocab, seed=0):
    """(logits, targets), the largest logit at the end of the first row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    logits[0, -1] = logits.max() + 1  # the largest at the end, which may be no whole vector
    targets[-1] = logits[-1].argmax()
    return logits, targets
