from __future__ import annotations

from distrain.study.advice import advise, cost_of, in_words, seconds
from distrain.study.point import Point, Target
from tests.study.points import point


def with_target(name: str, workers: int, at: float, before: float) -> Point:
    return point(64, workers, name=name, target=Target(100, 6400, at, before), blocks=[(0.0, 1.0, 0.0, 0.0, 0.0)] * 2)


def test_fastest_cheapest_and_best_value_are_told_apart():
    points = [
        with_target("one", 1, 100.0, 95.0),
        with_target("two", 2, 52.0, 49.0),
        with_target("eight", 8, 30.0, 29.9),
        Point("broken", {}, "failed", "no"),
        point(64, 4, name="missed", target=None),
    ]
    advice = advise(points, has_target=True)
    chosen = {choice.title: choice.cost.point.name for choice in advice.choices}
    assert chosen == {"fastest": "eight", "cheapest": "one", "best value": "two"}
    words = in_words(advice.choices[2])
    assert "1.73 times the least time at 1.04 times the least worker time" in words
    assert "the same: two" in in_words(advice.choices[1]), "104 worker-seconds are 100 within the two errors"


def test_what_the_measurements_cannot_tell_apart_is_said():
    points = [with_target("a", 1, 10.0, 5.0), with_target("b", 1, 11.0, 6.0), with_target("c", 1, 40.0, 39.0)]
    fastest = advise(points, has_target=True).choices[0]
    assert [p.name for p in fastest.like] == ["b"]
    cost = cost_of(points[0], has_target=True)
    assert cost is not None and cost.error == 0.25  # half of the 5 s between validations, of 10 s


def test_without_a_target_speed_decides():
    advice = advise([point(64, 1), point(1024, 2)], has_target=False)
    assert advice.choices[0].cost.point.batch_size == 1024
    assert "for a million rows" in in_words(advice.choices[0])


def test_nothing_finished():
    assert advise([Point("a", {}, "failed", "no")], has_target=False).basis == "no point finished"
    assert advise([point(target=None)], has_target=True).basis == "no point reached the target"


def test_durations():
    assert [seconds(v) for v in (0.0123, 90, 600, 9000)] == ["0.0123 s", "90 s", "10 min", "2.5 h"]
