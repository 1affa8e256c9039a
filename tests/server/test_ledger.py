"""Every microbatch of a round is taken exactly once, whatever members do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from distrain.reduction import Block
from distrain.server.ledger import Assignment, Ledger, Verdict


class Members(RuleBasedStateMachine):
    """Throws joins, deaths, copies, repeats and late pushes at a ledger and keeps its own account."""

    work = Bundle("work")
    one_at_a_time = False

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.one_at_a_time)
        self.live: set[int] = set()
        self.gone: set[int] = set()
        self.next_round = 0
        self.count: dict[int, int] = {}
        self.needed: dict[int, int] = {}
        self.in_slots: dict[int, bool] = {}
        self.taken: dict[int, dict[int, int]] = {}  # round in flight -> place -> who delivered it
        self.owed: dict[int, list[Assignment]] = {}  # what a member was asked for and has not answered in full

    def asked(self, assignments: list[Assignment]):
        for assignment in assignments:
            if self.one_at_a_time:
                assert all(a.round == assignment.round for a in self.owed.get(assignment.incarnation, []))
                assert not self.would_overwrite(assignment.incarnation, assignment.round)
            self.owed.setdefault(assignment.incarnation, []).append(assignment)
        return multiple(*assignments)

    def would_overwrite(self, incarnation: int, round_: int) -> bool:
        others = [taken for other, taken in self.taken.items() if other != round_ and self.in_slots[other]]
        return self.in_slots[round_] and any(incarnation in taken.values() for taken in others)

    @rule(target=work, rank=st.integers(0, 5))
    def join(self, rank: int):
        incarnation, assigned = self.ledger.join(rank)
        assert incarnation not in self.live | self.gone
        self.live.add(incarnation)
        return self.asked(assigned)

    @rule(target=work, count=st.integers(1, 9), data=st.data())
    def begin(self, count: int, data: st.DataObject):
        if len(self.taken) == 3:
            return multiple()
        round_, self.next_round = self.next_round, self.next_round + 1
        needed, in_slots = data.draw(st.integers(1, count)), data.draw(st.booleans())
        self.taken[round_], self.count[round_], self.needed[round_] = {}, count, needed
        self.in_slots[round_] = in_slots
        return self.asked(self.ledger.begin(round_, count, needed=needed, in_slots=in_slots))

    @rule(data=st.data())
    def close(self, data: st.DataObject):
        whole = [r for r, taken in self.taken.items() if len(taken) >= self.needed[r]]
        if whole:
            round_ = data.draw(st.sampled_from(whole))
            missing = self.ledger.missing(round_)
            assert sorted([*missing, *self.taken[round_]]) == list(range(self.count[round_]))
            self.ledger.close(round_)
            del self.taken[round_]

    @rule(target=work, data=st.data())
    def die(self, data: st.DataObject):
        if not self.live:
            return multiple()
        incarnation = data.draw(st.sampled_from(sorted(self.live)))
        self.live.discard(incarnation)
        self.gone.add(incarnation)
        return self.asked(self.ledger.leave(incarnation))

    @rule(target=work, data=st.data())
    def copy(self, data: st.DataObject):
        idle = [i for i in sorted(self.live) if self.ledger.is_idle(i)]
        late = [a for i in sorted(self.live) for a in self.ledger.owed_by(i)]
        if not idle or not late:
            return multiple()
        of, to = data.draw(st.sampled_from(late)), data.draw(st.sampled_from(idle))
        if self.one_at_a_time and self.would_overwrite(to, of.round):
            return multiple()  # whoever copies asks first
        return self.asked([self.ledger.copy(of, to)])

    @rule(target=work, assignment=work, data=st.data(), repeats=st.integers(1, 2), whole=st.booleans())
    def push(self, assignment: Assignment, data: st.DataObject, repeats: int, whole: bool):
        first = assignment.first if whole else data.draw(st.integers(assignment.first, assignment.stop - 1))
        stop = assignment.stop if whole else data.draw(st.integers(first + 1, assignment.stop))
        places, who, round_ = set(range(first, stop)), assignment.incarnation, assignment.round
        for _ in range(repeats):
            taken = self.taken.get(round_)
            before = set(taken or ())
            verdict = self.ledger.push(who, round_, Block(first, stop))
            if verdict is Verdict.ACCEPTED:
                assert who in self.live and taken is not None and not places & before
                taken.update(dict.fromkeys(places, who))
            elif who in self.gone:
                assert verdict is Verdict.FENCED
            elif taken is None:
                assert verdict is Verdict.LATE
            else:
                assert verdict in (Verdict.REPEATED, Verdict.NOT_OWED)
        if who not in self.live:
            return multiple()
        if self.ledger.is_idle(who):
            self.owed[who] = []
        return self.asked(self.ledger.claim(who))

    @rule(assignment=consumes(work))
    def lose_work_silently(self, assignment: Assignment):
        """A worker that never answers: nothing happens until somebody gives it up."""

    @invariant()
    def taken_is_as_accepted(self):
        assert set(self.ledger.rounds) == set(self.taken)
        for round_, taken in self.taken.items():
            told = {place: who for who, first, stop in self.ledger.taken(round_) for place in range(first, stop)}
            assert told == taken
            assert set(self.ledger.missing(round_)) == set(range(self.count[round_])) - set(taken)

    @invariant()
    def what_is_needed_is_owed_by_somebody_alive(self):
        """Unless nobody can take it: all are behind. One at a time: are busy, or it takes gradients, which whoever runs
        the rounds deals again as others end."""
        for round_, taken in self.taken.items():
            if self.one_at_a_time:
                able = not self.in_slots[round_] and any(self.ledger.is_idle(i) for i in self.live)
            else:
                able = any(not self.ledger.is_behind(i) for i in self.live)
            is_owed = any(a.round == round_ for i in self.live for a in self.ledger.owed_by(i))
            assert is_owed or not able or len(taken) >= self.needed[round_]


class MembersOneAtATime(Members):
    one_at_a_time = True


TestMembers = Members.TestCase
TestMembers.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMembersOneAtATime = MembersOneAtATime.TestCase
TestMembersOneAtATime.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@given(count=st.integers(1, 30), num_members=st.integers(1, 10))
def test_a_round_is_dealt_evenly_in_rank_order(count: int, num_members: int):
    ledger = Ledger()
    for rank in reversed(range(num_members)):
        ledger.join(rank)
    dealt = ledger.begin(0, count)
    assert [a.first for a in dealt] == [0, *[a.stop for a in dealt][:-1]]
    assert dealt[-1].stop == count
    sizes = [a.stop - a.first for a in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert len(dealt) == min(num_members, count)


def test_what_a_dead_member_owed_goes_to_the_living_at_once():
    ledger = Ledger()
    (a, _), (b, _) = ledger.join(0), ledger.join(1)
    ledger.begin(0, 4)
    assert ledger.push(a, 0, Block(0, 1)) is Verdict.ACCEPTED
    assert ledger.leave(a) == [Assignment(b, 0, 1, 2)]
    assert ledger.push(a, 0, Block(1, 2)) is Verdict.FENCED
    assert ledger.push(b, 0, Block(1, 2)) is Verdict.ACCEPTED
    assert ledger.push(b, 0, Block(1, 2)) is Verdict.REPEATED
    assert ledger.push(b, 0, Block(2, 4)) is Verdict.ACCEPTED
    assert ledger.missing(0) == ()


def test_work_waits_for_the_next_member_when_all_are_gone():
    ledger = Ledger()
    a, _ = ledger.join(0)
    ledger.begin(0, 2)
    assert ledger.leave(a) == []
    b, assigned = ledger.join(0)
    assert assigned == [Assignment(b, 0, 0, 2)]


def test_a_joiner_takes_part_from_the_next_round_on():
    ledger = Ledger()
    a, _ = ledger.join(0)
    ledger.begin(0, 2)
    b, assigned = ledger.join(1)
    assert assigned == []
    assert ledger.push(b, 0, Block(0, 1)) is Verdict.NOT_OWED
    assert ledger.push(a, 0, Block(0, 2)) is Verdict.ACCEPTED
    ledger.close(0)
    assert ledger.begin(1, 2) == [Assignment(a, 1, 0, 1), Assignment(b, 1, 1, 2)]
    assert ledger.push(a, 0, Block(0, 1)) is Verdict.LATE


def test_the_first_of_two_copies_counts_and_who_was_overtaken_gets_nothing_before_it_answered():
    ledger = Ledger()
    (a, _), (b, _) = ledger.join(0), ledger.join(1)
    _, late = ledger.begin(0, 4)
    assert ledger.push(a, 0, Block(0, 2)) is Verdict.ACCEPTED
    assert ledger.copy(late, a) == Assignment(a, 0, 2, 4)
    assert ledger.push(a, 0, Block(2, 4)) is Verdict.ACCEPTED
    assert ledger.missing(0) == () and ledger.is_behind(b) and not ledger.owes(b)
    ledger.close(0)
    assert ledger.begin(1, 4) == [Assignment(a, 1, 0, 4)]
    assert ledger.push(b, 0, Block(2, 4)) is Verdict.LATE
    assert ledger.is_idle(b)


def test_a_copy_outlives_the_one_it_was_made_for():
    ledger = Ledger()
    (a, _), (b, _) = ledger.join(0), ledger.join(1)
    _, late = ledger.begin(0, 2)
    ledger.push(a, 0, Block(0, 1))
    ledger.copy(late, a)
    assert ledger.leave(b) == []
    assert ledger.push(a, 0, Block(1, 2)) is Verdict.ACCEPTED


def test_shares_follow_the_measured_speeds_and_stay_where_little_is_to_be_won():
    ledger = Ledger()
    (a, _), (b, _) = ledger.join(0), ledger.join(1)

    def shares(round_: int) -> list[int]:
        dealt = ledger.begin(round_, 10)
        for assignment in dealt:
            ledger.push(assignment.incarnation, round_, Block(assignment.first, assignment.stop))
        ledger.close(round_)
        return [assignment.stop - assignment.first for assignment in dealt]

    assert shares(0) == [5, 5]
    ledger.measured(a, 40.0)
    ledger.measured(b, 10.0)
    found = [shares(round_) for round_ in range(1, 40)]
    assert found[0] == [5, 5] and found[-1] == [8, 2], "a look at the speeds every few rounds"
    ledger.measured(a, 38.0)
    ledger.measured(b, 11.0)
    assert shares(100) == [8, 2], "2 % are not worth opening a shard again"


def test_with_a_quorum_who_is_behind_keeps_its_share():
    ledger = Ledger()
    members = [ledger.join(rank)[0] for rank in range(4)]
    ledger.begin(0, 4, needed=3)
    for place in range(3):
        assert ledger.push(members[place], 0, Block(place, place + 1)) is Verdict.ACCEPTED
    assert ledger.missing(0) == (3,)
    ledger.close(0)
    assert ledger.begin(1, 4, needed=3) == [Assignment(members[place], 1, place, place + 1) for place in range(3)]
    assert ledger.claim(members[0]) == []
    [again] = ledger.leave(members[1])
    assert (again.first, again.stop) == (1, 2) and again.incarnation in (members[0], members[2])
