"""A cluster of several Ray nodes on this machine, and a run on it that something happens to.

Run as a program, in a process of its own, since a process has one Ray at a time:
`python -m tests.support.nodes SCENARIO JOB [key=value ...]` ends with one line of JSON. The job's model is that of
slow.py, with the file `until` which it waits for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Event, Report
from distrain.trainer import Trainer

PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION


class Watch(SilentProgress):
    """Sees a run's events and how many workers took part in its steps."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notes: list[str] = []
        self.workers: list[int] = []
        self.step = 0
        self.end: float | None = None  # Unix seconds: when a node will be taken away

    def report(self, report: Report) -> None:
        self.events += report.events
        for record in report.steps:
            self.step = record.step
            if not self.workers or self.workers[-1] != record.workers:
                self.workers.append(record.workers)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)


def drain(node_id: str, seconds: float) -> float:
    """Tell Ray that a node will be taken away. Returns the Unix seconds of its end."""
    end = time.time() + seconds
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    client.drain_node(node_id, PREEMPTION, "spot preemption", int(end * 1000))
    return end


def grow_and_shrink(cluster: Cluster, watch: Watch) -> None:
    """Two nodes come, and are killed again; one comes back."""
    watch.until(lambda: watch.step >= 10)
    nodes = [cluster.add_node(num_cpus=1)]
    watch.until(lambda: watch.count("joined") == 2)
    nodes.append(cluster.add_node(num_cpus=1))
    watch.until(lambda: watch.count("joined") == 3)
    reached = watch.step
    watch.until(lambda: watch.step >= reached + 20)
    for node in nodes:
        cluster.remove_node(node, allow_graceful=False)
    watch.until(lambda: bool(watch.workers) and watch.workers[-1] == 1)
    reached = watch.step
    watch.until(lambda: watch.step >= reached + 5)
    cluster.add_node(num_cpus=1)


def preempt_worker(cluster: Cluster, watch: Watch) -> None:
    """A worker's node is to go; there is room on another, which comes a little later."""
    watch.until(lambda: watch.step >= 10)
    _, other = _nodes()
    watch.end = drain(other, 20.0)
    time.sleep(2.0)
    cluster.add_node(num_cpus=1)
    watch.until(lambda: watch.count("left") == 1)


def preempt_server(cluster: Cluster, watch: Watch) -> None:
    """The server's node is to go, and with it a worker."""
    watch.until(lambda: watch.step >= 10)
    cluster.add_node(num_cpus=2)
    server, _ = _nodes()
    watch.end = drain(server, 20.0)
    watch.until(lambda: any("the parameter server's node is about to go" in note for note in watch.notes))
    watch.until(lambda: watch.count("joined") == 4)


def kill_node(cluster: Cluster, watch: Watch) -> None:
    """The node of a worker is killed; there is another one."""
    watch.until(lambda: watch.step >= 10)
    cluster.add_node(num_cpus=1)
    _, other = _nodes()
    victim = next(node for node in cluster.worker_nodes if node.node_id == other)
    cluster.remove_node(victim, allow_graceful=False)
    watch.until(lambda: watch.count("joined") == 3)


def kill_relay(cluster: Cluster, watch: Watch) -> None:
    """The relay of the node without the server is killed, as that of a slice if it owns one."""
    _strike_relay(watch, signal.SIGKILL)


def hang_relay(cluster: Cluster, watch: Watch) -> None:
    """It hangs."""
    _strike_relay(watch, signal.SIGSTOP)


def _strike_relay(watch: Watch, blow: signal.Signals) -> None:
    watch.until(lambda: watch.step >= 10)
    [relay] = _actors("RelayActor")
    joined = watch.count("joined")
    os.kill(relay["Pid"], blow)
    watch.until(lambda: watch.count("joined") > joined)


def _actors(kind: str) -> list[dict[str, Any]]:
    """The actors of a class, asked of the GCS itself: Ray's state API needs a dashboard, which is slow to start."""
    return [actor for actor in actors(actor_state_name="ALIVE").values() if actor["ActorClassName"] == kind]


def _nodes() -> tuple[str, str]:
    """The node of the server, and one with a worker only."""
    [server] = [actor["Address"]["NodeID"] for actor in _actors("ServerActor")]
    return server, next(node for actor in _actors("WorkerActor") if (node := actor["Address"]["NodeID"]) != server)


SCENARIOS: dict[str, Any] = {
    function.__name__: function
    for function in (grow_and_shrink, preempt_worker, preempt_server, kill_node, kill_relay, hang_relay)
}


def main() -> None:
    scenario, job, *overrides = sys.argv[1:]
    # The driver's node offers nothing, so that no worker is on the one node that cannot go.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(1 if scenario == "grow_and_shrink" else 2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    watch = Watch()
    workers = "workers={min: 1, count: 1, max: 3}" if scenario == "grow_and_shrink" else "workers={count: 2}"
    config = load_config(job, [workers, *overrides])
    trainer = Trainer(config, watch)
    with ThreadPoolExecutor(1) as thread:  # not the scenario: nodes can be added from the main thread only
        fit = thread.submit(trainer.fit)
        SCENARIOS[scenario](cluster, watch)
        Path(config.model.args["until"]).touch()
        result = fit.result()
    said = {
        "parameters_sha256": result.parameters_sha256,
        "steps": result.steps,
        "workers": watch.workers,
        "end": watch.end,
        "notes": watch.notes,
        "events": [asdict(event) for event in watch.events],
    }
    print(json.dumps(said))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
