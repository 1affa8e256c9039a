from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrain.config import OptimizerConfig
from distrain.data.plan import Plan
from distrain.server.loop import LoopSettings
from distrain.study.point import Point
from distrain.study.step_time import Setting, StepTime, StepTimeFit
from distrain.study.watch import PointWatch
from distrain.worker import Source, Worker
from tests.study.points import point
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, open_run, start_worker, task

SECONDS = st.floats(0, 0.05)
MODELS = st.builds(StepTime, SECONDS, st.floats(1e-6, 1e-3), st.floats(0, 0.5), SECONDS, SECONDS, st.just(0.0), SECONDS)


def measured(model: StepTime, setting: Setting) -> Point:
    parts = model.parts(setting)
    block = (0.0, parts["work"], parts["waiting"], parts["exchange"], parts["update"])
    return point(setting.batch_size, setting.workers, shards=setting.shards, blocks=[block])


@settings(max_examples=30, deadline=None)
@given(MODELS)
@example(StepTime(0.0, 1e-3, 2e-313, 0.0, 0.0, 0.0, 0.0))
def test_times_that_follow_the_model_are_predicted_at_counts_not_measured(model: StepTime):
    seen = [Setting(w, b, 8, 4000) for w in (1, 2, 4) for b in (64, 256)]
    fit = StepTimeFit([measured(model, setting) for setting in seen])
    assert fit.error < 1e-6
    for setting in (Setting(8, 128, 8, 4000), Setting(64, 1024, 64, 4000)):
        assert fit.predict(setting).step_s == pytest.approx(model.step_s(setting), rel=1e-4)


def test_the_band_holds_what_is_predicted_and_grows_with_the_spread():
    points = [point(64, 1), point(64, 2)]
    setting = Setting(8, 64, 8, 4000)
    narrow = StepTimeFit(points).predict(setting)
    assert narrow.low_s <= narrow.step_s <= narrow.high_s
    assert narrow.samples_per_second == 64 / narrow.step_s
    for each in points:
        each.blocks = [tuple(value * (3 if i % 2 else 1) for value in block) for i, block in enumerate(each.blocks)]
    wide = StepTimeFit(points).predict(setting)
    assert wide.high_s / wide.low_s > 1.2 * narrow.high_s / narrow.low_s


def test_shards_that_do_not_divide_evenly_are_seen():
    assert Setting(3, 64, 4, 0).imbalance == 1.5 and Setting(4, 64, 4, 0).imbalance == 1.0


def test_nothing_measured_is_said():
    with pytest.raises(ValueError, match="no point has measured step times"):
        StepTimeFit([point(blocks=[])])


class Accelerator(Worker):
    """Takes 200 ms for a microbatch and 8 ms for each row, however many others there are: much longer than the threads
    of eight of them wait for each other on a machine of two cores, which no model of accelerators foretells."""

    def _gradient(self, pieces, step, shard, *rest):
        time.sleep(0.2 + 0.008 * self._train.plan.num_rows_of(step, shard))
        return super()._gradient(pieces, step, shard, *rest)


def accelerated(workers: int) -> Point:
    """A point measured with so many simulated accelerators."""
    rng = np.random.default_rng(0)
    features, label = rng.normal(size=(384, 4)).astype(np.float32), rng.normal(size=384).astype(np.float32)
    dataset = ArrayDataset(features, label, 96, 96)
    source = Source(dataset, Plan(dataset.row_counts, 64, workers, 384))  # type: ignore[arg-type]
    job = Job(source, task(), optimizer=OptimizerConfig(name="SGD"), loop=LoopSettings(epochs=1, num_workers=workers))
    run = open_run(job)
    threads = [start_worker(run, job, rank, cls=Accelerator) for rank in range(workers)]
    run.loop.run()
    for thread in threads:
        thread.join(20)
    watch = PointWatch(lambda text: None)
    watch.report(run.reports.drain())
    return point(64, workers, blocks=watch.blocks())


def test_one_and_two_accelerators_foretell_four_and_eight():
    fit = StepTimeFit([accelerated(count) for count in (1, 2)])
    for count in (4, 8):
        predicted = fit.predict(Setting(count, 64, count, 4000))
        assert predicted.step_s == pytest.approx(accelerated(count).step_s, rel=0.15)
