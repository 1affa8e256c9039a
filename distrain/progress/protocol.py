"""What a run tells of itself while it goes on, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from distrain.records import Report


@dataclass(frozen=True)
class RunInfo:
    """What is known when training starts."""

    run_name: str
    total_steps: int  # of the whole run, those before a resume included
    steps_per_epoch: int
    epochs: int
    num_rows: int
    batch_size: int
    num_parameters: int
    num_workers: int
    first_step: int = 0  # updates applied before; above 0 when the run is resumed
    run_id: str | None = None  # MLflow's
    tracking_uri: str | None = None  # None: tracking is off
    train_on: str = ""  # the override with which the run goes on when it has finished; empty: none would do


class HasJson(Protocol):
    """A Result."""

    def to_json(self) -> dict[str, Any]: ...


class Progress(Protocol):
    """Shows a run to a person. Everything goes to standard error. `note` may be called from any thread."""

    def phase(self, text: str) -> None:
        """Say what is being waited for, before the first step or after the last: "starting workers"."""

    def started(self, info: RunInfo) -> None:
        """Training starts."""

    def report(self, report: Report) -> None:
        """Take in what happened since the last call; called several times a second."""

    def note(self, message: str) -> None:
        """Say something that a person should know."""

    def finished(self, result: Mapping[str, Any] | HasJson) -> None:
        """Training is over: show the summary, of the keys of the `--json` line."""

    def close(self) -> None:
        """Give the terminal back. To be called however the run ends; twice does no harm."""


class SilentProgress:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        pass

    def started(self, info: RunInfo) -> None:
        pass

    def report(self, report: Report) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def finished(self, result: Mapping[str, Any] | HasJson) -> None:
        pass

    def close(self) -> None:
        pass
