"""Rows of different length: held end to end, and padded with a mask for the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from distrain.data.location import Location, null_error
from distrain.data.values import values_of
from distrain.errors import DataError

Batch = dict[str, Tensor]
MASK = "mask"


@dataclass(frozen=True)
class Ragged:
    """Rows of different length: row i is values[offsets[i] : offsets[i + 1]]. `offsets` is int64 [rows + 1]."""

    values: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> Ragged:
        """Consecutive rows, without a copy."""
        first, stop, _ = rows.indices(len(self))
        return Ragged(self.values, self.offsets[first : max(first, stop) + 1])

    @property
    def nbytes(self) -> int:
        return int(self.offsets[-1] - self.offsets[0]) * self.values.itemsize + self.offsets.nbytes

    def index_select(self, dim: int, rows: Tensor) -> Ragged:
        """The rows chosen, int64 [chosen], copied. `dim` is 0, as of a tensor's first dimension."""
        first = self.offsets[rows]
        lengths = self.offsets[rows + 1] - first
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        flat = torch.repeat_interleave(first - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
        return Ragged(self.values[flat], offsets)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Values [rows, width], 0 behind a row's end, and the mask, bool [rows, width], true where there is a value.

        The width is that of the longest of these rows, 1 at least, and of nothing else.
        """
        lengths = self.offsets.diff()
        width = max(1, int(lengths.max()) if len(lengths) else 1)
        mask = torch.arange(width) < lengths[:, None]
        padded = self.values.new_zeros(len(self), width)
        padded[mask] = self.values[int(self.offsets[0]) : int(self.offsets[-1])]
        return padded, mask

    @staticmethod
    def cat(parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, one after the other."""
        lengths = torch.cat([part.offsets.diff() for part in parts])
        values = torch.cat([part.values[int(part.offsets[0]) : int(part.offsets[-1])] for part in parts])
        return Ragged(values, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))


class RaggedBuffer:
    """Memory for a window of ragged rows, used again for the next. It holds at most 1.5 times the largest so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._values = torch.empty(0, dtype=dtype)
        self._offsets = torch.zeros(1, dtype=torch.int64)
        self._rows = 0

    def start(self, rows: int) -> None:
        """Forget what is there; so many rows will come."""
        self._rows = 0
        if len(self._offsets) <= rows:
            self._offsets = torch.zeros(rows + 1, dtype=torch.int64)

    def append(self, part: Ragged) -> None:
        first, stop = int(part.offsets[0]), int(part.offsets[-1])
        begin = int(self._offsets[self._rows])
        end = begin + stop - first
        if end > len(self._values):
            grown = torch.empty(max(end, begin * 3 // 2), dtype=self._values.dtype)
            grown[:begin] = self._values[:begin]
            self._values = grown
        self._values[begin:end] = part.values[first:stop]
        rows = self._rows + len(part)
        self._offsets[self._rows + 1 : rows + 1] = part.offsets[1:] + (begin - first)
        self._rows = rows

    @property
    def rows(self) -> Ragged:
        """The rows so far. They are overwritten after the next `start`."""
        return Ragged(self._values, self._offsets[: self._rows + 1])


RawBatch = Mapping[str, Tensor | Ragged]
"""Rows as they are read, before padding."""


def pad(batch: RawBatch) -> Batch:
    """A batch for the model: ragged rows padded, with "mask" beside them; all else as it is."""
    padded: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Ragged):
            padded[name], padded[MASK] = value.padded()
        else:
            padded[name] = value
    return padded


def cut(batch: RawBatch, rows: int) -> Iterator[Batch]:
    """A batch for the model, in parts of at most `rows` rows."""
    for start in range(0, len(next(iter(batch.values()))), rows):
        yield pad({name: value[start : start + rows] for name, value in batch.items()})


def ragged_column(array: pa.Array, name: str, where: Location, vocabulary: int | None) -> Ragged:
    """A list column whose rows differ in length: integers as int64, other numbers as float32.

    Raises DataError naming file, row group, column and row for a null, a value that is not finite, or a token id that
    is not within [0, vocabulary).
    """
    if array.null_count:
        raise null_error(array, name, where)
    lengths = values_of(pc.list_value_length(array))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = array.flatten()

    def place(bad: np.ndarray) -> str:
        row = int(np.searchsorted(offsets, int(np.argmax(bad)), side="right")) - 1
        return f"{where}, column {name!r}, row {where.first_row + row}"

    if values.null_count:
        raise DataError(f"{place(values_of(values.is_null()))}: a null in the list")
    flat = values_of(values)
    if pa.types.is_integer(values.type):
        flat = flat.astype(np.int64, copy=False)
        if vocabulary is not None and len(flat) and (flat.min() < 0 or flat.max() >= vocabulary):
            bad = (flat < 0) | (flat >= vocabulary)
            raise DataError(
                f"{place(bad)}: token id {flat[np.argmax(bad)]} is out of range: model.vocabulary is {vocabulary}, so "
                f"ids are 0..{vocabulary - 1}"
            )
    else:
        flat = flat.astype(np.float32, copy=False)
        bad = ~np.isfinite(flat)
        if bad.any():
            raise DataError(f"{place(bad)}: {flat[np.argmax(bad)]} is not finite in float32")
    return Ragged(torch.from_numpy(flat), torch.from_numpy(offsets))
