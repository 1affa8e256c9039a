"""Processes that never exchange anything: the most that this machine can compute."""

from __future__ import annotations

import sys
import time

import torch
import torch.multiprocessing as mp

from jobs.contenders.spec import Spec
from jobs.contenders.streaming import batches


def work(rank: int, spec: Spec, barrier: object, rates: object) -> None:
    torch.set_num_threads(1)
    model = spec.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    steps, start = 0, 0.0
    for step, (features, label) in enumerate(batches(spec, rank)):
        if step == spec.warmup_steps:
            barrier.wait()  # type: ignore[attr-defined]
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        spec.loss_of(model(features), label).backward()
        optimizer.step()
        if step >= spec.warmup_steps:
            steps += 1
            if time.perf_counter() - start >= spec.seconds:
                break
    rates.put(steps * spec.batch_size / (time.perf_counter() - start))  # type: ignore[attr-defined]


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    context = mp.get_context("spawn")
    rates, barrier = context.Queue(), context.Barrier(spec.num_workers)
    workers = [context.Process(target=work, args=(r, spec, barrier, rates)) for r in range(spec.num_workers)]
    for worker in workers:
        worker.start()
    print(sum(rates.get() for _ in workers))
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
