"""Sweeps on a real Ray with a real MLflow store."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
import ray

from distrain.config import TrainConfig, WorkersConfig, load_config
from distrain.errors import CheckpointError, ConfigError
from distrain.progress import SweepProgress
from distrain.study.point import Point
from distrain.study.record import Study
from distrain.study.report import find
from distrain.study.sweep import Room, Sweep
from distrain.trainer import Trainer
from tests.support.jobs import Finished, distrain, finish, start, wait_for, write_job

pytestmark = pytest.mark.ray


def sweep(folder: Path, *arguments: str) -> Finished:
    return distrain("sweep", str(folder / "job.yaml"), "--name", "grid", *arguments, cwd=folder, timeout_s=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four points, one of which fails."""
    folder = tmp_path_factory.mktemp("sweep")
    write_job(folder, schedule=None, shards=None, epochs=10, optimizer={"name": "Adam", "lr": 0.02}, sweep={
        "grid": {"batch_size": [16, 64], "model.factory": [None, "nowhere:build"]},
    })  # fmt: skip
    done = sweep(folder, "--target", "validation.accuracy=0.6", "--scale-lr", "sqrt", "workers.count=1", "--json")
    assert done.code == 0, done.stderr
    study = Study.load(folder / "checkpoints" / "grid")
    assert done.result == json.loads(study.to_text())
    return folder


def test_each_point_is_a_nested_run_with_what_charts_need(folder: Path):
    study = Study.load(folder / "checkpoints" / "grid")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'distrain'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{study.parent_run_id}'")
    finished = {point.run_id: point for point in study.points if point.is_finished}
    assert len(finished) == 2
    for child in children:
        if child.info.run_id in finished:
            point, metrics = finished[child.info.run_id], child.data.metrics
            assert child.data.params["batch_size"] == str(point.batch_size) and child.data.params["workers"] == "1"
            assert metrics["final/samples_per_sec"] == pytest.approx(point.samples_per_second)
            assert point.target is not None and metrics["target/samples"] == point.target.samples
            assert point.reason.startswith("validation accuracy 0.") and "reached the target, 0.6" in point.reason
            assert point.validation["accuracy"] >= 0.6 and point.steps == point.target.step
    parent = client.get_run(str(study.parent_run_id))
    assert parent.info.status == "FINISHED"
    artifacts = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.json", "report.html", "recommendation.txt", "points.json", "time_to_target.png"} <= artifacts


def test_the_learning_rate_was_scaled(folder: Path):
    study = Study.load(folder / "checkpoints" / "grid")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    rates = {
        p.batch_size: float(client.get_run(str(p.run_id)).data.metrics["train/lr"])
        for p in study.points
        if p.is_finished
    }
    assert rates == {16: pytest.approx(0.02 * 0.5**0.5, rel=1e-4), 64: pytest.approx(0.02 * 2**0.5, rel=1e-4)}


def test_a_point_that_fails_is_marked_and_the_others_go_on(folder: Path):
    points = Study.load(folder / "checkpoints" / "grid").points
    failed = [point for point in points if point.status == "failed"]
    assert len(failed) == 2 and all("no module 'nowhere'" in point.reason for point in failed)


def test_what_is_finished_is_not_run_again(folder: Path):
    before = {p.name: p.run_id for p in Study.load(folder / "checkpoints" / "grid").points if p.is_finished}
    done = sweep(folder, "--target", "validation.accuracy=0.6", "--scale-lr", "sqrt", "workers.count=1")
    assert done.code == 0 and "2 of them finished before" in done.stderr
    after = {p.name: p.run_id for p in Study.load(folder / "checkpoints" / "grid").points if p.is_finished}
    assert after == before
    assert "fastest: batch_size=" in done.stdout and "report: " in done.stdout


def test_another_configuration_under_the_same_name_is_refused(folder: Path):
    done = sweep(folder, "--target", "validation.accuracy=0.7", "--scale-lr", "sqrt", "workers.count=1")
    assert done.code == 2 and "was begun with another target" in done.stderr


def test_the_report_comes_from_the_folder_the_name_or_mlflow(folder: Path):
    study = Study.load(folder / "checkpoints" / "grid")
    page = folder / "page.html"
    for reference in ("grid", str(folder / "checkpoints" / "grid"), str(study.parent_run_id)):
        done = distrain("report", reference, "--output", str(page), cwd=folder)
        assert done.code == 0, done.stderr
        text = page.read_text()
        page.unlink()
        assert text.count("data:image/png;base64,") >= 3 and "<script" not in text and "http" not in text
        assert "batch_size=16" in text and "failed" in text
    with pytest.raises(CheckpointError, match="no sweep of that name"):
        find("other", str(folder), "sqlite:///none.db")


ON_GPUS = WorkersConfig(count=1, gpus=1)


@pytest.mark.parametrize(
    ("room", "workers", "num_parallel", "together"),
    [
        (Room(4, 0, True, False), WorkersConfig(count=1), None, 2),  # each with its server's core
        (Room(4, 0, True, False), WorkersConfig(count=8), None, 1),
        (Room(2, 0, True, False), WorkersConfig(count=2), 3, 3),  # a Ray of our own is made for as many
        (Room(4, 0, False, False), WorkersConfig(count=2), 3, 2),  # others' cluster is what it is
        (Room(0, 0, False, True), WorkersConfig(count=2, gpus=1), 3, 3),  # which an autoscaler adds
        (Room(0, 0, False, True), WorkersConfig(count=2), None, 1),
        (Room(16, 1, False, False), ON_GPUS, None, 1),
        (Room(16, 3, True, False), ON_GPUS, None, 3),
        (Room(16, 1, True, False), ON_GPUS, 4, 1),
        (Room(16, 1, True, False), WorkersConfig(count=2, gpus=0.5, gpu_count=1), None, 2),
    ],
)
def test_points_begin_as_long_as_there_is_room(
    room: Room, workers: WorkersConfig, num_parallel: int | None, together: int
):
    running: list[WorkersConfig] = []
    while room.has_place(workers, running, num_parallel):
        running.append(workers)
    assert len(running) == together


def test_runs_side_by_side_in_the_terminal(folder: Path):
    done = distrain("compare", "grid", cwd=folder)
    assert done.code == 0, done.stderr
    assert "target/seconds" in done.stdout and "batch_size" in done.stdout
    assert distrain("compare", "unknown", cwd=folder).code == 3


def test_the_plan_foretells_other_worker_counts(folder: Path):
    job = str(folder / "job.yaml")
    done = distrain(
        "plan", job, "batch_size=64", "--sweep", "grid", "--workers", "2", "--workers", "64", "--json", cwd=folder
    )
    assert done.code == 0, done.stderr
    two, many = done.result["forecasts"]
    assert two["prediction"]["setting"]["workers"] == 2 and many["prediction"]["low_s"] <= many["prediction"]["step_s"]
    assert many["target_s"] > 0
    assert distrain("plan", job, "--workers", "2", cwd=folder).code == 2


def test_a_grid_that_cannot_run_is_refused_before_anything_starts(tmp_path: Path):
    write_job(tmp_path, shards=None, server={"mode": "async"})
    done = sweep(tmp_path, "--grid", "batch_size=1,2", "--grid", "workers.count=2,4")
    assert done.code == 2
    assert "batch_size: 1 rows for 2 shards: with server.mode: async" in done.stderr
    assert not (tmp_path / "checkpoints").exists()
    assert sweep(tmp_path).code == 2


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path):
    write_job(tmp_path, schedule=None, epochs=30, tracking={"enabled": False})
    arguments = ("--name", "grid", "--grid", "batch_size=64,32,16", "workers.count=1")
    process = start("sweep", str(tmp_path / "job.yaml"), *arguments, cwd=tmp_path)
    path = tmp_path / "checkpoints" / "grid" / "sweep.json"
    wait_for(lambda: path.exists() and Study.load(path.parent).points, 90, "the first point's end")
    process.terminate()
    stopped = finish(process)
    assert stopped.code == 143 and "go on with --name grid" in stopped.stderr
    before = {point.name: point.parameters_sha256 for point in Study.load(path.parent).points if point.is_finished}
    assert 1 <= len(before) < 3
    done = sweep(tmp_path, *arguments[2:])
    assert done.code == 0, done.stderr
    after = {point.name: point for point in Study.load(path.parent).points}
    assert len(after) == 3 and all(point.is_finished for point in after.values())
    assert all(after[name].parameters_sha256 == sha256 for name, sha256 in before.items())


def test_the_configuration_needs_a_grid():
    with pytest.raises(ConfigError, match="nothing to sweep"):
        Sweep(TrainConfig(data={"train": "rows", "label": "y"}))


@pytest.mark.parametrize(
    ("settings", "sweep", "said"),
    [
        ({"schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 9}}, {"grid": {"optimizer.lr": [0.1, 0.2]}},
         "the schedule has its own: sweep schedule.max_lr"),
        ({"optimizer": {"scale_lr": "sqrt", "base_batch_size": 9}}, {"grid": {"seed": [1, 2]}, "scale_lr": "sqrt"},
         "optimizer.scale_lr is set"),
    ],
)  # fmt: skip
def test_a_grid_whose_learning_rate_would_not_count_is_refused(settings: dict, sweep: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        Sweep(TrainConfig(data={"train": "rows", "label": "y"}, **settings, sweep=sweep))


def test_a_sweep_is_kept_in_a_local_folder():
    keys = {"data": {"train": "rows", "label": "y"}, "sweep": {"grid": {"seed": [1, 2]}}}
    with pytest.raises(
        ConfigError, match=r"checkpoint.dir: sweeps and restarts keep .* folder, not in s3://runs: give"
    ):
        Sweep(TrainConfig(**keys, checkpoint={"dir": "s3://runs"}))


def test_points_run_side_by_side_where_there_are_cores(tmp_path: Path):
    class Order(SweepProgress):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def point_began(self, name: str) -> None:
            self.seen.append(("began", name))

        def point_ended(self, point: Point) -> None:
            self.seen.append(("ended", point.name))

    grid = {"sweep": {"grid": {"seed": [1, 2, 3]}}, "workers": {"count": 1}, "tracking": {"enabled": False}}
    config = load_config(write_job(tmp_path, epochs=20, **grid))
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    try:
        order = Order()
        study, _ = Sweep(config, "wide", order).run()
        alone = Trainer(config.model_copy(update={"seed": 2, "sweep": None})).fit()
    finally:
        ray.shutdown()
    # Two points of a worker and a server each, on four cores.
    assert [what for what, _ in order.seen[:3]] == ["began", "began", "ended"]
    assert all(point.is_finished for point in study.points) and len(study.points) == 3
    assert [p.parameters_sha256 for p in study.points if p.values == {"seed": 2}] == [alone.parameters_sha256]
