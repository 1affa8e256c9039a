"""The run in MLflow's real page, in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from distrain.config import TrackingConfig
from distrain.tracking import RunDescription, make_tracker, open_parent
from tests.support.records import step, validation

pytestmark = pytest.mark.page

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": 1300, "height": 1900})
        page.set_default_timeout(60_000)
        yield page
        started.close()


def test_a_run_is_found_with_its_curves_and_its_configuration(server, tmp_path, page):
    tracker = make_tracker(
        TrackingConfig(uri=server.uri), RunDescription("a: 1\n", "0" * 64, run_name="seen"), tmp_path
    )
    tracker.start()
    for number in range(1, 11):
        tracker.step(step(number))
    tracker.validation(validation(10, accuracy=0.9875))
    assert tracker.finish("FINISHED")

    from mlflow import MlflowClient

    experiment = MlflowClient(server.uri).get_run(tracker.run_id).info.experiment_id
    runs = f"{server.uri}/#/experiments/{experiment}/runs"
    page.goto(f"{runs}?workflowType=machine_learning")
    page.get_by_text("seen", exact=True).first.click()
    page.get_by_text("Finished").first.wait_for()
    page.get_by_text("0.9875").first.wait_for()
    assert tracker.run_id in page.url

    page.goto(f"{runs}/{tracker.run_id}/model-metrics")
    for chart in ("train/loss", "val/accuracy"):
        page.get_by_placeholder("Search metric charts").fill(chart)
        page.get_by_text(f"seen ({chart})").first.wait_for()
    page.goto(f"{runs}/{tracker.run_id}/artifacts/config.yaml")
    page.get_by_text("a: 1").first.wait_for()


def test_a_sweep_is_nested_and_its_points_compare_in_charts(server, tmp_path, page):
    settings = TrackingConfig(uri=server.uri, experiment="sweeps")
    parent = open_parent(settings, RunDescription("a: 1\n", "0" * 64, run_name="a-sweep"))
    children = []
    for batch_size, workers in ((64, 1), (256, 2)):
        name = f"batch_size={batch_size}"
        tags = {"mlflow.parentRunId": str(parent.run_id)}
        params = {"batch_size": batch_size, "workers.count": workers}
        description = RunDescription("a: 1\n", "0" * 64, params=params, tags=tags, run_name=name)
        tracker = make_tracker(settings, description, tmp_path)
        tracker.start()
        tracker.step(step(1))
        assert tracker.finish("FINISHED")
        speed = {"final/samples_per_sec": 1000.0 * workers}
        parent.child(str(tracker.run_id), {"batch_size": batch_size, "workers": workers, "mode": "sync"}, speed)
        children.append(tracker.run_id)
    parent.text("report.html", "<h1>What pays</h1>")
    parent.finish("FINISHED")

    from mlflow import MlflowClient

    experiment = MlflowClient(server.uri).get_run(str(parent.run_id)).info.experiment_id
    page.goto(f"{server.uri}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    page.get_by_text("a-sweep", exact=True).first.wait_for()
    assert page.get_by_text("batch_size=64").count() == 0, "points are folded under their sweep"
    page.get_by_role("row").filter(has_text="a-sweep").get_by_role("button").first.click()
    page.get_by_text("batch_size=64").first.wait_for()

    page.goto(f"{server.uri}/#/experiments/{experiment}/runs/{parent.run_id}/artifacts/report.html")
    page.frame_locator("iframe").get_by_role("heading", name="What pays").wait_for()

    runs, experiments = quote(json.dumps(children)), quote(json.dumps([experiment]))
    page.goto(f"{server.uri}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    axes = page.locator(".js-plotly-plot")
    axes.get_by_text("workers", exact=True).first.wait_for()  # of the parallel coordinates
    page.get_by_text("Scatter Plot").click()
    page.get_by_text("X-axis:").wait_for()
    assert page.get_by_text("final/samples_per_sec").count() > 0
