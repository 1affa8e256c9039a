"""What the driver's machine is doing: MLflow's own monitors, whose points its page shows as "System metrics"."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from distrain.tracking.store import first_line
from distrain.tracking.thinning import Point

_EVERY_S = 10.0  # where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL does not say


class SystemMetrics:
    """Processor, memory, disk and network of this machine, and its NVIDIA GPUs. `notify` is told what is left out."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._every_s = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _EVERY_S)
        self._monitors: list[BaseMetricsMonitor] = []
        kinds: list[type[BaseMetricsMonitor]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
        if shutil.which("nvidia-smi"):
            kinds.append(GPUMonitor)
            # Else it says every time what a GPU does not measure, such as the power of one in a laptop.
            logging.getLogger(GPUMonitor.__module__).setLevel(logging.ERROR)
        for kind in kinds:
            try:
                monitor = kind()
                monitor.collect_metrics()  # a processor's use is that since it was last asked
            except Exception as error:  # the system's files may not be there in a container
                self._left_out(kind, error)
            else:
                monitor.clear_metrics()
                self._monitors.append(monitor)
        self._due_at = time.monotonic() + self._every_s

    def take(self, step: int, at_once: bool = False) -> list[Point]:
        """Points of now, as of this step, where it is time for some, or with `at_once`."""
        if not at_once and time.monotonic() < self._due_at:
            return []
        self._due_at = time.monotonic() + self._every_s
        points, time_ms = [], time.time_ns() // 1_000_000
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                values = monitor.aggregate_metrics()
            except Exception as error:
                self._left_out(type(monitor), error)
                self._monitors.remove(monitor)
            else:
                points += [Point(f"system/{key}", float(value), time_ms, step) for key, value in values.items()]
                monitor.clear_metrics()
        return points

    def _left_out(self, kind: type[BaseMetricsMonitor], error: Exception) -> None:
        hint = "; pip install 'distrain[gpu]'" if isinstance(error, ImportError) else ""
        what = kind.__name__.removesuffix("Monitor")
        self._notify(f"no system metrics of {what}: {first_line(error)}{hint}")
