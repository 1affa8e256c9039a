"""Checkpoints on disk: write, verify, find, load, compare. Never runs code out of one, and needs no torch to write one.

A run's folder holds `step-00000500/{model.safetensors, optimizer.safetensors, manifest.json}` for each checkpoint and
`best.json`, which names the best of them. A checkpoint appears whole or not at all, in a local folder as in an object
store (see storage.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from distrain import __version__
from distrain.config_file import setting
from distrain.credentials import redacted
from distrain.errors import CheckpointError, CheckpointUnreadable
from distrain.manifest import FORMAT, MANIFEST, read_manifest, seal
from distrain.storage import Place, candidates, keeper, num_bytes, place

if TYPE_CHECKING:
    from torch import Tensor

MODEL, OPTIMIZER, BEST = "model.safetensors", "optimizer.safetensors", "best.json"

# What may change when a run is resumed. Every other key decides the weights that come out. (Paths of data sets are
# free, since the data sets themselves are compared by fingerprint.)
FREE_KEYS = (
    "workers", "epochs", "max_steps", "max_seconds", "checkpoint", "tracking", "cluster", "validation",
    "early_stopping", "convergence", "target", "diagnostics", "sweep", "resume", "server.threads", "server.slices",
    "data.train", "data.validation",
)  # fmt: skip
_NOT_FREE = ("workers.precision",)
_RATE = {f"optimizer.{key}" for key in ("name", "lr", "scale_lr", "base_batch_size")}
_KEEP_MOMENTS = _RATE - {"optimizer.name"} | {"optimizer.betas", "optimizer.eps"}

_CHUNK_BYTES = 1 << 20
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)

_Measure = tuple[str | None, dict[str, Any]]
"""What a checkpoint's validation metrics are of: the rows, by their fingerprint, and the loss."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state after update `step`, as the server hands it out."""

    step: int
    epoch: int  # epochs finished
    epoch_finished: bool  # with this very step
    model: bytes  # safetensors
    optimizer: bytes  # safetensors
    state: dict[str, Any]  # JSON-able: schedule, optimizer scalars, early stopping, best metric
    metrics: dict[str, float] = field(default_factory=dict)  # validation metrics measured at this step, or none


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, verified."""

    path: Place
    manifest: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # its state, and what else is kept beside the model


@dataclass(frozen=True)
class Listed:
    """A stored checkpoint as `survey` sees it. `problem` is None where every byte is as it was written."""

    path: Place
    step: int
    num_bytes: int
    epoch: int | None = None
    created: str | None = None  # ISO 8601
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able values by field."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "path": str(self.path), "metrics": dict(self.metrics)}


@dataclass(frozen=True)
class Found:
    """A valid checkpoint, and why newer ones were passed over (one line each)."""

    path: Place
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, in the folder `<checkpoint.dir>/<run_name>`.

    Keeps the last `keep` of them, and the best by the validation metric `metric`.
    """

    def __init__(
        self, directory: str | Place, keep: int = 3, metric: str = "loss", higher_is_better: bool = False
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}: at least 1 checkpoint has to be kept")
        self.directory = place(directory)
        self._keeper = keeper(self.directory)
        self.keep = keep
        self.metric = metric
        self.higher_is_better = higher_is_better

    def write(self, snapshot: Snapshot, manifest_fields: Mapping[str, Any]) -> Place:
        """Write a checkpoint, mark the best, remove what is no longer kept. Return the checkpoint's folder.

        `manifest_fields` are JSON-able: run_name, mlflow_run_id, tracking_uri, config
        (resolved, nested), data ({"train": fingerprint, "validation": fingerprint}), features, labels, num_features,
        num_outputs, image_shape, torch (threads and versions, which bits depend on). Passwords in URIs are taken out of
        them.

        Raises CheckpointError with path and reason (disk full, no permission); nothing half-written is left then.
        """
        path = self.directory / f"step-{snapshot.step:08d}"
        files = {MODEL: snapshot.model, OPTIMIZER: snapshot.optimizer}
        manifest = {
            "format": FORMAT,
            "distrain_version": __version__,
            "step": snapshot.step,
            "epoch": snapshot.epoch,
            "epoch_finished": snapshot.epoch_finished,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **redacted(manifest_fields),
            "state": snapshot.state,
            "metrics": snapshot.metrics,
            "files": {
                name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                for name, content in files.items()
            },
        }
        files[MANIFEST] = seal(manifest)
        try:
            if self.directory.is_dir():
                self._keeper.remove_leftovers(self.directory)
            self._keeper.write_folder(path, files)
            self._prune(path, _measure(manifest))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot write the checkpoint: {error.strerror or error}") from error
        return path

    def latest(self) -> Found | None:
        """Return the newest checkpoint that verifies, None where the run has none. Raises where all are damaged."""
        return newest_valid(self.directory) if _checkpoints(self.directory) else None

    @property
    def count(self) -> int:
        """How many there are, damaged ones too."""
        return len(_checkpoints(self.directory))

    def _prune(self, newest: Place, measure: _Measure) -> None:
        """Mark the best checkpoint, remove all but it, the last `keep` and `newest`, which was just written. `measure`
        is that of the newest: others do not compare with it."""
        readable = {}
        for path in _checkpoints(self.directory):
            try:
                readable[path] = read_manifest(path)
            except CheckpointError:
                continue  # a damaged one neither counts as kept nor is removed: a person may want to look at it
        kept = {newest, *list(readable)[: self.keep]}
        values = {
            path: value
            for path, manifest in readable.items()
            if math.isfinite(value := manifest["metrics"].get(self.metric, math.nan)) and _measure(manifest) == measure
        }
        if values:
            better = max if self.higher_is_better else min
            best = better(reversed(values), key=values.__getitem__)  # the oldest of equal ones
            marker = {"checkpoint": best.name, "metric": self.metric, "value": values[best]}
            self._keeper.write_file(self.directory / BEST, json.dumps(marker).encode())
            kept.add(best)
        elif (marked := _marked(self.directory)) is not None:
            kept.add(marked)  # until another one is validated
        for path in readable:
            if path not in kept:
                self._keeper.remove_folder(path)


def find(reference: str | Place, root: str | Place = "checkpoints") -> Found:
    """Find the checkpoint that a person means, and verify it.

    `reference` is the path or URI of a checkpoint's folder, or of a run's folder (the newest valid checkpoint in it;
    with `/best` behind it, the best), or a run's name or MLflow run id to be found under `root`, the folder of all
    runs and sweeps. Raises CheckpointError: nothing like it (did you mean), several runs of that name, the checkpoint
    named is damaged, or all of the run's are.
    """
    root = place(root)
    folders = [path for path in candidates(reference, root) if path.is_dir() or _means_best(path)]
    for path in folders:
        if _holds_any(path):
            return _in_folder(path)
    runs = _runs_and_points(root)
    called = [run for run in runs if str(reference) in _names(run)]
    if len(called) > 1:
        raise CheckpointError(f"{reference}: several runs are called so, name one: {', '.join(map(str, called))}")
    if called:
        return newest_valid(called[0])
    if folders:
        return _in_folder(folders[0])  # which says what is not in it
    names = [run.name if run.parent == root else f"{run.parent.name}/{run.name}" for run in runs]
    near = get_close_matches(str(reference).removeprefix(f"{root}/"), names, n=1, cutoff=0.5)
    hint = f"; did you mean {root / near[0]}?" if near else f"; runs there: {', '.join(names[:10])}" if names else ""
    raise CheckpointError(f"{reference}: no such checkpoint, run or MLflow run id under {root}{hint}")


def is_superseded(path: Place) -> bool:
    """Whether the run of a good checkpoint has a later good one."""
    others = _checkpoints(path.parent)
    return path in others[1:] and newest_valid(path.parent).path != path


def newest_valid(run: Place) -> Found:
    """Return the newest checkpoint of a run's folder that verifies; a warning is logged for each passed over.

    Raises CheckpointError where none verifies: CheckpointUnreadable where one of them may be good.
    """
    skipped: list[str] = []
    kind = CheckpointError
    for path in _checkpoints(run):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(error.message)
            kind = CheckpointUnreadable if isinstance(error, CheckpointUnreadable) else kind
        else:
            for reason in skipped:
                _log.warning("%s; going back to %s", reason, path.name)
            return Found(path, tuple(skipped))
    if not skipped:
        raise CheckpointError(f"{run}: no checkpoint in this folder")
    raise kind(f"{run}: no checkpoint in it can be used:\n" + "\n".join(f"  {line}" for line in skipped))


def verify(path: str | Place) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest; return the manifest.

    Raises CheckpointError naming the file that is missing, unreadable, of the wrong size or damaged.
    """
    path = place(path)
    manifest = read_manifest(path)
    for name in (MODEL, OPTIMIZER):
        _verify_file(path / name, manifest["files"][name])
    return manifest


def load(path: str | Place) -> Checkpoint:
    """Verify a checkpoint and return its manifest and CPU tensors by name. Raises CheckpointError as `verify` does."""
    from safetensors import SafetensorError  # here, since whoever only writes need not wait for torch
    from safetensors.torch import load as tensors_in

    path = place(path)
    manifest = read_manifest(path)
    tensors = []
    for name in (MODEL, OPTIMIZER):
        chunks: list[bytes] = []
        _verify_file(path / name, manifest["files"][name], chunks)
        try:
            tensors.append(tensors_in(b"".join(chunks)))
        except SafetensorError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error}") from error
    return Checkpoint(path, manifest, *tensors)


def _verify_file(file: Place, expected: Mapping[str, Any], chunks: list[bytes] | None = None) -> None:
    """Check a file's bytes against what the manifest says of them; what was read is appended to `chunks`, if given."""
    sha256 = hashlib.sha256()
    try:
        size = num_bytes(file)
        if size != expected["bytes"]:
            raise CheckpointError(f"{file}: damaged: {size} bytes, {expected['bytes']} were written")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                sha256.update(chunk)
                if chunks is not None:
                    chunks.append(chunk)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except OSError as error:
        raise CheckpointUnreadable(f"{file}: cannot be read: {error.strerror or error}") from error
    if sha256.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{file}: damaged: its content does not match its SHA-256")


def survey(folder: str | Place) -> list[Listed]:
    """Verify every checkpoint of a run, or of all runs in a folder. Newest first within each run.

    Raises CheckpointError where there is none.
    """
    folder = place(folder)
    runs = [folder] if _checkpoints(folder) else _runs(folder)
    if not runs:
        raise CheckpointError(f"{folder}: holds no checkpoints, neither of a run nor of several")
    return [_listed(path) for run in runs for path in _checkpoints(run)]


def prune(run: str | Place, keep: int) -> list[Place]:
    """Remove all but a run's last `keep` good checkpoints and its best one. Damaged ones are left for a person to see.

    Returns what was removed. Raises CheckpointError where the folder is not a run's, or `keep` is 0.
    """
    run = place(run)
    if not _checkpoints(run):
        raise CheckpointError(f"{run}: not the folder of a run's checkpoints")
    if keep < 1:
        raise CheckpointError(f"keep is {keep}: at least 1 checkpoint has to be kept")
    good = [entry for entry in survey(run) if entry.problem is None]
    gone = [entry.path for entry in good[keep:] if not entry.is_best]
    for path in gone:
        keeper(run).remove_folder(path)
    return gone


def differences(
    manifest: Mapping[str, Any], config: Mapping[str, Any], fingerprints: Mapping[str, str | None]
) -> dict[str, str]:
    """What decides the result and differs from the checkpoint's run: a line each, by key.

    `config` is the resolved configuration, nested, as JSON has it; `shards: null` in it means the checkpoint's.
    `fingerprints` are those of the data sets "train" and "validation". `FREE_KEYS` may change, and so may a data set's
    path: what counts is what is in it.
    """
    old, new = _flat(manifest["config"]), _flat(redacted(config))
    if old.get("shards") is None:
        old["shards"] = old.get("workers.count")
    if new.get("shards") is None:
        new["shards"] = old["shards"]
    found = {
        key: f"{key}: {old.get(key)!r} in the checkpoint, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (key in _NOT_FREE or not any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS))
    }
    return found | {
        f"data.{name}": f"data.{name}: the {name} data has changed (files, rows or columns) since the checkpoint was "
        "written"
        for name, fingerprint in manifest["data"].items()
        if fingerprint and fingerprints.get(name) and fingerprint != fingerprints[name]
    }


def as_overrides(config: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """The command line's settings that give these dotted keys what they have in `config`, nested.

    A whole section is given where it has lost a key.
    """
    settings: dict[tuple[str, ...], Any] = {}
    for key in keys:
        value: Any = config
        path: tuple[str, ...] = ()
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                break
            value, path = value[name], (*path, name)
        settings[path] = value
    outer = [path for path in settings if not any(path[:depth] in settings for depth in range(1, len(path)))]
    return [setting(".".join(path), settings[path]) for path in outer]


def follow_changes(manifest: dict[str, Any], changed: Collection[str]) -> list[str]:
    """Have a run that goes on from this checkpoint follow the `changed` keys, of `differences`.

    The epoch under way begins again. Where the learning rate has to do with it, the optimizer's options and the
    schedule are the configuration's, the schedule as after the updates done so far, and not those in the state. Moments
    that may not fit begin anew, and so does the best validation where others are not to be compared with it. A run that
    its stopping rules ended trains on. Returns what else a person should know, a line each.
    """
    state, before, told = manifest["state"], manifest["config"], []
    state["agenda"] = {"epoch": manifest["epoch"]}
    state.pop("epoch_loss", None)
    state["stopping"].pop("ended", None)
    if any(key == "data.validation" or key.startswith("loss.") for key in changed):
        state["stopping"] = {**state["stopping"], "top": None, "best": None, "stale": 0}
    rows = "data.train" if before["batch_size"] == "full" else "batch_size"
    is_scaled = before["optimizer"].get("base_batch_size") is not None and rows in changed
    has_other_rate = is_scaled or any(key in _RATE or key.startswith("schedule.") for key in changed)
    if not has_other_rate and not any(key.startswith("optimizer.") for key in changed):
        return []
    groups = state["optimizer"]["param_groups"]
    state["optimizer"]["param_groups"] = [{"params": group["params"]} for group in groups]
    goes_by_loss = (before["schedule"] or {}).get("name") == "ReduceLROnPlateau"
    if has_other_rate or not goes_by_loss:
        state["schedule"] = {"steps": state["schedule"]["steps"]}
        if goes_by_loss:
            told.append("the schedule, and how often it reduced the learning rate, begins anew")
    if any(key.startswith("optimizer.") and key not in _KEEP_MOMENTS for key in changed):
        state["optimizer"]["state"], state["optimizer"]["param_groups"] = [], None
        told.append("the optimizer's state, such as its momentum, begins anew")
    return told


def _measure(manifest: Mapping[str, Any]) -> _Measure:
    return manifest.get("data", {}).get("validation"), _flat({"loss": manifest.get("config", {}).get("loss")})


def _marked(run: Place) -> Place | None:
    """The checkpoint that is marked as a run's best, if one is."""
    try:
        return run / str(json.loads((run / BEST).read_bytes())["checkpoint"]).rpartition("/")[2]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _means_best(path: Place) -> bool:
    return path.name == "best" and path.parent.is_dir() and not path.is_dir()


def _holds_any(path: Place) -> bool:
    """Whether a folder that a person may mean is a checkpoint, or holds some, of one run or several."""
    if _means_best(path):
        return bool(_checkpoints(path.parent))
    return _is_checkpoint(path) or bool(_checkpoints(path) or _runs(path))


def _is_checkpoint(path: Place) -> bool:
    return (path / MANIFEST).exists() or _STEP.fullmatch(path.name) is not None


def _best(run: Place) -> Found:
    path = _marked(run)
    if path is None:
        raise CheckpointError(f"{run}: no best checkpoint is marked in it, since no validation was done")
    verify(path)
    return Found(path)


def _listed(path: Place) -> Listed:
    match = _STEP.search(path.name)
    step = int(match[1]) if match else -1
    size = sum(num_bytes(file) for file in path.iterdir() if not file.is_dir())
    try:
        manifest = verify(path)
    except CheckpointError as error:
        return Listed(path, step, size, problem=error.message)
    epoch, created, metrics = manifest["epoch"], manifest["created"], manifest["metrics"]
    return Listed(path, step, size, epoch, created, metrics, _marked(path.parent) == path)


def _in_folder(path: Place) -> Found:
    """The checkpoint meant by a folder: itself, a run's newest or best, or that of the only run in it."""
    if _means_best(path):
        return _best(path.parent)
    if _is_checkpoint(path):
        try:
            verify(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error.message}\n  name the run's folder, {path.parent}, to use another one"
            ) from error
        return Found(path)
    runs = [] if _checkpoints(path) else _runs(path)
    if len(runs) > 1:
        raise CheckpointError(f"{path}: holds several runs, name one: {', '.join(map(str, runs))}")
    return newest_valid(runs[0] if runs else path)


def checkpoints_of(run: str | Place) -> list[Place]:
    """The checkpoints of a run's folder, oldest first, verified or not."""
    return _checkpoints(place(run))[::-1]


def has_checkpoints(run: str | Place) -> bool:
    """Whether a run's folder holds any checkpoint, good or not."""
    return bool(_checkpoints(place(run)))


def _runs(root: Place) -> list[Place]:
    return sorted(path for path in root.iterdir() if path.is_dir() and _checkpoints(path)) if root.is_dir() else []


def _runs_and_points(root: Place) -> list[Place]:
    """The runs in a folder, and those of the sweeps and restarts in it."""
    runs = _runs(root)
    others = [path for path in root.iterdir() if path.is_dir() and path not in runs] if root.is_dir() else []
    return runs + [point for other in sorted(others) for point in _runs(other)]


def _names(run: Place) -> set[str | None]:
    """The run's name and its MLflow run id, as its newest readable checkpoint has them."""
    for path in _checkpoints(run):
        with suppress(CheckpointError):
            manifest = read_manifest(path)
            return {manifest.get("run_name"), manifest.get("mlflow_run_id")}
    return set()


def _checkpoints(run: Place) -> list[Place]:
    """The checkpoints of a run, newest (highest step) first, verified or not."""
    try:
        here = keeper(run).folders(run) if run.is_dir() else {}
    except OSError as error:
        raise CheckpointUnreadable(f"{run}: cannot be listed: {error.strerror or error}") from error
    steps = {int(match[1]): path for name, path in here.items() if (match := _STEP.fullmatch(name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole, and so do empty mappings and nulls count as absent."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
