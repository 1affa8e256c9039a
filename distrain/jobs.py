"""Jobs on a Ray cluster: submit a training, look at it, follow what it says, stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from distrain.config import TrainConfig
from distrain.errors import ClusterError, ConfigError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_AGENT_S = 60.0  # for the head's agent, which takes a job, to come up
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


@dataclass(frozen=True)
class JobState:
    """A job as the cluster knows it. `exit_code` is distrain's own, once it has ended."""

    job_id: str
    status: str
    exit_code: int | None
    message: str


class Jobs:
    """The jobs of one cluster. `address`: its dashboard's, http://HOST:8265; None: RAY_API_SERVER_ADDRESS, else this
    machine's. Raises ClusterError where it is out of reach."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        with self._reaching():
            self._client = JobSubmissionClient(self.address)

    def submit(self, path: Path, config: TrainConfig, overrides: Sequence[str], name: str | None = None) -> str:
        """Submit a training, and return the job's id.

        The current folder travels along, without data and checkpoints, so that the configuration and the user's modules
        are there. Paths in the configuration are made absolute, since the job runs in a copy of the folder: they have
        to mean the same on the cluster. With a `name`, a job submitted again goes on where the one before it ended.
        """
        here = Path.cwd()
        if not path.resolve().is_relative_to(here.resolve()):
            raise ConfigError(
                f"{path}: the configuration must be in the current folder, {here}, which travels with the job"
            )
        settings = [*overrides, *absolute_paths(config, here)]
        if name is not None:
            settings += [f"tracking.run_name={name}", "resume=auto"]
        command = ["python", "-m", "distrain.cli", "train", str(path.resolve().relative_to(here.resolve())), *settings]
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

    @contextmanager
    def _reaching(self, job_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster at {self.address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            ) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            if job_id is not None and "does not exist" in str(error):
                raise ClusterError(f"the cluster at {self.address} has no job {job_id!r}") from error
            raise ClusterError(f"no Ray dashboard answers as it should at {self.address}: {text}") from error


def has_ended(state: JobState) -> bool:
    """Whether a job is over."""
    return JobStatus(state.status).is_terminal()


def exit_code(state: JobState) -> int:
    """What distrain itself ended with; 1 where that is not known, 0 for a job that succeeded."""
    if state.exit_code is not None:
        return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
    return 0 if state.status == JobStatus.SUCCEEDED.value else 1


def absolute_paths(config: TrainConfig, here: Path) -> list[str]:
    """Overrides that make the configuration's relative paths absolute."""
    overrides = []
    for key, value in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if value is not None:
            paths = [_absolute(path, here) for path in ([value] if isinstance(value, str) else value)]
            overrides.append(f"{key}={paths[0] if isinstance(value, str) else paths}")
    overrides.append(f"checkpoint.dir={_absolute(config.checkpoint.dir, here)}")
    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        overrides.append(f"tracking.uri=sqlite:///{_absolute(uri.removeprefix('sqlite:///'), here)}")
    return overrides


def _absolute(path: str, here: Path) -> str:
    return path if urlsplit(path).scheme and "://" in path else str(here / path)
