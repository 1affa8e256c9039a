"""Tracking: MLflow behind one small writer. Importing this does not import MLflow."""

from distrain.tracking.comparison import compare_runs
from distrain.tracking.description import DatasetDescription, ModelInput, RunDescription
from distrain.tracking.local import check_reachable
from distrain.tracking.opening import check_opens
from distrain.tracking.study import ParentRun, open_parent, read_parent
from distrain.tracking.tracker import MlflowTracker, NullTracker, Tracker, make_tracker
from distrain.tracking.ui import open_ui

__all__ = [
    "DatasetDescription",
    "MlflowTracker",
    "ModelInput",
    "NullTracker",
    "ParentRun",
    "RunDescription",
    "Tracker",
    "check_opens",
    "check_reachable",
    "compare_runs",
    "make_tracker",
    "open_parent",
    "open_ui",
    "read_parent",
]
