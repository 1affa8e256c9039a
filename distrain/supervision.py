"""What to do when a worker or the server ends. Pure: decisions only, the crew carries them out."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_FAILED_STARTS = 4
_FIRST_BACK_OFF_S = 0.5

SERVER = -1  # the server's place


@dataclass(frozen=True, slots=True)
class Replace:
    """Start a new worker (or server) in the place of the old one, after a pause."""

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
    is_taken: bool = False


class Supervision:
    """Decides for each place (rank, or SERVER) whether a worker or server that ended is replaced.

    A server is replaced, however often it ends, as long as it gets further each time; after four times in a row without
    a new step the run ends. A worker that took part in at least one whole step is replaced at once, however often that
    happens. One that ends before that counts as a failed start: the pauses double, and after four in a row the place is
    given up, or the run if fewer than `min_workers` places would be left, of those that were ever started.
    """

    def __init__(self, num_workers: int, min_workers: int) -> None:
        self._places = [_Place() for _ in range(num_workers)]
        self._min_workers = min_workers
        self._server_at, self._server_failures = -1, 0
        self.failures = 0  # workers that ended before the run did

    @property
    def taken(self) -> set[int]:
        """The ranks whose workers were started, and that are not given up."""
        return {rank for rank, place in enumerate(self._places) if place.is_taken}

    def started(self, rank: int) -> None:
        """There was room for the worker of this rank, and it starts."""
        self._places[rank].is_taken = True

    def joined(self, rank: int, step: int) -> None:
        """The worker of this rank joined when the run was at `step`."""
        self._places[rank].joined_at = step

    def server_ended(self, cause: str, step: int) -> Replace | Fail:
        """The server ended for `cause` (one line) when the furthest step that it had reported was `step`."""
        self._server_failures = 1 if step > self._server_at else self._server_failures + 1
        self._server_at = step
        for place in self._places:  # its workers end with it, which is not their failure
            place.joined_at = None
        if self._server_failures < _MAX_FAILED_STARTS:
            return Replace(SERVER, _pause(self._server_failures))
        return Fail(f"the parameter server died {self._server_failures} times without finishing a step: {cause}")

    def ended(self, rank: int, cause: str, step: int) -> Decision:
        """The worker of this rank ended for `cause` (one line) when the run was at `step`."""
        place = self._places[rank]
        self.failures += 1
        settled = place.joined_at is not None and step > place.joined_at + 1
        place.joined_at = None
        place.failed_starts = 0 if settled else place.failed_starts + 1
        if place.failed_starts < _MAX_FAILED_STARTS:
            return Replace(rank, _pause(place.failed_starts))
        place.is_taken = False
        left = len(self.taken)
        message = f"worker {rank} failed {place.failed_starts} times in a row before finishing a step: {cause}"
        if left >= self._min_workers and left > 0:
            return GiveUp(rank, f"{message}; going on with {left}")
        return Fail(f"{message}; workers.min is {self._min_workers}, and {left} would be left")


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return _FIRST_BACK_OFF_S * 2.0 ** (failures - 2) if failures > 1 else 0.0
