from __future__ import annotations

import pytest

from distrain.study.claims import claims
from distrain.study.sweep_figures import (
    FIGURES,
    critical_batch,
    loss_curves,
    regularization,
    steps_against_samples,
    throughput,
    time_to_target,
    where_time_goes,
)
from tests.study.points import point

GRID = [point(size, workers) for size in (64, 256, 1024) for workers in (1, 2, 4)]


def test_throughput_has_a_line_and_an_ideal_for_each_batch_size():
    figure = throughput(GRID)
    assert figure is not None
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "ideal: in proportion to workers", "batch 64", "batch 256", "batch 1,024",
    ]  # fmt: skip
    efficiencies = [line.get_ydata() for line in right.get_lines()[:3]]
    for size, efficiency in zip((64, 256, 1024), efficiencies, strict=True):
        one, four = 0.01 * size / 64 + 0.001, 0.01 * size / 256 + 0.001
        assert efficiency[0] == 100 and efficiency[-1] == pytest.approx(100 * one / four / 4)


def test_loss_is_shown_over_samples_steps_and_seconds():
    figure = loss_curves(GRID)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["samples", "steps", "seconds of training"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 3, 3]


def test_the_heat_map_says_each_time_and_what_was_missed():
    figure = time_to_target([*GRID[:-1], point(1024, 4, target=None)])
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 9 and texts[-1] == "not\nreached" and texts[0] == "2.2 s"


def test_the_critical_batch_size_is_found_and_marked():
    found = critical_batch(GRID)
    assert found is not None
    fit, best = found
    assert fit.batch_size == pytest.approx(64, rel=0.03) and set(best) == {64, 256, 1024}  # 100 + 6400 / B steps
    figure = steps_against_samples(GRID)
    assert figure is not None and "critical batch size, 6" in figure.axes[0].get_title()


def test_bars_add_up_to_the_step():
    figure = where_time_goes(GRID[:2])
    assert figure is not None
    first = [bars[0].get_width() for bars in figure.axes[0].containers]
    assert sum(first) == pytest.approx(1000 * GRID[0].step_s)


@pytest.mark.parametrize("name", FIGURES)
def test_points_without_measurements_give_no_figure(name: str):
    draw, _ = FIGURES[name]
    bare = point(target=None, moments=[], losses=[], blocks=[], samples_per_second=0.0, peak_worker_bytes=0)
    assert draw([bare]) is None


def test_how_far_runs_come_is_only_shown_where_no_target_ended_them():
    whole = [point(size, target=None) for size in (64, 256)]
    figure = regularization(whole)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "least validation loss", "last validation loss", "training loss of the last epoch",
    ]  # fmt: skip
    assert any(said.startswith("regularization: the least validation loss") for said in claims(whole))
    assert regularization([*whole, point(1024)]) is None
    assert not any(said.startswith("regularization") for said in claims([*whole, point(1024)]))
