"""The series of a run on a real node's metrics port, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distrain.records import Report
from tests.support.heads import RayHead, ray_head
from tests.support.jobs import distrain, finish, start, write_job
from tests.support.records import step

MONITORING = Path(__file__).parents[1] / "cluster/monitoring"
DASHBOARD = json.loads((MONITORING / "distrain.json").read_text())
RUN = "watched"
ROWS, EPOCHS, STEPS = 300, 60, 600  # 32 rows a step


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def series_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?distrain_\w+", expression))


def scrape(head: RayHead) -> dict[str, list[Any]]:
    """Every distrain series that the node exports now: name -> samples of this run. None before its agent is up."""
    found: dict[str, list[Any]] = {}
    try:
        with urllib.request.urlopen(head.metrics, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "distrain" in sample.name and sample.labels.get("run") == RUN:
                found.setdefault(sample.name, []).append(sample)
    return found


@pytest.mark.ray
@pytest.mark.cluster
def test_a_run_exports_what_the_dashboard_shows(tmp_path: Path):
    job = write_job(tmp_path, ROWS, epochs=EPOCHS, tracking={"enabled": False, "run_name": RUN})
    seen: dict[str, list[Any]] = {}
    with ray_head(RAY_metrics_report_interval_ms="200") as head:
        training = start("train", str(job), "--json", cwd=tmp_path, RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
        while training.poll() is None:
            seen |= scrape(head)
            time.sleep(0.1)
        done = finish(training)
        assert done.code == 0, done.stderr
        seen |= scrape(head)  # counters stay after the run
    shown = {name for expression in expressions() for name in series_of(expression)}
    exported = {name for name in seen if not name.endswith(("_created", "_sum"))}
    assert shown == exported
    assert sum(sample.value for sample in seen["ray_distrain_samples_total"]) == ROWS * EPOCHS
    assert sum(sample.value for sample in seen["ray_distrain_step_seconds_count"]) == STEPS
    assert {sample.labels["part"] for sample in seen["ray_distrain_part_seconds_total"]} >= {
        "data",
        "compute",
        "update",
    }
    assert seen["ray_distrain_workers"][0].value in (1, 2)
    own = distrain(
        "train", str(job), "checkpoint.dir=other", "--json", cwd=tmp_path
    )  # a Ray of its own exports nothing
    assert own.result["parameters_sha256"] == done.result["parameters_sha256"]


def test_every_panel_asks_for_runs_and_has_a_meaning():
    assert DASHBOARD["uid"] == "distrain"
    [variable] = DASHBOARD["templating"]["list"]
    assert variable["name"] == "run" and series_of(variable["query"]["query"]) == {"ray_distrain_step"}
    for panel in DASHBOARD["panels"]:
        assert panel["title"] and panel["description"]
        assert panel["datasource"]["uid"] == "prometheus"
        for target in panel["targets"]:
            assert 'run=~"$run"' in target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_a_report_without_steps_is_no_error(monkeypatch: pytest.MonkeyPatch):
    from distrain import monitoring

    told: list[tuple[str, str, float]] = []

    class Kept:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> Kept:
            self.run = tags["run"]
            return self

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert value > 0
            told.append((self.name, self.run, value))

        set = observe = lambda self, value: told.append((self.name, self.run, value))

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(monitoring, kind, Kept)
    series = monitoring.RunSeries("mine")
    series.record(Report(), 2)
    assert told == [("distrain_worker_failures", "mine", 2)]
    series.record(Report([step(1), step(2)]), 2)
    assert [value for name, _, value in told if name == "distrain_step"] == [2]
