"""A device with memory of its own: the same bits as the host's, every copy waited for, none too early."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from distrain.config import LossConfig, ModelConfig
from distrain.data.plan import Plan
from distrain.devices import HostDevice, StreamedDevice
from distrain.devices.device import Batch
from distrain.devices.streamed import Brought
from distrain.errors import DistrainError
from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published, PushSlots
from distrain.learning.task import TaskSpec
from distrain.server.loop import LoopSettings
from distrain.worker import Source
from tests.support.accelerator import FakeGpu
from tests.support.datasets import ArrayDataset
from tests.support.nets import PartlyTrained, assert_holds_gradients
from tests.support.runs import Job, train


@pytest.fixture(scope="module", autouse=True)
def small_buckets() -> Iterator[None]:
    """Several of them in these models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", 16)
        yield


def job(num_workers: int, **loop) -> Job:
    """Classes, with batch normalization (floating-point and integer buffers) and class weights. And with dropout where
    there is one worker: threads share the host's generator."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(137, 4)).astype(np.float32)
    dataset = ArrayDataset(features, np.argmax(features[:, :3], axis=1), row_group_rows=17)
    source = Source(dataset, Plan(dataset.row_counts, 16, 4, shuffle_rows=40, seed=3))
    model = ModelConfig(hidden=[8, 6], dropout=0.2 if num_workers == 1 else 0.0, normalization="batch")
    task = TaskSpec(model, LossConfig(name="cross_entropy", class_weights=[1.0, 2.0, 0.5]), 4, 3, False, 0)
    settings = LoopSettings(**{"epochs": 2, "num_workers": num_workers, **loop})
    return Job(source, task, source, loop=settings)


@pytest.fixture(scope="module")
def on_the_host() -> dict[tuple[int, int], str]:
    """By number of workers and staleness."""
    cases = [(1, 0), (2, 0), (2, 1)]
    found = {case: train(job(case[0], staleness=case[1]), case[0])[0].outcome.parameters_sha256 for case in cases}
    return {**found, (3, 0): found[2, 0]}


@pytest.mark.parametrize(
    ("num_workers", "links", "staleness"), [(1, "unix", 0), (3, "unix", 0), (2, "tcp", 0), (2, "unix", 1)]
)
def test_streams_and_copies_change_no_bit(on_the_host, num_workers: int, links: str, staleness: int):
    gpus = [FakeGpu() for _ in range(num_workers)]
    devices = tuple(partial(StreamedDevice, gpu) for gpu in gpus)
    run, _ = train(replace(job(num_workers, staleness=staleness), devices=devices), num_workers, links)
    assert run.outcome.parameters_sha256 == on_the_host[num_workers, staleness]
    for gpu in gpus:
        assert gpu.log.count("depart") > gpu.log.count("load") > 0
        assert gpu.brought >= gpu.kept > 0
        assert not gpu.locked, "page-locked memory was given back"


def test_hosts_and_gpus_work_on_one_run(on_the_host):
    devices = (HostDevice, partial(StreamedDevice, FakeGpu()))
    run, report = train(replace(job(2), devices=devices), 2)
    assert run.outcome.parameters_sha256 == on_the_host[2, 0]
    assert {incarnation for record in report.steps for incarnation, *_ in record.taken} == {0, 1}


class ReadsTooEarly(StreamedDevice):
    def take(self, brought: Brought) -> Batch:
        return brought.batch


class PushesTooEarly(StreamedDevice):
    def _depart(self, span: Span) -> None:
        before = self._departures.record_event()
        super()._depart(span)
        self._departed[-1] = span, before


class CopiesTooEarly(StreamedDevice):
    def _depart(self, span: Span) -> None:
        with self._accelerator.on(self._departures):
            self._accelerator.copy(self._slots[0][span.start : span.stop], self._sums[span.start : span.stop])


class KeepsOldParameters(StreamedDevice):
    def read(self, version: int, round_number: int) -> None:
        if self._held is None:
            super().read(version, round_number)


@pytest.mark.parametrize("broken", [ReadsTooEarly, PushesTooEarly, CopiesTooEarly, KeepsOldParameters])
def test_the_fake_shows_up_what_was_not_waited_for(on_the_host, broken: type[StreamedDevice]):
    try:
        run, _ = train(replace(job(1), devices=(partial(broken, FakeGpu()),)))
    except DistrainError:
        return
    assert run.outcome.parameters_sha256 != on_the_host[1, 0]


PIECES = torch.arange(12.0).reshape(2, 2, 3)  # of a microbatch


def open_net(device: StreamedDevice) -> tuple[PartlyTrained, PushSlots, Layout]:
    """A net on the device, whose parameters are read, and slots, of which the second is not zero."""
    torch.manual_seed(0)
    model = PartlyTrained()
    layout = Layout.of(model)
    published, slots = Published(layout), PushSlots(layout, 2)
    published.adopt_parameters(model, copy_in=True)
    device.open(model, layout, [published], slots)
    slots[1].fill_(7.0)
    device.read(0, 0)
    return model, slots, layout


def after_pieces() -> PartlyTrained:
    """Such a net on the host, with the gradients of all of them."""
    torch.manual_seed(0)
    model = PartlyTrained()
    for rows in PIECES:
        model(rows).square().sum().backward()
    return model


@pytest.mark.parametrize("scale", [0.0, 1024.0])
def test_buckets_leave_while_backward_goes_on_and_what_has_no_gradient_is_zero(scale: float):
    gpu = FakeGpu()
    device = StreamedDevice(gpu)
    model, slots, layout = open_net(device)
    model.reached = lambda _: gpu.log.append("first layer")
    holds: list[Span] = []

    def there(span: Span) -> None:
        holds.append(span)
        gpu.log.append("there")
        assert not slots[1][span.start : span.stop].isnan().any()

    device.begin(1, scale, there)
    for number, rows in enumerate(PIECES):
        outputs = model(device.take(device.bring({"features": rows}))["features"])
        loss = outputs.square().sum()
        value = device.value(loss)
        device.backward(loss, number == 1)
        assert value() == loss.item(), "without a wait for what is computed after it"
        assert number == 1 or "depart" not in gpu.log, "more is added to them"
    assert gpu.log.count("fetch") == 2
    before = gpu.log[gpu.log.index("first layer") + 1 :]
    before = before[: before.index("first layer")]
    assert before.count("depart") == 2, "the last layer's weight and bias have left"
    assert slots[1][layout.parameters[-1].start].isnan() and not holds, "nobody waited yet"
    device.finish(4)
    assert sorted(holds, key=lambda span: span.start) == sorted(
        (bucket.span for bucket in layout.buckets), key=lambda span: span.start
    )
    assert holds[0] == layout.buckets[-1].span, "what left first is there first"
    assert_holds_gradients(slots[1], layout, after_pieces())
    assert len(gpu.locked) == 2, "only the slot that was used, and the parameters"


def test_a_round_reads_the_parameters_once():
    model = PartlyTrained()
    layout, gpu = Layout.of(model), FakeGpu()
    published = Published(layout)
    device = StreamedDevice(gpu)
    device.open(model, layout, [published], PushSlots(layout, 1))
    for round_number in (0, 0, 1):
        published.floats += 1.0
        device.read(0, round_number)
    assert gpu.log == ["load", "load"]
    assert model.first.weight[0, 0] == 3.0
