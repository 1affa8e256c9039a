"""`open_ui` on a real store."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest

from distrain.config import TrackingConfig
from distrain.errors import ConfigError, TrackingError
from distrain.tracking import RunDescription, check_reachable, make_tracker, open_ui
from tests.support.records import step


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def test_the_page_is_served_and_shows_the_run(server, tmp_path):
    check_reachable(server.uri)
    tracker = make_tracker(TrackingConfig(uri=server.uri), RunDescription("a: 1\n", "0" * 64), tmp_path)
    tracker.start()
    for number in range(1, 11):
        tracker.step(step(number))
    assert tracker.finish("FINISHED")

    address, _, _ = server.printed.partition("/#/")
    assert address == server.uri
    assert b'<div id="root"' in get(server.printed)
    run = json.loads(get(f"{address}/api/2.0/mlflow/runs/get?run_id={tracker.run_id}"))["run"]
    assert run["info"]["status"] == "FINISHED"
    history = f"{address}/api/2.0/mlflow/metrics/get-history?run_id={tracker.run_id}&metric_key=train/loss"
    assert [point["step"] for point in json.loads(get(history))["metrics"]] == list(range(1, 11))
    assert get(f"{address}/get-artifact?run_id={tracker.run_id}&path=config.yaml") == b"a: 1\n"
    assert get(f"{address}/get-artifact?run_id={tracker.run_id}&path=loss_curve.png").startswith(b"\x89PNG")


def test_the_page_of_a_server_is_printed(server, capsys):
    open_ui(server.uri)
    assert capsys.readouterr().out == f"{server.uri}/#/experiments?workflowType=machine_learning\n"


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(TrackingError, match="no such database"):
        open_ui(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_said(store):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken"):
            open_ui(store, port=port)
