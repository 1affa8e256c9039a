"""The state of any torch.optim optimizer as tensors by name and JSON-able values, and back to the bit."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distrain.errors import CheckpointError

# JSON knows neither tensors nor tuples: a dict with one of these keys stands for one.
_TENSOR = "$tensor"
_TUPLE = "$tuple"


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (every tensor of the state by name, not copied; everything else as JSON-able values).

    The second part has the shape of `optimizer.state_dict()`, with the names of tensors in place of the tensors.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars = {
        # A list of pairs, since JSON would turn the integer keys into strings.
        "state": [
            [index, {name: _take(value, f"{index}.{name}", tensors) for name, value in values.items()}]
            for index, values in state["state"].items()
        ],
        "param_groups": [
            {name: _take(value, f"group{number}.{name}", tensors) for name, value in group.items()}
            for number, group in enumerate(state["param_groups"])
        ],
    }
    return tensors, scalars


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Give `optimizer`, built over the same parameters in the same groups, the state that `pack_optimizer` took.

    Raises CheckpointError where the groups or the number of parameters differ, or a tensor is missing.
    """
    try:
        state = {
            "state": {index: _give(values, tensors) for index, values in scalars["state"]},
            "param_groups": [_give(group, tensors) for group in scalars["param_groups"]],
        }
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit {type(optimizer).__name__} over this model: {error}"
        ) from error


def with_options(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]] | None
) -> list[Mapping[str, Any]]:
    """A state's parameter groups. Those without options get what `optimizer` has; None: they are its own, too."""
    own = pack_optimizer(optimizer)[1]["param_groups"]
    if groups is None:
        return list(own)
    if len(groups) != len(own) or any("lr" in group for group in groups):
        return list(groups)
    return [{**options, **group} for options, group in zip(own, groups, strict=True)]


def merge_optimizers(
    parts: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the states of optimizers together that were each stepped for other parameters of the same groups."""
    tensors: dict[str, Tensor] = {}
    state: list[Any] = []
    groups: Any = None
    for some, scalars in parts:
        tensors.update(some)
        state += scalars["state"]
        groups = scalars["param_groups"] if groups is None else groups
    return tensors, {"state": sorted(state, key=lambda entry: entry[0]), "param_groups": groups}


def optimizer_of(
    indices: Container[int], tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of only those parameters, which are counted through all groups."""
    state = [entry for entry in scalars["state"] if entry[0] in indices]
    numbers = {str(index) for index, _ in state}
    kept = {n: t for n, t in tensors.items() if n.startswith("group") or n.partition(".")[0] in numbers}
    return kept, {**scalars, "state": state}


def _take(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON; its tensors go into `tensors` under `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _take(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_take(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _give(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_take`. Tensors are cloned: an optimizer must not update the file's memory."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]].clone()
        if value.keys() == {_TUPLE}:
            return tuple(_give(item, tensors) for item in value[_TUPLE])
        return {key: _give(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_give(item, tensors) for item in value]
    return value
