"""Workers on GPUs, on parts of one, and on CPUs, on real Ray with GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import write_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = write_job(
        tmp_path_factory.mktemp("gpus"),
        model={"factory": "tests.support.gpus:build"},
        epochs=2,
        tracking={"enabled": False},
    )
    command = [sys.executable, "-m", "tests.support.gpus", str(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_worker_gets_its_gpu_or_its_part_of_one_or_none(said: dict[str, Any]):
    assert said["cpu"]["gpus"] == []
    assert said["one each"]["gpus"] == ["0", "1"]
    assert len(said["shared"]["gpus"]) == 3 and set(said["shared"]["gpus"]) <= {"0", "1"}
    assert len(said["mixed"]["gpus"]) == 1


@pytest.mark.parametrize("name", ["one each", "shared", "mixed"])
def test_the_weights_are_those_of_the_cpu_which_the_fake_is(said: dict[str, Any], name: str):
    assert said[name]["sha256"] == said["cpu"]["sha256"]


def test_too_few_gpus_and_a_torch_without_cuda_are_said_at_once(said: dict[str, Any]):
    assert said["too many"]["code"] == said["no CUDA"]["code"] == 3
    assert said["too many"]["error"].startswith("asked for 3 GPUs (3 workers of 1), the cluster has 2.")
    assert "a worker that has a GPU cannot compute on it: its torch" in said["no CUDA"]["error"]
