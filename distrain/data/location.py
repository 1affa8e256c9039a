"""Where rows come from, for messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distrain.data.values import values_of
from distrain.errors import DataError


@dataclass(frozen=True)
class Location:
    """Where rows come from. `first_row` counts within the row group."""

    file: str
    row_group: int
    first_row: int = 0

    def __str__(self) -> str:
        return f"{self.file}: row group {self.row_group}"


def null_error(array: pa.Array, name: str, where: Location) -> DataError:
    """The error of a column that holds a null, naming the first."""
    row = int(np.argmax(values_of(array.is_null())))
    return DataError(f"{where}, column {name!r}, row {where.first_row + row}: null; fill it in or leave the row out")
