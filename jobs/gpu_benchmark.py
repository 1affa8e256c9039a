"""distrain on one GPU beside a loop for torch alone: what the way over the server costs where one GPU would do.

    python jobs/gpu_benchmark.py [--device cuda] [--model mlp784,wide] [--precision fp32,bf16] [--steps 300]

The loop reads the same microbatches through distrain's own reader, its parameters never leave the GPU, and its
optimizer is torch's fused one there; nothing in it waits for the GPU. distrain's workers are threads of one process,
each with a microbatch a step of its own, as in `python -m distrain.bench_core`: two of them wait for Python's lock,
which processes would not. Needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from distrain.bench_core import DEVICES, MODELS, WARM_UP, make_preparation, measure
from distrain.config import OptimizerConfig
from distrain.devices import Arithmetic
from distrain.learning.task import build_task
from distrain.preparation import Preparation
from distrain.worker import Readers

_COUNTS = (1, 2)


def plain(preparation: Preparation, device: str, arithmetic: Arithmetic, num_steps: int) -> float:
    """Samples a second of the loop for torch alone, over so many steps after the warm-up."""
    task, options = build_task(preparation.task), OptimizerConfig()
    model = task.model.to(device).train()
    task.loss.to(device)
    optimizer = getattr(torch.optim, options.name)(model.parameters(), lr=options.lr, fused=True)
    readers, samples = Readers(preparation.train), 0
    for step in range(1, WARM_UP + num_steps + 1):
        batch = readers.microbatch(step, 0)
        if device == "cuda":
            batch = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
        optimizer.zero_grad()
        total, weight = task.loss.total(arithmetic.outputs(model, batch, device), batch)
        (total / weight).backward()
        optimizer.step()
        samples += len(batch["label"])
        if step == WARM_UP:
            _wait(device)
            start, samples = time.perf_counter(), 0
    _wait(device)
    readers.close()
    return samples / (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, and print a line for each model and precision as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cuda")
    parser.add_argument("--model", default="mlp784,wide", help=f"of {', '.join(MODELS)}, with commas")
    parser.add_argument("--precision", default="fp32,bf16", help="of fp32, bf16, with commas")
    parser.add_argument("--steps", type=int, default=300, help="steps measured (default: 300)")
    chosen = parser.parse_args()
    print("samples/s (and of the plain loop's); ms of a step with one worker: all = compute + copy + exchange + update")
    for name in chosen.model.split(","):
        model = MODELS[name]
        with tempfile.TemporaryDirectory(prefix="distrain-gpu-") as folder:
            model.write(Path(folder), model.num_rows)
            for precision in chosen.precision.split(","):
                arithmetic = Arithmetic(precision)
                alone = plain(make_preparation(model, Path(folder), 1), chosen.device, arithmetic, chosen.steps)
                found = [
                    measure(make_preparation(model, Path(folder), n), model, n, chosen.device, arithmetic, chosen.steps)
                    for n in _COUNTS
                ]
                shares = "  ".join(
                    f"{n} workers {f.samples_per_s:,.0f} ({f.samples_per_s / alone:.2f})"
                    for n, f in zip(_COUNTS, found, strict=True)
                )
                one = found[0]
                parts = f"{one.step_ms:.2f} = {one.data_ms:.2f} data + {one.compute_ms:.2f} + {one.copy_ms:.2f} + "
                parts += f"{one.exchange_ms:.2f} + {one.update_ms:.2f}"
                print(f"{name} {precision}: plain {alone:,.0f}  {shares}  ms {parts}", flush=True)


if __name__ == "__main__":
    main()
