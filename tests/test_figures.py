"""Figures show what they were given."""

from __future__ import annotations

import io
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distrain.figures import loss_curve, staleness_histogram


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_training_and_validation_are_drawn_with_a_legend():
    figure = loss_curve(([1, 2, 3], [3.0, 2.0, 1.0]), ([3], [1.5]), title="digits")
    assert list(lines(figure)["training"].get_ydata()) == [3.0, 2.0, 1.0]
    assert list(lines(figure)["validation"].get_xdata()) == [3]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "validation"]
    assert figure.axes[0].get_title() == "digits"
    assert figure.axes[0].get_yscale() == "linear"


def test_values_that_are_not_finite_are_left_out():
    figure = loss_curve(([1, 2, 3, 4], [1.0, math.nan, math.inf, 0.5]))
    assert list(lines(figure)["training"].get_xdata()) == [1, 4]


def test_two_decades_make_the_scale_logarithmic_and_a_negative_loss_does_not():
    assert loss_curve(([1, 2], [500.0, 1.0])).axes[0].get_yscale() == "log"
    assert loss_curve(([1, 2], [500.0, -1.0])).axes[0].get_yscale() == "linear"


def test_many_points_get_a_running_mean_that_neither_lags_nor_leans_on_uneven_steps():
    steps = [*range(1, 1001), *range(1050, 3001, 50)]
    mean = lines(loss_curve((steps, [2.0 * step for step in steps])))["training (running mean)"]
    assert list(mean.get_xdata()) == steps
    inner = [(x, y) for x, y in zip(mean.get_xdata(), mean.get_ydata(), strict=True) if 50 < x < 900 or 1100 < x < 2900]
    assert all(y == pytest.approx(2 * x) for x, y in inner)


@pytest.mark.parametrize("training", [([], []), ([1], [2.0]), (range(1, 500), [0.0] * 499)])
def test_any_curve_becomes_a_picture_without_a_screen(training):
    figure = loss_curve(training)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_staleness_is_shown_as_shares_with_its_mean():
    figure = staleness_histogram({0: 10, 2: 30})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [25.0, 0.0, 75.0]
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "mean 1.50"
    assert figure.axes[0].get_title() == "Staleness of 40 updates"
