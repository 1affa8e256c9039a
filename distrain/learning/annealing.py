"""Simulated annealing of gradient descent: Gaussian noise on the gradient, with a temperature that cools.

Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks", equation 1: at step t (from
0) each entry of the gradient gets an independent draw from N(0, sigma_t^2), with sigma_t^2 = eta / (1 + t)^gamma.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from distrain.config import GradientNoiseConfig


class GradientNoise:
    """Draws depend on seed, step and tensor alone: they are the same at any number of workers and slices, and after a
    resume."""

    def __init__(self, config: GradientNoiseConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._generator = torch.Generator()

    def deviation(self, step: int) -> float:
        """sigma_t, for update `step` counted from 0."""
        return float((self._config.eta / (1 + step) ** self._config.gamma) ** 0.5)

    def add_(self, gradient: Tensor, step: int, tensor: int) -> None:
        """Add the noise of update `step`, counted from 0, to the float32 gradient of the model's parameter number
        `tensor`, in place."""
        drawn_for = struct.pack("<qqq", self._seed, step, tensor)
        digest = hashlib.blake2b(drawn_for, digest_size=8, person=b"gradient noise").digest()
        self._generator.manual_seed(int.from_bytes(digest, "little", signed=True))
        gradient.add_(torch.randn(gradient.shape, generator=self._generator), alpha=self.deviation(step))
