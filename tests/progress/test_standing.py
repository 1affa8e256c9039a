"""How a run stands, and how that reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.progress import RunInfo
from distrain.progress.standing import (
    PARTS,
    Standing,
    duration,
    headline,
    metrics_line,
    number,
    plural,
    remaining_s,
    samples_per_second,
    shares,
    size,
)
from distrain.records import Report
from distrain.step_sums import StepSums
from tests.support.records import step, validation

INFO = RunInfo("a-run", total_steps=1000, steps_per_epoch=100, epochs=10, num_rows=6400, batch_size=64,
               num_parameters=1234, num_workers=2)  # fmt: skip


def after(*numbers, **changes):
    standing = Standing(INFO)
    for n in numbers:
        standing.add(Report(steps=[step(n, **changes)]))
    return standing


def test_before_the_first_step_nothing_is_known():
    standing = Standing(INFO)
    assert (standing.step, standing.epoch, standing.now, remaining_s(standing)) == (0, 1, None, None)


def test_a_resumed_run_stands_where_it_was_left():
    standing = Standing(RunInfo("a", 1000, 100, 10, 6400, 64, 1, 2, first_step=250))
    assert (standing.step, standing.epoch) == (250, 3)


def test_now_is_the_last_five_seconds():
    standing = after(*range(1, 1001))  # 10 ms each
    now = standing.now
    assert 495 <= now.num_steps <= 530
    assert now.step == standing.step == 1000
    assert samples_per_second(now) == pytest.approx(6400)
    assert standing.epoch == 10
    assert remaining_s(standing) == 0
    assert standing.now.num_steps == now.num_steps  # looking changes nothing


def test_remaining_time_is_at_the_present_speed():
    assert remaining_s(after(*range(1, 401))) == pytest.approx(6.0)


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5))
def test_shares_sum_to_one(seconds):
    found = shares(StepSums.of(step(1, **{f"{part}_s": value for part, value in zip(PARTS, seconds, strict=True)})))
    assert tuple(found) == PARTS
    assert math.fsum(found.values()) == pytest.approx(1.0 if sum(seconds) > 0 else 0.0)


def test_the_last_validation_is_kept():
    standing = Standing(INFO)
    standing.add(Report(validations=[validation(1), validation(2, loss=0.1)]))
    standing.add(Report())
    assert standing.validation.step == 2


def test_how_things_read():
    assert [duration(s) for s in (0, 7.4, 754, 3723, -1)] == ["0:00", "0:07", "12:34", "1:02:03", "0:00"]
    assert [size(b) for b in (0, 512, 999.9, 3.2e9, 1.5e16)] == ["0 B", "512 B", "1 kB", "3.2 GB", "15,000.0 TB"]
    assert [plural(n, "worker") for n in (0, 1, 2000)] == ["0 workers", "1 worker", "2,000 workers"]
    assert (number(0.123456), number(math.nan), number(123456.0)) == ("0.1235", "nan", "1.235e+05")
    assert metrics_line({"accuracy": 0.5, "loss": 2.0, "area": 1.0}) == "loss 2, accuracy 0.5, area 1"
    assert headline(INFO) == "run a-run: 6,400 rows, 100 steps an epoch, 10 epochs, 1,234 parameters, 2 workers"
