from __future__ import annotations

import pytest

from distrain.config import TargetConfig
from distrain.records import Report, StepRecord, ValidationRecord
from distrain.study.watch import PointWatch


def step(number: int, seconds: float = 0.01) -> StepRecord:
    return StepRecord(
        step=number, epoch=0, time_ms=number, loss=1.0 / number, grad_norm=1.0, lr=0.1, clipped=False, samples=32,
        weight=32.0, num_bytes=0, data_s=0.1 * seconds, compute_s=0.5 * seconds, exchange_s=0.2 * seconds,
        update_s=0.1 * seconds, step_s=seconds, workers=1, waiting_s=0.1 * seconds,
    )  # fmt: skip


def validation(number: int, accuracy: float) -> ValidationRecord:
    return ValidationRecord(number, 0, number, {"loss": 1 - accuracy, "accuracy": accuracy}, 10, 0.1)


def test_moments_and_the_target_are_placed_by_step_wherever_a_report_ends():
    watch = PointWatch(lambda text: None, TargetConfig(value=0.9))
    watch.report(Report([step(n) for n in range(1, 11)], [validation(5, 0.5)]))
    watch.report(Report([], [validation(10, 0.95)]))
    watch.report(Report([step(n) for n in range(11, 16)], [validation(15, 0.99)]))
    assert [(m.step, m.samples) for m in watch.moments] == [(5, 160), (10, 320), (15, 480)]
    assert watch.moments[1].seconds == pytest.approx(0.1)
    assert watch.reached is not None
    assert (watch.reached.step, watch.reached.samples) == (10, 320)
    assert watch.reached.from_seconds == pytest.approx(0.05)


@pytest.mark.parametrize("count", [1, 7, 400, 401, 5000])
def test_long_runs_stay_small_and_lose_nothing(count: int):
    watch = PointWatch(lambda text: None)
    watch.report(Report([step(n) for n in range(1, count + 1)]))
    losses, blocks = watch.losses(), watch.blocks()
    assert len(losses) <= 400 and 1 <= len(blocks) <= 20
    assert losses[-1][:2] == (count, 32 * count) and losses[-1][2] == pytest.approx(0.01 * count)
    for block in blocks:
        assert block == pytest.approx((0.001, 0.005, 0.001, 0.002, 0.001))
