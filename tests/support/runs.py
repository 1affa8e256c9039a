"""A whole run in one process: server loop and workers on threads, over real links, without Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from distrain.config import ClipConfig, LossConfig, ModelConfig, OptimizerConfig, PenaltyConfig, ScheduleConfig
from distrain.errors import DistrainError
from distrain.exchange.link import Hub
from distrain.learning.penalties import build_penalty
from distrain.learning.task import TaskSpec, build_task
from distrain.records import Report
from distrain.server.loop import Loop, LoopSettings, Outcome
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.worker import Source, Worker

TOKEN = "a test's token"


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


@dataclass
class Run:
    """A run under way or over."""

    server: ParameterServer
    loop: Loop
    hub: Hub
    reports: Reports
    outcome: Outcome | None = None


def task(model: dict | None = None, loss: str = "mse", num_features: int = 4, num_outputs: int = 1, seed: int = 0):
    """A small task; `model` are keys of the configuration's model section."""
    return TaskSpec(
        ModelConfig(**(model or {"hidden": [8]})), LossConfig(name=loss), num_features, num_outputs, False, seed
    )


def open_run(job: Job) -> Run:
    """Build the server and listen."""
    torch.set_num_threads(1)
    built = build_task(job.task)
    staleness = 0 if job.loop.asynchronous else job.loop.staleness or 0
    penalty = build_penalty(built.model, job.penalty)
    server = ParameterServer(
        built.model, job.optimizer, job.schedule, job.clip, staleness, job.delay_compensation, penalty
    )
    hub, reports = Hub(TOKEN, "127.0.0.1"), Reports()
    validation_plan = job.validation.plan if job.validation is not None else None
    loop = Loop(server, hub, job.train.plan, job.loop, reports, built.metrics, validation_plan)
    return Run(server, loop, hub, reports)


def start_worker(run: Run, job: Job, rank: int, same_node: bool = True, cls: type[Worker] = Worker) -> threading.Thread:
    """A worker on a thread of its own; it ends with the run."""

    def work() -> None:
        torch.set_num_threads(1)
        built = build_task(job.task)
        worker = cls(rank, built.model, built.loss, built.metrics, job.train, job.validation, job.task.seed)
        try:
            worker.join(run.hub.address, same_node, TOKEN)
            worker.run()
        except (DistrainError, KilledWorker):
            pass  # it told the server, or the server knows from the link's end

    thread = threading.Thread(target=work, name=f"worker {rank}", daemon=True)
    thread.start()
    return thread


class KilledWorker(Exception):
    """A worker's sudden end, as a value for tests."""


def train(job: Job, num_workers: int = 1, links: str = "unix", cls: type[Worker] = Worker) -> tuple[Run, Report]:
    """Run a job to its end. Raises what the loop raised."""
    run = open_run(job)
    threads = [start_worker(run, job, rank, links == "unix", cls) for rank in range(num_workers)]
    run.outcome = run.loop.run()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), f"{thread.name} did not end with the run"
    return run, run.reports.drain()
