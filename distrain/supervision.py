"""What to do when a worker ends. Pure: decisions only, the trainer carries them out."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_FAILED_STARTS = 5
_FIRST_BACK_OFF_S = 0.5


@dataclass(frozen=True, slots=True)
class Replace:
    """Start a new worker in the place of the old one, after a pause."""

    rank: int
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave this place empty and go on with the workers that are left."""

    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class Fail:
    """End the run."""

    message: str


Decision = Replace | GiveUp | Fail


@dataclass(slots=True)
class _Place:
    failed_starts: int = 0
    joined_at: int | None = None
    empty: bool = False


class Supervision:
    """Decides for each place (rank) whether a worker that ended is replaced.

    A worker that took part in at least one whole step is replaced at once, however often that happens. One that ends
    before that counts as a failed start: the pauses double, and after five in a row the place is given up, or the run
    if fewer than `min_workers` places would be left.
    """

    def __init__(self, num_workers: int, min_workers: int) -> None:
        self._places = [_Place() for _ in range(num_workers)]
        self._min_workers = min_workers
        self.failures = 0  # workers that ended before the run did

    def joined(self, rank: int, step: int) -> None:
        """The worker of this rank joined when the run was at `step`."""
        self._places[rank].joined_at = step

    def ended(self, rank: int, cause: str, step: int) -> Decision:
        """The worker of this rank ended for `cause` (one line) when the run was at `step`."""
        place = self._places[rank]
        self.failures += 1
        settled = place.joined_at is not None and step > place.joined_at + 1
        place.joined_at = None
        place.failed_starts = 0 if settled else place.failed_starts + 1
        if place.failed_starts < _MAX_FAILED_STARTS:
            pause = _FIRST_BACK_OFF_S * 2 ** (place.failed_starts - 2) if place.failed_starts > 1 else 0.0
            return Replace(rank, pause)
        place.empty = True
        left = sum(not place.empty for place in self._places)
        message = f"worker {rank} failed {place.failed_starts} times in a row before finishing a step: {cause}"
        if left >= self._min_workers and left > 0:
            return GiveUp(rank, f"{message}; going on with {left}")
        return Fail(f"{message}; workers.min is {self._min_workers}, and {left} would be left")
