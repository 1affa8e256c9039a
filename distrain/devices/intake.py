"""Microbatches on their way to a device: the next one while this one computes, where the device allows it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

from distrain.devices.device import Batch, Device
from distrain.errors import DistrainError


class Microbatches(Protocol):
    """Where microbatches, or pieces of them, are read."""

    def microbatch(self, step: int, shard: int, piece: int | None = None) -> Batch: ...


Key = tuple[Microbatches, int, int, int | None]
"""What to read: where, and its step, shard and piece."""


class Intake:
    """Reads what is asked for and brings it to the device, unless it is on its way already."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.is_ahead = device.is_ahead  # whether `bring_next` pays
        self._ahead: tuple[Key, Any] | None = None

    def take(self, key: Key) -> Batch:
        """The rows, on the device. Raises what reading them raises."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key:
            return self._device.take(ahead[1])
        return self._device.take(self._device.bring(key[0].microbatch(*key[1:])))

    def bring_next(self, key: Key) -> None:
        """Read what is likely to be asked for next, and begin to bring it in."""
        with suppress(DistrainError):  # it comes again when the rows are asked for
            self._ahead = (key, self._device.bring(key[0].microbatch(*key[1:])))
