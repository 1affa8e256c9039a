"""Whether a store can be there, found out without MLflow."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrain.errors import TrackingError
from distrain.tracking import local
from distrain.tracking.local import check_reachable, database_folder, database_path


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


def test_a_database_whose_driver_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(TrackingError, match=r"psycopg.*pip install 'distrain\[postgres\]'") as caught:
        check_reachable("postgresql+psycopg://me:secret@127.0.0.1/runs")
    assert "secret" not in caught.value.message
    with pytest.raises(TrackingError, match=r"no driver for mysql\+unheard: "):
        check_reachable("mysql+unheard://127.0.0.1/runs")
    with pytest.raises(TrackingError, match="not the URI of a database"):
        check_reachable("mysql://127.0.0.1:port/runs")


def test_a_database_that_lets_nobody_in(monkeypatch):
    """MLflow would try a wrong password ten times, within two minutes."""
    asked = []

    def connect(**settings):
        asked.append(settings)
        if settings["password"] == "right":
            return SimpleNamespace(close=lambda: None)
        raise OSError('FATAL:  password authentication failed for user "me"\nand more')

    driver = SimpleNamespace(connect=connect)
    monkeypatch.setattr("sqlalchemy.dialects.postgresql.psycopg.PGDialect_psycopg.import_dbapi", lambda: driver)
    check_reachable("postgresql+psycopg://me:right@there/runs")
    with pytest.raises(TrackingError) as caught:
        check_reachable("postgresql+psycopg://me:wrong@there:99/runs?connect_timeout=1")
    assert caught.value.message == (
        'tracking.uri: no connection to the database at there:99: FATAL:  password authentication failed for user "me"'
    )
    assert [each["connect_timeout"] for each in asked] == [5, "1"]
    assert {key: asked[0][key] for key in ("host", "user", "dbname")} == {
        "host": "there",
        "user": "me",
        "dbname": "runs",
    }


def test_another_database_server_is_reached_by_its_port(monkeypatch):
    monkeypatch.setattr("sqlalchemy.dialects.mysql.pymysql.MySQLDialect_pymysql.import_dbapi", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_reachable(f"mysql+pymysql://me:secret@127.0.0.1:{listener.getsockname()[1]}/runs")
    with pytest.raises(TrackingError, match=r"no connection to the database at .*refused") as caught:
        check_reachable(f"mysql+pymysql://me:secret@127.0.0.1:{free_port()}/runs")
    assert "secret" not in caught.value.message


def test_a_file_that_is_no_database_is_said(tmp_path):
    (tmp_path / "empty.db").touch()
    check_reachable(f"sqlite:///{tmp_path}/empty.db")
    (tmp_path / "notes.txt").write_text("these are no tables")
    with pytest.raises(TrackingError, match=r"notes\.txt: not an SQLite database"):
        check_reachable(f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(TrackingError, match="cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}")


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
