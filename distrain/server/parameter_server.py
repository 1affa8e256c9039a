"""The parameter server proper: average, clip, update. Knows parameters and optimizer, not who computed what."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config import ClipConfig, OptimizerConfig, ScheduleConfig
from distrain.errors import DivergenceError
from distrain.exchange.memory import Layout, Published, views
from distrain.learning.clipping import PIECE, Norm, clip_
from distrain.learning.optimizers import build_optimizer
from distrain.learning.schedules import build_schedule
from distrain.reduction import Partial


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did. `grad_norm` is the averaged gradient's L2 norm before clipping."""

    samples: int
    loss: float
    grad_norm: float
    lr: float
    clipped: bool
    seconds: float


class ParameterServer:
    """Holds the model, its optimizer and schedule, and publishes parameters after each update.

    The model's parameters become views into `published`, its gradients views into one flat float32 vector.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig | None = None,
        clip: ClipConfig | None = None,
    ) -> None:
        self.model = model
        self.layout = Layout.of(model)
        self.published = Published(self.layout)
        self.published.adopt_parameters(model, copy_in=True)
        self.published.store_buffers(model)
        self._mean = torch.zeros(self.layout.num_floats)
        self._gradients = self._mean[: self.layout.num_gradients]
        for parameter, view in zip(model.parameters(), views(self._mean, self.layout.parameters), strict=True):
            if parameter.requires_grad:
                parameter.grad = view
        sizes = [_sizes(self.layout.num_gradients), _sizes(self.layout.num_floats - self.layout.num_gradients)]
        self._num_gradient_pieces = len(sizes[0])
        self._sizes = sizes[0] + sizes[1]
        self._pieces = self._mean.split(self._sizes)
        self._norm = Norm()
        self._clip = clip
        self.optimizer = build_optimizer(model, optimizer)
        self.schedule = build_schedule(self.optimizer, schedule)
        start = self.layout.float_buffers[0].start if self.layout.float_buffers else self.layout.num_gradients
        stop = self.layout.int_buffers[0].start if self.layout.int_buffers else self.layout.num_floats
        self._float_buffers = slice(start, stop)

    def apply(self, halves: tuple[Partial, ...], step: int) -> Update:
        """Apply one step (number `step`, from 1), given the last two halves of the sum over all shards.

        Raises DivergenceError when loss or gradient is not finite; parameters are then as they were.
        """
        start = time.perf_counter()
        samples = sum(half.samples for half in halves)
        loss = sum(half.loss for half in halves) / samples
        norm = self._average([half.vector for half in halves], samples)
        if not math.isfinite(norm) or not math.isfinite(loss):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise DivergenceError(
                f"step {step}: the {what} is not finite (loss {loss:g}, gradient norm {norm:g}); the parameters were "
                "left as they were. Try a lower optimizer.lr, or clip: {norm: 1.0}"
            )
        clipped = clip_(self._gradients, self._clip, norm)
        lr = self.schedule.lr
        self.optimizer.step()
        self.schedule.step()
        self._update_buffers()
        return Update(samples, loss, norm, lr, clipped, time.perf_counter() - start)

    def _average(self, sums: list[Tensor], samples: int) -> float:
        """Write the average of the summed vectors, and return the gradient's norm in float64.

        In pieces that stay in the cache: memory, not arithmetic, is what an update waits for.
        """
        pieces = zip(self._pieces, *(vector.split(self._sizes) for vector in sums), strict=True)
        for number, (mean, *parts) in enumerate(pieces):
            if len(parts) == 2:
                torch.add(parts[0], parts[1], out=mean).mul_(1.0 / samples)
            else:
                torch.mul(parts[0], 1.0 / samples, out=mean)
            if number < self._num_gradient_pieces:
                self._norm.add(mean)
        return self._norm.take()

    def _update_buffers(self) -> None:
        """Add the buffers' mean changes. A constant buffer changes by exactly 0 and keeps its bits."""
        if not self.layout.has_buffers:
            return
        self.published.floats[self._float_buffers].add_(self._mean[self._float_buffers])
        changes = views(self._mean, self.layout.int_buffers)
        for value, change in zip(self.published.int_views(), changes, strict=True):
            value.add_(change.round().to(torch.int64))

    def load_buffers(self) -> None:
        """Bring the published buffers into the model, before it is saved or evaluated."""
        named = dict(self.model.named_buffers())
        for entry, view in zip(
            self.layout.float_buffers, views(self.published.floats, self.layout.float_buffers), strict=True
        ):
            named[entry.name].copy_(view)
        for entry, view in zip(self.layout.int_buffers, self.published.int_views(), strict=True):
            named[entry.name].copy_(view)

    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """Restore the model's state, as a checkpoint holds it, and publish it."""
        with torch.no_grad():
            self.model.load_state_dict(tensors)
        self.published.store_buffers(self.model)


def _sizes(count: int) -> list[int]:
    """The lengths of the pieces in which so many values are averaged."""
    return [min(PIECE, count - start) for start in range(0, count, PIECE)]
