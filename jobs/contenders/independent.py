"""Processes that never exchange anything: the most that this machine can compute."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.multiprocessing as mp

from jobs.contenders.process import prepare_process
from jobs.contenders.spec import Spec
from jobs.contenders.streaming import batches


def work(rank: int, spec: Spec, folder: str, together: Barrier) -> None:
    """One process, which writes its own rate to `folder`/RANK. They only start measuring at the same time."""
    prepare_process(spec.keeps_memory)
    model = spec.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    steps, start = 0, 0.0
    for step, (features, label) in enumerate(batches(spec, rank)):
        if step == spec.warmup_steps:
            together.wait()
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        spec.loss_of(model(features), label).backward()
        optimizer.step()
        if step >= spec.warmup_steps:
            steps += 1
            if time.perf_counter() - start >= spec.seconds:
                break
    Path(folder, str(rank)).write_text(str(steps * spec.batch_size / (time.perf_counter() - start)))
    os._exit(0)  # a thread still reads ahead, under which the interpreter's end aborts now and then


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    together = mp.get_context("spawn").Barrier(spec.num_workers)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(spec, folder, together), nprocs=spec.num_workers)  # raises what a process raised
        print(sum(float(Path(folder, str(rank)).read_text()) for rank in range(spec.num_workers)))


if __name__ == "__main__":
    main()
