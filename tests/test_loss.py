"""The loss of the head's input, block by block, against the loss of all logits at once."""

import pytest
import torch

from src import loss as losses
from src.loss import head_loss, loss_sum
from src.shared import Head

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # bf16 rounds logits, their gradient and the products


def gradients(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(2.5 * loss, leaves)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [0, 1, 5, 13])
@pytest.mark.parametrize("trained", [False, True])
def test_value_and_gradients_are_those_of_all_logits(monkeypatch, dtype, rows, trained):
    monkeypatch.setattr(losses, "BLOCK", 5 * 31)  # blocks of 5 rows
    torch.manual_seed(0)
    x = torch.randn(rows, 11).to(dtype).requires_grad_()
    weight, targets = torch.randn(31, 11).to(dtype).requires_grad_(trained), torch.randint(31, (rows,))
    leaves = [x, weight] if trained else [x]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = gradients(loss_sum(exact[0] @ (exact[1] if trained else weight.double()).t(), targets), exact)
    got = gradients(head_loss(x, weight, targets), leaves)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32) and [g.dtype for g in got[1:]] == [dtype] * len(leaves)
    for name, mine, theirs in zip(("loss", "dx", "dweight"), got, want):
        assert mine.shape == theirs.shape
        assert rows == 0 or (mine.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm(), name


def test_large_and_equal_logits():
    """exp would overflow, and the arg-max is one of several."""
    weight = torch.zeros(9, 3)
    weight[2:5] = 500.0
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        x.requires_grad_()
        mine, want = (gradients(loss, [x]) for loss in (head_loss(x, weight, torch.tensor([2, 7])), loss_sum(x @ weight.t(), torch.tensor([2, 7]))))
        for a, b in zip(mine, want):
            torch.testing.assert_close(a, b)
            assert a.isfinite().all()


def test_nothing_but_the_gradient_is_kept_and_nothing_without_grad(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", 2 * 31)
    head = Head(11, 31, bias=False).requires_grad_(False)
    x, targets, kept = torch.randn(7, 11, requires_grad=True), torch.arange(7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = head(x, targets)
    assert kept == [x.shape] and loss.requires_grad
    made = []
    monkeypatch.setattr(losses, "product", lambda *args: made.append(args))
    with torch.no_grad():
        again = head(x, targets)
    assert not made and not again.requires_grad
    torch.testing.assert_close(again, loss.detach(), rtol=0, atol=0)


def test_autocast_computes_in_its_dtype():
    head = Head(11, 31, bias=False)
    x = torch.randn(7, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, torch.arange(7))
        want = loss_sum(torch.nn.functional.linear(x, head.weight), torch.arange(7))
    for a, b in zip(gradients(loss, [x, head.weight]), gradients(want, [x, head.weight])):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-2 * b.norm()
