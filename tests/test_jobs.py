"""Submitted jobs, on a real cluster with its dashboard."""

from __future__ import annotations

import asyncio
import os
import shlex
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import mlflow
import pytest
import requests
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.dashboard.utils import get_address_for_submission_client

from distrain.checkpoint import MODEL, verify
from distrain.cli import main
from distrain.config import TrainConfig, load_config
from distrain.errors import ClusterError, ConfigError
from distrain.jobs import Jobs, JobState, exit_code
from tests.support.forwarder import Forwarder
from tests.support.heads import ray_head
from tests.support.jobs import Finished, distrain, start, wait_for, write_job


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The dashboard of a cluster of one node."""
    with ray_head() as head:
        yield head.dashboard


def run(address: str, folder: Path, *arguments: str) -> Finished:
    return distrain(*arguments, "--address", address, cwd=folder, timeout_s=200)


@pytest.mark.ray
@pytest.mark.cluster
def test_a_job_travels_with_its_folder_and_its_exit_code_comes_back(address: str, tmp_path: Path):
    write_job(tmp_path, epochs=2, data={"train": "train", "validation": "validation", "label": "label"})
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))\n"
    )
    done = run(address, tmp_path, "submit", "job.yaml", "model={factory: 'my_models:build'}")
    assert done.code == 0, done.stdout + done.stderr
    assert "finished: all epochs done" in done.stdout
    job_id = done.stderr.split("job ")[1].split(";")[0]
    assert run(address, tmp_path, "status", job_id).stdout.startswith("SUCCEEDED, exit code 0")
    assert "finished: all epochs done" in run(address, tmp_path, "logs", job_id).stdout
    [experiment] = [
        e
        for e in mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
        if e.name == "distrain"
    ]
    [logged] = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs([experiment.experiment_id])
    assert logged.data.tags["distrain.ray_job_id"] == job_id
    wrong = run(address, tmp_path, "submit", "job.yaml", "model={factory: 'my_models:bild'}")
    assert wrong.code == 2 and "my_models" in wrong.stdout


@pytest.mark.ray
@pytest.mark.cluster
def test_a_connection_that_is_cut_costs_no_line(address: str, tmp_path: Path):
    write_job(tmp_path, epochs=2)
    forwarder = Forwarder(int(address.rsplit(":", 1)[1]))
    submitted = start("submit", "job.yaml", "--address", f"http://127.0.0.1:{forwarder.port}", cwd=tmp_path)
    assert submitted.stdout is not None and submitted.stderr is not None
    said = submitted.stdout.readline()
    job_id = submitted.stderr.readline().split("job ")[1].split(";")[0]
    forwarder.cut()
    assert "trying again" in submitted.stderr.readline()
    forwarder.mend()
    said += submitted.stdout.read()
    assert submitted.wait(30) == 0, said + submitted.stderr.read()
    forwarder.cut()
    assert said == run(address, tmp_path, "logs", job_id).stdout and "finished: all epochs done" in said


@pytest.mark.ray
@pytest.mark.cluster
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_when_submitted_again(address: str, tmp_path: Path):
    job = write_job(tmp_path, epochs=300, tracking={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    submitted = run(address, tmp_path, "submit", "job.yaml", "--name", "steady", "--no-wait")
    job_id = submitted.stdout.strip()
    folder = tmp_path / "checkpoints" / "steady"
    assert submitted.code == 0 and job_id, submitted.stderr
    try:
        wait_for(lambda: list(folder.glob("step-*")), 120, "a first checkpoint")
    except AssertionError:
        pytest.fail(run(address, tmp_path, "logs", job_id).stdout)
    twice = run(address, tmp_path, "submit", "job.yaml", "--name", "steady")
    assert twice.code == 2 and f"job {job_id} is RUNNING and trains {folder}: " in twice.stderr
    assert run(address, tmp_path, "stop", job_id).stdout.strip() == "stopped"
    assert run(address, tmp_path, "status", job_id).stdout.startswith("STOPPED")
    newest = max(folder.glob("step-*"))
    step = verify(newest)["step"]
    assert 0 < step < 3000
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = verify(newest)["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    again = run(address, tmp_path, "submit", "job.yaml", "--name", "steady")
    assert again.code == 0 and f"goes on after step {step:,}" in again.stdout, again.stdout
    assert client.get_run(run_id).info.status == "FINISHED"
    overrides = (f"checkpoint.dir={tmp_path / 'other'}", "tracking.enabled=false")
    undisturbed = distrain("train", str(job), *overrides, "--json", cwd=tmp_path)
    expected = verify(undisturbed.result["checkpoint"])
    assert verify(max(folder.glob("step-*")))["files"][MODEL]["sha256"] == expected["files"][MODEL]["sha256"]


@pytest.mark.ray
@pytest.mark.cluster
def test_what_is_not_there_is_said(address: str, tmp_path: Path):
    unknown = run(address, tmp_path, "status", "raysubmit_nothing")
    assert unknown.code == 3 and "has no job 'raysubmit_nothing'" in unknown.stderr
    (tmp_path / "inner").mkdir()
    write_job(tmp_path)
    outside = distrain("submit", "../job.yaml", "--address", address, cwd=tmp_path / "inner")
    assert outside.code == 2 and "must be in the current folder" in outside.stderr


def test_a_cluster_out_of_reach_is_said(tmp_path: Path):
    done = distrain("status", "x", "--address", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.code == 3 and "no Ray dashboard answers as it should at http://127.0.0.1:9" in done.stderr


class Connection:
    """What the log's next connection gives: so many characters, in pieces, and how it ends."""

    def __init__(self, num_chars: int, piece: int = 7, end: Exception | float | None = None) -> None:
        self.num_chars, self.piece, self.end = num_chars, piece, end

    async def read(self, log: str) -> AsyncIterator[str]:
        for begin in range(0, min(self.num_chars, len(log)), self.piece):
            yield log[begin : min(begin + self.piece, self.num_chars)]
        if isinstance(self.end, Exception):
            raise self.end
        await asyncio.sleep(self.end or 0)


class OneJob:
    """Ray's client, of a cluster with one job: it says `log`, over `connections`, and then ends as `ended`."""

    def __init__(self, log: str, connections: Sequence[Connection | Exception], **ended: Any) -> None:
        self.log, self.connections, self.ended = log, [*connections], {"status": "SUCCEEDED", **ended}
        self.submitted: dict[str, Any] | None = None
        self.metadata: dict[str, str] = {}
        self.asked_to_stop = False

    def get_job_info(self, job_id: str) -> JobDetails:
        if self.connections and isinstance(self.connections[0], Exception):
            raise self.connections.pop(0)
        values = {"status": "RUNNING"} if self.connections else self.ended
        return JobDetails(type="SUBMISSION", submission_id="one", entrypoint="x", metadata=self.metadata, **values)

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        return self.connections.pop(0).read(self.log)

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def list_jobs(self) -> list[JobDetails]:
        return [self.get_job_info("one")]

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        return "one"

    def stop_job(self, job_id: str) -> bool:
        self.asked_to_stop = True
        return bool(self.connections)


Begin = Callable[..., OneJob]


@pytest.fixture
def one_job(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Puts a cluster with one job in Ray's place."""

    def begin(*arguments: Any, **ended: Any) -> OneJob:
        client = OneJob(*arguments, **ended)
        monkeypatch.setattr("distrain.jobs.JobSubmissionClient", lambda address: client)
        return client

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("distrain.jobs._PAUSE_S", 0)
    return begin


LOG = "".join(f"line {number} of many\n" for number in range(10))
BROKEN = [
    None,  # closed in order, and too early
    RuntimeError("WebSocket connection closed unexpectedly with close code 1006"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.WSServerHandshakeError(SimpleNamespace(real_url="http://there"), (), status=502, message="no"),
    ConnectionResetError("reset"),
]
REFUSED = [requests.ConnectionError("refused"), RuntimeError("Request failed with status code 502: no.")]


@given(
    st.lists(
        st.builds(Connection, st.integers(0, len(LOG)), st.integers(1, 40), st.sampled_from(BROKEN))
        | st.sampled_from(REFUSED),
        max_size=6,
    )
)
@settings(deadline=None)
def test_a_log_is_followed_whole_and_once_however_connections_break(connections: list[Connection | Exception]):
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.jobs.JobSubmissionClient", lambda address: OneJob(LOG, connections))
        patch.setattr("distrain.jobs._PAUSE_S", 0)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        state = Jobs("http://there").follow("one", said.append, print)
    assert "".join(said) == LOG and state.status == "SUCCEEDED"


def test_a_connection_that_falls_silent_is_made_anew(one_job: Begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distrain.jobs._SILENCE_S", 0.05)
    one_job(LOG, [Connection(20, end=60.0), Connection(100)])
    said: list[str] = []
    assert Jobs("http://there").follow("one", said.append, print).status == "SUCCEEDED"
    assert "".join(said) == LOG


def test_a_dashboard_that_stays_away_is_said_and_how_to_follow_on(one_job: Begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distrain.jobs._PATIENCE_S", 0)
    one_job(LOG, [Connection(20), *[aiohttp.ServerDisconnectedError()] * 3])
    done = CliRunner().invoke(main, ["logs", "one", "-f"])
    assert done.exit_code == 3 and done.stdout == LOG[:20]
    assert done.stderr.count("Server disconnected; trying again") == 1
    assert "Job one goes on without this; to follow it again: distrain logs one --follow" in done.stderr


def test_a_job_that_is_gone_is_not_waited_for(one_job: Begin):
    one_job(LOG, [RuntimeError("Request failed with status code 404: Job one does not exist.")])
    with pytest.raises(ClusterError, match="has no job 'one'"):
        Jobs("http://there").follow("one", print, print)


@pytest.mark.parametrize(("ended", "code", "words"), [
    ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, None),
    ({"status": "FAILED", "driver_exit_code": 4, "message": "Job entrypoint command failed"}, 4, None),
    ({"status": "STOPPED"}, 143, None),
    ({"status": "FAILED", "message": "setup failed: no\nTraceback (most recent call last):\n  File x\nOSError: full\n"},
     1, "OSError: full"),
    ({"status": "FAILED", "message": "Job supervisor actor failed to start within 900 seconds.\n"},
     1, "Job supervisor actor failed to start within 900 seconds"),
    ({"status": "FAILED", "driver_exit_code": -9, "message": "..."}, 137, "its process was killed (SIGKILL)"),
    ({"status": "FAILED", "driver_exit_code": 139, "message": "failed with code 139, last available logs (...):\nx"},
     139, "failed with code 139;"),
])  # fmt: skip
def test_a_job_that_could_not_say_why_it_failed_is_spoken_for(
    ended: dict[str, Any], code: int, words: str | None, one_job: Begin
):
    one_job(LOG, [Connection(1000)], **ended)
    done = CliRunner().invoke(main, ["logs", "one", "--follow"])
    assert done.exit_code == code and done.stdout == LOG
    assert (f"error: job one failed: {words}" in done.stderr) if words else not done.stderr


def test_a_server_errors_last_line_is_what_is_said(one_job: Begin):
    text = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: the reason\n  - a detail\n'
    one_job(LOG, [RuntimeError(f"Request failed with status code 500: {text}.")])
    with pytest.raises(ClusterError, match=r"at http://there: ValueError: the reason$"):
        Jobs("http://there").state("one")


@pytest.mark.parametrize("named", [["--name", "steady"], ["resume=auto", "tracking.run_name=steady"],
                                   ["restarts=2", "tracking.run_name=steady"]])  # fmt: skip
def test_a_run_that_a_job_trains_is_not_trained_by_another(
    named: list[str], one_job: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    client = one_job(LOG, [Connection(1000)])
    assert CliRunner().invoke(main, ["submit", "job.yaml", *named, "--no-wait"]).exit_code == 0
    assert client.submitted is not None
    client.metadata, client.submitted = client.submitted["metadata"], None
    refused = CliRunner().invoke(main, ["submit", "job.yaml", *named])
    assert refused.exit_code == 2 and client.submitted is None
    trained = f"job one is RUNNING and trains {tmp_path}/checkpoints/steady"
    assert f"{trained}: follow it with distrain logs one --follow" in refused.stderr
    elsewhere = [["tracking.run_name=steady"], [*named, "checkpoint.dir=other"]]
    for another in elsewhere:
        assert CliRunner().invoke(main, ["submit", "job.yaml", *another, "--no-wait"]).exit_code == 0
    client.connections = []  # it has ended
    assert CliRunner().invoke(main, ["submit", "job.yaml", *named, "--no-wait"]).exit_code == 0


def test_stopping_waits_for_the_end(one_job: Begin, monkeypatch: pytest.MonkeyPatch):
    client = one_job(LOG, [Connection(0)] * 3, status="STOPPED")
    monkeypatch.setattr("time.sleep", lambda seconds: client.connections.pop(0))
    done = CliRunner().invoke(main, ["stop", "one"])
    assert (done.exit_code, done.stdout) == (0, "stopped\n") and client.asked_to_stop and not client.connections
    assert CliRunner().invoke(main, ["stop", "one"]).stdout == "had ended already\n"


def test_a_job_that_does_not_stop_is_said(one_job: Begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distrain.jobs._STOP_S", -1.0)
    one_job(LOG, [Connection(0)])
    done = CliRunner().invoke(main, ["stop", "one"])
    assert done.exit_code == 3 and "job one is RUNNING" in done.stderr and "distrain status one" in done.stderr


def test_a_folder_too_large_to_travel_is_refused_with_its_largest_files(
    one_job: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    for name, megabytes in (("notes/video.mp4", 90), ("more.bin", 20), ("rows.parquet", 900), ("checkpoints/x", 900)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(megabytes * 10**6)
    client = one_job(LOG, [])
    refused = CliRunner().invoke(main, ["submit", "job.yaml"])
    assert refused.exit_code == 2 and client.submitted is None
    assert "110 MB" in refused.stderr and ".rayignore" in refused.stderr
    assert "The largest files: notes/video.mp4 (90 MB), more.bin (20 MB), job.yaml" in refused.stderr
    (tmp_path / ".rayignore").write_text("/notes\n")
    assert CliRunner().invoke(main, ["submit", "job.yaml", "--no-wait"]).exit_code == 0
    (tmp_path / ".rayignore").write_bytes(b"\xff")
    unreadable = CliRunner().invoke(main, ["submit", "job.yaml", "--no-wait"])
    assert unreadable.exit_code == 2 and "cannot travel with the job" in unreadable.stderr


@pytest.mark.parametrize("by_rayignore", [False, True])
def test_output_stays_here_and_a_packages_modules_travel(
    by_rayignore: bool, one_job: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_job(folder)
    names = ("checkpoints", "mlruns", "mlartifacts", *(("build", "benchmark-data") if by_rayignore else ()))
    for name in (*names, *(f"mine/{name}" for name in names)):
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "inner" / "code.py").touch()
    client = one_job(LOG, [])
    assert CliRunner().invoke(main, ["submit", "job.yaml", "--no-wait"]).exit_code == 0
    assert client.submitted is not None
    excludes = client.submitted["runtime_env"]["excludes"]
    if by_rayignore:
        excludes = ["*.parquet"]
        (folder / ".rayignore").write_text((Path(__file__).parent.parent / ".rayignore").read_text())
    create_package(str(folder), tmp_path / "it.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "it.zip") as package:
        travelled = {name for name in package.namelist() if name.endswith(".py")}
    assert travelled == {f"mine/{name}/inner/code.py" for name in names}


def test_exit_codes_come_through():
    assert [exit_code(JobState("j", status, code, "")) for status, code in (
        ("SUCCEEDED", 0), ("FAILED", 4), ("FAILED", -9), ("FAILED", None), ("SUCCEEDED", None), ("STOPPED", None),
        ("STOPPED", 143), ("STOPPED", 0),
    )] == [0, 4, 137, 1, 0, 143, 143, 0]  # fmt: skip


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_given_is_the_one_asked(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    asked: list[str] = []

    class Client:
        def __init__(self, address: str) -> None:
            asked.append(get_address_for_submission_client(address))

    monkeypatch.setattr("distrain.jobs.JobSubmissionClient", Client)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert Jobs("http://there:8265").address == "http://there:8265"
    assert Jobs("there:8265").address == "http://there:8265"
    default = "http://127.0.0.1:9" if variable == "RAY_API_SERVER_ADDRESS" else "http://127.0.0.1:8265"
    assert Jobs().address == default
    assert asked == ["http://there:8265", "http://there:8265", default]
    assert (
        os.environ[variable] == "http://127.0.0.1:9"
        and len({"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"} & {*os.environ}) == 1
    )
    with pytest.raises(ConfigError, match="ray://there:10001 is no address of a Ray dashboard"):
        Jobs("ray://there:10001")


@pytest.mark.parametrize("name", ["run #1", "123", "a: b", "2024-01-01", "null", "\N{ROCKET} läuft"])
def test_any_name_of_a_job_is_its_runs_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Client:
        def __init__(self, address: str) -> None:
            pass

        def list_jobs(self) -> list[JobDetails]:
            return []

        def submit_job(self, entrypoint: str, runtime_env: dict, metadata: dict) -> str:
            self.__class__.entrypoint = entrypoint
            return "job"

    monkeypatch.setattr("distrain.jobs.JobSubmissionClient", Client)
    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path, resume="auto")
    assert CliRunner().invoke(main, ["submit", job.name, "--name", name, "--no-wait"]).output == "job\n"
    _, _, _, verb, path, _, _, *overrides = shlex.split(Client.entrypoint)
    config = load_config(path, overrides)
    assert verb == "train" and config.tracking.run_name == name and config.resume == "auto"


def test_resuming_by_itself_needs_a_name():
    with pytest.raises(ConfigError, match=r"resume: auto needs tracking\.run_name"):
        TrainConfig(data={"train": "x", "label": "y"}, resume="auto")
