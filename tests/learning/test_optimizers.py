"""Any optimizer and schedule of torch by its own name; a schedule goes on exactly where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from distrain.config import OptimizerConfig, ScheduleConfig
from distrain.errors import ConfigError
from distrain.learning.optimizers import build_optimizer, optimizer_names
from distrain.learning.schedules import Schedule, build_schedule, schedule_names, what_comes_after

KEYWORDS = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 40},
    "ReduceLROnPlateau": {"patience": 0},
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 1))


@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "Muon"])
def test_every_optimizer_steps(name: str):
    net = model()
    optimizer = build_optimizer(net, OptimizerConfig(name=name, lr=0.01))
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_biases_and_norms_are_not_decayed_unless_asked():
    net = model()
    decayed, spared = build_optimizer(net, OptimizerConfig(name="AdamW", weight_decay=0.1)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[3].weight)}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert len(spared["params"]) == 6
    [group] = build_optimizer(net, OptimizerConfig(name="AdamW", weight_decay=0.1, decay_all=True)).param_groups
    assert len(group["params"]) == 8


def test_an_attentions_biases_are_not_decayed():
    net = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    decayed, _ = build_optimizer(net, OptimizerConfig(name="AdamW", weight_decay=0.1)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(net.in_proj_weight), id(net.out_proj.weight)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Adma"}, "optimizer.name: torch.optim has no optimizer 'Adma'; did you mean Adam"),
        ({"name": "adamw"}, "did you mean AdamW"),
        ({"name": "LBFGS"}, "LBFGS cannot be used: it evaluates the loss several times"),
        ({"name": "Adam", "beta": [0.9, 0.9]}, "optimizer.beta: torch.optim.Adam has no such keyword; did you mean"),
        ({"name": "Adam", "betas": [2.0, 0.9]}, "torch.optim.Adam refused its values"),
        ({"name": "Rprop", "weight_decay": 0.1}, "torch.optim.Rprop has no weight decay"),
    ],
)
def test_mistakes_are_named(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        build_optimizer(model(), OptimizerConfig(**options))


def schedule(name: str | None, warmup_steps: int = 0) -> tuple[torch.optim.Optimizer, Schedule]:
    optimizer = build_optimizer(nn.Linear(2, 1), OptimizerConfig(name="SGD", lr=0.1, momentum=0.9))
    config = ScheduleConfig(name=name, warmup_steps=warmup_steps, **KEYWORDS.get(name or "", {}))
    return optimizer, build_schedule(optimizer, config)


def advance(which: Schedule, step: int) -> float:
    """One update, and a validation every fourth step that never improves."""
    which.step()
    if step % 4 == 0:
        which.validated(1.0)
    return which.lr


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("name", schedule_names())
def test_a_schedule_goes_on_exactly_from_every_position(name: str, warmup_steps: int):
    _, whole = schedule(name, warmup_steps)
    rates, states = [], []
    for step in range(20):
        rates.append(advance(whole, step))
        states.append(json.dumps(whole.state_dict()))
    for position, state in enumerate(states[:-1]):
        _, resumed = schedule(name, warmup_steps)
        resumed.load_state_dict(json.loads(state))
        assert resumed.lr == rates[position]
        assert [advance(resumed, step) for step in range(position + 1, 20)] == rates[position + 1 :]


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("name", sorted(set(schedule_names()) - {"ReduceLROnPlateau"}))
def test_a_schedule_finds_its_way_from_the_number_of_updates_alone(name: str, warmup_steps: int):
    _, whole = schedule(name, warmup_steps)
    for updates in range(1, 20):
        whole.step()
        _, other = schedule(name, warmup_steps)
        other.load_state_dict({"steps": updates})
        assert other.state_dict() == whole.state_dict()


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    ("options", "length", "beyond"),
    [
        ({"name": "CosineAnnealingLR", "T_max": 10}, 10, "rises again"),
        ({"name": "OneCycleLR", "max_lr": 0.1, "epochs": 3, "steps_per_epoch": 4}, 12, "ends the run"),
        ({"name": "PolynomialLR"}, 5, "is 0"),
    ],
)
def test_a_run_longer_than_its_schedule_is_told_what_comes(options: dict, length: int, beyond: str, warmup_steps: int):
    config = ScheduleConfig(**options, warmup_steps=warmup_steps)
    assert what_comes_after(config, length + warmup_steps) == ""
    said = what_comes_after(config, length + warmup_steps + 1)
    assert f"for {length + warmup_steps} updates" in said and beyond in said and f"={length + 1} makes" in said

    running = build_schedule(build_optimizer(nn.Linear(2, 1), OptimizerConfig(name="SGD", lr=0.1)), config)
    for _ in range(length + warmup_steps):
        running.step()
    last = running.lr
    if beyond == "ends the run":
        with pytest.raises(ConfigError):
            running.step()
    else:
        running.step()
        assert running.lr == 0 if beyond == "is 0" else running.lr > last


def test_most_schedules_go_on_for_ever():
    assert what_comes_after(ScheduleConfig(name="StepLR", step_size=3), 10**9) == ""
    assert what_comes_after(ScheduleConfig(warmup_steps=3), 10**9) == what_comes_after(None, 10**9) == ""


def test_warm_up_rises_linearly_to_the_rate():
    _, rising = schedule(None, warmup_steps=4)
    rates = [rising.lr]
    for _ in range(5):
        rising.step()
        rates.append(rising.lr)
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "CosineAnealingLR"}, "no schedule 'CosineAnealingLR'; did you mean CosineAnnealingLR"),
        ({"name": "LambdaLR"}, "LambdaLR cannot be used: it needs a Python function"),
        ({"name": "StepLR", "step": 3}, "schedule.step: torch.optim.lr_scheduler.StepLR has no such keyword"),
        ({"name": "StepLR"}, "schedule.step_size: missing"),
        ({"name": "OneCycleLR", "max_lr": 0.1}, "schedule.total_steps: missing: .*OneCycleLR needs the number of upd"),
        ({"T_max": 3}, "schedule.T_max: a keyword of a schedule, but schedule.name names none"),
    ],
)
def test_mistakes_in_a_schedule_are_named(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        build_schedule(build_optimizer(nn.Linear(2, 1), OptimizerConfig()), ScheduleConfig(**options))
