"""The thread's work against a store that comes and goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from distrain.records import Event
from distrain.tracking import writer as writing
from distrain.tracking.inbox import Inbox
from distrain.tracking.spool import Spool
from distrain.tracking.thinning import Point
from distrain.tracking.writer import Writer
from tests.support.records import START_MS, step, validation


class MemoryRun:
    """A run in memory, that can be away."""

    run_id = "r1"

    def __init__(self) -> None:
        self.points, self.texts, self.tags, self.figures, self.status = [], {}, {}, [], None
        self.is_away, self.is_active = False, True

    def _reach(self):
        if self.is_away:
            raise ConnectionError("no route")

    def log_points(self, points):
        self._reach()
        if any(point.key == "refused" for point in points):
            raise MlflowException("bad name", INVALID_PARAMETER_VALUE)
        self.points += points

    def log_text(self, name, text):
        self._reach()
        self.texts[name] = text

    def set_tag(self, key, value):
        self._reach()
        if value == "refused":
            raise MlflowException("bad tag\nand a page more", INVALID_PARAMETER_VALUE)
        self.tags[key] = value

    def log_figure(self, name, figure):
        self._reach()
        self.figures.append(name)

    def read_text(self, name):
        return self.texts.get(name, "")

    def history(self, key):
        points = sorted((p.step, p.value) for p in self.points if p.key == key)
        return [s for s, _ in points], [v for _, v in points]

    def last_step(self, key):
        return max(self.history(key)[0], default=0)

    def terminate(self, status):
        self._reach()
        self.status = status


class Bench:
    """A writer with all that it is connected to."""

    def __init__(self, folder: Path, run: MemoryRun | None = None, resumed: bool = False) -> None:
        self.run, self.inbox, self.notes = run or MemoryRun(), Inbox(1), []
        self.spool = Spool(folder / "spool.jsonl")
        self.writer = Writer(self.run, self.inbox, self.spool, self.notes.append, resumed)

    def steps(self, first, stop):
        for number in range(first, stop):
            self.inbox.step(step(number))

    @property
    def losses(self):
        return [point.step for point in self.run.points if point.key == "train/loss"]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def at_once(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(writing, "_RETRY_S", 0.0)


def test_points_reach_the_store(bench):
    bench.steps(1, 6)
    bench.inbox.validation(validation(5, loss=0.5, accuracy=0.25))
    assert bench.writer.end("FINISHED")
    assert bench.losses == [1, 2, 3, 4, 5]
    assert bench.run.history("val/accuracy") == ([5], [0.25])
    assert bench.run.figures == ["loss_curve.png"]
    assert bench.run.status == "FINISHED"
    assert bench.notes == []


def test_stale_updates_make_a_histogram(bench):
    bench.inbox.step(step(1, staleness=1))
    assert bench.writer.end("FINISHED")
    assert bench.run.figures == ["loss_curve.png", "staleness.png"]


def test_while_the_store_is_away_points_wait_in_the_file_and_come_first_when_it_is_back(bench, at_once):
    bench.steps(1, 4)
    bench.writer.deliver()
    bench.run.is_away = True
    bench.steps(4, 8)
    bench.inbox.job("tag a", lambda run: run.set_tag("a", "b"))
    bench.writer.deliver()
    bench.steps(8, 10)
    bench.writer.deliver()
    assert bench.losses == [1, 2]
    assert bench.spool
    bench.run.is_away = False
    bench.steps(10, 13)
    bench.writer.deliver()
    assert bench.losses == list(range(1, 12))  # the twelfth may still grow
    assert bench.run.tags == {"a": "b"}
    assert not bench.spool
    assert ["away" in note for note in bench.notes] == [True, False]
    assert "no route" in bench.notes[0]
    assert str(bench.spool.path) in bench.notes[0]
    assert bench.writer.end("FINISHED")
    assert bench.losses == list(range(1, 13))


def test_a_store_that_is_away_is_not_asked_at_every_round(bench):
    bench.run.is_away = True
    bench.steps(1, 3)
    bench.writer.deliver()
    bench.run.is_away = False
    bench.steps(3, 6)
    bench.writer.deliver()
    assert bench.losses == []
    assert bench.writer.end("FINISHED")  # but once more at the end
    assert bench.losses == [1, 2, 3, 4, 5]


def test_a_store_that_stays_away_is_said_with_what_it_lacks_and_where_that_lies(bench):
    bench.run.is_away = True
    bench.steps(1, 3)
    bench.inbox.job("config.yaml", lambda run: run.log_text("config.yaml", "x"))
    assert not bench.writer.end("KILLED")
    told = bench.notes[-1]
    for part in ("r1", "KILLED", str(bench.spool.path), "config.yaml", "28 points"):
        assert part in told


def test_the_next_process_delivers_what_waits_and_skips_what_is_stored(bench, tmp_path):
    bench.steps(1, 6)
    bench.inbox.validation(validation(5))
    bench.inbox.event(Event(START_MS, "joined", "worker 0", 0))
    bench.writer.deliver(finish=True)
    bench.run.is_away = True
    bench.steps(6, 9)
    bench.writer.end("FAILED")
    bench.run.is_away = False
    again = Bench(tmp_path, bench.run, resumed=True)
    again.steps(4, 12)
    again.inbox.validation(validation(5))
    again.inbox.validation(validation(10))
    again.inbox.event(Event(START_MS, "joined", "worker 1", 8))
    assert again.writer.end("FINISHED")
    assert again.losses == list(range(1, 12))
    assert bench.run.history("val/loss")[0] == [5, 10]
    assert [line.partition(" step ")[2] for line in bench.run.texts["events.txt"].splitlines()] == [
        "0 joined: worker 0",
        "8 joined: worker 1",
    ]


def test_what_the_store_refuses_is_said_and_holds_nothing_up(bench):
    bench.inbox.job("tag a", lambda run: run.set_tag("a", "refused"))
    bench.inbox.job("tag b", lambda run: run.set_tag("b", "fine"))
    assert bench.writer.end("FINISHED")
    assert bench.run.tags == {"b": "fine"}
    assert bench.notes == ["MLflow did not take tag a: bad tag"]


def test_a_point_that_the_store_refuses_costs_no_other(bench):
    bench.steps(1, 6)
    bench.inbox.take_points = lambda *_, take=bench.inbox.take_points: [*take(*_), Point("refused", 1.0, 0, 5)]
    bench.writer.deliver()
    assert bench.writer.end("FINISHED")
    assert bench.losses == [1, 2, 3, 4, 5] and bench.run.status == "FINISHED"
    assert bench.notes == ["MLflow did not take refused: bad name"]


def test_points_of_a_run_that_was_deleted_wait_for_it(bench, at_once):
    bench.run.is_active = False
    bench.inbox.take_points = lambda *_: [Point("refused", 1.0, 0, 5), Point("train/loss", 0.5, 0, 5)]
    bench.writer.deliver()
    assert len(bench.spool) == 2 and bench.run.points == []


def test_what_cannot_be_made_is_said_and_holds_nothing_up(bench):
    bench.inbox.job("the model", lambda run: {}["features"])
    assert bench.writer.end("FINISHED")
    assert bench.notes == ["MLflow did not take the model: 'features'"] and bench.run.status == "FINISHED"


def test_a_file_that_cannot_be_written_loses_points_but_not_the_run(tmp_path, at_once):
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path / "file")
    bench.run.is_away = True
    bench.steps(1, 3)
    bench.writer.deliver()
    assert any("14 points for MLflow are lost" in note for note in bench.notes)
    bench.run.is_away = False
    bench.steps(3, 5)
    assert bench.writer.end("FINISHED")
    assert bench.losses == [2, 3, 4]


def test_events_become_a_text(bench):
    bench.inbox.event(Event(START_MS, "lost", "worker 1 was killed", 120, 1))
    bench.writer.deliver()
    assert bench.run.texts["events.txt"] == "2023-11-14T22:13:20.000+00:00 step 120 lost: worker 1 was killed\n"
