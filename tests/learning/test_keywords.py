"""Values are of the types that torch's signatures state, and any other is named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, optim
from torch.optim import lr_scheduler

from distrain.config import ScheduleConfig
from distrain.learning.keywords import misfits, typed


class Like:
    """With keywords as torch's schedules state them: in texts, by the import above."""

    def __init__(
        self,
        steps: int = 1,
        length: int | None = None,
        factor: float = 0.1,
        rates: float | list[float] = 0.1,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.9),
        eps: tuple[float | None, float] = (None, 0.1),
        milestones: Iterable[int] = (),
        nesterov: bool = False,
        mode: Literal["a", "b"] = "a",
        untyped=None,
    ) -> None: ...


@given(number=st.integers(-(2**53), 2**53))
def test_a_whole_number_is_of_the_stated_kind_however_it_is_written(number: int):
    for written in (number, float(number), f"{number}e0"):
        values = {
            "steps": written,
            "length": written,
            "factor": written,
            "milestones": [written],
            "betas": [written] * 2,
        }
        options = ScheduleConfig(**values).options
        assert not misfits(Like, options)
        found = typed(Like, options)
        assert found == {**dict.fromkeys(values, number), "milestones": [number], "betas": (number, number)}
        kinds = {key: type(value[0] if isinstance(value, list | tuple) else value) for key, value in found.items()}
        assert kinds == {"steps": int, "length": int, "factor": float, "milestones": int, "betas": float}


@pytest.mark.parametrize(
    "values",
    [
        {"length": None},
        {"rates": 0.5},
        {"rates": [0.5, 0.25]},
        {"eps": (None, 0.5)},
        {"nesterov": True},
        {"mode": "b"},
        {"untyped": {"any": "thing"}},
        {"steps": 1.5},  # which torch takes for most of its counts
        {"steps": float("inf")},
    ],
)
def test_what_fits_stays(values: dict):
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    assert not misfits(Like, options) and typed(Like, options) == typed(Like, values) == values


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", "abc", "expected an integer, got 'abc'"),
        ("steps", [1], "expected an integer, got [1]"),
        ("steps", None, "expected an integer, got None"),
        ("steps", True, "expected an integer, got true"),
        ("steps", 10**400, f"expected an integer, got 1{'0' * 76}..."),
        ("factor", "x", "expected a number, got 'x'"),
        ("factor", float("nan"), "expected a number, got nan"),
        ("rates", {}, "expected a number or a list, got {}"),
        ("betas", 0.9, "expected a list, got 0.9"),
        ("betas", [0.9, "x"], "expected a number, got 'x'"),
        ("milestones", [3, "x"], "expected an integer, got 'x'"),
        ("nesterov", "no", "expected true or false, got 'no'"),
        ("nesterov", 0, "expected true or false, got 0"),
        ("mode", 3, "expected a text, got 3"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: object, said: str):
    assert misfits(Like, {"length": 3, key: value, "nope": object()}) == {key: said}
    with pytest.raises(ValueError, match="expected"):
        typed(Like, {key: value})


def test_torch_states_them_like_this():
    """Its schedules in texts, its optimizers in types."""
    assert misfits(lr_scheduler.MultiStepLR, {"milestones": ["x"], "gamma": "x"}).keys() == {"milestones", "gamma"}
    assert misfits(lr_scheduler.OneCycleLR, {"total_steps": "x", "three_phase": "x", "max_lr": ["x"]}).keys() == {
        "total_steps", "three_phase", "max_lr",
    }  # fmt: skip
    assert misfits(optim.Adam, {"amsgrad": "no", "betas": [1, "x"], "eps": "x"}).keys() == {"amsgrad", "betas", "eps"}
