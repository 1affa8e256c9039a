"""Rounds in flight: members on links, what they owe, and what they have pushed.

The loop begins rounds and waits; here frames become entries of the ledger and parts of sums, workers join, are given up
and helped out.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distrain import errors
from distrain.errors import DistrainError, LinkError, TrainingError
from distrain.exchange.host_sums import HostSums
from distrain.exchange.link import Frame, Hub, Kind, SocketLink, pack_microbatches
from distrain.exchange.memory import Published, PushSlots
from distrain.exchange.sums import partial_of
from distrain.reduction import Block, Partial, TreeSum
from distrain.server.agenda import Microbatch
from distrain.server.hosts import Hosts
from distrain.server.ledger import Assignment, Ledger, Verdict
from distrain.server.members import Batch, Host, Member, Pushed, Task
from distrain.server.parameter_server import CHUNK_FLOATS, Gathered, ParameterServer

_POLL_SECONDS = 0.25  # how soon a request to stop is seen while nothing arrives
_HELP_SECONDS = 0.02  # how soon an idle worker helps one that is late
_QUIET_SECONDS = 2.5  # without a sign of a relay, which gives two a second: it may hang

GRADIENTS = (Kind.TRAIN, Kind.CHECK)  # what is answered with them

Tell = Callable[..., None]
"""Takes what happened: kind, message, and, where they apply, member, or another process's launch, and seconds."""


@dataclass(eq=False)
class Round:
    """One exchange in flight. `read` is the update whose parameters it reads, `slots` the set of push slots for it.
    Seconds are added up for each worker."""

    number: int
    kind: Kind
    microbatches: tuple[Microbatch, ...]
    needed: int
    version: int
    read: int
    slots: int
    tree: TreeSum
    scale: float = 0.0  # of the loss; 0: none
    owner: Member | None = None  # of the push that came last
    reads: dict[int, int] = field(default_factory=dict)  # asynchronous: incarnation -> update
    data_s: dict[int, float] = field(default_factory=dict)
    compute_s: dict[int, float] = field(default_factory=dict)
    num_bytes: int = 0
    taken: int = 0  # microbatches
    whole_at: int | None = None  # its place in the order in which rounds became whole
    skipped: dict[Microbatch, str] = field(default_factory=dict)  # left out by their worker -> why
    seen: dict[Microbatch, dict[str, Any]] = field(default_factory=dict)  # of their activations
    lost_at: float | None = None  # time.perf_counter() when a worker was given up before it was whole


class Rounds:
    """Begins rounds, and polls until they are whole.

    `free`: asynchronous, each member has parameters of its own, brought up to date whenever it is dealt something, and
    is dealt one thing at a time. `window`: how many training rounds may be in flight otherwise.
    """

    def __init__(
        self,
        server: ParameterServer,
        hub: Hub,
        num_shards: int,
        window: int,
        free: bool,
        timeout_s: float,
        tell: Tell,
        num_slices: int = 1,
    ) -> None:
        self._server, self._hub, self._tell = server, hub, tell
        self._num_shards, self._window, self._free, self._timeout_s = num_shards, window, free, timeout_s
        self._ledger = Ledger(one_at_a_time=free)
        self._members: dict[int, Member] = {}
        self._by_link: dict[SocketLink, Member] = {}
        self._fenced: dict[SocketLink, Member] = {}  # given up for their silence: what they still push is refused
        self._fenced_elsewhere: dict[int, Member] = {}  # the same behind relays, by incarnation
        self._open: dict[int, Round] = {}
        self.hosts = Hosts(server, hub, num_slices, window, timeout_s, self._settled, self._open, self._check)
        self._numbers = itertools.count()
        self._whole = itertools.count()
        self._step = 0
        self._helped_at = 0.0
        self.refused = 0  # pushes of workers that had been given up
        self.copied = 0  # microbatches given to a second worker
        self._abort: DistrainError | None = None
        self._retiring: set[int] = set()  # launches
        self._doomed: dict[int, str] = {}  # launch -> why it is to be given up

    @property
    def num_members(self) -> int:
        return len(self._members)

    def abort(self, error: DistrainError) -> None:
        """Have `poll` raise this. May be called from any thread."""
        self._abort = self._abort or error

    def _check(self) -> None:
        """Raise what `abort` was given."""
        if self._abort is not None:
            raise self._abort

    def retire(self, launch: int) -> None:
        """Let a worker go once it has answered what it was asked. May be called from any thread."""
        self._retiring.add(launch)

    def give_up(self, launch: int, cause: str) -> None:
        """Fence a worker: whoever supervises it says that it is lost, though its link may not have ended (a node out
        of reach). May be called from any thread."""
        self._doomed[launch] = cause

    def idle(self) -> list[tuple[Member, range]]:
        """The members that do nothing and may be dealt something, each with its own shards, in rank order."""
        members = self._ledger.members
        count, shards = len(members), self._num_shards
        return [
            (self._members[incarnation], range(place * shards // count, (place + 1) * shards // count))
            for place, incarnation in enumerate(members)
            if self._ledger.is_idle(incarnation) and self._ledger.is_able(incarnation)
        ]

    def deal_orphans(self) -> None:
        """Have idle members do what nobody does."""
        for member, _ in self.idle():
            self._deal(self._ledger.claim(member.incarnation))

    def begin(
        self,
        kind: Kind,
        microbatches: Sequence[Microbatch],
        read: int,
        update: int = 0,
        to: Member | None = None,
        needed: int | None = None,
    ) -> Round:
        """Start a round, for everybody or for one member. It reads the parameters after update `read`; `update` is the
        one that it is for. It is whole with `needed` microbatches, or with all."""
        number, count = next(self._numbers), len(microbatches)
        needed = min(needed or count, count)
        version, slots = self._server.version(read, kind is Kind.VALIDATE), update % self._window
        is_gradient = kind in GRADIENTS
        scale = self._server.scale_after(read) if is_gradient else 0.0
        finish = self._server.wire.rounding(microbatches[0][0]) if is_gradient else None
        tree = TreeSum(count, finish)
        round_ = Round(number, kind, tuple(microbatches), needed, version, read, slots, tree, scale)
        self._open[number] = round_
        only = to.incarnation if to is not None else None
        self._deal(self._ledger.begin(number, count, only, needed, in_slots=is_gradient))
        return round_

    def close(self, round_: Round) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[Microbatch, ...]]:
        """End a round. Returns what was taken, as (incarnation, step, first shard, stop), and what is missing."""
        taken: list[tuple[int, int, int, int]] = []
        for host in self.hosts.all:
            self._ledger.reopen(round_.number, host.take_back(round_.number))
        for incarnation, first, stop in self._ledger.taken(round_.number):
            for step, shard in round_.microbatches[first:stop]:
                if taken and taken[-1][0] == incarnation and taken[-1][1] == step and taken[-1][3] == shard:
                    taken[-1] = (*taken[-1][:3], shard + 1)
                else:
                    taken.append((incarnation, step, shard, shard + 1))
        missing = tuple(round_.microbatches[place] for place in self._ledger.missing(round_.number))
        self._ledger.close(round_.number)
        del self._open[round_.number]
        for member in self._members.values():
            member.overtaken(round_.number, time.monotonic())
        if round_.lost_at is not None and not missing:
            seconds = time.perf_counter() - round_.lost_at
            message = f"the step in flight was whole {seconds:.2f} s after the worker was given up"
            self._tell("recovered", message, seconds=seconds)
        return tuple(taken), missing

    def begin_update(self, round_: Round, step: int) -> Gathered:
        """Begin update `step` with a round that is over: other slices' owners make theirs, where there are any. Returns
        what it adds up to."""
        if self.hosts.is_sliced:
            plan_step, count = round_.microbatches[0][0], len(round_.microbatches)
            return self.hosts.begin_update(round_.number, plan_step, count, step, round_.scale)
        return Gathered(round_.tree.halves(), round_.tree.late)

    def wake(self) -> None:
        """Have the workers of this host see at once what they were sent, and not when `poll` next waits."""
        self._hub.ring()

    def poll(self) -> None:
        """Wait for whatever comes next and deal with it; while there is something to add up, do some of that instead of
        waiting. Raises what a worker reported, or `abort` was given."""
        self._check()
        someone_idle = any(self._ledger.is_idle(incarnation) for incarnation in self._members)
        timeout_s = _HELP_SECONDS if someone_idle else _POLL_SECONDS
        to_add_up = next((round_.tree for round_ in self._open.values() if round_.tree.late), None)
        come = self.hosts.events(timeout_s if to_add_up is None else 0.0)
        if not come and to_add_up is not None:
            to_add_up.work(CHUNK_FLOATS)
        for link, what in come:
            host = self.hosts.of(link)
            if host is not None:
                self._take_from_relay(host, link, what)
                continue
            member = self._by_link.get(link)
            if isinstance(what, LinkError):
                if member is not None:
                    self._lose(member, what.message)
                self._fenced.pop(link, None)
            elif what.kind is Kind.HELLO:
                self._welcome(link, what)
            elif link in self._fenced:
                if what.kind is Kind.PUSH:
                    self._take_push(self._fenced[link], what)
            elif member is not None:  # or a link dropped a moment ago
                self._take(member, what)
        now = time.monotonic()
        if (overdue := self.hosts.overdue()) is not None:
            self._lose_relay(overdue, f"its sums did not come within {self._timeout_s:g} s")
        for relay in self.hosts.quiet(quiet_s := max(self._timeout_s, _QUIET_SECONDS)):
            self._lose_relay(relay, f"its host's relay was silent for {quiet_s:g} s")
        for member in list(self._members.values()):
            if member.incarnation not in self._members:
                continue  # its host was given up a moment ago
            if now > member.deadline and not self._ledger.is_idle(member.incarnation):
                self._lose_silent(member)
            elif member.launch in self._doomed:
                if member.slots is None and member.host is not None:
                    self._take_back(member.host)  # out of reach, perhaps, with all its node
                self._fence(member, self._doomed.pop(member.launch))
        self._let_go()
        if someone_idle and now - self._helped_at > _HELP_SECONDS / 2:
            self._helped_at = now
            self._help_the_late(now)

    def _take(self, member: Member, frame: Frame) -> None:
        """Deal with what a worker says."""
        if frame.kind is Kind.PUSH:
            self._take_push(member, frame)
        elif frame.kind is Kind.READY:
            if (sums := _sums_here(member)) is not None:
                sums.ready(frame)
        elif frame.kind is Kind.ALIVE:
            member.deadline = time.monotonic() + self._timeout_s
        elif frame.kind is Kind.LOOKED:
            if frame.round in self._open:
                report = frame.json()
                self._open[frame.round].seen[frame.step, report["shard"]] = report["layers"]
        elif frame.kind is Kind.SKIPPED:
            if frame.round in self._open:
                report = frame.json()
                self._open[frame.round].skipped[frame.step, report["shard"]] = report["message"]
        elif frame.kind is Kind.FAILED:
            if frame.round in self._open:
                raise _reported(frame.json())
            self._lose(member, "it failed at a step that is over: parameters may have changed under it")
        else:
            self._lose(member, f"it sent a {frame.kind.name} frame, which only a server may")

    def _take_from_relay(self, host: Host, link: SocketLink, what: Frame | LinkError) -> None:
        """Deal with what a relay says, or a worker of its host through it."""
        if isinstance(what, LinkError):
            self._lose_relay(link, f"its host's relay is lost: {what.message}")
        elif what.kind is Kind.HELLO:
            self._welcome(link, what, host)
        elif not self.hosts.note(host, what):
            member = self._members.get(what.incarnation)
            if what.kind is Kind.LEFT and what.incarnation < 0:
                self._lose_relay(link, f"its host's relay lost its link to the server of slice {what.slot}")
            elif what.kind is Kind.LEFT:
                self._fenced_elsewhere.pop(what.incarnation, None)
                if member is not None:
                    self._lose(member, "the other end of the link is gone")
            elif member is not None:
                self._take(member, what)
            elif what.kind is Kind.PUSH and what.incarnation in self._fenced_elsewhere:
                self._take_push(self._fenced_elsewhere[what.incarnation], what)

    def _lose_relay(self, link: SocketLink, cause: str) -> None:
        """Give up a host: what of its sums has not come is dealt again, and so is what its workers owe."""
        host = self.hosts.lose(link, cause)
        self._hub.drop(link)
        self._tell("lost_host", f"host {host.number} was given up: {cause}", launch=host.launch)
        self._take_back(host)
        for member in [member for member in self._fenced_elsewhere.values() if member.host is host]:
            del self._fenced_elsewhere[member.incarnation]
        for member in [member for member in self._members.values() if member.host is host]:
            self._lose(member, cause)
        for incarnation in list(self._members):
            self._deal(self._ledger.claim(incarnation))

    def _lose_silent(self, member: Member) -> None:
        """Give up a worker that did not answer in time, or its host's relay, if it is that which does not. Where that
        cannot be told yet, it will be soon."""
        cause = f"was silent for {self._timeout_s:g} s"
        if member.link in self.hosts.quiet(_QUIET_SECONDS):
            self._lose_relay(member.link, f"its host's relay {cause}")
        elif member.link not in self.hosts.quiet(_QUIET_SECONDS / 2):
            self._fence(member, f"it {cause}")

    def _take_back(self, host: Host) -> None:
        """What of a host's sums has not come is to be computed by others."""
        for number, round_ in self._open.items():
            if lost := host.take_back(number):
                round_.lost_at = round_.lost_at or time.perf_counter()
                self._ledger.reopen(number, lost)

    def end(self) -> None:
        """Tell everybody that the run is over, and close the links."""
        for member in self._members.values():
            self._hub.send(member.link, Frame(Kind.STOP, incarnation=member.incarnation))
        self.hosts.end()
        self._hub.close()

    def _deal(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            self._assign(self._members[assignment.incarnation], assignment)

    def _assign(self, member: Member, assignment: Assignment, is_copy: bool = False) -> None:
        """Ask a worker for its part of a round; one without shared memory gets the parameters first."""
        round_ = self._open[assignment.round]
        version, read = round_.version, round_.read
        if self._free and round_.kind in GRADIENTS:
            assert member.own is not None
            member.own.copy_from(self._server.current)
            version, read = len(self._server.readable), self._step
            round_.reads[member.incarnation] = read
        is_behind_relay = member.slots is None  # which has the parameters, as does a link that shares memory
        if not member.link.shared and not is_behind_relay and member.held.get(version) != read:
            published = self._published(member)[version]
            self._hub.send(member.link, Frame(Kind.PUBLISH, version=version, payload=published.bytes()))
            member.held[version] = read
        now = time.monotonic()
        member.deadline = now + self._timeout_s
        member.tasks[assignment] = Task(round_.kind, now, is_copy)
        wanted = round_.microbatches[assignment.first : assignment.stop]
        is_plain = all(wanted[0][0] == step and assignment.first + i == k for i, (step, k) in enumerate(wanted))
        task = Frame(
            round_.kind,
            round_.number,
            wanted[0][0],
            assignment.first,
            assignment.stop,
            member.incarnation,
            slot=round_.slots,
            version=version,
            read=read,
            samples=len(round_.microbatches),
            loss=round_.scale,
            payload=b"" if is_plain else pack_microbatches(wanted),
        )
        if round_.kind in GRADIENTS and (sums := _sums_here(member)) is not None:
            sums.asked(task)
        self._hub.send(member.link, task)

    def stepped(self, step: int) -> None:
        """The current parameters are those after this update."""
        self._step = step

    def _published(self, member: Member) -> list[Published]:
        return self._server.readable if member.own is None else [*self._server.readable, member.own]

    def _welcome(self, link: SocketLink, frame: Frame, host: Host | None = None) -> None:
        """Take a proven worker in and hand it its buffers, or have the relay of its host do that; or take in a
        relay."""
        hello = frame.json()
        if "relay" in hello:
            self.hosts.welcome(link, hello)
            return
        rank = int(hello["rank"])
        if hello["layout"] != self._server.layout.digest:
            raise TrainingError(
                f"worker {rank} built another model than the server: names or shapes differ. The model factory must "
                "give the same model on every host"
            )
        if host is not None:
            incarnation, assignments = self._ledger.join(rank)
            self._members[incarnation] = Member(rank, incarnation, link, None, int(hello["launch"]), host=host)
            self._hub.send(link, Frame(Kind.WELCOME, incarnation=incarnation, slot=frame.slot))
            self._joined(self._members[incarnation], assignments)
            return
        layout = self._server.layout
        slots = PushSlots(layout, self._num_shards, self._window)
        if not link.shared:
            link.sink = lambda push: slots.bytes(push.slot) if self._is_gradient(push) else None
        incarnation, assignments = self._ledger.join(rank)
        own = Published(layout) if self._free else None
        member = Member(rank, incarnation, link, slots, int(hello["launch"]), own, self.hosts.local)
        self._members[incarnation] = self._by_link[link] = member
        if (sums := _sums_here(member)) is not None:
            sums.joined(incarnation, slots)
        published = self._published(member)
        try:
            link.send(
                Frame(
                    Kind.WELCOME,
                    incarnation=incarnation,
                    slot=slots.num_sets,
                    version=len(published),
                    read=int(link.shared and sums is not None),
                )
            )
            if link.shared:
                link.send_descriptors(
                    [*(vector.buffer.fd for vector in published), slots.buffer.fd, *self._hub.bell.fds]
                )
        except LinkError as error:
            self._lose(member, error.message)
        else:
            self._joined(member, assignments)
        finally:
            slots.buffer.close()
            if own is not None:
                own.buffer.close()

    def _joined(self, member: Member, assignments: Sequence[Assignment]) -> None:
        self._tell("joined", f"worker {member.rank} joined (incarnation {member.incarnation})", member)
        self._deal(assignments)

    def _is_gradient(self, push: Frame) -> bool:
        """Whether this frame's payload belongs into a push slot. (What comes late goes to memory of its own.)"""
        return push.kind is Kind.PUSH and push.round in self._open and self._open[push.round].kind in GRADIENTS

    def _take_push(self, member: Member, frame: Frame) -> None:
        """Enter a push into the ledger and, if it counts, into the sum."""
        block = Block(frame.first, frame.stop)
        verdict = self._ledger.push(member.incarnation, frame.round, block)
        if verdict is Verdict.FENCED or verdict is Verdict.NOT_OWED:
            self.refused += 1
            self._tell(
                "refused",
                f"a push of worker {member.rank} for shards {block.first}..{block.stop - 1} of step {frame.step + 1} "
                f"was refused: {verdict.value}",
                member,
            )
            return
        now = time.monotonic()
        member.deadline = now + self._timeout_s
        member.answered(frame, now)
        if member.speed is not None:
            self._ledger.measured(member.incarnation, member.speed)
        if verdict is Verdict.ACCEPTED:
            round_ = self._open[frame.round]
            part = partial_of(frame)
            if round_.kind not in GRADIENTS:
                part.vector = torch.frombuffer(frame.payload, dtype=torch.float64)
            elif member.slots is not None:
                part.vector = member.slots[frame.slot]
            round_.data_s[member.rank] = round_.data_s.get(member.rank, 0.0) + frame.data_s
            round_.compute_s[member.rank] = round_.compute_s.get(member.rank, 0.0) + frame.compute_s
            round_.num_bytes += frame.data_bytes
            round_.owner = member
            if member.host is not None and round_.kind in GRADIENTS:
                member.host.accepted.setdefault(frame.round, []).append(Pushed(member, frame.slot, block))
                if (sums := _sums_here(member)) is not None:
                    sums.pushed(frame)
            else:
                self._put(round_, block, part)
        self._deal(self._ledger.claim(member.incarnation))
        self._combine()

    def _put(self, round_: Round, block: Block, part: Partial | None) -> None:
        """A block of a round is there. It is entered into the round's sum here, or None was, by slices' owners."""
        round_.taken += block.stop - block.first
        if part is not None:
            round_.tree.put(block, part)
        if round_.taken >= round_.needed and round_.whole_at is None:
            round_.whole_at = next(self._whole)

    def _combine(self) -> None:
        """Tell the hosts whose workers owe nothing more of a round, or of one that lacks nothing, what counts of it."""
        for host in self.hosts.all:
            for number in list(host.accepted):
                round_ = self._open[number]
                owed = any(
                    assignment.round == number
                    for member in self._members.values()
                    if member.host is host
                    for assignment in self._ledger.owed_by(member.incarnation)
                )
                count = len(round_.microbatches)
                if not owed or count - len(self._ledger.missing(number)) >= round_.needed:
                    self.hosts.combine(host, number)

    def _settled(self, host: Host, number: int, batch: Batch) -> None:
        """All owners have the sums of some pushes."""
        for key, block in batch.sums:
            self._put(
                self._open[number], block, None if self.hosts.is_sliced else self.hosts.slice_sums.part(number, key)
            )

    def _let_go(self) -> None:
        """Send those away that are to leave and owe nothing any more."""
        for member in [m for m in self._members.values() if m.launch in self._retiring]:
            self._ledger.retire(member.incarnation)
            if self._ledger.is_idle(member.incarnation):
                self._retiring.discard(member.launch)
                self._hub.send(member.link, Frame(Kind.STOP, incarnation=member.incarnation))
                del self._members[member.incarnation]
                if (sums := _sums_here(member)) is not None:
                    sums.left(member.incarnation)
                self._by_link.pop(member.link, None)
                self._deal(self._ledger.leave(member.incarnation))
                self._tell("left", f"worker {member.rank} left its node, which is about to go", member)

    def _help_the_late(self, now: float) -> None:
        """Give idle workers copies of what is late. Whoever pushes first counts, and the bits are the same."""
        idle = [member for member, _ in self.idle()]
        idle.sort(key=lambda member: member.seconds or 0.0, reverse=True)
        opening_s = max((member.opening_s or 0.0 for member in idle), default=0.0)
        tasks = [(a.round, a.first) for m in self._members.values() for a, task in m.tasks.items() if task.is_copy]
        for member in list(self._members.values()):
            owed = self._ledger.owed_by(member.incarnation)
            if not owed or not member.is_late(owed[0], now, opening_s) or (owed[0].round, owed[0].first) in tasks:
                continue
            if not idle:
                return
            helper = idle.pop()
            self.copied += owed[0].stop - owed[0].first
            self._assign(helper, self._ledger.copy(owed[0], helper.incarnation), is_copy=True)

    def _fence(self, member: Member, cause: str) -> None:
        """Give up a worker whose link is still there: what it still pushes is refused."""
        if self.hosts.of(member.link) is None:
            self._fenced[member.link] = member
        else:
            self._fenced_elsewhere[member.incarnation] = member
        self._lose(member, cause)

    def _lose(self, member: Member, cause: str) -> None:
        """Fence a worker and have the others do what it still owed."""
        if self._members.pop(member.incarnation, None) is None:
            return
        if (sums := _sums_here(member)) is not None:
            sums.left(member.incarnation)
        if self._by_link.pop(member.link, None) is None:
            if member.incarnation not in self._fenced_elsewhere:
                self._hub.send(member.link, Frame(Kind.LEFT, incarnation=member.incarnation))
        elif member.link not in self._fenced:
            self._hub.drop(member.link)
        self._tell("lost", f"worker {member.rank} was given up: {cause}", member)
        asked = {assignment.round for assignment in member.tasks if assignment.round in self._open}
        if not asked and member.overtaken_s is not None:
            message = f"others had done its part {member.overtaken_s:.2f} s after the worker was asked for it"
            self._tell("recovered", message, member, seconds=member.overtaken_s)
        else:  # one that owes nothing is told of by the step that comes next
            for number in asked or list(self._open)[:1]:
                self._open[number].lost_at = self._open[number].lost_at or time.perf_counter()
        self._deal(self._ledger.leave(member.incarnation))
        self._combine()


def _sums_here(member: Member) -> HostSums | None:
    """What adds the member's pushes up with those of others on its host, before they count, where this process does."""
    return member.host.sums if member.host is not None else None


def _reported(report: dict[str, Any]) -> DistrainError:
    """The error a worker reported, as the same class here."""
    kind = getattr(errors, str(report.get("error")), TrainingError)
    message = str(report.get("message", json.dumps(report)))
    return kind(message) if isinstance(kind, type) and issubclass(kind, DistrainError) else TrainingError(message)
