"""A cluster of one node, as `ray start` makes it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.util import get_node_ip_address

from tests.support.jobs import wait_for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RayHead:
    """A running node. `address` is for drivers, `dashboard` for jobs, `metrics` what Prometheus scrapes."""

    address: str
    dashboard: str
    metrics: str


def _autoscaling(num_cpus: int, max_workers: int, port: int) -> dict[str, Any]:
    """As for `ray up`, with a provider of Ray's whose machines are further nodes on this one."""
    lists = [
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_exclude",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_filter",
    ]  # fmt: skip
    provider = {
        "type": "fake_multinode", "gcs_address": f"{get_node_ip_address()}:{port}", "disable_node_updaters": True,
        "disable_launch_config_check": True, "worker_liveness_check": False,
    }  # fmt: skip
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": num_cpus, "object_store_memory": 2**27}, "node_config": {},
            "min_workers": 0, "max_workers": max_workers,
        },
    }  # fmt: skip
    return {
        "cluster_name": "grows", "max_workers": max_workers, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.05,
        "provider": provider, "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default", "available_node_types": kinds, **{name: [] for name in lists},
    }  # fmt: skip


@contextmanager
def growing_head(num_cpus: int, max_workers: int) -> Iterator[RayHead]:
    """A head without CPUs, whose autoscaler adds nodes with so many, as they are asked for."""
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
        json.dump(_autoscaling(num_cpus, max_workers, port), settings)
        settings.flush()
        variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with ray_head(0, port, [f"--autoscaling-config={settings.name}"], **variables) as head:
            yield head


@contextmanager
def ray_head(
    num_cpus: int = 3, port: int | None = None, options: Sequence[str] = (), **variables: str
) -> Iterator[RayHead]:
    """Start a node with further environment variables; by default without a token. Ends it and all its processes."""
    folder = tempfile.mkdtemp(prefix="ray-head-")
    port, dashboard, metrics = port or free_port(), free_port(), free_port()
    command = [
        "ray", "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--port={port}", f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
        f"--metrics-export-port={metrics}", f"--object-store-memory={2**27}",
        f"--ray-client-server-port={free_port()}", *options,
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"} | variables
    with open(Path(folder) / "out", "w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: _answers(f"{url}/api/version"), 120, "the dashboard's start")
        yield RayHead(f"127.0.0.1:{port}", url, f"http://127.0.0.1:{metrics}/metrics")
    finally:
        processes = [head_process := psutil.Process(head.pid), *head_process.children(recursive=True)]
        head.terminate()
        head.wait(30)
        psutil.wait_procs(processes, 10)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True
