"""Where a tracking URI leads, found out without MLflow."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distrain.errors import TrackingError

_TIMEOUT_S = 5.0
_SQLITE = b"SQLite format 3\0"  # a database begins so
_DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # that MLflow takes, beside SQLite, and their ports


def is_server(uri: str) -> bool:
    """Whether the URI is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def database_path(uri: str) -> Path | None:
    """The absolute path of a SQLite URI's file: sqlite:///relative, sqlite:////absolute. None for other URIs."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def database_folder(uri: str) -> Path | None:
    """The folder of a SQLite URI's file."""
    path = database_path(uri)
    return None if path is None else path.parent


def check_reachable(uri: str) -> None:
    """Find out within about 10 s, and without importing MLflow, whether the tracking store can be there.

    Raises TrackingError when it cannot: a server that does not answer or is none of MLflow's, a database whose driver
    is not installed, that does not answer or does not let us in, a folder that cannot be written, a file that is no
    database, a URI of a kind that MLflow does not take. Whether a server takes our credentials is not asked.
    """
    path, scheme = database_path(uri), urlsplit(uri).scheme
    if path is not None:
        _check_file(path)
    elif is_server(uri):
        _check_server(uri.rstrip("/"))
    elif scheme.partition("+")[0] in _DATABASES:
        _check_database(uri)
    elif scheme in ("", "file"):
        raise TrackingError(f"tracking.uri {uri}: MLflow keeps no runs in folders any more; use sqlite:///mlflow.db")


def _check_file(path: Path) -> None:
    there = path
    while not there.exists():  # MLflow makes the folders that are missing
        there = there.parent
    if not os.access(there, os.R_OK | os.W_OK) or there.is_dir() is (there == path):
        raise TrackingError(f"tracking.uri: {path}: {there} cannot be written")
    if there == path:
        with path.open("rb") as file:
            begins = file.read(len(_SQLITE))
        if begins not in (b"", _SQLITE):  # MLflow would look again and again, for minutes
            raise TrackingError(
                f"tracking.uri: {path}: not an SQLite database; name another file, or move this one away"
            )


def _check_server(uri: str) -> None:
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        text = error.read(200).decode(errors="replace").strip()
        if error.code in (401, 403) and "Host header" not in text:
            return  # it wants credentials, which MLflow's own client sends
        hint = "; start it with --allowed-hosts naming this host" if "Host header" in text else ""
        raise TrackingError(f"the MLflow server at {uri} answers {error.code} {text or error.reason}{hint}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"no MLflow server answers at {uri}: {reason}") from error


def _check_database(uri: str) -> None:
    """Connect, since MLflow tries a wrong password again for minutes; with drivers other than libpq's to the port."""
    from sqlalchemy import make_url  # here, since it takes a moment, and few have such a URI
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(uri)
        dialect = url.get_dialect()
        driver: Any = dialect.import_dbapi()
    except (NoSuchModuleError, ImportError) as error:
        scheme = uri.partition(":")[0]
        hint = "; pip install 'distrain[postgres]', and write postgresql+psycopg://" if "postgres" in scheme else ""
        raise TrackingError(f"tracking.uri: no driver for {scheme}: {error}{hint}") from error
    except (ArgumentError, ValueError) as error:
        raise TrackingError(
            "tracking.uri: not the URI of a database, postgresql+psycopg://USER@HOST/NAME say"
        ) from error
    host, port = url.host or "localhost", url.port or _DATABASES[url.get_backend_name()]
    try:
        if dialect.driver in ("psycopg", "psycopg2"):
            arguments, settings = dialect().create_connect_args(url)
            driver.connect(*arguments, **{"connect_timeout": round(_TIMEOUT_S), **settings}).close()
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
            connection.connect()
            connection.close()
    except Exception as error:  # of the driver's own kind
        text = str(error).strip() or type(error).__name__
        raise TrackingError(
            f"tracking.uri: no connection to the database at {host}:{port}: {text.splitlines()[0]}"
        ) from error
