"""docker-compose.yml on a real Docker engine: the image is built, jobs are submitted, a container is killed."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from tests.support.compose import REPOSITORY, ComposeCluster, engine_problem
from tests.support.jobs import finish

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]
NUM_WORKERS = 3
STEPS_PER_EPOCH = 23
LONG = ("epochs=120", "schedule.T_max=2760", "shards=6")  # T_max: 120 epochs of 23 steps


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeCluster]:
    """A head, three workers and MLflow, as the README starts them."""
    problem = engine_problem()
    if problem is not None:
        pytest.skip(problem)
    prepared = ComposeCluster.prepare(tmp_path_factory.mktemp("compose"))
    try:
        prepared.up(NUM_WORKERS)
        yield prepared
    finally:
        prepared.down()


def run_of_job(cluster: ComposeCluster, job_id: str) -> Any:
    """The MLflow run that a job made, over HTTP."""
    client = mlflow.MlflowClient(cluster.mlflow)
    experiment = client.get_experiment_by_name("distrain")
    [run] = client.search_runs([experiment.experiment_id], f"tags.`distrain.ray_job_id` = '{job_id}'")
    return run


def steps_of(cluster: ComposeCluster, run: Any) -> int:
    """The last step that a run logged."""
    history = mlflow.MlflowClient(cluster.mlflow).get_metric_history(run.info.run_id, "train/loss")
    return max(point.step for point in history)


def job_id_of(stderr: str) -> str:
    return stderr.split("job ")[1].split(";")[0]


def test_profiles_are_understood(cluster: ComposeCluster):
    profiles = [word for name in ("gpu", "postgres", "monitoring") for word in ("--profile", name)]
    services = yaml.safe_load(cluster.compose(*profiles, "config"))["services"]
    assert {"ray-worker-gpu", "postgres", "prometheus", "grafana"} < services.keys()
    for service in services.values():
        assert service["healthcheck"]["test"] and service["read_only"] and service["cap_drop"] == ["ALL"]
    assert yaml.safe_load(cluster.compose("config"))["services"]["ray-worker"]["scale"] == 2


def test_containers_are_confined(cluster: ComposeCluster):
    containers = cluster.containers()
    assert len(containers) == NUM_WORKERS + 2
    for container in containers:
        host = container["HostConfig"]
        assert container["State"]["Health"]["Status"] == "healthy"
        assert container["Config"]["User"] not in ("", "0", "root")
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        published = [binding["HostIp"] for bindings in host["PortBindings"].values() for binding in bindings]
        assert set(published) <= {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError) as refused:  # the dashboard, without the token
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code == 401


def test_a_killed_container_changes_no_bit(cluster: ComposeCluster):
    undisturbed = cluster.distrain("submit", "jobs/digits.yaml", *LONG, "workers.count=2")
    assert undisturbed.code == 0, undisturbed.stdout + undisturbed.stderr
    assert "finished: all epochs done" in undisturbed.stdout
    expected = run_of_job(cluster, job_id_of(undisturbed.stderr))
    assert expected.info.status == "FINISHED" and expected.data.metrics["val/accuracy"] > 0.97
    scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/metrics').read().decode())"
    assert "ray_distrain_samples_total{" in cluster.compose("exec", "ray-head", "python", "-c", scrape)

    job = cluster.start("distrain.cli", "submit", "jobs/digits.yaml", *LONG, f"workers.count={NUM_WORKERS}")
    try:
        assert job.stdout is not None
        said = ""
        while "validation after step" not in said:
            said += job.stdout.readline()
            assert job.poll() is None, said
        with_worker_only = next(
            container["Id"]
            for container in cluster.containers("ray-worker")
            if "ServerActor" not in cluster.processes(container["Id"])
        )
        cluster.docker("kill", with_worker_only)
        disturbed = finish(job, 300)
    finally:
        job.kill()
    assert disturbed.code == 0, said + disturbed.stdout + disturbed.stderr
    assert "workers lost" in disturbed.stdout
    logged = run_of_job(cluster, job_id_of(disturbed.stderr))
    assert logged.info.status == "FINISHED"
    name = "distrain.parameters_sha256"
    assert logged.data.tags[name] == expected.data.tags[name]
    cluster.up(NUM_WORKERS)
    assert len(cluster.containers("ray-worker")) == NUM_WORKERS


def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster: ComposeCluster, tmp_path: Path):
    job = yaml.safe_load((REPOSITORY / "jobs/digits.yaml").read_text())
    for key in ("train", "validation"):
        job["data"][key] = str(REPOSITORY / job["data"][key])
    job |= {"model": {"factory": "my_models:build"}, "epochs": 3000, "checkpoint": {"every_seconds": 1}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10))\n"
    )
    submitted = cluster.distrain("submit", "job.yaml", "--name", "steady", "--no-wait", cwd=tmp_path)
    job_id = submitted.stdout.strip()
    assert submitted.code == 0 and job_id, submitted.stderr

    logs = ""
    for line in cluster.lines_of("logs", job_id, "--follow"):
        logs += line
        if "validation after step" in line:
            break
    else:
        pytest.fail(logs)
    assert cluster.distrain("stop", job_id).stdout.strip() == "stopped"
    stopped = run_of_job(cluster, job_id)
    assert stopped.info.status == "KILLED", cluster.distrain("logs", job_id).stdout

    epochs = steps_of(cluster, stopped) // STEPS_PER_EPOCH + 3
    again = cluster.distrain("submit", "job.yaml", f"epochs={epochs}", "--name", "steady", cwd=tmp_path)
    assert again.code == 0 and "goes on after step" in again.stdout, again.stdout + again.stderr
    resumed = mlflow.MlflowClient(cluster.mlflow).get_run(stopped.info.run_id)
    assert resumed.info.status == "FINISHED"

    wrong = cluster.distrain("submit", "job.yaml", "model={factory: 'my_models:bild'}", cwd=tmp_path)
    assert wrong.code == 2 and "my_models" in wrong.stdout


def test_rays_own_command_submits_too(cluster: ComposeCluster):
    command = ("ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--")
    environment = cluster.environment | {"RAY_AUTH_MODE": "token"}
    submitting = ComposeCluster(environment, cluster.dashboard, cluster.mlflow)
    done = finish(submitting.start(*command, "distrain", "train", "jobs/digits.yaml", "epochs=2"), 240)
    assert done.code == 0 and "finished: all epochs done" in done.stdout, done.stdout + done.stderr
    failed = finish(submitting.start(*command, "distrain", "train", "jobs/digits.yaml", "optimizer.lr=1e30"), 240)
    assert failed.code != 0, failed.stdout + failed.stderr
