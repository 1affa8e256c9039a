"""A sweep on disk: what was asked for and what each point gave, in one file that is replaced whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.durable import creating_folder, write_file
from distrain.errors import CheckpointError
from distrain.study.point import Point

FILE = "sweep.json"


@dataclass
class Study:
    """A sweep. `config` is the resolved configuration that the points vary, as JSON-able values."""

    name: str
    config: dict[str, Any]
    grid: dict[str, list[Any]]
    scale_lr: str
    num_cores: float  # of the cluster
    parent_run_id: str | None = None
    points: list[Point] = field(default_factory=list)

    @property
    def target(self) -> dict[str, Any] | None:
        """The validation metric and value at which points stop, if any."""
        target: dict[str, Any] | None = self.config.get("target")
        return target

    def finished(self, name: str) -> Point | None:
        """The point of this name, if it is done."""
        return next((point for point in self.points if point.name == name and point.is_finished), None)

    def put(self, point: Point) -> None:
        """Enter a point, in place of one of its name."""
        self.points = [other for other in self.points if other.name != point.name] + [point]

    def to_mapping(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "name": self.name,
            "config": self.config,
            "grid": self.grid,
            "scale_lr": self.scale_lr,
            "num_cores": self.num_cores,
            "parent_run_id": self.parent_run_id,
            "points": [point.to_json() for point in self.points],
        }

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(self.to_mapping(), indent=1)

    @classmethod
    def from_text(cls, text: str) -> Study:
        """The reverse of `to_text`. Raises ValueError, KeyError or TypeError for something else."""
        values = json.loads(text)
        return cls(**{**values, "points": [Point.from_json(point) for point in values["points"]]})

    def save(self, folder: Path) -> None:
        """Write `folder`/sweep.json at one stroke."""
        with creating_folder(folder):
            write_file(folder / FILE, self.to_text().encode())

    @classmethod
    def load(cls, folder: Path) -> Study:
        """Read `folder`/sweep.json. Raises CheckpointError where it is missing or unreadable."""
        path = folder / FILE
        try:
            return cls.from_text(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no sweep here") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
