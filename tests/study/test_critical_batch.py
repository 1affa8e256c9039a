from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.study.critical_batch import fit_critical_batch

SIZES = [16, 64, 256, 1024, 4096]


@given(st.floats(1, 1e4), st.floats(0.01, 100))
def test_what_follows_the_law_is_found(min_steps: float, ratio: float):
    min_samples = min_steps * 256 * ratio
    fit = fit_critical_batch(SIZES, [min_steps + min_samples / size for size in SIZES])
    assert fit is not None and fit.error < 1e-6
    assert fit.batch_size == pytest.approx(256 * ratio, rel=1e-3)
    for size in SIZES:
        steps = fit.steps(size)
        assert steps == pytest.approx(min_steps + min_samples / size, rel=1e-6)
        # McCandlish et al., equation 2.11
        assert (steps / fit.min_steps - 1) * (size * steps / fit.min_samples - 1) == pytest.approx(1, rel=1e-6)


def test_at_the_critical_size_a_run_takes_twice_the_fewest_of_both():
    fit = fit_critical_batch([10, 1000], [100 + 50_000 / 10, 100 + 50_000 / 1000])
    assert fit is not None and fit.batch_size == pytest.approx(500)
    assert fit.steps(500) == pytest.approx(200) and 500 * fit.steps(500) == pytest.approx(100_000)


def test_one_size_says_nothing():
    assert fit_critical_batch([64, 64], [10, 11]) is None
