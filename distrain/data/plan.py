"""Which rows make up microbatch (epoch, step, shard). Pure: row counts and a seed, no I/O.

Epoch e permutes the row groups of all files with (seed, e) and lays their rows end to end: one line of N rows. Shard k
is the span [kN/S, (k+1)N/S). Inside a shard, consecutive row groups form windows of about `shuffle_rows` rows, each
permuted with (seed, e, k, window). Microbatch (t, k) is the t-th cut of shard k.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_REMEMBERED = 64  # windows of so many (epoch, shard)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of one row group, counted over all files in order."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive pieces of a shard that are shuffled together. `start` is its first row within the shard."""

    index: int
    start: int
    num_rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """Deals the rows of every epoch out to steps and shards.

    `row_counts` are the rows of each row group; `batch_size` the rows of a step, over all shards. A microbatch of more
    than `forward_rows` rows is cut into pieces of nearly equal size (None: never).
    """

    row_counts: tuple[int, ...]
    batch_size: int
    num_shards: int
    shuffle_rows: int = 65536
    seed: int = 0
    shuffle: bool = True
    forward_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_shards", "shuffle_rows", "forward_rows"):
            if (getattr(self, name) or (name == "forward_rows")) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.num_rows:
            raise ValueError("a plan needs at least one row")

    @cached_property
    def num_rows(self) -> int:
        return sum(self.row_counts)

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of a step counted from 0 over all epochs."""
        return divmod(step, self.steps_per_epoch)

    def shard_rows(self, shard: int) -> int:
        """Rows of a shard in every epoch."""
        start, stop = self._span(shard)
        return stop - start

    def cut(self, step_in_epoch: int, shard: int) -> tuple[int, int]:
        """Rows [start, stop) of the shard that make up microbatch (step_in_epoch, shard).

        Steps deal rows to the shards like cards, the larger shards first, so that a step's microbatches differ by at
        most one row and add up to the batch size.
        """
        return self._given(step_in_epoch, shard), self._given(step_in_epoch + 1, shard)

    def num_microbatch_rows(self, step_in_epoch: int, shard: int) -> int:
        """Rows of microbatch (step_in_epoch, shard), the same in every epoch. A last partial step may have none."""
        start, stop = self.cut(step_in_epoch, shard)
        return stop - start

    def num_rows_of(self, step: int, shard: int) -> int:
        """Rows of microbatch (step, shard), `step` counted from the run's beginning."""
        return self.num_microbatch_rows(self.position(step)[1], shard)

    @cached_property
    def num_microbatches(self) -> int:
        """Microbatches of an epoch that have rows."""
        last = self.steps_per_epoch - 1
        return last * self.num_shards + sum(self.num_microbatch_rows(last, k) > 0 for k in range(self.num_shards))

    @cached_property
    def smallest_forward(self) -> int:
        """The fewest rows of any forward pass: of a microbatch that has any, or of a piece of one."""
        last = self.num_rows - (self.steps_per_epoch - 1) * self.batch_size
        sizes: set[int] = set()
        for rows in (min(self.batch_size, self.num_rows), last):
            fewest, more = divmod(rows, self.num_shards)
            sizes |= {fewest, fewest + 1} if more else {fewest}
        return min(size // self._num_pieces(size) for size in sizes - {0})

    def num_pieces(self, step_in_epoch: int, shard: int) -> int:
        """In how many pieces microbatch (step_in_epoch, shard) is computed; an empty one in one."""
        return self._num_pieces(self.num_microbatch_rows(step_in_epoch, shard))

    def piece(self, step_in_epoch: int, shard: int, number: int) -> tuple[int, int]:
        """Rows [start, stop) of the shard that are piece `number` of microbatch (step_in_epoch, shard)."""
        start, stop = self.cut(step_in_epoch, shard)
        rows, count = stop - start, self._num_pieces(stop - start)
        return start + number * rows // count, start + (number + 1) * rows // count

    def _num_pieces(self, rows: int) -> int:
        return 1 if self.forward_rows is None else max(1, -(-rows // self.forward_rows))

    def windows(self, epoch: int, shard: int) -> tuple[Window, ...]:
        """The windows of a shard in one epoch, in order."""
        key = (epoch, shard)
        if key not in self._windows:
            while len(self._windows) >= _REMEMBERED:
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._cut_windows(epoch, shard)
        return self._windows[key]

    def order(self, epoch: int, shard: int, window: Window) -> NDArray[np.int64]:
        """The order in which a window's rows are given out: int64 [num_rows]."""
        if not self.shuffle:
            return np.arange(window.num_rows)
        seed = np.random.SeedSequence([self.seed, epoch, shard, window.index])
        return np.random.Generator(np.random.PCG64(seed)).permutation(window.num_rows)

    def slices(
        self, epoch: int, step_in_epoch: int, shard: int, piece: int | None = None
    ) -> list[tuple[Window, int, int]]:
        """(window, start, stop): the positions in each window's order that make up the microbatch, or a piece of it."""
        start, stop = self.cut(step_in_epoch, shard) if piece is None else self.piece(step_in_epoch, shard, piece)
        windows = self.windows(epoch, shard)
        slices: list[tuple[Window, int, int]] = []
        index = bisect_right(windows, start, key=lambda window: window.start) - 1
        while start < stop:
            window = windows[index]
            end = min(stop, window.start + window.num_rows)
            slices.append((window, start - window.start, end - window.start))
            start, index = end, index + 1
        return slices

    @cached_property
    def _windows(self) -> dict[tuple[int, int], tuple[Window, ...]]:
        """The windows asked for last, since every step asks again."""
        return {}

    def row(self, epoch: int, step_in_epoch: int, shard: int, index: int) -> tuple[int, int]:
        """(row group, row in it) of a microbatch's row number `index`: to say where a bad value came from."""
        for window, start, stop in self.slices(epoch, step_in_epoch, shard):
            if index < stop - start:
                position = int(self.order(epoch, shard, window)[start + index])
                for piece in window.pieces:
                    if position < piece.stop - piece.start:
                        return piece.row_group, piece.start + position
                    position -= piece.stop - piece.start
            index -= stop - start
        raise IndexError(f"the microbatch has no row {index}")

    def _span(self, shard: int) -> tuple[int, int]:
        return shard * self.num_rows // self.num_shards, (shard + 1) * self.num_rows // self.num_shards

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        """Each shard's place in the dealing: larger shards first."""
        order = sorted(range(self.num_shards), key=lambda shard: (-self.shard_rows(shard), shard))
        ranks = [0] * self.num_shards
        for rank, shard in enumerate(order):
            ranks[shard] = rank
        return tuple(ranks)

    def _given(self, num_steps: int, shard: int) -> int:
        """Rows that a shard has given after so many steps of an epoch."""
        dealt = min(num_steps * self.batch_size, self.num_rows)
        return (dealt + self.num_shards - 1 - self._ranks[shard]) // self.num_shards

    def _line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's row groups in their order, and where each starts in the line (one more entry: its end)."""
        order = np.arange(len(self.row_counts))
        if self.shuffle:
            seed = np.random.SeedSequence([self.seed, epoch])
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.row_counts))
        return order, np.concatenate([[0], np.cumsum(np.asarray(self.row_counts, dtype=np.int64)[order])])

    def _cut_windows(self, epoch: int, shard: int) -> tuple[Window, ...]:
        windows: list[Window] = []
        pieces: list[Piece] = []
        held = given = 0
        for piece in self._pieces(epoch, shard):
            pieces.append(piece)
            held += piece.stop - piece.start
            if held >= self.shuffle_rows:
                windows.append(Window(len(windows), given, held, tuple(pieces)))
                given, pieces, held = given + held, [], 0
        if pieces:
            windows.append(Window(len(windows), given, held, tuple(pieces)))
        return tuple(windows)

    def _pieces(self, epoch: int, shard: int) -> Iterator[Piece]:
        """The shard's span as pieces of row groups. One much larger than a window is split evenly: windows are held
        in memory."""
        order, starts = self._line(epoch)
        first, stop = self._span(shard)
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while first < stop:
            base, end = int(starts[place]), min(stop, int(starts[place + 1]))
            rows = end - first
            parts = max(1, round(rows / self.shuffle_rows)) if rows > 2 * self.shuffle_rows else 1
            cuts = [first - base + rows * part // parts for part in range(parts + 1)]
            for lower, upper in pairwise(cuts):
                if lower < upper:
                    yield Piece(int(order[place]), lower, upper)
            first, place = end, place + 1
