"""What is seen of a model's layers, against torch; and warnings from models that really are in trouble."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from distrain.config import OptimizerConfig
from distrain.data.plan import Plan
from distrain.errors import DivergenceError
from distrain.learning.diagnostics import ActivationProbe, is_look
from distrain.learning.symptoms import Symptoms
from distrain.learning.task import build_task
from distrain.records import LayerLook
from distrain.server.loop import LoopSettings
from distrain.tracking.thinning import Thinner
from distrain.worker import Source, WorkerOptions
from tests.support.datasets import ArrayDataset
from tests.support.runs import Job, open_run, start_worker, task, train


def job(model: dict, lr: float = 0.1, rows: int = 192, batch_size: int = 64, every: int = 4, **loop) -> Job:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    dataset = ArrayDataset(features, (features @ [1.0, -2.0, 0.5, 0.0]).astype(np.float32), row_group_rows=17)
    plan = Plan(dataset.row_counts, batch_size, 3, shuffle_rows=40)
    settings = LoopSettings(**{"epochs": 2, "look_every_steps": every, **loop})
    return Job(Source(dataset, plan), task(model), optimizer=OptimizerConfig(name="SGD", lr=lr), loop=settings,
               options=WorkerOptions(look_every_steps=every))  # fmt: skip


def test_one_look_is_what_torch_computes():
    the_job = job({"hidden": [8, 6]}, rows=96, batch_size=96, epochs=1)
    model, dataset = build_task(the_job.task).model, the_job.train.dataset
    seen: dict[str, torch.Tensor] = {}
    for name in ("1", "3", "4"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    torch.nn.functional.mse_loss(model(dataset.features).squeeze(-1), dataset.label).backward()
    _, report = train(the_job, 2)
    layers = {layer.name: layer for layer in report.steps[0].layers}
    assert list(layers) == ["0", "2", "4"] and {layer.kind for layer in layers.values()} == {"Linear"}
    for name, behind in (("0", "1"), ("2", "3"), ("4", "4")):
        module, layer = model.get_submodule(name), layers[name]
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        assert layer.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert layer.num_parameters == len(gradient)
        ratio = 0.1 * module.weight.grad.norm().item() / module.weight.norm().item()
        assert layer.update_ratio == pytest.approx(ratio, rel=1e-3)
        assert layer.activation_norm == pytest.approx(seen[behind].square().mean().sqrt().item(), rel=1e-5)
    assert layers["0"].dead_share == pytest.approx(1 - (seen["1"] > 0).any(0).double().mean().item())
    assert layers["4"].dead_share is None


def test_looks_are_the_same_at_any_worker_count_and_change_no_bit():
    model = {"hidden": [8, 8], "normalization": "batch"}
    runs = [train(job(model, num_workers=n), n) for n in (1, 2, 3)]
    assert len({run.outcome.parameters_sha256 for run, _ in runs}) == 1
    assert runs[0][1].steps[0].layers == runs[1][1].steps[0].layers == runs[2][1].steps[0].layers
    assert [bool(r.layers) for r in runs[0][1].steps] == [True, True, True, False, True, False]
    blind = job(model)
    blind = replace(blind, loop=replace(blind.loop, look_every_steps=None), options=WorkerOptions())
    run, report = train(blind)
    assert run.outcome.parameters_sha256 == runs[0][0].outcome.parameters_sha256
    assert not any(record.layers for record in report.steps)


def troubled(gain: float = 1.0, bias: float = 0.0) -> nn.Module:
    """A deep network of ReLUs whose weights or biases are far off."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), *(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 1)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(gain)
        layers[2].bias.add_(bias)
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])


def warnings_of(the_job: Job) -> list[str]:
    run = open_run(the_job)
    start_worker(run, the_job, 0)
    with suppress(DivergenceError):
        run.loop.run()
    return [event.message for event in run.reports.drain().events if event.kind == "warning"]


FACTORY = "tests.server.test_diagnostics:troubled"


@pytest.mark.parametrize(
    ("the_job", "said"),
    [
        (
            job({"hidden": [16] * 10, "activation": "sigmoid"}),
            "gradients vanish in layers 0, 2, 4, 6, 8, 10: of layer 0 (Linear), an entry is ",
        ),
        (job({"factory": FACTORY, "args": {"gain": 20.0}}, lr=1e-30), "gradients explode in layers 0, 2, 4"),
        (
            job({"factory": FACTORY, "args": {"bias": -100.0}}, lr=1e-6),
            "dead units in layers 4, 8: of layer 4 (Linear), 100% of the units are 0, or where else their",
        ),
        (job({"hidden": [16], "activation": "tanh"}, lr=100.0), "the learning rate, 100, is too high for layer"),
    ],
    ids=["vanishing", "exploding", "dead", "rate"],
)
def test_a_model_in_trouble_is_told_of_by_layer_and_once(the_job: Job, said: str):
    warnings = warnings_of(the_job)
    [warning] = [text for text in warnings if text.startswith(said)]
    assert "Try " in warning and len(set(warnings)) == len(warnings)


def partly_frozen() -> nn.Module:
    """A trained bias beside a frozen weight, and a layer of which nothing is trained."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    made[0].requires_grad_(False)
    made[2].weight.requires_grad_(False)
    return made


def test_what_is_not_trained_is_not_looked_at():
    the_job = job({"factory": "tests.server.test_diagnostics:partly_frozen"}, lr=0.05, epochs=10)
    assert warnings_of(the_job) == []
    _, report = train(the_job)
    assert [(layer.name, layer.num_parameters) for layer in report.steps[0].layers] == [("2", 16), ("4", 17)]


def test_a_healthy_model_is_left_alone():
    assert warnings_of(job({"hidden": [32, 32]}, lr=0.05, epochs=10)) == []


def look(name: str = "0", grad: float = 1.0, ratio: float | None = 0.001, dead: float | None = None) -> LayerLook:
    return LayerLook(name, "Linear", grad, 100, 10.0, ratio, 1.0, dead)


def test_one_bad_look_is_not_enough_and_what_was_said_is_not_said_again():
    symptoms = Symptoms()
    bad = [look("0", 1e-7), look("2", 1.0, dead=0.9)]
    said = [
        symptoms.notice(step, looks, 0.1) for step, looks in enumerate([bad, [look(), look("2")], bad, bad, bad, bad])
    ]
    assert [len(texts) for texts in said] == [0, 0, 0, 0, 2, 0]
    again = Symptoms()
    again.load_state_dict(symptoms.state_dict())
    assert all(not again.notice(step, bad, 0.1) for step in range(5))


def test_looks_are_close_at_first():
    assert [step for step in range(201) if is_look(step, 100)] == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]
    assert [step for step in range(5) if is_look(step, 1)] == [0, 1, 2, 3, 4] and not is_look(0, None)


class Behind(nn.Module):
    """A layer, and a function behind it that is called in `forward`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 9), function
        with torch.no_grad():
            self.layer.bias.copy_(torch.linspace(-40.0, 40.0, 9))

    def forward(self, features: Tensor) -> Tensor:
        return self.function(self.layer(features))


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-2.0, 12.0), nn.Hardswish(), nn.Hardsigmoid(),
        functional.relu, functional.relu6, functional.hardtanh, torch.relu, Tensor.relu, Tensor.relu_,
    ],
)  # fmt: skip
def test_dead_units_are_those_that_get_no_gradient(function: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    model, rows = Behind(function), torch.randn(40, 3)
    probe = ActivationProbe(model)
    probe.begin()
    output = model(rows)
    probe.passed()
    seen = probe.end()["layer"]
    output.sum().backward()
    moves = model.layer.bias.grad != 0
    assert 0 < moves.sum() < 9
    assert (seen["units"], seen["active"]) == (9, sum(1 << i for i, does in enumerate(moves.tolist()) if does))
    assert seen["squares"] == pytest.approx(output.square().sum().item(), rel=1e-6)


def test_the_activation_behind_a_layer_is_the_one_that_ran_behind_it():
    """One module behind two layers, in another order than they are made in; a smooth one has no dead units."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.second, self.first = nn.ReLU(), nn.Linear(4, 3), nn.Linear(2, 4)

        def forward(self, features: Tensor) -> Tensor:
            return torch.tanh(self.second(self.act(self.first(features))))

    model = Shared()
    probe = ActivationProbe(model)
    probe.begin()
    output = model(torch.randn(5, 2))
    probe.passed()
    seen = probe.end()
    assert list(seen) == ["first", "second"] and seen["first"]["units"] == 4 and "units" not in seen["second"]
    assert seen["second"]["squares"] == pytest.approx(output.square().sum().item(), rel=1e-6)


def test_a_forward_pass_that_raises_leaves_nothing_behind():
    model = Behind(lambda _: torch.zeros(1) @ torch.zeros(2))
    probe = ActivationProbe(model)
    probe.begin()
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    assert not _get_current_function_mode_stack()
    probe.end()
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.layer._forward_hooks


def test_a_compiled_model_is_not_compiled_again():
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiles.append(len(compiles))
        return graph.forward

    model = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), backend=backend)
    rows = torch.randn(5, 3)
    model(rows)
    probe = ActivationProbe(model)
    probe.begin()
    model(rows)
    probe.end()
    assert compiles == [0]


def test_units_of_images_are_their_channels():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, -100.0, 0.0]))
    probe = ActivationProbe(model)
    probe.begin()
    for _ in range(2):
        model(torch.randn(5, 1, 6, 6))
        probe.passed()
    seen = probe.end()
    assert list(seen) == ["0", "4"] and (seen["0"]["units"], seen["0"]["active"]) == (3, 0b101)
    assert seen["0"]["count"] == 2 * 5 * 3 * 16 and not model[0]._forward_hooks


def test_layers_become_points_of_their_step():
    _, report = train(job({"hidden": [8]}))
    thinner = Thinner(None)
    for record in report.steps:
        thinner.add(record)
    points = [point for point in thinner.drain(finish=True) if point.key.startswith("layer/")]
    assert {point.key for point in points} == {
        f"layer/{name}/{key}" for name in ("0", "2") for key in ("grad_norm", "update_ratio", "activation_norm")
    } | {"layer/0/dead_share"}
    assert [point.step for point in points if point.key == "layer/0/grad_norm"] == [1, 2, 3, 5]
