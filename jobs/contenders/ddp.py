"""DistributedDataParallel over gloo, fed by the same hand-written streaming."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from jobs.contenders.process import prepare_process
from jobs.contenders.spec import Spec
from jobs.contenders.streaming import batches


def work(rank: int, spec: Spec, folder: str) -> None:
    """One process; the first writes the rate of all to `folder`/rate."""
    prepare_process(spec.keeps_memory)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=spec.num_workers)
    model = DistributedDataParallel(spec.model(), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    stop, steps, start = torch.zeros(1), 0, 0.0
    for step, (features, label) in enumerate(batches(spec, rank)):
        if step == spec.warmup_steps:
            dist.barrier()
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        spec.loss_of(model(features), label).backward()
        optimizer.step()
        if step >= spec.warmup_steps:
            steps += 1
            if steps % 50 == 0:  # rank 0 decides for all, or the others would wait for ever
                stop.fill_(float(time.perf_counter() - start >= spec.seconds))
                dist.broadcast(stop, 0)
                if stop.item():
                    break
    if rank == 0:
        rate = steps * spec.batch_size * spec.num_workers / (time.perf_counter() - start)
        Path(folder, "rate").write_text(str(rate))
    dist.destroy_process_group()
    os._exit(0)  # a thread still reads ahead, under which the interpreter's end aborts now and then


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(spec, folder), nprocs=spec.num_workers)  # raises what a process raised
        print(Path(folder, "rate").read_text())


if __name__ == "__main__":
    main()
