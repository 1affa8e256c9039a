"""Full-batch and single-sample gradient descent: the step of all rows at once, and the same bits whoever computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distrain.config import OptimizerConfig
from distrain.data.plan import Plan
from distrain.errors import DivergenceError
from distrain.learning.task import build_task
from distrain.server.loop import LoopSettings
from distrain.worker import Source, Worker
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, open_run, start_worker, task, train


def rows_of(rows: int) -> ArrayDataset:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    label = (features @ [1.0, -2.0, 0.5, 0.0] + 0.1).astype(np.float32)
    return ArrayDataset(features, label, row_group_rows=61)


def job(batch_size: int, forward_rows: int | None, rows: int = 500, normalization: str | None = None, **loop) -> Job:
    dataset = rows_of(rows)
    plan = Plan(dataset.row_counts, batch_size, 3, shuffle_rows=40, forward_rows=forward_rows)
    held_out = rows_of(90)
    validation = Plan(held_out.row_counts, 90, 3, shuffle=False, forward_rows=forward_rows)
    return Job(
        Source(dataset, plan),
        task({"hidden": [8, 8], "activation": "tanh", "normalization": normalization}),
        Source(held_out, validation),
        OptimizerConfig(name="SGD", lr=0.1),
        loop=LoopSettings(**{"epochs": 3, **loop}),
    )


def test_a_full_batch_in_pieces_is_one_step_of_all_rows_at_once():
    the_job = job(batch_size=500, forward_rows=13, epochs=1)
    run, report = train(the_job, 2)
    model, dataset = build_task(the_job.task).model, the_job.train.dataset
    loss = torch.nn.functional.mse_loss(model(dataset.features).squeeze(-1), dataset.label)
    loss.backward()
    [record] = report.steps
    assert record.samples == 500 and record.loss == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(run.server.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    after = run.server.model
    with torch.no_grad():
        held_out = the_job.validation.dataset
        expected = torch.nn.functional.mse_loss(after(held_out.features).squeeze(-1), held_out.label)
    assert report.validations[-1].metrics["loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("batch_size", "forward_rows"), [(500, 13), (64, 5), (1, None), (2, None)])
def test_bits_do_not_depend_on_the_workers(batch_size: int, forward_rows: int | None):
    normalization = None if batch_size < 3 else "batch"
    the_job = job(batch_size, forward_rows, normalization=normalization, epochs=2, rows=200 if batch_size < 3 else 500)
    runs = [train(the_job, workers)[0].outcome for workers in (1, 2, 3)]
    assert len({outcome.parameters_sha256 for outcome in runs}) == 1
    assert runs[0].step == 2 * -(-sum(the_job.train.plan.row_counts) // batch_size)


def test_single_samples_take_each_row_once_and_may_be_pipelined():
    the_job = job(1, None, rows=60, epochs=1, staleness=1, num_workers=2)
    _, report = train(the_job, 2)
    assert [record.samples for record in report.steps] == 60 * [1]
    shards = [shard for record in report.steps for _, _, first, stop in record.taken for shard in range(first, stop)]
    assert sorted(set(shards)) == [0, 1, 2]


def test_a_bad_row_in_a_late_piece_is_found():
    the_job = job(500, 10)
    plan = the_job.train.plan
    row_group, row = plan.row(0, 0, 1, 123)
    the_job.train.dataset.features[the_job.train.dataset.starts[row_group] + row] = float("nan")
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with pytest.raises(DivergenceError, match=rf"step 1, shard 1: .*first at rows: row group {row_group}, row {row} "):
        run.loop.run()


def test_no_more_rows_than_allowed_are_in_memory_for_a_forward_pass():
    seen: list[int] = []

    class Counting(Worker):
        def handle(self, frame):
            self._model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
            super().handle(frame)

    train(job(500, 32, epochs=1), 1, cls=Counting)
    assert max(seen) <= 32 and len(seen) > 500 // 32


@pytest.mark.parametrize(("max_steps", "reason"), [(9, "max_steps, 9, are done"), (24, "all epochs done")])
def test_a_run_says_whether_its_steps_or_its_epochs_ended_it(max_steps: int, reason: str):
    run, _ = train(job(64, None, max_steps=max_steps), 1)
    assert (run.outcome.status, run.outcome.reason, run.outcome.step) == ("finished", reason, max_steps)


def test_a_run_ends_when_its_seconds_are_over():
    run, report = train(job(64, None, epochs=100_000, max_s=0.3), 1)
    assert (run.outcome.status, run.outcome.reason) == ("finished", "0.3 seconds of training are over")
    assert 0 < run.outcome.step < 700_000 and report.steps[-1].step == run.outcome.step
