"""Packing an optimizer and going on gives the same bits as going on without."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from distrain.errors import CheckpointError
from distrain.learning.model_state import copied
from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer, with_options

# Refused by the configuration: LBFGS needs a closure, SparseAdam sparse gradients.
REFUSED = {"Optimizer", "LBFGS", "SparseAdam"}
NAMES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in REFUSED
)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("Adam", {"fused": True, "betas": (0.8, 0.99)}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"foreach": True}),
    ("Adagrad", {"fused": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adafactor", {"eps": (None, 1e-3)}),
]


def build(name: str, options: dict[str, Any]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3, 7)] if name == "Muon" else [(7, 5), (7,), ()]  # Muon takes matrices only
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    options = {"lr": 0.01, **options}
    groups: list[dict[str, Any]] = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
    if "weight_decay" not in inspect.signature(getattr(torch.optim, name)).parameters:
        del groups[0]["weight_decay"]
    return parameters, getattr(torch.optim, name)(groups, **options)


def steps(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
@pytest.mark.parametrize("stop", [0, 3])
def test_continuing_equals_never_stopping(name: str, options: dict[str, Any], stop: int) -> None:
    expected, uninterrupted = build(name, options)
    steps(expected, uninterrupted, 0, 6)

    parameters, first = build(name, options)
    steps(parameters, first, 0, stop)
    packed, scalars = pack_optimizer(first)
    scalars = json.loads(json.dumps(scalars))

    again, second = build(name, options)
    with torch.no_grad():
        for new, old in zip(again, parameters, strict=True):
            new.copy_(old)
    unpack_optimizer(second, load(save(copied(packed))), scalars)
    assert str(second.state_dict()) == str(first.state_dict())
    steps(again, second, stop, 6)

    for new, old in zip(again, expected, strict=True):
        assert torch.equal(new, old)
    final, reference = ((save(copied(t)), s) for t, s in map(pack_optimizer, (second, uninterrupted)))
    assert final == reference


def test_a_parameter_without_gradients_keeps_no_state() -> None:
    parameters, optimizer = build("Adam", {})
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    packed, scalars = pack_optimizer(optimizer)
    _, other = build("Adam", {})
    unpack_optimizer(other, load(save(copied(packed))), json.loads(json.dumps(scalars)))
    assert list(other.state_dict()["state"]) == [0]


def test_restored_state_does_not_alias_the_checkpoint() -> None:
    parameters, optimizer = build("SGD", {"momentum": 0.9})
    steps(parameters, optimizer, 0, 1)
    packed, scalars = pack_optimizer(optimizer)
    tensors = load(save(copied(packed)))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    unpack_optimizer(optimizer, tensors, scalars)
    steps(parameters, optimizer, 1, 2)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_a_state_that_does_not_fit_is_refused() -> None:
    parameters, optimizer = build("Adam", {})
    steps(parameters, optimizer, 0, 1)
    packed, scalars = pack_optimizer(optimizer)
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(CheckpointError, match="does not fit Adam"):
        unpack_optimizer(other, load(save(copied(packed))), scalars)
    with pytest.raises(CheckpointError, match="does not fit Adam"):
        unpack_optimizer(optimizer, {}, scalars)


def test_groups_without_options_get_those_of_the_optimizer():
    weights, biases = [nn.Parameter(torch.ones(2)) for _ in range(2)], [nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=0.5)
    own = pack_optimizer(optimizer)[1]["param_groups"]
    assert with_options(optimizer, None) == own
    assert with_options(optimizer, [{"params": [0, 1]}, {"params": [2]}]) == own
    before = [{"params": [0, 1], "lr": 0.1}, {"params": [2], "lr": 0.1}]
    assert with_options(optimizer, before) == before
    for shifted in ([{"params": [0]}, {"params": [1, 2]}], [{"params": [0, 1, 2]}]):
        with pytest.raises(CheckpointError, match="does not fit SGD"):
            unpack_optimizer(optimizer, {}, {"state": [], "param_groups": with_options(optimizer, shifted)})
