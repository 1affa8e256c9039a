"""How many microbatches each worker gets, by its speed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_WORTH = 0.9  # dealing anew moves shards, and a moved shard is opened again: it must save this much


def even_shares(count: int, num_workers: int) -> list[int]:
    """`count` microbatches over so many workers, as evenly as they go."""
    return [(place + 1) * count // num_workers - place * count // num_workers for place in range(num_workers)]


def fastest_shares(count: int, speeds: Sequence[float]) -> list[int]:
    """The shares with which all are done soonest. `speeds`: microbatches a second, of each worker.

    Each microbatch in turn goes to whoever would have done it first, which is optimal for microbatches of one size
    (Graham's list scheduling on uniform machines).
    """
    shares = [0] * len(speeds)
    for _ in range(count):
        first = min(range(len(speeds)), key=lambda worker: (shares[worker] + 1) / speeds[worker])
        shares[first] += 1
    return shares


def seconds_needed(shares: Sequence[int], speeds: Sequence[float]) -> float:
    """When the last worker would be done with its share."""
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


def better_shares(shares: Sequence[int], speeds: Sequence[float]) -> list[int] | None:
    """Shares that are done at least 10 % sooner than these, or None."""
    best = fastest_shares(sum(shares), speeds)
    worth_it = seconds_needed(best, speeds) < _WORTH * seconds_needed(shares, speeds)
    return best if worth_it else None
