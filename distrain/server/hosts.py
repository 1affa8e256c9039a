"""The other hosts of a run, as the server sees them: their relays, the slices they own, and sums on their way.

With one slice, the server owns the whole vector, and each host's relay sends it one sum a step. With k of them, the
server owns the last and k - 1 relays one each; every host, the server's own included, sends each owner its span of the
host's sum. An owner tells the server what has arrived, and the squares of its norm once all has; a sum counts once all
owners have it. Then the server has all of them update, with the squares of all slices, and each sends its parameters to
every host.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from distrain.errors import LinkError, ServerLost, TrainingError
from distrain.exchange.host_sums import HostSums
from distrain.exchange.layout import Span
from distrain.exchange.link import Frame, Hub, Kind, SocketLink, pack_integers, pack_values, rows_digest, unpack_values
from distrain.exchange.slices import cut
from distrain.exchange.state import pack_state, unpack_state
from distrain.exchange.sums import Key, send_parameters, withdraw_parameters
from distrain.learning.optimizer_state import (
    merge_optimizers,
    optimizer_of,
    pack_optimizer,
    unpack_optimizer,
    with_options,
)
from distrain.reduction import Block
from distrain.server.members import Batch, Host
from distrain.server.parameter_server import Gathered, ParameterServer
from distrain.server.slice_sums import SliceSums

_POLL_SECONDS = 0.25
OPTIMIZER, PARAMETERS, AVERAGED = 0, 1, 2  # what COLLECT asks for: its `slot`

Settled = Callable[[Host, int, Batch], None]
"""Told when all owners have the sums of a batch of this round."""


class Hosts:
    """Relays and slices of one run. Raises ServerLost where one that owns a slice is gone: its part of the optimizer's
    state went with it. While it waits for one it calls `check`, which may raise what ends the run."""

    def __init__(
        self,
        server: ParameterServer,
        hub: Hub,
        num_slices: int,
        window: int,
        timeout_s: float,
        settled: Settled,
        open_rounds: Collection[int],
        check: Callable[[], None],
    ) -> None:
        self._server, self._hub, self._window, self._timeout_s = server, hub, window, timeout_s
        self._settled, self._open, self._check = settled, open_rounds, check
        self._wire = server.wire
        self._spans = cut(server.layout, num_slices)
        assert server.span == self._spans[-1]
        self._own = num_slices - 1  # the server's slice
        if num_slices > 1:
            server.share = self._share
        self._owners: dict[int, Host] = {}  # by slice, without the server's own
        self._links: dict[int, SocketLink] = {}  # to them
        self.local: Host | None = None
        if num_slices > 1:
            self.local = Host(0, None, slice=self._own)
            self.local.sums = HostSums(
                server.layout,
                self._wire,
                hub,
                num_slices,
                self._own,
                self._links,
                partial(self._take, self.local),
                window,
            )
        self._by_link: dict[SocketLink, Host] = {}
        self._by_number: dict[int, Host] = {} if self.local is None else {0: self.local}
        self._numbers = 0
        self._stash: deque[tuple[SocketLink, Frame | LinkError]] = deque()
        self.slice_sums = SliceSums(server, is_ahead=num_slices > 1)
        self._counted: dict[int, list[Key]] = {}  # by round: sums
        self._early: dict[int, list[tuple[int, Host, Frame]]] = {}  # by round: (slice, host, sum) ahead of its pushes
        self._looked_at = 0.0  # time.monotonic() when what had come was last taken
        self._step = 0
        self._averaged_at = -1  # the update after which the other slices' averages were brought here
        self._restored: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None

    @property
    def all(self) -> list[Host]:
        """Every host whose pushes are added up there."""
        return list(self._by_number.values())

    @property
    def is_sliced(self) -> bool:
        return self._own > 0

    @property
    def are_ready(self) -> bool:
        """Whether every slice has its owner, and that reaches the others."""
        return len(self._owners) == self._own and all(host.is_ready for host in self._owners.values())

    def of(self, link: SocketLink) -> Host | None:
        return self._by_link.get(link)

    def events(self, timeout_s: float) -> list[tuple[SocketLink, Frame | LinkError]]:
        """What has come, like Hub.poll."""
        waiting = list(self._stash)
        self._stash.clear()
        self._looked_at = time.monotonic()
        return waiting + self._hub.poll(0.0 if waiting else timeout_s)

    # Relays come and go

    def welcome(self, link: SocketLink, hello: dict[str, Any]) -> Host:
        """Take in a relay that has said HELLO, and send it what it needs to begin."""
        if hello["layout"] != self._server.layout.digest:
            raise TrainingError(
                "a relay built another model than the server: names or shapes differ. The model factory must give the "
                "same model on every host"
            )
        self._numbers += 1
        address = tuple(hello["tcp"]) if hello["tcp"] else None
        host = Host(self._numbers, link, int(hello["launch"]), hello["slice"], address)
        self._by_link[link] = self._by_number[host.number] = host
        self._server.publish = self._send_parameters
        link.sink = self._place
        versions = len(self._server.readable)
        about = json.dumps({"host": host.number}).encode()
        self._hub.send(link, Frame(Kind.WELCOME, slot=self._window, version=versions, payload=about))
        if host.slice is not None:
            self._owners[host.slice], self._links[host.slice] = host, link
            host.published = self._step
            self._hub.send(link, Frame(Kind.STATE, step=self._step, payload=self._state_for(host.slice)))
        span, num_trained = self._server.span, len(self._server.published)
        for version, read in self._updates().items():
            # An owner comes before the first step, and averaged weights may have been brought here from all owners.
            whole = host.slice is not None or (version >= num_trained and self._averaged_at == self._step)
            self._send(version, read, Span(0 if whole else span.start, span.stop), [link])
        if len(self._owners) == self._own:
            self._restored = None  # all have begun with it
            for each in [host] if host.slice is None else list(self._by_link.values()):
                self._send_roster(each)
        return host

    def _send_roster(self, host: Host) -> None:
        """Tell a relay where the owners listen, once there are all of them."""
        roster = [[owner.slice, *(owner.address or ())] for owner in self._owners.values() if owner is not host]
        assert host.link is not None
        frame = Frame(Kind.ROSTER, payload=json.dumps({"owners": roster}).encode())
        self._hub.send(host.link, frame, bulk=True)  # behind the parameters that it begins with

    def lose(self, link: SocketLink, cause: str) -> Host:
        """A relay is gone. Raises ServerLost when it owned a slice."""
        host = self._by_link.pop(link)
        del self._by_number[host.number]
        self.slice_sums.lose(host.number)
        for round_, early in self._early.items():
            self._early[round_] = [each for each in early if each[1] is not host]
        if not self._by_link:
            self._server.publish = None
        if host.slice is not None:
            raise ServerLost(f"the server of slice {host.slice} is lost: {cause}")
        return host

    def end(self) -> None:
        """Tell the relays that the run is over."""
        for link in self._by_link:
            self._hub.send(link, Frame(Kind.STOP, incarnation=-1))

    # Sums

    def combine(self, host: Host, round_: int) -> None:
        """Tell a host which of its workers' pushes count in a round: it sends their sums, as far as it has not yet."""
        pushes = host.accepted.pop(round_)
        places = sum(p.block.stop - p.block.first for p in pushes)
        rows = [p.row for p in pushes]
        batch = Batch(pushes, time.monotonic(), dict.fromkeys(range(self._own + 1), places))
        host.batches.setdefault(round_, []).append(batch)
        if host.link is not None:
            self._hub.send(host.link, Frame(Kind.COMBINE, round_, payload=pack_integers(rows)))
        else:
            assert host.sums is not None
            host.sums.combine(round_, rows)
        for slice_, sender, frame in self._early.pop(round_, []):
            self._has(slice_, sender, frame)

    def _take(self, host: Host, what: Frame, vector: Tensor | None = None) -> None:
        """A host, or the server's, says something of a sum over the server's slice."""
        self.slice_sums.take(what, vector)
        if what.kind is Kind.SUM:
            self._has(self._own, host, what)

    def note(self, host: Host, frame: Frame) -> bool:
        """Take what a relay says on its own account. Whether it was that, and not a worker's word."""
        match frame.kind:
            case Kind.ROSTER:
                host.is_ready = True
            case Kind.SHARE:
                host.shared = frame.payload
            case Kind.NORM:
                if frame.round in self._open:
                    host.norms[frame.round] = frame
            case Kind.STATE:
                host.state = frame.payload
            case Kind.PUBLISH:
                span = Span(frame.first, frame.stop)
                self._wire.unpack_parameters(self._server.published[frame.version], span)
                if host.slice is not None and span.stop == self._spans[host.slice].stop:
                    host.published = frame.read
            case Kind.OPEN | Kind.PIECE | Kind.VOID | Kind.SUM:
                self._take(host, frame)
            case Kind.ARRIVED:
                sender = self._by_number.get(frame.slot)
                if sender is not None and host.slice is not None:
                    self._has(host.slice, sender, frame)
            case _:
                return False
        return True

    def _has(self, slice_: int, host: Host, frame: Frame) -> None:
        """The owner of a slice has a host's sum over a block of places. It may come before it is known here which of
        that host's pushes count, and be of others."""
        block = Block(frame.first, frame.stop)
        batch = next((batch for batch in host.batches.get(frame.round, []) if batch.has(block, frame.read)), None)
        if batch is None and frame.round in self._open:
            self._early.setdefault(frame.round, []).append((slice_, host, frame))
        elif batch is not None and (slice_, block) not in batch.came:
            if slice_ == self._own:
                batch.sums.append(((host.number, frame.version), block))
            self._arrived(slice_, host, frame.round, batch, block)

    def _arrived(self, slice_: int, host: Host, round_: int, batch: Batch, block: Block) -> None:
        batch.came.add((slice_, block))
        batch.missing[slice_] -= block.stop - block.first
        if not batch.missing[slice_]:
            del batch.missing[slice_]
        if not batch.missing:
            host.batches[round_].remove(batch)
            self._counted.setdefault(round_, []).extend(key for key, _ in batch.sums)
            self._settled(host, round_, batch)

    def _place(self, frame: Frame) -> memoryview | None:
        """Where a relay's payload goes."""
        if frame.kind is Kind.PIECE:
            return self.slice_sums.place(frame)
        if frame.kind is Kind.PUBLISH:
            return self._wire.parameters(self._server.published[frame.version], Span(frame.first, frame.stop))
        return None

    def overdue(self) -> SocketLink | None:
        """The relay of a host whose sums have not come in time, if any. Raises ServerLost where the server has them,
        and another owner has not: a host sends them to all owners side by side."""
        for host in self._by_number.values():
            for batch in [batch for batches in host.batches.values() for batch in batches]:
                slice_ = min(batch.missing)
                if not self._is_silent(host.link or self._links[slice_], batch.since):
                    continue
                if host.link is None or self._own not in batch.missing:
                    raise self._silent(slice_)
                return host.link
        return None

    def quiet(self, seconds: float) -> list[SocketLink]:
        """The relays without a slice of which nothing had come for so long when links were last looked at. (Owners are
        minded by whoever waits for them.)"""
        since = self._looked_at - seconds
        return [link for link, host in self._by_link.items() if host.slice is None and link.heard_at < since]

    def _is_silent(self, link: SocketLink, since: float) -> bool:
        """Whether nothing has moved over a link for too long, while something was waited for."""
        return time.monotonic() - max(since, link.moved_at) > self._timeout_s

    def _silent(self, slice_: int) -> ServerLost:
        return ServerLost(f"the server of slice {slice_} was silent for {self._timeout_s:g} s")

    def forget(self, round_: int) -> None:
        """A round is over and applied: its buffers are free."""
        self._counted.pop(round_, None)
        for owner in self._owners.values():
            owner.norms = {number: norm for number, norm in owner.norms.items() if number in self._open}
        self.slice_sums.forget(lambda number: number not in self._open)
        for number in [number for number in self._early if number not in self._open]:
            del self._early[number]

    # Updates

    def begin_update(self, round_: int, plan_step: int, count: int, step: int, scale: float) -> Gathered:
        """Have the other owners apply a round of `count` places of a step of the plan, computed with this loss scale,
        as update `step`. Returns what it adds up to on the server's own slice."""
        keys, oldest = self._counted.get(round_, []), min(self._open, default=round_ + 1)
        gathered = self.slice_sums.gather(round_, plan_step, count, keys)
        norms, digest = [self._owners[slice_].norms.get(round_) for slice_ in range(self._own)], rows_digest(keys)
        payload = pack_integers(keys)
        are_known = all(norm is not None and (norm.step, norm.read) == (plan_step, digest) for norm in norms)
        if gathered.is_written and are_known:
            squares = b"".join(bytes(norm.payload) for norm in norms if norm is not None)
            squares += pack_values(self._server.squares())
            gathered = replace(gathered, squares=unpack_values(squares))
            payload += squares
        for owner in self._owners.values():
            assert owner.link is not None
            frame = Frame(
                Kind.APPLY, round_, step, plan_step, len(keys), read=oldest, samples=count, loss=scale, payload=payload
            )
            self._hub.send(owner.link, frame)
        return gathered

    def _send_parameters(self, step: int, span: Span) -> None:
        """Send parameters after update `step` to the other hosts."""
        version = self._server.version(step, is_validation=False)
        if span.start == self._server.span.start:
            withdraw_parameters(version, self._by_link)
        self._send(version, step, span, list(self._by_link))

    def _send(self, version: int, read: int, span: Span, links: Sequence[SocketLink]) -> None:
        send_parameters(self._hub, self._wire, self._server.readable[version], version, read, span, links)

    def finish_update(self, step: int) -> None:
        """Wait for the other slices' parameters after update `step`."""
        self._step = step
        self._await(lambda owner: owner.published == step)

    def publish_averaged(self) -> None:
        """Send the averaged weights of all slices to the other hosts, before a validation reads them."""
        if not self._server.averages:
            return
        self._take_averaged()
        version = len(self._server.published)
        for link, host in self._by_link.items():
            # An owner's own it has, and is about to go on from: what comes late would set it back.
            own = self._spans[host.slice] if host.slice is not None else Span(0, 0)
            for span in (Span(0, own.start), Span(own.stop, self._server.span.stop)):
                self._send(version, self._step, span, [link])

    def _share(self, values: list[float]) -> list[float]:
        """The values of all slices, in order; the server's own are the last."""
        self._await(lambda owner: owner.shared is not None)
        shares = [bytes(self._owners[slice_].shared) for slice_ in range(self._own)]
        payload = b"".join(shares) + pack_values(values)
        for owner in self._owners.values():
            owner.shared = None
            assert owner.link is not None
            self._hub.send(owner.link, Frame(Kind.SHARE, payload=payload))
        return unpack_values(payload)

    def _await(self, is_there: Callable[[Host], bool]) -> None:
        """Wait until this holds for every owner. Whatever else comes waits in `events`."""
        start = time.monotonic()
        while not all(map(is_there, self._owners.values())):
            self._check()
            for link, what in self._hub.poll(_POLL_SECONDS):
                host = self._by_link.get(link)
                if isinstance(what, LinkError) and host is not None and host.slice is not None:
                    self.lose(link, what.message)
                if isinstance(what, LinkError) or host is None or not self.note(host, what):
                    self._stash.append((link, what))
            for slice_, owner in self._owners.items():
                if not is_there(owner) and self._is_silent(self._links[slice_], start):
                    raise self._silent(slice_)

    def validated(self, loss: float) -> None:
        """Tell the owners' schedules."""
        for owner in self._owners.values():
            assert owner.link is not None
            self._hub.send(owner.link, Frame(Kind.VALIDATED, loss=loss))

    # Checkpoints

    def pack_optimizer(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state of all slices, as of one server."""
        mine = pack_optimizer(self._server.optimizer)
        if not self.is_sliced:
            return mine
        return merge_optimizers([mine, *self._collect(OPTIMIZER).values()])

    def take_parameters(self, step: int) -> None:
        """Bring the other slices' parameters after update `step` into the model, before it is saved or evaluated, and
        their averages."""
        if self._server.averages:
            self._take_averaged()
        if not self._wire.rounds:
            self._server.take_others(step)
            return
        for slice_, (tensors, _) in self._collect(PARAMETERS).items():
            span = self._spans[slice_]
            self._server.current.floats[span.start : span.stop] = tensors["current"]

    def _take_averaged(self) -> None:
        """Bring the other slices' averages here, unless they are."""
        if self._averaged_at == self._step:
            return
        self._averaged_at = self._step
        averaged = self._server.readable[-1].floats
        for slice_, (tensors, _) in self._collect(AVERAGED).items():
            span = self._spans[slice_]
            averaged[span.start : span.stop] = tensors["averaged"]

    def _collect(self, what: int) -> dict[int, tuple[dict[str, Tensor], Any]]:
        """What the other owners have of this, by slice."""
        for owner in self._owners.values():
            assert owner.link is not None
            owner.state = None
            self._hub.send(owner.link, Frame(Kind.COLLECT, slot=what))
        self._await(lambda owner: owner.state is not None)
        return {slice_: unpack_state(owner.state) for slice_, owner in self._owners.items()}

    def unpack_optimizer(self, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on from such a state, after update `step`: here, and with owners once they join.

        Where "param_groups" have no options, or there are none, the optimizer's are those it has.
        """
        self._step = self._averaged_at = step  # a checkpoint has the averages of all slices
        scalars = {**scalars, "param_groups": with_options(self._server.optimizer, scalars["param_groups"])}
        self._restored = (tensors, scalars) if self.is_sliced else None
        mine = optimizer_of(self._server.indices_in(self._server.span), tensors, scalars)
        unpack_optimizer(self._server.optimizer, *mine)

    def _state_for(self, slice_: int) -> bytes:
        """What an owner begins with: its parameters, and its part of the optimizer's state where there is one."""
        span = self._spans[slice_]
        current = {"current": self._server.current.floats[span.start : span.stop]}
        if self._restored is None:
            return pack_state(current, {})
        tensors, scalars = self._restored
        kept, part = optimizer_of(self._server.indices_in(span), tensors, scalars)
        return pack_state({**kept, **current}, {"optimizer": part, "server": self._server.state_dict()})

    def _updates(self) -> dict[int, int]:
        """Which update's parameters each vector that workers may read holds."""
        count = len(self._server.published)
        reads = {version: self._step - (self._step - version) % count for version in range(count)}
        reads.update(dict.fromkeys(range(count, len(self._server.readable)), self._step))  # averaged ones
        return {version: read for version, read in reads.items() if read >= 0}
