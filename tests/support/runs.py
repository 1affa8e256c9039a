"""A whole run in one process: server loop and workers on threads, over real links, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from distrain.config import (
    AveragingConfig,
    ClipConfig,
    GradientNoiseConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PenaltyConfig,
    ScheduleConfig,
)
from distrain.devices import Arithmetic, Device, HostDevice
from distrain.errors import DistrainError
from distrain.exchange.layout import Layout
from distrain.exchange.link import Frame, Hub, Kind
from distrain.exchange.slices import cut
from distrain.exchange.wire import WIRES
from distrain.learning.annealing import GradientNoise
from distrain.learning.penalties import build_penalty
from distrain.learning.task import Task, TaskSpec, build_task
from distrain.records import Report
from distrain.relay import Relay
from distrain.server.loop import Loop, LoopSettings, Outcome
from distrain.server.loss_scale import LossScale
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.worker import Source, Worker, WorkerOptions

TOKEN = "a test's token"
_END_SECONDS = 2.0
_started: list[threading.Thread] = []  # workers


@dataclass
class Job:
    """What a run in one process is made of."""

    train: Source
    task: TaskSpec
    validation: Source | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig | None = None
    clip: ClipConfig | None = None
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(epochs=1))
    delay_compensation: float = 0.0
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    first_loss_scale: float | None = None
    devices: tuple[Callable[[], Device], ...] = (HostDevice,)  # worker by worker, over and over
    gradient_noise: GradientNoiseConfig | None = None
    averaging: AveragingConfig | None = None
    options: WorkerOptions = field(default_factory=WorkerOptions)


@dataclass
class Run:
    """A run under way or over."""

    server: ParameterServer
    loop: Loop
    hub: Hub
    reports: Reports
    outcome: Outcome | None = None
    relays: list[Relay] = field(default_factory=list)


def task(model: dict | None = None, loss: str = "mse", num_features: int = 4, num_outputs: int = 1, seed: int = 0):
    """A small task; `model` are keys of the configuration's model section."""
    return TaskSpec(
        ModelConfig(**(model or {"hidden": [8]})), LossConfig(name=loss), num_features, num_outputs, False, seed
    )


def build_server(job: Job, slice_: int) -> tuple[ParameterServer, Task]:
    """The parameter server of one of the run's slices."""
    torch.set_num_threads(1)
    built = build_task(job.task)
    staleness = 0 if job.loop.asynchronous else job.loop.staleness or 0
    scale = None if job.first_loss_scale is None else LossScale(job.first_loss_scale, staleness, growth_steps=4)
    penalty = build_penalty(built.model, job.penalty)
    span = cut(Layout.of(built.model), job.loop.slices)[slice_]
    server = ParameterServer(
        built.model, job.optimizer, job.schedule, job.clip, staleness, job.delay_compensation, penalty, scale,
        GradientNoise(job.gradient_noise, job.task.seed) if job.gradient_noise else None, job.averaging, span,
        job.options.wire_dtype,
    )  # fmt: skip
    return server, built


def open_run(job: Job) -> Run:
    """Build the server and listen. What earlier runs left running ends first: it would draw from the random numbers
    that initial weights are made of, which threads share."""
    while _started:
        _started.pop().join(_END_SECONDS)
    server, built = build_server(job, job.loop.slices - 1)
    hub, reports = Hub(TOKEN, "127.0.0.1"), Reports()
    validation_plan = job.validation.plan if job.validation is not None else None
    loop = Loop(server, hub, job.train.plan, job.loop, reports, built.metrics, validation_plan)
    return Run(server, loop, hub, reports)


def start_worker(
    run: Run,
    job: Job,
    rank: int,
    same_node: bool = True,
    cls: type[Worker] = Worker,
    relay: Relay | None = None,
    launch: int = 0,
) -> threading.Thread:
    """A worker on a thread of its own, on the server's host or a relay's; it ends with the run."""

    def work() -> None:
        torch.set_num_threads(1)
        built = build_task(job.task)
        worker = cls(
            rank, built.model, built.loss, built.metrics, job.train, job.validation, job.task.seed,
            job.devices[rank % len(job.devices)](), job.arithmetic, job.options,
        )  # fmt: skip
        try:
            worker.join((relay or run.hub).address, same_node, TOKEN, launch)
            worker.run()
        except (DistrainError, KilledWorker):
            pass  # it told the server, or the server knows from the link's end
        except BaseException:
            worker._link.close()  # as its process's end would: a test that is wrong fails, and does not wait for ever
            raise

    thread = threading.Thread(target=work, name=f"worker {rank}", daemon=True)
    thread.start()
    _started.append(thread)
    return thread


def start_relay(run: Run, job: Job, slice_: int | None = None, cls: type[Relay] = Relay) -> Relay:
    """Another host's relay, on a thread of its own; it ends with the run."""
    server = build_server(job, slice_)[0] if slice_ is not None else None
    layout = run.server.layout
    shards = job.train.plan.num_shards
    wire = WIRES[job.options.wire_dtype](layout)
    relay = cls(layout, shards, TOKEN, "127.0.0.1", slice_, job.loop.slices, server, wire)

    def work() -> None:
        torch.set_num_threads(1)
        with suppress(DistrainError, KilledWorker):
            relay.join(run.hub.address)
            relay.run()

    relay.thread = threading.Thread(target=work, name=f"relay of slice {slice_}", daemon=True)
    relay.thread.start()
    return relay


class KilledWorker(Exception):
    """A worker's sudden end, as a value for tests."""


class Mortal(Worker):
    """Dies, as a killed process does, when asked for a training step of `deaths`: {rank: (step, when)}."""

    deaths: ClassVar[dict[int, tuple[int, str]]] = {}
    died: ClassVar[list[int]] = []

    def handle(self, frame: Frame) -> None:
        step, when = self.deaths.get(self.rank, (-1, ""))
        if frame.step != step or self.rank in self.died or frame.kind is not Kind.TRAIN:
            return super().handle(frame)
        if when == "after":
            super().handle(frame)
        self.died.append(self.rank)
        self._link.close()
        raise KilledWorker


def train(job: Job, num_workers: int = 1, links: str = "unix", cls: type[Worker] = Worker) -> tuple[Run, Report]:
    """Run a job to its end. Raises what the loop raised."""
    run = open_run(job)
    threads = [start_worker(run, job, rank, links == "unix", cls) for rank in range(num_workers)]
    run.outcome = run.loop.run()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), f"{thread.name} did not end with the run"
    return run, run.reports.drain()
