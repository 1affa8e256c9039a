"""A relay: what a host other than the server's has one of.

It hands its workers the parameters in this host's shared memory, which come once a step; passes the server's tasks on
and the workers' words back; and adds their gradients up, so that one sum a step leaves the host. To its workers it
looks like the server. Where the run has several slices, a relay may own one: it is then a parameter server of that
part of the vector, to which all hosts send their spans, and which sends its parameters to each of them.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from distrain.errors import DivergenceError, LinkError
from distrain.exchange.host_sums import HostSums
from distrain.exchange.layout import Layout, Span
from distrain.exchange.link import (
    Address,
    Frame,
    Hub,
    Kind,
    SocketLink,
    connect,
    pack_values,
    rows_digest,
    unpack_integers,
    unpack_values,
)
from distrain.exchange.memory import Published, PushSlots
from distrain.exchange.slices import cut
from distrain.exchange.state import pack_state, unpack_state
from distrain.exchange.sums import Key, send_parameters, withdraw_parameters
from distrain.exchange.wire import Wire
from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer
from distrain.server.hosts import AVERAGED, PARAMETERS
from distrain.server.parameter_server import ParameterServer
from distrain.server.slice_sums import SliceSums

_POLL_SECONDS = 0.25
_ALIVE_SECONDS = 0.5  # between signs of life
_CONNECTING_SECONDS = 0.01  # between looks at links that are being opened
_SUMS = (Kind.OPEN, Kind.PIECE, Kind.VOID, Kind.SUM)
_EXCHANGE = (Kind.SHARE, Kind.PUBLISH, *_SUMS)  # what is dealt with while an update waits


@dataclass(eq=False)
class _Worker:
    """A worker of this host that the server has taken in."""

    incarnation: int
    link: SocketLink


class _Over(Exception):
    """The run is over."""


class Relay:
    """Serves the workers of one host until the server says stop.

    `server` is the parameter server of slice `slice_` of `num_slices`, where this relay owns one; it then listens for
    other hosts' relays at the address `ip`. `wire` is the run's (default: float32).
    """

    def __init__(
        self,
        layout: Layout,
        num_shards: int,
        token: str,
        ip: str | None = None,
        slice_: int | None = None,
        num_slices: int = 1,
        server: ParameterServer | None = None,
        wire: Wire | None = None,
    ) -> None:
        assert (slice_ is None) == (server is None)
        self._wire = server.wire if server is not None else wire or Wire(layout)
        self._layout, self._num_shards, self._token = layout, num_shards, token
        self._slice, self._server = slice_, server
        self._spans = cut(layout, num_slices)
        self._slice_sums = SliceSums(server, is_ahead=True, done=self._tell_norm) if server is not None else None
        self._hub = Hub(token, ip if slice_ is not None else None)
        self._arrived: dict[tuple[int, int], int] = {}  # (slice, version) -> the update whose parameters are here
        self._owners: dict[int, SocketLink] = {}  # by slice, but for our own
        self._host_sums = HostSums(layout, self._wire, self._hub, num_slices, slice_, self._owners, self._take_of_sum)
        self._peers: dict[SocketLink, int] = {}  # relays of other hosts, if we own a slice, and their numbers
        self._opened: queue.SimpleQueue[tuple[int, SocketLink | LinkError]] = queue.SimpleQueue()
        self._to_open = 0
        self._is_ready = False
        self._hellos: deque[tuple[SocketLink, Frame]] = deque()  # of workers that came before we were ready
        self._channels: dict[int, SocketLink] = {}  # workers that the server has yet to take in
        self._numbers = itertools.count()
        self._workers: dict[int, _Worker] = {}
        self._by_link: dict[SocketLink, _Worker] = {}
        self._tasks: list[Frame] = []  # whose parameters are not all here
        self._shared: Any = None  # payload of a SHARE
        self._waiting: deque[tuple[SocketLink, Frame | LinkError]] = deque()  # what has come
        self._said_at = 0.0  # time.monotonic() of the last sign of life

    @property
    def address(self) -> Address:
        """Where this host's workers find it."""
        return self._hub.address

    def join(self, server: Address, launch: int = 0, timeout_s: float = 60.0) -> None:
        """Join the server. `launch` tells processes apart, workers' included. Raises LinkError when it cannot be
        reached or built another model."""
        hello = {
            "relay": True,
            "launch": launch,
            "slice": self._slice,
            "tcp": self._hub.address.tcp,
            "layout": self._layout.digest,
        }
        link = connect(server, False, self._token, hello)
        welcome = link.receive(timeout_s)
        if welcome is None or welcome.kind is not Kind.WELCOME:
            raise LinkError("the parameter server did not welcome this relay in time")
        self.number = self._host_sums.number = int(welcome.json()["host"])
        self._host_sums.num_sets = welcome.slot
        if self._server is not None:
            self._published = self._server.readable
            self._server.share, self._server.publish = self._share, self._send_parameters
        else:
            self._published = [Published(self._layout) for _ in range(welcome.version)]
        link.sink = self._place
        self._control = link
        self._owners[len(self._spans) - 1] = link
        self._hub.adopt(link)

    def run(self) -> None:
        """Serve until the server says stop, and pass that on. Raises LinkError when it goes away: workers then see this
        end go, as that of a host that is lost."""
        try:
            while True:
                self._say_alive()
                self._adopt_opened()
                self._waiting.extend(self._hub.poll(_CONNECTING_SECONDS if self._to_open else _POLL_SECONDS))
                while self._waiting:
                    self._handle(*self._waiting.popleft())
                    self._say_alive()
        except _Over:
            for worker in self._workers.values():
                self._hub.send(worker.link, Frame(Kind.STOP))
        finally:
            self._hub.close()

    def _say_alive(self) -> None:
        now = time.monotonic()
        if now - self._said_at > _ALIVE_SECONDS:
            self._said_at = now
            self._hub.send(self._control, Frame(Kind.ALIVE, incarnation=-1))

    def _handle(self, link: SocketLink, what: Frame | LinkError) -> None:
        if link is self._control:
            if isinstance(what, LinkError):
                raise what
            self._from_server(what)
        elif isinstance(what, LinkError):
            self._gone(link)
        elif what.kind is Kind.HELLO:
            self._hello(link, what)
        elif what.kind in _SUMS:
            self._take_of_sum(what)
        elif what.kind is Kind.PUBLISH:
            self._take_parameters(what)
        elif link in self._by_link:
            self._from_worker(self._by_link[link], what)

    # The server's words

    def _from_server(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.TRAIN | Kind.CHECK | Kind.VALIDATE:
                if frame.kind is not Kind.VALIDATE:
                    self._host_sums.asked(frame)
                self._tasks.append(frame)
                self._pass_tasks_on()
            case Kind.COMBINE:
                self._host_sums.combine(frame.round, unpack_integers(frame, 4))
            case Kind.PUBLISH:
                self._take_parameters(frame)
            case Kind.OPEN | Kind.PIECE | Kind.VOID | Kind.SUM:
                self._take_of_sum(frame)
            case Kind.APPLY:
                self._apply(frame)
            case Kind.SHARE:
                self._shared = frame.payload
            case Kind.WELCOME:
                self._welcome(frame)
            case Kind.LEFT:
                if (worker := self._workers.get(frame.incarnation)) is not None:
                    self._forget(worker)
            case Kind.STOP:
                if frame.incarnation < 0:
                    raise _Over
                if (worker := self._workers.get(frame.incarnation)) is not None:
                    self._hub.send(worker.link, frame)
            case Kind.ROSTER:
                self._open_links(frame)
            case Kind.STATE:
                self._restore(frame)
            case Kind.COLLECT:
                assert self._server is not None
                self._hub.send(self._control, Frame(Kind.STATE, payload=self._state(frame)))
            case Kind.VALIDATED:
                assert self._server is not None
                self._server.schedule.validated(frame.loss)
            case _:
                raise LinkError(f"a relay cannot answer a {frame.kind.name} frame")

    def _open_links(self, frame: Frame) -> None:
        """Open a link to the owner of each slice. Off this thread, since two relays may do so with each other."""
        owners = [(slice_, Address("", (ip, port))) for slice_, ip, port in frame.json()["owners"]]
        self._to_open = len(owners)

        def open_all() -> None:
            for slice_, address in owners:
                try:
                    link = connect(address, False, self._token, {"relay": self.number})
                except LinkError as error:
                    self._opened.put((slice_, error))
                else:
                    self._opened.put((slice_, link))

        if owners:
            threading.Thread(target=open_all, name="opens links", daemon=True).start()
        else:
            self._ready()

    def _adopt_opened(self) -> None:
        while self._to_open:
            try:
                slice_, link = self._opened.get_nowait()
            except queue.Empty:
                return
            if isinstance(link, LinkError):
                raise link
            link.sink = self._place
            self._owners[slice_] = link
            self._hub.adopt(link)
            self._to_open -= 1
            if not self._to_open:
                self._ready()

    def _ready(self) -> None:
        self._is_ready = True
        self._hub.send(self._control, Frame(Kind.ROSTER))
        while self._hellos:
            self._introduce(*self._hellos.popleft())

    def _restore(self, frame: Frame) -> None:
        """Begin, as the owner of a slice, with the server's parameters, and its state where the run goes on."""
        assert self._server is not None and self._slice is not None
        tensors, state = unpack_state(frame.payload)
        span = self._spans[self._slice]
        self._server.current.floats[span.start : span.stop] = tensors.pop("current")
        if state:
            unpack_optimizer(self._server.optimizer, tensors, state["optimizer"])
            self._server.load_state_dict(state["server"])

    def _state(self, frame: Frame) -> bytes:
        """Our slice's parameters, their averages, or the optimizer's state of them."""
        assert self._server is not None and self._slice is not None
        span = self._spans[self._slice]
        if frame.slot == AVERAGED:
            return pack_state({"averaged": self._server.readable[-1].floats[span.start : span.stop]}, {})
        if frame.slot == PARAMETERS:
            return pack_state({"current": self._server.current.floats[span.start : span.stop]}, {})
        return pack_state(*pack_optimizer(self._server.optimizer))

    # Workers

    def _hello(self, link: SocketLink, frame: Frame) -> None:
        if "relay" in frame.json():
            link.sink = self._place
            self._peers[link] = frame.json()["relay"]
            for version in self._own_versions():
                self._send_own(version, [link])
        elif self._is_ready:
            self._introduce(link, frame)
        else:
            self._hellos.append((link, frame))

    def _introduce(self, link: SocketLink, frame: Frame) -> None:
        """Tell the server of a worker that came."""
        frame.slot = next(self._numbers)
        self._channels[frame.slot] = link
        self._hub.send(self._control, frame)

    def _welcome(self, frame: Frame) -> None:
        """The server has taken a worker in: hand it its buffers."""
        link = self._channels.pop(frame.slot, None)
        if link is None:  # gone meanwhile
            self._hub.send(self._control, Frame(Kind.LEFT, incarnation=frame.incarnation))
            return
        slots = PushSlots(self._layout, self._num_shards, self._host_sums.num_sets)
        self._host_sums.joined(frame.incarnation, slots)
        worker = _Worker(frame.incarnation, link)
        self._workers[frame.incarnation] = self._by_link[link] = worker
        versions = len(self._published)
        welcome = Frame(Kind.WELCOME, incarnation=frame.incarnation, slot=slots.num_sets, version=versions, read=1)
        try:
            link.send(welcome)
            link.send_descriptors(
                [*(vector.buffer.fd for vector in self._published), slots.buffer.fd, *self._hub.bell.fds]
            )
        except LinkError:
            self._gone(link)
        slots.buffer.close()

    def _from_worker(self, worker: _Worker, frame: Frame) -> None:
        frame.incarnation = worker.incarnation
        if frame.kind is Kind.READY:
            self._host_sums.ready(frame)
            return
        self._hub.send(self._control, frame)
        if frame.kind is Kind.PUSH and not len(frame.payload):  # or it is of metrics
            self._host_sums.pushed(frame)

    def _gone(self, link: SocketLink) -> None:
        """A link has ended. Where it led to the owner of a slice, the server gives this host up, unless the run is
        over: the word that it is may still be on its way."""
        for slice_ in [slice_ for slice_, owner in self._owners.items() if owner is link]:
            self._hub.send(self._control, Frame(Kind.LEFT, incarnation=-1, slot=slice_))
        if (number := self._peers.pop(link, None)) is not None and self._slice_sums is not None:
            self._slice_sums.lose(number)
        if (worker := self._by_link.get(link)) is not None:
            self._forget(worker)
            self._hub.send(self._control, Frame(Kind.LEFT, incarnation=worker.incarnation))
        for channel in [channel for channel, other in self._channels.items() if other is link]:
            del self._channels[channel]
        self._hellos = deque(hello for hello in self._hellos if hello[0] is not link)

    def _forget(self, worker: _Worker) -> None:
        """Close a worker's link."""
        self._host_sums.left(worker.incarnation)
        del self._workers[worker.incarnation], self._by_link[worker.link]
        self._hub.drop(worker.link)

    # Parameters

    def _place(self, frame: Frame) -> memoryview | None:
        """Where a payload goes."""
        if frame.kind is Kind.PUBLISH:
            return self._wire.parameters(self._published[frame.version], Span(frame.first, frame.stop))
        if frame.kind is Kind.PIECE and self._slice_sums is not None:
            return self._slice_sums.place(frame)
        return None

    def _take_parameters(self, frame: Frame) -> None:
        self._wire.unpack_parameters(self._published[frame.version], Span(frame.first, frame.stop))
        whole = [slice_ for slice_, span in enumerate(self._spans) if frame.first < span.stop <= frame.stop]
        for slice_ in whole:  # since this was its last piece
            self._arrived[slice_, frame.version] = frame.read
        if self._slice in whole and frame.version in self._own_versions():
            self._send_own(frame.version, list(self._peers))  # the server's, with which we begin
        if whole:
            self._pass_tasks_on()

    def _pass_tasks_on(self) -> None:
        """Give workers the tasks whose parameters are all here, or newer ones: the server then has what they ask for,
        and waits for an answer only."""
        waiting = []
        for frame in self._tasks:
            if any(self._arrived.get((s, frame.version), -1) < frame.read for s in range(len(self._spans))):
                waiting.append(frame)
            elif (worker := self._workers.get(frame.incarnation)) is not None:
                self._hub.send(worker.link, frame)
        self._tasks = waiting

    def _own_versions(self) -> list[int]:
        """Which vectors of our slice's parameters are here, but for the averaged ones, which the server sends."""
        count = len(self._server.published) if self._server is not None else 0
        return [version for slice_, version in self._arrived if slice_ == self._slice and version < count]

    def _send_own(self, version: int, links: Sequence[SocketLink]) -> None:
        assert self._slice is not None
        self._send(version, self._arrived[self._slice, version], self._spans[self._slice], links)

    def _send_parameters(self, step: int, span: Span) -> None:
        """Send parameters of our slice after update `step` to the other hosts."""
        assert self._server is not None
        version, links = self._server.version(step, is_validation=False), [self._control, *self._peers]
        if span.start == self._server.span.start:
            withdraw_parameters(version, links)
        self._send(version, step, span, links)

    def _send(self, version: int, read: int, span: Span, links: Sequence[SocketLink]) -> None:
        send_parameters(self._hub, self._wire, self._published[version], version, read, span, links)

    # Gradients

    def _take_of_sum(self, what: Frame, vector: Tensor | None = None) -> None:
        """A host, or this one, says something of a sum over our slice."""
        assert self._slice_sums is not None
        self._slice_sums.take(what, vector)
        if what.kind is Kind.SUM:
            self._hub.send(self._control, replace(what, kind=Kind.ARRIVED))

    def _tell_norm(self, round_: int, step: int, keys: Collection[Key], squares: list[float]) -> None:
        """Our slice's sums are added up: the server need not ask for their squares, should just these count."""
        told = Frame(Kind.NORM, round_, step, read=rows_digest(keys), payload=pack_values(squares))
        self._hub.send(self._control, told)

    def _apply(self, frame: Frame) -> None:
        """Update our slice with a round's sums, and send its parameters to every host."""
        assert self._server is not None and self._slice is not None and self._slice_sums is not None
        keys = [(host, number) for host, number in unpack_integers(frame, 2, frame.stop)]
        squares = unpack_values(frame.payload[8 * frame.stop :]) or None
        gathered = replace(self._slice_sums.gather(frame.round, frame.first, frame.samples, keys), squares=squares)
        try:
            if any(half.weight for half in gathered.halves):
                self._server.apply(gathered, frame.step, scale=frame.loss)
            else:  # all of it was skipped, or has no weight
                self._server.skip(frame.step)
        except DivergenceError:  # the server finds the same, and says what follows
            return
        finally:
            self._slice_sums.forget(lambda round_: round_ == frame.round or round_ < frame.read)
        for is_validation in (False, True):
            self._arrived[self._slice, self._server.version(frame.step, is_validation)] = frame.step
        self._pass_tasks_on()

    def _share(self, values: list[float]) -> list[float]:
        """Send the server our slice's values, and wait for those of all slices."""
        self._hub.send(self._control, Frame(Kind.SHARE, payload=pack_values(values)))
        later: list[tuple[SocketLink, Frame | LinkError]] = []
        while self._shared is None:
            come = list(self._waiting) or self._hub.poll(_POLL_SECONDS)
            self._waiting.clear()
            for link, what in come:
                is_end = link is self._control and (isinstance(what, LinkError) or what.kind is Kind.STOP)
                if is_end or (isinstance(what, Frame) and what.kind in _EXCHANGE):
                    self._handle(link, what)
                else:
                    later.append((link, what))
        self._waiting.extend(later)
        payload, self._shared = self._shared, None
        return unpack_values(payload)
