"""What goes on at the server beside the update: noise, averaged weights; every schedule and momentum over a break."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from distrain.config import AveragingConfig, GradientNoiseConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from distrain.errors import ConfigError
from distrain.learning.fingerprint import parameters_sha256
from distrain.learning.model_state import restore_model
from distrain.learning.task import build_task
from tests.server.test_loop import job
from tests.support.runs import Job, open_run, start_worker, train


def resumed(the_job: Job, at: int, workers: int = 2):
    """Train to step `at` with one worker, then to the end with others. Returns the second run and its snapshots."""
    first, _ = train(replace(the_job, loop=replace(the_job.loop, max_steps=at, num_workers=1)))
    snapshot = snapshots(first)[-1]
    assert snapshot.step == at
    run = open_run(replace(the_job, loop=replace(the_job.loop, num_workers=workers)))
    run.loop.restore(at, load(snapshot.model), snapshot.state, load(snapshot.optimizer))
    for rank in range(workers):
        start_worker(run, the_job, rank)
    run.outcome = run.loop.run()
    return run


def snapshots(run):
    run.reports.drain()
    found = []
    while (snapshot := run.reports.take_snapshot()) is not None:
        found.append(snapshot)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_noise": GradientNoiseConfig(eta=0.1)},
        {"averaging": AveragingConfig(decay=0.9)},
        {"averaging": AveragingConfig(decay=0.9), "gradient_noise": GradientNoiseConfig(), "staleness": 2},
    ],
)
def test_the_same_bits_at_any_worker_count_and_over_a_break(changes: dict):
    loop = {"staleness": changes.pop("staleness", 0)} if "staleness" in changes else {}
    the_job = replace(job(**loop), **changes)
    whole, _ = train(the_job)
    others, _ = train(replace(the_job, loop=replace(the_job.loop, num_workers=3)), 3)
    assert whole.outcome.parameters_sha256 == others.outcome.parameters_sha256
    assert resumed(the_job, 13).outcome.parameters_sha256 == whole.outcome.parameters_sha256
    plain, _ = train(job(**loop))
    assert plain.outcome.parameters_sha256 != whole.outcome.parameters_sha256


def test_the_average_is_that_of_its_formula_and_is_validated_saved_and_exported():
    the_job = replace(job(max_steps=4, checkpoint_every_steps=1), averaging=AveragingConfig(decay=0.25))
    plain, _ = train(replace(the_job, averaging=None))
    trained = [load(snapshot.model) for snapshot in snapshots(plain)]
    run, report = train(the_job)
    saved = load(snapshots(run)[-1].model)
    name = "0.weight"
    mean = build_task(the_job.task).model.state_dict()[name]
    for step, weights in enumerate(trained, start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights[name]
    torch.testing.assert_close(saved[name], mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(saved[name], trained[-1][name])
    model = build_task(the_job.task).model
    restore_model(model, saved, {})
    assert parameters_sha256(model) == run.outcome.parameters_sha256

    # What was validated is what was saved.
    held_out = the_job.validation.dataset
    model.eval()
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(model(held_out.features).squeeze(-1), held_out.label)
    assert report.validations[-1].metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_asynchronous_runs_average_too():
    the_job = replace(job(asynchronous=True, staleness=2, num_workers=2), averaging=AveragingConfig(decay=0.9))
    run, report = train(the_job, 2)
    assert run.outcome.epoch == 3 and report.validations


@pytest.mark.parametrize(
    ("at", "optimizer", "schedule"),
    [
        (2, {"name": "SGD", "momentum": 0.9}, {"name": "StepLR", "step_size": 4, "gamma": 0.5}),
        (13, {"name": "SGD", "momentum": 0.9, "nesterov": True}, {"name": "ExponentialLR", "gamma": 0.9}),
        (13, {"name": "AdamW"}, {"name": "CosineAnnealingLR", "T_max": 20}),
        (13, {"name": "Adam"}, {"name": "CosineAnnealingWarmRestarts", "T_0": 5, "T_mult": 2}),
        (2, {"name": "RMSprop"}, {"name": "OneCycleLR", "max_lr": 0.05, "total_steps": 40}),
        (13, {"name": "Adagrad"}, {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5, "threshold": 0.9}),
    ],
)
def test_momentum_and_schedules_with_warm_up_go_on_to_the_bit(at: int, optimizer: dict, schedule: dict):
    the_job = replace(
        job(validation_every_steps=3),
        optimizer=OptimizerConfig(**{"lr": 0.01, **optimizer}),
        schedule=ScheduleConfig(warmup_steps=3, **schedule),
    )
    whole, report = train(the_job)
    rates = [record.lr for record in report.steps]
    assert rates[0] < rates[1] < rates[2] and len(set(rates)) > 5
    run = resumed(the_job, at)  # within the warm-up, or in the middle of an epoch
    assert run.outcome.parameters_sha256 == whole.outcome.parameters_sha256
    assert [r.lr for r in run.reports.drain().steps] == rates[at:]


@pytest.mark.parametrize(("how", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_learning_rate_follows_the_batch_size(how: str, factor: float):
    config = OptimizerConfig(lr=0.01, scale_lr=how, base_batch_size=64)
    assert config.scaled(256).lr == pytest.approx(0.01 * factor) and config.scaled(64).lr == 0.01
    assert config.scaled(256).scaled(256) == config.scaled(256)
    values = {"data": {"train": "rows", "label": "y"}, "batch_size": "full", "optimizer": config.model_dump()}
    assert TrainConfig(**values).step_rows(1024) == 1024


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": {"scale_lr": "linear"}}, "scale_lr and base_batch_size go together"),
        ({"optimizer": {"base_batch_size": 8}}, "scale_lr and base_batch_size go together"),
        (
            {"optimizer": {"scale_lr": "sqrt", "base_batch_size": 8}, "schedule": {"name": "OneCycleLR", "max_lr": 1}},
            "OneCycleLR goes by its own max_lr",
        ),
        ({"averaging": {"decay": 1}}, "averaging.decay: must be less than 1, got 1"),
        ({"gradient_noise": {"etta": 1}}, "gradient_noise.etta: no such key; did you mean eta?"),
        ({"restarts": 2}, "restarts: needs data.validation"),
    ],
)
def test_what_does_not_fit_is_said(values: dict, said: str):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        TrainConfig.from_mapping({"data": {"train": "rows", "label": "y"}, **values})
