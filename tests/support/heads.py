"""A cluster of one node, as `ray start` makes it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

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


@contextmanager
def ray_head(num_cpus: int = 3, **variables: str) -> Iterator[RayHead]:
    """Start a node with further environment variables; by default without a token. Ends it and all its processes."""
    folder = tempfile.mkdtemp(prefix="ray-head-")
    port, dashboard, metrics = free_port(), free_port(), free_port()
    command = [
        "ray", "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--port={port}", f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
        f"--metrics-export-port={metrics}", f"--object-store-memory={2**27}",
        f"--ray-client-server-port={free_port()}",
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
