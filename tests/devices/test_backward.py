"""Gradients are there bucket by bucket while backward goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distrain.config import LossConfig, ModelConfig
from distrain.data.plan import Plan
from distrain.devices import HostDevice, StreamedDevice
from distrain.errors import TrainingError
from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published, PushSlots
from distrain.learning.task import TaskSpec
from distrain.worker import Source
from tests.support.accelerator import FakeGpu
from tests.support.datasets import ArrayDataset
from tests.support.nets import PartlyTrained, assert_holds_gradients
from tests.support.runs import Job, train

ROWS = torch.arange(24.0).reshape(2, 4, 3) / 24  # two pieces of a microbatch


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 16)


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
    model, reference = PartlyTrained(norm), PartlyTrained(norm)
    reference.load_state_dict(model.state_dict())
    device, slots, layout = opened(model)
    told: list[Span] = []
    seen: list[int] = []

    def there(span: Span) -> None:
        told.append(span)
        snapshot[span] = slots[1][span.start : span.stop].clone()

    snapshot: dict[Span, torch.Tensor] = {}
    model.reached = lambda _: seen.append(len(told))
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
    assert_holds_gradients(slots[1], layout, reference)
    for entry in layout.float_buffers:
        change = 4 * (reference.get_buffer(entry.name) - PartlyTrained(norm).get_buffer(entry.name))
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
    assert_holds_gradients(slots[0], layout, reference)
    assert all(parameter.grad is None for parameter in model.parameters()), "its memory is free for the next one's"


class Words(nn.Module):
    """Features that count as words."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(30, 8, sparse=sparse), nn.Linear(8, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.embedding(features.long()).mean(1))


def words(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return Words(sparse)


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("device", [HostDevice, lambda: StreamedDevice(FakeGpu())])
def test_a_sparse_gradient_is_the_dense_one(scale: float | None, device):
    rng = np.random.default_rng(0)
    dataset = ArrayDataset(rng.integers(0, 30, (100, 4)).astype(np.float32), rng.random(100, np.float32), 20)
    source = Source(dataset, Plan(dataset.row_counts, 16, 2, shuffle_rows=40))

    def bits(sparse: bool, num_workers: int) -> str:
        model = ModelConfig(factory="tests.devices.test_backward:words", args={"sparse": sparse})
        spec = TaskSpec(model, LossConfig(name="mse"), 4, 1, False, 0)
        return train(Job(source, spec, first_loss_scale=scale, devices=(device,)), num_workers)[
            0
        ].outcome.parameters_sha256

    assert bits(True, 1) == bits(True, 2) == bits(False, 1)
