"""Random restarts: the best of several seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlflow
import pytest

from distrain.config import TrainConfig
from distrain.errors import ConfigError
from distrain.study.point import Point
from distrain.study.restarts import best_point
from distrain.trainer import Trainer
from tests.support.jobs import distrain, write_job


def point(seed: int, status: str = "finished", **validation: float) -> Point:
    return Point(f"seed={seed}", {"seed": seed}, status, "", validation=validation)


def test_the_best_is_the_first_of_the_best_that_finished():
    points = [point(0, loss=0.5), point(1, loss=0.2), point(2, "failed", loss=0.1), point(3, loss=0.2), point(4)]
    assert best_point(points, "loss") == points[1]
    assert best_point([point(0, accuracy=0.5), point(1, accuracy=0.9)], "accuracy").values == {"seed": 1}
    assert best_point([point(0, "failed")], "loss") is None
    assert best_point([point(0, loss=math.nan), point(1, loss=0.3)], "loss").values == {"seed": 1}


def test_a_trainer_does_one_run():
    config = TrainConfig(data={"train": "rows", "validation": "rows", "label": "y"}, restarts=2)
    with pytest.raises(ConfigError, match="restarts are several runs"):
        Trainer(config)


@pytest.mark.ray
def test_the_best_of_two_seeds_is_what_the_command_line_gives(tmp_path: Path):
    write_job(tmp_path, rows=90, restarts=2, epochs=1, schedule=None, shards=1, workers={"count": 1}, seed=5)
    done = distrain("train", "job.yaml", "tracking.run_name=tries", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    result = done.result
    losses = {each["seed"]: each["validation"]["loss"] for each in result["restarts"]}
    assert set(losses) == {5, 6} and losses[result["seed"]] == min(losses.values()) == result["validation"]["loss"]
    assert f"the best of 2 is that of seed {result['seed']}" in done.stderr
    manifest = json.loads(Path(tmp_path, result["checkpoint"], "manifest.json").read_text())
    assert manifest["config"]["seed"] == result["seed"] and manifest["config"]["restarts"] is None
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    parents = {client.get_run(each["run_id"]).data.tags["mlflow.parentRunId"] for each in result["restarts"]}
    assert len(parents) == 1 and client.get_run(parents.pop()).info.status == "FINISHED"
