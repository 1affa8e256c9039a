"""Whether a store can be there, found out without MLflow."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from distrain.errors import TrackingError
from distrain.tracking import local
from distrain.tracking.local import check_reachable, database_folder, database_path


@pytest.fixture
def web_server():
    """A server that answers everything with `answer`, (status, text)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = server.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answer = (200, b"{}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_answers_is_reachable(web_server):
    check_reachable(f"http://127.0.0.1:{web_server.server_port}/")


def test_credentials_are_left_to_mlflow(web_server):
    web_server.answer = (401, b"who are you?")
    check_reachable(f"http://127.0.0.1:{web_server.server_port}")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, b"no such page"), "answers 404 no such page"),
        ((500, b""), "answers 500"),
        ((403, b"Invalid Host header - possible DNS rebinding attack detected"), "--allowed-hosts"),
    ],
)
def test_a_server_that_is_not_mlflows_or_refuses_this_host_is_said(web_server, answer, told):
    web_server.answer = answer
    with pytest.raises(TrackingError, match=told):
        check_reachable(f"http://127.0.0.1:{web_server.server_port}")


def test_no_server_fails_at_once():
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"no MLflow server answers at .*refused"):
        check_reachable(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 2


def test_a_server_that_hangs_fails_within_the_timeout(monkeypatch):
    monkeypatch.setattr(local, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TrackingError, match="timed out"):
        check_reachable(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_a_database_server_is_reached_by_its_port_and_its_password_is_not_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_reachable(f"postgresql+psycopg://me:secret@127.0.0.1:{listener.getsockname()[1]}/runs")
    with pytest.raises(TrackingError, match="no database answers at") as caught:
        check_reachable(f"postgresql://me:secret@127.0.0.1:{free_port()}/runs")
    assert "secret" not in caught.value.message


def test_a_sqlite_file_needs_a_folder_that_can_be_written(tmp_path, monkeypatch):
    check_reachable(f"sqlite:///{tmp_path}/mlflow.db")
    check_reachable(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="file cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a test's user may be root, who may write anywhere
    with pytest.raises(TrackingError, match="cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_folder_is_no_store_any_more(uri):
    with pytest.raises(TrackingError, match="use sqlite"):
        check_reachable(uri)


def test_where_a_database_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert database_path("sqlite:///mlflow.db") == tmp_path / "mlflow.db"
    assert database_path("sqlite:////data/m.db?timeout=5") == Path("/data/m.db")
    assert database_folder("sqlite:////data/m.db") == Path("/data")
    assert database_path("http://there") is None
    assert database_folder("postgresql://there/runs") is None
