"""What workers ask Ray for, and what is said where it is not there. No Ray is started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distrain import placement
from distrain.config import WorkersConfig
from distrain.errors import ClusterError
from distrain.placement import bundle, check_local_room
from tests.support.jobs import distrain, write_job


@pytest.mark.parametrize(
    ("workers", "bundles"),
    [
        ({"count": 2, "cpus": 2}, [{"CPU": 2}, {"CPU": 2}]),
        ({"count": 2, "gpus": 1}, [{"CPU": 1, "GPU": 1}] * 2),
        ({"count": 2, "gpus": 0.5}, [{"CPU": 1, "GPU": 0.5}] * 2),
        ({"count": 3, "gpus": 1, "gpu_count": 1}, [{"CPU": 1, "GPU": 1}, {"CPU": 1}, {"CPU": 1}]),
    ],
)
def test_a_worker_asks_for_its_gpu_or_its_part_of_one_or_none(workers: dict, bundles: list[dict[str, float]]):
    config = WorkersConfig(**workers)
    assert [bundle(config, rank) for rank in range(config.count)] == bundles


def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ClusterError, match=r"^asked for 1.5 GPUs \(3 workers of 0.5\), this machine has 1"):
        check_local_room(WorkersConfig(count=3, gpus=0.5))
    room = check_local_room(WorkersConfig(count=2, gpus=0.5))
    assert (room.asked_gpus, room.there_gpus) == (1.0, 1.0)


class Room:
    """A placement group that never comes, but for one."""

    def __init__(self, comes: bool) -> None:
        self.comes = comes

    def wait(self, timeout_seconds: float) -> bool:
        if not self.comes:
            time.sleep(timeout_seconds)
        return self.comes


@pytest.mark.parametrize("comes", [3, None])
def test_a_ray_that_is_started_anew_for_room_takes_nothing_from_the_wait(
    monkeypatch: pytest.MonkeyPatch, comes: int | None
):
    class Slow(placement.Cluster):
        starts = 0

        def _start_local(self) -> None:
            self.starts += 1
            if self.starts > 1:
                time.sleep(0.5)

    rooms = [Room(number == comes) for number in range(1, 9)]
    monkeypatch.setattr(placement, "_RESERVE_SECONDS", 0.4)
    monkeypatch.setattr(placement, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: rooms.pop(0))
    lost = {"state": "PENDING", "stats": {"scheduling_state": "QUEUED"}}
    monkeypatch.setattr(placement, "placement_group_table", lambda _: lost)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.0})
    cluster = Slow("local", WorkersConfig(count=2))
    if comes is None:
        with pytest.raises(ClusterError, match=r"no room came free within 0.4 s: 0 of \d+ CPUs are free"):
            cluster._await_room()
        assert cluster.starts == 4  # after 0.05, 0.1 and 0.2 s of waiting
    else:
        assert cluster._await_room().comes and cluster.starts == 3


def test_a_machine_without_gpus_says_so_before_ray_starts(tmp_path: Path):
    done = distrain("train", str(write_job(tmp_path)), "workers.gpus=1", cwd=tmp_path)
    assert done.code == 3
    assert "asked for 2 GPUs (2 workers of 1), this machine has 0 (its torch" in done.stderr
