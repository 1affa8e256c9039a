"""Hosts that lose power or hang, and slow links: a real Ray over several hosts of this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from distrain.history import check
from tests.support.hosts import Host, Network, why_not
from tests.support.jobs import Finished, finish, wait_for, write_plain_job
from tests.support.ray_hosts import HEALTH_CHECK_BOUND_S, RayHosts

pytestmark = [
    pytest.mark.ray, pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]  # fmt: skip

STEPS = 400
BOUND_S = HEALTH_CHECK_BOUND_S + 5


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(4) as network:
        yield network


@pytest.fixture(scope="module")
def cluster(network: Network) -> RayHosts:
    """A driver's host, and three with room for a worker: one more than a run takes."""
    return RayHosts(network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("network")


class Run:
    """A run of the command line on the cluster; `name` is the run's."""

    def __init__(self, cluster: RayHosts, folder: Path, name: str, *overrides: str, **keys: Any) -> None:
        job = write_plain_job(
            folder,
            tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}", "run_name": name},
            **keys,
        )
        self._folder, self._history = folder, folder / "checkpoints" / name / "history.jsonl"
        self._said = open(folder / f"{name}.stderr", "w")  # noqa: SIM115 (closed in `finish`)
        self.process = cluster.distrain(
            "train", str(job), "checkpoint.history=true", "--json", *overrides, cwd=folder, stderr=self._said
        )

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self._history.read_text().count('"kind": "step"') if self._history.exists() else 0

    def incarnations(self) -> int:
        """How many workers had a part in its steps so far."""
        return check(self._history)[0].incarnations

    def until(self, step: int, timeout_s: float = 60.0) -> None:
        def reached() -> bool:
            assert self.process.poll() is None or self.step >= step, self.said()
            return self.step >= step

        wait_for(reached, timeout_s, f"step {step}")

    def until_said(self, text: str, timeout_s: float = 30.0) -> None:
        wait_for(lambda: text in self.said(), timeout_s, text)

    def said(self) -> str:
        return Path(self._said.name).read_text()

    def finish(self) -> Finished:
        """The end of it; its history must hold."""
        done = finish(self.process)
        self._said.close()
        assert done.code == 0, self.said()
        found, problems = check(self._history)
        assert problems == [] and found.steps == done.result["steps"]
        return done

    def events(self, run_id: str) -> list[tuple[datetime, str, str]]:
        """What MLflow has of it, as (when, kind, message)."""
        client = MlflowClient(f"sqlite:///{self._folder / 'mlflow.db'}")
        text = Path(client.download_artifacts(run_id, "events.txt", str(self._folder))).read_text()
        lines = [re.fullmatch(r"(\S+) step \d+ (\w+): (.*)", line) for line in text.splitlines()]
        return [(datetime.fromisoformat(line[1]), line[2], line[3]) for line in lines if line]

    def recovery_s(self, run_id: str) -> list[float]:
        client = MlflowClient(f"sqlite:///{self._folder / 'mlflow.db'}")
        return [point.value for point in client.get_metric_history(run_id, "time/recovery_sec")]


def slow_model(seconds: float, until: Path | None = None) -> dict[str, Any]:
    return {"factory": "tests.support.slow:build", "args": {"seconds": seconds, "until": str(until or "")}}


@pytest.fixture(scope="module")
def undisturbed(cluster: RayHosts, folder: Path) -> str:
    run = Run(cluster, folder, "undisturbed", "workers.count=3", model=slow_model(0.0), epochs=STEPS // 10)
    return run.finish().result["parameters_sha256"]


def test_a_slow_link_is_no_death(network: Network, cluster: RayHosts, folder: Path):
    """10 Mbit/s, on which a step's gradients take longer than its compute."""
    model = {"hidden": [128, 128]}
    alone = Run(cluster, folder, "alone", "workers.count=1", model=model, epochs=3).finish()
    for host in network.hosts[1:]:
        host.limit(10)
    try:
        run = Run(cluster, folder, "slow", "workers.count=2", model=model, epochs=3)
        done = run.finish()
    finally:
        for host in network.hosts[1:]:
            host.limit(None)
    assert done.result["parameters_sha256"] == alone.result["parameters_sha256"]
    assert done.result["worker_failures"] == 0
    kinds = [kind for _, kind, _ in run.events(done.result["run_id"])]
    assert kinds.count("joined") == 2 and "lost" not in kinds


def test_a_link_that_is_cut_for_a_moment_is_no_death(
    network: Network, cluster: RayHosts, folder: Path, undisturbed: str
):
    run = Run(cluster, folder, "moment", "workers.count=2", model=slow_model(0.005), epochs=STEPS // 10)
    run.until(30, 120)
    [server] = cluster.hosts_of("ServerActor")
    victim = next(host for host in cluster.hosts_of("WorkerActor") if host is not server)
    victim.cut()
    time.sleep(HEALTH_CHECK_BOUND_S / 3)
    step = run.step
    victim.mend()
    run.until(step + 2, BOUND_S)
    done = run.finish()
    assert done.result["parameters_sha256"] == undisturbed and done.result["worker_failures"] == 0


def raylet(host: Host) -> psutil.Process:
    return host.processes("raylet/raylet")[0]


def lose_power(host: Host) -> None:
    host.cut()  # so that nobody hears of its end
    host.kill()


FAULTS: dict[str, Callable[[Host], None]] = {
    "node killed": lose_power,
    "raylet stopped": lambda host: raylet(host).suspend(),
    "link cut and mended": Host.cut,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_is_lost_costs_no_step(
    network: Network, cluster: RayHosts, folder: Path, undisturbed: str, fault: str
):
    name, over = fault.replace(" ", "-"), folder / f"{fault} and over"
    run = Run(cluster, folder, name, "workers.count=2", model=slow_model(0.03, over), epochs=STEPS // 10)
    run.until(30, 120)
    [server] = cluster.hosts_of("ServerActor")
    victim = next(host for host in cluster.hosts_of("WorkerActor") if host is not server)
    at, step = time.time(), run.step
    FAULTS[fault](victim)
    run.until(step + 2, BOUND_S)  # the step in flight, and one more
    run.until_said("is replaced: its node died")
    if victim.up:
        victim.mend()  # what it had still to say comes now
    wait_for(lambda: run.incarnations() == 3, 30, "the replacement's part")
    over.touch()
    done = run.finish()
    events = run.events(done.result["run_id"])
    with suppress(psutil.Error, IndexError):
        victim.kill()
    cluster.join(network.add())
    assert done.result["parameters_sha256"] == undisturbed and done.result["worker_failures"] == 1
    [lost] = [event for event in events if event[1] == "lost"]
    assert lost[2].endswith("was given up: its node died") and lost[0].timestamp() - at < BOUND_S
    replaced = [when for when, kind, _ in events if kind == "joined" and when > lost[0]]
    assert len(replaced) == 1 and (replaced[0] - lost[0]).total_seconds() < 10
    recovery_s = run.recovery_s(done.result["run_id"])
    assert len(recovery_s) == 1, events
    assert recovery_s[0] < BOUND_S - HEALTH_CHECK_BOUND_S
    refused = [message for _, kind, message in events if kind == "refused"]
    assert all("its worker had been given up" in message for message in refused)
