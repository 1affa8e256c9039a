"""Stores to track in: a SQLite database made once and copied, and a real MLflow server on one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from distrain.tracking.environment import quiet_environment


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables; making one takes 3 s."""
    quiet_environment()
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_database: Path, tmp_path: Path) -> str:
    """The URI of an empty store of the test's own."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


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


@dataclass
class Server:
    """A server that `open_ui` starts on an empty store in `folder`."""

    process: subprocess.Popen[str]
    port: int
    folder: str

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def printed(self) -> str:
        """The first line of its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


_SERVER = pytest.StashKey[Server]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server as soon as it is known that a test wants it: it takes 10 s, while others run."""
    if any("server" in getattr(item, "fixturenames", ()) for item in session.items):
        folder = tempfile.mkdtemp(prefix="distrain-test-server-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (Path(folder) / "mlflow.db").touch()
        code = f"from distrain.tracking import open_ui; open_ui('sqlite:///mlflow.db', port={port})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        session.config.stash[_SERVER] = Server(process, port, folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the server, however the tests ended."""
    server = config.stash.get(_SERVER, None)
    if server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.communicate()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """`open_ui` in a process of its own, up and answering. Ctrl-C ends it and all it started, or the fixture fails."""
    server = request.config.stash[_SERVER]
    until = time.monotonic() + 60
    while True:
        assert server.process.poll() is None, server.process.communicate()
        try:
            urllib.request.urlopen(f"{server.uri}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)
    yield server
    os.killpg(server.process.pid, signal.SIGINT)
    server.process.communicate(timeout=20)
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
