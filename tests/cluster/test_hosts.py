"""The hosts that other tests stand on: apart from each other, and gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.hosts import Network, why_not
from tests.support.jobs import is_alive, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

LISTEN = "import socket; server = socket.create_server(('', 7000)); print('listening', flush=True)"
ACCEPT = f"{LISTEN}; peer = server.accept()[0]\nwhile peer.recv(65536): pass"
# Exits with 0 once another host has taken so many bytes; with 1 where it cannot be reached.
SEND = (
    "import socket, sys; peer = socket.create_connection((sys.argv[1], 7000), 2); "
    "peer.sendall(bytes(int(sys.argv[2]))); peer.shutdown(socket.SHUT_WR); peer.recv(1)"
)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as network:
        yield network


def send(network: Network, num_bytes: int) -> float:
    """Seconds that bytes take from host 1 to host 2. Raises RuntimeError where host 2 cannot be reached."""
    first, second = network.hosts
    receiver = second.start(sys.executable, "-Sc", ACCEPT, stdout=subprocess.PIPE)
    try:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        began = time.monotonic()
        first.run(sys.executable, "-Sc", SEND, second.address, str(num_bytes))
        return time.monotonic() - began
    finally:
        for process in second.processes("server.accept"):
            process.kill()
        receiver.communicate()


def test_a_host_has_a_name_processes_and_folders_of_its_own(network: Network, tmp_path: Path):
    first, second = network.hosts
    assert first.run("hostname") == "host1\n" and second.run("hostname") == "host2\n"
    first.run("touch", "/dev/shm/mine", "/tmp/ray/mine")
    assert second.run("ls", "/dev/shm", "/tmp/ray") == "/dev/shm:\n\n/tmp/ray:\n"
    assert not os.path.exists("/dev/shm/mine") and not os.path.exists("/tmp/ray/mine")
    (tmp_path / "shared").write_text("the rest of the disk is everyone's")
    assert first.run("cat", "shared", cwd=tmp_path) == "the rest of the disk is everyone's"
    sleeper = first.start("sleep", "1000")
    [seen] = wait_for(lambda: first.processes("sleep 1000"))
    assert second.processes("sleep 1000") == []
    seen.kill()
    assert sleeper.wait(10) != 0


def test_a_link_can_be_cut_mended_and_slowed(network: Network):
    second = network.hosts[1]
    assert send(network, 2_500_000) < 1.5
    second.cut()
    with pytest.raises(RuntimeError):
        send(network, 1)
    second.mend()
    wait_for(lambda: send(network, 1) >= 0, 10)
    second.limit(10)
    assert send(network, 2_500_000) > 1.5  # 2 s on the wire
    second.limit(None)
    assert send(network, 2_500_000) < 1.5


def test_hosts_end_with_whoever_made_them():
    code = (
        "import time; from tests.support.hosts import Network; network = Network(1);"
        "network.hosts[0].start('sleep', '1000'); print(*[host.init for host in network.hosts], flush=True)\n"
        "time.sleep(1000)"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    init = psutil.Process(int(maker.stdout.readline()))
    maker.kill()
    maker.communicate()
    wait_for(lambda: not is_alive(init), 10, "the end of the host")
