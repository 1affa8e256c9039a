"""Several hosts on this machine: each with its own address, processes, mounts and name, on a link to be cut and slowed.

A host is a set of Linux namespaces held by one process, its init; so is the switch between them, whose network has a
bridge. None of it has a name outside, so nothing clashes, and nothing has to be removed: it goes with its init, which
ends with whoever started it, however that ends. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

# A host's process 1: takes up orphans until its standard input ends. With it ends all that runs on the host.
_INIT = """
import os, signal, sys

def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

signal.signal(signal.SIGCHLD, reap)
print("up", flush=True)
sys.stdin.buffer.read()
"""
_NAMESPACES = ("--net", "--mount", "--pid", "--uts")
_SETUP = """
hostname "$1"; ip link set lo up
mount -t tmpfs -o size=2g tmpfs /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs -o size=2g tmpfs /tmp/ray
exec "$2" -S -c "$3"
"""
_SLOW = ("burst", "32kb", "latency", "100ms")  # of a slowed link: what may pass at once, how long a packet may wait


def why_not() -> str | None:
    """Why there can be no hosts here, for a test to be skipped with; None where there can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"several hosts on one machine need {', '.join(missing)}"
    if subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True).returncode:
        return "several hosts on one machine need root, and the right to make namespaces"
    return None


class _Machine:
    """A set of namespaces, and what runs in them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._holder = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
             "sh", "-euc", _SETUP, "sh", name, sys.executable, _INIT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            raise RuntimeError(f"host {name} did not come up")
        [init] = psutil.Process(self._holder.pid).children()
        self.init = init.pid
        self._namespace = os.readlink(f"/proc/{self.init}/ns/pid")

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self._holder.poll() is None

    def _enter(self, command: tuple[str, ...], cwd: Path | None) -> list[str]:
        return [
            "nsenter", f"--target={self.init}", *_NAMESPACES, "env", f"--chdir={cwd or Path.cwd()}", "--", *command,
        ]  # fmt: skip

    def start(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[str]:
        """Start a command here. `env` comes on top of this process's environment; `popen` goes to `Popen`.

        Signals to what is returned do not reach the command: see `processes`.
        """
        return subprocess.Popen(self._enter(command, cwd), env={**os.environ, **(env or {})}, text=True, **popen)

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> str:
        """Run a command here and return its output. Raises RuntimeError with what it said when it fails."""
        done = subprocess.run(
            self._enter(command, cwd), env={**os.environ, **(env or {})}, text=True, capture_output=True,
            timeout=timeout_s,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def configure(self, *command: str) -> None:
        """Run `ip` or `tc` on its network; other hosts' inits go by the numbers that they have outside."""
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--net", "--", *command], text=True, capture_output=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.stdout}{done.stderr}")

    def processes(self, text: str = "") -> list[psutil.Process]:
        """What runs here, but for its init, with `text` in the command line; the newest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if process.pid != self.init and os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace:
                    words = " ".join(process.cmdline())
                    if words and text in words and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return sorted(found, key=lambda process: process.create_time(), reverse=True)

    def kill(self) -> None:
        """Take it down with everything that runs on it, at once, as a power cut does."""
        self._holder.kill()
        self._holder.communicate()
        self._namespace = ""  # its number may come to be another host's


class Host(_Machine):
    """One host of a `Network`, at `address`."""

    def __init__(self, name: str, address: str, switch: _Machine, port: str) -> None:
        super().__init__(name)
        self.address = address
        self._switch, self._port = switch, port
        switch.configure("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        switch.configure("ip", "link", "set", port, "master", "bridge", "up")
        self.configure("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.configure("ip", "link", "set", "eth0", "up")

    def cut(self) -> None:
        """Take its link down: nothing passes, and nobody is told."""
        self._switch.configure("ip", "link", "set", self._port, "down")

    def mend(self) -> None:
        """Take its link up again."""
        self._switch.configure("ip", "link", "set", self._port, "up")

    def limit(self, mbit_per_s: float | None) -> None:
        """Limit its link in both directions; None lifts the limit."""
        for machine, device in ((self, "eth0"), (self._switch, self._port)):
            with suppress(RuntimeError):  # there was no limit
                machine.configure("tc", "qdisc", "delete", "dev", device, "root")
            if mbit_per_s is not None:
                rate = ("tbf", "rate", f"{mbit_per_s}mbit", *_SLOW)
                machine.configure("tc", "qdisc", "add", "dev", device, "root", *rate)


class Network:
    """`count` hosts, at 10.0.0.1 and on. They reach each other and nothing else.

    with Network(2) as network:
        print(network.hosts[0].run("ping", "-c", "1", network.hosts[1].address))
    """

    def __init__(self, count: int) -> None:
        self._hosts: list[Host] = []
        self._switch = _Machine("switch")
        try:
            self._switch.configure("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.configure("ip", "link", "set", "bridge", "up")
            for _ in range(count):
                self.add()
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> list[Host]:
        """Those that are up, in the order in which they came."""
        return [host for host in self._hosts if host.up]

    def add(self) -> Host:
        """One more host, at the next address."""
        number = len(self._hosts) + 1
        self._hosts.append(Host(f"host{number}", f"10.0.0.{number}", self._switch, f"port{number}"))
        return self._hosts[-1]

    def close(self) -> None:
        """Take all hosts down."""
        for machine in (*self.hosts, self._switch):
            machine.kill()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
