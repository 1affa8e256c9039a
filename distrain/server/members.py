"""The workers that joined a server: their links and buffers, until when they must answer, and how fast they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from distrain.exchange.host_sums import HostSums
from distrain.exchange.link import Frame, Kind, SocketLink, rows_digest
from distrain.exchange.memory import Published, PushSlots
from distrain.exchange.sums import Key
from distrain.reduction import Block
from distrain.server.ledger import Assignment

_WEIGHT = 0.2  # of the newest measurement in the running mean
_LATE = 2.0  # times what a task usually takes, beyond that, is late
_LATE_SECONDS = 0.1  # and at least this much


@dataclass(frozen=True, slots=True)
class Task:
    """What was sent for an assignment."""

    kind: Kind
    sent_at: float  # time.monotonic()
    is_copy: bool = False  # another worker owes it too


@dataclass(frozen=True, slots=True)
class Pushed:
    """A push of gradients that counts, and lies in its worker's slot on its host."""

    member: Member
    slot: int
    block: Block

    @property
    def row(self) -> tuple[int, int, int, int]:
        """As its host's relay is told."""
        return self.member.incarnation, self.slot, self.block.first, self.block.stop

    @property
    def taken(self) -> tuple[int, int, int]:
        """As the ledger has it."""
        return self.member.incarnation, self.block.first, self.block.stop


@dataclass(eq=False)
class Batch:
    """Pushes of one host and round that are added up there, and sent to the slices' owners."""

    pushes: list[Pushed]
    since: float  # time.monotonic()
    missing: dict[int, int]  # slice -> places whose sum its owner does not have yet
    sums: list[tuple[Key, Block]] = field(default_factory=list)  # that the server has of its own slice
    came: set[tuple[int, Block]] = field(default_factory=set)  # (slice, block) whose sum its owner has

    def has(self, block: Block, digest: int) -> bool:
        """Whether a sum over a block, of pushes of this digest, is of this batch's."""
        rows = [p.row for p in self.pushes if block.first <= p.block.first and p.block.stop <= block.stop]
        return bool(rows) and rows_digest(rows) == digest


@dataclass(eq=False)
class Host:
    """A host whose workers' pushes are added up there. `link` leads to its relay; the server's own has none, and adds
    them up in `sums`."""

    number: int
    link: SocketLink | None
    launch: int = -1  # of its relay
    slice: int | None = None  # that it owns
    address: tuple[str, int] | None = None  # where its relay listens for other hosts' relays
    is_ready: bool = False
    accepted: dict[int, list[Pushed]] = field(default_factory=dict)  # by round: count, but it was not told
    batches: dict[int, list[Batch]] = field(default_factory=dict)  # by round: on their way
    shared: Any = None  # payload of its last SHARE
    norms: dict[int, Frame] = field(default_factory=dict)  # by round: what it said of its slice's
    state: Any = None  # payload of its last STATE
    published: int = -1  # the last update of its slice that came
    sums: HostSums | None = None

    def take_back(self, round_: int) -> list[tuple[int, int, int]]:
        """Forget what has not come of a round. Returns it, as the ledger has it."""
        batches = self.batches.pop(round_, [])
        return [p.taken for batch in batches for p in batch.pushes] + [p.taken for p in self.accepted.pop(round_, [])]


@dataclass(eq=False)
class Member:
    """A worker that joined. `own` are the parameters that only it reads, in asynchronous training; `host` is where it
    runs, where that adds its pushes up with those of others. On another host, `link` is the link to that host's relay,
    which has the worker's push slots."""

    rank: int
    incarnation: int
    link: SocketLink
    slots: PushSlots | None
    launch: int
    own: Published | None = None
    host: Host | None = None
    deadline: float = math.inf  # time.monotonic() by which it must have answered, if it owes anything
    held: dict[int, int] = field(default_factory=dict)  # without shared memory: version -> update whose parameters
    tasks: dict[Assignment, Task] = field(default_factory=dict)  # not answered yet
    answered_at: float = 0.0  # time.monotonic()
    seconds: float | None = None  # a microbatch usually takes so long
    opening_s: float | None = None  # so long did its first task take, which opens windows
    overtaken_s: float | None = None  # a round that it still owed an answer was whole so long after it was asked

    @property
    def speed(self) -> float | None:
        """Microbatches a second."""
        return 1.0 / self.seconds if self.seconds else None

    def answered(self, frame: Frame, now: float) -> None:
        """A push came. A task's first push says how long all of it took."""
        self.answered_at = now
        self.overtaken_s = None
        for assignment in [a for a in self.tasks if a.round == frame.round and a.first <= frame.first < a.stop]:
            task = self.tasks[assignment]
            if task.kind is Kind.TRAIN and frame.compute_s:
                self._took(frame.data_s + frame.compute_s, assignment.stop - assignment.first, task.is_copy)
            if frame.stop == assignment.stop:
                del self.tasks[assignment]

    def _took(self, seconds: float, microbatches: int, is_copy: bool) -> None:
        if self.opening_s is None:
            self.opening_s = seconds
        elif not is_copy:  # which opens windows, too
            each = max(seconds / microbatches, 1e-6)
            self.seconds = each if self.seconds is None else (1 - _WEIGHT) * self.seconds + _WEIGHT * each

    def overtaken(self, round_: int, now: float) -> None:
        """A round is over; whatever it was asked for in it, others have done."""
        for assignment, task in self.tasks.items():
            if assignment.round == round_:
                self.overtaken_s = now - task.sent_at

    def is_late(self, assignment: Assignment, now: float, opening_s: float) -> bool:
        """Whether its oldest assignment takes so much longer than usual that another worker, which has to open the
        shards first, had better been given it: the wait is as long as that takes."""
        task = self.tasks.get(assignment)
        if self.seconds is None or task is None or task.kind is not Kind.TRAIN:
            return False
        expected = self.seconds * (assignment.stop - assignment.first)
        waited = now - max(task.sent_at, self.answered_at) - expected
        return waited > max(_LATE * expected, opening_s, _LATE_SECONDS)
