"""Wakes all workers of a host with one system call.

A frame that wakes a sleeping worker may cost the server its core at once: the scheduler likes to put who is woken where
the waker runs, and the worker then computes there while another one still waits for its frame (measured: in every other
step of two workers on two cores, for 2 ms). So the workers of the server's host do not sleep on their sockets: they
sleep on an eventfd that they share, and the server, or their host's relay, rings it once all frames are sent.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence

from distrain.exchange.cores import Cores


class Doorbell:
    """An eventfd, rung by the server. Waiters see edges of it and never read it, so one ring reaches all of them.

    `fds` are those of one that another process has made. `close`, as this object's end, gives them up.
    """

    NUM_FDS = 2
    fd = -1

    def __init__(self, fds: Sequence[int] | None = None) -> None:
        fd, cores = fds or (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), None)
        self.cores = Cores(cores)
        self.fd = fd

    @property
    def fds(self) -> list[int]:
        """What another process needs of it."""
        return [self.fd, self.cores.buffer.fd]

    def ring(self) -> None:
        """Wake whoever waits, and whoever is about to."""
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the file descriptors."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.cores.buffer.close()

    def __del__(self) -> None:
        self.close()


class Sleeper:
    """Waits for a ring, or for the end of a socket's other side. What the socket brings does not wake it. `rank` is
    that of the worker who sleeps."""

    def __init__(self, bell: Doorbell, sock: socket.socket, rank: int) -> None:
        self._bell, self._rank = bell, rank
        self._epoll = select.epoll()
        self._epoll.register(bell.fd, select.EPOLLIN | select.EPOLLET)
        self._epoll.register(sock, select.EPOLLRDHUP | select.EPOLLET)

    def sleep(self, timeout_s: float | None) -> None:
        """Return at the first ring since the last return, at the socket's end, or after `timeout_s`."""
        core = self._bell.cores.settle(self._rank)
        self._epoll.poll(-1 if timeout_s is None else timeout_s)
        self._bell.cores.leave(core, self._rank)

    def close(self) -> None:
        """Give up the doorbell."""
        self._epoll.close()
        self._bell.close()
