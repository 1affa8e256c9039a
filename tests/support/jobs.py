"""Small jobs on disk, and runs of the real command line."""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CLASSES = 3

# A limit that nothing here needs marks this session's processes: children inherit it, whoever becomes their parent and
# whatever they call themselves. (Ray's workers write over their environment, and other runs' Rays look the same.)
_, _most = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
_MARK = 1 + secrets.randbelow(_most if 0 < _most < 1 << 30 else 1 << 30)
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (_MARK, _most))


def write_rows(folder: Path, rows: int, files: int = 2, row_group_rows: int = 37, seed: int = 0) -> Path:
    """Parquet files of 4 features f0..f3 and an integer label that depends on them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    label = np.argmax(features[:, :CLASSES], axis=1).astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        columns = {f"f{i}": features[part, i] for i in range(4)}
        table = pa.table({**columns, "label": label[part]})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=row_group_rows)
    return folder


def write_job(folder: Path, rows: int = 300, **changes: Any) -> Path:
    """A configuration over fresh data in `folder`: an MLP with dropout and batch normalization. Returns its path."""
    values: dict[str, Any] = {
        "data": {
            "train": str(write_rows(folder / "train", rows)),
            "validation": str(write_rows(folder / "validation", 90, files=1, seed=1)),
            "label": "label",
            "shuffle_rows": 60,
            "standardize": True,
        },
        "model": {"hidden": [16, 8], "dropout": 0.2, "normalization": "batch"},
        "optimizer": {"name": "AdamW", "lr": 0.01, "weight_decay": 0.01},
        "schedule": {"name": "CosineAnnealingLR", "T_max": 60, "warmup_steps": 5},
        "clip": {"norm": 1.0},
        "batch_size": 32,
        "epochs": 4,
        "shards": 4,
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def write_plain_job(folder: Path, **changes: Any) -> Path:
    """As `write_job`, with nothing to validate on and nothing standardized: for a model of the test's own."""
    data = {"train": str(folder / "train"), "label": "label", "shuffle_rows": 60}
    return write_job(folder, data=data, loss="cross_entropy", **changes)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. One that ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Finished:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON line."""
        return json.loads(self.stdout.splitlines()[-1])


def start(*arguments: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start the command line, with no cluster to attach to, and further environment variables."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "distrain.cli", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def distrain(*arguments: str, cwd: Path, timeout_s: float = 120, **variables: str) -> Finished:
    """Run the command line to its end."""
    return finish(start(*arguments, cwd=cwd, **variables), timeout_s)


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> Finished:
    """Wait for a command's end."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Finished(process.returncode, stdout, stderr)


def wait_for(condition: Any, timeout_s: float = 60, what: str = "it") -> Any:
    """Poll until `condition()` is true; returns what it returned."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def workers_of(pid: int, actor: str = "WorkerActor") -> list[psutil.Process]:
    """The worker actors' processes below a driver, or those of another actor; the newest first."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            if actor in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time(), reverse=True)


def leftovers(before: set[int]) -> list[str]:
    """Ray processes that this test session started and that were not there before. With its process ends what one
    holds: anonymous buffers and abstract sockets have no name to stay under."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        text = " ".join(process.info["cmdline"] or [])
        is_ray = any(word in text for word in ("distrain-ray-", "ray::WorkerActor", "ray::ServerActor"))
        if is_ray and process.info["pid"] not in before:
            with suppress(psutil.Error):
                is_ours = process.rlimit(resource.RLIMIT_MSGQUEUE)[0] == _MARK
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(text[:100])
    return left
