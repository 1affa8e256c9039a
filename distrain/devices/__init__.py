"""Where a worker computes: the host, or a GPU beside it."""

from distrain.devices.arithmetic import Arithmetic
from distrain.devices.device import Device, HostDevice
from distrain.devices.intake import Intake, Key
from distrain.devices.streamed import StreamedDevice

__all__ = ["Arithmetic", "Device", "HostDevice", "Intake", "Key", "StreamedDevice"]
