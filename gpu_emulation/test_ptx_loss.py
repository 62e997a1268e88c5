"""The loss for GPUs (cuda/loss.cu), executed as PTX (ptx/), against the plain softmax in float64."""

import pytest
import torch

from benchmarks import gpu_numerics
from src.common.token_loss import loss_sum
from src.model import loss as losses
from src.model.loss import head_loss, in_place_of, launch, softmax_loss_
from src.ops import native
from tests.loss_cases import GRADIENT_ERRORS, random_logits

from .ptx.runs import check_run, runs


@pytest.mark.parametrize("architecture, group, quick", runs("loss"))
def test_rows(nvcc, architecture, group, quick, drawn_rows):
    check_run(architecture, group, quick, drawn_rows)


def executed(gpu, logits, targets, weights=None, dtype=torch.float32, l2wrap=losses.L2WRAP):
    """(loss, gradient) of the kernel on a copy of the logits."""
    logits, loss = gpu.put(logits, readonly=False), gpu.empty((len(logits),))
    others = gpu.put(targets), gpu.put(weights)
    assert launch(gpu.library, logits, *others, loss, dtype, gpu.context, l2wrap) == 0
    return loss, in_place_of(logits, dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", GRADIENT_ERRORS)
def test_the_head_makes_its_products_with_the_gradient_in_the_place_of_the_logits(
    gpu, monkeypatch, dtype, trained
):
    def kernel(logits, targets, weights, dtype, l2wrap):
        loss, gradient = executed(gpu, logits, targets, weights, dtype, l2wrap)
        in_place_of(logits, dtype).copy_(gradient)
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


@pytest.mark.parametrize("wrong", [-1, 67, 1 << 40, -(1 << 62)])
def test_a_target_outside_of_the_vocabulary_makes_its_row_nan(gpu, wrong):
    logits, targets = random_logits(3, 67)
    want = executed(gpu, logits, targets)
    targets[1] = wrong
    for found, right in zip(executed(gpu, logits, targets), want, strict=True):
        assert found[1].isnan().any() and torch.equal(found[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_shows_in_the_loss(gpu, wrong):
    logits, targets = random_logits(3, 67)
    logits[1, 40] = wrong
    loss, _ = executed(gpu, logits, targets)
    assert loss.isnan().tolist() == [False, True, False]


def test_no_rows_are_no_launch(gpu):
    loss, gradient = executed(gpu, torch.empty(0, 67), torch.empty(0, dtype=torch.int64))
    assert not len(loss) and not len(gradient)


def test_the_plain_form_leaves_the_gradient_where_the_native_one_does(gpu):
    logits, targets = random_logits(5, 67)
    for dtype in native.ACTIVATION_DTYPES["cuda"]:
        loss, gradient = executed(gpu, logits, targets, dtype=dtype)
        plain = logits.clone()
        torch.testing.assert_close(softmax_loss_(plain, targets, None, dtype), loss)
        torch.testing.assert_close(in_place_of(plain, dtype), gradient)


def test_what_a_card_is_checked_with():
    """benchmarks.gpu_numerics, with the CPU's native loss in the place of a GPU's."""
    ((value, allowed),) = gpu_numerics.loss_errors("float32", "cpu").values()
    assert 1e-9 < value <= allowed
