"""Figures into a run that is there already."""

from __future__ import annotations

from matplotlib.figure import Figure

from distrain.errors import TrackingError
from distrain.tracking.local import check_reachable


def log_figure(uri: str, run_id: str, name: str, figure: Figure) -> None:
    """Store a figure among the artifacts of a run, by its MLflow id. Raises TrackingError where that cannot be."""
    check_reachable(uri)
    from distrain.tracking.store import first_line, open_run

    try:
        open_run(uri, run_id).log_figure(name, figure)
    except Exception as error:  # whatever MLflow and its stores raise
        raise TrackingError(f"{name} cannot be stored in MLflow run {run_id}: {first_line(error)}") from error
