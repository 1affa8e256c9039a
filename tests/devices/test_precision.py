"""Less than float32: real torch.autocast on the CPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import nn

from distrain.config import OptimizerConfig
from distrain.devices import Arithmetic, HostDevice
from distrain.errors import DivergenceError
from distrain.exchange.layout import Layout
from distrain.exchange.memory import Published, PushSlots
from distrain.server.loop import LoopSettings
from tests.server.test_loop import source
from tests.support.runs import Job, open_run, start_worker, task, train

TOO_LARGE = 2.0**18  # a first scale that overflows fp16 for a few steps


def job(precision: str, num_workers: int = 1, **loop) -> Job:
    settings = LoopSettings(**{"epochs": 3, "num_workers": num_workers, **loop})
    return Job(
        source(),
        task({"hidden": [8], "normalization": "batch"}),
        source(50, shuffle=False),
        loop=settings,
        arithmetic=Arithmetic(precision),
        first_loss_scale=TOO_LARGE if precision == "fp16" else None,
    )


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, int], tuple]:
    return {
        (precision, k): train(job(precision, staleness=k))
        for precision, k in (("fp32", 0), ("bf16", 0), ("fp16", 0), ("fp16", 1))
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_learns_as_fp32_does_but_for_rounding(undisturbed, precision: str):
    (run, report), (exact, exact_report) = undisturbed[precision, 0], undisturbed["fp32", 0]
    assert run.outcome.parameters_sha256 != exact.outcome.parameters_sha256
    first, last = (report.validations[at].metrics["loss"] for at in (0, -1))
    assert last < first
    if precision == "bf16":  # in fp16 the updates left out are missing
        assert last == pytest.approx(exact_report.validations[-1].metrics["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "staleness", "num_workers", "links"),
    [("bf16", 0, 3, "unix"), ("fp16", 0, 2, "unix"), ("fp16", 0, 3, "tcp"), ("fp16", 1, 3, "unix")],
)
def test_the_same_bits_at_any_worker_count(undisturbed, precision: str, staleness: int, num_workers: int, links: str):
    expected, expected_report = undisturbed[precision, staleness]
    run, report = train(job(precision, num_workers, staleness=staleness), num_workers, links)
    assert run.outcome.parameters_sha256 == expected.outcome.parameters_sha256
    assert [r.loss_scale for r in report.steps] == [r.loss_scale for r in expected_report.steps]


def test_overflow_leaves_updates_out_and_the_scale_finds_its_place(undisturbed):
    steps = undisturbed["fp16", 0][1].steps
    skipped = [r.step for r in steps if r.overflowed]
    assert skipped[0] == 1 and steps[0].loss_scale == TOO_LARGE
    assert 2 <= len(skipped) < len(steps) / 2
    for before, after in itertools.pairwise(steps):
        if before.overflowed:
            assert after.loss_scale == before.loss_scale / 2
    assert any(a.loss_scale == 2 * b.loss_scale for b, a in itertools.pairwise(steps)), "it grew again"
    assert [r.samples for r in steps] == ([16] * 8 + [9]) * 3, "the rows of a step that is left out still count"


def resumed(the_job: Job, stop: int) -> str:
    """The hash of a job that two workers took to step `stop` and one from there."""
    loop = replace(the_job.loop, num_workers=2, max_steps=stop)
    first, _ = train(replace(the_job, loop=loop), 2)
    snapshot = None
    while (following := first.reports.take_snapshot()) is not None:
        snapshot = following
    run = open_run(the_job)
    run.loop.restore(stop, load(snapshot.model), snapshot.state, load(snapshot.optimizer))
    start_worker(run, the_job, 0)
    return run.loop.run().parameters_sha256


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("stop", [2, 13])
def test_resumed_it_has_the_same_bits(undisturbed, staleness: int, stop: int):
    expected = undisturbed["fp16", staleness][0].outcome.parameters_sha256
    assert resumed(job("fp16", staleness=staleness), stop) == expected


class SteepAtZero(nn.Module):
    """The loss is finite, and its gradient is not: that of a square root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features * self.weight).sum(1).abs().sqrt()


def steep() -> nn.Module:
    return SteepAtZero()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_that_no_scale_makes_finite_is_divergence(precision: str):
    the_job = replace(job(precision), task=task({"factory": f"{__name__}:steep"}), validation=None)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with pytest.raises(DivergenceError, match=r"the gradient is not finite"):
        run.loop.run()
    left_out = [record for record in run.reports.drain().steps if record.overflowed]
    assert len(left_out) == (24 if precision == "fp16" else 0)


def test_an_update_left_out_changes_nothing():
    the_job = replace(job("fp16", max_steps=1), optimizer=OptimizerConfig(name="SGD", lr=0.1))
    run = open_run(the_job)
    before = {name: tensor.clone() for name, tensor in run.server.model.state_dict().items()}
    start_worker(run, the_job, 0)
    run.loop.run()
    assert run.reports.drain().steps[0].overflowed
    for name, tensor in run.server.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def gradient(precision: str, scale: float) -> torch.Tensor:
    """Of a loss so small that fp16 has no number for its gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    layout = Layout.of(model)
    published, slots, device = Published(layout), PushSlots(layout, 1), HostDevice()
    published.adopt_parameters(model, copy_in=True)
    device.open(model, layout, [published], slots)
    device.read(0, 0)
    device.begin(0, scale, lambda span: None)
    outputs = Arithmetic(precision).outputs(model, {"features": torch.randn(16, 4)}, "cpu")
    assert outputs.dtype == torch.float32
    device.backward((outputs * 1e-9).sum(), True)
    device.finish(16)
    return slots[0].clone()


def test_the_scale_saves_small_gradients_and_is_divided_out_again():
    exact = gradient("fp32", 0.0)
    torch.testing.assert_close(gradient("fp16", 2.0**20), exact, rtol=0.02, atol=1e-11)
    assert gradient("fp16", 0.0).abs().sum() < 0.5 * exact.abs().sum(), "without it they are gone"
    assert torch.equal(gradient("fp32", 2.0**20), exact), "a power of two costs no bit"


def test_the_model_computes_in_bf16_in_validation_too():
    seen: set[tuple[bool, torch.dtype]] = set()
    model = nn.Linear(4, 1)
    model.register_forward_hook(lambda module, _, output: seen.add((module.training, output.dtype)))
    batch = {"features": torch.randn(2, 4)}
    for mode in (True, False):
        assert Arithmetic("bf16").outputs(model.train(mode), batch, "cpu").dtype == torch.float32
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_deterministic_kernels_on_request():
    code = """
import os, torch
from distrain.devices import Arithmetic
Arithmetic().prepare_process()
assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
Arithmetic(deterministic=True).prepare_process()
assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
