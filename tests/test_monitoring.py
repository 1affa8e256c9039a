"""The series of a run on a real node's metrics port, and the dashboard that shows them."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distrain.records import Report
from tests.support.heads import RayHead, ray_head
from tests.support.jobs import distrain, finish, start, write_job
from tests.support.prometheus import prometheus
from tests.support.records import step

MONITORING = Path(__file__).parents[1] / "cluster/monitoring"
DASHBOARD = json.loads((MONITORING / "distrain.json").read_text())
RUN = "watched"
ROWS, EPOCHS, STEPS = 300, 150, 1500  # 32 rows a step; long enough to be seen several times
_OFTEN = {"RAY_metrics_report_interval_ms": "200"}  # of the node and of the driver, which has an interval of its own


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


@dataclass
class Watched:
    """A run on a node whose series were read while it went on. `answers`: what a Prometheus made of each of the
    dashboard's expressions, where there is one."""

    job: Path
    result: dict[str, Any]
    seen: dict[str, list[Any]]
    answers: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    job = write_job(folder, ROWS, epochs=EPOCHS, tracking={"enabled": False, "run_name": RUN})
    seen: dict[str, list[Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as open_ones:
        head = open_ones.enter_context(ray_head(**_OFTEN))
        if shutil.which("prometheus"):
            server = open_ones.enter_context(prometheus(head.metrics.split("/")[2], folder))
        began = time.time()
        where = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
        training = start("train", str(job), "--json", cwd=folder, **where, **_OFTEN)
        while training.poll() is None:
            seen |= scrape(head)
            time.sleep(0.1)
        done = finish(training)
        assert done.code == 0, done.stderr
        seen |= scrape(head)  # counters stay after the run
        if shutil.which("prometheus"):
            time.sleep(1.0)  # it reads five times a second
            answers = {each: server.history(each.replace("$run", RUN), began) for each in expressions()}
    return Watched(job, done.result, seen, answers)


@pytest.mark.ray
@pytest.mark.cluster
def test_a_run_exports_what_the_dashboard_shows(watched: Watched):
    seen = watched.seen
    shown = {name for expression in expressions() for name in series_of(expression)}
    exported = {name for name in seen if not name.endswith(("_created", "_sum"))}
    assert shown == exported
    assert sum(sample.value for sample in seen["ray_distrain_samples_total"]) == ROWS * EPOCHS
    assert sum(sample.value for sample in seen["ray_distrain_step_seconds_count"]) == STEPS
    parts = {sample.labels["part"] for sample in seen["ray_distrain_part_seconds_total"]}
    assert parts >= {"data", "compute", "update"}
    assert seen["ray_distrain_workers"][0].value in (1, 2)


@pytest.mark.ray
@pytest.mark.cluster
def test_a_run_on_a_ray_of_its_own_has_the_same_bits_without_a_series(watched: Watched):
    own = distrain("train", str(watched.job), "checkpoint.dir=other", "--json", cwd=watched.job.parent)
    assert own.result["parameters_sha256"] == watched.result["parameters_sha256"]


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus on this machine")
def test_prometheus_has_an_answer_to_what_the_dashboard_asks(watched: Watched):
    values = {
        expression: {answer["metric"].get("part", ""): float(answer["values"][-1][1]) for answer in answers}
        for expression, answers in watched.answers.items()
    }
    assert len(values) == len(expressions())
    assert [expression for expression, found in values.items() if not found] == [], "each has a series"
    odd = {
        expression: found
        for expression, found in values.items()
        if not all(math.isfinite(value) and value >= 0 for value in found.values())
    }
    assert odd == {}
    [steps] = [found[""] for expression, found in values.items() if expression.startswith("ray_distrain_step{")]
    assert steps == STEPS
    [median, *others] = [found[""] for expression, found in values.items() if expression.startswith("histogram")]
    assert 0 < median <= min(others), "quantiles of a step's seconds"
    [parts] = [found for expression, found in values.items() if "by (run, part)" in expression]
    assert parts.keys() >= {"data", "compute", "update"} and sum(parts.values()) < 1, "seconds of a step"


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
    told.clear()
    series.record(Report([step(3, loss=0.5), step(4, loss=0.0, weight=0.0)]), 2)
    assert [value for name, _, value in told if name == "distrain_train_loss"] == [0.5], "the last has no loss"
