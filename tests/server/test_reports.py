"""What the mailbox keeps where nobody takes it in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distrain.server.reports import _MAX_SNAPSHOTS, Captured, Reports


def snapshot(step: int, kind: str = "plain") -> Captured:
    metrics = {} if kind == "plain" else {"loss": 1.0 / step}
    return Captured(step, 0, False, {}, {}, {}, metrics, is_best=kind == "best")


def kept_of(*kinds: str) -> list[int]:
    """The steps of those that are left, where the snapshots of steps 1, 2, .. are of these kinds."""
    reports = Reports()
    for step, kind in enumerate(kinds, start=1):
        reports.snapshot(snapshot(step, kind))
    reports.drain()
    return [each.step for each in iter(reports.take_snapshot, None)]


def test_the_oldest_that_was_not_validated_gives_way():
    assert kept_of("validated", "plain", "plain", "validated", "validated") == [1, 3, 4, 5]


def test_where_all_were_validated_the_oldest_gives_way_that_is_not_the_best():
    assert kept_of("best", "validated", "validated", "validated", "validated") == [1, 3, 4, 5]
    assert kept_of("best", "best", "validated", "validated", "validated") == [2, 3, 4, 5]


@given(st.lists(st.sampled_from(["plain", "validated", "best"]), min_size=1, max_size=12))
def test_the_best_and_the_last_are_always_kept(kinds: list[str]):
    kept = kept_of(*kinds)
    assert kept == sorted(kept) and len(kept) == min(len(kinds), _MAX_SNAPSHOTS)
    assert kept[-1] == len(kinds)
    assert "best" not in kinds or len(kinds) - kinds[::-1].index("best") in kept


def test_what_gives_way_is_not_given_out_and_neither_is_what_came_after_the_last_drain():
    reports = Reports()
    for step in range(1, 4):
        reports.snapshot(snapshot(step, "best" if step == 1 else "validated"))
    reports.drain()
    for step in range(4, 7):
        reports.snapshot(snapshot(step))
    assert [each.step for each in iter(reports.take_snapshot, None)] == [1, 2, 3]
    reports.drain()
    assert [each.step for each in iter(reports.take_snapshot, None)] == [6]
