"""Arrow to NumPy without pandas: pyarrow's own `to_numpy` imports it, which takes each process half a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def values_of(array: pa.Array) -> NDArray[Any]:
    """The numbers of an array without nulls, in its own type, and read-only: a view. Truth values come as 0 and 1,
    uint8, in a copy."""
    return np.from_dlpack(array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array)
