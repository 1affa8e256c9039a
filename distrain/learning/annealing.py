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
    """Draws depend on (seed, step) alone: they are the same at any worker count, and after a resume."""

    def __init__(self, config: GradientNoiseConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._generator = torch.Generator()

    def deviation(self, step: int) -> float:
        """sigma_t, for update `step` counted from 0."""
        return float((self._config.eta / (1 + step) ** self._config.gamma) ** 0.5)

    def add_(self, gradients: Tensor, step: int) -> None:
        """Add the noise of update `step`, counted from 0, to a flat float32 gradient, in place."""
        digest = hashlib.blake2b(struct.pack("<qq", self._seed, step), digest_size=8, person=b"gradient noise").digest()
        self._generator.manual_seed(int.from_bytes(digest, "little", signed=True))
        gradients.add_(torch.randn(gradients.shape, generator=self._generator), alpha=self.deviation(step))
