"""What becomes JSON is JSON."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from distrain.jsonable import jsonable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


def without_tuples(value):
    if isinstance(value, dict):
        return {key: without_tuples(item) for key, item in value.items()}
    return [without_tuples(item) for item in value] if isinstance(value, list | tuple) else value


@given(VALUES)
def test_it_survives_json_at_any_depth(value):
    plain = jsonable(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@given(VALUES.filter(lambda value: "nan" not in repr(value) and "inf" not in repr(value)))
def test_what_is_finite_stays(value):
    assert jsonable(value) == without_tuples(value)


def test_what_is_not_finite_becomes_null_wherever_it_is():
    value = {"loss": math.nan, "validation": {"accuracy": 0.5, "loss": math.inf}, "losses": [(1, -math.inf)]}
    assert jsonable(value) == {"loss": None, "validation": {"accuracy": 0.5, "loss": None}, "losses": [[1, None]]}
