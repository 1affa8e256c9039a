"""Clipping bounds what it says, changes nothing the second time, and never overflows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import ClipConfig
from distrain.learning.clipping import PIECE, clip_, global_norm


@given(size=st.integers(1, 3 * PIECE), scale=st.floats(1e-6, 1e6), bound=st.floats(1e-3, 10))
def test_the_norm_is_bounded_and_clipping_twice_changes_nothing(size: int, scale: float, bound: float):
    gradients = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    norm = global_norm(gradients)
    assert norm == pytest.approx(gradients.double().norm().item(), rel=1e-12)
    clipped = clip_(gradients, ClipConfig(norm=bound), norm)
    assert clipped == (norm > bound)
    assert global_norm(gradients) <= bound * (1 + 1e-6)
    again = gradients.clone()
    clip_(again, ClipConfig(norm=bound * (1 + 1e-6)), global_norm(again))
    assert torch.equal(again, gradients)


def test_large_finite_values_do_not_overflow_and_what_is_not_finite_shows():
    assert global_norm(torch.full((100_000,), 3e30)) == pytest.approx(3e30 * math.sqrt(100_000))
    assert not math.isfinite(global_norm(torch.tensor([1.0, float("inf")])))
    assert not math.isfinite(global_norm(torch.tensor([1.0, float("nan")])))


def test_the_norm_does_not_depend_on_the_number_of_threads():
    gradients, before = torch.randn(500_000), torch.get_num_threads()
    norms = set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        norms.add(global_norm(gradients))
    torch.set_num_threads(before)
    assert len(norms) == 1


def test_clipping_by_value():
    gradients = torch.tensor([-3.0, 0.1, 2.0])
    assert clip_(gradients, ClipConfig(value=1.0), 0.0)
    assert gradients.tolist() == pytest.approx([-1.0, 0.1, 1.0])
    assert not clip_(gradients, ClipConfig(value=1.0), 0.0)
    assert not clip_(gradients, None, 9.0)
