"""Losses give one value a row, agree with their formulas, and refuse labels and shapes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import BINARY, CATEGORICAL, LossConfig
from distrain.errors import ConfigError, DataError, TrainingError
from distrain.learning.losses import LOSSES, Loss
from distrain.learning.metrics import Metrics

OUTPUTS = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [-0.3, 0.2, 2.0]], dtype=np.float32)
CLASSES = np.array([2, 1, 0])
SEVERAL = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.5, 1.0, 0.0]], dtype=np.float32)


def build_loss(name: str, **options) -> Loss:
    return Loss(LossConfig(name=name, **options))


def per_sample(name: str, outputs, label, **options) -> torch.Tensor:
    return build_loss(name, **options).per_sample(torch.as_tensor(outputs), torch.as_tensor(label))


def test_losses_over_classes_are_their_formulas():
    softmax = np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(1, keepdims=True)
    p = softmax[range(3), CLASSES]
    np.testing.assert_allclose(per_sample("cross_entropy", OUTPUTS, CLASSES), -np.log(p), rtol=1e-5)
    assert LossConfig(name="focal", gamma=0).options == {"gamma": 0.0} and LossConfig(name="focal").options == {}
    for gamma in (0.0, 0.5, 2.0, 5.0):
        expected = -((1 - p) ** gamma) * np.log(p)
        np.testing.assert_allclose(per_sample("focal", OUTPUTS, CLASSES, gamma=gamma), expected, rtol=1e-5)
    np.testing.assert_allclose(per_sample("focal", OUTPUTS, CLASSES), -((1 - p) ** 2) * np.log(p), rtol=1e-5)
    target = np.eye(3)[CLASSES] * 0.9 + 0.1 / 3
    smoothed = per_sample("cross_entropy", OUTPUTS, CLASSES, label_smoothing=0.1)
    np.testing.assert_allclose(smoothed, -(target * np.log(softmax)).sum(1), rtol=1e-5)


def test_binary_losses_are_their_formulas_for_one_label_and_several():
    p = 1 / (1 + np.exp(-OUTPUTS))
    y = SEVERAL
    binary = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    np.testing.assert_allclose(per_sample("binary_cross_entropy", OUTPUTS, y), binary.mean(1), rtol=1e-5)
    np.testing.assert_allclose(per_sample("binary_cross_entropy", OUTPUTS[:, :1], y[:, 0]), binary[:, 0], rtol=1e-5)
    for gamma in (1.0, 3.0):
        p_t = y * p + (1 - y) * (1 - p)
        expected = ((1 - p_t) ** gamma * binary).mean(1)
        np.testing.assert_allclose(per_sample("binary_focal", OUTPUTS, y, gamma=gamma), expected, rtol=1e-5)
    z = 0.8 * y + 0.1
    smoothed = -(z * np.log(p) + (1 - z) * np.log(1 - p)).mean(1)
    np.testing.assert_allclose(per_sample("binary_cross_entropy", OUTPUTS, y, label_smoothing=0.2), smoothed, rtol=1e-5)


def test_losses_of_numbers_are_their_formulas():
    error = OUTPUTS - SEVERAL
    np.testing.assert_allclose(per_sample("mse", OUTPUTS, SEVERAL), (error**2).mean(1), rtol=1e-6)
    np.testing.assert_allclose(per_sample("mae", OUTPUTS, SEVERAL), np.abs(error).mean(1), rtol=1e-6)
    for delta in (0.5, 1.0, 3.0):
        r = np.abs(error)
        expected = np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).mean(1)
        np.testing.assert_allclose(per_sample("huber", OUTPUTS, SEVERAL, delta=delta), expected, rtol=1e-6)


def test_scikit_learn_agrees_weights_included():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(0, 3, 200)
    weight, classes = rng.uniform(0, 2, 200).astype(np.float32), [1.0, 0.5, 3.0]
    loss = build_loss("cross_entropy", class_weights=classes)
    batch = {"label": torch.from_numpy(label), "weight": torch.from_numpy(weight)}
    total, weights = loss.total(torch.from_numpy(logits), batch, torch.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = sklearn.metrics.log_loss(label, softmax, sample_weight=weight * np.array(classes)[label])
    assert total.item() / weights == pytest.approx(theirs, rel=1e-5)
    numbers = torch.from_numpy(rng.normal(size=200).astype(np.float32))
    for name, metric in (("mse", sklearn.metrics.mean_squared_error), ("mae", sklearn.metrics.mean_absolute_error)):
        total, weights = build_loss(name).total(torch.from_numpy(logits[:, 0]), {**batch, "label": numbers})
        theirs = metric(numbers, logits[:, 0], sample_weight=weight)
        assert total.item() / weights == pytest.approx(theirs, rel=1e-5)
    p, y = 1 / (1 + np.exp(-logits[:, 0])), (label > 0).astype(np.float32)
    total, weights = build_loss("binary_cross_entropy").total(
        torch.from_numpy(logits[:, :1]), {"label": torch.from_numpy(y)}
    )
    assert weights == 200 and total.item() / weights == pytest.approx(sklearn.metrics.log_loss(y, p), rel=1e-5)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from(sorted(LOSSES)), st.booleans())
def test_microbatches_of_unequal_size_add_up(sizes: list[int], name: str, weighted: bool):
    rows = sum(sizes) or 1
    generator = torch.Generator().manual_seed(rows)
    outputs = torch.randn(rows, 3 if name in CATEGORICAL else 1, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 2, (rows,), generator=generator)
    batch = {"label": label if name in CATEGORICAL else label.double()}
    if weighted:
        batch["weight"] = torch.rand(rows, generator=generator)
    loss = build_loss(name)
    whole, weight = loss.total(outputs, batch)
    ends = np.cumsum(sizes)
    parts = [
        loss.total(outputs[end - size : end], {key: value[end - size : end] for key, value in batch.items()})
        for size, end in zip(sizes, ends, strict=True)
        if size
    ]
    if parts:
        assert sum(float(total) for total, _ in parts) == pytest.approx(float(whole), rel=1e-9, abs=1e-12)
        assert sum(w for _, w in parts) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("name", [*CATEGORICAL, *BINARY])
@pytest.mark.parametrize("size", [20.0, 95.0, 1e4, -1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, size: float, gamma: float):
    outputs = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
    label = torch.tensor([0, 1]) if name in CATEGORICAL else torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    options = {"gamma": gamma} if "focal" in name else {}
    loss = build_loss(name, **options).per_sample(outputs, label)
    loss.sum().backward()
    assert loss.isfinite().all() and outputs.grad is not None and outputs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "mse", "gamma": 2}, "gamma goes with focal, binary_focal, not with mse"),
        ({"name": "mse", "gamma": 0}, "gamma goes with focal, binary_focal, not with mse"),
        ({"name": "focal", "label_smoothing": 0.1}, "label_smoothing goes with cross_entropy, binary_cross_entropy"),
        ({"name": "cross_entropy", "class_weights": [0, 0]}, "class_weights are all 0"),
        ({"name": "cross_entropi"}, "did you mean cross_entropy"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        LossConfig(**options)


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


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_metrics_of_parts_add_up_to_those_of_the_whole(name: str):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 1 if name not in CATEGORICAL else 4, generator=generator)
    label = torch.randint(0, 2, (50,), generator=generator)
    label = label if name in CATEGORICAL else label.float()
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
    good = Loss(LossConfig(factory="losses_of_test:rows", args={"power": 2}))
    assert good.per_sample(outputs, label).tolist() == [1.0, 9.0]
    with pytest.raises(TrainingError, match=r"gave \(\) for 2 rows; a loss must give one value for each row"):
        Loss(LossConfig(factory="losses_of_test:mean")).per_sample(outputs, label)
