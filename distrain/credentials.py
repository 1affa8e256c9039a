"""Keeps credentials in URIs out of all that is printed, logged and stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***@"  # in the place of a URI's user and password

_USER_INFO = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@")


def redacted(value: Any) -> Any:
    """Return nested JSON-able values with the user and password taken out of every URI."""
    if isinstance(value, str):
        return _USER_INFO.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value
