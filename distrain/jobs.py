"""Jobs on a Ray cluster: submit a training, look at it, follow what it says, stop it."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from distrain.errors import ClusterError, ConfigError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_VARIABLE = "RAY_API_SERVER_ADDRESS"
_AGENT_S = 60.0  # for the head's agent, which takes a job, to come up
_ANSWER_S = 10.0
_GRACE_S = 60  # between a stop's SIGTERM and SIGKILL: for the step and the checkpoint
# Of the folder that travels: what is data or output, and what no job needs.
_EXCLUDES = [
    "*.parquet",
    "*.db",
    "*.safetensors",
    "checkpoints/",
    "mlartifacts/",
    "mlruns/",
    ".git/",
    ".venv/",
    "venv/",
]
# What Ray's client says about itself on the way.
_LOG_LEVELS = {
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray._private.runtime_env.packaging": logging.WARNING,
    "ray._private.runtime_env.working_dir": logging.ERROR,
    "ray.dashboard.modules.dashboard_sdk": logging.WARNING,
    "ray.dashboard.modules.job.sdk": logging.WARNING,
}


@dataclass(frozen=True)
class JobState:
    """A job as the cluster knows it. `exit_code` is distrain's own, once it has ended."""

    job_id: str
    status: str
    exit_code: int | None
    message: str


class Jobs:
    """The jobs of one cluster. `address`: its dashboard's, http://HOST:8265; None: RAY_API_SERVER_ADDRESS, else this
    machine's. Raises ClusterError where it is out of reach, ConfigError where it is no address of a dashboard."""

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get(_VARIABLE) or _DEFAULT_ADDRESS
        self.address = address if "://" in address else f"http://{address}"
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise ConfigError(f"{address} is no address of a Ray dashboard, such as {_DEFAULT_ADDRESS}")
        for name, level in _LOG_LEVELS.items():
            logging.getLogger(name).setLevel(level)
        with self._reaching():
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # RAY_AUTH_MODE unset, and there is one
            with _asked(self.address):
                self._client = JobSubmissionClient(self.address)

    def submit(self, path: Path, overrides: Sequence[str]) -> str:
        """Submit a training, and return the job's id.

        The current folder travels along, without data and checkpoints, so that the configuration and the user's modules
        are there. The job runs in a copy of it, and takes relative paths from the folder itself: they have to mean the
        same on the cluster. Where it tracks and keeps checkpoints is the cluster's to say (MLFLOW_TRACKING_URI,
        DISTRAIN_CHECKPOINT_DIR) unless the configuration does.
        """
        here = Path.cwd()
        if not path.resolve().is_relative_to(here.resolve()):
            raise ConfigError(
                f"{path}: the configuration must be in the current folder, {here}, which travels with the job"
            )
        config = str(path.resolve().relative_to(here.resolve()))
        command = ["python", "-m", "distrain.cli", "train", config, "--folder", str(here), *overrides]
        environment = {
            "working_dir": str(here),
            "excludes": _EXCLUDES,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_S)},
        }
        until = time.monotonic() + _AGENT_S
        with self._reaching():
            while True:
                try:
                    return str(self._client.submit_job(entrypoint=shlex.join(command), runtime_env=environment))
                except RuntimeError as error:  # the head has only just started
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise
                time.sleep(1.0)

    def state(self, job_id: str) -> JobState:
        """How a job stands."""
        with self._reaching(job_id):
            info = self._client.get_job_info(job_id)
        return JobState(job_id, str(info.status.value), info.driver_exit_code, info.message or "")

    def logs(self, job_id: str) -> str:
        """What a job has said so far."""
        with self._reaching(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job says, as it says it, to its end."""
        loop = asyncio.new_event_loop()
        try:
            with self._reaching(job_id):
                self._client.get_job_info(job_id)
                lines: Any = self._client.tail_job_logs(job_id)
                while True:
                    try:
                        yield loop.run_until_complete(anext(lines))
                    except StopAsyncIteration:
                        return
        finally:
            loop.close()

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop: it finishes its step and writes a checkpoint. False where it had ended already."""
        with self._reaching(job_id):
            return bool(self._client.stop_job(job_id))

    def ray_version(self) -> str:
        """The cluster's version of Ray."""
        with self._reaching():
            return str(self._client._do_request("GET", "/api/version").json()["ray_version"])

    def takes_anyone(self) -> bool:
        """Whether the cluster takes jobs without its token, and so from anyone who can reach it."""
        try:
            with urllib.request.urlopen(f"{self.address.rstrip('/')}/api/jobs/", timeout=_ANSWER_S):
                return True
        except urllib.error.HTTPError:
            return False
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"no Ray dashboard answers as it should at {self.address}: {error}") from error

    @contextmanager
    def _reaching(self, job_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster at {self.address} wants its token, and got none or another: it is looked for in "
                "RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
            ) from error
        except (RuntimeError, OSError, ValueError, RayError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            if job_id is not None and "does not exist" in str(error):
                raise ClusterError(f"the cluster at {self.address} has no job {job_id!r}") from error
            raise ClusterError(f"no Ray dashboard answers as it should at {self.address}: {text}") from error


@contextmanager
def _asked(address: str) -> Iterator[None]:
    """Have Ray's client ask this address: it would prefer what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def has_ended(state: JobState) -> bool:
    """Whether a job is over."""
    return JobStatus(state.status).is_terminal()


def exit_code(state: JobState) -> int:
    """What distrain itself ended with. Where that is not known: 0 for one that succeeded, 143 for one that was stopped,
    which Ray does by SIGTERM, else 1."""
    if state.exit_code is not None:
        return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
    return {JobStatus.SUCCEEDED.value: 0, JobStatus.STOPPED.value: 128 + signal.SIGTERM}.get(state.status, 1)
