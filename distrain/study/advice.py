"""Which point pays: fastest, cheapest, best value, in words with reason and uncertainty. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distrain.study.point import Point


@dataclass(frozen=True)
class Cost:
    """What a point costs: seconds and worker-seconds to the target, or for a million rows where none was set.

    `error` is a share of the seconds: two standard errors of the step time, and half the time between two validations,
    since the target was reached somewhere in between.
    """

    point: Point
    seconds: float
    error: float

    @property
    def worker_seconds(self) -> float:
        return self.seconds * self.point.workers


@dataclass(frozen=True)
class Choice:
    """One recommendation."""

    title: str  # fastest, cheapest, best value
    cost: Cost
    reason: str
    like: tuple[Point, ...]  # points that the measurements cannot tell from it


@dataclass(frozen=True)
class Advice:
    """The recommendations, or why there are none."""

    choices: tuple[Choice, ...]
    basis: str


def cost_of(point: Point, has_target: bool) -> Cost | None:
    """A point's cost; None where it did not finish or did not reach the target."""
    if not point.is_finished:
        return None
    if not has_target:
        if not point.samples_per_second:
            return None
        return Cost(point, 1e6 / point.samples_per_second, 2 * point.speed_error)
    if point.target is None:
        return None
    interval = (point.target.seconds - point.target.from_seconds) / 2 / max(point.target.seconds, 1e-9)
    return Cost(point, point.target.seconds, math.hypot(2 * point.speed_error, interval))


def advise(points: Sequence[Point], has_target: bool) -> Advice:
    """The fastest point, the one of fewest worker-seconds, and the one where time x worker-seconds is least."""
    costs = [cost for point in points if (cost := cost_of(point, has_target)) is not None]
    what = "to the target" if has_target else "for a million rows"
    if not costs:
        return Advice((), "no point reached the target" if has_target else "no point finished")
    least = min(cost.seconds for cost in costs)
    cheapest = min(cost.worker_seconds for cost in costs)

    def choose(title: str, measure: Callable[[Cost], float], reason: Callable[[Cost], str]) -> Choice:
        best = min(costs, key=measure)
        close = tuple(
            cost.point
            for cost in costs
            if cost is not best and measure(cost) * (1 - cost.error) <= measure(best) * (1 + best.error)
        )
        return Choice(title, best, reason(best), close)

    def fast(cost: Cost) -> str:
        return f"{seconds(cost.seconds)} {what}, the least of all"

    def cheap(cost: Cost) -> str:
        slower = f"{cost.seconds / least:.2f} times the fastest's time"
        return f"{seconds(cost.worker_seconds)} of worker time {what}, the least of all, in {slower}"

    def valuable(cost: Cost) -> str:
        return (
            f"{cost.seconds / least:.2f} times the least time at {cost.worker_seconds / cheapest:.2f} times the least "
            f"worker time ({seconds(cost.seconds)} and {seconds(cost.worker_seconds)} {what}), the smallest product"
        )

    choices = (
        choose("fastest", lambda c: c.seconds, fast),
        choose("cheapest", lambda c: c.worker_seconds, cheap),
        choose("best value", lambda c: c.seconds * c.worker_seconds, valuable),
    )
    return Advice(choices, what)


def in_words(choice: Choice) -> str:
    """A recommendation as a sentence or two."""
    text = f"{choice.title}: {choice.cost.point.name}: {choice.reason} (+-{100 * choice.cost.error:.0f} %)."
    if choice.like:
        names = "; ".join(point.name for point in choice.like[:3])
        more = f" and {len(choice.like) - 3} more" if len(choice.like) > 3 else ""
        text += f" Within the measurements' error the same: {names}{more}."
    return text


def seconds(value: float) -> str:
    """`8.3 s`, `12 min`, `3.1 h`."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
