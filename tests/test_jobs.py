"""Submitted jobs, on a real cluster with its dashboard."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from ray.dashboard.utils import get_address_for_submission_client

from distrain.checkpoint import MODEL, verify
from distrain.cli import main
from distrain.config import TrainConfig, load_config
from distrain.errors import ConfigError
from distrain.jobs import Jobs, JobState, exit_code
from tests.support.heads import ray_head
from tests.support.jobs import Finished, distrain, wait_for, write_job


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
    assert run(address, tmp_path, "stop", job_id).stdout.strip() == "stopping"
    wait_for(lambda: run(address, tmp_path, "status", job_id).stdout.startswith("STOPPED"), 90, "the job's end")
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

        def submit_job(self, entrypoint: str, runtime_env: dict) -> str:
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
