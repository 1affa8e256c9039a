"""Losses give one value a row, agree with their formulas, and refuse labels and shapes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distrain.config import LossConfig
from distrain.errors import DataError, TrainingError
from distrain.learning.losses import build_loss
from distrain.learning.metrics import Metrics


def per_sample(name: str, outputs: list, label: list) -> torch.Tensor:
    return build_loss(LossConfig(name=name)).per_sample(torch.tensor(outputs), torch.tensor(label))


def test_each_loss_is_its_formula():
    outputs = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=np.float32)
    softmax = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    expected = -np.log(softmax[[0, 1], [2, 1]])
    np.testing.assert_allclose(per_sample("cross_entropy", outputs.tolist(), [2, 1]), expected, rtol=1e-6)
    label = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(
        per_sample("mse", outputs.tolist(), label.tolist()), ((outputs - label) ** 2).mean(1), rtol=1e-6
    )
    sigmoid = 1 / (1 + np.exp(-outputs))
    binary = -(label * np.log(sigmoid) + (1 - label) * np.log(1 - sigmoid)).mean(1)
    np.testing.assert_allclose(per_sample("binary_cross_entropy", outputs.tolist(), label.tolist()), binary, rtol=1e-5)


def test_extreme_logits_stay_finite():
    assert per_sample("binary_cross_entropy", [[1e4], [-1e4]], [0.0, 1.0]).isfinite().all()
    assert per_sample("cross_entropy", [[1e4, -1e4]], [1]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "outputs", "label", "error", "said"),
    [
        ("cross_entropy", [[0.0, 0.0]], [2], DataError, "label 2 is out of range: cross_entropy over 2 classes"),
        ("cross_entropy", [[0.0, 0.0]], [-1], DataError, "label -1 is out of range"),
        ("binary_cross_entropy", [[0.0]], [1.5], DataError, r"label 1.5 is out of range"),
        ("mse", [[0.0, 0.0]], [1.0], TrainingError, r"the model gives \(1, 2\) where the label is \(1,\)"),
        ("cross_entropy", [[0.0, 0.0]], [[1]], TrainingError, "one label a row"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, outputs: list, label: list, error: type, said: str):
    with pytest.raises(error, match=said):
        per_sample(name, outputs, label)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_metrics_of_parts_add_up_to_those_of_the_whole(name: str):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 1 if name != "cross_entropy" else 4, generator=generator)
    label = torch.randint(0, 2, (50,), generator=generator)
    label = label if name == "cross_entropy" else label.float()
    metrics = Metrics(LossConfig(name=name))
    whole = metrics.sums(outputs, label)
    parts = [metrics.sums(outputs[a:b], label[a:b]) for a, b in [(0, 7), (7, 30), (30, 50)]]
    assert len(whole) == metrics.num_sums
    assert metrics.combine([sum(column) for column in zip(*parts, strict=True)]) == pytest.approx(
        metrics.combine(whole)
    )
    assert set(metrics.combine(whole)) == set(metrics.names)


def test_a_users_loss_must_give_one_value_a_row(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "losses_of_test.py").write_text(
        "def mean():\n    return lambda outputs, label: (outputs.squeeze(-1) - label).abs().mean()\n"
        "def rows(power):\n    return lambda outputs, label: (outputs.squeeze(-1) - label).abs() ** power\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outputs, label = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])
    good = build_loss(LossConfig(factory="losses_of_test:rows", args={"power": 2}))
    assert good.per_sample(outputs, label).tolist() == [1.0, 9.0]
    with pytest.raises(TrainingError, match=r"gave \(\) for 2 rows; a loss must give one value for each row"):
        build_loss(LossConfig(factory="losses_of_test:mean")).per_sample(outputs, label)
