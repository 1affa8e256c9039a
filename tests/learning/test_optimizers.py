"""Any optimizer and schedule of torch by its own name; a schedule goes on exactly where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from distrain.config import OptimizerConfig, ScheduleConfig
from distrain.errors import ConfigError
from distrain.learning.optimizers import build_optimizer, check_optimizer, optimizer_names
from distrain.learning.schedules import (
    Schedule,
    build_schedule,
    check_optimization,
    check_schedule,
    schedule_names,
    what_comes_after,
)

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
        (
            {"name": "Adam", "betas": [2.0, 0.9]},
            r"optimizer: torch.optim.Adam refused its values \(betas=\[2.0, 0.9\]\): ",
        ),
        ({"name": "Adam", "betas": [0.9] * 3}, r"Adam refused its values \(.*\): too many values to unpack"),
        ({"name": "Adam", "amsgrad": "no"}, "^optimizer.amsgrad: expected true or false, got 'no'$"),
        (
            {"name": "SGD", "momentum": "x", "lrr": 1},
            "optimizer.lrr: .*\noptimizer.momentum: expected a number, got 'x'",
        ),
        ({"name": "Rprop", "weight_decay": 0.1}, "torch.optim.Rprop has no weight decay"),
    ],
)
def test_mistakes_are_named(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        build_optimizer(model(), OptimizerConfig(**options))


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_can_be_tried(name: str):
    decay = 0.0 if name == "Rprop" else 0.1
    assert check_optimizer(OptimizerConfig(name=name, weight_decay=decay)) == []
    assert check_optimizer(OptimizerConfig(name=name, lr=1, weight_decay=decay, decay_all=True)) == []


def test_what_is_a_tuple_in_torch_may_be_a_list_or_one():
    for betas in ([0, "9e-1"], (0, "9e-1")):
        optimizer = build_optimizer(model(), OptimizerConfig(betas=betas))
        assert optimizer.param_groups[0]["betas"] == (0.0, 0.9)


def test_no_update_or_checkpoint_waits_for_what_takes_torch_a_second_to_load():
    code = (
        "import sys, torch; from distrain.config import OptimizerConfig;"
        "from distrain.learning.optimizers import build_optimizer;"
        "from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer;"
        "model = torch.nn.Linear(2, 1); optimizer = build_optimizer(model, OptimizerConfig());"
        "model(torch.ones(1, 2)).sum().backward(); optimizer.step();"
        "unpack_optimizer(optimizer, *pack_optimizer(optimizer)); optimizer.step();"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_trial_does_without_what_takes_torch_a_second_to_load():
    code = (
        "import sys; from distrain.config import OptimizerConfig, ScheduleConfig;"
        "from distrain.learning.schedules import check_optimization;"
        "found = check_optimization(OptimizerConfig(amsgrad=True), ScheduleConfig(name='StepLR', step_size=3));"
        "assert not found, found; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"name": "MultiStepLR", "milestones": ["2e0", 5.0]}, {"milestones": [2, 5]}),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": "4e1"}, {"max_lr": 0.1, "total_steps": 40}),
        ({"name": "CosineAnnealingWarmRestarts", "T_0": "4e0"}, {"T_0": 4}),
    ],
)
def test_steps_may_be_written_with_an_exponent_and_resumed(options: dict, whole: dict):
    """YAML 1.1 reads 1e3 as a text, and 1.0e+3 as a float."""

    def build(**keywords) -> Schedule:
        optimizer = build_optimizer(nn.Linear(2, 1), OptimizerConfig(name="SGD", lr=0.1, momentum=0.9))
        return build_schedule(optimizer, ScheduleConfig(**keywords))

    written, plain = build(**options), build(**{**options, **whole})
    for step in range(8):
        assert advance(written, step) == advance(plain, step)
        resumed = build(**options)
        resumed.load_state_dict(json.loads(json.dumps(written.state_dict())))
        assert resumed.state_dict() == plain.state_dict()


def test_milestones_of_a_checkpoint_that_has_whole_floats_are_found():
    _, whole = schedule("MultiStepLR")
    state = json.loads(json.dumps(whole.state_dict()))
    state["main"]["milestones"] = {"2.0": 1, "5.0": 1}
    _, resumed = schedule("MultiStepLR")
    resumed.load_state_dict(state)
    assert [resumed.step() or resumed.lr for _ in range(6)] == [whole.step() or whole.lr for _ in range(6)]


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
        ({"name": "CosineAnnealingLR", "T_max": "1e1"}, 10, "rises again"),
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
        ({"name": "CosineAnnealingLR", "T_max": "abc"}, "^schedule.T_max: expected an integer, got 'abc'$"),
        ({"name": "CosineAnnealingLR", "T_max": None}, "^schedule.T_max: expected an integer, got None$"),
        (
            {"name": "OneCycleLR", "max_lr": 0.1, "epochs": "x", "steps_per_epoch": 9},
            "schedule.epochs: expected an int",
        ),
        ({"name": "ExponentialLR", "gamma": "x"}, "schedule.gamma: expected a number, got 'x'"),
        (
            {"name": "StepLR", "step_size": "abc", "gama": 3},
            "schedule.gama: .*gamma.\nschedule.step_size: expected an in",
        ),
        (
            {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1, "mode": "x"},
            r"refused its values \(base_lr=0.1, max_lr=1, m",
        ),
    ],
)
def test_mistakes_in_a_schedule_are_named(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        build_schedule(build_optimizer(nn.Linear(2, 1), OptimizerConfig()), ScheduleConfig(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "StepLR", "step_size": 0}, "StepLR refused its values (step_size=0): integer modulo by zero"),
        ({"name": "CosineAnnealingLR", "T_max": 0}, "CosineAnnealingLR refused its values (T_max=0): "),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": None}, "You must define either total_steps OR"),
        ({"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0}, "optimizer must support momentum"),
    ],
)
def test_what_only_an_update_shows_is_found_by_one(options: dict, said: str):
    config = ScheduleConfig(**options)
    [(key, text)] = check_optimization(OptimizerConfig(name="Adagrad"), config)
    assert key == "schedule" and said in text
    assert check_schedule(config) == [], "there is no optimizer to try it on"
    [(key, _)] = check_optimization(OptimizerConfig(name="Adagard"), config)
    assert key == "optimizer.name"


@pytest.mark.parametrize("name", schedule_names())
def test_every_schedule_can_be_tried(name: str):
    decaying = OptimizerConfig(name="SGD", lr=0.1, momentum=0.9, weight_decay=0.1)
    assert check_optimization(decaying, ScheduleConfig(name=name, **KEYWORDS.get(name, {}))) == []


def test_a_trial_has_the_groups_that_weight_decay_makes():
    two = ScheduleConfig(name="OneCycleLR", max_lr=[0.1, 0.2], total_steps=1)
    assert check_optimization(OptimizerConfig(weight_decay=0.1), two) == []
    assert check_optimization(OptimizerConfig(), two)[0][1].endswith("param_groups has 1.")
    one = ScheduleConfig(name="OneCycleLR", max_lr=[0.1], total_steps=1)  # for a model without biases
    assert check_optimization(OptimizerConfig(weight_decay=0.1), one) == []


def test_a_power_that_overflows_ends_in_plain_words():
    options = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0, "mode": "exp_range", "gamma": 1e200}
    optimizer = build_optimizer(nn.Linear(2, 1), OptimizerConfig(name="SGD", lr=0.1, momentum=0.9))
    running = build_schedule(optimizer, ScheduleConfig(**options))
    with pytest.raises(ConfigError, match=r"schedule: torch.optim.lr_scheduler.CyclicLR has no rate for update 3: "):
        for _ in range(3):
            running.step()
