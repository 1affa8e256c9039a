"""Values for the keywords of torch's optimizers and schedules, of the types that their signatures state."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from distrain.config_file import quoted

_LISTS = {"list", "tuple", "Iterable"}
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Literal": "a text",
    **dict.fromkeys(_LISTS, "a list"),
}


def typed(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with each number an int or a float, and each list a list or a tuple, as `kind` states them.

    Raises ValueError for a value of another type: what `misfits` names.
    """
    signature = inspect.signature(kind).parameters
    return {key: _fit(value, str(signature[key].annotation)) for key, value in options.items()}


def misfits(kind: type, options: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each value that is not of its keyword's type; keywords that `kind` has not are passed over."""
    signature = inspect.signature(kind).parameters
    found = {}
    for key in [key for key in options if key in signature]:
        try:
            _fit(options[key], str(signature[key].annotation))
        except ValueError as error:
            found[key] = str(error)
    return found


def _fit(value: Any, annotation: str) -> Any:
    """The value as the annotation has it, such as "float | list[float]", "tuple[float | None, float]"."""
    kinds = set(re.findall(r"\w+", re.sub(r"\[.*\]", "", annotation)))
    expected = [text for kind, text in _EXPECTED.items() if kind in kinds]
    if not expected:  # a type that no file can give, or none at all
        return value
    if isinstance(value, list | tuple) and kinds & _LISTS:
        items = [_fit(item, "".join(re.findall(r"\[(.*)\]", annotation))) for item in value]
        return tuple(items) if "tuple" in kinds else items
    if isinstance(value, bool):
        fits = "bool" in kinds
    elif (isinstance(value, float) and not math.isnan(value)) or (
        isinstance(value, int) and abs(value) <= sys.float_info.max
    ):
        if "float" in kinds:
            return float(value)
        if "int" in kinds:  # torch takes fractions and infinities for most
            return int(value) if math.isfinite(value) and value == int(value) else value
        fits = False
    else:
        fits = (value is None and "None" in kinds) or (isinstance(value, str) and bool(kinds & {"str", "Literal"}))
    if not fits:
        raise ValueError(f"expected {' or '.join(dict.fromkeys(expected))}, got {quoted(value)}")
    return value
