"""What `distrain doctor` finds, and what it says to do."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from distrain import doctor
from distrain.config import CheckpointConfig, TrackingConfig, WorkersConfig, load_config
from distrain.errors import ClusterError, TrackingRefused
from tests.support.heads import free_port, ray_head
from tests.support.jobs import Finished, distrain, write_job

TOKEN, OTHER_TOKEN = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch):
    """None of a person's own settings."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH",
                 "MLFLOW_TRACKING_URI", "DISTRAIN_CHECKPOINT_DIR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def findings(done: Finished) -> dict[str, dict[str, object]]:
    return {each["subject"]: each for each in done.result["findings"]}


def test_all_is_well(tmp_path: Path):
    write_job(tmp_path)
    said = distrain("doctor", "job.yaml", cwd=tmp_path, timeout_s=240)
    assert said.code == 0, said.stdout + said.stderr
    lines = said.stdout.splitlines()
    subjects = ["versions", "cluster", "token", "shared memory", "data", "model", "tracking", "checkpoints"]
    assert [line[9:24].strip() for line in lines if not line.startswith(" ")] == subjects
    assert "300 rows in 2 files, 90 for validation; 10 steps an epoch" in said.stdout
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "mlflow.db").exists()


def test_what_is_wrong_is_said_all_at_once_with_what_to_do(tmp_path: Path):
    write_job(tmp_path)
    shutil.rmtree(tmp_path / "train")
    dead = free_port()
    settings = {"RAY_ADDRESS": f"127.0.0.1:{dead}", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}
    tracking = f"tracking.uri=http://127.0.0.1:{dead}"
    done = distrain("doctor", "job.yaml", tracking, "--json", cwd=tmp_path, timeout_s=240, **settings)
    assert done.code == 3, done.stdout + done.stderr
    found = findings(done)
    failed = {subject for subject, each in found.items() if each["verdict"] == "failed"}
    assert failed == {"cluster", "token", "data", "tracking"}
    assert all(found[subject]["advice"] for subject in failed)
    assert f"no Ray cluster answers at 127.0.0.1:{dead}" in str(found["cluster"]["message"])
    assert "/nowhere/token" in str(found["token"]["message"])
    assert str(tmp_path / "train") in str(found["data"]["message"])
    assert f"no MLflow server answers at http://127.0.0.1:{dead}" in str(found["tracking"]["message"])


@pytest.mark.ray
@pytest.mark.cluster
def test_a_cluster_with_a_token(tmp_path: Path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text(TOKEN)
    wrong.write_text(OTHER_TOKEN)
    job = write_job(tmp_path)
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(right)) as head:

        def asked(path: Path, *arguments: str, **settings: str) -> Finished:
            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
            return distrain("doctor", *arguments, "--json", cwd=tmp_path, timeout_s=240, **token, **settings)

        well = asked(right, str(job), "--address", head.dashboard)
        assert well.code == 0, well.stdout + well.stderr
        assert "takes jobs" in str(findings(well)["cluster"]["message"])
        mismatch = asked(wrong, "--address", head.dashboard)
        assert mismatch.code == 3
        assert "wants its token" in str(findings(mismatch)["cluster"]["message"])
        attached = asked(right, str(job), RAY_ADDRESS=head.address)
        assert attached.code == 0 and "3 CPUs for 2 workers" in str(findings(attached)["cluster"]["message"])
        crowded = asked(right, str(job), "workers.count=99", RAY_ADDRESS=head.address)
        assert crowded.code == 3 and "asked for 99 CPUs" in str(findings(crowded)["cluster"]["message"])
        stranger = asked(wrong, RAY_ADDRESS=head.address)
        assert stranger.code == 3
        assert "token" in str(findings(stranger)["cluster"]["advice"]), stranger.stdout


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as the dashboard of a Ray cluster without a token."""

    version = "2.60.0"

    def do_GET(self) -> None:
        body = json.dumps({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def open_dashboard() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_cluster_open_to_all_and_one_of_another_version(open_dashboard: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reached, warned = doctor.jobs_cluster(open_dashboard)
    assert reached.verdict == "ok" and warned.verdict == "warning"
    assert "anyone" in warned.message and "RAY_AUTH_MODE=token" in warned.advice
    monkeypatch.setattr(Dashboard, "version", "2.40.0")
    other, _ = doctor.jobs_cluster(open_dashboard)
    assert other.verdict == "warning" and "runs Ray 2.40.0" in other.message


def test_a_job_takes_the_stores_of_its_cluster(open_dashboard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    own = load_config(write_job(tmp_path), [])
    silent = own.model_copy(update={"tracking": TrackingConfig(), "checkpoint": CheckpointConfig(keep=2)})
    said = {found.subject: found.message for found in doctor.examine(silent, open_dashboard)}
    assert "the cluster's MLFLOW_TRACKING_URI" in said["tracking"]
    assert "the cluster's DISTRAIN_CHECKPOINT_DIR" in said["checkpoints"]
    said = {found.subject: found.message for found in doctor.examine(own, open_dashboard)}
    assert str(tmp_path / "mlflow.db") in said["tracking"] and "free" in said["checkpoints"]


def test_a_copy_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    def not_there(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", not_there)
    found = doctor.versions()
    assert found.verdict == "failed" and found.exit_code == 2
    assert "distrain is not installed" in found.message and "pip install -e ." in found.advice


def test_versions():
    assert doctor.versions().verdict == "ok"
    found = doctor.versions(["torch==1.0", "nothing-of-this-name", "numpy", "ray>99; extra == 'other'"])
    assert found.verdict == "failed" and found.exit_code == 2
    assert "torch is " in found.message and "has to be ==1.0" in found.message and "numpy" not in found.message
    assert found.advice == "pip install 'torch==1.0' 'nothing-of-this-name'"


def test_a_small_shared_memory(monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    small = doctor.shared_memory()
    assert small.verdict == "warning" and "67.1 MB free" in small.message and "--shm-size" in small.advice


def test_no_anonymous_memory(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor, "SharedBuffer", refused)
    found = doctor.shared_memory()
    assert found.verdict == "failed" and found.exit_code == 3 and "seccomp" in found.advice


def test_a_checkpoint_folder_that_cannot_be_written_and_one_that_is_full(tmp_path: Path):
    found = doctor.checkpoints(CheckpointConfig(dir="/proc/nothing"))
    assert found.verdict == "failed" and found.exit_code == 2 and "DISTRAIN_CHECKPOINT_DIR" in found.advice
    full = doctor.checkpoints(CheckpointConfig(dir=str(tmp_path / "new")), one_bytes=1 << 60)
    assert full.verdict == "warning" and "checkpoint.keep" in full.advice
    assert doctor.checkpoints(CheckpointConfig(dir=str(tmp_path)), one_bytes=1000).verdict == "ok"
    assert list(tmp_path.iterdir()) == []


def test_tracking():
    assert doctor.tracking(TrackingConfig(enabled=False)).message == "off (tracking.enabled)"

    def refuse(uri: str, experiment: str) -> None:
        raise TrackingRefused(f"MLflow at {uri}: the experiment {experiment!r} was deleted")

    found = doctor.tracking(TrackingConfig(uri="http://x", experiment="gone"), refuse)
    assert (found.verdict, found.exit_code) == ("failed", 3)
    assert found.message == "MLflow at http://x: the experiment 'gone' was deleted" and "tracking.uri" in found.advice
    secret = doctor.tracking(TrackingConfig(uri="postgresql://me:secret@host/db"), lambda *_: None)
    assert secret.message == "host/db"


def test_a_cluster_that_may_grow_and_lacks_gpus_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert doctor.cluster("there", WorkersConfig(count=2, gpus=1)).verdict == "failed"
    found = doctor.cluster("there", WorkersConfig(count=2, gpus=1), wait_seconds=60)
    assert found.verdict == "warning" and "has 8 CPUs and 0 GPUs for 2 workers" in found.message
    assert "waits up to 60 s" in found.advice


def test_too_many_workers_for_this_machine():
    found = doctor.cluster("local", WorkersConfig(count=10_000))
    assert found.verdict == "failed" and found.exit_code == ClusterError.exit_code and "ask for less" in found.advice


def test_a_model_that_cannot_be_built_or_does_not_fit_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_models.py").write_text(
        "from torch import nn\n\ndef raises():\n    raise KeyError('size')\n\n"
        "def narrow():\n    return nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))\n\n"
        "class Wrong(nn.Linear):\n    def forward(self, features):\n        return super().forward(features[:, :3])\n\n"
        "def wrong():\n    return Wrong(4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path)

    def found(factory: str) -> doctor.Finding:
        settings = [f"model={{factory: 'broken_models:{factory}'}}", "data.standardize=false", "workers.count=1"]
        said = {each.subject: each for each in doctor.examine(load_config(job, settings))}
        assert said["checkpoints"].verdict == "ok"
        return said["model"]

    raised = found("raises")
    assert (raised.verdict, raised.exit_code) == ("failed", 2)
    assert raised.message == f"KeyError: 'size' ({tmp_path / 'broken_models.py'}, line 4)"
    wrong = found("wrong")
    assert wrong.verdict == "failed" and wrong.message.startswith("RuntimeError: mat1 and mat2 shapes")
    assert wrong.message.endswith(f"({tmp_path / 'broken_models.py'}, line 11)")
    narrow = found("narrow")
    assert narrow.verdict == "failed" and "got (6,) and (2,)" in narrow.message, narrow


def test_a_column_that_is_not_there(tmp_path: Path):
    job = write_job(tmp_path)
    found, preparation = doctor.data(load_config(job, ["data.label=nope"]))
    assert (found.verdict, found.exit_code, preparation) == ("failed", 2, None)
    assert "nope" in found.message
