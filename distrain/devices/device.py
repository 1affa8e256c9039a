"""What a worker needs of the device that it computes on, and the host's own: no copy that can be avoided."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distrain.devices.backward import Backward
from distrain.errors import TrainingError
from distrain.exchange.layout import Bucket, Layout, Span, views
from distrain.exchange.memory import Published, PushSlots

Batch = dict[str, Tensor]
There = Callable[[Span], None]
"""Told of each span of a push slot's vector, in any order, once it holds a microbatch's values."""


class Device(Protocol):
    """Holds a model whose parameters follow a published vector and whose gradients end up in push slots.

    `type` is torch's name for it. `is_ahead`: what it is told goes on while the caller does something else, so that it
    pays to bring in the next microbatch before `finish`. `copy_s` adds up the seconds that the caller spends on
    gradients that were computed already.
    """

    type: str
    is_ahead: bool
    copy_s: float

    def open(
        self, model: nn.Module, layout: Layout, published: Sequence[Published], slots: PushSlots, early: bool = False
    ) -> None:
        """Take the model over, whose parameters and buffers are on the host. `early`: somebody waits for the first
        gradients while backward computes others."""
        ...

    def read(self, version: int, round_number: int) -> None:
        """Make the model's parameters those of a published vector, as it is for this round."""
        ...

    def load_buffers(self) -> None:
        """Make the model's buffers the published ones."""
        ...

    def seed(self, seed: int) -> None:
        """Seed what the model draws from."""
        ...

    def bring(self, batch: Batch) -> Any:
        """Begin to bring a microbatch in. `take` gives what comes of it."""
        ...

    def take(self, brought: Any) -> Batch:
        """A microbatch's tensors, to be computed with."""
        ...

    def begin(self, slot: int, scale: float, there: There) -> None:
        """Begin a microbatch's gradient, which goes to this push slot. The loss is multiplied by `scale` (0: it is not)
        before it is differentiated, and the gradient divided by it. `there` is called from `backward` and `finish`."""
        ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of this loss. `is_last`: nothing is added after it.

        Raises TrainingError where a parameter's gradient comes in parts.
        """
        ...

    def value(self, loss: Tensor) -> Callable[[], float]:
        """What gives a loss's value: it waits for that, and not for what the device is given after this."""
        ...

    def finish(self, rows: int) -> None:
        """Bring the rest of the gradient into the slot's vector, and the buffers' changes times `rows`.

        Raises TrainingError where the forward pass made a buffer another kind of tensor.
        """
        ...

    def close(self) -> None:
        """Give back what it holds of the shared memory."""
        ...


class _Buffer:
    """A buffer of a model. Its forward pass may change its tensor, or put another one in its place."""

    def __init__(self, modules: Mapping[str, nn.Module], name: str) -> None:
        path, _, self._key = name.rpartition(".")
        self._name, self._module = name, modules[path]
        self._own = self._tensor

    def load(self, published: Tensor) -> None:
        """Make it the tensor that it was at first, of these values."""
        self._own.copy_(published)
        if self._tensor is not self._own:
            setattr(self._module, self._key, self._own)

    def now(self) -> Tensor:
        """What the forward pass left. Raises TrainingError where that is no such tensor as it was."""
        own, tensor = self._own, self._tensor
        if tensor is not own and (tensor is None or _kind(tensor) != _kind(own)):
            found = "None" if tensor is None else f"a tensor of {_described(tensor)}"
            raise TrainingError(
                f"the model's forward pass replaced its buffer {self._name}, a tensor of {_described(own)}, by "
                f"{found}: workers' buffers are averaged, so they keep their shape, device and kind of number. Keep "
                "what does not in an attribute that is not registered as a buffer"
            )
        return tensor.detach()

    @property
    def _tensor(self) -> Any:
        return getattr(self._module, self._key, None)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.device, tensor.is_floating_point()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


class Buffers:
    """A model's buffers, the published ones, and their changes, all on one device."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        modules = dict(model.named_modules())
        self._floats = [_Buffer(modules, entry.name) for entry in layout.float_buffers]
        self._counters = [_Buffer(modules, entry.name) for entry in layout.int_buffers]
        self._published: list[Tensor] = []
        self._published_counters: list[Tensor] = []

    def follow(self, published: list[Tensor], counters: list[Tensor]) -> None:
        """Take these for the published ones."""
        self._published, self._published_counters = published, counters

    def load(self) -> None:
        for buffer, published in zip(self._floats, self._published, strict=True):
            buffer.load(published)
        for buffer, published in zip(self._counters, self._published_counters, strict=True):
            buffer.load(published)

    def add_changes(self, changes: list[Tensor], counts: list[Tensor], rows: int) -> None:
        """Write what training has changed, times the rows, into views of a pushed vector. What is as it was published,
        such as the -inf of an attention mask, has not changed. Raises TrainingError where a buffer is another kind of
        tensor than it was."""
        for change, buffer, published in zip(changes, self._floats, self._published, strict=True):
            local = buffer.now()
            torch.sub(local, published, out=change).masked_fill_(local == published, 0.0).mul_(rows)
        for count, buffer, published in zip(counts, self._counters, self._published_counters, strict=True):
            count.copy_(buffer.now().to(torch.int64) - published).mul_(rows)


class HostDevice:
    """The host's CPU: the model's parameters are views into the published vector, and gradients are written straight
    into push slots."""

    type = "cpu"
    is_ahead = False
    copy_s = 0.0

    def open(
        self, model: nn.Module, layout: Layout, published: Sequence[Published], slots: PushSlots, early: bool = False
    ) -> None:
        self._model, self._layout, self._published = model, layout, published
        self._backward = Backward(model, layout, self._put, early)
        self._buffers = Buffers(model, layout)
        vectors = [slots[slot] for slot in range(slots.num_slots)]
        self._gradients = [views(vector, layout.parameters) for vector in vectors]
        self._changes = [views(vector, layout.float_buffers) for vector in vectors]
        self._counts = [views(vector, layout.int_buffers) for vector in vectors]
        self._version = -1

    def read(self, version: int, round_number: int) -> None:
        if version == self._version:
            return
        self._version, published = version, self._published[version]
        published.adopt_parameters(self._model, copy_in=False)
        self._buffers.follow(views(published.floats, self._layout.float_buffers), published.int_views())

    def load_buffers(self) -> None:
        self._buffers.load()

    def seed(self, seed: int) -> None:
        # torch.manual_seed would seed the other devices too, which takes 0.9 ms and, without one, piles up calls.
        torch.default_generator.manual_seed(seed)

    def bring(self, batch: Batch) -> Batch:
        return batch

    def take(self, brought: Batch) -> Batch:
        return brought

    def begin(self, slot: int, scale: float, there: There) -> None:
        self._slot, self._there = slot, there
        self._backward.begin(scale)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._backward.run(loss, is_last)

    def value(self, loss: Tensor) -> Callable[[], float]:
        return loss.detach().item

    def finish(self, rows: int) -> None:
        for bucket in self._backward.rest():
            self._put(bucket)
        if self._layout.has_buffers:
            self._buffers.add_changes(self._changes[self._slot], self._counts[self._slot], rows)
            self._there(Span(self._layout.num_gradients, self._layout.num_floats))

    def _put(self, bucket: Bucket) -> None:
        # Copying the gradients costs less than letting backward add them to zeroed views (4.8 against 5.4 ms a step
        # of an MLP 784-512-512-10 with 128 rows): autograd then hands its own tensors over instead of adding.
        start = time.perf_counter()
        self._backward.put(bucket, self._gradients[self._slot])
        self.copy_s += time.perf_counter() - start
        self._there(bucket.span)

    def close(self) -> None:
        pass
