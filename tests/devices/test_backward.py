"""Gradients are there bucket by bucket while backward goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distrain.devices import HostDevice
from distrain.errors import TrainingError
from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published, PushSlots

ROWS = torch.arange(24.0).reshape(2, 4, 3) / 24  # two pieces of a microbatch


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 16)


class Net(nn.Module):
    """Four layers. The second is frozen, and the loss does not depend on the third; normalized, it has buffers."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.layers[1].requires_grad_(False)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.spy = lambda _: None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](features)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.spy(gradient))
        return self.layers[3](self.norm(self.layers[1](hidden)))


def opened(model: nn.Module) -> tuple[HostDevice, PushSlots, Layout]:
    layout, device = Layout.of(model), HostDevice()
    published, slots = Published(layout), PushSlots(layout, 2)
    published.adopt_parameters(model, copy_in=True)
    published.store_buffers(model)
    device.open(model, layout, [published], slots, early=True)
    slots[1].fill_(7.0)
    device.read(0, 0)
    return device, slots, layout


@pytest.mark.parametrize("scale", [0.0, 1024.0])
@pytest.mark.parametrize("norm", [False, True])
def test_a_bucket_is_told_of_once_as_soon_as_nothing_is_added_to_it(scale: float, norm: bool):
    torch.manual_seed(0)
    model, reference = Net(norm), Net(norm)
    reference.load_state_dict(model.state_dict())
    device, slots, layout = opened(model)
    told: list[Span] = []
    seen: list[int] = []

    def there(span: Span) -> None:
        told.append(span)
        snapshot[span] = slots[1][span.start : span.stop].clone()

    snapshot: dict[Span, torch.Tensor] = {}
    model.spy = lambda _: seen.append(len(told))
    device.begin(1, scale, there)
    for number, rows in enumerate(ROWS):
        device.backward(model(rows).square().sum(), number == 1)
        reference(rows).square().sum().backward()
    assert seen == [0, 2 + 2 * norm], (
        "the last layer's weight and bias, and the norm's, while the first one's are to come"
    )
    device.finish(4)
    assert sorted(told, key=lambda span: span.start)[0].start == 0
    assert sum(map(len, told)) == layout.num_floats == len(set().union(*(range(s.start, s.stop) for s in told)))
    assert all(torch.equal(slots[1][span.start : span.stop], values) for span, values in snapshot.items())
    for entry, parameter in zip(layout.parameters, reference.parameters(), strict=True):
        got = slots[1][entry.start : entry.start + entry.numel].view(entry.shape)
        assert torch.equal(got, torch.zeros(entry.shape) if parameter.grad is None else parameter.grad), entry.name
    for entry in layout.float_buffers:
        change = 4 * (reference.get_buffer(entry.name) - Net(norm).get_buffer(entry.name))
        got = slots[1][entry.start : entry.start + entry.numel].view(entry.shape)
        torch.testing.assert_close(got, change, msg=entry.name)


class Tied(nn.Module):
    """The same layer inside of a checkpoint and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_reentrant = True

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.other(features))
        return self.layer(checkpoint(self.layer, hidden, use_reentrant=self.use_reentrant))


def test_a_gradient_in_several_parts_is_refused_by_name():
    model = Tied()
    device, _, _ = opened(model)
    device.begin(0, 0.0, lambda span: None)
    with pytest.raises(
        TrainingError, match=r"^the gradient of layer\.(weight|bias) comes in several parts.*use_reentrant=F"
    ):
        device.backward(model(ROWS[0]).sum(), True)


def test_a_gradient_summed_up_by_autograd_is_one():
    model, reference = Tied(), Tied()
    reference.load_state_dict(model.state_dict())
    model.use_reentrant = reference.use_reentrant = False
    device, slots, layout = opened(model)
    device.begin(0, 0.0, lambda span: None)
    device.backward(model(ROWS[0]).sum(), True)
    device.finish(4)
    reference(ROWS[0]).sum().backward()
    for entry in layout.parameters:
        got = slots[0][entry.start : entry.start + entry.numel].view(entry.shape)
        assert torch.equal(got, reference.get_parameter(entry.name).grad), entry.name
    assert all(parameter.grad is None for parameter in model.parameters()), "its memory is free for the next one's"
