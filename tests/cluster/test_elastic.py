"""Nodes that come, go, die and are preempted: the run adapts, and the weights stay the same to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Report
from distrain.trainer import Trainer
from tests.support.heads import growing_head
from tests.support.jobs import distrain, write_plain_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

STEPS = 600  # enough, at this pace, for two nodes to join one after the other and to be lost


def write_slow_job(folder: Path, seconds: float) -> Path:
    args = {"seconds": seconds, "until": str(folder / "over")}
    slow = {"factory": "tests.support.slow:build", "args": args}
    return write_plain_job(folder, model=slow, epochs=STEPS // 10, tracking={"enabled": False})


def test_a_cluster_without_machines_is_given_time_to_get_them(tmp_path: Path):
    job = str(write_plain_job(tmp_path, epochs=2, tracking={"enabled": False}))
    with growing_head(num_cpus=1, max_workers=2) as head:
        there = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
        refused = distrain("train", job, "workers.count=2", cwd=tmp_path, **there)
        assert refused.code == 3 and "asked for 2 CPUs (2 workers of 1), the cluster has 0" in refused.stderr
        grown = distrain("train", job, "workers.count=2", "cluster.wait_seconds=60", cwd=tmp_path, **there)
        never = distrain("train", job, "workers.count=3", "cluster.wait_seconds=5", cwd=tmp_path, **there)
    assert never.code == 3 and "no room came free within 5 s: " in never.stderr
    assert grown.code == 0, grown.stderr
    assert "waiting up to 60 s for room for 2 workers of 1 CPUs" in grown.stderr
    assert "finished: all epochs done" in grown.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the parameters of the same run where nothing happens."""
    job = write_slow_job(tmp_path_factory.mktemp("undisturbed"), 0.0)
    result = Trainer(load_config(job, ["workers.count=4", "cluster.address=local"])).fit()
    assert result.steps == STEPS
    return result.parameters_sha256


@pytest.fixture
def play(undisturbed: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Have something happen to a run on a cluster of several nodes, and return what it says."""

    def run(scenario: str, *overrides: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.nodes", scenario, str(write_slow_job(tmp_path, 0.02)), *overrides],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"parameters')))
        assert said["parameters_sha256"] == undisturbed and said["steps"] == STEPS
        return said

    return run


class Pace(SilentProgress):
    """How long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def report(self, report: Report) -> None:
        self.seconds += [record.step_s for record in report.steps]


def of_kind(said: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in said["events"] if event["kind"] == kind]


def test_a_run_grows_with_the_cluster_and_shrinks_to_one(play):
    said = play("grow_and_shrink")
    assert said["workers"][:3] == [1, 2, 3] and 1 in said["workers"][3:]
    assert len(of_kind(said, "lost")) == 2
    assert all(event["seconds"] < 1.0 for event in of_kind(said, "recovered"))


def test_a_worker_moves_before_its_node_is_taken_away(play):
    said = play("preempt_worker")
    assert of_kind(said, "lost") == []
    [left] = of_kind(said, "left")
    assert left["time_ms"] / 1000 < said["end"]
    assert [event["rank"] for event in of_kind(said, "joined")][2:] == [left["rank"]], "its replacement came first"


def test_the_server_moves_before_its_node_is_taken_away_and_no_step_is_done_again(play):
    said = play("preempt_server")
    assert of_kind(said, "lost") == []
    [moved] = [note for note in said["notes"] if "the parameter server's node is about to go" in note]
    assert moved.endswith("0 steps before the last one reported")


def test_a_killed_relay_costs_no_step(play):
    said = play("kill_relay")
    [lost] = of_kind(said, "lost")
    assert "its host's relay is lost" in lost["message"]
    assert not any("going on from step" in note for note in said["notes"])


def test_a_relay_that_hangs_is_replaced_and_costs_no_bit(play):
    said = play("hang_relay", "workers.timeout_seconds=3")
    [worker], [relay] = of_kind(said, "lost"), of_kind(said, "lost_host")
    assert "its host's relay was silent for 3 s" in worker["message"]
    assert "its host's relay was silent for 3 s" in relay["message"]
    assert [event["rank"] for event in of_kind(said, "joined")][2:] == [worker["rank"]]
    assert not any("going on from step" in note for note in said["notes"])


def test_after_the_server_of_a_slice_is_killed_the_run_goes_on_from_its_checkpoint(play):
    said = play("kill_relay", "server.slices=2")
    [note] = [note for note in said["notes"] if "the server of slice 0 is lost" in note]
    assert "going on from step" in note


def test_a_killed_node_costs_no_step(play):
    said = play("kill_node")
    [recovered] = of_kind(said, "recovered")
    assert recovered["seconds"] < 1.0


def test_a_fast_worker_and_one_four_times_as_slow_waste_little(tmp_path: Path):
    """At least 0.85 of the sum of their speeds, once shards are dealt by speed: with a microbatch of 40 ms, the sum is
    25 + 6.25 microbatches a second."""
    job = write_plain_job(
        tmp_path,
        model={"factory": "tests.support.slow:build", "args": {"seconds": 0.04, "flag": str(tmp_path / "slow")}},
        batch_size=30,
        shards=10,
        epochs=6,
        tracking={"enabled": False},
    )
    watch = Pace()
    config = load_config(job, ["workers.count=2", "cluster.address=local"])
    assert Trainer(config, watch).fit().steps == 60
    settled = watch.seconds[30:]
    assert 10 / fmean(settled) > 0.85 * (1 + 1 / 4) / 0.04
