"""One ring wakes all who wait, and none is missed; a server's end wakes them without one."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from distrain.errors import LinkError
from distrain.exchange.doorbell import Doorbell, Sleeper
from distrain.exchange.link import Frame, Hub, Kind, SocketLink, connect


def another(bell: Doorbell) -> Doorbell:
    """The same doorbell, as another process holds it."""
    return Doorbell([os.dup(fd) for fd in bell.fds])


@pytest.fixture
def bell():
    made = Doorbell()
    yield made
    made.close()


def test_one_ring_wakes_all_who_wait(bell):
    pairs = [socket.socketpair() for _ in range(4)]
    sleepers = [Sleeper(another(bell), end, rank) for rank, (_, end) in enumerate(pairs)]
    threads = [threading.Thread(target=sleeper.sleep, args=(30,)) for sleeper in sleepers]
    for thread in threads:
        thread.start()
    bell.ring()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for sleeper in sleepers:
        sleeper.close()
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_ring_before_the_sleep_counts_and_only_once(bell):
    ours, theirs = socket.socketpair()
    sleeper = Sleeper(another(bell), theirs, 0)
    sleeper.sleep(0)
    bell.ring()
    start = time.monotonic()
    sleeper.sleep(30)
    assert time.monotonic() - start < 10
    sleeper.sleep(0.05)
    assert time.monotonic() - start >= 0.05
    sleeper.close()
    ours.close()
    theirs.close()


def test_bytes_alone_do_not_wake_and_the_bell_does(bell):
    ours, theirs = (SocketLink(end) for end in socket.socketpair())
    theirs.wait_for(another(bell), 0)
    got: list[Frame | None] = []
    thread = threading.Thread(target=lambda: got.append(theirs.receive(30)))
    thread.start()
    while not bell_is_waited_for(thread):
        time.sleep(0.001)
    ours.send(Frame(Kind.TRAIN, step=7))
    thread.join(0.1)
    asleep = thread.is_alive()
    bell.ring()
    thread.join(10)
    assert asleep and got[0] is not None and got[0].step == 7
    ours.close()
    theirs.close()


def bell_is_waited_for(thread: threading.Thread) -> bool:
    """Whether the kernel has that thread asleep in epoll."""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        return file.read().split()[0] in ("232", "281", "22")  # epoll_wait, epoll_pwait; epoll_pwait of aarch64


def test_the_end_of_the_server_wakes_without_a_ring(bell):
    ours, theirs = (SocketLink(end) for end in socket.socketpair())
    theirs.wait_for(another(bell), 0)
    threading.Timer(0.05, ours.close).start()
    with pytest.raises(LinkError, match="gone"):
        theirs.receive(30)
    theirs.close()


def test_a_hub_rings_for_what_it_sent_at_its_next_poll():
    hub = Hub("the token")
    workers: list[SocketLink] = []

    def join(rank: int) -> None:
        link = connect(hub.address, True, "the token", {"rank": rank})
        link.wait_for(another(hub.bell), rank)
        workers.append(link)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    links = []
    while len(links) < 3:
        links += [link for link, _ in hub.poll(0.1)]
    for thread in threads:
        thread.join(10)
    for step in range(200):
        got: list[int] = []
        waiting = [threading.Thread(target=lambda w=w, got=got: got.append(w.receive(30).step)) for w in workers]
        for thread in waiting:
            thread.start()
        for link in links:
            hub.send(link, Frame(Kind.TRAIN, step=step))
        hub.poll(0)
        for thread in waiting:
            thread.join(10)
        assert got == [step] * 3
    hub.close()
    for link in workers:
        with pytest.raises(LinkError):
            link.receive(10)
        link.close()
