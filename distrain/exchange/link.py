"""Links between workers and server: one framing over Unix sockets (same host) and TCP (across hosts).

A frame is a fixed struct, then `num_bytes` of payload: raw numbers where there is no shared memory, a little JSON when
a worker joins, or safetensors (see state.py). Nothing is ever unpickled. A worker proves that it holds the run's token
by answering the server's challenge with its HMAC-SHA256 (RFC 2104), so the token itself never crosses the wire. A dead
peer is an EOF.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import select
import selectors
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

from distrain.errors import LinkError
from distrain.exchange.doorbell import Doorbell, Sleeper

_HEADER = struct.Struct("<BxxxqqiiiqqqqqdddddQ")
_GONE = "the other end of the link is gone"
_MAX_UNPROVEN_BYTES = 4096  # what a peer may send before it has proved itself
_HANDSHAKE_SECONDS = 10.0
_RECEIVE_CHUNK = 1 << 20
_MOST_DESCRIPTORS = 253  # in one message: Linux's SCM_MAX_FD
_UNSENT_BYTES = 1 << 20  # of which the system has not sent any, 9 ms on 1 Gbit/s: nothing overtakes those


class Kind(IntEnum):
    """What a frame says."""

    CHALLENGE = 1  # server -> worker: prove yourself
    HELLO = 2  # worker -> server: proof, rank, layout digest
    WELCOME = 3  # server -> worker: your incarnation; shared memory follows as file descriptors
    PUBLISH = 4  # server -> worker without shared memory, and owner of a slice -> host: the parameters
    TRAIN = 5  # server -> worker: compute the gradients of these microbatches; payload: see pack_microbatches
    VALIDATE = 6  # server -> worker: compute the metrics of these microbatches of the validation rows
    PUSH = 7  # worker -> server: the sum over a block of places
    FAILED = 8  # worker -> server: the user's code or data failed; JSON payload
    STOP = 9  # server -> worker: the run is over
    ALIVE = 10  # worker -> server: a long microbatch is under way; relay -> server: it is there
    CHECK = 11  # server -> worker: as TRAIN, and look at each microbatch's gradient: one of them is not finite
    SKIPPED = 12  # worker -> server: a microbatch that was left out; JSON payload
    LOOKED = 13  # worker -> server: what a microbatch's activations showed; JSON payload
    READY = 14  # worker -> whoever adds its pushes up with others: values [read, samples) of a push that follows
    # Between the server and the relays of other hosts (see relay.py), which pass the kinds above on but for READY:
    ROSTER = 20  # server -> relay: where the slices' owners listen; relay -> server: they are reached
    LEFT = 21  # relay -> server: a worker's link has ended, or (incarnation -1) that to the owner of slice `slot`;
    # server -> relay: end it
    COMBINE = 22  # server -> relay: these pushes count; their sums are to be with the owners
    OPEN = 32  # host -> owner: pieces follow of a sum over a block of places, to which the host `slot` has given the
    # number `version`
    PIECE = 23  # host -> owner: values [first, stop) of the sum of that number
    SUM = 24  # host -> owner: those were all; it is a sum of pushes of this digest
    VOID = 25  # host -> owner: the sum of that number will not be finished
    ARRIVED = 26  # owner -> server: such a sum is here; `slot` is the host it came from, `read` its pushes' digest
    NORM = 33  # owner -> server: the squares of its slice's norm, float64, of these sums of a round: `read`, a digest
    APPLY = 27  # server -> owner: update with these sums, rows of (host, number); the squares of all slices may follow
    SHARE = 28  # owner -> server: float64 values of its slice; server -> owner: those of all slices, in order
    VALIDATED = 29  # server -> owner: the loss of a validation
    COLLECT = 30  # server -> owner: send the optimizer's state of your slice
    STATE = 31  # that state; server -> owner: go on from it


@dataclass(slots=True)
class Frame:
    """One message. Fields that a kind has no use for stay 0."""

    kind: Kind
    round: int = 0  # the exchange this belongs to; a push repeats the one it answers
    step: int = 0  # training step or validation step of the plan, from 0
    first: int = 0  # places in the round [first, stop): its shards, where no payload says otherwise; piece, and publish
    stop: int = 0  # between hosts: values [first, stop) of the vector. Apply: the plan's step, and how many sums
    incarnation: int = 0
    slot: int = 0  # push: the number of the slot where the block's vector lies; task: which set of slots is free for it
    version: int = 0  # publish, task: which of the published vectors. Welcome: how many of them there are
    read: int = 0  # publish, task of a relay's worker: the update whose parameters these are; sum, norm: a digest.
    # Welcome: 1: say READY. Apply: the oldest round that is not over
    samples: int = 0  # push: rows of the block; task, open, apply: how many places the round has
    data_bytes: int = 0  # bytes of rows that went into the block
    loss: float = 0.0  # push: sum over the samples; task: what the loss is multiplied by for fp16, 0: nothing
    weight: float = 0.0  # sum of the rows' weights
    squares: float = 0.0  # of the microbatches' summed gradients: norms, squared and added up; 0: not taken
    data_s: float = 0.0
    compute_s: float = 0.0
    payload: Any = field(default=b"")  # bytes-like

    def json(self) -> dict[str, Any]:
        """The payload as JSON. Raises LinkError where it is none."""
        try:
            value = json.loads(bytes(self.payload))
        except (ValueError, RecursionError) as error:
            raise LinkError(f"a {self.kind.name} frame came without readable JSON: {error}") from error
        if not isinstance(value, dict):
            raise LinkError(f"a {self.kind.name} frame holds {type(value).__name__} where an object was expected")
        return value


def pack_microbatches(microbatches: Sequence[tuple[int, int]]) -> bytes:
    """(step, shard) of each place of a task, where they are not simply the shards of one step: pairs of int32."""
    return struct.pack(f"<{2 * len(microbatches)}i", *(number for pair in microbatches for number in pair))


def unpack_microbatches(frame: Frame) -> list[tuple[int, int]]:
    """The microbatches that a task asks for, in the order of their places."""
    places = range(frame.first, frame.stop)
    if not len(frame.payload):
        return [(frame.step, place) for place in places]
    try:
        numbers = struct.unpack(f"<{2 * len(places)}i", frame.payload)
    except struct.error as error:
        raise LinkError(f"a {frame.kind.name} frame does not list its {len(places)} microbatches: {error}") from error
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def pack_integers(rows: Iterable[Iterable[int]]) -> bytes:
    """Rows of integers as int32, one after the other."""
    numbers = [number for row in rows for number in row]
    return struct.pack(f"<{len(numbers)}i", *numbers)


def rows_digest(rows: Iterable[tuple[int, ...]]) -> int:
    """What tells sums of different pushes apart, rows of (incarnation, slot, first place, stop), or updates with
    different sums, rows of (host, number): a CRC-32."""
    return zlib.crc32(pack_integers(sorted(rows)))


def unpack_integers(frame: Frame, width: int, num_rows: int | None = None) -> list[tuple[int, ...]]:
    """The rows of `width` integers that a frame holds, or begins with."""
    stop = None if num_rows is None else 4 * width * num_rows
    try:
        return list(struct.iter_unpack(f"<{width}i", frame.payload[:stop]))
    except struct.error as error:
        raise LinkError(f"a {frame.kind.name} frame does not hold rows of {width} integers: {error}") from error


def pack_values(values: Sequence[float]) -> bytes:
    """Float64 values, one after the other."""
    return struct.pack(f"<{len(values)}d", *values)


def unpack_values(payload: Any) -> list[float]:
    """What `pack_values` gave."""
    return list(struct.unpack(f"<{len(payload) // 8}d", payload))


Sink = Callable[[Frame], memoryview | None]
"""Says where a frame's payload goes: a writable view of exactly its size, or None for fresh memory."""


class Link(Protocol):
    """Carries frames both ways, in order but for what is sent in bulk. Raises LinkError once the other end is gone."""

    def send(self, frame: Frame) -> None: ...

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame; None when `timeout_s` pass without one."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Outgoing:
    """A frame to be sent: what is left of its bytes, and what to do when nothing is."""

    frame: Frame
    rest: list[memoryview]
    then: Callable[[], None] | None

    def done(self) -> None:
        if self.then is not None:
            self.then()


class SocketLink:
    """A Link over a connected stream socket. Never blocks on sending: what the socket will not take is queued.

    `sink` may place payloads straight into their buffers. `shared` says that both ends are on one host, so file
    descriptors can be handed over. `heard_at` is when bytes last came, and `moved_at` when they last came or went, but
    for mere signs of life; both as time.monotonic().
    """

    def __init__(self, sock: socket.socket, sink: Sink | None = None) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._socket = sock
        self.shared = sock.family == socket.AF_UNIX
        self.sink = sink
        self.proven = True
        self.heard_at = self.moved_at = time.monotonic()
        self._words: deque[_Outgoing] = deque()
        self._bulk: deque[_Outgoing] = deque()
        self._under_way: _Outgoing | None = None
        self._header = bytearray(_HEADER.size)
        self._header_filled = 0
        self._frame: Frame | None = None
        self._payload = memoryview(b"")
        self._payload_filled = 0
        self._sleeper: Sleeper | None = None

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """Whether something is still queued for sending."""
        return bool(self._under_way or self._words or self._bulk)

    def send(self, frame: Frame, bulk: bool = False, then: Callable[[], None] | None = None) -> None:
        """Send a frame, or queue what the socket does not take now. The payload must stay unchanged until `flush`
        has sent it; `then` is called when it is needed no more. Frames in `bulk` keep their order, and let others
        overtake them."""
        payload = memoryview(frame.payload).cast("B")
        header = memoryview(_pack(frame, len(payload)))
        rest = [header, payload] if len(payload) else [header]
        (self._bulk if bulk else self._words).append(_Outgoing(frame, rest, then))
        self.flush()

    def withdraw(self, is_unwanted: Callable[[Frame], bool]) -> None:
        """Do not send such frames of the bulk, as far as they are still queued."""
        queued, self._bulk = self._bulk, deque()
        for each in queued:
            if is_unwanted(each.frame):
                each.done()
            else:
                self._bulk.append(each)

    def flush(self) -> None:
        """Send as much of the queue as the socket takes now."""
        try:
            while self.sending:
                if self._under_way is None:
                    self._under_way = (self._words or self._bulk).popleft()
                rest = self._under_way.rest
                sent = self._socket.sendmsg(rest)
                self.moved_at = time.monotonic()
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if rest:
                    rest[0] = rest[0][sent:]
                else:
                    self._under_way.done()
                    self._under_way = None
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError) as error:
            raise LinkError(_GONE) from error
        except OSError as error:
            raise LinkError(f"the link broke while sending: {error}") from error

    def receive_ready(self) -> Iterator[Frame]:
        """The frames that can be completed without waiting. Raises LinkError at the end of the link."""
        while True:
            try:
                frame = self._receive_some()
            except BlockingIOError:
                return
            except ConnectionResetError as error:
                raise LinkError(_GONE) from error
            except OSError as error:
                raise LinkError(f"the link broke while receiving: {error}") from error
            if frame is not None:
                yield frame

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        while True:
            frame = next(self.receive_ready(), None)
            if frame is not None:
                return frame
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return None
            if self._sleeper is not None and not self.sending:
                self._sleeper.sleep(remaining)
                continue
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self.sending else 0))
            poll.poll(None if remaining is None else remaining * 1000)
            if self.sending:
                self.flush()

    def _receive_some(self) -> Frame | None:
        if self._frame is None:
            count = self._socket.recv_into(memoryview(self._header)[self._header_filled :])
            self._header_filled += self._came(count)
            if self._header_filled < _HEADER.size:
                return None
            self._header_filled = 0
            frame, num_bytes = _unpack(self._header)
            if frame.kind is not Kind.ALIVE:
                self.moved_at = self.heard_at
            if not self.proven and num_bytes > _MAX_UNPROVEN_BYTES:
                raise LinkError(f"a peer that has not proved itself announced {num_bytes} bytes")
            if num_bytes == 0:
                return frame
            place = self.sink(frame) if self.sink is not None and self.proven else None
            if place is not None and len(place) != num_bytes:
                raise LinkError(f"a {frame.kind.name} frame brings {num_bytes} bytes where {len(place)} were expected")
            self._frame = frame
            self._payload = memoryview(bytearray(num_bytes)) if place is None else place
            self._payload_filled = 0
        end = min(len(self._payload), self._payload_filled + _RECEIVE_CHUNK)
        count = self._socket.recv_into(self._payload[self._payload_filled : end])
        self._payload_filled += self._came(count)
        self.moved_at = self.heard_at
        if self._payload_filled < len(self._payload):
            return None
        frame, self._frame = self._frame, None
        frame.payload = self._payload
        return frame

    def _came(self, count: int) -> int:
        """So many bytes came; none is the end of the link."""
        if count == 0:
            raise LinkError(_GONE)
        self.heard_at = time.monotonic()
        return count

    def send_descriptors(self, descriptors: list[int]) -> None:
        """Hand file descriptors to the other end (Unix sockets only)."""
        self._socket.setblocking(True)
        try:
            while self.sending:
                self.flush()
            for first in range(0, len(descriptors), _MOST_DESCRIPTORS):
                socket.send_fds(self._socket, [b"D"], descriptors[first : first + _MOST_DESCRIPTORS])
        except OSError as error:
            raise LinkError(f"the link broke while handing over memory: {error}") from error
        finally:
            self._socket.setblocking(False)

    def receive_descriptors(self, count: int, timeout_s: float) -> list[int]:
        """Take `count` file descriptors that the other end hands over."""
        self._socket.settimeout(timeout_s)
        descriptors: list[int] = []
        try:
            while len(descriptors) < count:
                most = min(count - len(descriptors), _MOST_DESCRIPTORS)
                message, more, _, _ = socket.recv_fds(self._socket, 1, most)
                descriptors += more
                if message != b"D" or len(more) != most:
                    raise LinkError(f"expected {count} shared buffers, got {len(descriptors)}")
        except OSError as error:
            raise LinkError(f"the link broke while taking over memory: {error}") from error
        finally:
            self._socket.setblocking(False)
        return descriptors

    def wait_for(self, bell: Doorbell, rank: int) -> None:
        """From now on, `receive` sleeps until this is rung, not until bytes arrive. `rank` is the worker's."""
        self._sleeper = Sleeper(bell, self._socket, rank)

    def close(self) -> None:
        if self._sleeper is not None:
            self._sleeper.close()
            self._sleeper = None
        self._socket.close()


def _pack(frame: Frame, num_bytes: int) -> bytes:
    return _HEADER.pack(
        frame.kind, frame.first, frame.stop, frame.incarnation, frame.slot, frame.version, frame.round, frame.step,
        frame.read, frame.samples, frame.data_bytes, frame.loss, frame.weight, frame.squares, frame.data_s,
        frame.compute_s, num_bytes,
    )  # fmt: skip


def _unpack(header: bytearray) -> tuple[Frame, int]:
    kind, *fields, size = _HEADER.unpack(header)
    (
        first,
        stop,
        incarnation,
        slot,
        version,
        round_,
        step,
        read,
        samples,
        data_bytes,
        loss,
        weight,
        squares,
        data_s,
        compute_s,
    ) = fields
    try:
        kind = Kind(kind)
    except ValueError as error:
        raise LinkError(f"a frame of unknown kind {kind} came: the other end is not a distrain worker") from error
    return (
        Frame(
            kind,
            round_,
            step,
            first,
            stop,
            incarnation,
            slot,
            version,
            read,
            samples,
            data_bytes,
            loss,
            weight,
            squares,
            data_s,
            compute_s,
        ),
        size,
    )


def _proof(token: str, challenge: bytes) -> str:
    return hmac.new(token.encode(), challenge, hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Address:
    """Where a server listens. `unix` is an abstract name (no file), good on its own Ray node; `tcp` elsewhere."""

    unix: str
    tcp: tuple[str, int] | None = None


def connect(
    address: Address, same_node: bool, token: str, hello: dict[str, Any], timeout_s: float = 30.0
) -> SocketLink:
    """Open a worker's link to the server and introduce it.

    Raises LinkError when nobody listens there or the challenge does not come.
    """
    try:
        if same_node:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect("\0" + address.unix)
        elif address.tcp is None:
            raise LinkError("the server listens on its own host only, and this worker runs on another")
        else:
            sock = socket.create_connection(address.tcp, timeout=timeout_s)
    except OSError as error:
        where = address.unix if same_node else address.tcp
        raise LinkError(f"cannot reach the parameter server at {where}: {error}") from error
    link = SocketLink(sock)
    challenge = link.receive(timeout_s)
    if challenge is None or challenge.kind is not Kind.CHALLENGE:
        raise LinkError("the parameter server did not answer with a challenge")
    proof = _proof(token, bytes(challenge.payload))
    link.send(Frame(Kind.HELLO, payload=json.dumps({**hello, "proof": proof}).encode()))
    return link


class Hub:
    """The server's, or a relay's, end of all its links: listens, authenticates, and waits for whatever comes next.

    `host` is the address to listen on for workers of other hosts, `port` its port (0: any that is free); without
    `host`, it listens on a Unix socket only. Workers of this host that wait for `bell` are woken together, by `ring` or
    the next `poll` after their frames were sent.
    """

    def __init__(self, token: str, host: str | None = None, port: int = 0) -> None:
        self._token = token
        self._selector = selectors.DefaultSelector()
        name = f"distrain-{secrets.token_hex(8)}"
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind("\0" + name)  # abstract: leaves no file behind
        self._listeners = [unix]
        tcp = None
        if host is not None:
            self._listeners.append(socket.create_server((host, port)))
            tcp = (host, self._listeners[1].getsockname()[1])
        for listener in self._listeners:
            listener.listen()
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        self.address = Address(name, tcp)
        self._links: set[SocketLink] = set()
        self._challenges: dict[SocketLink, tuple[bytes, float]] = {}
        self._queued: set[SocketLink] = set()
        self.bell = Doorbell()
        self._is_news = False  # a frame was sent on this host since the bell was rung

    def poll(self, timeout_s: float) -> list[tuple[SocketLink, Frame | LinkError]]:
        """Wait up to `timeout_s` for frames of proven workers, or the end of their links.

        A link's first frame is its HELLO, already checked against the token.
        """
        happened: list[tuple[SocketLink, Frame | LinkError]] = []
        self.ring()
        for key, events in self._selector.select(timeout_s):
            if key.fileobj in self._listeners:
                self._accept(key.fileobj)
                continue
            link = key.fileobj
            assert isinstance(link, SocketLink)
            if events & selectors.EVENT_WRITE:
                self._guard(link, link.flush, happened)
                self._is_news |= link.shared
            if events & selectors.EVENT_READ and link in self._links:
                self._guard(link, partial(self._read, link, happened), happened)
        self._drop_silent_strangers()
        self._watch_writers()
        return happened

    def send(self, link: SocketLink, frame: Frame, bulk: bool = False, then: Callable[[], None] | None = None) -> None:
        """Send, or queue and go on in `poll`. A broken link is not an error here: `poll` reports its end."""
        try:
            link.send(frame, bulk, then)
        except LinkError:
            return
        self._is_news |= link.shared
        if link.sending:
            self._watch_writers(link)

    def ring(self) -> None:
        """Wake the workers of this host, if frames were sent to any since the last time."""
        if self._is_news:
            self._is_news = False
            self.bell.ring()

    def adopt(self, link: SocketLink) -> None:
        """Watch a link that this end has opened, and that is proven, as well."""
        self._links.add(link)
        self._selector.register(link, selectors.EVENT_READ)
        if link.sending:
            self._watch_writers(link)

    def drop(self, link: SocketLink) -> None:
        """Close a link for good."""
        if link in self._links:
            self._links.discard(link)
            self._challenges.pop(link, None)
            self._queued.discard(link)
            self._selector.unregister(link)
            link.close()

    def close(self) -> None:
        """Close every link and stop listening."""
        deadline = time.monotonic() + 2.0
        for link in list(self._links):
            while link.sending and time.monotonic() < deadline:
                self.bell.ring()
                try:
                    link.flush()
                except LinkError:
                    break
                time.sleep(0.001)
            self.drop(link)
        self.ring()
        self.bell.close()
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        link = SocketLink(sock)
        link.proven = False
        challenge = secrets.token_bytes(32)
        self._challenges[link] = (challenge, time.monotonic() + _HANDSHAKE_SECONDS)
        self._links.add(link)
        self._selector.register(link, selectors.EVENT_READ)
        self.send(link, Frame(Kind.CHALLENGE, payload=challenge))

    def _read(self, link: SocketLink, happened: list[tuple[SocketLink, Frame | LinkError]]) -> None:
        for frame in link.receive_ready():
            if not link.proven:
                self._check_proof(link, frame)
            happened.append((link, frame))

    def _check_proof(self, link: SocketLink, frame: Frame) -> None:
        challenge, _ = self._challenges.pop(link)
        proof = str(frame.json().get("proof", "")) if frame.kind is Kind.HELLO else ""
        given = proof.encode(errors="surrogatepass")  # JSON has code points that UTF-8 has not
        if not hmac.compare_digest(given, _proof(self._token, challenge).encode()):
            raise LinkError("a peer could not prove that it holds this run's token")
        link.proven = True

    def _guard(
        self, link: SocketLink, action: Callable[[], None], happened: list[tuple[SocketLink, Frame | LinkError]]
    ) -> None:
        try:
            action()
        except LinkError as error:
            if link.proven:
                happened.append((link, error))
            self.drop(link)

    def _drop_silent_strangers(self) -> None:
        now = time.monotonic()
        for link in [link for link, (_, deadline) in self._challenges.items() if now > deadline]:
            self.drop(link)

    def _watch_writers(self, *more: SocketLink) -> None:
        """Ask the selector to say when a link with queued bytes can take more."""
        self._queued.update(more)
        for link in list(self._queued):
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.sending else 0)
            self._selector.modify(link, wanted)
            if not link.sending:
                self._queued.discard(link)
