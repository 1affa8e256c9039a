"""Trouble that lasts: kills again and again, lost calls, a tracking server that never answers, memory that runs out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ray.core.generated import core_worker_pb2, gcs_service_pb2, node_manager_pb2

from distrain.history import check
from tests.support.jobs import distrain, finish, leftovers, start, wait_for, workers_of, write_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

LOST_ONCE = [f"NodeManagerService.grpc_client.{call}BundleResources" for call in ("Prepare", "Commit")]


def history_of(folder: Path) -> Path:
    [run] = (folder / "checkpoints").iterdir()
    return run / "history.jsonl"


def test_a_kill_every_two_seconds_for_a_minute(tmp_path: Path):
    """Steps of 10 ms and more, so that the run lasts: it ends with the same bits, in at most twice the time."""
    job = write_job(tmp_path)
    job = write_job(
        tmp_path,
        data={"train": str(tmp_path / "train"), "label": "label", "shuffle_rows": 60},
        model={"factory": "tests.support.slow:build", "args": {"seconds": 0.01}},
        tracking={"enabled": False},
        epochs=160,
    )
    root = str(Path(__file__).parents[2])
    undisturbed = distrain("train", str(job), "--json", cwd=tmp_path, timeout_s=200, PYTHONPATH=root)
    assert undisturbed.code == 0, undisturbed.stderr
    before = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    process = start("train", str(job), "checkpoint.history=true", "--json", cwd=tmp_path, PYTHONPATH=root)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/history.jsonl")), 60, "the first step")
    kills, end = 0, time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        for victim in workers_of(process.pid)[:1]:
            victim.kill()
            kills += 1
        time.sleep(2)
    done = finish(process, 200)
    assert done.code == 0, done.stderr
    assert done.result["parameters_sha256"] == undisturbed.result["parameters_sha256"]
    assert done.result["worker_failures"] >= kills - 1 >= 5
    assert done.result["seconds"]["training"] < 2 * undisturbed.result["seconds"]["training"]
    [run] = [path for path in (tmp_path / "checkpoints").iterdir() if path.name not in before]
    assert check(run / "history.jsonl")[1] == []


def one_in_ten() -> dict[str, dict[str, int]]:
    """Half of the lost calls never arrive, of the other half the answer is lost, for every call but one: where the
    answer to RegisterNode is lost, Ray's node registers again and is declared dead for it, whoever uses it."""
    names = {
        f"{prefix}{service.name}.grpc_client.{method.name}"
        for calls, prefix in ((gcs_service_pb2, "ray::rpc::"), (node_manager_pb2, ""), (core_worker_pb2, ""))
        for service in calls.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert len(names) > 80 and all(name in names for name in LOST_ONCE)
    failures = {name: {"num_failures": -1, "req_failure_prob": 5, "resp_failure_prob": 5} for name in sorted(names)}
    del failures["ray::rpc::NodeInfoGcsService.grpc_client.RegisterNode"]["resp_failure_prob"]
    return failures


def test_one_in_ten_of_rays_calls_fails(tmp_path: Path):
    """In a run that trains for longer than Ray takes to start: its own start takes 3 to 17 s more, by chance."""
    job = write_job(tmp_path, tracking={"enabled": False}, epochs=600)
    expected = distrain("train", str(job), "--json", cwd=tmp_path)
    failures = one_in_ten()
    found = distrain("train", str(job), "--json", cwd=tmp_path, RAY_testing_rpc_failure=json.dumps(failures))
    assert found.code == 0, found.stderr
    assert found.result["parameters_sha256"] == expected.result["parameters_sha256"]
    assert found.result["seconds"]["total"] < 2 * expected.result["seconds"]["total"] + 5


RESERVE = """
import os, time
from distrain.config import WorkersConfig
from distrain.placement import Cluster
cluster = Cluster("local", WorkersConfig(count=2))
del os.environ["RAY_testing_rpc_failure"]  # a Ray started from here on loses nothing
start = time.monotonic()
print(cluster.reserve().ranks, time.monotonic() - start > 1.5)
cluster.close()
"""


@pytest.mark.parametrize("call", LOST_ONCE)
def test_the_answer_to_a_call_for_room_is_lost(call: str):
    """Ray itself never gets over either: it forgets the room that a node holds, or tries for ever what cannot be."""
    failures = {call: {"num_failures": 1, "resp_failure_prob": 100}}
    before = {process.pid for process in psutil.process_iter()}
    environment = {**os.environ, "RAY_testing_rpc_failure": json.dumps(failures)}
    done = subprocess.run(
        [sys.executable, "-c", RESERVE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 1] True"
    assert leftovers(before) == []


def test_a_tracking_server_that_hangs_costs_points_and_not_the_run(tmp_path: Path):
    """It answers the look before the start, then takes connections and says nothing, for the whole run."""
    job = write_job(tmp_path, epochs=40)
    before = {process.pid for process in psutil.process_iter()}
    free = distrain("train", str(job), "tracking.enabled=false", "--json", cwd=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def answer_once() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                if len(held) == 1:
                    held[0].recv(65536)
                    held[0].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

        threading.Thread(target=answer_once, daemon=True).start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        hung = distrain("train", str(job), f"tracking.uri={uri}", "--json", cwd=tmp_path, timeout_s=200)
        server.shutdown(socket.SHUT_RDWR)
    assert len(held) > 1
    print(hung.code, hung.stderr[-500:], free.result["seconds"], hung.result["seconds"])
    assert hung.code == 0, hung.stderr
    assert hung.result["parameters_sha256"] == free.result["parameters_sha256"]
    assert "MLflow" in hung.stderr
    assert leftovers(before) == []


def test_a_worker_out_of_memory_is_named_as_that(tmp_path: Path):
    job = write_job(tmp_path, tracking={"enabled": False}, epochs=400)
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    model = f"model={{factory: 'tests.support.faults:build', args: {{moment: memory, flag: '{tmp_path / 'taken'}'}}}}"
    settings = ("data.standardize=false", model, "workers.count=2", "--json")
    done = distrain(
        "train", str(job), *settings, cwd=tmp_path, timeout_s=200, PYTHONPATH=str(Path(__file__).parents[2]),
        RAY_memory_usage_threshold=f"{threshold:.4f}", RAY_memory_monitor_refresh_ms="100",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.result["worker_failures"] >= 1
    assert "its node ran out of memory" in done.stderr
