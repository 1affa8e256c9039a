from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distrain.config import LossConfig, ModelConfig, load_config
from distrain.learning.task import Task, TaskSpec, build_task
from distrain.study import gradient_check
from distrain.study.gradient_check import KINK, RIGHT, WRONG, check_gradients, check_task
from tests.support.jobs import distrain, write_job


def batch(rows: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(rows, 4, generator=generator),
        "label": torch.randint(0, 3, (rows,), generator=generator),
    }


def task(model: nn.Module | None = None, loss: str = "cross_entropy", **config) -> Task:
    spec = TaskSpec(ModelConfig(hidden=[8, 6], **config), LossConfig(name=loss), 4, 3, False, 0)
    built = build_task(spec)
    return built if model is None else Task(model, built.loss, built.metrics)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_right_models_pass(activation: str, normalization: str | None):
    found = check_task(task(activation=activation, normalization=normalization, dropout=0.3), batch(), seed=5)
    assert len(found) == (6 if normalization is None else 10)
    for each in found:
        assert each.verdict in (RIGHT, KINK) and each.central < 1e-4
        assert each.forward is not None and each.forward < 1e-9


class Doubled(torch.autograd.Function):
    """The identity, with a backward that forgets its third column."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        wrong = gradient.clone()
        wrong[:, 2] = 0
        return wrong


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(torch.tanh(Doubled.apply(self.first(features))))


class Half(nn.Module):
    """Finite forwards, and NaN backwards: the square root's infinite derivative times where's 0."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Tensor:
        outputs = self.last(features)
        return torch.where(outputs > 1e9, (outputs - outputs).sqrt(), outputs)


def test_a_gradient_that_is_not_finite_is_wrong():
    found = check_task(task(Half()), batch(), seed=0)
    assert {(each.verdict, each.note) for each in found} == {(WRONG, "the gradient is not finite")}


def test_a_wrong_backward_is_found_and_its_parameter_named():
    torch.manual_seed(0)
    found = {each.name: each for each in check_task(task(Wrong()), batch(), seed=0)}
    assert found["first.weight"].verdict == found["first.bias"].verdict == WRONG
    assert found["last.weight"].verdict == found["last.bias"].verdict == RIGHT
    assert found["first.bias"].entry == (2,) and found["first.bias"].central > 0.1
    assert "no forward mode" in found["first.weight"].note and found["first.weight"].forward is None


def test_a_configured_run_is_checked_on_its_own_rows(tmp_path: Path):
    found = check_gradients(load_config(write_job(tmp_path)))
    assert [each.name for each in found][:2] == ["model.0.weight", "model.0.bias"]
    assert all(each.verdict in (RIGHT, KINK) for each in found)


def test_of_a_large_microbatch_only_the_first_piece_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches: list[dict[str, Tensor]] = []
    monkeypatch.setattr(gradient_check, "check_task", lambda task, batch, *rest: batches.append(batch) or [])
    check_gradients(load_config(write_job(tmp_path, batch_size="full", max_forward_rows=20, shards=1)))
    assert [len(batch["label"]) for batch in batches] == [20]


def test_the_command_line_says_it_and_exits_with_1_where_one_disagrees(tmp_path: Path):
    job = write_job(tmp_path)
    done = distrain("check-gradients", str(job), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "model.0.weight" in done.stdout and "right" in done.stdout
    (tmp_path / "wrong_model.py").write_text(Path(__file__).read_text().split("class Doubled")[0] + "class Doubled"
        + Path(__file__).read_text().split("class Doubled")[1].split("def test_a_wrong")[0])  # fmt: skip
    settings = ("model={factory: 'wrong_model:Wrong'}", "data.standardize=false")
    done = distrain(
        "check-gradients", str(job), *settings, "--json", cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[2])
    )
    assert done.code == 1, done.stderr
    assert {p["name"] for p in done.result["parameters"] if p["verdict"] == WRONG} == {"first.weight", "first.bias"}
