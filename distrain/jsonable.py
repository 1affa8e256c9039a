"""Values as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def jsonable(value: Any) -> Any:
    """The value with null for every number in it that is not finite, since JSON has no word for one, and lists for
    tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value
