"""Links for tests: pairs of real ones, and one without sockets, a small real implementation that passes their contract
tests."""

from __future__ import annotations

import queue
import socket

from distrain.errors import LinkError
from distrain.exchange.link import Frame, SocketLink

_END = object()


class InMemoryLink:
    """One end of a pair of queues."""

    def __init__(self, incoming: queue.SimpleQueue, outgoing: queue.SimpleQueue) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    @classmethod
    def pair(cls) -> tuple[InMemoryLink, InMemoryLink]:
        a: queue.SimpleQueue = queue.SimpleQueue()
        b: queue.SimpleQueue = queue.SimpleQueue()
        return cls(a, b), cls(b, a)

    def send(self, frame: Frame) -> None:
        self._outgoing.put(frame)

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        try:
            frame = self._incoming.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if frame is _END:
            raise LinkError("the other end of the link is gone")
        return frame

    def close(self) -> None:
        self._outgoing.put(_END)


def socket_pair(family: str) -> tuple[SocketLink, SocketLink]:
    """Two ends of a connected stream."""
    if family == "unix":
        a, b = socket.socketpair()
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
        listener.close()
    return SocketLink(a), SocketLink(b)
