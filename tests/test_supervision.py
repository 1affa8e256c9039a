"""What to do when a worker ends, as values."""

from __future__ import annotations

from distrain.supervision import SERVER, Fail, GiveUp, Replace, Supervision


def started(num_workers: int, min_workers: int, num_started: int | None = None) -> Supervision:
    """With so many workers started; None: all."""
    supervision = Supervision(num_workers, min_workers)
    for rank in range(num_workers if num_started is None else num_started):
        supervision.started(rank)
    return supervision


def test_a_worker_that_took_part_is_replaced_at_once_every_time():
    supervision = started(num_workers=2, min_workers=1)
    for round_ in range(50):
        supervision.joined(0, step=10 * round_)
        assert supervision.ended(0, "killed", step=10 * round_ + 5) == Replace(0, 0.0)
    assert supervision.failures == 50


def test_failed_starts_back_off_then_give_the_place_up_then_fail():
    supervision = started(num_workers=2, min_workers=1)
    decisions = [supervision.ended(1, "no such module", step=3) for _ in range(4)]
    assert decisions[:3] == [Replace(1, 0.0), Replace(1, 0.5), Replace(1, 1.0)]
    assert isinstance(decisions[3], GiveUp) and "going on with 1" in decisions[3].message
    last = [supervision.ended(0, "no such module", step=3) for _ in range(4)][-1]
    assert isinstance(last, Fail)
    assert last.message == (
        "worker 0 failed 4 times in a row before finishing a step: no such module; "
        "workers.min is 1, and 0 would be left"
    )


def test_dying_in_the_first_step_again_and_again_counts_as_failed_starts():
    supervision = started(num_workers=1, min_workers=1)
    for _ in range(3):
        supervision.joined(0, step=7)
        assert isinstance(supervision.ended(0, "out of memory", step=8), Replace)
    supervision.joined(0, step=7)
    assert isinstance(supervision.ended(0, "out of memory", step=8), Fail)


def test_one_good_life_forgives_failed_starts():
    supervision = started(num_workers=1, min_workers=1)
    for _ in range(3):
        supervision.ended(0, "slow disk", step=0)
    supervision.joined(0, step=0)
    assert supervision.ended(0, "killed", step=9) == Replace(0, 0.0)
    assert supervision.ended(0, "slow disk", step=9) == Replace(0, 0.0)


def test_a_server_that_gets_further_each_time_is_replaced_for_ever():
    supervision = started(num_workers=2, min_workers=1)
    for step in range(1, 50):
        assert supervision.server_ended("killed", step) == Replace(SERVER, 0.0)
    assert supervision.failures == 0


def test_a_server_that_dies_at_the_same_step_again_and_again_ends_the_run():
    supervision = started(num_workers=2, min_workers=1)
    decisions = [supervision.server_ended("out of memory", step=7) for _ in range(4)]
    assert decisions[:3] == [Replace(SERVER, pause) for pause in (0.0, 0.5, 1.0)]
    assert decisions[3] == Fail("the parameter server died 4 times without finishing a step: out of memory")


def test_places_that_there_was_never_room_for_do_not_keep_a_run_alive():
    supervision = started(num_workers=8, min_workers=1, num_started=2)
    first = [supervision.ended(0, "no such module", step=0) for _ in range(4)][-1]
    assert isinstance(first, GiveUp) and "going on with 1" in first.message
    last = [supervision.ended(1, "no such module", step=0) for _ in range(4)][-1]
    assert isinstance(last, Fail) and "0 would be left" in last.message
