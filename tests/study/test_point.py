from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from distrain.study.point import Point
from distrain.study.record import Study
from tests.study.points import point


def test_a_point_survives_json():
    before = point()
    assert Point.from_json(json.loads(json.dumps(before.to_json()))) == before
    moment = replace(before.moments[0], metrics={"loss": math.nan})
    diverged = replace(before, validation={"loss": math.inf}, moments=[moment])
    again = Point.from_json(json.loads(json.dumps(diverged.to_json(), allow_nan=False)))
    assert math.isnan(again.validation["loss"]) and math.isnan(again.moments[0].metrics["loss"])
    failed = Point("a", {"seed": 1}, "failed", "no")
    text = json.dumps(failed.to_json(), allow_nan=False)
    assert math.isnan(Point.from_json(json.loads(text)).train_loss)


def test_means_and_errors_are_those_of_the_blocks():
    each = point(blocks=[(1.0, 2.0, 0.0, 0.0, 1.0), (1.0, 4.0, 0.0, 0.0, 1.0)])
    assert each.parts == {"data": 1.0, "compute": 3.0, "waiting": 0.0, "exchange": 0.0, "update": 1.0}
    assert each.step_s == 5.0
    assert each.speed_error == pytest.approx(1 / 5)  # deviation sqrt(2), over sqrt(2), of a mean of 5


def test_a_study_survives_its_file(tmp_path: Path):
    study = Study("s", {"target": {"metric": "accuracy", "value": 0.9}}, {"seed": [1, 2]}, "none", 2.0, "id", [point()])
    study.save(tmp_path / "deep" / "s")
    assert Study.load(tmp_path / "deep" / "s") == study
    assert study.target == {"metric": "accuracy", "value": 0.9}
    study.put(Point(study.points[0].name, {}, "failed", "no"))
    assert len(study.points) == 1 and study.finished(study.points[0].name) is None
