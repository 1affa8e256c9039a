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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import ClientError
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.ray_constants import (
    DASHBOARD_CLIENT_MAX_SIZE,
    RAY_RUNTIME_ENV_IGNORE_GITIGNORE,
    get_runtime_env_default_excludes,
)
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from distrain.errors import ClusterError, ConfigError
from distrain.progress.standing import size
from distrain.signals import STOP_WAIT, STOP_WAIT_S

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_VARIABLE = "RAY_API_SERVER_ADDRESS"
_AGENT_S = 60.0  # for the head's agent, which takes a job, to come up
_ANSWER_S = 10.0
_STOP_S = STOP_WAIT_S + 30.0  # for a job that was asked to stop to have ended
_PAUSE_S = 0.5
_PATIENCE_S = 60.0  # for a dashboard that went away to come back
_SILENCE_S = 60.0  # then the log is asked for anew: a connection that broke unseen is silent too
_RUN = "distrain.run"  # in a job's metadata
# Of the folder that travels, what is data or output. Folders only at its top, where they are made: a package's module
# may be called so. Ray itself leaves out .git, .venv, venv and __pycache__.
_EXCLUDES = ["*.parquet", "*.db", "*.safetensors", "/checkpoints", "/mlartifacts", "/mlruns"]
_NUM_LARGEST = 5
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

    def submit(self, path: Path, overrides: Sequence[str], run: str | None = None) -> str:
        """Submit a training, and return the job's id.

        The current folder travels along, without data and checkpoints, so that the configuration and the user's modules
        are there. The job runs in a copy of it, and takes relative paths from the folder itself: they have to mean the
        same on the cluster. Where it tracks and keeps checkpoints is the cluster's to say (MLFLOW_TRACKING_URI,
        DISTRAIN_CHECKPOINT_DIR) unless the configuration does. `run`: the name or folder of the run that the job goes
        on with, if it goes on with one. Raises ConfigError where a job trains that run already, or the folder cannot
        travel.
        """
        here = Path.cwd()
        if not path.resolve().is_relative_to(here.resolve()):
            raise ConfigError(
                f"{path}: the configuration must be in the current folder, {here}, which travels with the job"
            )
        _check_size(here)
        config = str(path.resolve().relative_to(here.resolve()))
        command = ["python", "-m", "distrain.cli", "train", config, "--folder", str(here), *overrides]
        environment = {
            "working_dir": str(here),
            "excludes": _EXCLUDES,
            "env_vars": {STOP_WAIT: str(STOP_WAIT_S)},
        }
        metadata = {}
        if run is not None:
            self._check_not_running(run)
            metadata[_RUN] = run
        until = time.monotonic() + _AGENT_S
        with self._reaching():
            while True:
                try:
                    submitted = self._client.submit_job(
                        entrypoint=shlex.join(command), runtime_env=environment, metadata=metadata
                    )
                    return str(submitted)
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

    def follow(self, job_id: str, out: Callable[[str], None], say: Callable[[str], None]) -> JobState:
        """Hand `out` what a job says, as it says it, to its end, and return how it ended.

        A connection that breaks is made anew, which `say` is told. Raises ClusterError where none can be had for a
        minute; the job goes on.
        """
        num_said = 0  # characters
        lost_at: float | None = None
        while True:
            try:
                state = self.state(job_id)
                if has_ended(state):
                    self._rest(job_id, num_said, out, say)
                    return state
                position = 0  # each connection begins with the log's first line
                for text in self._tail(job_id):
                    out(text[max(0, num_said - position) :])
                    position += len(text)
                    num_said, lost_at = max(num_said, position), None
                lost_at = None
            except _OutOfReach as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    say(f"{error.message}; trying again for {_PATIENCE_S:g} s")
                elif time.monotonic() - lost_at > _PATIENCE_S:
                    raise ClusterError(
                        f"{error.message}. Job {job_id} goes on without this; to follow it again: "
                        f"distrain logs {job_id} --follow"
                    ) from error
            time.sleep(_PAUSE_S)

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop: it finishes its step and writes a checkpoint. False where it had ended already."""
        with self._reaching(job_id):
            return bool(self._client.stop_job(job_id))

    def _rest(self, job_id: str, num_said: int, out: Callable[[str], None], say: Callable[[str], None]) -> None:
        """Hand out what a job that has ended said after so many characters."""
        try:
            out(self.logs(job_id)[num_said:])
        except _OutOfReach as error:  # such as of a node that is gone
            say(f"the end of the job's log may be missing: {error.message}")

    def wait_until_stopped(self, job_id: str) -> JobState:
        """Wait for the end of a job that was asked to stop, and return how it ended. Raises ClusterError where it has
        not after the time that it has for its checkpoint."""
        until = time.monotonic() + _STOP_S
        while not has_ended(state := self.state(job_id)):
            if time.monotonic() > until:
                raise ClusterError(
                    f"job {job_id} is {state.status} {_STOP_S:g} s after it was asked to stop; "
                    f"look at it with: distrain status {job_id}"
                )
            time.sleep(_PAUSE_S)
        return state

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

    def _check_not_running(self, run: str) -> None:
        with self._reaching():
            jobs = self._client.list_jobs()
        for job in jobs:
            if (job.metadata or {}).get(_RUN) == run and not job.status.is_terminal():
                name = job.submission_id
                raise ConfigError(
                    f"job {name} is {job.status.value} and trains {run}: follow it with distrain logs {name} "
                    f"--follow, end it with distrain stop {name} and submit again, or give this run another name"
                )

    def _tail(self, job_id: str) -> Iterator[str]:
        """A job's log over one connection, from its beginning on, until that is closed or has been silent for long."""
        with self._reaching(job_id), asyncio.Runner() as runner:
            texts = self._client.tail_job_logs(job_id)
            while (text := runner.run(_next(texts))) is not None:
                yield text

    @contextmanager
    def _reaching(self, job_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster at {self.address} wants its token, and got none or another: it is looked for in "
                "RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
            ) from error
        except (RuntimeError, OSError, ValueError, RayError, ClientError) as error:
            if job_id is not None and "does not exist" in str(error):
                raise ClusterError(f"the cluster at {self.address} has no job {job_id!r}") from error
            text = _gist(str(error)) or type(error).__name__
            raise _OutOfReach(f"no Ray dashboard answers as it should at {self.address}: {text}") from error


class _OutOfReach(ClusterError):
    """The dashboard does not answer as it should; it may do so again."""


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


async def _next(texts: AsyncIterator[str]) -> str | None:
    """The next text; None where there is none any more, or none for long."""
    try:
        async with asyncio.timeout(_SILENCE_S) as limit:
            return await anext(texts, None)
    except TimeoutError:
        if limit.expired():
            return None
        raise


def _gist(text: str) -> str:
    """An error on one line: a traceback's last one that is not indented, else the first."""
    lines = [line for line in text.strip().rstrip(". \n").splitlines() if line[:1].strip()]
    return lines[-1 if "Traceback (most recent call last)" in text else 0] if lines else ""


def _check_size(folder: Path) -> None:
    """Raises ConfigError where a folder is too large for a dashboard to take, or cannot be read."""
    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    excludes = [_get_excludes(folder, [*get_runtime_env_default_excludes(), *_EXCLUDES])]
    try:
        _dir_travel(folder, excludes, add, os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot travel with the job: {error}") from error
    if (total := sum(sizes.values())) >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_NUM_LARGEST]
        told = ", ".join(f"{name} ({size(sizes[name])})" for name in largest)
        raise ConfigError(
            f"{folder} is too large to travel with the job, {size(total)} where {size(DASHBOARD_CLIENT_MAX_SIZE)} are "
            f"too many: name what the job does not need in {folder / '.rayignore'}. The largest files: {told}"
        )


def has_ended(state: JobState) -> bool:
    """Whether a job is over."""
    return JobStatus(state.status).is_terminal()


def exit_code(state: JobState) -> int:
    """What distrain itself ended with. Where that is not known: 0 for one that succeeded, 143 for one that was stopped,
    which Ray does by SIGTERM, else 1."""
    if state.exit_code is not None:
        return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
    return {JobStatus.SUCCEEDED.value: 0, JobStatus.STOPPED.value: 128 + signal.SIGTERM}.get(state.status, 1)


def failure(state: JobState) -> str | None:
    """Why a job failed, where it could not say so itself: it was never begun, or its process was killed. Else None."""
    code = exit_code(state)
    if state.status != JobStatus.FAILED.value or (state.exit_code is not None and code < 128):
        return None
    if code == 128 + signal.SIGKILL:
        return "its process was killed (SIGKILL), as a machine does that runs out of memory"
    return _gist(state.message.split(", last available logs")[0])
