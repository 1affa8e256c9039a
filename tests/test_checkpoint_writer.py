"""Snapshots reach the disk, whatever fails on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from distrain.checkpoint import CheckpointStore, Snapshot
from distrain.checkpoint_writer import CheckpointWriter
from distrain.errors import CheckpointError, ClusterError, ServerLost
from tests.support.jobs import wait_for


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, 0, False, save({"weight": torch.ones(2)}), save({}), {}, {})


class Source:
    """Gives what it is told to, or raises it; then nothing."""

    def __init__(self, *values: Snapshot | Exception) -> None:
        self.values = list(values)

    def take(self) -> Snapshot | None:
        value = self.values.pop(0) if self.values else None
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def written() -> list[int]:
    return []


@pytest.fixture
def failed() -> list[tuple[int | None, str]]:
    return []


@pytest.fixture
def start(tmp_path: Path, written: list[int], failed: list[tuple[int | None, str]]) -> Callable[..., CheckpointWriter]:
    def fields(snapshot: Snapshot) -> dict[str, Any]:
        if snapshot.step == 13:
            raise RuntimeError("no fields")
        return {"run_name": "a", "mlflow_run_id": None, "tracking_uri": None, "config": {}, "data": {}, "torch": {},
                "features": [], "labels": [], "num_features": 1, "num_outputs": 1}  # fmt: skip

    def begin(source: Source) -> CheckpointWriter:
        return CheckpointWriter(
            CheckpointStore(tmp_path / "run", keep=3), source.take, fields,
            lambda step, path: written.append(step), lambda step, error: failed.append((step, error.message)),
        )  # fmt: skip

    return begin


@pytest.mark.parametrize("error", [ClusterError("the object store is full"), RuntimeError("the object store is full")])
def test_what_could_not_be_fetched_is_said_and_the_next_is(error: Exception, start, written, failed):
    source = Source(error, snapshot(1), snapshot(2))
    writer = start(source)
    writer.wake()
    wait_for(lambda: failed, 10, "the word of it")
    assert writer.last_error is not None
    writer.close()
    assert written == [1, 2] and writer.last_error is None
    [(step, message)] = failed
    assert step is None and "a snapshot could not be fetched or written" in message and "store is full" in message


def test_what_fails_on_the_way_to_the_disk_costs_that_checkpoint(start, written, failed):
    writer = start(Source(snapshot(12), snapshot(13), snapshot(14)))
    writer.wake()
    wait_for(lambda: failed, 10, "the word of it")
    writer.close()
    assert written == [12, 14] and "RuntimeError: no fields" in failed[0][1]


def test_the_last_failure_is_there_to_be_raised(start, written, failed):
    writer = start(Source(ClusterError("gone")))
    writer.close()
    assert isinstance(writer.last_error, CheckpointError) and written == []


def test_a_lost_server_is_for_its_supervisor_to_tell(start, written, failed):
    writer = start(Source(ServerLost("it died"), snapshot(1)))
    writer.wake()
    writer.close()
    assert written == failed == [] and writer.last_error is None
    assert writer.lost is not None and writer.lost.message == "it died"
