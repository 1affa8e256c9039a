"""Penalties and their gradients, against NumPy and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distrain.config import PenaltyConfig
from distrain.learning.models import MLP
from distrain.learning.penalties import build_penalty


@pytest.mark.parametrize("normalization", [None, "batch", "layer", "group"])
def test_value_and_gradient_are_those_of_the_formula(normalization: str | None):
    torch.manual_seed(0)
    model = MLP(4, [6, 3], 2, normalization=normalization)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    config = PenaltyConfig(l1=0.3, l2=0.07)
    penalty = build_penalty(model, config)
    assert penalty is not None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    value = penalty.add_gradient()
    found = {name: p.grad - 1 for name, p in model.named_parameters() if p.grad is not None}
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    exact = sum(0.3 * w.double().abs().sum() + 0.07 * w.double().square().sum() for w in weights)
    assert value == pytest.approx(float(exact), rel=1e-6)
    gradients = dict(zip((id(w) for w in weights), torch.autograd.grad(exact, weights), strict=True))
    for name, parameter in model.named_parameters():
        expected = gradients.get(id(parameter), torch.zeros_like(parameter))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_no_penalty_costs_nothing():
    assert build_penalty(MLP(4, [6], 2), PenaltyConfig()) is None
