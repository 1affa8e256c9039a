"""What MLflow reads from the environment when it is imported."""

from __future__ import annotations

import os

_SETTINGS = {
    "GIT_PYTHON_REFRESH": "quiet",  # no git program is needed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # no lock file of the working folder in a model
    # A dead server: fail soon and spool, where MLflow's own 120 s and 7 tries would block for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def quiet_environment() -> None:
    """Set this process's environment, for good: no telemetry, little noise, short timeouts. What is set stays."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
