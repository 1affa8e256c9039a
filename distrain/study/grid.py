"""A sweep's points: every combination of a grid's values, as overrides of one configuration. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from distrain.errors import ConfigError

Values = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class GridPoint:
    """One combination. `overrides` are `dotted.key=value`, as the command line takes them."""

    values: Values
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """`batch_size=64 workers.count=2`."""
        return " ".join(f"{key}={_scalar(value)}" for key, value in self.values.items())

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")


def parse_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """`["batch_size=64,256", "workers.count=1,2"]` -> {"batch_size": [64, 256], "workers.count": [1, 2]}.

    Values are YAML. Raises ConfigError for what does not read so.
    """
    grid: dict[str, list[Any]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--grid {option!r}: give it as key=value,value,... such as batch_size=64,256")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            raise ConfigError(f"--grid {option!r}: the values cannot be read as YAML") from None
        if not values:
            raise ConfigError(f"--grid {option!r}: there are no values")
        if key in grid:
            raise ConfigError(f"--grid {key} is given twice; give all of its values at once")
        grid[key.strip()] = values
    return grid


def parse_target(option: str) -> str:
    """`validation.accuracy=0.97` -> the override that sets it. Raises ConfigError for what does not read so."""
    name, _, value = option.partition("=")
    metric = name.strip().removeprefix("validation.").removeprefix("val/")
    try:
        return f"target={{metric: {metric}, value: {float(value)}}}"
    except ValueError:
        raise ConfigError(f"--target {option!r}: give it as metric=value, such as validation.accuracy=0.97") from None


def expand(
    grid: Mapping[str, Sequence[Any]],
    scale_lr: Literal["linear", "sqrt", "none"] = "none",
    base_batch_size: int | Literal["full"] = 1,
) -> list[GridPoint]:
    """Every combination, the last key varying fastest.

    `scale_lr` becomes each point's `optimizer.scale_lr`, from the base on, unless the grid gives learning rates itself,
    which raises ConfigError.
    """
    if not grid:
        raise ConfigError("there is nothing to sweep: give --grid key=value,value or the configuration's sweep.grid")
    if scale_lr != "none" and "optimizer.lr" in grid:
        raise ConfigError("the grid gives optimizer.lr, and scale_lr would change it: leave one of them out")
    if scale_lr != "none" and base_batch_size == "full":
        raise ConfigError("scale_lr needs a batch_size in rows to begin from, and the configuration's is full")
    points = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        overrides = [f"{key}={_scalar(value)}" for key, value in values.items()]
        if scale_lr != "none" and "batch_size" in values:
            overrides += [f"optimizer.scale_lr={scale_lr}", f"optimizer.base_batch_size={base_batch_size}"]
        points.append(GridPoint(values, tuple(overrides)))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise ConfigError("the grid gives a value twice: " + next(name for name in names if names.count(name) > 1))
    return points


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("\n...\n").strip()
