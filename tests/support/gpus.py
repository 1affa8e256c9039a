"""Runs on a Ray that has GPUs, as far as it knows. Whoever gets one computes on FakeGpu.

Run as a program, in a process of its own: `python -m tests.support.gpus JOB` ends with one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from torch import nn

from distrain import actors
from distrain.config import load_config
from distrain.errors import DistrainError
from distrain.trainer import Trainer
from tests.support.accelerator import FakeGpu

_GPUS = 2


class CountedGpu(FakeGpu):
    """Notes which GPU Ray has given to this process."""

    def __init__(self) -> None:
        super().__init__()
        with Path(os.environ["DISTRAIN_TEST_GPUS"]).open("a") as file:
            file.write(os.environ["CUDA_VISIBLE_DEVICES"] + "\n")


def build(fake: bool = True) -> nn.Module:
    """A model whose worker takes the fake for a GPU."""
    if fake:
        actors.Cuda = CountedGpu  # type: ignore[misc,assignment]
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def outcome(job: str, *overrides: str) -> dict[str, Any]:
    """What a run ended with, and the GPUs that its workers were given."""
    given = Path(os.environ["DISTRAIN_TEST_GPUS"])
    given.write_text("")
    try:
        result = Trainer(load_config(job, overrides)).fit()
    except DistrainError as error:
        return {"error": error.message, "code": error.exit_code}
    return {"sha256": result.parameters_sha256, "gpus": sorted(given.read_text().split())}


def main() -> None:
    job = sys.argv[1]
    os.environ["DISTRAIN_TEST_GPUS"] = str(Path(job).with_name("gpus.txt"))
    ray.init("local", num_cpus=3, num_gpus=_GPUS, include_dashboard=False, log_to_driver=False)
    runs = {
        "cpu": ["workers.count=1"],
        "one each": ["workers={count: 2, gpus: 1}"],
        "shared": ["workers={count: 3, gpus: 0.5}"],
        "mixed": ["workers={count: 3, gpus: 1, gpu_count: 1}"],
        "too many": ["workers={count: 3, gpus: 1}"],
        "no CUDA": ["workers={count: 2, gpus: 1}", "model.args={fake: false}"],
    }
    print(json.dumps({name: outcome(job, *overrides) for name, overrides in runs.items()}))
    ray.shutdown()


if __name__ == "__main__":
    main()
