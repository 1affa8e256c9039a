"""A Ray cluster over several hosts, each in namespaces of its own: see hosts.py."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from tests.support.hosts import Host, Network
from tests.support.jobs import wait_for

# A node that does not answer is given up after 4.5 s: in the head's environment.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
HEALTH_CHECK_BOUND_S = 4.5
_RAY = str(Path(sys.executable).with_name("ray"))
_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[2])}  # for the tests' models


class RayHosts:
    """A head without room for workers on the first host, and a node with room for one on each of the others."""

    def __init__(self, network: Network) -> None:
        self.head, *others = network.hosts
        self._network = network
        self.address = f"{self.head.address}:6379"
        self._start(self.head, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", **HEALTH_CHECKS)
        wait_for(lambda: self.head.processes("gcs_server"), 30, "the head's start")
        with ThreadPoolExecutor(len(others)) as threads:
            list(threads.map(self.join, others))

    def join(self, host: Host) -> None:
        """Have a host's Ray node join the cluster."""
        self._start(host, f"--address={self.address}", "--num-cpus=1")

    def _start(self, host: Host, *arguments: str, **variables: str) -> None:
        host.run(
            _RAY, "start", f"--node-ip-address={host.address}", "--object-store-memory=100000000",
            "--disable-usage-stats", *arguments, env={**_ENVIRONMENT, **variables}, timeout_s=120,
        )  # fmt: skip

    def distrain(self, *arguments: str, cwd: Path, stderr: IO[str]) -> subprocess.Popen[str]:
        """Start the command line on the first host."""
        environment = {**_ENVIRONMENT, "RAY_ADDRESS": self.address}
        return self.head.start(
            sys.executable, "-m", "distrain.cli", *arguments, cwd=cwd, env=environment,
            stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

    def hosts_of(self, actor: str) -> list[Host]:
        """The hosts on which an actor of this name runs."""
        return [host for host in self._network.hosts if host.processes(f"ray::{actor}")]
