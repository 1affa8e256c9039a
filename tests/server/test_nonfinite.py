"""A loss or gradient that is not finite: the run ends and names the rows, or goes on without their microbatch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from distrain.config import LossConfig, ModelConfig, OptimizerConfig
from distrain.data.plan import Plan
from distrain.errors import DivergenceError
from distrain.learning.models import forward
from distrain.learning.nonfinite import bad_rows, rows_without_finite_gradient, rows_without_finite_loss
from distrain.learning.task import TaskSpec, build_task
from distrain.server.loop import LoopSettings
from distrain.server.skipping import Skipping
from distrain.worker import Source, WorkerOptions
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, open_run, start_worker, train

ROWS, SHARDS, BATCH = 128, 4, 32
STEEP = TaskSpec(
    ModelConfig(factory="tests.server.test_nonfinite:steep"), LossConfig(name="mse"), 4, 1, False, 0
)  # fmt: skip


class SteepAtOne(torch.autograd.Function):
    """The identity, whose derivative is infinite at exactly 1.0: a finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        (values,) = ctx.saved_tensors
        return torch.where(values == 1.0, torch.full_like(gradient, torch.inf), gradient)


class Steep(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, features):
        # Feature 3 is a mark: where it is 7, the value that goes through is exactly 1.0.
        marked = torch.where(features[:, 3] == 7, 1.0, features[:, 3])
        through = SteepAtOne.apply(marked * self.scale.detach() + 0 * self.scale)
        return self.layer(features[:, :4]) * 0.01 + 0.001 * through[:, None]


def steep() -> torch.nn.Module:
    return Steep()


def job(bad: dict[int, float], skip: bool = True, most: int = 10, spec: TaskSpec | None = None, **loop) -> Job:
    """Rows in order, so that row r of step t and shard k is known; `bad`: row -> what its feature 3 is."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, 4)).astype(np.float32)
    for row, value in bad.items():
        features[row, 3] = value
    dataset = ArrayDataset(features, features[:, 0] * 2, row_group_rows=16)
    plan = Plan(dataset.row_counts, BATCH, SHARDS, shuffle=False)
    plain = TaskSpec(ModelConfig(hidden=[8], normalization="batch"), LossConfig(name="mse"), 4, 1, False, 0)
    settings = LoopSettings(**{"epochs": 2, "max_skipped": most, **loop})
    return Job(Source(dataset, plan), spec or plain, optimizer=OptimizerConfig(name="SGD", lr=0.05), loop=settings,
               options=WorkerOptions(skip_nonfinite=skip))  # fmt: skip


def microbatch_of(row: int) -> tuple[int, int]:
    shard, place = divmod(row, ROWS // SHARDS)
    return place // (BATCH // SHARDS), shard


def test_a_gradient_that_is_not_finite_names_step_shard_file_and_rows():
    the_job = job({37: 7.0, 38: 7.0}, skip=False, spec=STEEP)
    step, shard = microbatch_of(37)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    said = (
        rf"step {step + 1}, shard {shard}: the gradient is not finite, first at rows: row group 2, row 5; rows: "
        r"row group 2, row 6 \(2 of 8 rows\); the parameters were left as they were"
    )
    before = [p.detach().clone() for p in run.server.model.parameters()]
    with pytest.raises(DivergenceError, match=said):
        run.loop.run()
    assert run.loop.step == step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.server.model.parameters(), strict=True))


@pytest.mark.parametrize(("bad", "spec"), [({37: np.nan, 90: np.inf}, None), ({37: 7.0, 90: 7.0}, STEEP)])
@pytest.mark.parametrize("links", ["unix", "tcp"])
def test_skipping_leaves_the_microbatch_out_with_the_same_bits_at_any_worker_count(bad, spec, links):
    runs = [train(job(bad, spec=spec, num_workers=count), count, links) for count in (1, 2, 3)]
    assert len({run.outcome.parameters_sha256 for run, _ in runs}) == 1
    expected = {microbatch_of(row) for row in bad}
    for run, report in runs:
        assert (run.outcome.skipped.microbatches, run.outcome.skipped.rows) == (4, 4 * 8)  # in two epochs
        assert run.server.is_finite
        left_out = [(record.step - 1) % 4 for record in report.steps if record.skipped]
        assert sorted(left_out) == sorted(2 * [step for step, _ in expected])
        assert sum(r.samples for r in report.steps) + sum(r.skipped_rows for r in report.steps) == 2 * ROWS
        told = [event.message for event in report.events if event.kind == "skipped"]
        assert len(told) == 4 and all("its microbatch is skipped" in message for message in told)


def test_skipping_in_a_pipeline_gives_the_same_bits_at_any_worker_count():
    runs = [train(job({37: 7.0, 90: np.nan}, spec=STEEP, staleness=2, num_workers=n), n)[0].outcome for n in (1, 2, 3)]
    assert len({outcome.parameters_sha256 for outcome in runs}) == 1 and runs[0].skipped.microbatches == 4


def test_a_skipped_step_is_the_step_of_the_other_rows():
    """One step over all rows: the gradient is that of the three microbatches that are left."""
    the_job = job({37: np.nan}, epochs=1)
    dataset = the_job.train.dataset
    plan = Plan(dataset.row_counts, ROWS, SHARDS, shuffle=False)
    spec = TaskSpec(ModelConfig(hidden=[8]), LossConfig(name="mse"), 4, 1, False, 0)
    the_job = Job(Source(dataset, plan), spec, optimizer=OptimizerConfig(name="SGD", lr=0.05),
                  loop=LoopSettings(epochs=1), options=WorkerOptions(skip_nonfinite=True))  # fmt: skip
    run, report = train(the_job, 2)
    kept = [row for row in range(ROWS) if row // 32 != 1]
    model = build_task(spec).model
    torch.nn.functional.mse_loss(model(dataset.features[kept]).squeeze(-1), dataset.label[kept]).backward()
    assert report.steps[0].samples == 96
    for mine, theirs in zip(run.server.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_a_step_of_which_nothing_is_left_changes_nothing_and_counts():
    bad = {shard * 32 + 3: np.nan for shard in range(SHARDS)}
    run, report = train(job(bad, epochs=1), 2)
    assert [record.samples for record in report.steps] == [0, 32, 32, 32]
    assert run.server.is_finite and run.outcome.step == 4


def test_too_many_end_the_run():
    with pytest.raises(DivergenceError, match=r"left out, as 2 before it, and max_skipped is 2"):
        train(job({0: np.nan, 37: np.nan, 90: np.nan}, most=2))


def test_what_was_skipped_is_remembered_over_a_break():
    whole, _ = train(job({37: np.nan, 90: np.nan}))
    first, _ = train(job({37: np.nan, 90: np.nan}, max_steps=3))
    first.reports.drain()
    last = None
    while (snapshot := first.reports.take_snapshot()) is not None:
        last = snapshot
    the_job = job({37: np.nan, 90: np.nan}, num_workers=2)
    run = open_run(the_job)
    run.loop.restore(3, load(last.model), last.state, load(last.optimizer))
    for rank in range(2):
        start_worker(run, the_job, rank)
    outcome = run.loop.run()
    assert outcome.parameters_sha256 == whole.outcome.parameters_sha256
    assert outcome.skipped == whole.outcome.skipped


def test_asynchronous_runs_skip_too():
    run, report = train(job({37: 7.0}, spec=STEEP, asynchronous=True, staleness=None, num_workers=2), 2)
    assert run.outcome.skipped.microbatches == 2 and run.server.is_finite
    assert sum(r.samples + r.skipped_rows for r in report.steps) == 2 * ROWS


def test_parameters_that_overflowed_never_reach_a_checkpoint():
    the_job = job({}, checkpoint_every_steps=1)
    the_job.optimizer = OptimizerConfig(name="SGD", lr=3e38)
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with pytest.raises(DivergenceError, match=r"not finite"):
        run.loop.run()
    run.reports.drain()
    while (snapshot := run.reports.take_snapshot()) is not None:
        assert all(tensor.isfinite().all() for tensor in load(snapshot.model).values() if tensor.is_floating_point())


@given(rows=st.integers(1, 60), bad=st.sets(st.integers(0, 59), max_size=12))
def test_bad_rows_are_found_by_halving(rows: int, bad: set[int]):
    bad = {row for row in bad if row < rows}
    asked = 0

    def is_bad(start: int, stop: int) -> bool:
        nonlocal asked
        asked += 1
        return any(start <= row < stop for row in bad)

    assert bad_rows(is_bad, rows, most=8) == sorted(bad)[:8]
    assert asked <= 1 + 2 * 8 * 6 + 60


def test_rows_of_a_gradient_are_told_from_those_of_a_loss():
    built = build_task(STEEP)
    features = torch.zeros(8, 4)
    features[[2, 5], 3] = 7.0
    batch = {"features": features, "label": torch.zeros(8)}
    parts = (built.model, lambda rows: forward(built.model, rows), built.loss)
    assert rows_without_finite_gradient(*parts, batch) == [2, 5] and rows_without_finite_loss(*parts, batch) == []
    batch["label"][3] = torch.inf
    assert rows_without_finite_loss(*parts, batch) == [3]


def test_rows_of_a_sparse_gradient_are_found():
    table = torch.nn.Embedding(4, 1, sparse=True)
    table.weight.data.fill_(1.0)  # at which the gradient is infinite
    table.weight.data[0] = 2.0
    loss = build_task(STEEP).loss
    batch = {"features": torch.tensor([0, 1, 0]), "label": torch.zeros(3)}
    outputs = lambda rows: SteepAtOne.apply(table(rows["features"]))[:, 0]  # noqa: E731
    assert rows_without_finite_gradient(table, outputs, loss, batch) == [1]


def test_skipping_counts_and_caps():
    told: list[str] = []
    skipping = Skipping(2, lambda step, shard: 8, lambda kind, message: told.append(message))
    assert skipping.leave_out({}) == skipping.total
    assert skipping.leave_out({(0, 1): "a", (0, 0): "b"}).rows == 16
    with pytest.raises(DivergenceError, match="max_skipped is 2"):
        skipping.leave_out({(1, 0): "c"})
    assert told == ["b; its microbatch is skipped", "a; its microbatch is skipped"]
