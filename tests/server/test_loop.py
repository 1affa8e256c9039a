"""Whole runs of loop and workers in one process: the same weights whoever computes, and nothing lost."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn

from distrain.checkpoint import Snapshot
from distrain.config import (
    AveragingConfig,
    ClipConfig,
    ConvergenceConfig,
    EarlyStoppingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PenaltyConfig,
    TargetConfig,
)
from distrain.data.plan import Plan
from distrain.devices import HostDevice, StreamedDevice
from distrain.errors import DistrainError, DivergenceError, TrainingDataError, TrainingError
from distrain.exchange.link import Frame, Kind
from distrain.exchange.memory import Published
from distrain.history import History, check
from distrain.learning.task import TaskSpec, build_task
from distrain.records import Report
from distrain.reduction import Partial
from distrain.server.loop import LoopSettings
from distrain.server.parameter_server import Gathered, ParameterServer
from distrain.server.reports import Captured
from distrain.server.stopping import Stopping
from distrain.worker import Source, Worker
from tests.server import test_nonfinite
from tests.support.accelerator import FakeGpu
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, KilledWorker, Mortal, Run, open_run, start_worker, task, train


def source(rows: int = 137, batch_size: int = 16, shards: int = 4, seed: int = 0, shuffle: bool = True) -> Source:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    label = (features @ [1.0, -2.0, 0.5, 0.0] + 0.1).astype(np.float32)
    dataset = ArrayDataset(features, label, row_group_rows=17)
    return Source(dataset, Plan(dataset.row_counts, batch_size, shards, shuffle_rows=40, seed=3, shuffle=shuffle))


def job(**loop) -> Job:
    settings = LoopSettings(**{"epochs": 3, **loop})
    return Job(source(), task({"hidden": [8], "normalization": "batch"}), source(50, shuffle=False), loop=settings)


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
        if self.rank == 0 and frame.step in (10, 15, 20) and not self.woke.is_set():
            time.sleep(0.3)
        if self.rank == 0 and frame.step == 20:
            self.woke.set()
            self.pushed.wait(0.4)
        super().handle(frame)
        if late:
            self.pushed.set()


def test_a_silent_worker_is_helped_then_given_up_and_what_it_pushes_later_is_refused(undisturbed):
    Sleeper.woke.clear()
    Sleeper.pushed.clear()
    the_job = job(num_workers=2, worker_timeout_s=0.7)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=Sleeper) for rank in (0, 1)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert outcome.parameters_sha256 == undisturbed
    assert outcome.copied_microbatches == 2, "the other one did its part of the step"
    events = run.reports.drain().events
    [lost] = [e for e in events if e.kind == "lost"]
    assert lost.message == "worker 1 was given up: it was silent for 0.7 s"
    [refused] = [e for e in events if e.kind == "refused"]
    assert "of step 7 was refused: its worker had been given up" in refused.message
    assert outcome.refused_pushes == 1


def test_what_a_worker_pushes_that_its_supervisor_gave_up_is_refused(undisturbed):
    """Its node is out of reach, say, while its link still stands."""

    class Cut(Worker):
        def handle(self, frame: Frame) -> None:
            if self.rank == 1 and frame.step == 6:
                run.loop.give_up(1, "its node died")
                while not [e for e in run.reports.drain().events if e.kind == "lost"]:
                    time.sleep(0.01)
            if self.rank == 0 and frame.step == 12:
                pushed.wait(10)
            super().handle(frame)
            if self.rank == 1 and frame.step == 6:
                pushed.set()
                time.sleep(0.1)  # the link is not to end before the push was read

    pushed = threading.Event()
    the_job = job(num_workers=2)
    run = open_run(the_job)
    start_worker(run, the_job, 0, cls=Cut)
    start_worker(run, the_job, 1, cls=Cut, launch=1)
    outcome = run.loop.run()
    assert outcome.parameters_sha256 == undisturbed and outcome.refused_pushes == 1


def test_recovery_is_told_though_others_had_done_the_lost_worker_s_part_already(undisturbed):
    """It is lost after an idle worker delivered its part, and before the step is whole."""
    events = []

    class Held(Worker):
        def handle(self, frame: Frame) -> None:
            if frame.kind is Kind.TRAIN and frame.step == 2:
                if self.rank != 0:
                    held[frame.first] = self.rank
                    released.wait(30)
                else:
                    copied.extend([held[frame.first]] if frame.first in held else [])
                    if len(copied) == 2:  # and the first of them is delivered
                        run.loop.give_up(copied[0], "its node died")
                        while "lost" not in [event.kind for event in events]:
                            time.sleep(0.01)
                            events.extend(run.reports.drain().events)
                        released.set()
            super().handle(frame)

    held, copied, released = {}, [], threading.Event()
    the_job = job(num_workers=3)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=Held, launch=rank) for rank in range(3)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
    assert outcome.parameters_sha256 == undisturbed
    events += run.reports.drain().events
    assert [e.rank for e in events if e.kind == "lost"] == [copied[0]]
    [recovered] = [e for e in events if e.kind == "recovered"]
    assert recovered.seconds is not None and "the step in flight was whole" in recovered.message


def test_recovery_is_told_of_a_worker_that_owed_nothing(undisturbed):
    events = []

    class Idle(Worker):
        def handle(self, frame: Frame) -> None:
            if frame.kind is Kind.TRAIN and frame.step == 5 and self.rank == 0:
                pushed.wait(30)
                run.loop.give_up(1, "its node died")
                while "lost" not in [event.kind for event in events]:
                    time.sleep(0.01)
                    events.extend(run.reports.drain().events)
            super().handle(frame)
            if frame.step == 5 and self.rank == 1:
                pushed.set()

    pushed = threading.Event()
    the_job = job(num_workers=2)
    run = open_run(the_job)
    for rank in range(2):
        start_worker(run, the_job, rank, cls=Idle, launch=rank)
    assert run.loop.run().parameters_sha256 == undisturbed
    events += run.reports.drain().events
    [recovered] = [e for e in events if e.kind == "recovered"]
    assert recovered.seconds is not None and "the step in flight was whole" in recovered.message


class Pensive(test_nonfinite.Steep):
    """Takes a while for each forward pass, or each but those of training."""

    everywhere = False

    def forward(self, features: Tensor) -> Tensor:
        if self.everywhere or not self.training:
            time.sleep(0.03)
        return super().forward(features)


def pensive() -> nn.Module:
    return Pensive()


class TestSignsOfLife:
    """Whatever takes long, the server hears of the worker between two forward passes, and does not give it up."""

    def told(self, the_job: Job, monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
        """What the one worker of a run of one step says."""

        class Telling(Worker):
            def join(self, *server) -> None:
                super().join(*server)
                send = self._link.send
                self._link.send = lambda frame: (told.append(frame.kind), send(frame))

        told: list[Kind] = []
        monkeypatch.setattr("distrain.worker._ALIVE_SECONDS", 0.02)
        spec = replace(the_job.task, model=ModelConfig(factory=f"{__name__}:pensive"))
        train(replace(the_job, task=spec, loop=replace(the_job.loop, max_steps=1)), cls=Telling)
        return told

    def test_in_a_task_of_many_microbatches(self, monkeypatch):
        monkeypatch.setattr(Pensive, "everywhere", True)
        told = self.told(replace(job(), validation=None), monkeypatch)
        assert told.count(Kind.ALIVE) >= 3 and told[-2:] == [Kind.PUSH, Kind.PUSH]

    def test_while_it_looks_for_rows_that_are_not_finite(self, monkeypatch):
        told = self.told(test_nonfinite.job({7: 7.0}, spec=test_nonfinite.STEEP), monkeypatch)
        assert Kind.SKIPPED in told and told[: told.index(Kind.SKIPPED)].count(Kind.ALIVE) >= 3


class Slow(Worker):
    """Rank 1 takes longer over each microbatch."""

    extra_s = 0.0

    def _gradient(self, *arguments):
        time.sleep(0.002 + (self.extra_s if self.rank == 1 else 0.0))
        return super()._gradient(*arguments)


def test_a_worker_that_is_late_once_is_overtaken_and_goes_on(undisturbed):
    class LateOnce(Slow):
        extra_s = 0.0

        def handle(self, frame: Frame) -> None:
            if self.rank == 1 and frame.step == 12:
                time.sleep(0.6)
            super().handle(frame)

    the_job = job(num_workers=2)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=LateOnce) for rank in (0, 1)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
    assert outcome.parameters_sha256 == undisturbed and outcome.copied_microbatches >= 2
    assert outcome.refused_pushes == 0 and not [e for e in run.reports.drain().events if e.kind == "lost"]


def test_shards_go_to_workers_by_their_speed(undisturbed):
    class Slower(Slow):
        extra_s = 0.008

    the_job = job(num_workers=2)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=Slower) for rank in (0, 1)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
    assert outcome.parameters_sha256 == undisturbed
    steps = run.reports.drain().steps
    shares = [[sum(stop - first for w, _, first, stop in r.taken if w == who) for r in steps] for who in (0, 1)]
    assert [shares[0][0], shares[1][0]] == [2, 2]
    # Over many steps, since a single one may be helped out or end late on a busy machine.
    fast, slow = sorted((sum(share[len(steps) // 2 :]) for share in shares), reverse=True)
    assert fast >= 2 * slow


@pytest.mark.parametrize("links", ["unix", "tcp"])
@pytest.mark.parametrize("staleness", [1, 3])
def test_staleness_gives_the_same_bits_at_any_worker_count(staleness: int, links: str):
    stale = {"staleness": staleness}
    expected = train(job(num_workers=1, **stale))[0].outcome.parameters_sha256
    run, report = train(job(num_workers=3, **stale), 3, links)
    assert run.outcome.parameters_sha256 == expected
    assert [r.staleness for r in report.steps] == [min(n, staleness) for n in range(27)]
    assert [v.samples for v in report.validations] == [50, 50, 50]


def test_a_stale_gradient_is_that_of_the_parameters_so_many_updates_ago():
    """One sample a step, plain gradient descent on y = w x: w' = w - lr dL/dw, with dL/dw at the older w."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 1)).astype(np.float32)
    dataset = ArrayDataset(x, (3 * x[:, 0]).astype(np.float32), row_group_rows=12)
    the_job = Job(
        Source(dataset, Plan(dataset.row_counts, 1, 1, shuffle_rows=12, seed=0, shuffle=False)),
        task({"hidden": []}, num_features=1),
        optimizer=OptimizerConfig(name="SGD", lr=0.05),
        loop=LoopSettings(epochs=1, staleness=2),
    )
    run = open_run(the_job)
    weight, bias = (p.detach().double().item() for p in run.server.model.parameters())
    start_worker(run, the_job, 0)
    run.loop.run()
    past = [(weight, bias)]
    for t in range(12):
        w, b = past[max(0, t - 2)]
        error = 2 * (w * float(x[t, 0]) + b - 3 * float(x[t, 0]))
        past.append((past[-1][0] - 0.05 * error * float(x[t, 0]), past[-1][1] - 0.05 * error))
    found = [p.detach().double().item() for p in run.server.model.parameters()]
    assert found == pytest.approx(past[-1], rel=1e-4)


def test_a_stale_run_with_deaths_and_a_resume_has_the_same_bits():
    from safetensors.torch import load

    expected = train(job(num_workers=1, staleness=2))[0].outcome.parameters_sha256
    Mortal.deaths, Mortal.died = {1: (5, "before")}, []
    first, _ = train(job(max_steps=13, num_workers=2, staleness=2), 2, cls=Mortal)
    assert Mortal.died == [1]
    snapshots = []
    while (snapshot := first.reports.take_snapshot()) is not None:
        snapshots.append(snapshot)
    the_job = job(num_workers=3, staleness=2)
    run = open_run(the_job)
    run.loop.restore(13, load(snapshots[-1].model), snapshots[-1].state, load(snapshots[-1].optimizer))
    for rank in range(3):
        start_worker(run, the_job, rank)
    assert run.loop.run().parameters_sha256 == expected


@pytest.mark.parametrize("links", ["unix", "tcp"])
@pytest.mark.parametrize("staleness", [0, 2, None])
def test_asynchronous_training_takes_each_microbatch_once_and_learns(staleness: int | None, links: str):
    _, report = train(job(num_workers=3, asynchronous=True, staleness=staleness), 3, links)
    taken = [(step, shard) for r in report.steps for _, step, first, stop in r.taken for shard in range(first, stop)]
    assert sorted(taken) == [(step, shard) for step in range(27) for shard in range(4)]
    assert all(len(r.taken) == 1 for r in report.steps) and len(report.steps) == 27 * 4
    assert sum(r.samples for r in report.steps) == 3 * 137
    assert [v.samples for v in report.validations] == [50, 50, 50]
    assert report.validations[-1].metrics["loss"] < report.validations[0].metrics["loss"]
    if staleness is not None:
        # Meanwhile each shard may go from `staleness` steps behind to as many ahead: its own, too, whose other steps
        # other workers may have.
        assert max(r.staleness for r in report.steps) <= 4 * (2 * staleness + 1) - 1


def test_stale_changes_of_a_running_variance_do_not_take_it_below_zero():
    server = ParameterServer(torch.nn.BatchNorm1d(1), OptimizerConfig(name="SGD", lr=0.1))
    variance = server.layout.float_buffers[1]
    for lag in range(20):  # all computed from a variance of 1, on rows that do not vary
        change = torch.zeros(server.layout.num_floats)
        change[variance.start] = -0.1
        server.apply(Gathered((Partial(change, 1, 0.0, 1.0),)), lag + 1, lag=lag)
    assert 0 < server.current.floats[variance.start].item() < 1


def test_asynchronous_workers_may_die():
    Mortal.deaths, Mortal.died = {1: (5, "before")}, []
    run, report = train(job(num_workers=2, asynchronous=True, staleness=None), 2, cls=Mortal)
    assert Mortal.died == [1] and run.outcome.epoch == 3
    assert sum(r.samples for r in report.steps) == 3 * 137


class DiesInValidation(Worker):
    """Rank 0 dies as it is asked for its part of a validation, when the others have done theirs."""

    def handle(self, frame: Frame) -> None:
        if frame.kind is Kind.VALIDATE and self.rank == 0:
            time.sleep(0.1)
            self._link.close()
            raise KilledWorker
        super().handle(frame)


def test_who_dies_in_the_validation_of_an_asynchronous_run_leaves_its_part_to_the_others():
    run, report = train(job(num_workers=3, asynchronous=True, staleness=None), 3, cls=DiesInValidation)
    assert run.outcome.samples == 3 * 137 and len(report.validations) == 3
    assert [event.rank for event in report.events if event.kind == "lost"] == [0]


def test_an_asynchronous_run_stopped_and_resumed_takes_each_row_once_an_epoch():
    from safetensors.torch import load

    first, report = train(job(max_steps=50, num_workers=2, asynchronous=True, staleness=1), 2)
    snapshot = None
    while (following := first.reports.take_snapshot()) is not None:
        snapshot = following
    assert snapshot is not None and snapshot.step == 50
    the_job = job(num_workers=3, asynchronous=True, staleness=1)
    run = open_run(the_job)
    run.loop.restore(50, load(snapshot.model), snapshot.state, load(snapshot.optimizer))
    for rank in range(3):
        start_worker(run, the_job, rank)
    run.loop.run()
    taken = [entry[1:] for r in report.steps + run.reports.drain().steps for entry in r.taken]
    assert sorted(taken) == [(step, shard, shard + 1) for step in range(27) for shard in range(4)]


def test_delay_compensation_adds_the_change_that_the_gradient_missed():
    built = open_run(job())
    server = built.server
    read = Published(server.layout)
    read.copy_from(server.current)
    server.current.floats[: server.layout.num_gradients].add_(0.5)
    gradient = torch.linspace(-1, 1, server.layout.num_floats)
    gradient[server.layout.num_gradients :] = 0
    before = server.current.floats.clone()
    server._delay_compensation = 0.1
    server.optimizer = torch.optim.SGD(server.model.parameters(), lr=1.0)
    server.apply(Gathered((Partial(gradient.clone(), 1, 0.0, 1.0),)), 1, read)
    for entry in server.layout.parameters:
        part = slice(entry.start, entry.start + entry.numel)
        g = gradient[part]
        torch.testing.assert_close(before[part] - server.current.floats[part], g + 0.1 * g * g * 0.5)


def test_a_quorum_drops_the_slowest_and_takes_its_rows_at_the_end_of_the_epoch():
    class Straggler(Slow):
        extra_s = 0.02

    the_job = job(num_workers=4, quorum=3, epochs=2)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=Straggler) for rank in range(4)]
    outcome = run.loop.run()
    for thread in threads:
        thread.join(10)
    records = run.reports.drain().steps
    assert outcome.epoch == 2 and sum(r.samples for r in records) == 2 * 137
    assert sum(r.dropped for r in records) > 5
    for epoch in (0, 1):
        of_epoch = [r for r in records if r.epoch == epoch]
        assert sum(r.samples for r in of_epoch) == 137 and len(of_epoch) > 9
        taken = [entry[1:] for r in of_epoch for entry in r.taken]
        assert len(taken) == len(set(taken))


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
    run.loop.restore(13, load(snapshots[-1].model), snapshots[-1].state, load(snapshots[-1].optimizer))
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


def test_a_worker_that_is_computing_as_the_run_is_stopped_ends_well():
    class Late(Worker):
        def handle(self, frame: Frame) -> None:
            if frame.step == 5:
                run.loop.stop("enough")  # after this step, while the next one is in flight
            if frame.step == 6:
                over.wait(10)
            super().handle(frame)

        def run(self) -> None:
            super().run()
            ended_well.set()

    over, ended_well = threading.Event(), threading.Event()
    the_job = job(staleness=1)
    run = open_run(the_job)
    thread = start_worker(run, the_job, 0, cls=Late)
    assert run.loop.run().status == "stopped"
    over.set()
    thread.join(10)
    assert ended_well.is_set()


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
    with pytest.raises(DivergenceError, match=r"step \d+(, shard \d)?: the (loss|gradient) is not finite"):
        run.loop.run()


def test_divergence_names_step_shard_and_row_and_leaves_the_weights_alone():
    rows = source(64, batch_size=64, shuffle=False)
    rows.dataset.features[37] = 1e30
    the_job = Job(rows, task({"hidden": [8]}), loop=LoopSettings(epochs=1))
    run = open_run(the_job)
    before = [p.detach().clone() for p in run.server.model.parameters()]
    start_worker(run, the_job, 0)
    said = r"step 1, shard 2: the loss is not finite \(inf\), first at rows: row group 2, row 3 \(1 of 16 rows\); the"
    with pytest.raises(DivergenceError, match=said):
        run.loop.run()
    assert all(torch.equal(a, b) for a, b in zip(before, run.server.model.parameters(), strict=True))


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


def test_a_worker_that_meets_the_users_error_once_the_run_is_over_raises_that():
    """It met what another worker told the server a moment before: no link of its own broke."""
    over = threading.Event()
    raised: list[DistrainError] = []

    class SecondFaulty(Faulty):
        def handle(self, frame: Frame) -> None:
            if frame.step == 3 and self.rank == 1:
                over.wait(30)
            super().handle(frame)

        def run(self) -> None:
            try:
                super().run()
            except DistrainError as error:
                if self.rank == 1:
                    raised.append(error)
                raise

    the_job = job(num_workers=2)
    run = open_run(the_job)
    threads = [start_worker(run, the_job, rank, cls=SecondFaulty) for rank in range(2)]
    with pytest.raises(TrainingError):
        run.loop.run()
    assert run.loop.is_over
    over.set()
    threads[1].join(10)
    assert [type(error) for error in raised] == [TrainingError]


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


@pytest.mark.parametrize(
    ("name", "rule", "other"),
    [
        ("early_stopping", EarlyStoppingConfig(patience=2, min_delta=1.0), EarlyStoppingConfig(patience=9)),
        ("convergence", ConvergenceConfig(loss_change=10.0, window=3), ConvergenceConfig(loss_change=1e-9, window=3)),
        ("target", TargetConfig(metric="loss", value=100.0), TargetConfig(metric="loss", value=1e-9)),
    ],
)
def test_a_run_that_a_rule_ended_is_over_until_the_rule_is_another(name: str, rule: object, other: object):
    first, _ = train(job(epochs=9, **{name: rule}))
    last, ended = snapshots_of(first)[-1], first.outcome
    assert last.step == ended.step < 9 * 9
    for epochs in (9, 20):
        again = resumed(last, job(epochs=epochs, **{name: rule}))
        assert (again.outcome.status, again.outcome.reason) == ("finished", ended.reason)
        assert (again.outcome.step, again.outcome.parameters_sha256) == (ended.step, ended.parameters_sha256)
        assert (again.outcome.validation, again.outcome.train_loss) == (ended.validation, ended.train_loss)
        assert not snapshots_of(again)
    for now in (None, other):
        on = resumed(last, job(epochs=9, max_steps=ended.step + 2, **{name: now}))
        assert on.outcome.step == ended.step + 2 and on.outcome.reason.startswith("max_steps")


@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "validation"]), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20
    )
)
def test_stopping_does_not_know_of_breaks(events: list[tuple[str, float, float]]):
    rules = (
        EarlyStoppingConfig(patience=2),
        ConvergenceConfig(loss_change=0.01, grad_norm=0.2, window=2),
        TargetConfig(value=0.9),
    )
    whole, broken = Stopping(*rules), Stopping(*rules)
    for kind, loss, other in events:
        for stopping in (whole, broken):
            if kind == "step":
                why = stopping.stepped(loss, other)
            else:
                why = stopping.validated({"loss": loss, "accuracy": other})
        assert broken.ended == whole.ended == why
        state = json.loads(json.dumps(broken.state_dict()))
        broken = Stopping(*rules)
        broken.load_state_dict(state)
        assert broken.state_dict() == whole.state_dict() == state
        if why is not None:
            break


def test_early_stopping_on_another_metric_begins_to_count_anew():
    by_loss = Stopping(EarlyStoppingConfig(patience=2), None, None)
    assert by_loss.validated({"loss": 2.1, "accuracy": 0.5}) is None
    assert by_loss.validated({"loss": 2.2, "accuracy": 0.6}) is None
    same, other = (Stopping(EarlyStoppingConfig(metric=m, patience=2), None, None) for m in ("loss", "accuracy"))
    for resumed in (same, other):
        resumed.load_state_dict(by_loss.state_dict())
    assert "no better validation loss than 2.1" in (same.validated({"loss": 2.3}) or "")
    assert other.validated({"accuracy": 0.7}) is None
    assert other.state_dict()["best"] == 0.7


def test_a_validation_that_is_no_number_is_not_the_best():
    stopping = Stopping(EarlyStoppingConfig(patience=2), None, None)
    assert [stopping.validated({"loss": value}) for value in (math.nan, 1.0, 0.5, math.nan)] == [None] * 4
    assert "no better validation loss than 0.5" in (stopping.validated({"loss": math.nan}) or "")
    without = Stopping(EarlyStoppingConfig(metric="r2", patience=1), None, TargetConfig(metric="r2", value=0.5))
    assert without.validated({"loss": 1.0}) == "no better validation r2 than none in 1 validations"


def test_more_workers_than_shards_leaves_some_idle_but_ready():
    the_job = job(num_workers=6)
    run, _ = train(the_job, 6)
    assert run.outcome.status == "finished"


class Masked(nn.Module):
    """Attention over the features, with masks as buffers: of floats, some -inf, and of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
        self.register_buffer("visible", torch.ones(4, 4).tril().bool())
        self.register_buffer("was_trained", torch.tensor(False))
        self.norm, self.query, self.last = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.was_trained.fill_(True)
        keys = self.norm(features)
        attention = (self.query(keys)[:, :, None] * keys[:, None, :] + self.mask).softmax(-1)
        return self.last((attention.masked_fill(~self.visible, 0.0) @ keys[:, :, None]).squeeze(-1))


def masked() -> nn.Module:
    torch.manual_seed(0)
    return Masked()


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("averaging", [None, AveragingConfig(decay=0.9)])
def test_masks_are_buffers_that_do_not_change(staleness: int, averaging: AveragingConfig | None):
    model = ModelConfig(factory="tests.server.test_loop:masked")
    spec = TaskSpec(model, LossConfig(name="mse"), 4, 1, False, 0)
    loop = LoopSettings(epochs=2, checkpoint_every_steps=5, staleness=staleness)
    the_job = Job(source(), spec, source(50, shuffle=False), loop=loop, averaging=averaging,
                  devices=(HostDevice, lambda: StreamedDevice(FakeGpu())))  # fmt: skip
    runs = [train(the_job, 1)[0], train(the_job, 2)[0], train(the_job, 3, "tcp")[0]]
    assert len({run.outcome.parameters_sha256 for run in runs}) == 1
    first = dict(masked().named_buffers())
    for run in runs:
        buffers = load(snapshots_of(run)[-1].model)
        assert all(torch.equal(buffers[name], first[name]) for name in ("mask", "visible"))
        assert buffers["was_trained"] and not torch.equal(buffers["norm.running_mean"], first["norm.running_mean"])


class Running(nn.Module):
    """Follows its features' mean, and counts, in buffers: in place, or by putting new tensors into theirs."""

    def __init__(self, in_place: bool, count: float, persistent: bool) -> None:
        super().__init__()
        self.in_place, self.step = in_place, count
        self.register_buffer("mean", torch.zeros(4), persistent)
        self.register_buffer("count", torch.tensor(0), persistent)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent)  # which stays as it is
        self.last = nn.Linear(4, 1)

    def forward(self, features: Tensor) -> Tensor:
        if self.training and self.in_place:
            self.mean.mul_(0.9).add_(0.1 * features.mean(0))
            self.count.add_(self.step)
        elif self.training:
            self.mean = 0.9 * self.mean + 0.1 * (features + 0.0 * self.last.bias).mean(0)  # which has a gradient
            self.count = self.count + self.step
        return self.last(features - self.mean)


def running(in_place: bool, count: float = 1, persistent: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Running(in_place, count, persistent)


def running_job(**arguments) -> Job:
    model = ModelConfig(factory=f"{__name__}:running", args=arguments)
    devices = (HostDevice, lambda: StreamedDevice(FakeGpu()))
    return replace(job(), task=TaskSpec(model, LossConfig(name="mse"), 4, 1, False, 0), devices=devices)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_buffers_that_are_replaced_are_followed_as_those_changed_in_place(num_workers: int):
    run, _ = train(running_job(in_place=False), num_workers)
    assert run.outcome.parameters_sha256 == train(running_job(in_place=True))[0].outcome.parameters_sha256
    assert dict(run.server.model.named_buffers())["mean"].any()


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("averaging", [None, AveragingConfig(decay=0.9)])
def test_buffers_that_a_state_dict_leaves_out_come_back_too(staleness: int, averaging: AveragingConfig | None):
    made = replace(running_job(in_place=True, persistent=False), averaging=averaging)
    whole, half = (replace(made, loop=replace(made.loop, staleness=staleness, max_steps=n)) for n in (None, 13))
    persistent = replace(running_job(in_place=True), averaging=averaging, loop=whole.loop)
    last = snapshots_of(train(half)[0])[-1]
    expected = train(whole)[0].outcome
    again = resumed(last, whole).outcome
    assert again.parameters_sha256 == expected.parameters_sha256 == train(persistent)[0].outcome.parameters_sha256
    assert again.validation == expected.validation
    running(in_place=True, persistent=False).load_state_dict(load(last.model))
    beside = [name for name in load(last.optimizer) if name.startswith("buffer.")]
    assert sorted(beside) == ["buffer.count", "buffer.mean"], "the mask is as it was built"


def test_a_buffer_that_becomes_another_kind_of_tensor_is_refused():
    said = r"replaced its buffer count, a tensor of int64 \[\] on cpu, by a tensor of float32 \[\] on cpu"
    with pytest.raises(TrainingError, match=said):
        train(running_job(in_place=False, count=0.5))


def weighted(rows: int = 137) -> Source:
    """Rows of three classes that do not count the same."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    dataset = ArrayDataset(features, rng.integers(0, 3, rows), row_group_rows=17)
    dataset.weight = torch.from_numpy(rng.uniform(0, 2, rows).astype(np.float32))
    return Source(dataset, Plan(dataset.row_counts, 16, 4, shuffle_rows=40, seed=3))


def test_weights_and_penalties_give_the_same_bits_at_any_worker_count():
    loss = LossConfig(name="focal", class_weights=[1.0, 0.5, 3.0])
    spec = TaskSpec(ModelConfig(hidden=[8], normalization="batch"), loss, 4, 3, False, 0)
    the_job = Job(weighted(), spec, loop=LoopSettings(epochs=2), penalty=PenaltyConfig(l1=1e-3, l2=1e-2))
    runs = [train(the_job, workers) for workers in (1, 2, 3)]
    assert len({run.outcome.parameters_sha256 for run, _ in runs if run.outcome}) == 1
    plain, _ = train(replace(the_job, penalty=PenaltyConfig()), 1)
    assert plain.outcome and plain.outcome.parameters_sha256 != runs[0][0].outcome.parameters_sha256
    assert all(record.penalty > 0 for record in runs[0][1].steps)


def test_a_weighted_step_is_that_of_the_whole_batch_at_once():
    """One step of SGD over all rows, in four unequal microbatches, against torch on all of them."""
    source = weighted(50)
    source = Source(source.dataset, Plan(source.dataset.row_counts, 50, 4, shuffle_rows=40, seed=3))
    spec = TaskSpec(ModelConfig(hidden=[8]), LossConfig(class_weights=[1.0, 0.5, 3.0]), 4, 3, False, 0)
    penalty = PenaltyConfig(l1=0.01, l2=0.02)
    the_job = Job(source, spec, optimizer=OptimizerConfig(name="SGD", lr=0.5), loop=LoopSettings(epochs=1),
                  penalty=penalty)  # fmt: skip
    run, report = train(the_job, 2)
    model = build_task(spec).model
    weights = source.dataset.weight * torch.tensor([1.0, 0.5, 3.0])[source.dataset.label]
    values = torch.nn.functional.cross_entropy(model(source.dataset.features), source.dataset.label, reduction="none")
    loss = (values * weights).sum() / weights.sum()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    extra = sum(0.01 * w.abs().sum() + 0.02 * w.square().sum() for w in matrices)
    (loss + extra).backward()
    [record] = report.steps
    assert record.loss == pytest.approx(float(loss), rel=1e-5) and record.penalty == pytest.approx(
        float(extra), rel=1e-5
    )
    for mine, theirs in zip(run.server.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), (theirs - 0.5 * theirs.grad).detach(), rtol=1e-5, atol=1e-6)


def without_weight(*microbatches: tuple[int, int], **loop) -> Job:
    """Those of each epoch of nine steps, the last of them of 9 rows, have rows that do not count."""
    rows = weighted().dataset
    plan = Plan(rows.row_counts, 16, 4, shuffle=False)
    for step, shard in microbatches:
        for index in range(plan.num_rows_of(step, shard)):
            row_group, row = plan.row(0, step, shard, index)
            rows.weight[rows.starts[row_group] + row] = 0.0
    spec = TaskSpec(ModelConfig(hidden=[8], normalization="batch"), LossConfig(), 4, 3, False, 0)
    return Job(Source(rows, plan), spec, loop=LoopSettings(**{"epochs": 2, **loop}))


LAST_STEP = [(8, shard) for shard in range(4)]


def problems_of(report: Report, folder: Path, whole_steps: bool = True) -> list[str]:
    """What is wrong in the history of such a run."""
    kept = History(folder / "history.jsonl", 4, 9, 137, 0, whole_steps)
    kept.steps(report.steps)
    kept.close()
    return check(folder / "history.jsonl")[1]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_step_without_weight_changes_nothing_and_counts(staleness: int, tmp_path: Path):
    made = without_weight(*LAST_STEP, (3, 1), staleness=staleness, checkpoint_every_steps=1)
    runs = [train(made, workers) for workers in (1, 2, 3)]
    assert len({run.outcome.parameters_sha256 for run, _ in runs}) == 1
    run, report = runs[0]
    assert (run.outcome.step, run.outcome.epoch, run.outcome.status) == (18, 2, "finished")
    assert [record.samples for record in report.steps] == ([16] * 8 + [9]) * 2
    assert [record.weight > 0 for record in report.steps] == ([True] * 8 + [False]) * 2
    assert run.outcome.samples == 274 and problems_of(report, tmp_path) == []
    one_epoch, _ = train(replace(made, loop=replace(made.loop, epochs=1)))
    before, after = (load(snapshot.model) for snapshot in snapshots_of(one_epoch)[-2:])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_left_of_an_epoch_after_a_break_may_have_no_weight():
    made = without_weight(*LAST_STEP, epochs=1)
    first, _ = train(replace(made, loop=replace(made.loop, max_steps=8)))
    again = resumed(snapshots_of(first)[-1], made)
    assert again.outcome.step == 9 and again.outcome.parameters_sha256 == first.outcome.parameters_sha256


@pytest.mark.parametrize("loop", [{"quorum": 3}, {"asynchronous": True, "staleness": 1}])
def test_microbatches_without_weight_are_taken_once_however_a_run_is_trained(loop: dict, tmp_path: Path):
    whole_shard = [(step, 1) for step in range(9)]
    run, report = train(without_weight(*LAST_STEP, *whole_shard, num_workers=2, **loop), 2)
    taken = [(step, shard) for r in report.steps for _, step, first, stop in r.taken for shard in range(first, stop)]
    assert run.outcome.epoch == 2 and sorted(taken) == [(step, shard) for step in range(18) for shard in range(4)]
    assert sum(record.samples for record in report.steps) == 274
    assert problems_of(report, tmp_path, whole_steps=False) == []


def older(snapshot: Snapshot, loss: float | None) -> Snapshot:
    """As it was when checkpoints knew the loss of their last step only."""
    state = {key: value for key, value in snapshot.state.items() if key != "epoch_loss"}
    return replace(snapshot, state={**state, "train_loss": loss})


@pytest.mark.parametrize("break_at", [None, 4])
def test_an_epoch_without_weight_is_said(break_at: int | None):
    made = without_weight(*[(step, shard) for step in range(9) for shard in range(4)])
    whole = train
    if break_at is not None:
        first, _ = train(replace(made, loop=replace(made.loop, max_steps=break_at)))
        whole = partial(resumed, snapshots_of(first)[-1])
    with pytest.raises(TrainingDataError, match="step 9: the weights of all rows of the epoch that it ends add up to"):
        whole(made)


def test_the_rest_of_an_epoch_of_which_an_older_checkpoint_does_not_tell_may_have_no_weight():
    made = without_weight(*LAST_STEP, epochs=1)
    first, report = train(replace(made, loop=replace(made.loop, max_steps=8)))
    again = resumed(older(snapshots_of(first)[-1], report.steps[-1].loss), made)
    assert again.outcome.step == 9 and math.isnan(again.outcome.train_loss)


@pytest.mark.parametrize("loss", [0.25, None])
def test_an_older_checkpoint_of_a_run_that_is_done_still_tells_its_loss(loss: float | None):
    first, _ = train(job(epochs=1))
    last = snapshots_of(first)[-1]
    again, on = (resumed(older(last, loss), job(**end)) for end in ({"epochs": 1}, {"max_steps": 10}))
    assert on.outcome.train_loss == train(job(max_steps=10))[0].outcome.train_loss
    assert again.outcome.train_loss == pytest.approx(loss if loss is not None else math.nan, nan_ok=True)


def test_the_training_loss_is_by_weight_as_that_of_validation_is():
    source = weighted()
    spec = TaskSpec(ModelConfig(hidden=[8]), LossConfig(), 4, 3, False, 0)
    still = OptimizerConfig(name="SGD", lr=1e-30)
    run, _ = train(Job(source, spec, source, optimizer=still, loop=LoopSettings(epochs=1)))
    assert run.outcome.train_loss == pytest.approx(run.outcome.validation["loss"], rel=1e-6)


@pytest.mark.parametrize(("max_steps", "from_step"), [(None, 19), (18, 10), (13, 10)])
def test_the_training_loss_is_the_mean_of_the_last_epoch(max_steps: int | None, from_step: int):
    run, report = train(job(max_steps=max_steps))
    last = [record for record in report.steps if record.step >= from_step]
    mean = sum(record.loss * record.samples for record in last) / sum(record.samples for record in last)
    assert run.outcome.train_loss == pytest.approx(mean, rel=1e-12) != pytest.approx(last[-1].loss, rel=1e-3)


@pytest.mark.parametrize("stop", [9, 13])
def test_the_training_loss_does_not_know_of_a_break(stop: int):
    first, _ = train(job(max_steps=stop))
    snapshot = snapshots_of(first)[-1]
    assert resumed(snapshot, job()).outcome.train_loss == train(job())[0].outcome.train_loss
    assert resumed(snapshot, job(max_steps=stop)).outcome.train_loss == first.outcome.train_loss


@pytest.fixture
def uneven(monkeypatch) -> Callable[..., Job]:
    """A job whose validations, of every second step and each epoch's last, go up and down."""
    monkeypatch.setattr("distrain.server.reports._MAX_SNAPSHOTS", 100)  # nobody takes them before the end
    return lambda **loop: replace(job(validation_every_steps=2, **loop), optimizer=OptimizerConfig(lr=0.1))


def test_the_best_validation_is_in_a_checkpoint(uneven):
    run, report = train(uneven(early_stopping=EarlyStoppingConfig(patience=50)))
    losses = {validation.step: validation.metrics["loss"] for validation in report.validations}
    best = {step for step in losses if losses[step] == min(losses[other] for other in losses if other <= step)}
    assert 9 in best < losses.keys(), "or the run tests less"
    saved = snapshots_of(run)
    assert [snapshot.step for snapshot in saved] == sorted({*best, 9, 18, 27}), "each once"
    assert all(snapshot.metrics["loss"] == losses[snapshot.step] for snapshot in saved)


def test_workers_compute_while_a_validated_snapshot_is_taken_which_is_what_it_would_be_without(uneven):
    run, in_flight = open_run(uneven()), {}
    snapshot = run.reports.snapshot

    def taken(captured: Captured) -> None:
        in_flight[captured.step] = len(run.loop._flight)
        snapshot(captured)

    run.reports.snapshot = taken
    start_worker(run, uneven(), 0)
    run.loop.run()
    assert len(in_flight) > 4 and in_flight == {step: int(step < 27) for step in in_flight}
    for mine in snapshots_of(run)[:3]:
        other, _ = train(uneven(max_steps=mine.step))
        assert snapshots_of(other)[-1] == mine


def test_only_what_is_the_best_so_far_is_marked_so(uneven):
    """Not what the run ends with, of which nobody asks whether it is."""
    run, saved = open_run(uneven(max_steps=7)), []
    run.reports.snapshot = saved.append
    start_worker(run, uneven(), 0)
    run.loop.run()
    losses = {validation.step: validation.metrics["loss"] for validation in run.reports.drain().validations}
    assert losses.keys() == {2, 4, 6, 7} and [snapshot.step for snapshot in saved if snapshot.is_best] == [
        step for step in (2, 4, 6) if losses[step] == min(losses[other] for other in losses if other <= step)
    ]


@pytest.mark.parametrize("loop", [{"checkpoint_every_steps": 2}, {"checkpoint_every_s": 1e-9}])
def test_the_last_checkpoint_knows_the_validation_with_which_the_run_ends(loop: dict):
    run, report = train(job(max_steps=4, **loop))
    last = snapshots_of(run)[-1]
    assert last.step == 4 and last.metrics == report.validations[-1].metrics and last.metrics


def test_a_resumed_run_saves_a_validation_only_where_it_is_better_than_those_before(uneven):
    whole, _ = train(uneven())
    first, _ = train(uneven(max_steps=11))
    again = resumed(snapshots_of(first)[-1], uneven())
    assert [s.step for s in snapshots_of(again)] == [s.step for s in snapshots_of(whole) if s.step > 11] == [18, 27]


def snapshots_of(run: Run) -> list[Snapshot]:
    run.reports.drain()
    return list(iter(run.reports.take_snapshot, None))


def resumed(snapshot: Snapshot, the_job: Job) -> Run:
    """Go on from a snapshot to the end, with two workers."""
    run = open_run(the_job)
    run.loop.restore(snapshot.step, load(snapshot.model), snapshot.state, load(snapshot.optimizer))
    for rank in range(2):
        start_worker(run, the_job, rank)
    run.outcome = run.loop.run()
    return run
