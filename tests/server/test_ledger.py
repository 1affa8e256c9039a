"""Every shard of a round is taken exactly once, whatever members do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from distrain.reduction import Block
from distrain.server.ledger import Assignment, Ledger, Verdict


class Members(RuleBasedStateMachine):
    """Throws joins, deaths, repeats and late pushes at a ledger and keeps its own account."""

    work = Bundle("work")

    @initialize(num_shards=st.integers(1, 9))
    def start(self, num_shards: int):
        self.ledger = Ledger(num_shards)
        self.num_shards = num_shards
        self.live: set[int] = set()
        self.gone: set[int] = set()
        self.round = -1
        self.taken: dict[int, int] = {}  # shard -> incarnation that delivered it this round
        self.finished_rounds = 0

    def begin_if_complete(self) -> list[Assignment]:
        if not self.ledger.complete:
            return []
        if self.round >= 0:
            assert sorted(self.taken) == list(range(self.num_shards))
            self.finished_rounds += 1
        self.round += 1
        self.taken = {}
        return self.ledger.begin(self.round)

    @rule(target=work, rank=st.integers(0, 5))
    def join(self, rank: int):
        incarnation, assigned = self.ledger.join(rank)
        assert incarnation not in self.live | self.gone
        self.live.add(incarnation)
        return [(self.round, a) for a in assigned]

    @rule(target=work)
    def begin(self):
        return [(self.round, a) for a in self.begin_if_complete()]

    @rule(target=work, data=st.data())
    def die(self, data: st.DataObject):
        if not self.live:
            return []
        incarnation = data.draw(st.sampled_from(sorted(self.live)))
        self.live.discard(incarnation)
        self.gone.add(incarnation)
        return [(self.round, a) for a in self.ledger.leave(incarnation)]

    @rule(work=work, data=st.data(), repeats=st.integers(1, 2))
    def push(self, work: list[tuple[int, Assignment]], data: st.DataObject, repeats: int):
        if not work:
            return
        round_, assignment = data.draw(st.sampled_from(work))
        first = data.draw(st.integers(assignment.first, assignment.stop - 1))
        stop = data.draw(st.integers(first + 1, assignment.stop))
        for _ in range(repeats):
            before = dict(self.taken)
            verdict = self.ledger.push(assignment.incarnation, round_, Block(first, stop))
            if verdict is Verdict.ACCEPTED:
                assert assignment.incarnation in self.live and round_ == self.round
                assert not set(range(first, stop)) & set(before)
                self.taken.update(dict.fromkeys(range(first, stop), assignment.incarnation))
            elif assignment.incarnation in self.gone:
                assert verdict is Verdict.FENCED
            elif round_ != self.round:
                assert verdict is Verdict.LATE
            else:
                assert set(range(first, stop)) & set(before)

    @rule(work=consumes(work))
    def lose_work_silently(self, work: list[tuple[int, Assignment]]):
        """A worker that never answers: nothing happens until somebody gives it up."""

    @invariant()
    def complete_means_every_shard_once(self):
        if hasattr(self, "ledger") and self.round >= 0:
            assert self.ledger.complete == (sorted(self.taken) == list(range(self.num_shards)))

    @invariant()
    def open_shards_are_owed_by_somebody_alive(self):
        if hasattr(self, "ledger") and self.live and not self.ledger.complete:
            assert any(self.ledger.owes(incarnation) for incarnation in self.live)


TestMembers = Members.TestCase
TestMembers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(num_shards=st.integers(1, 30), num_members=st.integers(1, 10))
def test_shards_are_dealt_evenly_in_rank_order(num_shards: int, num_members: int):
    ledger = Ledger(num_shards)
    for rank in reversed(range(num_members)):
        ledger.join(rank)
    dealt = ledger.begin(0)
    assert [a.first for a in dealt] == [0, *[a.stop for a in dealt][:-1]]
    assert dealt[-1].stop == num_shards
    sizes = [a.stop - a.first for a in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert len(dealt) == min(num_members, num_shards)


def test_the_shards_of_a_dead_member_go_to_the_living_at_once():
    ledger = Ledger(4)
    (a, _), (b, _) = ledger.join(0), ledger.join(1)
    ledger.begin(0)
    assert ledger.push(a, 0, Block(0, 1)) is Verdict.ACCEPTED
    assert ledger.leave(a) == [Assignment(b, 1, 2)]
    assert ledger.push(a, 0, Block(1, 2)) is Verdict.FENCED
    assert ledger.push(b, 0, Block(1, 2)) is Verdict.ACCEPTED
    assert ledger.push(b, 0, Block(1, 2)) is Verdict.REPEATED
    assert ledger.push(b, 0, Block(2, 4)) is Verdict.ACCEPTED
    assert ledger.complete


def test_work_waits_for_the_next_member_when_all_are_gone():
    ledger = Ledger(2)
    a, _ = ledger.join(0)
    ledger.begin(0)
    assert ledger.leave(a) == []
    b, assigned = ledger.join(0)
    assert assigned == [Assignment(b, 0, 2)]


def test_a_joiner_takes_part_from_the_next_round_on():
    ledger = Ledger(2)
    a, _ = ledger.join(0)
    ledger.begin(0)
    b, assigned = ledger.join(1)
    assert assigned == []
    assert ledger.push(b, 0, Block(0, 1)) is Verdict.NOT_OWED
    assert ledger.push(a, 0, Block(0, 2)) is Verdict.ACCEPTED
    assert ledger.begin(1) == [Assignment(a, 0, 1), Assignment(b, 1, 2)]
    assert ledger.push(a, 0, Block(0, 1)) is Verdict.LATE


def test_a_ledger_needs_a_shard():
    with pytest.raises(ValueError, match="at least one shard, got 0"):
        Ledger(0)
