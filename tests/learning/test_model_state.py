"""Weights go to bytes and back exactly, tied and shared ones too; the fingerprint sees every bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from distrain.errors import CheckpointError, TrainingError
from distrain.learning.fingerprint import parameters_sha256
from distrain.learning.model_state import copied, model_state, restore_model, transient_buffers


def save_model(model: nn.Module) -> bytes:
    return save(copied(model_state(model)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 4)
        self.out.weight = self.embed.weight


def flat_views(model: nn.Module) -> torch.Tensor:
    """Make every parameter a view into one buffer, as the server does."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat


def test_tied_and_shared_tensors_round_trip_in_place() -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    flat_views(model)
    model.norm.running_mean.fill_(3.0)
    target = flat_views(other)
    restore_model(other, load(save_model(model)), {})
    assert parameters_sha256(other) == parameters_sha256(model)
    assert other.out.weight is other.embed.weight
    assert torch.equal(target[:16], model.embed.weight.detach().reshape(-1))  # the views are views still


def test_strided_and_integer_tensors_round_trip() -> None:
    model = nn.Module()
    model.register_buffer("transposed", torch.arange(6.0).view(2, 3).T)
    model.register_buffer("count", torch.tensor(2**40 + 1))
    model.register_buffer("nothing", torch.empty(0, 3))
    back = load(save_model(model))
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == {
        name: (t.shape, t.dtype) for name, t in model.state_dict().items()
    }
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_named() -> None:
    tensors = load(save_model(nn.Linear(3, 2)))
    with pytest.raises(CheckpointError, match=r"weight: \[2, 3\] in the checkpoint, \[2, 4\] in the model"):
        restore_model(nn.Linear(4, 2), tensors, {})
    with pytest.raises(CheckpointError, match="bias: not in the model"):
        restore_model(nn.Linear(3, 2, bias=False), tensors, {})
    with pytest.raises(CheckpointError, match=r"0\.weight: not in the checkpoint"):
        restore_model(nn.Sequential(nn.Linear(3, 2)), tensors, {})


class Counting(nn.Module):
    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(False), persistent)
        self.register_buffer("mean", torch.zeros(2), persistent)


def test_buffers_beside_the_model_are_restored_and_others_are_as_they_were_built() -> None:
    model = Counting()
    assert list(transient_buffers(model)) == ["seen", "mean"] and not transient_buffers(nn.BatchNorm1d(2))
    restore_model(model, {}, {"buffer.seen": torch.tensor(1), "trained.mean": torch.ones(2)})
    assert model.seen and model.seen.dtype == torch.bool and not model.mean.any()
    with pytest.raises(CheckpointError, match=r"mean: \[3\] in the checkpoint, \[2\] in the model"):
        restore_model(model, {}, {"buffer.mean": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="other: not in the model"):
        restore_model(model, {}, {"buffer.other": torch.zeros(3)})


def test_a_buffer_may_have_been_saved_on_the_other_side() -> None:
    saved = {"seen": torch.tensor(True), "mean": torch.ones(2)}
    beside = {f"buffer.{name}": tensor for name, tensor in saved.items()}
    for persistent, where in ((False, (saved, {})), (True, ({}, beside))):
        model = Counting(persistent)
        restore_model(model, *where)
        assert model.seen and torch.equal(model.mean, torch.ones(2))


def test_state_that_is_no_tensor_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(TrainingError, match="_extra_state, a dict"):
        model_state(Extra(2, 2))


def test_fingerprint_is_over_parameters_then_buffers() -> None:
    model = Tied()
    expected = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        expected.update(tensor.detach().numpy().astype(np.dtype("<f4")).tobytes())
    assert parameters_sha256(model) == expected.hexdigest()
    with torch.no_grad():
        model.norm.running_var[0] = torch.nextafter(model.norm.running_var[0], torch.tensor(9.0))
    assert parameters_sha256(model) != expected.hexdigest()
