"""jobs/chaos.py, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import write_plain_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]


def test_a_job_under_a_stream_of_faults_keeps_its_weights(tmp_path: Path):
    job = write_plain_job(
        tmp_path,
        model={"factory": "tests.support.slow:build", "args": {"seconds": 0.01}},
        epochs=40,
        workers={"count": 2},
        checkpoint={"dir": str(tmp_path / "checkpoints"), "every_steps": 20, "keep": 3},
    )
    faults = "worker killed,worker paused until it was given up,latest checkpoint damaged and server killed"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "chaos.py"), str(job), "--every=1", "--seed=3", f"--faults={faults}"],
        cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights: the same to the bit" in done.stdout
    assert "history: each shard of each step once, nothing durable lost" in done.stdout
    assert done.stderr.count(" (process ") >= 3
