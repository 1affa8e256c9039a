"""Averaged weights: an exponential moving average over the updates (Polyak and Juditsky 1992; as an EMA:
Morales-Brotons et al. 2024, "Exponential Moving Average of Weights in Deep Learning")."""

from __future__ import annotations

import torch

from distrain.config import AveragingConfig
from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published


class AveragedWeights:
    """The moving average of a span of a published vector: parameters and floating-point buffers; counters are the
    current ones. What is outside the span comes from the other slices' servers.

    After update n (from 1) the average moves by 1 - d of its distance to the weights, d = min(decay, (1 + n) / (10 +
    n)), so that the first weights do not weigh on it for long (tf.train.ExponentialMovingAverage's `num_updates`).
    """

    def __init__(self, layout: Layout, span: Span, current: Published, config: AveragingConfig) -> None:
        self._current, self._decay = current, config.decay
        self._parameters = slice(span.start, min(span.stop, layout.num_gradients))
        self._buffers = slice(self._parameters.stop, span.stop)
        self.published = Published(layout)
        self.published.copy_from(current)

    def decay(self, step: int) -> float:
        """d of update `step`, counted from 1."""
        return min(self._decay, (1 + step) / (10 + step))

    def update(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 1."""
        averaged, current, share = self.published.floats, self._current.floats, 1.0 - self.decay(step)
        averaged[self._parameters].lerp_(current[self._parameters], share)
        buffers, now = averaged[self._buffers], current[self._buffers]
        is_same = buffers == now  # may be infinite, as in an attention mask
        buffers.lerp_(now, share)
        torch.where(is_same, now, buffers, out=buffers)
        self.published.ints.copy_(self._current.ints)
