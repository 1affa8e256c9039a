"""Ray shells of the parameter server and the worker: what Ray starts, a few lines each."""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import ray
import torch

from distrain.checkpoint import Snapshot
from distrain.config import (
    AveragingConfig,
    ClipConfig,
    GradientNoiseConfig,
    OptimizerConfig,
    PenaltyConfig,
    ScheduleConfig,
)
from distrain.data.statistics import measure
from distrain.devices import Arithmetic, Device, HostDevice, StreamedDevice
from distrain.devices.cuda import Cuda
from distrain.errors import ClusterError, ConfigError, DistrainError, LinkError
from distrain.exchange.layout import Layout
from distrain.exchange.link import Address, Hub
from distrain.exchange.slices import cut
from distrain.exchange.wire import WIRES, WireDtype
from distrain.learning.annealing import GradientNoise
from distrain.learning.fit import check_task
from distrain.learning.penalties import build_penalty
from distrain.learning.task import Task, TaskSpec, build_task
from distrain.process import keep_freed_memory
from distrain.records import Report
from distrain.relay import Relay
from distrain.server.loop import Loop, LoopSettings, Outcome
from distrain.server.loss_scale import LossScale
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.worker import Source, Worker, WorkerOptions

T = TypeVar("T")

_MOST_THREADS = 4
# What Ray's paragraphs on a dead actor come down to; the first that fits counts.
_RAY_SAYS = {
    "running low on memory": "Ray ended its process, since its node ran out of memory: fewer workers a node, a smaller "
    "batch_size or data.shuffle_rows need less",
    "NODE_OUT_OF_MEMORY": "Ray ended its process, since its node ran out of memory: fewer workers a node, a smaller "
    "batch_size or data.shuffle_rows need less",
    "killed by `ray.kill`": "its process was ended, since it had been given up",
    "node has died": "its node died",
    "node died": "its node died",
    "connection error code 2": "its process ended without a word: killed, out of memory, or crashed",
}


@dataclass(frozen=True)
class RunSpec:
    """What server and workers are built from. `search_path` is where the user's modules are looked up."""

    task: TaskSpec
    train: Source
    validation: Source | None
    token: str
    search_path: tuple[str, ...]
    options: WorkerOptions
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def prepare_process(self, num_threads: int) -> None:
        """Make this process ready: memory, thread count, and where the user's code lies."""
        keep_freed_memory()
        torch.set_num_threads(num_threads)
        sys.path[:0] = [path for path in self.search_path if path not in sys.path]


@dataclass(frozen=True)
class UpdateSpec:
    """What only the server needs to know about a run."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig | None
    clip: ClipConfig | None
    penalty: PenaltyConfig
    gradient_noise: GradientNoiseConfig | None
    averaging: AveragingConfig | None
    delay_compensation: float
    loop: LoopSettings
    num_threads: int | None  # None: as many as the workers leave
    cpus_of_workers: float  # on the server's node
    spans_nodes: bool
    first_loss_scale: float | None = None  # fp16 only
    wire_dtype: WireDtype = "fp32"


@dataclass(frozen=True)
class Restored:
    """A checkpoint's content."""

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Ready:
    """The server listens."""

    address: Address
    num_parameters: int


class _Once(Generic[T]):
    """Gives values one after the other, and the same again to whoever did not get it.

    Ray repeats a call whose answer was lost, and may have made it: so whoever calls says how many values it has.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._given = 0
        self._last: T | None = None
        self._error: BaseException | None = None

    def get(self, number: int = 0) -> T:
        """Value `number`, counted from 0: the next one, or the last one again."""
        with self._lock:
            if number == self._given:
                self._given += 1
                self._last = None
                try:
                    self._last = self._make()
                except BaseException as error:
                    self._error = error
            if self._error is not None:
                raise self._error
            return cast(T, self._last)


class ServerActor:
    """The parameter server's process: `prepare`, then `run`; the rest may be called meanwhile. Any call may be made
    twice."""

    def __init__(self) -> None:
        self._reports = Reports()
        self._loop: Loop | None = None
        self._stop_reason: str | None = None
        self._prepared: _Once[Ready] | None = None
        self._restored: Restored | None = None  # until it was taken over
        self._outcome = _Once(self._train)
        self._polled = _Once(self._reports.drain)
        self._snapshots = _Once(self._reports.take_snapshot)
        self._lock = threading.Lock()

    def prepare(self, run: RunSpec, update: UpdateSpec, restored: Restored | None) -> Ready:
        """Build the model and listen for workers."""
        with self._lock:
            if self._prepared is None:
                self._restored, self._prepared = restored, _Once(lambda: self._prepare(run, update))
        return self._prepared.get()

    def _prepare(self, run: RunSpec, update: UpdateSpec) -> Ready:
        restored, self._restored = self._restored, None
        run.prepare_process(1)
        task = run.task
        statistics = None
        if task.needs_statistics and restored is None:
            statistics = measure(run.train.dataset, task.standardize, task.num_classes)
        built = build_task(task, statistics)
        check_task(built, run.train.dataset, run.train.plan.smallest_forward)
        server = _server(built, update, update.loop.slices - 1, task.seed)
        host = ray.util.get_node_ip_address() if update.spans_nodes else None
        hub = Hub(run.token, host)
        validation_plan = run.validation.plan if run.validation is not None else None
        self._loop = Loop(server, hub, run.train.plan, update.loop, self._reports, built.metrics, validation_plan)
        self._num_threads = update.num_threads or update_threads(update.cpus_of_workers)
        if restored is not None:
            self._loop.restore(restored.step, restored.model, restored.state, restored.optimizer)
        return Ready(hub.address, sum(p.numel() for p in built.model.parameters()))

    def run(self) -> Outcome:
        """Train to the end."""
        return self._outcome.get()

    def _train(self) -> Outcome:
        assert self._loop is not None
        torch.set_num_threads(self._num_threads)  # each of Ray's threads has a count of its own
        if self._stop_reason is not None:
            self._loop.stop(self._stop_reason)
        return self._loop.run()

    def poll(self, number: int) -> Report:
        """What happened since the last report; the caller has `number` of them."""
        return self._polled.get(number)

    def take_snapshot(self, number: int) -> Snapshot | None:
        """The oldest snapshot waiting; the caller has made `number` such calls that were answered."""
        return self._snapshots.get(number)

    def stop(self, reason: str) -> None:
        self._stop_reason = reason
        if self._loop is not None:
            self._loop.stop(reason)

    def retire(self, launch: int) -> None:
        if self._loop is not None:
            self._loop.retire(launch)

    def give_up(self, launch: int, cause: str) -> bool:
        """Go on without a worker. Whether the run goes on, and is not over by now."""
        if self._loop is not None:
            self._loop.give_up(launch, cause)
        return self._loop is None or not self._loop.is_over

    def abort(self, error: DistrainError) -> None:
        if self._loop is not None:
            self._loop.abort(error)


class RelayActor:
    """The process of a node's relay, which may own a slice: `prepare`, then `run`."""

    def prepare(self, run: RunSpec, update: UpdateSpec, ready: Ready, slice_: int | None) -> Ready:
        """Build the model and listen for the workers of this node."""
        self._num_threads = 1 if slice_ is None else update.num_threads or update_threads(update.cpus_of_workers)
        run.prepare_process(self._num_threads)
        built = build_task(run.task)
        server = _server(built, update, slice_, run.task.seed) if slice_ is not None else None
        layout, num_shards = Layout.of(built.model), run.train.plan.num_shards
        ip = ray.util.get_node_ip_address()
        wire = WIRES[update.wire_dtype](layout)
        self._relay = Relay(layout, num_shards, run.token, ip, slice_, update.loop.slices, server, wire)
        self._server = ready.address
        return Ready(self._relay.address, ready.num_parameters)

    def run(self, launch: int) -> None:
        """Join the server and serve it to the end."""
        torch.set_num_threads(self._num_threads)
        self._relay.join(self._server, launch)
        self._relay.run()


class WorkerActor:
    """A worker's process."""

    def run(
        self,
        rank: int,
        launch: int,
        run: RunSpec,
        ready: Ready,
        server_node: str,
        num_threads: int,
        has_gpu: bool,
        relay: Ready | None = None,
        relay_node: str = "",
    ) -> int:
        """Join the server, by way of a relay if this is the node of one, and serve it to the end. Returns the most
        memory that this process ever held, in bytes.

        Raises ClusterError where it has a GPU and cannot use it.
        """
        run.prepare_process(num_threads)
        run.arithmetic.prepare_process()
        task = build_task(run.task)
        device: Device = StreamedDevice(Cuda()) if has_gpu else HostDevice()
        worker = Worker(
            rank, task.model, task.loss, task.metrics, run.train, run.validation, run.task.seed, device, run.arithmetic,
            run.options,
        )  # fmt: skip
        node = ray.get_runtime_context().get_node_id()
        if relay is not None and node == relay_node:
            ready, server_node = relay, node
        worker.join(ready.address, node == server_node, run.token, launch)
        worker.run()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class SpareActor(WorkerActor):
    """A worker's process that has no place yet. With a name of its own, so that it is not taken for one at work."""


def _server(built: Task, update: UpdateSpec, slice_: int, seed: int) -> ParameterServer:
    """The parameter server of one slice. Raises ConfigError where the model cannot be cut into so many."""
    try:
        span = cut(Layout.of(built.model), update.loop.slices)[slice_]
    except ValueError as error:
        raise ConfigError(f"server.slices is {update.loop.slices}: {error}") from error
    staleness = 0 if update.loop.asynchronous else update.loop.staleness or 0
    return ParameterServer(
        built.model,
        update.optimizer,
        update.schedule,
        update.clip,
        staleness,
        update.delay_compensation,
        build_penalty(built.model, update.penalty),
        LossScale(update.first_loss_scale, staleness) if update.first_loss_scale is not None else None,
        GradientNoise(update.gradient_noise, seed) if update.gradient_noise is not None else None,
        update.averaging,
        span,
        update.wire_dtype,
    )


def update_threads(cpus_of_workers: float) -> int:
    """How many threads an update takes: as many as the workers leave cores, since waiting for a thread that waits for
    a core costs more than it saves; more than 4 wait for memory. The result does not depend on it."""
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - math.ceil(cpus_of_workers)))


def worker_failure(error: Exception) -> str:
    """One line on why a worker's call ended."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, LinkError | ClusterError):
        return cause.message
    text = " ".join(str(cause).split())
    for sign, meaning in _RAY_SAYS.items():
        if sign in text:
            return meaning
    return text[:300] or type(cause).__name__
