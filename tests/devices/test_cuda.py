"""A real GPU, where there is one: what test_streamed.py and test_precision.py show with a fake one and on the CPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from distrain.config import OptimizerConfig
from distrain.devices import HostDevice, StreamedDevice
from distrain.devices.cuda import Cuda, cuda_problem
from distrain.errors import DistrainError
from tests.devices import test_precision, test_streamed
from tests.support.nets import assert_holds_gradients
from tests.support.runs import Job, open_run, start_worker, task, train

problem = cuda_problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(problem is not None, reason=f"no GPU: {problem}")]


class Watched(Cuda):
    """Notes whether host memory could be page-locked, and whether it was given back."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: list[bool] = []
        self.unlocked = 0
        every.append(self)

    def page_lock(self, tensor: torch.Tensor) -> bool:
        self.locked.append(super().page_lock(tensor))
        return self.locked[-1]

    def unlock(self, tensor: torch.Tensor) -> None:
        super().unlock(tensor)
        self.unlocked += 1


every: list[Watched] = []


def gpu() -> StreamedDevice:
    return StreamedDevice(Watched())


def on_gpus(job: Job) -> Job:
    every.clear()
    return replace(job, devices=(gpu,))


@pytest.mark.parametrize(
    ("precision", "staleness"), [("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1), ("fp16", 0), ("fp16", 1)]
)
def test_the_same_bits_at_any_worker_count_and_over_any_link(precision: str, staleness: int):
    found = {}
    for num_workers, links in ((1, "unix"), (2, "unix"), (3, "unix"), (2, "tcp")):
        the_job = on_gpus(test_precision.job(precision, num_workers, staleness=staleness))
        run, report = train(the_job, num_workers, links)
        found[num_workers, links] = (run.outcome.parameters_sha256, [r.loss_scale for r in report.steps])
        assert len(every) == num_workers
        for accelerator in every:
            assert accelerator.locked and all(accelerator.locked), "memory shared by descriptor can be page-locked"
            assert accelerator.unlocked == len(accelerator.locked)
    assert len({str(value) for value in found.values()}) == 1, found


def comparable(job: Job) -> Job:
    """No dropout, which a GPU draws otherwise; and no Adam, which makes whole steps of gradients that are nothing but
    rounding, as those of biases before batch normalization are."""
    model = job.task.model.model_copy(update={"dropout": 0.0})
    return replace(job, task=replace(job.task, model=model), optimizer=OptimizerConfig(name="SGD", lr=0.1))


@pytest.mark.parametrize("devices", [(gpu,), (HostDevice, gpu)])
def test_it_ends_where_the_cpu_does_but_for_rounding(devices):
    job = comparable(test_streamed.job(2))
    host, _ = train(job, 2)
    run, report = train(replace(job, devices=devices), 2)
    assert {incarnation for record in report.steps for incarnation, *_ in record.taken} == {0, 1}
    for expected, got in zip(host.server.model.parameters(), run.server.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_dropout_draws_by_seed_step_and_shard():
    first, again = (train(on_gpus(test_streamed.job(1)))[0].outcome.parameters_sha256 for _ in range(2))
    assert first == again


@pytest.mark.parametrize("stop", [2, 13])
def test_resumed_it_has_the_same_bits(stop: int):
    undisturbed = train(on_gpus(test_precision.job("fp16")))[0].outcome.parameters_sha256
    job = on_gpus(test_precision.job("fp16"))
    assert test_precision.resumed(job, stop) == undisturbed


@pytest.mark.parametrize("scale", [0.0, 1024.0])
def test_what_has_no_gradient_is_zero(scale: float):
    device = gpu()
    model, slots, layout = test_streamed.open_net(device)
    device.begin(1, scale, lambda span: None)
    for number, rows in enumerate(test_streamed.PIECES):
        outputs = model(device.take(device.bring({"features": rows}))["features"])
        device.backward(outputs.square().sum(), number == 1)
    device.finish(4)
    assert_holds_gradients(slots[1], layout, test_streamed.after_pieces(), rtol=1e-5, atol=1e-5)
    device.close()


class TooLarge(nn.Module):
    """Asks for more of the GPU's memory than any has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs = self.linear(features)
        if features.is_cuda:
            outputs = outputs + torch.zeros(1 << 44, device=features.device).sum()
        return outputs


def too_large() -> nn.Module:
    return TooLarge()


def test_a_gpu_out_of_memory_ends_the_run_by_name():
    the_job = on_gpus(
        replace(test_precision.job("fp32"), task=task({"factory": f"{__name__}:too_large"}), validation=None)
    )
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with pytest.raises(DistrainError, match=r"CUDA out of memory"):
        run.loop.run()


def test_a_run_leaves_none_of_the_gpus_memory_behind():
    train(on_gpus(test_streamed.job(2)), 2)
    every.clear()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        train(on_gpus(test_streamed.job(2)), 2)
        every.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
