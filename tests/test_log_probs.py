"""ln p of each trained token: of the head block by block, and of rows that are whole or in chunks."""

import pytest
import torch

from src.common.batch import Batch
from src.data.collate import trained_tokens
from src.model import loss as losses
from src.model import rwkv
from src.model.batch_loss import Chunks
from src.model.layers import Head
from src.model.loss import head_log_probs

from .conftest import close
from .loss_cases import (
    ROWS,
    VOCAB,
    adapted_head,
    head_inputs,
    head_kinds,
    head_rows,
    make_batch,
    make_model,
    same,
    tuned_model,
)

# bf16 rounds logits, their gradient and the products
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def gradients(found, scales, leaves):
    """Return the values, and the gradients of the leaves, with a gradient for each token."""
    return [found.detach(), *torch.autograd.grad(found, leaves, scales.to(found.dtype))]


def plainly(x, weight, targets):
    return (x @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("dtype", ROUNDING)
@head_rows
@head_kinds
def test_value_and_gradients_are_those_of_all_logits(monkeypatch, dtype, rows, trained, native, exact):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCAB)  # blocks of 5 rows
    x, weight, targets = head_inputs(rows, dtype, trained)
    scales = torch.randn(rows) * (torch.arange(rows) != 3)  # both signs, and 0 for one token
    leaves = [x, weight] if trained else [x]
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = gradients(plainly(*doubles, targets), scales, doubles)
    got = gradients(head_log_probs(x, weight, targets, native, exact), scales, leaves)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    for name, mine, theirs in zip(("ln p", "dx", "dweight"), got, want, strict=False):
        assert mine.shape == theirs.shape and (name == "ln p" or mine.dtype == dtype)
        assert (mine.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm(), name


@pytest.mark.parametrize("size", [1e5, 1e-7])
def test_a_trained_head_in_fp16_takes_large_and_small_gradients(size):
    """A loss that is scaled, as it is in fp16, would leave its range in the gradient of the logits."""
    torch.manual_seed(0)
    x, weight = torch.randn(13, 11).half().requires_grad_(), torch.randn(31, 11).requires_grad_()
    targets, scales = torch.randint(31, (13,)), torch.randn(13) * size
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    (dweight,) = torch.autograd.grad(head_log_probs(x, weight, targets), weight, scales)
    assert dweight.dtype == torch.float32  # the weight's own
    close("dweight", dweight, gradients(plainly(*doubles, targets), scales, doubles)[2], 3e-3)


def test_one_gradient_is_kept_with_a_frozen_head_and_nothing_without_grad(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * 31)
    head, kept = Head(11, 31, "cpu").requires_grad_(False), []
    x, targets = torch.randn(7, 11, requires_grad=True), torch.arange(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = head(x, targets, each=True)
    assert kept == [x.shape] and found.requires_grad
    monkeypatch.setattr(losses, "product", lambda *args: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert torch.equal(head(x, targets, each=True), found)


@pytest.mark.parametrize("method", ["miss", "lora"])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_an_adapted_head_has_those_of_its_logits(monkeypatch, method, rows):
    monkeypatch.setattr(rwkv, "LOGITS_AT_ONCE", 5 * 67)
    adapted, x, targets, leaves = adapted_head(method, rows)
    scales = torch.randn(rows)
    want = adapted.head(x).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for mine, theirs in zip(
        gradients(adapted.log_probs(x, targets), scales, leaves), gradients(want, scales, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def trained_batch(rows, chunks, **options):
    trained = trained_tokens(rows["targets"].numpy(), rows["weights"].numpy(), chunks.size)
    return Batch(ids=rows["ids"], reset=rows["reset"], **trained, **options)


def results(model, rows, chunks, find=Chunks.log_probs, **options):
    """(ln p of the tokens where they stand in the rows, 0 elsewhere, gradient of every trained parameter).

    The gradient of each token is another.
    """
    found = find(chunks, model, trained_batch(rows, chunks, **options))
    wanted = rows["weights"] != 0
    place = torch.arange(wanted.numel()).view(wanted.shape)
    size = chunks.size or wanted.shape[1]
    # the chunks one after the other, and through the rows of each: the order of batch.targets
    order = torch.cat([p[w] for p, w in zip(place.split(size, 1), wanted.split(size, 1), strict=True)])
    generator = torch.Generator().manual_seed(5)
    scales = torch.randn(wanted.numel(), generator=generator).to(found.dtype)[order]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found_gradients = torch.autograd.grad(found, parameters.values(), scales, allow_unused=True)
    everywhere = found.new_zeros(wanted.numel()).index_copy(0, order, found.detach())
    return everywhere, dict(zip(parameters, found_gradients, strict=True))


def of_all_logits(chunks, model, batch):
    """The specification: torch's log_softmax of the logits of whole rows."""
    logits, _ = model(batch.ids, None, batch.reset)
    chosen = logits.flatten(0, 1)[batch.where].log_softmax(-1)
    return chosen.gather(1, batch.targets[:, None])[:, 0]


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("peft", [True, False])
def test_chunks_of_any_size_have_the_tokens_and_gradients_of_whole_rows(version, peft):
    model, batch = make_model(version, peft=peft), make_batch(ROWS)
    want = results(model, batch, Chunks(), find=of_all_logits)
    same(results(model, batch, Chunks()), want, 1e-11)
    for size, sparse in ((7, True), (34, False)):
        same(results(model, batch, Chunks(size, sparse=sparse)), want, 1e-11)
    same(results(model, batch, Chunks(16), width=60), want, 1e-11)
    with torch.no_grad():
        chunks = Chunks(8)
        found = chunks.log_probs(model, trained_batch(batch, chunks))
        assert not found.requires_grad and found.dtype == torch.float64


def test_a_truncated_gradient_stops_at_every_so_many_tokens():
    model, batch = make_model(7), make_batch(ROWS)
    want = results(model, batch, Chunks(16, 16))
    for size, sparse in ((8, True), (4, False)):
        same(results(model, batch, Chunks(size, 16, sparse)), want, 1e-12)
    exact = results(model, batch, Chunks())
    close("ln p", want[0], exact[0], 1e-12)
    assert any((exact[1][name] - dp).norm() > 1e-3 * dp.norm() for name, dp in want[1].items())


def test_a_trained_initial_state_gets_its_gradient_through_all_chunks():
    model, batch = tuned_model(), make_batch([[35], [3, 30]])
    want = results(model, batch, Chunks())
    assert want[1]["start"].abs().max() > 1e-3
    same(results(model, batch, Chunks(4, sparse=True)), want, 1e-12)


@pytest.mark.parametrize("version", [6, 7])
def test_single_precision_and_the_native_kernels(version):
    batch = make_batch([[100, 31], [131], [1, 63, 64]])
    exact = results(make_model(version), batch, Chunks())
    model = make_model(version, torch.float32, "cpu")
    for model.grad_cp in (0, 1, 2):
        same(results(model, batch, Chunks(64 * (model.grad_cp < 2))), exact, 2e-5)


@pytest.mark.parametrize("quant", ["", "int8", "nf4"])
def test_half_precision_and_quantised_bases(quant):
    """As near to the whole row as bf16 is to itself in another order."""
    model, batch = make_model(7, torch.float32, "cpu", n_embd=64), make_batch([[40, 24], [64]])
    if quant:
        model.quantise(quant, torch.bfloat16)
    else:
        model.computes_in = torch.bfloat16
    want, got = (results(model, batch, chunks) for chunks in (Chunks(), Chunks(16)))
    assert got[0].dtype == torch.float32 and want[0].min() < -1
    same(got, want, 6e-2)


def test_a_batch_for_other_chunks_is_refused():
    model, batch = make_model(7), trained_batch(make_batch(ROWS), Chunks(8))
    with pytest.raises(ValueError, match="made for chunks of 8 tokens, expected 4; give"):
        Chunks(4).log_probs(model, batch)
