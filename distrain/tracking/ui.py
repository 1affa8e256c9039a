"""The MLflow UI on a run's store."""

from __future__ import annotations

import http.client
import os
import sys

from distrain.errors import ConfigError, TrackingError
from distrain.tracking.environment import quiet_environment
from distrain.tracking.local import check_reachable, database_path, is_server

_PAGE = "/#/experiments?workflowType=machine_learning"  # else it opens with what it has for language models
_EVERYWHERE = ("0.0.0.0", "::")


def open_ui(uri: str, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Serve the MLflow UI on the store in the foreground, until Ctrl-C; this process becomes the server.

    Prints the address of the page on standard output. For the URI of a server that is all.

    Raises TrackingError when there is no such store, ConfigError when the port is taken.
    """
    check_reachable(uri)
    if is_server(uri):
        print(uri.rstrip("/") + _PAGE, flush=True)
        return
    path = database_path(uri)
    if path is not None and not path.exists():
        raise TrackingError(f"{path}: no such database; `distrain train` makes it, where tracking.uri says")
    if _is_taken(host, port):
        raise ConfigError(f"port {port} of {host} is taken; give another one with --port")
    print(f"http://{'localhost' if host in _EVERYWHERE else host}:{port}{_PAGE}", flush=True)
    quiet_environment()
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument: it may hold a password
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # 0.4 instead of 1.4 GB
    # -P: a file in the working folder must not stand in for a module of the same name.
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    os.execv(sys.executable, [*command, "--workers", "1", "--uvicorn-opts", "--log-level warning"])


def _is_taken(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1" if host in _EVERYWHERE else host, port, timeout=2)
    try:
        connection.connect()
    except OSError:
        return False
    finally:
        connection.close()
    return True
