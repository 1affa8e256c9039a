"""The parameter server proper: average, clip, update. Knows parameters and optimizer, not who computed what."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config import ClipConfig, OptimizerConfig, ScheduleConfig
from distrain.errors import CheckpointError, DivergenceError, TrainingDataError
from distrain.exchange.memory import Layout, Published, views
from distrain.learning.clipping import PIECE, Norm, clip_, global_norm
from distrain.learning.model_state import restore_model
from distrain.learning.optimizers import build_optimizer
from distrain.learning.penalties import Penalty
from distrain.learning.schedules import build_schedule
from distrain.reduction import Partial


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did. `grad_norm` is the averaged gradient's L2 norm before clipping, penalties included, and
    `data_norm` that without them; `weight` the sum of the rows' weights."""

    samples: int
    weight: float
    loss: float
    penalty: float
    data_norm: float
    grad_norm: float
    lr: float
    clipped: bool
    seconds: float


class ParameterServer:
    """Holds the model, its optimizer and schedule, and publishes parameters after each update.

    The model's parameters become views into `current`, its gradients views into one flat float32 vector. With
    `staleness` k, the parameters of the last k + 1 updates are kept: those of update t in `published[t % (k + 1)]`.
    With none of it, workers read the current ones.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig | None = None,
        clip: ClipConfig | None = None,
        staleness: int = 0,
        delay_compensation: float = 0.0,
        penalty: Penalty | None = None,
    ) -> None:
        self.model = model
        self.layout = Layout.of(model)
        self.current = Published(self.layout)
        self.current.adopt_parameters(model, copy_in=True)
        self.current.store_buffers(model)
        self.published = [Published(self.layout) for _ in range(staleness + 1)] if staleness else [self.current]
        self._publish(0)
        self._delay_compensation, self._penalty = delay_compensation, penalty
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

    def apply(self, halves: tuple[Partial, ...], step: int, read: Published | None = None) -> Update:
        """Apply one step (number `step`, from 1), given the last two halves of the sum over all shards.

        `read` holds the parameters from which the gradient was computed; delay compensation needs them.
        Raises DivergenceError when loss or gradient is not finite; parameters are then as they were.
        """
        start = time.perf_counter()
        samples = sum(half.samples for half in halves)
        weight = sum(half.weight for half in halves)
        if not weight:
            raise TrainingDataError(
                f"step {step}: the weights of its {samples} rows add up to 0, so it has no mean loss"
            )
        loss = sum(half.loss for half in halves) / weight
        norm = data_norm = self._average([half.vector for half in halves], samples, weight)
        if not math.isfinite(norm) or not math.isfinite(loss):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise DivergenceError(
                f"step {step}: the {what} is not finite (loss {loss:g}, gradient norm {norm:g}); the parameters were "
                "left as they were. Try a lower optimizer.lr, or clip: {norm: 1.0}"
            )
        if self._delay_compensation and read is not None:
            self._compensate(read)
        penalty = 0.0
        if self._penalty is not None:
            penalty = self._penalty.add_gradient()
            norm = global_norm(self._gradients)
        clipped = clip_(self._gradients, self._clip, norm)
        lr = self.schedule.lr
        self.optimizer.step()
        self.schedule.step()
        self._update_buffers()
        self._publish(step)
        seconds = time.perf_counter() - start
        return Update(samples, weight, loss, penalty, data_norm, norm, lr, clipped, seconds)

    def _publish(self, step: int) -> None:
        """Let workers read the parameters after update `step`."""
        place = self.published[step % len(self.published)]
        if place is not self.current:
            place.copy_from(self.current)

    def _compensate(self, read: Published) -> None:
        """Add to the gradient g what it misses by having been computed elsewhere: lambda g^2 (w_now - w_read), the
        diagonal outer-product approximation of the Hessian's term (DC-ASGD, Zheng et al. 2017, equation 10)."""
        n = self.layout.num_gradients
        moved = self.current.floats[:n] - read.floats[:n]
        self._gradients.addcmul_(moved.mul_(self._gradients), self._gradients, value=self._delay_compensation)

    def _average(self, sums: list[Tensor], samples: int, weight: float) -> float:
        """Write the average of the summed vectors, gradients by weight and buffers' changes by samples, and return the
        gradient's norm in float64.

        In pieces that stay in the cache: memory, not arithmetic, is what an update waits for.
        """
        pieces = zip(self._pieces, *(vector.split(self._sizes) for vector in sums), strict=True)
        for number, (mean, *parts) in enumerate(pieces):
            share = 1.0 / (weight if number < self._num_gradient_pieces else samples)
            if len(parts) == 2:
                torch.add(parts[0], parts[1], out=mean).mul_(share)
            else:
                torch.mul(parts[0], share, out=mean)
            if number < self._num_gradient_pieces:
                self._norm.add(mean)
        return self._norm.take()

    def _update_buffers(self) -> None:
        """Add the buffers' mean changes. A constant buffer changes by exactly 0 and keeps its bits."""
        if not self.layout.has_buffers:
            return
        self.current.floats[self._float_buffers].add_(self._mean[self._float_buffers])
        changes = views(self._mean, self.layout.int_buffers)
        for value, change in zip(self.current.int_views(), changes, strict=True):
            value.add_(change.round().to(torch.int64))

    def load_buffers(self) -> None:
        """Bring the published buffers into the model, before it is saved or evaluated."""
        named = dict(self.model.named_buffers())
        for entry, view in zip(
            self.layout.float_buffers, views(self.current.floats, self.layout.float_buffers), strict=True
        ):
            named[entry.name].copy_(view)
        for entry, view in zip(self.layout.int_buffers, self.current.int_views(), strict=True):
            named[entry.name].copy_(view)

    def stale(self, step: int) -> dict[str, Tensor]:
        """What the updates after `step` read of earlier ones: by name, for a checkpoint. Nothing without staleness."""
        kept: dict[str, Tensor] = {}
        for earlier in range(max(0, step - len(self.published) + 1), step):
            published = self.published[earlier % len(self.published)]
            kept[f"published.{earlier}.floats"], kept[f"published.{earlier}.ints"] = published.floats, published.ints
        return kept

    def restore(self, step: int, model: Mapping[str, Tensor], stale: Mapping[str, Tensor]) -> None:
        """Go on after update `step`: the model as a checkpoint holds it, and what `stale` gave.

        Raises CheckpointError where they do not fit.
        """
        restore_model(self.model, model)
        self.current.store_buffers(self.model)
        self._publish(step)
        for earlier in range(max(0, step - len(self.published) + 1), step):
            published = self.published[earlier % len(self.published)]
            try:
                published.floats.copy_(stale[f"published.{earlier}.floats"])
                published.ints.copy_(stale[f"published.{earlier}.ints"])
            except KeyError as error:
                raise CheckpointError(
                    f"the checkpoint lacks the parameters of update {earlier}, which server.staleness asks for"
                ) from error


def _sizes(count: int) -> list[int]:
    """The lengths of the pieces in which so many values are averaged."""
    return [min(PIECE, count - start) for start in range(0, count, PIECE)]
