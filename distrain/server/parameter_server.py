"""The parameter server proper: average, clip, update. Knows parameters and optimizer, not who computed what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import AveragingConfig, ClipConfig, OptimizerConfig, ScheduleConfig
from distrain.errors import CheckpointError, DivergenceError
from distrain.exchange.layout import Layout, Span, views
from distrain.exchange.memory import Published
from distrain.exchange.slices import extents
from distrain.exchange.wire import WIRES, WireDtype
from distrain.learning.annealing import GradientNoise
from distrain.learning.averaging import AveragedWeights
from distrain.learning.clipping import PIECE, Norm, clip_, global_norm, total_norm
from distrain.learning.diagnostics import LayerWatch
from distrain.learning.model_state import TRANSIENT, restore_model, transient_buffers
from distrain.learning.optimizers import build_optimizer
from distrain.learning.penalties import Penalty
from distrain.learning.schedules import build_schedule
from distrain.reduction import Merge, Partial
from distrain.server.loss_scale import LossScale

CHUNK_FLOATS = 262_144  # averaged at a time, 1 MiB of each vector: smaller chunks cost calls, larger ones the cache
_MOST = torch.finfo(torch.float32).max

Share = Callable[[list[float]], list[float]]
"""Gives a slice's values to the other slices' servers, and returns those of all slices, in order."""

Publish = Callable[[int, Span], None]
"""Told of each span of the published vector that holds the parameters after an update, as soon as it does."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did. `grad_norm` is the averaged gradient's L2 norm before clipping, penalties included, and
    `data_norm` that without them; `weight` the sum of the rows' weights. `overflowed`: the gradient did, in fp16,
    and the update was left out."""

    samples: int
    weight: float
    loss: float
    penalty: float
    data_norm: float
    grad_norm: float
    lr: float
    clipped: bool
    seconds: float
    overflowed: bool = False


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a step's gradients add up to: the last two halves of the sum over all shards, and what is to be added up
    before they are read. Or that was done, and all chunks are written (see `ParameterServer.add_up`); then the squares
    of the norm's pieces may be known, of all slices."""

    halves: tuple[Partial, ...]
    late: Sequence[Merge] = ()
    is_written: bool = False
    squares: Sequence[float] | None = None


class ParameterServer:
    """Holds the model, its optimizer and schedule, and publishes parameters after each update.

    The model's parameters become views into `current`, its gradients views into one flat float32 vector. With
    `staleness` k, the parameters of the last k + 1 updates are kept: those of update t in `published[t % (k + 1)]`.
    With none of it, workers read the current ones. `loss_scale` is there in fp16 only.

    With `span`, this server owns only that slice of the vector: it averages, clips and updates nothing else, and is
    given sums of that span. `share` then has to be set, since all slices are clipped by their common norm; the other
    slices' parameters come into `published` from outside. Where `publish` is set, parameters are updated some at a
    time, so that it can send the first while the next are computed.

    With `wire_dtype` bf16, what is published is rounded (see wire.py), and `current` is not.
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
        loss_scale: LossScale | None = None,
        noise: GradientNoise | None = None,
        averaging: AveragingConfig | None = None,
        span: Span | None = None,
        wire_dtype: WireDtype = "fp32",
    ) -> None:
        self.model = model
        self.layout = Layout.of(model)
        self.wire = WIRES[wire_dtype](self.layout)
        self.span = span or self.layout.whole
        self.share: Share | None = None
        self.publish: Publish | None = None
        self.current = Published(self.layout)
        self.current.adopt_parameters(model, copy_in=True)
        self.current.store_buffers(model)
        apart = staleness > 0 or self.wire.rounds
        self.published = [Published(self.layout) for _ in range(staleness + 1)] if apart else [self.current]
        if apart:
            self.published[0].copy_from(self.current)
            self.wire.round_parameters(self.published[0], self.layout.whole)
        self._averaged = (
            AveragedWeights(self.layout, self.span, self.current, averaging) if averaging is not None else None
        )
        self._delay_compensation, self._penalty, self._noise = delay_compensation, penalty, noise
        self.loss_scale = loss_scale
        self._mean = torch.zeros(self.layout.num_floats)
        gradients = Span(self.span.start, min(self.span.stop, self.layout.num_gradients))
        self._gradients = self._mean[gradients.start : gradients.stop]
        self._trained: dict[int, Tensor] = {}  # the gradients of the span's parameters, by the parameter's number
        self._parts: list[_Part] = []
        parameters, views_of_mean = list(model.parameters()), views(self._mean, self.layout.parameters)
        for part in self.layout.parts(self.span):
            self._parts.append(_Part(part))
            for number, entry in enumerate(self.layout.parameters):
                if part.start <= entry.start < min(part.stop, gradients.stop) and parameters[number].requires_grad:
                    parameters[number].grad = self._trained[number] = views_of_mean[number]
                    self._parts[-1].trained.append((parameters[number], views_of_mean[number]))
        sizes = _piece_sizes(self.layout, gradients)
        self._norm = Norm(self._gradients.split(sizes))
        self.chunks = _chunks(self._mean[self.span.start : self.span.stop], sizes)
        self._clip = clip
        self.optimizer = build_optimizer(model, optimizer)
        self.schedule = build_schedule(self.optimizer, schedule)
        start = self.layout.float_buffers[0].start if self.layout.float_buffers else self.layout.num_gradients
        stop = self.layout.int_buffers[0].start if self.layout.int_buffers else self.layout.num_floats
        self._float_buffers = slice(start, stop)
        self._first_buffers = self.current.floats[self._float_buffers].clone()
        published = self.current.named()
        self._first_transient = {name: published[name].clone() for name in transient_buffers(model)}

    def scale_after(self, step: int) -> float:
        """The loss scale of a round that reads the parameters after update `step`; 0: the loss is not scaled."""
        return self.loss_scale.after(step) if self.loss_scale is not None else 0.0

    def apply(
        self,
        gathered: Gathered,
        step: int,
        read: Published | None = None,
        scale: float = 0.0,
        watch: LayerWatch | None = None,
        lag: int = 0,
    ) -> Update:
        """Apply one step (number `step`, from 1), whose rows have some weight.

        `read` holds the parameters from which the gradient was computed; delay compensation needs them. `scale` is the
        loss scale that it was computed with. `watch` looks at the update. `lag` counts the updates between those
        parameters and this one.

        Raises DivergenceError when loss or gradient is not finite, but for a gradient that overflowed in fp16;
        parameters are then as they were.
        """
        start = time.perf_counter()
        halves = gathered.halves
        samples = sum(half.samples for half in halves)
        weight = sum(half.weight for half in halves)
        assert weight, "there is no mean loss"
        loss = sum(half.loss for half in halves) / weight
        self._average(gathered, samples, weight)
        squares = gathered.squares if gathered.squares is not None else self._of_all_slices(self.squares())
        norm = data_norm = total_norm(squares) / weight
        is_finite = norm <= _MOST  # beyond, what it is of may not fit into float32
        if scale and self.loss_scale is not None and math.isfinite(loss):
            if is_finite:
                self.loss_scale.applied(step, scale)
            elif self.loss_scale.overflowed(step, scale):
                left_out, seconds = self.skip(step), time.perf_counter() - start
                return Update(samples, weight, loss, 0.0, norm, norm, left_out.lr, False, seconds, overflowed=True)
        if not is_finite or not math.isfinite(loss):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise DivergenceError(
                f"step {step}: the {what} is not finite (loss {loss:g}, gradient norm {norm:g}), though that of each "
                "microbatch is: their sum overflows; the parameters were left as they were. Try a lower optimizer.lr"
            )
        if self._delay_compensation and read is not None:
            self._compensate(read)
        penalty = 0.0
        if self._penalty is not None:
            penalty = sum(self._of_all_slices([self._penalty.add_gradient()]))
            self._norm.look()
            norm = total_norm(self._of_all_slices(self.squares()))
        if watch is not None:
            watch.before(self._gradients, self.current.floats)
        clipped = clip_(self._gradients, self._clip, norm)
        if self._clip is not None and self._clip.norm is None:
            clipped = any(self._of_all_slices([float(clipped)]))
        if self._noise is not None:
            for number, gradient in self._trained.items():
                self._noise.add_(gradient, step - 1, number)
        lr = self.schedule.lr
        self._update_buffers(lag)
        self._step_optimizer(step)
        self.schedule.step()
        if watch is not None:
            watch.after(self.current.floats)
        if self._averaged is not None:
            self._averaged.update(step)
        seconds = time.perf_counter() - start
        return Update(samples, weight, loss, penalty, data_norm, norm, lr, clipped, seconds)

    def skip(self, step: int, samples: int = 0) -> Update:
        """Count a step (number `step`, from 1) of which nothing could be used, or whose `samples` have no weight:
        parameters and buffers stay as they are, the schedule moves on."""
        lr = self.schedule.lr
        self.schedule.step()
        if self.loss_scale is not None:
            self.loss_scale.skipped(step)
        self._publish(step, self.span)
        return Update(samples, 0.0, 0.0, 0.0, 0.0, 0.0, lr, False, 0.0)

    @property
    def is_finite(self) -> bool:
        """Whether all parameters and buffers are finite, those of other slices as last taken; a buffer's values may be
        what they were at first, such as the -inf of an attention mask."""
        buffers = self.current.floats[self._float_buffers]
        is_same = torch.isclose(buffers, self._first_buffers, rtol=0.0, atol=0.0, equal_nan=True)
        is_finite = bool((buffers.isfinite() | is_same).all())
        return is_finite and math.isfinite(global_norm(self.current.floats[: self.layout.num_gradients]))

    def _step_optimizer(self, step: int) -> None:
        """Have the optimizer update the span's parameters, and publish them. It passes over those without a gradient,
        so that it can be had to update part after part; it treats each tensor by itself, so that this costs no bit."""
        if self.publish is None:
            self.optimizer.step()
            self._publish(step, self.span)
            return
        trained = [each for part in self._parts for each in part.trained]
        for parameter, _ in trained:
            parameter.grad = None
        for part in self._parts:
            for parameter, gradient in part.trained:
                parameter.grad = gradient
            if part.trained:
                self.optimizer.step()
            for parameter, _ in part.trained:
                parameter.grad = None
            self._publish(step, part.span)
        for parameter, gradient in trained:
            parameter.grad = gradient

    def _publish(self, step: int, span: Span) -> None:
        """Let workers read a span's parameters after update `step`. (Those of other slices come from outside.)"""
        place = self.published[step % len(self.published)]
        if place is not self.current:
            place.floats[span.start : span.stop] = self.current.floats[span.start : span.stop]
            if span.stop == self.layout.num_floats:
                place.ints.copy_(self.current.ints)
            self.wire.round_parameters(place, span)
        if self.publish is not None:
            self.publish(step, span)

    def _compensate(self, read: Published) -> None:
        """Add to the gradient g what it misses by having been computed elsewhere: lambda g^2 (w_now - w_read), the
        diagonal outer-product approximation of the Hessian's term (DC-ASGD, Zheng et al. 2017, equation 10)."""
        n = self.layout.num_gradients
        moved = self.current.floats[:n] - read.floats[:n]
        self._gradients.addcmul_(moved.mul_(self._gradients), self._gradients, value=self._delay_compensation)

    def _of_all_slices(self, values: list[float]) -> list[float]:
        return values if self.share is None else self.share(values)

    def add_up(self, chunk: Chunk, halves: Sequence[Partial]) -> None:
        """Write a chunk of the sum of the last two halves, of which an average is to be made, and look at the norm of
        its pieces of the gradient."""
        parts = [half.vector[chunk.start : chunk.stop] for half in halves]
        if len(parts) == 2:
            torch.add(parts[0], parts[1], out=chunk.mean)
        else:
            chunk.mean.copy_(parts[0])
        self._norm.look(chunk.first_piece, chunk.first_piece + chunk.num_pieces)

    def squares(self) -> list[float]:
        """The squared norms of the gradient's pieces, of the sum that was added up."""
        return self._norm.squares()

    def _average(self, gathered: Gathered, samples: int, weight: float) -> None:
        """Make the average of the sum, gradients by weight and buffers' changes by samples.

        In chunks that stay in the cache: memory, not arithmetic, is what an update waits for.
        """
        for chunk in self.chunks:
            if not gathered.is_written:
                for merge in gathered.late:
                    merge.add_until(chunk.stop)
                self.add_up(chunk, gathered.halves)
            chunk.mean.mul_(1.0 / (weight if chunk.num_pieces else samples))

    def _update_buffers(self, lag: int) -> None:
        """Add the buffers' mean changes. A constant buffer changes by exactly 0 and keeps its bits.

        A stale change counts 1 / (1 + lag), as in staleness-aware SGD (Zhang et al. 2016, section 3.2): those computed
        from the same running variance would else take it below 0 together.
        """
        if not self.layout.has_buffers or self.span.stop < self.layout.num_floats:
            return
        self.current.floats[self._float_buffers].add_(self._mean[self._float_buffers], alpha=1 / (1 + lag))
        changes = views(self._mean, self.layout.int_buffers)
        for value, change in zip(self.current.int_views(), changes, strict=True):
            value.add_(change.round().to(torch.int64))

    @property
    def averages(self) -> bool:
        return self._averaged is not None

    @property
    def readable(self) -> list[Published]:
        """All that workers may read: `published`, and behind them the averaged weights, where there are any."""
        return [*self.published, self._averaged.published] if self._averaged is not None else self.published

    def version(self, read: int, is_validation: bool) -> int:
        """Which of `readable` holds the parameters after update `read`. Averaged ones are for validation, and are
        always the current ones."""
        if is_validation and self._averaged is not None:
            return len(self.published)
        return read % len(self.published)

    @property
    def _exported(self) -> Published:
        return self.current if self._averaged is None else self._averaged.published

    @contextmanager
    def exported(self) -> Iterator[nn.Module]:
        """The model as it is validated, saved and handed out, for the time of a `with`: with its buffers, and with the
        averaged weights where there are any."""
        self._exported.adopt_parameters(self.model, copy_in=False)
        published = self._exported.named()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(published[name])
        try:
            yield self.model
        finally:
            self.current.adopt_parameters(self.model, copy_in=False)

    def indices_in(self, span: Span) -> frozenset[int]:
        """The parameters of a span, as the optimizer's state counts them: through all its groups."""
        starts = {id(p): entry.start for p, entry in zip(self.model.parameters(), self.layout.parameters, strict=True)}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return frozenset(i for i, p in enumerate(parameters) if span.start <= starts[id(p)] < span.stop)

    def take_others(self, step: int) -> None:
        """Bring the other slices' parameters after update `step` into the model, before it is saved or evaluated."""
        published = self.published[step % len(self.published)]
        if published is not self.current:
            self.current.floats[: self.span.start] = published.floats[: self.span.start]

    def beside(self, step: int) -> dict[str, Tensor]:
        """What a checkpoint of update `step` holds beside the exported model's `state_dict`, by name: the buffers that
        this leaves out, where they have changed; with staleness the parameters of earlier updates; with averaging the
        weights that are trained."""
        published = self._exported.named()
        kept = {
            TRANSIENT + name: published[name]
            for name, first in self._first_transient.items()  # a mask that stays as it was built costs nothing
            if not torch.equal(published[name], first)
        }
        if self._averaged is not None:
            kept |= _prefixed("trained.", self.current)
        for earlier in range(max(0, step - len(self.published) + 1), step):
            kept |= _prefixed(f"published.{earlier}.", self.published[earlier % len(self.published)])
        return kept

    def state_dict(self) -> dict[str, Any]:
        """What updates go on from beside parameters and the optimizer's state, the same for every slice; JSON-able."""
        scale = self.loss_scale.state_dict() if self.loss_scale is not None else None
        return {"schedule": self.schedule.state_dict(), "loss_scale": scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.schedule.load_state_dict(state["schedule"])
        if self.loss_scale is not None and state.get("loss_scale") is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])

    def restore(self, step: int, model: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
        """Go on after update `step`: the model as a checkpoint holds it, and what `beside` gave.

        Raises CheckpointError where they do not fit.
        """
        restore_model(self.model, model, beside)
        self.current.store_buffers(self.model)
        if self._averaged is not None:
            self._averaged.published.copy_from(self.current)
            if any(name.startswith("trained.") for name in beside):  # else it begins to average here
                _take("trained.", self.current, beside)
        if (place := self.published[step % len(self.published)]) is not self.current:
            place.copy_from(self.current)
            self.wire.round_parameters(place, self.layout.whole)
        for earlier in range(max(0, step - len(self.published) + 1), step):
            published = self.published[earlier % len(self.published)]
            _take(f"published.{earlier}.", published, beside)
            self.wire.round_parameters(published, self.layout.whole)


def _prefixed(prefix: str, published: Published) -> dict[str, Tensor]:
    """A published vector's tensors, for a checkpoint."""
    return {f"{prefix}{name}": tensor for name, tensor in published.named().items()}


def _take(prefix: str, published: Published, saved: Mapping[str, Tensor]) -> None:
    """Bring back what `_prefixed` gave. Raises CheckpointError where the checkpoint lacks some of it."""
    for name, tensor in published.named().items():
        if prefix + name not in saved:
            raise CheckpointError(
                f"the checkpoint lacks {prefix + name}: it was written without server.staleness or averaging as they "
                "are set now, or by an older distrain"
            )
        tensor.copy_(saved[prefix + name])


@dataclass(frozen=True, slots=True)
class _Part:
    """What is updated together: the parameters of a span that are trained, with their gradients."""

    span: Span
    trained: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The values [start, stop) of a server's span: some of the norm's pieces, or none where they are no gradients."""

    start: int
    stop: int
    mean: Tensor
    first_piece: int
    num_pieces: int


def _chunks(mean: Tensor, pieces: Sequence[int]) -> list[Chunk]:
    """A span's values in chunks: first those of the gradients, whose pieces have these lengths, then the others."""
    chunks: list[Chunk] = []
    start = stop = first = 0
    for number, size in enumerate(pieces, start=1):
        stop += size
        if stop - start >= CHUNK_FLOATS or number == len(pieces):
            chunks.append(Chunk(start, stop, mean[start:stop], first, number - first))
            start, first = stop, number
    if stop < len(mean):
        chunks.append(Chunk(stop, len(mean), mean[stop:], first, 0))
    return chunks


def _piece_sizes(layout: Layout, span: Span) -> list[int]:
    """The lengths of the pieces in which the norm of a span's gradients is taken. They end with each tensor, so that
    they, and with them the norm's bits, do not depend on how the vector is cut into slices."""
    sizes: list[int] = []
    start = 0
    for extent in extents(layout):
        if span.start <= start < span.stop:
            sizes += [min(PIECE, extent - at) for at in range(0, extent, PIECE)]
        start += extent
    return sizes
