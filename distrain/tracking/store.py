"""MLflow itself: the only file that imports it (the logged model apart, which MLflow runs). Every call may take seconds
and is made on one thread; importing this file takes seconds too."""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import (
    DatasetInput,
    Experiment,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.types import ColSpec, Schema
from torch import nn

from distrain import __version__
from distrain.credentials import redacted
from distrain.errors import TrackingError, TrackingRefused
from distrain.tracking.description import DatasetDescription, ModelInput, RunDescription
from distrain.tracking.export import export_model
from distrain.tracking.local import check_reachable, database_folder, is_server
from distrain.tracking.logged_model import mlflow_type, save_model
from distrain.tracking.thinning import Point, legal

_MAX_PARAM_CHARS = 6000
_DIGEST_CHARS = 16  # MLflow allows 36 and shows them all; the profile has the whole
_MAX_SCHEMA_CHARS = 1_000_000
_BATCH = 1000  # metrics in one call
_SMALL_BATCH = 100  # params or tags in one call
_NO_CREDENTIALS = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
_WITHOUT = "or go on without MLflow: tracking.enabled=false"

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each of 50 migrations
logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each attempt to reach a server


class MlflowRun:
    """One run of one store. What goes wrong raises MlflowException, or what the database or file system raises."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self.run_name: str = run.info.run_name
        self._experiment_id: str = run.info.experiment_id

    @classmethod
    def open(cls, uri: str, experiment: str, description: RunDescription) -> MlflowRun:
        """Create the run, or take up that of `description.resume_run_id`, and describe it.

        Raises TrackingRefused when the store wants other credentials, has no such run to take up, or says no to what it
        is given; TrackingError when it cannot be opened.
        """
        with _told_of(uri):
            client = open_store(uri)
            if description.resume_run_id is None:
                experiment_id = _experiment_id(client, uri, experiment)
                run = client.create_run(experiment_id, run_name=description.run_name, tags=_origin_tags())
            else:
                run = _take_up(client, description.resume_run_id)
            opened = cls(client, run)
            try:
                opened._describe(description, run)
            except Exception:
                if description.resume_run_id is None:  # the next try makes another one
                    with suppress(Exception):
                        client.delete_run(run.info.run_id)
                raise
            return opened

    def _describe(self, description: RunDescription, before: Run) -> None:
        sha256, config_name = description.config_sha256, "config.yaml"
        tags = {**description.tags, "distrain.version": __version__, "distrain.config_sha256": sha256}
        params = {legal(key): str(value)[:_MAX_PARAM_CHARS] for key, value in description.params.items()}
        if description.resume_run_id is not None:
            # MLflow refuses to change a param, and the first configuration is worth keeping too.
            logged = before.data.params
            changed = {key: value for key, value in params.items() if logged.get(key, value) != value}
            tags |= {f"distrain.resumed.{key}": value for key, value in changed.items()}
            params = {key: value for key, value in params.items() if key not in logged}
            if before.data.tags.get("distrain.config_sha256") != sha256:
                config_name = f"config-resumed-{sha256[:8]}.yaml"
        self._log_small([Param(k, v) for k, v in params.items()], [RunTag(k, str(v)) for k, v in tags.items()])
        known = {(i.dataset.name, i.dataset.digest) for i in before.inputs.dataset_inputs} if before.inputs else set()
        datasets = [_dataset_input(dataset) for dataset in description.datasets]
        datasets = [each for each in datasets if (each.dataset.name, each.dataset.digest) not in known]
        if datasets:
            self._client.log_inputs(self.run_id, datasets)
        self.log_text(config_name, description.config_yaml)

    def _log_small(self, params: Sequence[Param], tags: Sequence[RunTag]) -> None:
        for first in range(0, max(len(params), len(tags)), _SMALL_BATCH):
            stop = first + _SMALL_BATCH
            self._client.log_batch(self.run_id, params=params[first:stop], tags=tags[first:stop])

    def last_step(self, key: str) -> int:
        """The largest step of a metric that is stored; 0 when there is none."""
        return max((metric.step for metric in self._client.get_metric_history(self.run_id, key)), default=0)

    def history(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, by step."""
        points = sorted((m.step, m.timestamp, m.value) for m in self._client.get_metric_history(self.run_id, key))
        return [step for step, _, _ in points], [value for _, _, value in points]

    def log_points(self, points: Sequence[Point]) -> None:
        """Store points. A point that is stored already stays one point."""
        for first in range(0, len(points), _BATCH):
            batch = [Metric(p.key, p.value, p.time_ms, p.step) for p in points[first : first + _BATCH]]
            self._client.log_batch(self.run_id, metrics=batch)

    def set_tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def log_text(self, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def log_figure(self, name: str, figure: Figure) -> None:
        self._client.log_figure(self.run_id, figure, name)

    def read_text(self, name: str) -> str:
        """An artifact's text; empty when there is none."""
        if not any(entry.path == name for entry in self._client.list_artifacts(self.run_id)):
            return ""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(self.run_id, name, folder)).read_text()

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows of the same keys as a table that MLflow's page shows."""
        self._client.log_table(self.run_id, {key: [row[key] for row in rows] for key in rows[0]}, name)

    def describe_child(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Give another run params, where it does not have them, and single metrics."""
        logged = self._client.get_run(run_id).data.params
        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            params=[Param(key, str(value)) for key, value in params.items() if key not in logged],
        )

    def log_model(
        self, module: nn.Module, inputs: Sequence[ModelInput], step: int, registered_name: str | None = None
    ) -> None:
        """Log the model under the name "model", as of `step`, loadable with mlflow.pyfunc.

        Raises ExportFailed when torch.export does not understand it; nothing is logged then.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = export_model(module, inputs, Path(folder))
            logged = self._client.create_logged_model(
                self._experiment_id, name="model", source_run_id=self.run_id, model_type="torch"
            )
            path = save_model(Path(folder), logged, self.run_id, inputs, outputs)
            self._client.log_model_artifacts(logged.model_id, str(path))
            self._client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
            self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step)])
        if registered_name is not None:
            self._register(registered_name, logged.model_id)

    def _register(self, name: str, model_id: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._client.create_model_version(name, f"models:/{model_id}", run_id=self.run_id, model_id=model_id)

    @property
    def is_active(self) -> bool:
        """Whether the run takes anything: not where it was deleted."""
        return bool(self._client.get_run(self.run_id).info.lifecycle_stage == "active")

    def terminate(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def open_store(uri: str) -> MlflowClient:
    """Connect to a store; one in a database that is new gets its tables (about 2 s of processor). Raises TrackingError
    where a database is out of reach."""
    if not is_server(uri):
        check_reachable(uri)  # MLflow would try again for minutes
    return MlflowClient(uri, registry_uri=uri)


def check_experiment(uri: str, experiment: str) -> None:
    """Open the store, and see that a run can be made in the experiment. Makes neither. Raises as `MlflowRun.open`."""
    with _told_of(uri):
        _find_experiment(open_store(uri), experiment)


def open_run(uri: str, run_id: str) -> MlflowRun:
    """A run that is there, by its MLflow id."""
    client = open_store(uri)
    return MlflowRun(client, client.get_run(run_id))


def read_artifact(uri: str, run_id: str, name: str) -> str:
    """A run's artifact, as text; empty when there is none."""
    return open_run(uri, run_id).read_text(name)


@dataclass(frozen=True)
class Logged:
    """What the store holds of a run: params, and each metric's last value."""

    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]


def read_runs(uri: str, experiment: str, references: Sequence[str]) -> list[Logged]:
    """Runs by id, name, checkpoints' folder or checkpoint; a sweep's parent stands for its children, oldest first.
    Raises TrackingError for an unknown one."""
    client = open_store(uri)
    found: list[Run] = []
    for reference in references:
        run = _find_run(client, experiment, reference)
        children = client.search_runs(
            [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", order_by=["start_time"]
        )
        found += list(children) or [run]
    return [Logged(run.info.run_name, run.info.status, run.data.params, run.data.metrics) for run in found]


def _find_run(client: MlflowClient, experiment: str, reference: str) -> Run:
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        return client.get_run(reference)
    known = client.get_experiment_by_name(experiment)
    where = reference.rstrip("/") if "://" in reference else str(Path(reference).absolute())
    where = re.sub(r"/step-\d{8,}$", "", where)  # one checkpoint of a run
    for key, value in (("tags.`distrain.checkpoints`", where), ("run_name", reference)):
        escaped = value.replace("'", "")
        runs = client.search_runs([known.experiment_id], f"{key} = '{escaped}'") if known is not None else []
        if runs:
            return runs[0]
    raise TrackingError(f"the experiment {experiment!r} has no run of the name or folder {reference!r}")


def is_permanent(error: Exception) -> bool:
    """Whether trying again is useless: the store is there and says no, or what it was given could not be made."""
    codes = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST",
             "INVALID_STATE", "ENDPOINT_NOT_FOUND", "NOT_FOUND", *_NO_CREDENTIALS}  # fmt: skip
    if isinstance(error, MlflowException):
        return error.error_code in codes or "mlflow db upgrade" in error.message
    return isinstance(error, TypeError | LookupError | AttributeError | ImportError)


def is_refused(error: Exception) -> bool:
    """Whether the store found fault with what it was given."""
    return isinstance(error, MlflowException) and error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def first_line(error: Exception) -> str:
    """What a person needs of an error that may be a page long."""
    text = str(error).strip() or type(error).__name__
    cause = re.search(r"\[Errno -?\d+\] [^'\")]+|[Rr]ead timed out", text)
    if cause is not None and "Max retries" in text:
        return f"no answer: {cause.group()}"
    return text.splitlines()[0][:300]


@contextmanager
def _told_of(uri: str) -> Iterator[None]:
    """Raises whatever opening the store raises as TrackingError, TrackingRefused where trying again is useless."""
    where = f"MLflow at {redacted(uri)}"
    try:
        yield
    except TrackingRefused as error:
        raise TrackingRefused(f"{where}: {error.message}") from error
    except TrackingError:
        raise
    except Exception as error:  # MLflow, its database driver and its file systems raise what they like
        advice = ""
        if isinstance(error, MlflowException) and error.error_code in _NO_CREDENTIALS:
            advice = (
                "; its credentials go into the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN"
            )
        kind = TrackingRefused if is_permanent(error) else TrackingError
        raise kind(f"{where}: {first_line(error)}{advice}") from error


def _take_up(client: MlflowClient, run_id: str) -> Run:
    """A run that is there, running again."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingRefused(
            f"run {run_id} is not there; name the store that has it, tracking.uri, {_WITHOUT}"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise TrackingRefused(f"run {run_id} was deleted; restore it, {_WITHOUT}")
    client.update_run(run_id, status="RUNNING")
    return run


def _find_experiment(client: MlflowClient, name: str) -> Experiment | None:
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise TrackingRefused(f"the experiment {name!r} was deleted; restore it, or change tracking.experiment")
    return found


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = _find_experiment(client, name)
    if found is not None:
        return found.experiment_id
    folder = database_folder(uri)
    # Beside the database: MLflow's own default is the folder the process happens to run in.
    location = None if folder is None else (folder / "mlartifacts" / quote(name, safe=" ")).as_uri()
    try:
        # The kind spares the page its tabs for language models.
        return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment_id(client, uri, name)  # another run was faster


def _origin_tags() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": "distrain", "mlflow.source.type": "LOCAL"}


def _dataset_input(dataset: DatasetDescription) -> DatasetInput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(dataset.source)
    meta = MetaDataset(
        source,
        name=dataset.name,
        digest=dataset.digest[:_DIGEST_CHARS],
        schema=Schema([ColSpec(mlflow_type(kind), name) for name, kind in dataset.columns]),
    )
    described = meta.to_dict()
    if len(described.get("schema") or "") > _MAX_SCHEMA_CHARS:
        described["schema"] = None
    described["profile"] = json.dumps({"num_rows": dataset.num_rows, "sha256": dataset.digest})
    return DatasetInput(DatasetEntity.from_dictionary(described), [InputTag("mlflow.data.context", dataset.context)])
