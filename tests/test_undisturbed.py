"""A look at a model within its training, as evaluations and the reference's pass take it."""

import torch
from torch import nn

from src.sources.policy import undisturbed


def test_a_look_has_no_dropout_and_no_gradient_and_draws_nothing_of_the_training():
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3).eval())
    modes = [module.training for module in model.modules()]
    x = torch.arange(10.0).reshape(2, 5)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed(model, torch.device("cpu")):
        first, second = model(x), model(x)
        torch.rand(11)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
