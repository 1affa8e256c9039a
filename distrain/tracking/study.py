"""A sweep's parent run in MLflow, and what its children get when they are over. Calls may take seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from distrain.config import TrackingConfig
from distrain.credentials import redacted
from distrain.errors import TrackingError
from distrain.tracking.description import RunDescription
from distrain.tracking.environment import quiet_environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ParentRun(Protocol):
    """The run under which a sweep's points are nested."""

    run_id: str | None

    def child(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Give a point that is over the params and final scalars by which MLflow's charts compare points."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def text(self, name: str, text: str) -> None: ...

    def figure(self, name: str, figure: Figure) -> None: ...

    def finish(self, status: str) -> None: ...


class NoParentRun:
    """Tracking switched off."""

    run_id: str | None = None

    def child(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        pass

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def text(self, name: str, text: str) -> None:
        pass

    def figure(self, name: str, figure: Figure) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


def open_parent(settings: TrackingConfig, description: RunDescription) -> ParentRun:
    """Create a sweep's run, or take up that of `description.resume_run_id`. Raises TrackingError where the store is out
    of reach."""
    if not settings.enabled:
        return NoParentRun()
    quiet_environment()
    from distrain.tracking.store import MlflowRun  # here, since importing MLflow takes seconds

    return _MlflowParent(MlflowRun.open(settings.uri, settings.experiment, description), settings.uri)


def read_parent(uri: str, run_id: str, name: str) -> str:
    """The text of an artifact of a sweep's run. Raises TrackingError where there is none."""
    quiet_environment()
    from distrain.tracking.store import read_artifact

    try:
        text = read_artifact(uri, run_id, name)
    except Exception as error:
        raise TrackingError(f"MLflow at {redacted(uri)}, run {run_id}: {str(error).splitlines()[0]}") from error
    if not text:
        raise TrackingError(f"MLflow at {redacted(uri)}: run {run_id} has no {name}, so it is not a sweep's parent run")
    return text


class _MlflowParent:
    def __init__(self, run: Any, uri: str) -> None:
        self._run, self._uri = run, uri
        self.run_id: str | None = run.run_id

    def child(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._do(f"the results of run {run_id}", lambda: self._run.describe_child(run_id, params, metrics))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._do(name, lambda: self._run.log_table(name, rows))

    def text(self, name: str, text: str) -> None:
        self._do(name, lambda: self._run.log_text(name, text))

    def figure(self, name: str, figure: Figure) -> None:
        self._do(name, lambda: self._run.log_figure(name, figure))

    def finish(self, status: str) -> None:
        self._do("the end of the sweep", lambda: self._run.terminate(status))

    def _do(self, what: str, call: Any) -> None:
        """Raises TrackingError where MLflow does not take it."""
        try:
            call()
        except Exception as error:  # MLflow, its database driver and its file systems raise what they like
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise TrackingError(f"MLflow at {redacted(self._uri)} did not take {what}: {text}") from error
