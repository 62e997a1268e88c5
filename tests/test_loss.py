"""The loss of the head's input, block by block, against the loss of all logits at once."""

import pytest
import torch

from src.common.token_loss import loss_sum
from src.model import loss as losses
from src.model import rwkv
from src.model.layers import Head
from src.model.loss import head_loss

from .loss_cases import VOCAB, adapted_head, head_inputs, head_kinds, head_rows

# bf16 rounds logits, their gradient and the products
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def gradients(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(2.5 * loss, leaves)]


@pytest.mark.parametrize("dtype", ROUNDING)
@head_rows
@head_kinds
def test_value_and_gradients_are_those_of_all_logits(monkeypatch, dtype, rows, trained, native, exact):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCAB)  # blocks of 5 rows
    x, weight, targets = head_inputs(rows, dtype, trained)
    leaves = [x, weight] if trained else [x]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = gradients(
        loss_sum(doubles[0] @ (doubles[1] if trained else weight.double()).t(), targets), doubles
    )
    got = gradients(head_loss(x, weight, targets, native, exact=exact), leaves)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got[1:]] == [dtype] * len(leaves)
    for name, mine, theirs in zip(("loss", "dx", "dweight")[: len(want)], got, want, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm(), name


@pytest.mark.parametrize("native", [False, True])
def test_large_and_equal_logits(native):
    """exp would overflow, and the arg-max is one of several."""
    weight = torch.zeros(9, 3)
    weight[2:5] = 500.0
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        x.requires_grad_()
        targets = torch.tensor([2, 7])
        mine, want = (
            gradients(loss, [x])
            for loss in (head_loss(x, weight, targets, native), loss_sum(x @ weight.t(), targets))
        )
        for a, b in zip(mine, want, strict=True):
            torch.testing.assert_close(a, b)
            assert a.isfinite().all()


def test_nothing_but_the_gradient_is_kept_and_nothing_without_grad(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * 31)
    head = Head(11, 31, "cpu").requires_grad_(False)
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
    head = Head(11, 31, "cpu")
    x = torch.randn(7, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, torch.arange(7))
        want = loss_sum(torch.nn.functional.linear(x, head.weight), torch.arange(7))
    for a, b in zip(gradients(loss, [x, head.weight]), gradients(want, [x, head.weight]), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, vocab, threads", [(1, 1, 1), (2, 15, 1), (3, 16, 3), (5, 17, 2), (4, 2063, 1)]
)
def test_the_native_softmax_is_the_plain_one(dtype, rows, vocab, threads):
    torch.manual_seed(0)
    logits, targets = (5 * torch.randn(rows, vocab)).to(dtype), torch.randint(vocab, (rows,))
    logits[0, -1] = logits.max() + 1  # the arg-max among the last few, which are no whole vector
    targets[-1] = logits[-1].float().argmax()
    exact = logits.double()
    want = losses.softmax_loss_(exact, targets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = torch.ops.rwkv.softmax_loss_(logits, targets)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=3e-6)
    torch.testing.assert_close(
        logits.double(), exact, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
    )


def test_a_target_outside_of_the_vocabulary_is_an_error():
    for wrong in ([0, 5], [-1, 0], [0]):
        with pytest.raises(ValueError, match="an int64 target from 0 to 4"):
            torch.ops.rwkv.softmax_loss_(torch.randn(2, 5), torch.tensor(wrong))


@pytest.mark.parametrize("method", ["miss", "lora"])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_an_adapted_head_has_the_loss_of_its_logits(monkeypatch, method, rows):
    monkeypatch.setattr(rwkv, "LOGITS_AT_ONCE", 5 * 67)
    adapted, x, targets, leaves = adapted_head(method, rows)
    got, want = (
        gradients(loss, leaves) for loss in (adapted.loss(x, targets), loss_sum(adapted.head(x), targets))
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


def test_in_bf16_the_gradients_do_not_depend_on_the_blocks(monkeypatch):
    """1 / tokens is not a bf16 number, and sums over many blocks would lose digits in bf16."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(3001, 16).bfloat16().requires_grad_(),
        torch.randn(31, 16).bfloat16().requires_grad_(),
    )
    targets = torch.randint(31, (3001,))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(loss_sum(exact[0] @ exact[1].t(), targets) / 3001, exact)
    for rows in (8, 3001):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", rows * 31)
        dx, dw = torch.autograd.grad(head_loss(x, weight, targets) / 3001, [x, weight])
        # the share of the gradient that is there
        size = (dx.double() * want[0]).sum() / want[0].square().sum()
        assert abs(size - 1) < 5e-4
        assert (dw.double() - want[1]).norm() < 3e-3 * want[1].norm()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_logits_of_a_gpu_are_in_fp32_and_their_gradients_are_not(dtype):
    """Here on the CPU, whose product was rounded on its way."""
    head = Head(11, 31, "torch").to(dtype)
    head.on_gpu = True
    x = torch.randn(2, 3, 11, dtype=dtype, requires_grad=True)
    logits = head(x)
    assert logits.shape == (2, 3, 31) and logits.dtype == torch.promote_types(dtype, torch.float32)
    weights = torch.randn_like(logits)
    found = torch.autograd.grad((logits * weights).sum(), [x, head.weight])
    want = weights.double() @ head.weight.double(), torch.einsum("btv,btc->vc", weights.double(), x.double())
    for mine, theirs in zip(found, want, strict=True):
        assert mine.dtype == dtype and (mine - theirs).norm() <= ROUNDING[dtype] * theirs.norm()
