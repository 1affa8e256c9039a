from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import OptimizerConfig
from distrain.data.plan import Plan
from distrain.server.loop import LoopSettings
from distrain.study.noise_scale import EVERY_STEPS, NoiseScale
from distrain.worker import Source
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, task, train


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.floats(0.1, 100), st.floats(0.1, 100))
def test_expected_norms_give_noise_and_signal_back(sizes: list[int], noise: float, signal: float):
    rows = sum(sizes)
    found = NoiseScale()
    squares = signal * sum(size**2 for size in sizes) + noise * rows
    found.add(squares, signal * rows**2 + noise * rows, sizes)
    if sum(size > 0 for size in sizes) < 2:
        assert found.now is found.overall is None
    else:
        assert found.now == pytest.approx(noise / signal, rel=1e-6)
        assert found.overall == pytest.approx(noise / signal, rel=1e-6)


def test_what_is_not_finite_or_drowns_in_noise_gives_nothing():
    found = NoiseScale()
    found.add(float("inf"), 1.0, [1, 1])
    assert found.now is None
    found.add(3.0, 1.0, [1, 1])  # the step's norm is below what noise alone would give
    assert found.now is None


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_whole_run_finds_the_exact_value_of_a_quadratic(num_workers: int):
    """Linear regression with squared error: the rows' gradients at the initial weights give it exactly."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8192, 4)).astype(np.float32)
    label = (features @ np.array([1.0, -2.0, 0.5, 0.0]) + rng.normal(size=8192)).astype(np.float32)
    dataset = ArrayDataset(features, label, 1024, 1024)
    source = Source(dataset, Plan(dataset.row_counts, 64, 4, 4096))  # type: ignore[arg-type]
    still = OptimizerConfig(name="SGD", lr=1e-12)
    job = Job(source, task({"hidden": []}), optimizer=still, loop=LoopSettings(epochs=12, num_workers=num_workers))
    run, report = train(job, num_workers)
    weight, bias = (p.detach().numpy() for p in run.server.model.parameters())
    error = features @ weight[0] + bias[0] - label
    gradients = 2 * error[:, None] * np.concatenate([features, np.ones((8192, 1))], axis=1)  # of each row
    mean = gradients.mean(axis=0)
    exact = ((gradients - mean) ** 2).sum() / 8192 / (mean**2).sum()
    assert len(report.steps) == 12 * 128
    assert report.steps[EVERY_STEPS].critical_batch_size is not None
    assert report.steps[-1].critical_batch_size == pytest.approx(exact, rel=0.1)
