"""Adapters inside somebody else's torch.autocast, as every script of Hugging Face has it: all methods and
options, backward() in it or not.
"""

import copy

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import AdapterLinear, adapted_linears
from rwkv_miss.functional import linear
from rwkv_miss.quantised import quantise_

from .conftest import close
from .test_adapters import each_case, filled, fitting
from .test_transformers import batch, make, needs_transformers

HALVES = pytest.mark.parametrize(
    "dtype,tolerance",
    [
        (
            torch.bfloat16,
            6e-2,
        ),  # steps of 2^-8; the gradient of VeRA's d, where most cancels, was off by 3.7e-2
        (torch.float16, 8e-3),  # steps of 2^-11
    ],
)


def adapted(method, options, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias))
    rwkv_miss.inject(model, method, targets=["0"], rank=fitting(method, options, 4, 24, 16), **options)
    return filled(model)


def results(layer, x, dy, dtype=None, backward_inside=False, forward=None):
    """y, and the gradients of x and of all that is trained."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = (forward or layer)(x)
        if backward_inside:
            grads = torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))
    if not backward_inside:
        grads = torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))
    return [y, *grads]


@HALVES
@each_case
def test_every_method_computes_in_its_dtype_and_near_fp32(method, options, dtype, tolerance):
    model = adapted(method, options)
    model[0].bias.requires_grad_(True)
    x, dy = torch.randn(40, 24), torch.randn(40, 16)
    want = results(model[0], x, dy)
    for inside in (False, True):
        got = results(model[0], x, dy, dtype, inside)
        assert got[0].dtype == dtype and [g.dtype for g in got[1:]] == [torch.float32] * (len(got) - 1)
        for i, (mine, other) in enumerate(zip(got, want, strict=True)):
            close(f"result {i}", mine.float(), other, tolerance)
    by_definition = results(model[0], x, dy, dtype, forward=lambda x: AdapterLinear.forward(model[0], x))
    assert by_definition[0].dtype == dtype
    close("the class's own forward", by_definition[0].float(), want[0], tolerance)
    model[0].bias.requires_grad_(False)
    with rwkv_miss.disabled(model), torch.autocast("cpu", dtype):
        assert model(x).dtype == dtype


@HALVES
@each_case
def test_it_is_what_the_layer_computes_by_itself_in_that_dtype(method, options, dtype, tolerance):
    """To the bit: an autocast around the operators changes the dtype of their input and nothing else."""
    model = adapted(method, options, bias=False)
    x, dy = torch.randn(7, 24), torch.randn(7, 16)
    want = results(model[0], x.to(dtype), dy)
    for inside in (False, True):
        for mine, other in zip(results(model[0], x, dy, dtype, inside), want, strict=True):
            assert torch.equal(mine, other.to(mine.dtype))


@each_case
def test_fp64_stays(method, options):
    model = adapted(method, options).double()
    x, dy = torch.randn(7, 24).double(), torch.randn(7, 16).double()
    for mine, other in zip(
        results(model[0], x, dy, torch.bfloat16, True), results(model[0], x, dy), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base(kind):
    model = adapted("miss", {})
    quantise_([model[0]], kind)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = model(x), linear(x, model[0].weight, model[0].bias)
    assert y.dtype == plain.dtype == torch.bfloat16
    close("y", y.float(), model(x), 2e-2)


def test_the_penalty_of_adalora_is_not_rounded():
    model = adapted("adalora", {})
    with torch.autocast("cpu", torch.bfloat16):
        inside = rwkv_miss.penalty(model)
    assert torch.equal(inside, rwkv_miss.penalty(model))


def test_the_parameter_is_kept_for_the_backward_and_no_cast_copy():
    model, saved = adapted("miss", {}), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        model(torch.randn(5, 24, requires_grad=True))
    assert {t.data_ptr() for t in saved if t.shape == model[0].weight.shape} == {model[0].weight.data_ptr()}


@needs_transformers
@HALVES
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_of_transformers_trains_in_it(name, dtype, tolerance):
    base = make(name)
    for method in ("miss", "lora", "dora", "pissa", "vera", "bat"):
        model = copy.deepcopy(base)
        rwkv_miss.inject(model, method, targets=["q_proj", "o_proj", "down_proj"], rank=2)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
        losses = []
        for _ in range(4):
            with torch.autocast("cpu", dtype):
                loss = model(**batch(name)).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], (method, losses)
        with torch.no_grad():
            with torch.autocast("cpu", dtype):
                half = model(**batch(name)).logits
            # an error of two layers, with their attention
            close(method, half.float(), model(**batch(name)).logits, 10 * tolerance)
        assert len(adapted_linears(model)) == 6
