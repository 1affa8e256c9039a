"""Gradient noise: its temperature, its draws, and that they depend on seed, step and tensor alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import GradientNoiseConfig
from distrain.errors import ConfigError
from distrain.learning.annealing import GradientNoise


@given(eta=st.floats(1e-4, 1), gamma=st.floats(0, 1), step=st.integers(0, 10**6))
def test_the_deviation_is_that_of_the_paper(eta: float, gamma: float, step: int):
    noise = GradientNoise(GradientNoiseConfig(eta=eta, gamma=gamma), 0)
    assert noise.deviation(step) == pytest.approx(math.sqrt(eta / (1 + step) ** gamma))


def test_draws_are_normal_with_that_deviation():
    noise, gradient = GradientNoise(GradientNoiseConfig(eta=0.3), 1), torch.full((200_000,), 2.0)
    noise.add_(gradient, 9, 0)
    added = gradient.double() - 2.0
    assert float(added.mean()) == pytest.approx(0, abs=0.004)
    assert float(added.std()) == pytest.approx(noise.deviation(9), rel=0.01)
    assert float((added.abs() > 2 * added.std()).double().mean()) == pytest.approx(0.0455, abs=0.003)


def test_draws_depend_on_seed_step_and_tensor_alone():
    def drawn(seed: int, *steps: int, tensor: int = 0) -> torch.Tensor:
        noise = GradientNoise(GradientNoiseConfig(), seed)
        for step in steps:
            gradient = torch.zeros(100)
            noise.add_(gradient, step, tensor)
        return gradient

    assert torch.equal(drawn(3, 0, 1, 7), drawn(3, 7))
    assert not torch.equal(drawn(3, 7), drawn(3, 8)) and not torch.equal(drawn(3, 7), drawn(4, 7))
    assert not torch.equal(drawn(3, 7), drawn(3, 7, tensor=1))


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="must be greater than 0"):
        GradientNoiseConfig(eta=0)
