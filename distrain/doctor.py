"""What a run needs, looked at one by one before it: `distrain doctor`. Every finding that is not ok says what to do."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from distrain.config import CheckpointConfig, ClusterConfig, TrackingConfig, TrainConfig, WorkersConfig
from distrain.errors import ClusterError, DistrainError
from distrain.exchange.layout import Layout
from distrain.exchange.memory import SharedBuffer
from distrain.jobs import Jobs
from distrain.learning.fit import check_task
from distrain.learning.task import build_task
from distrain.objects import ObjectPath, write_file
from distrain.placement import Cluster, check_local_room, token_source
from distrain.preparation import Preparation, prepare
from distrain.progress.standing import plural, size
from distrain.storage import place
from distrain.tracking import check_opens

OK, WARNING, FAILED = "ok", "warning", "failed"
_SHOWN = ("torch", "ray", "pyarrow", "mlflow")  # of the versions
_PROBE_BYTES = 1 << 20
_SHM_BYTES = 192 << 20  # Ray's object store of 128 MiB, and room beside it
_ROOM_BYTES = 1 << 30  # for checkpoints, where the model is not known


@dataclass(frozen=True)
class Finding:
    """What was found about one thing. `exit_code`: what the command ends with where this has failed."""

    subject: str
    verdict: str  # ok, warning, failed
    message: str
    advice: str = ""  # what to do about it, unless ok
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)


def examine(config: TrainConfig | None = None, dashboard: str | None = None) -> Iterator[Finding]:
    """Look at versions, cluster, token, shared memory, data, model, tracking and checkpoints: a finding each, at once.

    Without `config`: what can be looked at without one. `dashboard`: that of the cluster that jobs are submitted to;
    None: RAY_API_SERVER_ADDRESS, and where that is not set, the cluster that a run here would use. Nothing is left
    behind but MLflow's tables in a database that is there, and no error is raised: what fails is a finding.
    """
    dashboard = dashboard or os.environ.get("RAY_API_SERVER_ADDRESS")
    workers = config.workers if config is not None else WorkersConfig(count=1)
    yield versions()
    if dashboard is not None:
        yield from jobs_cluster(dashboard)
    else:
        where = config.cluster if config is not None else ClusterConfig()
        yield cluster(where.address, workers, where.wait_seconds)
    yield token()
    yield shared_memory()
    checkpoint_bytes = None
    if config is not None:
        finding, preparation = data(config)
        yield finding
        if preparation is not None:
            finding, checkpoint_bytes = model(preparation)
            yield finding
    tracked = config.tracking if config is not None else TrackingConfig()
    kept = config.checkpoint if config is not None else CheckpointConfig()
    is_job = dashboard is not None  # which takes the cluster's stores, unless it names its own
    yield of_cluster("tracking", "MLFLOW_TRACKING_URI") if is_job and not _names(tracked, "uri") else tracking(tracked)
    if is_job and not _names(kept, "dir"):
        yield of_cluster("checkpoints", "DISTRAIN_CHECKPOINT_DIR")
    else:
        yield checkpoints(kept, checkpoint_bytes)


def versions(requirements: list[str] | None = None) -> Finding:
    """Whether the installed libraries are those that distrain asks for (`requirements`; None: its own)."""
    wrong, fix = [], []
    if requirements is None:
        try:
            requirements = metadata.requires("distrain") or []
        except metadata.PackageNotFoundError:
            said = "distrain is not installed, only on Python's path, so which versions it needs is not known"
            return Finding("versions", FAILED, said, "pip install -e . in the folder that has its pyproject.toml", 2)
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "not there"
        if installed == "not there" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, and has to be {requirement.specifier or 'there'}")
            fix.append(f"'{requirement}'")
    if wrong:
        return Finding("versions", FAILED, "; ".join(wrong), f"pip install {' '.join(fix)}", 2)
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in _SHOWN)
    return Finding("versions", OK, f"Python {platform.python_version()}, {shown}")


def cluster(address: str | None, workers: WorkersConfig, wait_seconds: float | None = None) -> Finding:
    """Whether the Ray cluster that a run here would use is there, and has room for its workers."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    asked = f"{plural(workers.count, 'worker')} of {workers.cpus:g}" + (
        f" and {workers.gpus:g} GPUs" if workers.gpus else ""
    )
    try:
        if address == "local":
            room = check_local_room(workers)
            shares = "; they share" if room.shared_cores else ""
            return Finding("cluster", OK, f"a Ray of its own, {room.there_cpus:g} CPUs for {asked}{shares}")
        attached = Cluster(address, workers, wait_seconds)
    except DistrainError as error:
        return Finding("cluster", FAILED, error.message, _cluster_advice(error), error.exit_code)
    there, there_gpus = attached.resources.there_cpus, attached.resources.there_gpus
    attached.close()
    found = f"{address} has {there:g} CPUs{f' and {there_gpus:g} GPUs' if workers.all_gpus else ''} for {asked}"
    if there < workers.all_cpus or there_gpus < workers.all_gpus:
        advice = "it starts with fewer, and grows as nodes are added"
        if wait_seconds is not None:
            advice = f"it waits up to {wait_seconds:g} s for nodes to be added (cluster.wait_seconds)"
        return Finding("cluster", WARNING, found, advice)
    return Finding("cluster", OK, found)


def jobs_cluster(dashboard: str) -> Iterator[Finding]:
    """Whether jobs can be submitted to the cluster of this dashboard, and by those only who have its token."""
    try:
        jobs = Jobs(dashboard)
        version = jobs.ray_version()
        open_to_all = jobs.takes_anyone()
    except ClusterError as error:
        yield Finding("cluster", FAILED, error.message, _cluster_advice(error), error.exit_code)
        return
    here = metadata.version("ray")
    if version.split(".")[:2] != here.split(".")[:2]:
        advice = f"pip install 'ray=={version}' here, or Ray {here} there"
        yield Finding("cluster", WARNING, f"{dashboard} runs Ray {version}, and this is Ray {here}", advice)
    else:
        yield Finding("cluster", OK, f"{dashboard} takes jobs, Ray {version}")
    if open_to_all:
        advice = "start it with RAY_AUTH_MODE=token, and give it a token: ray get-auth-token --generate"
        yield Finding("cluster", WARNING, f"{dashboard} runs whatever anyone on its network submits", advice)


def token() -> Finding:
    """Where the token for clusters comes from."""
    try:
        source = token_source()
    except ClusterError as error:
        advice = "make one with: ray get-auth-token --generate; or name its file in RAY_AUTH_TOKEN_PATH"
        return Finding("token", FAILED, error.message, advice, error.exit_code)
    return Finding("token", OK, source)


def shared_memory(shm: Path = Path("/dev/shm")) -> Finding:
    """Whether workers and server can share anonymous memory, and Ray's object store fits into `shm`."""
    try:
        buffer = SharedBuffer(_PROBE_BYTES)
        buffer.floats(0, _PROBE_BYTES // 4).fill_(1.0)
        buffer.close()
    except OSError as error:
        advice = "allow memfd_create in the container's seccomp profile, and raise its memory limit"
        return Finding("shared memory", FAILED, f"no anonymous memory can be had: {error.strerror}", advice, 3)
    usage = shutil.disk_usage(shm)
    message = f"{shm} has {size(usage.free)} free of {size(usage.total)}"
    if usage.free < _SHM_BYTES:
        advice = "give the container more: docker run --shm-size=512m, SHM_SIZE for docker-compose.yml"
        return Finding(
            "shared memory", WARNING, f"{message}; Ray's object store is slow with less than {size(_SHM_BYTES)}", advice
        )
    return Finding("shared memory", OK, message)


def data(config: TrainConfig) -> tuple[Finding, Preparation | None]:
    """Whether the data can be read and makes sense, by the files' footers."""
    try:
        found = prepare(config)
    except DistrainError as error:
        advice = "distrain config CONFIG shows the paths; on a cluster they have to mean the same there"
        return Finding("data", FAILED, error.message, advice, error.exit_code), None
    train = found.train.dataset
    message = f"{train.num_rows:,} rows in {plural(len(train.files), 'file')}"
    if found.validation is not None:
        message += f", {found.validation.dataset.num_rows:,} for validation"
    return Finding("data", OK, f"{message}; {found.train.plan.steps_per_epoch:,} steps an epoch"), found


def model(preparation: Preparation) -> tuple[Finding, int | None]:
    """Whether model and loss can be built and take the data's first rows; and the bytes of one checkpoint, in which are
    the parameters and two values of an optimizer like Adam for each."""
    train = preparation.train
    try:
        task = build_task(preparation.task)
        check_task(task, train.dataset, train.plan.smallest_forward, strict=True)
        layout = Layout.of(task.model)
    except DistrainError as error:
        return Finding(
            "model", FAILED, error.message, "distrain config CONFIG shows its settings", error.exit_code
        ), None
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        where = [frame for frame in frames if "site-packages" not in frame.filename][-1]  # not torch's own
        message = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
        return Finding("model", FAILED, message, "model and loss, given the first rows, raise this", 2), None
    num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return Finding("model", OK, f"{num_parameters:,} parameters"), 3 * layout.vector_bytes


def of_cluster(subject: str, variable: str) -> Finding:
    """What the cluster's environment says and this one does not know."""
    return Finding(subject, OK, f"not looked at from here: the cluster's {variable} says where, or its default")


def tracking(config: TrackingConfig, check: Callable[[str, str], None] = check_opens) -> Finding:
    """Whether the tracking store is there, opens for us and takes runs of the experiment."""
    if not config.enabled:
        return Finding("tracking", OK, "off (tracking.enabled)")
    try:
        check(config.uri, config.experiment)
    except DistrainError as error:
        advice = (
            "mend that, or name another one: tracking.uri, MLFLOW_TRACKING_URI; sqlite:///mlflow.db needs no server"
        )
        return Finding("tracking", FAILED, error.message, advice, error.exit_code)
    shown = config.uri.rpartition("@")[2] if "@" in config.uri else config.uri  # it may hold a password
    return Finding("tracking", OK, shown)


def checkpoints(config: CheckpointConfig, one_bytes: int | None = None) -> Finding:
    """Whether checkpoints can be written, and there is room for those that are kept. `one_bytes`: of one of them."""
    advice = "name another folder: checkpoint.dir, DISTRAIN_CHECKPOINT_DIR"
    try:
        where = place(config.dir)
        if isinstance(where, ObjectPath):
            probe = where / "distrain-doctor"
            write_file(probe, b"")
            probe.files.delete_file(probe.key)
            return Finding("checkpoints", OK, str(where))
    except (OSError, DistrainError) as error:
        message = f"{config.dir} cannot be written: {str(error).strip().splitlines()[0]}"
        return Finding("checkpoints", FAILED, message, f"check bucket, region and credentials, or {advice}", 2)
    return _local_checkpoints(config, where.absolute(), one_bytes, advice)


def _local_checkpoints(config: CheckpointConfig, folder: Path, one_bytes: int | None, advice: str) -> Finding:
    there = folder
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror}"
        return Finding("checkpoints", FAILED, message, advice, 2)
    free = shutil.disk_usage(there).free
    needed = _ROOM_BYTES if one_bytes is None else (config.keep + 2) * one_bytes  # the best, and the one being written
    message = f"{folder}, {size(free)} free"
    if one_bytes is not None:
        message += f"; {config.keep + 2} of {size(one_bytes)} are there at most"
    if free < needed:
        return Finding("checkpoints", WARNING, message, f"make room, keep fewer (checkpoint.keep), or {advice}")
    return Finding("checkpoints", OK, message)


def _names(config: TrackingConfig | CheckpointConfig, key: str) -> bool:
    """Whether a configuration was given this key."""
    return key in config.model_fields_set


def _cluster_advice(error: DistrainError) -> str:
    if "token" in error.message:
        return "RAY_AUTH_MODE=token, and in RAY_AUTH_TOKEN_PATH the file with the cluster's token"
    if "asked for" in error.message:
        return "ask for less, or start more nodes"
    return (
        "start it (docker compose up -d --wait, ray start --head), or correct RAY_ADDRESS, cluster.address or --address"
    )
