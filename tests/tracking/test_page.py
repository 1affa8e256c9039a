"""The run in MLflow's real page, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from distrain.config import TrackingConfig
from distrain.tracking import RunDescription, make_tracker
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
