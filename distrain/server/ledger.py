"""Who owes which shard of the round in flight. A pure state machine: no sockets, no tensors, no clock.

A round is one exchange over all shards: a training step, or a step of validation. Every shard of a round is taken
exactly once, whoever computes it and however often it arrives. A member is one incarnation of one worker; after it
left, whatever still arrives from it is refused (fencing).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from distrain.reduction import Block


class Verdict(Enum):
    """What became of a push."""

    ACCEPTED = "accepted"
    FENCED = "its worker had been given up"
    LATE = "its step is over"
    REPEATED = "its shards had been taken already"
    NOT_OWED = "its worker did not owe these shards"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Shards [first, stop) of the round in flight, owed by one incarnation."""

    incarnation: int
    first: int
    stop: int


@dataclass(slots=True)
class _Member:
    rank: int
    owed: set[int] = field(default_factory=set)


class Ledger:
    """Deals shards to members and takes each (round, shard) once.

    `num_shards` never changes; members come and go. `join` and `leave` may be called at any time: the shards of the
    round in flight that a leaver still owed are dealt again at once, a joiner takes part from the next round on, or
    at once when nobody else is left to do the work.
    """

    def __init__(self, num_shards: int) -> None:
        if num_shards < 1:
            raise ValueError(f"a ledger needs at least one shard, got {num_shards}")
        self._num_shards = num_shards
        self._members: dict[int, _Member] = {}
        self._next_incarnation = 0
        self._round = -1
        self._open: set[int] = set()  # shards of the round not taken yet
        self._orphans: set[int] = set()  # open shards that nobody owes
        self._taken: list[tuple[int, int, int]] = []

    @property
    def members(self) -> tuple[int, ...]:
        """The live incarnations, in rank order."""
        return tuple(sorted(self._members, key=lambda incarnation: (self._members[incarnation].rank, incarnation)))

    @property
    def round(self) -> int:
        """The round in flight, or the last one."""
        return self._round

    @property
    def complete(self) -> bool:
        """Whether every shard of the round in flight has been taken."""
        return not self._open

    @property
    def taken(self) -> tuple[tuple[int, int, int], ...]:
        """What was taken in this round: (incarnation, first shard, stop), in order of arrival."""
        return tuple(self._taken)

    def owes(self, incarnation: int) -> bool:
        """Whether this member has shards of the round in flight still to deliver."""
        member = self._members.get(incarnation)
        return member is not None and bool(member.owed)

    def join(self, rank: int) -> tuple[int, list[Assignment]]:
        """A worker joins. Returns its incarnation, and work for it where shards lie idle."""
        incarnation = self._next_incarnation
        self._next_incarnation += 1
        self._members[incarnation] = _Member(rank)
        return incarnation, self._deal(self._take_orphans(), [incarnation])

    def leave(self, incarnation: int) -> list[Assignment]:
        """A member is gone or given up. Returns who does what it still owed."""
        member = self._members.pop(incarnation, None)
        if member is None:
            return []
        self._orphans |= member.owed
        if not self._members:
            return []
        return self._deal(self._take_orphans(), list(self.members))

    def begin(self, round_: int) -> list[Assignment]:
        """Start a round. Returns the shards dealt, one span for each member that gets any."""
        assert self.complete, f"round {self._round} still lacks shards {sorted(self._open)}"
        assert round_ > self._round, f"round {round_} is not after {self._round}"
        self._round = round_
        self._open = set(range(self._num_shards))
        self._taken = []
        if not self._members:
            self._orphans = set(self._open)
            return []
        return self._deal(sorted(self._open), list(self.members))

    def push(self, incarnation: int, round_: int, block: Block) -> Verdict:
        """A member delivers the sum over a block of shards. Only ACCEPTED changes anything."""
        member = self._members.get(incarnation)
        if member is None:
            return Verdict.FENCED
        if round_ != self._round:
            return Verdict.LATE
        shards = set(range(block.first, block.stop))
        if not shards:
            return Verdict.NOT_OWED
        if not shards <= member.owed:
            return Verdict.REPEATED if shards.isdisjoint(self._open) else Verdict.NOT_OWED
        member.owed -= shards
        self._open -= shards
        self._taken.append((incarnation, block.first, block.stop))
        return Verdict.ACCEPTED

    def _take_orphans(self) -> list[int]:
        orphans, self._orphans = sorted(self._orphans), set()
        return orphans

    def _deal(self, shards: list[int], incarnations: list[int]) -> list[Assignment]:
        """Deal shards out as evenly as they go, in order, as runs of consecutive shards."""
        assignments: list[Assignment] = []
        count = len(incarnations)
        for place, incarnation in enumerate(incarnations):
            share = shards[place * len(shards) // count : (place + 1) * len(shards) // count]
            self._members[incarnation].owed.update(share)
            assignments += [Assignment(incarnation, first, stop) for first, stop in _runs(share)]
        return assignments


def _runs(shards: list[int]) -> list[tuple[int, int]]:
    """Sorted shards as maximal spans [first, stop)."""
    runs: list[tuple[int, int]] = []
    for shard in shards:
        if runs and runs[-1][1] == shard:
            runs[-1] = (runs[-1][0], shard + 1)
        else:
            runs.append((shard, shard + 1))
    return runs
