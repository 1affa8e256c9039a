"""Whole runs of loop and workers in one process: the same weights whoever computes, and nothing lost."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch

from distrain.config import ClipConfig, ConvergenceConfig, EarlyStoppingConfig, OptimizerConfig
from distrain.data.plan import Plan
from distrain.errors import DivergenceError, TrainingError
from distrain.exchange.link import Frame
from distrain.learning.model_state import restore_model
from distrain.server.loop import LoopSettings
from distrain.worker import Source, Worker
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, KilledWorker, open_run, start_worker, task, train


def source(rows: int = 137, batch_size: int = 16, shards: int = 4, seed: int = 0, shuffle: bool = True) -> Source:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    label = (features @ [1.0, -2.0, 0.5, 0.0] + 0.1).astype(np.float32)
    dataset = ArrayDataset(features, label, row_group_rows=17)
    return Source(dataset, Plan(dataset.row_counts, batch_size, shards, shuffle_rows=40, seed=3, shuffle=shuffle))


def job(**loop) -> Job:
    settings = LoopSettings(**{"epochs": 3, **loop})
    return Job(source(), task({"hidden": [8], "batch_norm": True}), source(50, shuffle=False), loop=settings)


@pytest.fixture(scope="module")
def undisturbed() -> str:
    run, _ = train(job())
    return run.outcome.parameters_sha256


@pytest.mark.parametrize(("num_workers", "links"), [(2, "unix"), (3, "unix"), (4, "unix"), (3, "tcp")])
def test_any_number_of_workers_over_any_link_gives_the_same_bits(undisturbed, num_workers: int, links: str):
    run, report = train(job(num_workers=num_workers), num_workers, links)
    assert run.outcome.parameters_sha256 == undisturbed
    assert run.outcome.status == "finished" and run.outcome.step == 27 and run.outcome.epoch == 3
    assert [r.samples for r in report.steps] == ([16] * 8 + [9]) * 3
    assert [v.samples for v in report.validations] == [50, 50, 50]
    assert report.validations[-1].metrics["loss"] < report.validations[0].metrics["loss"]
    assert {r.workers for r in report.steps} == {num_workers}


class Mortal(Worker):
    """Dies, as a killed process does, when asked for a step of `deaths`: {rank: (step, when)}."""

    deaths: ClassVar[dict[int, tuple[int, str]]] = {}
    died: ClassVar[list[int]] = []

    def handle(self, frame: Frame) -> None:
        step, when = self.deaths.get(self.rank, (-1, ""))
        if frame.step != step or self.rank in self.died:
            return super().handle(frame)
        if when == "after":
            super().handle(frame)
        self.died.append(self.rank)
        self._link.close()
        raise KilledWorker


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker_costs_no_step_and_no_bit(undisturbed, when: str):
    Mortal.deaths, Mortal.died = {1: (5, when)}, []
    run, report = train(job(num_workers=2), 2, cls=Mortal)
    assert Mortal.died == [1]
    assert run.outcome.parameters_sha256 == undisturbed
    assert [e.rank for e in report.events if e.kind == "lost"] == [1]
    assert len(report.steps) == 27


def test_all_workers_may_die_and_others_go_on(undisturbed):
    Mortal.deaths, Mortal.died = {0: (4, "before"), 1: (4, "before")}, []
    the_job = job(num_workers=2)
    run = open_run(the_job)
    for rank in (0, 1):
        start_worker(run, the_job, rank, cls=Mortal)

    def replace_the_dead() -> None:
        while len(Mortal.died) < 2:
            time.sleep(0.01)
        start_worker(run, the_job, 2)

    threading.Thread(target=replace_the_dead, daemon=True).start()
    assert run.loop.run().parameters_sha256 == undisturbed


class Sleeper(Worker):
    """Rank 1 falls silent at step 6, and wakes after it was given up, while the other one waits at step 20."""

    woke = threading.Event()
    pushed = threading.Event()

    def handle(self, frame: Frame) -> None:
        late = self.rank == 1 and frame.step == 6 and not self.woke.is_set()
        if late:
            self.woke.wait(30)
        if self.rank == 0 and frame.step == 20:
            self.woke.set()
            self.pushed.wait(0.4)
        super().handle(frame)
        if late:
            self.pushed.set()


def test_a_silent_worker_is_given_up_and_what_it_pushes_later_is_refused(undisturbed):
    Sleeper.woke.clear()
    Sleeper.pushed.clear()
    the_job = job(num_workers=2, worker_timeout_s=0.5)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=Sleeper) for rank in (0, 1)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert outcome.parameters_sha256 == undisturbed
    events = run.reports.drain().events
    [lost] = [e for e in events if e.kind == "lost"]
    assert lost.message == "worker 1 was given up: it was silent for 0.5 s"
    [recovered] = [e for e in events if e.kind == "recovered"]
    assert recovered.seconds is not None and 0 < recovered.seconds < 1
    [refused] = [e for e in events if e.kind == "refused"]
    assert "of step 7 was refused: its worker had been given up" in refused.message
    assert outcome.refused_pushes == 1


def test_a_worker_that_joins_later_takes_part(undisturbed):
    the_job = job(num_workers=1)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    start_worker(run, the_job, 1)
    assert run.loop.run().parameters_sha256 == undisturbed


def test_stopped_in_the_middle_of_an_epoch_and_resumed_at_another_count(undisturbed):
    first, _ = train(job(max_steps=13, num_workers=3), 3)
    snapshots = []
    while (snapshot := first.reports.take_snapshot()) is not None:
        snapshots.append(snapshot)
    assert snapshots[-1].step == 13 and first.outcome.parameters_sha256 != undisturbed

    from safetensors.torch import load

    the_job = job(num_workers=2)
    run = open_run(the_job)
    restore_model(run.server.model, load(snapshots[-1].model))
    run.server.published.store_buffers(run.server.model)
    run.loop.restore(13, snapshots[-1].state, load(snapshots[-1].optimizer))
    for rank in range(2):
        start_worker(run, the_job, rank)
    outcome = run.loop.run()
    assert outcome.parameters_sha256 == undisturbed
    assert [r.step for r in run.reports.drain().steps] == list(range(14, 28))


def test_stop_finishes_the_step_and_snapshots():
    the_job = job(epochs=10_000)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    threading.Timer(0.5, lambda: run.loop.stop("enough")).start()
    outcome = run.loop.run()
    assert (outcome.status, outcome.reason) == ("stopped", "enough")
    assert run.reports.take_snapshot() is None, "a snapshot came before the steps that led to it"
    run.reports.drain()
    last = None
    while (snapshot := run.reports.take_snapshot()) is not None:
        last = snapshot
    assert last is not None and last.step == outcome.step


def test_abort_ends_a_run_that_nobody_works_for():
    run = open_run(job())
    threading.Timer(0.2, lambda: run.loop.abort(TrainingError("no worker can be kept alive"))).start()
    with pytest.raises(TrainingError, match="no worker can be kept alive"):
        run.loop.run()


def test_a_diverging_run_stops_and_keeps_the_last_good_parameters():
    the_job = job()
    the_job.optimizer = OptimizerConfig(name="SGD", lr=1e30)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with pytest.raises(DivergenceError, match=r"step \d+: the (loss|gradient) is not finite"):
        run.loop.run()


class Faulty(Worker):
    """The user's model raises at step 3."""

    def handle(self, frame: Frame) -> None:
        if frame.step == 3:
            self._model.forward = lambda features: features @ torch.zeros(99, 1)
        super().handle(frame)


def test_what_the_users_model_raises_ends_the_run_with_their_traceback():
    the_job = job()
    run = open_run(the_job)
    start_worker(run, the_job, 0, cls=Faulty)
    with pytest.raises(TrainingError) as error:
        run.loop.run()
    assert "step 4, shard 0: the model or the loss raised RuntimeError" in error.value.message
    assert "features (4, 4) torch.float32" in error.value.message
    assert "features @ torch.zeros(99, 1)" in error.value.message


def test_clipping_bounds_the_step_and_is_reported():
    the_job = job(epochs=1)
    the_job.clip = ClipConfig(norm=1e-3)
    _, report = train(the_job)
    assert all(r.clipped for r in report.steps)


def test_early_stopping_and_convergence_end_a_run():
    the_job = job(epochs=200, early_stopping=EarlyStoppingConfig(patience=2, min_delta=1.0))
    run, _ = train(the_job)
    assert run.outcome.epoch < 20 and "no better validation loss" in run.outcome.reason
    the_job = job(epochs=200, convergence=ConvergenceConfig(loss_change=10.0, window=3))
    run, _ = train(the_job)
    assert run.outcome.step == 6 and run.outcome.reason.startswith("converged: the loss changed by")


def test_more_workers_than_shards_leaves_some_idle_but_ready():
    the_job = job(num_workers=6)
    run, _ = train(the_job, 6)
    assert run.outcome.status == "finished"
