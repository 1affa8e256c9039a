"""The loss scale as a state machine."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from distrain.server.loss_scale import LossScale, first_scale


def test_it_halves_on_an_overflow_and_doubles_after_so_many_good_updates():
    scale = LossScale(1024.0, growth_steps=3)
    assert scale.overflowed(1, 1024.0) and scale.now == 512.0
    for step in (2, 3, 4):
        assert scale.now == 512.0
        scale.applied(step, 512.0)
    assert scale.now == 1024.0
    scale.applied(5, 1024.0)
    scale.applied(6, 1024.0)
    assert scale.overflowed(7, 1024.0)
    scale.applied(8, 512.0)
    assert scale.now == 512.0, "an overflow starts the count again"


def test_rounds_in_flight_at_the_old_scale_do_not_halve_it_again():
    scale = LossScale(1024.0, staleness=2, growth_steps=1)
    assert [scale.after(read) for read in (0, 0, 0)] == [1024.0] * 3
    for step in (1, 2, 3):
        assert scale.overflowed(step, 1024.0)
    assert scale.now == 512.0
    assert scale.after(1) == scale.after(3) == 512.0
    scale.applied(4, 1024.0)
    assert scale.now == 512.0, "it says nothing about 512"


def test_it_ends_where_no_scale_helps():
    scale, step = LossScale(2.0), 1
    while scale.overflowed(step, scale.now):
        step += 1
    assert step == 25 and scale.now == 2.0**-23


@given(st.integers(1, 10**9))
def test_it_begins_with_a_power_of_two_that_fits_a_sum_over_the_rows(rows: int):
    scale = first_scale(rows)
    assert math.frexp(scale)[0] == 0.5
    assert 2.0**16 <= scale * rows < 2.0**17


HAPPENINGS = st.lists(st.sampled_from(["applied", "overflowed", "skipped"]), max_size=40)


@given(st.integers(0, 3), HAPPENINGS, st.integers(0, 40))
def test_restored_at_any_update_it_goes_on_as_it_would_have(staleness: int, happens: list[str], at: int):
    """Each step uses the scale after the update that it reads, `staleness` updates ago. Those in flight when a run
    stops begin again once it goes on."""

    def run(scale: LossScale, first: int, last: int) -> list[float]:
        used = []
        for step in range(first, last):
            used.append(scale.after(max(0, step - 1 - staleness)))
            if happens[step - 1] == "skipped":
                scale.skipped(step)
            else:
                getattr(scale, happens[step - 1])(step, used[-1])
        return used

    end, at = len(happens) + 1, min(at, len(happens))
    expected = run(LossScale(2.0**60, staleness, growth_steps=3), 1, end)
    scale = LossScale(2.0**60, staleness, growth_steps=3)
    run(scale, 1, at + 1)
    state = json.loads(json.dumps(scale.state_dict()))
    restored = LossScale(2.0**60, staleness, growth_steps=3)
    restored.load_state_dict(state)
    assert run(restored, at + 1, end) == expected[at:]
