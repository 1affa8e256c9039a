"""Where a tracking URI leads, found out without MLflow."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from distrain.errors import TrackingError

_TIMEOUT_S = 5.0


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

    Raises TrackingError when it cannot: a server that does not answer or is none of MLflow's, a database whose host
    does not answer, a folder that cannot be written, a URI of a kind that MLflow does not take.
    """
    path, parts = database_path(uri), urlsplit(uri)
    if path is not None:
        _check_writable(path)
    elif is_server(uri):
        _check_server(uri.rstrip("/"))
    elif parts.scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        _check_port(uri, parts.hostname, parts.port or {"mysql": 3306, "mssql": 1433}.get(parts.scheme, 5432))
    elif parts.scheme in ("", "file"):
        raise TrackingError(f"tracking.uri {uri}: MLflow keeps no runs in folders any more; use sqlite:///mlflow.db")


def _check_writable(path: Path) -> None:
    there = path
    while not there.exists():  # MLflow makes the folders that are missing
        there = there.parent
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise TrackingError(f"tracking.uri: {path}: {there} cannot be written")


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


def _check_port(uri: str, host: str | None, port: int) -> None:
    connection = http.client.HTTPConnection(host or "localhost", port, timeout=_TIMEOUT_S)
    try:
        connection.connect()
    except OSError as error:
        # The URI may hold a password.
        raise TrackingError(f"no database answers at {host}:{port} (tracking.uri): {error}") from error
    finally:
        connection.close()
