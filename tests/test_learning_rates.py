"""The picture of learning rates: its steps are those of gradient descent, computed by NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.learning_rates import RATES, START, STEPS, curvatures, descend, draw, main, rows


@pytest.mark.parametrize("names", [["bmi"], ["bmi", "bp"]])
@pytest.mark.parametrize("word", RATES)
def test_each_step_is_one_of_gradient_descent(names: list[str], word: str):
    features, label = rows(names)
    lr = RATES[word] / curvatures(features)[-1]
    path, losses = descend(features, label, lr)
    x, y = features.double().numpy(), label.double().numpy()
    weights = np.array(START[: len(names)])
    for step in range(STEPS + 1):
        np.testing.assert_allclose(path[step], weights, rtol=1e-3, atol=1e-2)
        assert losses[step] == pytest.approx(np.mean((x @ weights - y) ** 2), rel=1e-3)
        weights = weights - lr * 2 * x.T @ (x @ weights - y) / len(y)
    assert (losses[-1] > losses[1]) == (word == "too large")


def test_it_has_six_panels():
    assert len(draw().axes) == 6


def test_the_command_draws_a_file(tmp_path: Path):
    path = tmp_path / "rates.png"
    done = CliRunner().invoke(main, ["--output", str(path)])
    assert done.exit_code == 0 and done.output.strip() == str(path)
    assert path.read_bytes()[:4] == b"\x89PNG"
