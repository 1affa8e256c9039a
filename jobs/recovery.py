"""Seconds that a killed worker costs, in distrain and in Ray Train: `python jobs/recovery.py`, from this repository.

Both train the digits' MLP with two workers, from Parquet; Ray Train writes a checkpoint every 100 steps and restarts
from the last one, as its FailureConfig has it. A worker's process is killed ten seconds into the run. Measured from the
kill to the first step that is done after it, and to the first that had not been done before. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Trainer
from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Report

ROOT = Path(__file__).parent.parent
CHECKPOINT_STEPS = 100
CALM_S = 10.0  # before the kill
AFTER_S = 50.0  # for whoever has to start and to recover


def kill_after(actor: str, has_begun: Callable[[], bool], killed: list[float]) -> None:
    """Kill a worker's process some time after the first step; says when."""
    while not has_begun():
        time.sleep(0.1)
    time.sleep(CALM_S)
    for process in psutil.Process().children(recursive=True):
        try:
            if actor in " ".join(process.cmdline()):
                killed.append(time.time())
                os.kill(process.pid, signal.SIGKILL)
                return
        except psutil.Error:
            continue


def cost(steps: list[tuple[float, int]], at: float) -> tuple[float, float]:
    """Seconds from `at` to the first step done after it, and to the first that had not been done before it."""
    done = max(step for when, step in steps if when <= at)
    # A step that was being finished when the kill came is no sign of recovery: it comes before the longest pause.
    later = [(when, step) for when, step in steps if when > at]
    pauses = [(b[0] - a[0], b) for a, b in zip([(at, done), *later], later, strict=False)]
    _, first = max(pauses)
    new = next(when for when, step in later if when >= first[0] and step > done)
    return first[0] - at, new - at


class Steps(SilentProgress):
    """When which step was done."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def report(self, report: Report) -> None:
        self.steps += [(record.time_ms / 1000, record.step) for record in report.steps]


def distrain() -> tuple[float, float]:
    """The digits' job, until well after the kill."""
    watch, killed = Steps(), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["tracking.enabled=false", f"checkpoint.dir={folder}", "epochs=100000", "schedule=null"]
        trainer = Trainer(load_config(ROOT / "jobs" / "digits.yaml", settings), watch)
        threading.Thread(
            target=kill_after, args=("ray::WorkerActor", lambda: bool(watch.steps), killed), daemon=True
        ).start()
        threading.Timer(CALM_S + AFTER_S / 2, trainer.stop).start()
        trainer.fit()
    return cost(watch.steps, killed[0])


def train_worker(config: dict) -> None:
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
    end = config["end"]
    with open(config["log"], "a", buffering=1) as log:
        while time.time() < end:
            rows = torch.randint(len(label), (32,))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(features[rows]), label[rows]).backward()
            optimizer.step()
            step += 1
            if rank == 0:
                log.write(json.dumps([time.time(), step]) + "\n")
            if step % CHECKPOINT_STEPS == 0:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint = None
                    if rank == 0:
                        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                        torch.save(state, Path(folder, "state.pt"))
                        checkpoint = Checkpoint.from_directory(folder)
                    ray.train.report({"step": step}, checkpoint=checkpoint)


def ray_train() -> tuple[float, float]:
    """The same model and rows in Ray Train, with restarts."""
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        log = Path(folder, "steps")
        config = {
            "data": str(ROOT / "jobs/data/digits/train"),
            "log": str(log),
            "end": time.time() + CALM_S + AFTER_S,
        }
        threading.Thread(target=kill_after, args=("RayTrainWorker", log.exists, killed), daemon=True).start()
        TorchTrainer(
            train_worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=3)),
        ).fit()
        steps = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
        ray.shutdown()
    return cost(steps, killed[0])


@click.command()
def main() -> None:
    """Kill a worker of each, and say what it cost."""
    table = Table(title="A killed worker, two workers on one machine: seconds from the kill")
    for column in ("", "to the next step", "to a step not done before"):
        table.add_column(column, justify="left" if not column else "right")
    for name, run in (("distrain", distrain), ("Ray Train, restart from its checkpoint", ray_train)):
        first, new = run()
        table.add_row(name, f"{first:.2f}", f"{new:.2f}")
        click.echo(f"{name}: {first:.2f}, {new:.2f}", err=True)
    Console().print(table)


if __name__ == "__main__":
    main()
