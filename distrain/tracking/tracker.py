"""The one writer interface to MLflow. All of it happens on a thread of its own; no call but `finish` waits."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distrain.errors import TrackingError, TrackingRefused
from distrain.process import run_in_the_background
from distrain.records import Event, StepRecord, ValidationRecord
from distrain.tracking.description import ModelInput, RunDescription
from distrain.tracking.environment import quiet_environment
from distrain.tracking.export import ExportFailed
from distrain.tracking.inbox import Inbox
from distrain.tracking.spool import Spool

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from distrain.config import TrackingConfig
    from distrain.tracking.store import MlflowRun
    from distrain.tracking.system import SystemMetrics
    from distrain.tracking.writer import Writer

_FLUSH_S = 2.0
_RETRY_S = 15.0  # between attempts to open a store that did not


class Tracker(Protocol):
    """What the driver tells of a run. No call blocks, but `wait_ready` and `finish`."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it exists."""

    @property
    def run_name(self) -> str | None: ...

    def open(self) -> None:
        """Begin to load MLflow and to open the store. No run is made yet."""

    def start(self) -> None:
        """Have the run made."""

    def wait_ready(self, timeout_s: float = 60.0) -> str | None:
        """Wait for the run to exist and return its id. Raises TrackingError when it cannot be created."""

    def check(self) -> None:
        """Raise TrackingRefused where the store's first answer was a no: that ends a run, which has only begun then. A
        store that does not answer ends none, and is not waited for."""

    def step(self, record: StepRecord) -> None: ...

    def validation(self, record: ValidationRecord) -> None: ...

    def event(self, event: Event) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def artifact_text(self, name: str, text: str) -> None: ...

    def artifact_file(self, path: str | Path) -> None: ...

    def figure(self, name: str, draw: Callable[[], Figure]) -> None: ...

    def model(self, module: nn.Module, inputs: Sequence[ModelInput], step: int) -> None: ...

    def finish(self, status: str, timeout_s: float = 120.0) -> bool:
        """Deliver what waits and end the run as FINISHED, FAILED or KILLED. True when all was delivered."""


class NullTracker:
    """Tracking switched off."""

    run_id: str | None = None
    run_name: str | None = None

    def open(self) -> None:
        pass

    def start(self) -> None:
        pass

    def wait_ready(self, timeout_s: float = 60.0) -> str | None:
        return None

    def check(self) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def validation(self, record: ValidationRecord) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def tag(self, key: str, value: str) -> None:
        pass

    def artifact_text(self, name: str, text: str) -> None:
        pass

    def artifact_file(self, path: str | Path) -> None:
        pass

    def figure(self, name: str, draw: Callable[[], Figure]) -> None:
        pass

    def model(self, module: nn.Module, inputs: Sequence[ModelInput], step: int) -> None:
        pass

    def finish(self, status: str, timeout_s: float = 120.0) -> bool:
        return True


def make_tracker(
    settings: TrackingConfig,
    run: RunDescription,
    spool_dir: str | Path | None = None,
    notify: Callable[[str], None] | None = None,
) -> Tracker:
    """The tracker that the settings ask for. Not started."""
    return MlflowTracker(settings, run, spool_dir, notify) if settings.enabled else NullTracker()


class MlflowTracker:
    """Writes one run to MLflow from its own thread, in batches every 2 s.

    `spool_dir`: where points wait while the store is away, in mlflow-<run id>.jsonl, and those of a run that the store
    never opened for, in mlflow-unopened.jsonl (None or a URI: the folder for temporary files). Who resumes the run
    delivers them. `notify` gets what a person should know, from that thread (default: a log warning).
    """

    def __init__(
        self,
        settings: TrackingConfig,
        run: RunDescription,
        spool_dir: str | Path | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._description = run
        is_local = spool_dir is not None and "://" not in str(spool_dir)
        self._spool_dir = Path(str(spool_dir)) if is_local else Path(tempfile.gettempdir())
        unopened = "unopened" if is_local else sha256(str(spool_dir or run.run_name).encode()).hexdigest()[:16]
        self._waiting = self._spool(run.resume_run_id or unopened)
        self._notify = notify or logging.getLogger("distrain").warning
        self._inbox = Inbox(settings.every_steps)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._wanted = threading.Event()  # a run is, or never will be
        self._is_given_up = False
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._run: MlflowRun | None = None
        self._error: TrackingError | None = None
        self._is_error_told = False
        self._final_status = "FAILED"
        self._is_complete = False

    @property
    def run_id(self) -> str | None:
        """See Tracker."""
        return self._run.run_id if self._run is not None else None

    @property
    def run_name(self) -> str | None:
        """See Tracker."""
        return self._run.run_name if self._run is not None else None

    def open(self) -> None:
        """See Tracker."""
        quiet_environment()
        self._thread.start()

    def start(self) -> None:
        """See Tracker. Opens the store as well, where `open` was not called."""
        self._wanted.set()
        if self._thread.ident is None:
            self.open()

    def wait_ready(self, timeout_s: float = 60.0) -> str | None:
        """See Tracker."""
        if not self._ready.wait(timeout_s):
            raise TrackingError(f"MLflow's store did not open within {timeout_s:g} s")
        if self._error is not None:
            self._is_error_told = True
            raise self._error
        return self.run_id

    def check(self) -> None:
        """See Tracker."""
        if isinstance(self._error, TrackingRefused):
            self._is_error_told = True
            raise self._error

    def step(self, record: StepRecord) -> None:
        """Take in a step. Microseconds, whatever the store does."""
        self._inbox.step(record)

    def validation(self, record: ValidationRecord) -> None:
        """Take in a validation: one point for each metric."""
        self._inbox.validation(record)

    def event(self, event: Event) -> None:
        """Add a line to the artifact events.txt."""
        self._inbox.event(event)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._inbox.job(f"tag {key}", lambda run: run.set_tag(key, value))

    def artifact_text(self, name: str, text: str) -> None:
        """Store a text as an artifact of that name."""
        self._inbox.job(name, lambda run: run.log_text(name, text))

    def artifact_file(self, path: str | Path) -> None:
        """Store a file as an artifact of its name. It must stay until `finish` has returned."""
        self._inbox.job(str(path), lambda run: run.log_file(Path(path)))

    def figure(self, name: str, draw: Callable[[], Figure]) -> None:
        """Store what `draw` gives, when its turn comes, as an image of that name (heat.png). Where it raises, that is
        said, and the image left out."""

        def log(run: MlflowRun) -> None:
            try:
                figure = draw()
            except Exception as error:  # the user's model may be part of it
                self._notify(f"{name} is not in MLflow: {error}")
            else:
                run.log_figure(name, figure)

        self._inbox.job(name, log)

    def model(self, module: nn.Module, inputs: Sequence[ModelInput], step: int) -> None:
        """Store the model, as of `step`, under the name "model", and register it where the settings say so.

        The module must not be changed any more. One that torch.export does not understand is left out, and said.
        """
        inputs, name = tuple(inputs), self._settings.registered_model_name

        def log(run: MlflowRun) -> None:
            try:
                run.log_model(module, inputs, step, name)
            except ExportFailed as failed:
                self._notify(f"the model is not in MLflow, only its weights are: torch.export failed: {failed}")

        self._inbox.job("model", log)

    def finish(self, status: str, timeout_s: float = 120.0) -> bool:
        """See Tracker. What could not be delivered, and where it lies, is said through `notify`."""
        self._final_status = status
        self._stop.set()
        if not self._wanted.is_set():  # there is no run to end
            self._is_given_up = True
            self._wanted.set()
            return False
        self._thread.join(timeout_s)
        if self._error is not None and not self._is_error_told:
            self._notify(self._error.message)
        if self._thread.is_alive():
            self._notify(f"MLflow took longer than {timeout_s:g} s to store the end of the run, and was left at that")
        return self._is_complete

    def _work(self) -> None:
        # Opening takes 3 to 5 s of processor, while Ray starts and leaves a core idle, and each point 0.2 ms: whatever
        # else wants the core comes first.
        run_in_the_background()
        with suppress(Exception):  # the same will be said of the run
            from distrain.tracking.store import open_store

            open_store(self._settings.uri)
        self._wanted.wait()
        if self._is_given_up:
            return
        self._forget_another_attempt()
        writer = self._try_to_open() or self._try_again()
        if writer is None:
            self._stop.wait()
            self._keep()
            return
        while not self._stop.wait(_FLUSH_S):
            writer.deliver()
        self._is_complete = writer.end(self._final_status)

    def _try_again(self) -> Writer | None:
        """The writer, once the store opens; None where it refused the run, or never opened. What is told waits."""
        assert self._error is not None
        if isinstance(self._error, TrackingRefused):
            return None
        self._notify(f"{self._error.message}; trying again every {_RETRY_S:g} s, and the run's points wait")
        self._is_error_told = True
        while not self._stop.wait(_RETRY_S):
            if (writer := self._try_to_open()) is not None:
                self._notify(f"MLflow's store has opened: this is its run {self.run_id}")
                return writer
        return None

    def _forget_another_attempt(self) -> None:
        """Points of an attempt that ended before its first checkpoint are of no run that goes on."""
        goes_on = self._description.is_resumed or self._description.resume_run_id is not None
        if self._waiting and not goes_on:
            self._notify(f"points of an earlier attempt, which MLflow never got, are dropped: {self._waiting.path}")
            with suppress(OSError):
                self._waiting.path.unlink()

    def _keep(self) -> None:
        """Spool what waits, for who resumes the run."""
        points = self._inbox.take_points(0, 0, finish=True)
        if not points:
            return
        try:
            self._waiting.append(points)
        except OSError as error:
            self._notify(f"{len(points)} points for MLflow are lost: {error}")
        else:
            self._notify(f"{len(points)} points for MLflow wait in {self._waiting.path} for the run to be resumed")

    def _try_to_open(self) -> Writer | None:
        """The writer; None, with the reason kept, where the store does not open."""
        writer = error = None
        try:
            writer = self._open()
        except TrackingError as raised:
            error = raised
        except ImportError as raised:
            error = TrackingRefused(f"MLflow cannot be loaded: {raised}")
        except Exception as raised:
            error = TrackingError(f"MLflow could not be started: {type(raised).__name__}: {raised}")
        if error is not None and self._ready.is_set():
            error = TrackingError(error.message)  # not the first answer: a no is of a store that was away
        self._error = error
        self._ready.set()
        return writer

    def _open(self) -> Writer:
        # Here, since importing MLflow takes seconds.
        from distrain.tracking.store import MlflowRun
        from distrain.tracking.writer import Writer

        if self._run is None:  # else it was made, and what followed failed
            self._run = MlflowRun.open(self._settings.uri, self._settings.experiment, self._description)
        spool = self._spool(self._run.run_id)
        if self._waiting:
            self._waiting.path.replace(spool.path)
        self._waiting = spool
        system = self._system_metrics() if self._settings.system_metrics else None
        is_resumed = self._description.resume_run_id is not None or bool(spool)
        return Writer(self._run, self._inbox, spool, self._notify, is_resumed, system)

    def _spool(self, name: str) -> Spool:
        return Spool(self._spool_dir / f"mlflow-{name}.jsonl")

    def _system_metrics(self) -> SystemMetrics | None:
        """What watches the machine. Whatever keeps it from that costs no point of the run."""
        try:
            from distrain.tracking.system import SystemMetrics

            return SystemMetrics(self._notify)
        except Exception as error:
            self._notify(f"no system metrics: {type(error).__name__}: {error}")
            return None
