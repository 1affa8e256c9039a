"""What a sweep measured at one point: plain values, kept as JSON. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from distrain.jsonable import jsonable

PARTS = ("data", "compute", "waiting", "exchange", "update")


@dataclass(frozen=True)
class Moment:
    """Where a run stood at a validation. Seconds are those of its steps, without validations."""

    step: int
    samples: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Target:
    """When validation first reached the target. The true moment lies after `from_seconds`, the validation before."""

    step: int
    samples: int
    seconds: float
    from_seconds: float


@dataclass
class Point:
    """One point. `blocks`: mean seconds of a step's PARTS over consecutive stretches of the run, for their spread."""

    name: str
    values: dict[str, Any]
    status: str  # finished, failed or stopped
    reason: str
    run_name: str = ""
    run_id: str | None = None
    batch_size: int = 0
    workers: int = 0
    shards: int = 0
    num_bytes: int = 0  # of one push
    steps: int = 0
    samples: int = 0
    samples_per_second: float = 0.0
    train_loss: float = math.nan
    validation: dict[str, float] = field(default_factory=dict)
    parameters_sha256: str = ""
    seconds: float = 0.0  # of training
    noise_scale: float | None = None  # rows
    peak_worker_bytes: int = 0
    target: Target | None = None
    moments: list[Moment] = field(default_factory=list)
    losses: list[tuple[int, int, float, float]] = field(default_factory=list)  # step, samples, seconds, training loss
    blocks: list[tuple[float, ...]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # the run's, as --json prints it

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of a step, by part."""
        if not self.blocks:
            return dict.fromkeys(PARTS, 0.0)
        return {part: fmean(block[i] for block in self.blocks) for i, part in enumerate(PARTS)}

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return sum(self.parts.values())

    @property
    def speed_error(self) -> float:
        """The standard error of the mean step time, as a share of it."""
        steps = [sum(block) for block in self.blocks]
        return stdev(steps) / math.sqrt(len(steps)) / fmean(steps) if len(steps) > 1 else 0.0

    @property
    def others(self) -> str:
        """The grid's values beside batch size and workers, as text."""
        return " ".join(f"{k}={v}" for k, v in self.values.items() if k not in ("batch_size", "workers.count"))

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; what is not finite becomes null."""
        return jsonable(asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Point:
        """The reverse of `to_json`."""
        values = dict(values)
        for key in ("train_loss",):
            values[key] = math.nan if values.get(key) is None else values[key]
        values["target"] = Target(**values["target"]) if values.get("target") else None
        values["validation"] = _numbers(values.get("validation", {}))
        moments = [Moment(**moment) for moment in values.get("moments", [])]
        values["moments"] = [replace(moment, metrics=_numbers(moment.metrics)) for moment in moments]
        values["losses"] = [tuple(math.nan if n is None else n for n in entry) for entry in values.get("losses", [])]
        values["blocks"] = [tuple(block) for block in values.get("blocks", [])]
        return cls(**values)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}
