"""The driver of one contender of jobs/recovery.py, which starts it: trains until it is ended, and logs each step.

`python jobs/recovery_run.py distrain|ray-train FOLDER NODES CHECKPOINT_STEPS TIMEOUT_S`: the log is FOLDER/steps.
Started again on the same folder, it goes on from the last checkpoint in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.cluster_utils import Cluster
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Trainer
from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Report

ROOT = Path(__file__).parent.parent
FOR_EVER = 10_000_000


class Log(SilentProgress):
    """Writes down when each step was done."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed with the process)

    def report(self, report: Report) -> None:
        for record in report.steps:
            self._file.write(json.dumps([record.time_ms / 1000, record.step]) + "\n")


def distrain(folder: Path, checkpoint_steps: int, timeout_s: float) -> None:
    """The digits' job."""
    settings = [
        "tracking={enabled: false, run_name: run}", "resume=auto", f"epochs={FOR_EVER}", "schedule=null",
        f"checkpoint={{dir: {folder}, every_steps: {checkpoint_steps}}}", f"workers.timeout_seconds={timeout_s}",
    ]  # fmt: skip
    Trainer(load_config(ROOT / "jobs" / "digits.yaml", settings), Log(folder / "steps")).fit()


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop: resume from the checkpoint, if there is one; say when each step was done."""
    torch.set_num_threads(1)
    table = pq.read_table(config["data"])
    features = torch.tensor(table["pixels"].combine_chunks().flatten().to_numpy()).reshape(-1, 64)
    label = torch.tensor(table["label"].to_numpy())
    model = prepare_model(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    step, rank = 0, ray.train.get_context().get_world_rank()
    found = ray.train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    with open(config["log"], "a", buffering=1) as log:
        while step < FOR_EVER:
            rows = torch.randint(len(label), (32,))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(features[rows]), label[rows]).backward()
            optimizer.step()
            step += 1
            if rank == 0:
                log.write(json.dumps([time.time(), step]) + "\n")
            if step % config["checkpoint_steps"] == 0:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint = None
                    if rank == 0:
                        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                        torch.save(state, Path(folder, "state.pt"))
                        checkpoint = Checkpoint.from_directory(folder)
                    ray.train.report({"step": step}, checkpoint=checkpoint)


def ray_train(folder: Path, checkpoint_steps: int) -> None:
    """The same model and rows in Ray Train, with restarts."""
    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    data = str(ROOT / "jobs/data/digits/train")
    TorchTrainer(
        train_worker,
        train_loop_config={"data": data, "log": str(folder / "steps"), "checkpoint_steps": checkpoint_steps},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    ).fit()


def main() -> None:
    which, folder, num_nodes, checkpoint_steps, timeout_s = sys.argv[1:]
    if int(num_nodes) > 1:  # a head without room, and so many nodes with room for one worker
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(int(num_nodes)):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
    if which == "distrain":
        distrain(Path(folder), int(checkpoint_steps), float(timeout_s))
    else:
        ray_train(Path(folder), int(checkpoint_steps))


if __name__ == "__main__":
    main()
