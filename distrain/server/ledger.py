"""Who owes which microbatch of the rounds in flight. A pure state machine: no sockets, no tensors, no clock.

A round is one exchange over a few microbatches: those of an update, or of a step of validation. A microbatch is known
by its place in the round, 0..n-1 (in synchronous training: its shard). Each is taken exactly once, whoever computes it
and however often it arrives. Several rounds may be in flight. A member is one incarnation of one worker; after it left,
whatever still arrives from it is refused (fencing).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from distrain.reduction import Block
from distrain.server.dealing import better_shares, even_shares

_ROUNDS_BETWEEN_LOOKS = 16  # at the members' speeds
_REMEMBERED = 64  # ways to deal


class Verdict(Enum):
    """What became of a push."""

    ACCEPTED = "accepted"
    FENCED = "its worker had been given up"
    LATE = "its step is over"
    REPEATED = "another worker had delivered it"
    NOT_OWED = "its worker did not owe it"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Places [first, stop) of a round, for one incarnation to compute."""

    incarnation: int
    round: int
    first: int
    stop: int


@dataclass(slots=True)
class _Member:
    rank: int
    speed: float | None = None  # microbatches a second
    unanswered: dict[Assignment, set[int]] = field(default_factory=dict)  # -> places that have not come yet
    is_retiring: bool = False
    copies: set[Assignment] = field(default_factory=set)  # among those: what it computes in another's stead


@dataclass(slots=True)
class _Round:
    open: set[int]
    needed: int  # so many of its places make it whole
    count: int
    in_slots: bool  # what is taken of it lies with its members until it is over
    taken: list[tuple[int, int, int]] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)  # open places that nobody owes


class Ledger:
    """Deals the microbatches of rounds to members and takes each once.

    Members come and go at any time: what a leaver still owed is dealt again at once; a joiner takes part from the next
    round on, or at once where nobody else is left to do the work. A member that still computes a share of its own that
    is no longer wanted (another was faster, or the round is over) is *behind*, and is dealt nothing before it has
    answered. With `one_at_a_time`, nobody is dealt a part of another round before having answered all there was, nor
    one that takes gradients before the rounds that took its own are over: they lie where it would write the next one.
    """

    def __init__(self, one_at_a_time: bool = False) -> None:
        self._one_at_a_time = one_at_a_time
        self._members: dict[int, _Member] = {}
        self._next_incarnation = 0
        self._rounds: dict[int, _Round] = {}
        # (count, members) -> as dealt last, and the round in which that was decided
        self._shares: dict[tuple[int, tuple[int, ...]], tuple[list[int], int | None]] = {}

    @property
    def members(self) -> tuple[int, ...]:
        """The live incarnations, in rank order."""
        return tuple(sorted(self._members, key=lambda incarnation: (self._members[incarnation].rank, incarnation)))

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds in flight, oldest first."""
        return tuple(self._rounds)

    def missing(self, round_: int) -> tuple[int, ...]:
        """The places of a round in flight that have not been taken."""
        return tuple(sorted(self._rounds[round_].open))

    def taken(self, round_: int) -> tuple[tuple[int, int, int], ...]:
        """What was taken of a round in flight: (incarnation, first place, stop), in order of arrival."""
        return tuple(self._rounds[round_].taken)

    def owes(self, incarnation: int) -> bool:
        """Whether something that is still wanted is to come from this member."""
        member = self._members.get(incarnation)
        return member is not None and any(self._wanted(a, places) for a, places in member.unanswered.items())

    def is_retiring(self, incarnation: int) -> bool:
        """Whether this member is to leave."""
        return self._members[incarnation].is_retiring

    def is_idle(self, incarnation: int) -> bool:
        """Whether nothing is to come from this member."""
        return not self._members[incarnation].unanswered

    def is_behind(self, incarnation: int) -> bool:
        """Whether this member still computes a share of its own that is no longer wanted."""
        member = self._members[incarnation]
        return any(a not in member.copies and not self._wanted(a, places) for a, places in member.unanswered.items())

    def is_able(self, incarnation: int, round_: int | None = None) -> bool:
        """Whether this member can be dealt a part of a round in flight, or of a new one that takes gradients."""
        if self._members[incarnation].is_retiring:
            return False
        if self._one_at_a_time:
            return self.is_idle(incarnation) and not self._would_overwrite(incarnation, round_)
        return not self.is_behind(incarnation)

    def owed_by(self, incarnation: int) -> tuple[Assignment, ...]:
        """The assignments of a member of which something that is still wanted is to come, oldest first."""
        unanswered = self._members[incarnation].unanswered
        return tuple(assignment for assignment, places in unanswered.items() if self._wanted(assignment, places))

    def measured(self, incarnation: int, speed: float) -> None:
        """This member computes so many microbatches a second."""
        self._members[incarnation].speed = speed

    def join(self, rank: int) -> tuple[int, list[Assignment]]:
        """A worker joins. Returns its incarnation, and work for it where some lies idle."""
        incarnation = self._next_incarnation
        self._next_incarnation += 1
        self._members[incarnation] = _Member(rank)
        return incarnation, self.claim(incarnation)

    def retire(self, incarnation: int) -> None:
        """This member is to leave: it is dealt nothing more."""
        self._members[incarnation].is_retiring = True

    def leave(self, incarnation: int) -> list[Assignment]:
        """A member is gone or given up. Returns who does what only it owed."""
        member = self._members.pop(incarnation, None)
        if member is None:
            return []
        for assignment, places in member.unanswered.items():
            self._orphan(assignment.round, places)
        dealt: list[Assignment] = []
        for round_ in self._rounds:
            if able := self._able(round_):
                dealt += self._deal_orphans(round_, able)
        return dealt

    def begin(
        self, round_: int, count: int, to: int | None = None, needed: int | None = None, in_slots: bool = True
    ) -> list[Assignment]:
        """Start a round of `count` microbatches, for all members, or for the one named. Returns who does what.
        `in_slots`: answers are gradients, in memory of the members' (else they come with the frames).

        Where fewer of them are `needed`, who is behind keeps its share, and nobody else computes that unless it is
        needed.
        """
        assert count > 0 and (not self._rounds or round_ > max(self._rounds)), f"round {round_} of {count}"
        places = set(range(count))
        flight = self._rounds[round_] = _Round(places, needed or count, count, in_slots, orphans=set(places))
        dealt: list[Assignment] = []
        if flight.needed < count and to is None and self._members:
            shares = even_shares(count, len(self._members))
            stops = itertools.accumulate(shares)
            for incarnation, share, stop in zip(self.members, shares, stops, strict=True):
                if share and self.is_able(incarnation, round_):
                    dealt.append(self._owe(incarnation, round_, stop - share, stop))
                    flight.orphans -= set(range(stop - share, stop))
        able = self._able(round_) if to is None else [to]
        return dealt + (self._deal_orphans(round_, able) if able else [])

    def close(self, round_: int) -> None:
        """A round is over. What still comes of it is refused."""
        del self._rounds[round_]

    def claim(self, incarnation: int) -> list[Assignment]:
        """What a member that can work may take of what nobody does."""
        dealt: list[Assignment] = []
        for round_ in self._rounds:
            if self.is_able(incarnation, round_):
                dealt += self._deal_orphans(round_, [incarnation])
        return dealt

    def copy(self, assignment: Assignment, incarnation: int) -> Assignment:
        """Have an idle member compute what another owes too. Whoever delivers first counts."""
        copy = self._owe(incarnation, assignment.round, assignment.first, assignment.stop)
        self._members[incarnation].copies.add(copy)
        return copy

    def reopen(self, round_: int, taken: Sequence[tuple[int, int, int]]) -> None:
        """What was taken of a round in flight as (incarnation, first place, stop) is lost again: nobody has done it."""
        flight = self._rounds[round_]
        for entry in taken:
            flight.taken.remove(entry)
            places = set(range(entry[1], entry[2]))
            flight.open |= places
            self._orphan(round_, places)

    def push(self, incarnation: int, round_: int, block: Block) -> Verdict:
        """A member delivers the sum over a block of places. Only ACCEPTED changes what is taken."""
        member = self._members.get(incarnation)
        if member is None:
            return Verdict.FENCED
        places = set(range(block.first, block.stop))
        owed = self._answer(member, round_, places)
        flight = self._rounds.get(round_)
        if flight is None:
            return Verdict.LATE
        if not owed:
            return Verdict.REPEATED if places and places.isdisjoint(flight.open) else Verdict.NOT_OWED
        if not places <= flight.open:
            self._orphan(round_, places)
            return Verdict.REPEATED
        flight.open -= places
        flight.orphans -= places
        flight.taken.append((incarnation, block.first, block.stop))
        return Verdict.ACCEPTED

    def _answer(self, member: _Member, round_: int, places: set[int]) -> bool:
        """Note that these places came. Whether the member owed them."""
        for assignment, unanswered in member.unanswered.items():
            if assignment.round == round_ and places and places <= unanswered:
                unanswered -= places
                if not unanswered:
                    del member.unanswered[assignment]
                    member.copies.discard(assignment)
                return True
        return False

    def _wanted(self, assignment: Assignment, places: Iterable[int]) -> bool:
        flight = self._rounds.get(assignment.round)
        return flight is not None and not flight.open.isdisjoint(places)

    def _would_overwrite(self, incarnation: int, round_: int | None) -> bool:
        """Whether an answer to this round would be written where something of another one, which is not over, lies."""
        if round_ is not None and not self._rounds[round_].in_slots:
            return False
        others = [flight for number, flight in self._rounds.items() if flight.in_slots and number != round_]
        return any(taker == incarnation for flight in others for taker, _, _ in flight.taken)

    def _able(self, round_: int) -> list[int]:
        """Who can be dealt a part of this round, in rank order."""
        return [incarnation for incarnation in self.members if self.is_able(incarnation, round_)]

    def _orphan(self, round_: int, places: set[int]) -> None:
        """Whatever of these is still open and owed by nobody is an orphan."""
        flight = self._rounds.get(round_)
        if flight is None:
            return
        owed = {
            place
            for member in self._members.values()
            for assignment, unanswered in member.unanswered.items()
            if assignment.round == round_
            for place in unanswered
        }
        flight.orphans |= (places & flight.open) - owed

    def _deal_orphans(self, round_: int, incarnations: Sequence[int]) -> list[Assignment]:
        """Deal what nobody does and is needed, in order, as runs of consecutive places."""
        flight = self._rounds[round_]
        short = flight.needed - (flight.count - len(flight.orphans))
        places = sorted(flight.orphans)[: max(0, short)]
        if not places:
            return []
        flight.orphans -= set(places)
        assignments: list[Assignment] = []
        start = 0
        for incarnation, share in zip(incarnations, self._share(len(places), tuple(incarnations)), strict=True):
            for first, stop in _runs(places[start : start + share]):
                assignments.append(self._owe(incarnation, round_, first, stop))
            start += share
        return assignments

    def _owe(self, incarnation: int, round_: int, first: int, stop: int) -> Assignment:
        assignment = Assignment(incarnation, round_, first, stop)
        self._members[incarnation].unanswered[assignment] = set(range(first, stop))
        return assignment

    def _share(self, count: int, incarnations: tuple[int, ...]) -> list[int]:
        """How many places each of these gets: as before, unless their speeds say that it pays to change."""
        newest = max(self._rounds)
        shares, looked_at = self._shares.get((count, incarnations), (even_shares(count, len(incarnations)), None))
        if looked_at is not None and newest - looked_at < _ROUNDS_BETWEEN_LOOKS:
            return shares
        known = [speed for i in incarnations if (speed := self._members[i].speed) is not None]
        if known:
            mean = sum(known) / len(known)
            speeds = [self._members[i].speed or mean for i in incarnations]
            shares = better_shares(shares, speeds) or shares
        while len(self._shares) >= _REMEMBERED:
            self._shares.pop(next(iter(self._shares)))
        self._shares[count, incarnations] = (shares, newest)
        return shares


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Sorted places as maximal spans [first, stop)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
