"""Runs of MLflow side by side, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from distrain.credentials import redacted
from distrain.errors import TrackingError
from distrain.tracking.environment import quiet_environment

_OUTCOMES = ("train/loss", "val/", "throughput/samples_per_sec", "final/", "target/", "study/", "time/step_sec")


def compare_runs(uri: str, experiment: str, references: Sequence[str]) -> list[dict[str, str]]:
    """Rows {"": what, RUN: value, ...}: the params in which the runs differ, then their last metrics.

    A reference is a run's id, name, checkpoints' folder or checkpoint; a sweep's parent stands for its children. Raises
    TrackingError where one is not known.
    """
    quiet_environment()
    from distrain.tracking.store import read_runs

    try:
        runs = read_runs(uri, experiment, references)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {redacted(uri)}: {str(error).splitlines()[0]}") from error
    names = _unique([run.name for run in runs])
    rows = [{"": "status"} | {name: run.status for name, run in zip(names, runs, strict=True)}]
    keys = sorted({key for run in runs for key in run.params})
    for key in keys:
        values = [run.params.get(key, "-") for run in runs]
        if len(set(values)) > 1 and key not in ("checkpoint.dir", "tracking.run_name"):
            rows.append({"": key} | dict(zip(names, values, strict=True)))
    metrics = sorted({key for run in runs for key in run.metrics if key.startswith(_OUTCOMES)})
    for key in metrics:
        shown = [f"{run.metrics[key]:.6g}" if key in run.metrics else "-" for run in runs]
        rows.append({"": key} | dict(zip(names, shown, strict=True)))
    return rows


def _unique(names: Sequence[str]) -> list[str]:
    """Names told apart where two runs have the same."""
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
