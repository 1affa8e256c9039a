"""Whole runs in a real store."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from distrain.config import TrackingConfig
from distrain.errors import TrackingError, TrackingRefused
from distrain.records import Event
from distrain.tracking import DatasetDescription, ModelInput, NullTracker, RunDescription, make_tracker
from distrain.tracking import writer as writing
from tests.support.forwarder import Forwarder
from tests.support.records import START_MS, step, validation

COLUMNS = (("x1", "double"), ("pixels", "list<item: float>"), ("label", "int64"))
DESCRIPTION = RunDescription(
    config_yaml="batch_size: 64\n",
    config_sha256="ab" * 32,
    params={"batch_size": 64, "optimizer.lr": 0.001, "data.train": "x" * 7000} | {f"many.{i}": i for i in range(150)},
    tags={"distrain.ray_job_id": "job-1"},
    datasets=(
        DatasetDescription("digits", "data/*.parquet", "cd" * 32, 1437, COLUMNS, "training"),
        DatasetDescription("digits", "data/held_out.parquet", "ef" * 32, 360, COLUMNS, "validation"),
    ),
    run_name="a-name",
)


@pytest.fixture
def client():
    from mlflow import MlflowClient

    return MlflowClient


def track(uri, description=DESCRIPTION, **settings):
    notes = []
    tracker = make_tracker(TrackingConfig(uri=uri, **settings), description, os.path.dirname(__file__), notes.append)
    tracker.start()
    return tracker, notes


def steps_of(client, uri, run_id, key="train/loss"):
    return [metric.step for metric in client(uri).get_metric_history(run_id, key)]


def test_what_the_machine_does_is_measured_where_it_is_asked_for(store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    monkeypatch.setattr("distrain.tracking.system.shutil.which", lambda name: None)  # no GPUs
    tracker, notes = track(store, run_name=None, every_steps=1, system_metrics=True)
    tracker.wait_ready()
    for number in range(1, 4):
        tracker.step(step(number))
    deadline = time.monotonic() + 60
    while not steps_of(client, store, tracker.run_id, "system/cpu_utilization_percentage"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert tracker.finish("FINISHED") and notes == []
    metrics = client(store).get_run(tracker.run_id).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert {
        "system/cpu_utilization_percentage",
        "system/disk_usage_percentage",
        "system/network_receive_megabytes",
    } <= (metrics.keys())
    found = steps_of(client, store, tracker.run_id, "system/cpu_utilization_percentage")
    assert len(found) >= 2 and found == sorted(found) and found[-1] == 3


def test_system_metrics_that_cannot_be_had_cost_no_point(store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often")
    tracker, notes = track(store, run_name=None, every_steps=1, system_metrics=True)
    tracker.step(step(1))
    assert tracker.finish("FINISHED")
    [note] = notes
    assert note.startswith("no system metrics: ") and "often" in note
    assert steps_of(client, store, tracker.run_id) == [1]


def test_a_run_in_a_database(store, client, tmp_path):
    tracker, notes = track(store, run_name=None, every_steps=1)
    started = time.monotonic()
    for number in range(1, 301):
        tracker.step(step(number))
    tracker.validation(validation(300, loss=0.5, accuracy=0.75))
    tracker.event(Event(START_MS, "joined", "worker 0", 0))
    tracker.tag("distrain.note", "hello")
    tracker.artifact_text("notes/a.txt", "text")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    tracker.artifact_file(tmp_path / "model.safetensors")
    tracker.figure("heat.png", Figure)
    assert time.monotonic() - started < 0.5  # the store is still opening
    assert tracker.wait_ready() == tracker.run_id
    assert tracker.run_name == "a-name"
    assert tracker.finish("KILLED")
    assert not any(key.startswith("system/") for key in client(store).get_run(tracker.run_id).data.metrics)
    assert notes == []

    run = client(store).get_run(tracker.run_id)
    assert run.info.status == "KILLED"
    assert client(store).get_experiment(run.info.experiment_id).name == "distrain"
    assert len(run.data.params) == 153
    assert (run.data.params["batch_size"], run.data.params["optimizer.lr"]) == ("64", "0.001")
    assert {key: value for key, value in run.data.tags.items() if key.startswith("distrain.")} == {
        "distrain.version": "0.1.0", "distrain.config_sha256": "ab" * 32, "distrain.ray_job_id": "job-1",
        "distrain.note": "hello",
    }  # fmt: skip
    assert steps_of(client, store, tracker.run_id) == list(range(1, 301))
    losses = client(store).get_metric_history(tracker.run_id, "train/loss")
    assert (losses[1].value, losses[1].timestamp) == (0.5, START_MS + 20)
    assert run.data.metrics["val/accuracy"] == 0.75
    artifacts = {entry.path for entry in client(store).list_artifacts(tracker.run_id)}
    assert artifacts == {
        "config.yaml", "events.txt", "heat.png", "loss_curve.png", "model.safetensors", "notes",
    }  # fmt: skip
    assert str(tmp_path) in run.info.artifact_uri  # beside the database, wherever the process runs


def test_data_sets_are_described(store, client):
    tracker, _ = track(store)
    assert tracker.finish("FINISHED")
    first, second = client(store).get_run(tracker.run_id).inputs.dataset_inputs
    assert [each.tags[0].value for each in (first, second)] == ["training", "validation"]
    assert (first.dataset.name, first.dataset.digest) == ("digits", "cdcdcdcdcdcdcdcd")
    assert json.loads(first.dataset.source)["uri"] == "data/*.parquet"
    assert json.loads(first.dataset.profile) == {"num_rows": 1437, "sha256": "cd" * 32}
    schema = json.loads(first.dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in schema] == [
        ("x1", "double"), ("pixels", "array"), ("label", "long"),
    ]  # fmt: skip


def test_resuming_goes_on_with_the_same_run(store, client):
    tracker, _ = track(store, every_steps=1)
    for number in range(1, 31):
        tracker.step(step(number))
    tracker.validation(validation(25))
    assert tracker.finish("KILLED")
    changed = replace(
        DESCRIPTION,
        config_yaml="batch_size: 64\nworkers: {count: 4}\n",
        config_sha256="99" * 32,
        params={"batch_size": 64, "optimizer.lr": 0.5, "workers.count": 4},
        tags={"distrain.resumed_from": "checkpoints/a/step-20"},
        resume_run_id=tracker.run_id,
    )
    again, notes = track(store, changed, every_steps=1)
    for number in range(21, 41):  # the checkpoint was older than the last point
        again.step(step(number, time_ms=START_MS + 99_000 + number))
    again.validation(validation(25))
    again.validation(validation(40))
    assert again.finish("FINISHED")
    assert notes == []
    assert again.run_id == tracker.run_id
    assert steps_of(client, store, again.run_id) == list(range(1, 41))
    assert steps_of(client, store, again.run_id, "time/step_sec") == list(range(1, 41))
    assert steps_of(client, store, again.run_id, "val/loss") == [25, 40]
    run = client(store).get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["optimizer.lr"], run.data.params["workers.count"]) == ("0.001", "4")
    assert run.data.tags["distrain.resumed.optimizer.lr"] == "0.5"
    assert run.data.tags["distrain.resumed_from"] == "checkpoints/a/step-20"
    assert len(run.inputs.dataset_inputs) == 2
    names = {entry.path for entry in client(store).list_artifacts(again.run_id)}
    assert {"config.yaml", "config-resumed-99999999.yaml"} <= names


def refused(tracker):
    """What a run is told that the store says no to at once."""
    with pytest.raises(TrackingRefused) as caught:
        tracker.wait_ready()
    with pytest.raises(TrackingRefused):
        tracker.check()
    assert not tracker.finish("FAILED")
    return caught.value.message


def test_a_run_that_is_not_there_cannot_be_resumed(store, client):
    tracker, notes = track(store, replace(DESCRIPTION, resume_run_id="f" * 32))
    assert refused(tracker) == (
        f"MLflow at {store}: run {'f' * 32} is not there; name the store that has it, tracking.uri, or go on without "
        "MLflow: tracking.enabled=false"
    )
    assert notes == []  # it was raised
    gone = client(store).create_run("0").info.run_id
    client(store).delete_run(gone)
    tracker, _ = track(store, replace(DESCRIPTION, resume_run_id=gone))
    assert f"run {gone} was deleted; restore it, or " in refused(tracker)


def test_a_deleted_experiment_is_said(store, client):
    client(store).delete_experiment(client(store).create_experiment("gone"))
    tracker, _ = track(store, experiment="gone")
    assert refused(tracker).endswith("the experiment 'gone' was deleted; restore it, or change tracking.experiment")


def test_a_server_that_wants_credentials(web_server):
    web_server.answer = (401, b"You are not authenticated.")
    tracker, _ = track(f"http://127.0.0.1:{web_server.server_port}")
    said = refused(tracker)
    assert "You are not authenticated" in said and "MLFLOW_TRACKING_USERNAME" in said and "\n" not in said


def test_a_refusal_that_nobody_waited_for_is_said_at_the_end(store):
    tracker, notes = track(store, replace(DESCRIPTION, resume_run_id="f" * 32))
    assert not tracker.finish("FINISHED")
    assert len(notes) == 1 and "f" * 32 in notes[0]


def test_a_server_in_trouble_ends_no_run_and_is_said_at_once(web_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    web_server.answer = (503, b"coming up")
    notes = []
    settings = TrackingConfig(uri=f"http://127.0.0.1:{web_server.server_port}")
    tracker = make_tracker(settings, DESCRIPTION, tmp_path, notes.append)
    tracker.start()
    _wait_until(lambda: notes)
    tracker.check()
    assert notes[0].startswith(f"MLflow at {settings.uri}: ") and "trying again every 15 s" in notes[0]
    assert not tracker.finish("FINISHED")


@pytest.fixture
def late_store(tmp_path, empty_database):
    """The URI of a store that does not open, and what makes it open."""
    folder = tmp_path / "folder"
    folder.write_text("in its place")

    def appear():
        folder.unlink()
        folder.mkdir()
        shutil.copy(empty_database, folder / "mlflow.db")

    return f"sqlite:///{folder}/mlflow.db", appear


def test_a_store_that_opens_late_gets_everything(late_store, client, tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.tracking.tracker._RETRY_S", 0.05)
    uri, appear = late_store
    notes = []
    tracker = make_tracker(TrackingConfig(uri=uri, every_steps=1), DESCRIPTION, tmp_path, notes.append)
    tracker.start()
    tracker.step(step(1))
    _wait_until(lambda: notes)
    assert "folder cannot be written; trying again" in notes[0]
    appear()
    _wait_until(lambda: tracker.run_id is not None)
    tracker.step(step(2))
    assert tracker.finish("FINISHED")
    assert steps_of(client, uri, tracker.run_id) == [1, 2]
    assert notes[1:] == [f"MLflow's store has opened: this is its run {tracker.run_id}"]


def test_a_store_that_opens_late_and_says_no_ends_no_run(late_store, client, tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.tracking.tracker._RETRY_S", 0.05)
    uri, appear = late_store
    notes = []
    lost = replace(DESCRIPTION, resume_run_id="f" * 32)
    tracker = make_tracker(TrackingConfig(uri=uri), lost, tmp_path, notes.append)
    tracker.start()
    _wait_until(lambda: notes)
    appear()

    def answer():
        with pytest.raises(TrackingError) as caught:
            tracker.wait_ready()
        return caught.value

    _wait_until(lambda: "is not there" in answer().message)
    assert not isinstance(answer(), TrackingRefused)
    tracker.check()
    assert not tracker.finish("FINISHED")


def test_points_of_a_run_that_the_store_never_opened_for_reach_it_when_the_run_is_resumed(late_store, client, tmp_path):
    uri, appear = late_store
    settings, notes = TrackingConfig(uri=uri, every_steps=1), []
    tracker = make_tracker(settings, DESCRIPTION, tmp_path, notes.append)
    tracker.start()
    for number in range(1, 11):
        tracker.step(step(number))
    with pytest.raises(TrackingError):
        tracker.wait_ready()
    assert not tracker.finish("KILLED")
    spool = tmp_path / "mlflow-unopened.jsonl"
    num_points = len(spool.read_text().splitlines())
    assert notes[1:] == [f"{num_points} points for MLflow wait in {spool} for the run to be resumed"]
    appear()
    again = make_tracker(settings, replace(DESCRIPTION, is_resumed=True), tmp_path, notes.append)
    again.start()
    for number in range(6, 16):  # the checkpoint was older than the last point
        again.step(step(number, time_ms=START_MS + 99_000 + number))
    assert again.finish("FINISHED") and len(notes) == 2
    assert steps_of(client, uri, again.run_id) == list(range(1, 16))
    assert [path.name for path in tmp_path.glob("*.jsonl")] == []


def test_points_of_an_attempt_that_left_no_checkpoint_are_not_those_of_the_next(late_store, client, tmp_path):
    uri, appear = late_store
    notes = []
    tracker = make_tracker(TrackingConfig(uri=uri, every_steps=1), DESCRIPTION, tmp_path, notes.append)
    tracker.start()
    for number in range(1, 31):
        tracker.step(step(number))
    assert not tracker.finish("FAILED")
    appear()
    again = make_tracker(TrackingConfig(uri=uri, every_steps=1), DESCRIPTION, tmp_path, notes.append)
    again.start()
    for number in range(1, 4):
        again.step(step(number))
    assert again.finish("FINISHED") and "points of an earlier attempt" in notes[-1]
    assert steps_of(client, uri, again.run_id) == [1, 2, 3]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == []


def test_points_of_a_run_that_the_store_refused_wait_too(store, client, tmp_path):
    refused = replace(DESCRIPTION, resume_run_id="f" * 32, is_resumed=True)
    tracker = make_tracker(TrackingConfig(uri=store, every_steps=1), refused, tmp_path, print)
    tracker.start()
    tracker.step(step(1))
    with pytest.raises(TrackingRefused):
        tracker.wait_ready()
    assert not tracker.finish("FAILED")
    assert "train/loss" in (tmp_path / f"mlflow-{'f' * 32}.jsonl").read_text()


def test_points_wait_for_a_run_in_an_object_store_however_long_its_name(late_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    tracker = make_tracker(TrackingConfig(uri=late_store[0]), DESCRIPTION, "s3://bucket/" + "long" * 100, print)
    tracker.start()
    tracker.step(step(1))
    assert not tracker.finish("FAILED")
    assert len(list((tmp_path / "temporary").glob("mlflow-*.jsonl"))) == 1


def test_points_that_cannot_be_kept_are_counted(late_store, tmp_path):
    notes = []
    (tmp_path / "file").touch()
    tracker = make_tracker(TrackingConfig(uri=late_store[0]), DESCRIPTION, tmp_path / "file" / "run", notes.append)
    tracker.start()
    tracker.step(step(1))
    assert not tracker.finish("FINISHED")
    assert "points for MLflow are lost: " in notes[1]


def test_passwords_are_not_told(tmp_path):
    settings = TrackingConfig(uri="postgresql://me:secret@127.0.0.1:1/runs")
    tracker = make_tracker(settings, DESCRIPTION, tmp_path)
    tracker.start()
    with pytest.raises(TrackingError) as caught:
        tracker.wait_ready()
    assert "secret" not in caught.value.message
    tracker.finish("FAILED")


def test_a_server_that_goes_away_and_comes_back(server, client, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_RETRY_S", 0.0)
    monkeypatch.setattr("distrain.tracking.tracker._FLUSH_S", 0.05)
    notes, forwarder = [], Forwarder(server.port)
    settings = TrackingConfig(uri=f"http://127.0.0.1:{forwarder.port}", experiment="far", every_steps=1)
    tracker = make_tracker(settings, DESCRIPTION, tmp_path, notes.append)
    tracker.start()
    tracker.wait_ready()
    forwarder.cut()
    for number in range(1, 51):
        tracker.step(step(number))
    tracker.artifact_text("while.txt", "away")
    spool = tmp_path / f"mlflow-{tracker.run_id}.jsonl"
    _wait_until(lambda: notes and spool.exists())
    forwarder.mend()
    _wait_until(lambda: notes and notes[-1].startswith("MLflow's store is back"))
    assert not spool.exists()
    forwarder.cut()
    for number in range(51, 71):
        tracker.step(step(number))
    assert not tracker.finish("FINISHED")
    assert str(spool) in notes[-1]
    forwarder.mend()

    again = make_tracker(settings, replace(DESCRIPTION, resume_run_id=tracker.run_id), tmp_path, notes.append)
    again.start()
    for number in range(61, 81):
        again.step(step(number))
    assert again.finish("FINISHED")
    forwarder.cut()
    assert steps_of(client, server.uri, tracker.run_id) == list(range(1, 81))
    assert not spool.exists()
    run = client(server.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert "while.txt" in {entry.path for entry in client(server.uri).list_artifacts(tracker.run_id)}
    assert notes[0].startswith("MLflow's store is away (no answer: ")


def test_a_model_that_cannot_be_exported_is_said(store, client):
    class Capricious(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    tracker, notes = track(store)
    tracker.model(Capricious(), [ModelInput("features", torch.ones(2, 3))], 1)
    assert tracker.finish("FINISHED")
    assert len(notes) == 1
    assert "torch.export failed" in notes[0]
    assert client(store).get_run(tracker.run_id).outputs.model_outputs == []


def test_a_figure_that_cannot_be_drawn_is_said_and_holds_nothing_up(store, client):
    def undrawable() -> Figure:
        raise ValueError("the user's own words")

    tracker, notes = track(store)
    tracker.figure("graph.png", undrawable)
    tracker.artifact_text("behind.txt", "text")
    assert tracker.finish("FINISHED")
    assert notes == ["graph.png is not in MLflow: the user's own words"]
    assert {entry.path for entry in client(store).list_artifacts(tracker.run_id)} >= {"behind.txt"}


def test_tracking_switched_off_does_nothing():
    tracker = make_tracker(TrackingConfig(enabled=False), DESCRIPTION)
    assert isinstance(tracker, NullTracker)
    tracker.start()
    assert tracker.wait_ready() is None
    tracker.check()
    tracker.step(step(1))
    tracker.validation(validation(1))
    tracker.event(Event(0, "lost", "x"))
    tracker.tag("a", "b")
    tracker.artifact_text("a", "b")
    tracker.artifact_file("a")
    tracker.figure("a", Figure)
    tracker.model(torch.nn.Linear(1, 1), [], 1)
    assert tracker.finish("FINISHED")
    assert tracker.run_id is None
    assert tracker.run_name is None


def test_a_tracker_that_never_started_can_be_finished(store):
    tracker = make_tracker(TrackingConfig(uri=store), DESCRIPTION)
    assert not tracker.finish("FAILED")


def test_opening_makes_the_store_ready_and_no_run(tmp_path, client):
    """Ray has no room for the run, say: the store was opened for nothing, and the thread ends."""
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    tracker = make_tracker(TrackingConfig(uri=uri), DESCRIPTION)
    tracker.open()
    _wait_until(lambda: (tmp_path / "new.db").exists())
    assert not tracker.finish("FAILED")
    _wait_until(lambda: all(thread.name != "mlflow" for thread in threading.enumerate()))
    assert tracker.run_id is None
    assert [e.name for e in client(uri).search_experiments() if client(uri).search_runs([e.experiment_id])] == []

    tracker = make_tracker(TrackingConfig(uri=uri), DESCRIPTION)
    tracker.open()
    tracker.start()
    assert client(uri).get_run(tracker.wait_ready()).info.status == "RUNNING"
    assert tracker.finish("FINISHED")


def _wait_until(holds, timeout_s=20.0):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
