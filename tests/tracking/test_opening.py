"""Whether a run would find its store open."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from distrain.errors import TrackingError, TrackingRefused
from distrain.tracking import check_opens


def test_a_store_is_opened_and_nothing_is_made_in_it(store, tmp_path):
    from mlflow import MlflowClient

    check_opens(store, "new")
    assert MlflowClient(store).get_experiment_by_name("new") is None
    check_opens(f"sqlite:///{tmp_path}/none.db", "new")
    assert not (tmp_path / "none.db").exists()


def test_a_store_that_says_no(store, web_server):
    from mlflow import MlflowClient

    MlflowClient(store).delete_experiment(MlflowClient(store).create_experiment("gone"))
    with pytest.raises(TrackingRefused, match=r"mlflow\.db: the experiment 'gone' was deleted"):
        check_opens(store, "gone")
    web_server.answer = (403, b"Permission denied")
    with pytest.raises(TrackingRefused, match=r"Permission denied.*MLFLOW_TRACKING_TOKEN"):
        check_opens(f"http://127.0.0.1:{web_server.server_port}", "any")


def test_a_database_of_another_mlflow(store):
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'of tomorrow'")
    with pytest.raises(TrackingRefused, match=r"found version of tomorrow.*mlflow db upgrade"):
        check_opens(store, "any")


def test_a_store_that_is_not_there(tmp_path):
    (tmp_path / "notes.txt").write_text("these are no tables")
    with pytest.raises(TrackingError, match="not an SQLite database"):
        check_opens(f"sqlite:///{tmp_path}/notes.txt", "any")
