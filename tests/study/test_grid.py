from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import TrainConfig
from distrain.errors import ConfigError
from distrain.study.grid import expand, parse_grid, parse_target


def test_options_are_yaml():
    grid = parse_grid(["batch_size=64,256", "model.hidden=[32, 32],[64]", "schedule=null"])
    assert grid == {"batch_size": [64, 256], "model.hidden": [[32, 32], [64]], "schedule": [None]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["batch_size"], "give it as key=value,value"),
        (["batch_size="], "there are no values"),
        (["batch_size=[1"], "cannot be read as YAML"),
        (["seed=1", "seed=2"], "is given twice"),
    ],
)
def test_what_does_not_read_is_said(options: list[str], said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_grid(options)


def test_points_are_every_combination_and_their_overrides_are_understood():
    points = expand({"batch_size": [64, 128], "workers.count": [1, 2], "model.hidden": [[8], [16, 4]]})
    assert len(points) == len({p.name for p in points}) == len({p.slug for p in points}) == 8
    assert points[1].name == "batch_size=64 workers.count=1 model.hidden=[16, 4]"
    data = {"data": {"train": "rows", "label": "y"}}
    configs = [TrainConfig.from_mapping(data, point.overrides) for point in points]
    assert [(c.batch_size, c.workers.count, c.model.hidden) for c in configs] == [
        (p.values["batch_size"], p.values["workers.count"], p.values["model.hidden"]) for p in points
    ]


@given(st.integers(1, 4096), st.sampled_from(["linear", "sqrt"]))
def test_the_learning_rate_follows_the_batch_size(size: int, how: str):
    [point] = expand({"batch_size": [size]}, how, base_batch_size=64)  # type: ignore[arg-type]
    values = {"data": {"train": "rows", "label": "y"}, "optimizer": {"lr": 0.01}, "shards": 1}
    config = TrainConfig.from_mapping(values, point.overrides)
    lr = config.optimizer.scaled(config.step_rows(10_000)).lr
    assert lr == pytest.approx(0.01 * (size / 64) ** (1 if how == "linear" else 0.5), rel=1e-5)


def test_a_grid_that_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="nothing to sweep"):
        expand({})
    with pytest.raises(ConfigError, match="leave one of them out"):
        expand({"optimizer.lr": [1e-3], "batch_size": [1]}, "linear")
    with pytest.raises(ConfigError, match="a value twice: seed=1"):
        expand({"seed": [1, 1]})


def test_targets():
    assert parse_target("validation.accuracy=0.97") == "target={metric: accuracy, value: 0.97}"
    assert parse_target("loss=0.2") == "target={metric: loss, value: 0.2}"
    with pytest.raises(ConfigError, match="give it as metric=value"):
        parse_target("accuracy")
