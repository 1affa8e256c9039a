"""A relay: what a host other than the server's has one of.

It hands its workers the parameters in this host's shared memory, which come once a step; passes the server's tasks on
and the workers' words back; and adds their gradients up, so that one sum a step leaves the host. To its workers it
looks like the server. Where the run has several slices, a relay may own one: it is then a parameter server of that
part of the vector, to which the relays of all hosts send their spans, and which sends its parameters to each of them.
"""

from __future__ import annotations

import itertools
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distrain.errors import DivergenceError, LinkError, TrainingDataError
from distrain.exchange.link import Address, Frame, Hub, Kind, SocketLink, connect, pushes_digest, unpack_integers
from distrain.exchange.memory import Layout, Published, PushSlots
from distrain.exchange.slices import Span, cut
from distrain.exchange.state import pack_state, unpack_state
from distrain.exchange.wire import Wire
from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer
from distrain.reduction import Block, Partial, TreeSum
from distrain.server.hosts import PARAMETERS, partial_of, sum_frame
from distrain.server.parameter_server import ParameterServer

_POLL_SECONDS = 0.25
_CONNECTING_SECONDS = 0.01  # between looks at links that are being opened
_REMEMBERED = 8  # rounds whose pushes are kept, beyond those in flight


@dataclass(eq=False)
class _Worker:
    """A worker of this host that the server has taken in."""

    incarnation: int
    link: SocketLink
    slots: PushSlots


@dataclass(eq=False)
class _Work:
    """What the workers of this host do in a round of `count` places. A push is (incarnation, slot, first, stop)."""

    step: int
    count: int
    slots: int  # the set of push slots that it uses
    owed: dict[tuple[int, int], int] = field(default_factory=dict)  # (incarnation, first place) -> stop
    said: dict[tuple[int, int], Frame] = field(default_factory=dict)  # (incarnation, first place) -> its push
    waiting: list[tuple[int, ...]] = field(default_factory=list)  # pushes that no sum was made of
    ahead: list[frozenset[tuple[int, ...]]] = field(default_factory=list)  # pushes of sums that were sent ahead
    memory: list[memoryview] = field(default_factory=list)  # of such sums

    @property
    def is_disjoint(self) -> bool:
        """Whether no place was pushed twice, by a worker and its helper."""
        ordered = sorted((first, stop) for _, _, first, stop in self.waiting)
        return all(stop <= first for (_, stop), (first, _) in itertools.pairwise(ordered))


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
        self._hub = Hub(token, ip if slice_ is not None else None)
        self._arrived: dict[tuple[int, int], int] = {}  # (slice, version) -> the update whose parameters are here
        self._owners: dict[int, SocketLink] = {}  # by slice, but for our own
        self._peers: set[SocketLink] = set()  # relays of other hosts, if we own a slice
        self._strangers: list[SocketLink] = []  # peers that came before we had anything to send
        self._opened: queue.SimpleQueue[tuple[int, SocketLink | LinkError]] = queue.SimpleQueue()
        self._to_open = 0
        self._is_ready = False
        self._hellos: deque[tuple[SocketLink, Frame]] = deque()  # of workers that came before we were ready
        self._channels: dict[int, SocketLink] = {}  # workers that the server has yet to take in
        self._numbers = itertools.count()
        self._workers: dict[int, _Worker] = {}
        self._by_link: dict[SocketLink, _Worker] = {}
        self._remains: dict[int, tuple[PushSlots, int]] = {}  # of workers that are gone: their slots, the newest round
        self._tasks: list[Frame] = []  # whose parameters are not all here
        self._work: dict[int, _Work] = {}  # by round
        self._sums: dict[int, dict[tuple[int, int, int], Partial]] = {}  # round -> (host, first place, stop) -> sum
        self._lent: dict[int, list[memoryview]] = {}  # round -> buffers of such sums
        self._shared: Any = None
        self._stash: deque[tuple[SocketLink, Frame | LinkError]] = deque()

    @property
    def address(self) -> Address:
        """Where this host's workers find it."""
        return self._hub.address

    def join(self, server: Address, timeout_s: float = 60.0) -> None:
        """Join the server. Raises LinkError when it cannot be reached or built another model."""
        hello = {"relay": True, "slice": self._slice, "tcp": self._hub.address.tcp, "layout": self._layout.digest}
        link = connect(server, False, self._token, hello)
        welcome = link.receive(timeout_s)
        if welcome is None or welcome.kind is not Kind.WELCOME:
            raise LinkError("the parameter server did not welcome this relay in time")
        self.number = int(welcome.json()["host"])
        self._num_sets = welcome.slot
        if self._server is not None:
            self._published = self._server.published
            self._server.share = self._share
        else:
            self._published = [Published(self._layout) for _ in range(welcome.version)]
        link.sink = self._place
        self._control = link
        self._owners[len(self._spans) - 1] = link
        self._hub.adopt(link)

    def run(self) -> None:
        """Serve until the server says stop. Raises LinkError when it goes away."""
        try:
            while True:
                self._adopt_opened()
                for link, what in self._events(_CONNECTING_SECONDS if self._to_open else _POLL_SECONDS):
                    self._handle(link, what)
        except _Over:
            pass
        finally:
            for worker in self._workers.values():
                self._hub.send(worker.link, Frame(Kind.STOP))
            self._hub.close()

    def _events(self, timeout_s: float) -> list[tuple[SocketLink, Frame | LinkError]]:
        waiting = list(self._stash)
        self._stash.clear()
        return waiting + self._hub.poll(0.0 if waiting else timeout_s)

    def _handle(self, link: SocketLink, what: Frame | LinkError) -> None:
        if link is self._control:
            if isinstance(what, LinkError):
                raise what
            self._from_server(what)
        elif isinstance(what, LinkError):
            self._gone(link)
        elif what.kind is Kind.HELLO:
            self._hello(link, what)
        elif what.kind is Kind.SUM:
            self._take_sum(what)
        elif what.kind is Kind.PUBLISH:
            self._take_parameters(what)
        elif link in self._by_link:
            self._from_worker(self._by_link[link], what)

    # The server's words

    def _from_server(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.TRAIN | Kind.CHECK | Kind.VALIDATE:
                if frame.kind is not Kind.VALIDATE:
                    self._note_task(frame)
                self._tasks.append(frame)
                self._pass_tasks_on()
            case Kind.COMBINE:
                self._combine(frame)
            case Kind.PUBLISH:
                self._take_parameters(frame)
            case Kind.SUM:
                self._take_sum(frame)
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
            self._server.schedule.load_state_dict(state["schedule"])

    def _state(self, frame: Frame) -> bytes:
        """Our slice's parameters, or the optimizer's state of them."""
        assert self._server is not None and self._slice is not None
        if frame.slot == PARAMETERS:
            span = self._spans[self._slice]
            return pack_state({"current": self._server.current.floats[span.start : span.stop]}, {})
        return pack_state(*pack_optimizer(self._server.optimizer))

    # Workers

    def _hello(self, link: SocketLink, frame: Frame) -> None:
        if "relay" in frame.json():
            link.sink = self._place
            self._peers.add(link)
            self._strangers.append(link)
            self._greet()
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
        slots = PushSlots(self._layout, self._num_shards, self._num_sets)
        worker = _Worker(frame.incarnation, link, slots)
        self._workers[frame.incarnation] = self._by_link[link] = worker
        welcome = Frame(Kind.WELCOME, incarnation=frame.incarnation, version=len(self._published), slot=slots.num_sets)
        try:
            link.send(welcome)
            link.send_descriptors(
                [*(vector.buffer.fd for vector in self._published), slots.buffer.fd, *self._hub.bell.fds]
            )
        except LinkError:
            self._gone(link)
        slots.buffer.close()

    def _note_task(self, frame: Frame) -> None:
        """A worker owes gradients."""
        if frame.round not in self._work:
            for over in [work for work in self._work.values() if work.slots == frame.slot]:
                while over.memory:  # its round is over, since its slots are free
                    self._wire.pool.give(over.memory.pop())
            self._work[frame.round] = _Work(frame.step, frame.samples, frame.slot)
            while len(self._work) > self._num_sets + _REMEMBERED:
                del self._work[min(self._work)]
        self._work[frame.round].owed[frame.incarnation, frame.first] = frame.stop

    def _from_worker(self, worker: _Worker, frame: Frame) -> None:
        frame.incarnation = worker.incarnation
        self._hub.send(self._control, frame)
        work = self._work.get(frame.round)
        if frame.kind is not Kind.PUSH or len(frame.payload) or work is None:  # metrics, or of a round long over
            return
        work.said[worker.incarnation, frame.first] = frame
        work.waiting.append((worker.incarnation, frame.slot, frame.first, frame.stop))
        for (incarnation, first), stop in list(work.owed.items()):
            if incarnation == worker.incarnation and stop == frame.stop:
                del work.owed[incarnation, first]
        if not work.owed and work.is_disjoint:
            self._sum_ahead(frame.round)

    def _gone(self, link: SocketLink) -> None:
        """A link has ended."""
        self._peers.discard(link)
        if (worker := self._by_link.get(link)) is not None:
            self._forget(worker)
            self._hub.send(self._control, Frame(Kind.LEFT, incarnation=worker.incarnation))
        for channel in [channel for channel, other in self._channels.items() if other is link]:
            del self._channels[channel]
        self._hellos = deque(hello for hello in self._hellos if hello[0] is not link)

    def _forget(self, worker: _Worker) -> None:
        """Close a worker's link. Its slots stay for as long as something that it pushed may be wanted."""
        self._remains[worker.incarnation] = (worker.slots, max(self._work, default=0))
        del self._workers[worker.incarnation], self._by_link[worker.link]
        self._hub.drop(worker.link)

    # Parameters

    def _place(self, frame: Frame) -> memoryview | None:
        """Where a payload goes."""
        if frame.kind is Kind.PUBLISH:
            return self._wire.parameters(self._published[frame.version], self._span_of(frame))
        if frame.kind is Kind.SUM and self._slice is not None:
            return self._wire.pool.take(self._wire.sum_bytes(self._spans[self._slice]))
        return None

    def _span_of(self, frame: Frame) -> Span:
        return Span(self._spans[frame.first].start, self._spans[frame.stop - 1].stop)

    def _take_parameters(self, frame: Frame) -> None:
        self._wire.unpack_parameters(self._published[frame.version], self._span_of(frame))
        for slice_ in range(frame.first, frame.stop):
            self._arrived[slice_, frame.version] = frame.read
        self._greet()
        self._pass_tasks_on()

    def _pass_tasks_on(self) -> None:
        """Give workers the tasks whose parameters are all here."""
        waiting = []
        for frame in self._tasks:
            if any(self._arrived.get((s, frame.version)) != frame.read for s in range(len(self._spans))):
                waiting.append(frame)
            elif (worker := self._workers.get(frame.incarnation)) is not None:
                self._hub.send(worker.link, frame)
        self._tasks = waiting

    def _greet(self) -> None:
        """Send the parameters of our slice to hosts that have just come, once we have them."""
        versions = [version for slice_, version in self._arrived if slice_ == self._slice]
        while versions and self._strangers:
            link = self._strangers.pop()
            for version in versions:
                self._send_parameters(link, version)

    def _send_parameters(self, link: SocketLink, version: int) -> None:
        assert self._slice is not None
        span, read = self._spans[self._slice], self._arrived[self._slice, version]
        payload = self._wire.parameters(self._published[version], span)
        self._hub.send(
            link,
            Frame(Kind.PUBLISH, first=self._slice, stop=self._slice + 1, version=version, read=read, payload=payload),
        )

    # Gradients

    def _sum_ahead(self, round_: int) -> None:
        """Add up what the workers of this host have pushed, who owe nothing more, before the server says that it
        counts: its word may be long on its way, behind the sums of others. It hardly ever says anything else."""
        work = self._work[round_]

        def fresh() -> Tensor:
            work.memory.append(self._wire.pool.take(self._layout.vector_bytes))
            return torch.frombuffer(work.memory[-1], dtype=torch.float32)

        work.ahead.append(frozenset(work.waiting))
        self._send_sums(round_, work.step, work.waiting, fresh)
        work.waiting = []

    def _combine(self, frame: Frame) -> None:
        """Add up the pushes that count, as far as that was not done ahead. Sums that were made of others as well are
        not asked for."""
        work, rows = self._work[frame.round], set(unpack_integers(frame, 4))
        for done in work.ahead:
            rows -= done if done <= rows else set()
        if rows:
            work.waiting = [row for row in work.waiting if row not in rows]
            self._send_sums(frame.round, frame.step, sorted(rows))
        for incarnation in [i for i, (_, newest) in self._remains.items() if newest + self._num_sets < frame.round]:
            del self._remains[incarnation]

    def _send_sums(
        self, round_: int, step: int, rows: Sequence[tuple[int, ...]], fresh: Callable[[], Tensor] | None = None
    ) -> None:
        """Add pushes up, and send each owner its span of the sums. The pushes stay as they are where `fresh` gives
        vectors for sums."""
        work = self._work[round_]
        tree = TreeSum(work.count, self._wire.rounding(step), fresh)
        for incarnation, slot, first, stop in rows:
            worker = self._workers.get(incarnation)
            part = partial_of(work.said[incarnation, first])
            part.vector = (worker.slots if worker is not None else self._remains[incarnation][0])[slot]
            tree.put(Block(first, stop), part)
        for block, part in tree:
            digest = pushes_digest(row for row in rows if block.first <= row[2] < block.stop)
            for slice_, span in enumerate(self._spans):
                if slice_ == self._slice:
                    own = Partial(part.vector[span.start : span.stop], part.samples, part.loss, part.weight)
                    self._add(round_, self.number, block, digest, own)
                else:
                    owner = self._owners[slice_]
                    payload = self._wire.pack_sum(part.vector, span, owner)
                    self._hub.send(owner, sum_frame(round_, self.number, block, digest, part, payload))

    def _take_sum(self, frame: Frame) -> None:
        assert self._slice is not None
        part = partial_of(frame)
        part.vector, memory = self._wire.unpack_sum(frame.payload, self._spans[self._slice])
        self._lent.setdefault(frame.round, []).append(memory)
        self._add(frame.round, frame.slot, Block(frame.first, frame.stop), frame.read, part)

    def _add(self, round_: int, host: int, block: Block, digest: int, part: Partial) -> None:
        """A host's sum over our slice is here."""
        self._sums.setdefault(round_, {})[host, block.first, block.stop] = part
        arrived = Frame(Kind.ARRIVED, round_, first=block.first, stop=block.stop, slot=host, read=digest)
        self._hub.send(self._control, arrived)

    def _apply(self, frame: Frame) -> None:
        """Update our slice with a round's sums, and send its parameters to every host."""
        assert self._server is not None and self._slice is not None
        sums = self._sums.pop(frame.round, {})
        tree = TreeSum(frame.samples, self._wire.rounding(frame.step - 1, self._spans[self._slice].start))
        for key in unpack_integers(frame, 3):
            host, first, stop = key
            tree.put(Block(first, stop), sums[host, first, stop])
        halves = tree.fold()
        try:
            if any(half.samples for half in halves):
                self._server.apply(halves, frame.step)
            else:  # all of it was skipped
                self._server.skip(frame.step)
        except (DivergenceError, TrainingDataError):  # the server finds the same, and says what follows
            return
        version = frame.step % len(self._published)
        self._arrived[self._slice, version] = frame.step
        for link in (self._control, *self._peers):
            self._send_parameters(link, version)
        for earlier in [round_ for round_ in self._sums if round_ < frame.round]:
            del self._sums[earlier]
        for earlier in [round_ for round_ in self._lent if round_ <= frame.round]:
            for payload in self._lent.pop(earlier):
                self._wire.pool.give(payload)
        self._pass_tasks_on()

    def _share(self, values: list[float]) -> list[float]:
        """Send the server our slice's values, and wait for those of all slices."""
        self._hub.send(self._control, Frame(Kind.SHARE, payload=struct.pack(f"<{len(values)}d", *values)))
        while self._shared is None:
            for link, what in self._hub.poll(_POLL_SECONDS):
                is_end = link is self._control and (isinstance(what, LinkError) or what.kind is Kind.STOP)
                if is_end or (isinstance(what, Frame) and what.kind in (Kind.SHARE, Kind.SUM, Kind.PUBLISH)):
                    self._handle(link, what)
                else:
                    self._stash.append((link, what))
        payload, self._shared = bytes(self._shared), None
        return list(struct.unpack(f"<{len(payload) // 8}d", payload))
