"""What every test is held to, and the object store that some of them share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Ray's own handler would take the place of pytest's, which says in which test Python crashed.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")


@pytest.fixture(autouse=True)
def no_store_stays_set() -> Iterator[None]:
    """MLflow's `set_tracking_uri` writes into the environment, from which later tests would take their store."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The URL of a server that speaks S3, on a free port of loopback."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """boto3's client of it, with credentials in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    boto3 = pytest.importorskip("boto3")
    return boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
