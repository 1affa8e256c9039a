"""What is measured of the machine, and what is said of what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distrain.config import TrackingConfig
from distrain.tracking import system
from distrain.tracking.system import SystemMetrics


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.shutil, "which", lambda name: None)


def test_a_point_of_each_metric_when_it_is_time(notes, no_gpus, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "3600")
    metrics = SystemMetrics(notes.append)
    assert metrics.take(7) == []
    points = metrics.take(7, at_once=True)
    assert {point.step for point in points} == {7} and notes == []
    assert all(point.key.startswith("system/") and point.value >= 0 for point in points)
    assert len({point.key for point in points}) == len(points) >= 7
    again = metrics.take(8, at_once=True)
    assert [point.key for point in again] == [point.key for point in points]


def test_a_monitor_that_does_not_work_here_is_named_and_costs_no_other(notes, no_gpus, monkeypatch):
    def fail(monitor: object) -> None:
        raise OSError("no /proc/net/dev")

    monkeypatch.setattr(system.NetworkMonitor, "collect_metrics", fail)
    metrics = SystemMetrics(notes.append)
    assert notes == ["no system metrics of Network: no /proc/net/dev"]
    monkeypatch.setattr(system.DiskMonitor, "collect_metrics", fail)
    keys = {point.key for _ in range(2) for point in metrics.take(1, at_once=True)}
    assert notes[1:] == ["no system metrics of Disk: no /proc/net/dev"]
    assert "system/cpu_utilization_percentage" in keys and not any("disk" in key or "network" in key for key in keys)


def test_a_machine_with_gpus_is_told_what_to_install(notes, tmp_path: Path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    SystemMetrics(notes.append)
    [note] = notes
    assert note.startswith("no system metrics of GPU: ") and note.endswith("; pip install 'distrain[gpu]'")


@pytest.mark.parametrize("value, is_on", [("true", True), ("1", True), ("false", False), (None, False)])
def test_mlflows_own_variable_switches_them_on(value: str | None, is_on: bool, monkeypatch):
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", raising=False)
    if value is not None:
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", value)
    assert TrackingConfig().system_metrics is is_on
    assert TrackingConfig(system_metrics=not is_on).system_metrics is not is_on
