"""What every test is held to."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_store_stays_set() -> Iterator[None]:
    """MLflow's `set_tracking_uri` writes into the environment, from which later tests would take their store."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
