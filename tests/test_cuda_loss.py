"""cuda/loss.cu, run on the CPU through cuda/emulate.h, against the plain softmax in float64."""

import pytest
import torch

from benchmarks import gpu_numerics
from src.model import loss as losses
from src.model.loss import head_loss, in_place_of, launch, loss_sum, softmax_loss_
from src.ops import native

from .loss_cases import GRADIENT_ERRORS, LOGITS, exact_loss, random_logits


def emulated(libraries, logits, targets, weights=None, dtype=torch.float32):
    """(loss, gradient) of the kernel on a copy of the logits."""
    logits, loss = logits.clone(), torch.full((len(logits),), torch.nan)
    assert launch(libraries[7], logits, targets, weights, loss, dtype, (0, None)) == 0
    return loss, in_place_of(logits, dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", GRADIENT_ERRORS)
def test_the_head_makes_its_products_with_the_gradient_in_the_place_of_the_logits(
    libraries, monkeypatch, dtype, trained
):
    def kernel(logits, targets, weights, dtype, l2wrap):
        loss = torch.empty(len(logits))
        assert launch(libraries[7], logits, targets, weights, loss, dtype, (0, None), l2wrap) == 0
        return loss

    monkeypatch.setattr(losses, "softmax_loss_", kernel)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 68)  # blocks of 5 rows
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 11, generator=generator).to(dtype) for rows in (13, 68))
    targets, weights = torch.arange(13) * 5, 0.5 + torch.rand(13, generator=generator)
    leaves = [x.requires_grad_(), weight.requires_grad_(trained)][: 1 + trained]
    found = head_loss(x, weight, targets, False, weights, exact=True)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = loss_sum(doubles[0] @ doubles[1].t(), targets, weights.double())
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, doubles), strict=False)
    for mine, theirs in [(found, want), *pairs]:
        assert (mine.double() - theirs).norm() <= 2 * max(GRADIENT_ERRORS[dtype], 1e-6) * theirs.norm()


@pytest.mark.parametrize("dtype", GRADIENT_ERRORS)
@pytest.mark.parametrize("rows, vocab", LOGITS)
def test_loss_and_gradient_in_both_orders_of_threads(libraries, dtype, rows, vocab):
    logits, targets = random_logits(rows, vocab)
    weights = torch.tensor([0.3, 1, 2.5])[:rows].repeat(2)[:rows] if vocab % 3 else None
    found = emulated(libraries, logits, targets, weights, dtype)
    libraries[7].emulate_order(1)
    try:
        other = emulated(libraries, logits, targets, weights, dtype)
    finally:
        libraries[7].emulate_order(0)
    for one, same in zip(found, other, strict=True):
        assert torch.equal(one, same)
    (loss, gradient), want = found, exact_loss(logits, targets, weights)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=1e-6)
    allowed = GRADIENT_ERRORS[dtype] * want[1].abs() + (
        6e-8 if dtype == torch.float16 else 1e-12
    )  # fp16 ends there
    allowed.scatter_add_(1, targets[:, None], torch.full((rows, 1), 2e-7).double())  # p - 1
    error = (gradient.double() - want[1]).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of what is allowed"


def test_rows_that_are_hard(libraries):
    """Logits that grow, so that the sum is scaled again and again; several largest ones; none but -inf before
    the last; a row at an address that is no multiple of 16 bytes.
    """
    vocab = 4100
    logits = torch.stack(
        [
            torch.linspace(-80, 80, vocab),
            torch.full((vocab,), -3.0),
            torch.full((vocab,), -torch.inf),
            torch.linspace(1e4, -1e4, vocab),
        ]
    )
    logits[2, -1] = 2
    targets = torch.tensor([0, 7, vocab - 1, 1])
    want = exact_loss(logits, targets)
    memory = torch.empty(logits.numel() + 1)
    unaligned = memory[1:].view(logits.shape).copy_(logits)
    loss = torch.empty(4)
    for dtype, error in GRADIENT_ERRORS.items():
        found = emulated(libraries, logits, targets, dtype=dtype)
        torch.testing.assert_close(found[0].double(), want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double(), want[1], rtol=max(error, 1e-5), atol=1e-7)
    assert launch(libraries[7], unaligned, targets, None, loss, torch.float32, (0, None)) == 0
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unaligned.double(), want[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("wrong", [-1, 67, 1 << 40, -(1 << 62)])
def test_a_target_outside_of_the_vocabulary_makes_its_row_nan(libraries, wrong):
    logits, targets = random_logits(3, 67)
    want = emulated(libraries, logits, targets)
    targets[1] = wrong
    for found, right in zip(emulated(libraries, logits, targets), want, strict=True):
        assert found[1].isnan().any() and torch.equal(found[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_shows_in_the_loss(libraries, wrong):
    logits, targets = random_logits(3, 67)
    logits[1, 40] = wrong
    loss, _ = emulated(libraries, logits, targets)
    assert loss.isnan().tolist() == [False, True, False]


def test_no_rows_are_no_launch(libraries):
    loss, gradient = emulated(libraries, torch.empty(0, 67), torch.empty(0, dtype=torch.int64))
    assert not len(loss) and not len(gradient)


def test_the_plain_form_leaves_the_gradient_where_the_native_one_does(libraries):
    logits, targets = random_logits(5, 67)
    for dtype in native.ACTIVATION_DTYPES["cuda"]:
        loss, gradient = emulated(libraries, logits, targets, dtype=dtype)
        plain = logits.clone()
        torch.testing.assert_close(softmax_loss_(plain, targets, None, dtype), loss)
        torch.testing.assert_close(in_place_of(plain, dtype), gradient)


def test_what_a_card_is_checked_with():
    """benchmarks.gpu_numerics, with the CPU's native loss in the place of a GPU's."""
    ((value, allowed),) = gpu_numerics.loss_errors("float32", "cpu").values()
    assert 1e-9 < value <= allowed
