"""One shard's microbatches, read ahead a window at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from distrain.data.plan import Plan, Window
from distrain.data.ragged import Batch, Ragged, RaggedBuffer, RawBatch, pad
from distrain.errors import TrainingError
from distrain.process import run_in_the_background

_Buffer = dict[str, Tensor | RaggedBuffer]
_Key = tuple[int, int]  # (epoch, window)


class Rows(Protocol):
    """What a reader needs of a data set."""

    def read(self, row_group: int, start: int, stop: int) -> Iterator[RawBatch]:
        """Rows [start, stop) of a row group, as batches of tensors [rows, ...], or of ragged rows."""

    def place(self, row_group: int) -> object:
        """Where a row group lies, to say so."""


@dataclass
class _Loaded:
    """A window in memory: its rows as they lie in the files, and the order in which they are given out."""

    buffer: _Buffer  # the memory, enough for the largest window so far
    rows: RawBatch  # its first rows
    order: Tensor


class Reader:
    """Gives out microbatches of one shard.

    A thread loads windows ahead, across the end of an epoch too; at most two are in memory. Asking for microbatches in
    order waits for I/O only when the thread falls behind; any other position is sought by loading its window.
    """

    def __init__(self, dataset: Rows, plan: Plan, shard: int) -> None:
        self._plan = plan
        self._shard = shard
        self._loader = _Loader(dataset, plan, shard)

    def microbatch(self, epoch: int, step_in_epoch: int, piece: int | None = None) -> Batch:
        """The rows of one microbatch, or of a piece of it, as fresh tensors [rows, ...]; only an empty "label" where it
        has no rows. Ragged rows are padded to the longest of these, so that the bits depend on the rows alone.

        Raises DataError where the rows cannot be read, TrainingError where a transform gives batches that differ in
        their keys, types or shapes.
        """
        parts = []
        for window, start, stop in self._plan.slices(epoch, step_in_epoch, self._shard, piece):
            loaded = self._loader.window(epoch, window)
            chosen = loaded.order[start:stop]
            parts.append({name: tensor.index_select(0, chosen) for name, tensor in loaded.rows.items()})
        if not parts:
            return {"label": torch.empty(0)}
        if len(parts) == 1:
            return pad(parts[0])
        return pad({name: _cat([part[name] for part in parts]) for name in parts[0]})

    def close(self) -> None:
        """End the thread."""
        self._loader.close()


class _Loader:
    """Loads a shard's windows in order on a thread, one ahead of the one in use."""

    def __init__(self, dataset: Rows, plan: Plan, shard: int) -> None:
        self._plan = plan
        self._shard = shard
        self._stream = _Stream(dataset)
        self._changed = threading.Condition()
        self._loaded: dict[_Key, _Loaded] = {}
        self._next: _Key = (0, 0)  # what the thread loads next, or is loading
        self._buffers: list[_Buffer] = [{}, {}]  # free ones
        self._sought = 0  # counts seeks: a window loaded before the last one is dropped
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def window(self, epoch: int, window: Window) -> _Loaded:
        """A window in memory. Windows before it are given up."""
        key = (epoch, window.index)
        with self._changed:
            self._give_up_before(key)
            while key not in self._loaded:
                if self._thread is None or key != self._next:
                    self._seek(key)
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return self._loaded[key]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _give_up_before(self, key: _Key) -> None:
        for before in [other for other in self._loaded if other < key]:
            self._buffers.append(self._loaded.pop(before).buffer)
            self._changed.notify_all()

    def _seek(self, key: _Key) -> None:
        """Make `key` the next window to load. Call with the lock held."""
        self._sought += 1
        self._buffers += [loaded.buffer for loaded in self._loaded.values()]
        self._loaded.clear()
        self._next, self._error = key, None
        if self._thread is None:
            name = f"reader of shard {self._shard}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        # Where cores are short, the reader takes the time in which the computation waits for the others.
        run_in_the_background()
        while True:
            with self._changed:
                while not self._closed and (self._error is not None or not self._buffers):
                    self._changed.wait()
                if self._closed:
                    self._stream.close()
                    return
                (epoch, index), sought, buffer = self._next, self._sought, self._buffers.pop()
            windows = self._plan.windows(epoch, self._shard)
            error: BaseException | None = None
            try:
                rows = self._stream.fill(buffer, windows, index)
                order = torch.from_numpy(self._plan.order(epoch, self._shard, windows[index]))
                loaded = _Loaded(buffer, rows, order)
            except BaseException as raised:  # SystemExit of a transform too: a dead thread would never answer
                error = raised
            with self._changed:
                if sought != self._sought or error is not None:
                    self._buffers.append(buffer)
                if sought == self._sought and error is not None:
                    self._error = error
                elif sought == self._sought:
                    self._loaded[epoch, index] = loaded
                    self._next = (epoch, index + 1) if index + 1 < len(windows) else (epoch + 1, 0)
                self._changed.notify_all()


class _Stream:
    """Reads pieces of row groups in order, and goes on where the last piece ended where it can: a large row group that
    several windows share is decoded once."""

    def __init__(self, dataset: Rows) -> None:
        self._dataset = dataset
        self._batches: Iterator[RawBatch] = iter(())
        self._rest: RawBatch | None = None
        self._at: tuple[int, int] | None = None  # (row group, next row)
        self._until = 0  # the row that what is open ends before
        self._kinds: dict[str, str] = {}  # what every batch has, as the first one had

    def fill(self, buffer: _Buffer, windows: tuple[Window, ...], index: int) -> RawBatch:
        """Copy the rows of a window into `buffer`, enlarged where needed. Returns them: tensors [num_rows, ...]."""
        try:
            return self._fill(buffer, windows, index)
        except BaseException:
            self.close()  # what is open is of no more use: the next window opens its own
            raise

    def _fill(self, buffer: _Buffer, windows: tuple[Window, ...], index: int) -> RawBatch:
        filled = 0
        rows = windows[index].num_rows
        view: _Buffer = {}
        for number, piece in enumerate(windows[index].pieces):
            end = _end(windows, index, number)
            # Another epoch may begin where this one ended, and needs more than was opened for it.
            if self._at != (piece.row_group, piece.start) or end > self._until:
                self.close()
                self._batches = self._dataset.read(piece.row_group, piece.start, end)
                self._at, self._until = (piece.row_group, piece.start), end
            missing = piece.stop - piece.start
            while missing:
                batch = self._take(missing)
                if not view:
                    view = _fit(buffer, batch, rows)
                taken = len(next(iter(batch.values())))
                for name, values in batch.items():
                    place = view[name]
                    if isinstance(place, RaggedBuffer):
                        assert isinstance(values, Ragged)
                        place.append(values)
                    else:
                        assert isinstance(values, Tensor)
                        place[filled : filled + taken].copy_(values)
                filled, missing = filled + taken, missing - taken
            self._at = (piece.row_group, piece.stop)
        return {name: part.rows if isinstance(part, RaggedBuffer) else part for name, part in view.items()}

    def _take(self, most: int) -> RawBatch:
        """The next rows, at most so many."""
        batch, self._rest = self._rest or self._next(), None
        rows = len(next(iter(batch.values())))
        if rows > most:
            self._rest = {name: tensor[most:] for name, tensor in batch.items()}
            batch = {name: tensor[:most] for name, tensor in batch.items()}
        return batch

    def _next(self) -> RawBatch:
        """The next batch. One unlike the first is an error: in the same tensors it would be cast or repeated."""
        batch = next(self._batches)
        kinds = {name: _kind(values) for name, values in batch.items()}
        self._kinds = self._kinds or kinds
        for name in self._kinds | kinds:
            found, first = (those.get(name, "nothing") for those in (kinds, self._kinds))
            if found != first:
                assert self._at is not None
                raise TrainingError(
                    f"{self._dataset.place(self._at[0])}: data.transform gives {name!r} as {found}, and gave {first} "
                    "for earlier rows: keys, types and shapes must be the same for all"
                )
        return batch

    def close(self) -> None:
        """Close the file that is open."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches, self._rest, self._at = iter(()), None, None


def _end(windows: tuple[Window, ...], index: int, place: int) -> int:
    """Where reading on from a window's piece, through the pieces and windows after it, leaves its row group."""
    first, *rest = windows[index].pieces[place:]
    stop = first.stop
    for piece in chain(rest, chain.from_iterable(window.pieces for window in windows[index + 1 :])):
        if (piece.row_group, piece.start) != (first.row_group, stop):
            break
        stop = piece.stop
    return stop


def _fit(buffer: _Buffer, batch: RawBatch, rows: int) -> _Buffer:
    """The first `rows` rows of the buffer's tensors, which are made or enlarged to hold them."""
    view: _Buffer = {}
    for name, values in batch.items():
        have = buffer.get(name)
        if isinstance(values, Ragged):
            if not isinstance(have, RaggedBuffer):
                have = buffer[name] = RaggedBuffer(values.values.dtype)
            have.start(rows)
            view[name] = have
            continue
        if not isinstance(have, Tensor) or len(have) < rows:
            have = buffer[name] = torch.empty((rows, *values.shape[1:]), dtype=values.dtype)
        view[name] = have[:rows]
    return view


def _kind(values: Tensor | Ragged) -> str:
    """Type and shape of a batch's values, whatever its number of rows."""
    if isinstance(values, Ragged):
        return f"{values.values.dtype} lists"
    return f"{values.dtype} [{', '.join(['rows', *map(str, values.shape[1:])])}]"


def _cat(parts: Sequence[Tensor | Ragged]) -> Tensor | Ragged:
    if isinstance(parts[0], Ragged):
        return Ragged.cat([part for part in parts if isinstance(part, Ragged)])
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
