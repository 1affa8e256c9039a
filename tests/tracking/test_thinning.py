"""From step records to points."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import validate_param_and_metric_name

from distrain.records import LayerLook
from distrain.tracking.thinning import Thinner, layer_points, validation_points
from tests.support.records import START_MS, step, validation

LEARNING = {"train/loss", "train/grad_norm", "train/lr"}
SPEED = {
    "throughput/samples_per_sec", "throughput/bytes_per_sec", "time/data_sec", "time/compute_sec", "time/waiting_sec",
    "time/exchange_sec", "time/update_sec", "time/step_sec", "ps/staleness", "ps/clipped", "workers/alive",
}  # fmt: skip


def thin(records, every_steps=None):
    thinner = Thinner(every_steps)
    for record in records:
        thinner.add(record)
    return thinner.drain(finish=True)


def curve(points, key):
    return [(point.step, point.value) for point in points if point.key == key]


def test_every_step_at_first_then_means_over_a_hundredth_of_the_time_and_at_most_half_a_second():
    steps = [number for number, _ in curve(thin(step(n) for n in range(1, 12_001)), "train/loss")]  # 10 ms each
    assert steps[:100] == list(range(1, 101))
    for before, after in pairwise(steps[:-1]):
        assert (after - before) * 10 == pytest.approx(min(500, after * 10 / 100), abs=10 + 0.01 * 500)
    assert {after - before for before, after in pairwise(steps[-100:-1])} == {50}  # the last one is cut short
    assert len(steps) < 700


def test_slow_steps_have_a_point_each():
    records = [step(n, time_ms=START_MS + 600 * n) for n in range(1, 1001)]
    assert [number for number, _ in curve(thin(records), "train/loss")] == list(range(1, 1001))


def test_speeds_are_means_over_half_a_second_from_the_start():
    points = thin(step(n) for n in range(1, 201))
    assert curve(points, "throughput/samples_per_sec") == [(n, 6400.0) for n in (50, 100, 150, 200)]


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 64), st.floats(-5, 5)), min_size=1, max_size=100))
def test_means_lose_no_sample(every_steps, rows_and_losses):
    records = [step(i + 1, samples=rows, loss=loss) for i, (rows, loss) in enumerate(rows_and_losses)]
    points = curve(thin(records, every_steps), "train/loss")
    assert [number for number, _ in points] == [
        min(n + every_steps, len(records)) for n in range(0, len(records), every_steps)
    ]
    weights = [sum(r.samples for r in records[n : n + every_steps]) for n in range(0, len(records), every_steps)]
    total = math.fsum(weight * value for weight, (_, value) in zip(weights, points, strict=True))
    assert total == pytest.approx(math.fsum(r.loss * r.samples for r in records), abs=1e-6)


def test_a_point_carries_the_time_of_its_last_step_and_the_names_are_the_agreed_ones():
    points = thin([step(1, clipped=True), step(2), step(3, lr=0.5)], every_steps=3)
    assert {point.key for point in points} == LEARNING | SPEED
    assert {(point.step, point.time_ms) for point in points} == {(3, START_MS + 30)}
    values = {point.key: point.value for point in points}
    assert (values["train/lr"], values["ps/clipped"]) == (0.5, pytest.approx(1 / 3, abs=1e-6))
    assert (values["ps/staleness"], values["time/compute_sec"], values["workers/alive"]) == (0, 0.006, 2)


def test_the_loss_comes_last_of_its_step_so_that_where_it_was_stored_all_was():
    points = thin(step(n) for n in range(1, 130))
    for before, after in pairwise(points):
        assert before.step < after.step or before.key != "train/loss"
    assert validation_points(validation(5, accuracy=0.9, loss=0.1, zeal=1.0))[-1].key == "val/loss"


def test_a_value_that_is_not_finite_becomes_nan():
    points = thin([step(1, loss=math.inf, grad_norm=-math.inf)])
    assert math.isnan(dict(curve(points, "train/loss"))[1])
    assert math.isnan(dict(curve(points, "train/grad_norm"))[1])
    assert math.isnan(validation_points(validation(1, loss=math.inf))[0].value)


def test_any_name_of_a_layer_is_one_that_mlflow_takes():
    name = "columns.sepal length (cm) é" + "x" * 300
    layers = (LayerLook(name, "Linear", 1.0, 9, 1.0, None, None, None),)
    [point] = layer_points(replace(step(1), layers=layers))
    assert point.key.startswith("layer/columns.sepal length _cm_ é") and len(point.key) == 250
    assert validate_param_and_metric_name(point.key)


def test_what_nobody_takes_is_merged_and_not_lost():
    points = curve(
        thin((step(n, loss=1.0 if n <= 15_000 else 3.0) for n in range(1, 30_001)), every_steps=1), "train/loss"
    )
    assert len(points) <= 20_000
    assert points[-1][0] == 30_000
    steps = [0, *(number for number, _ in points)]
    lengths = [after - before for before, after in pairwise(steps)]
    total = math.fsum(length * value for length, (_, value) in zip(lengths, points, strict=True))
    assert total == pytest.approx(15_000 * 1.0 + 15_000 * 3.0)


def test_what_was_drained_does_not_come_again():
    thinner = Thinner(every_steps=2)
    for n in (1, 2, 3):
        thinner.add(step(n))
    assert {point.step for point in thinner.drain()} == {2}
    assert thinner.drain() == []
    assert {point.step for point in thinner.drain(finish=True)} == {3}


def test_updates_that_overflowed_in_fp16_are_counted_and_have_no_gradient_norm():
    overflow = {"loss_scale": 1024.0, "overflowed": True, "grad_norm": math.inf}
    points = thin([step(1, **overflow), step(2, loss_scale=512.0), step(3, loss_scale=512.0)], every_steps=3)
    assert curve(points, "train/loss_scale") == [(3, 512.0)]
    assert curve(points, "ps/overflowed") == [(3, pytest.approx(1 / 3, rel=1e-5))]
    assert curve(points, "train/grad_norm") == [(3, 2.0)]
    [(_, norm)] = curve(thin([step(1, **overflow)], every_steps=1), "train/grad_norm")
    assert math.isnan(norm)
    assert not curve(thin([step(1)], every_steps=1), "train/loss_scale"), "nothing of it in fp32"
