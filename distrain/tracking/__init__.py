"""Tracking: MLflow behind one small writer. Importing this does not import MLflow."""

from distrain.tracking.description import DatasetDescription, ModelInput, RunDescription
from distrain.tracking.local import check_reachable
from distrain.tracking.tracker import MlflowTracker, NullTracker, Tracker, make_tracker
from distrain.tracking.ui import open_ui

__all__ = [
    "DatasetDescription",
    "MlflowTracker",
    "ModelInput",
    "NullTracker",
    "RunDescription",
    "Tracker",
    "check_reachable",
    "make_tracker",
    "open_ui",
]
