"""What workers ask Ray for, and what is said where it is not there. No Ray is started."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_machine_without_gpus_says_so_before_ray_starts(tmp_path: Path):
    done = distrain("train", str(write_job(tmp_path)), "workers.gpus=1", cwd=tmp_path)
    assert done.code == 3
    assert "asked for 2 GPUs (2 workers of 1), this machine has 0 (its torch" in done.stderr
