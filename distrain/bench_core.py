"""Trains with workers on threads of this process, from Parquet, over the links that workers of a cluster have, and
prints where the time goes. Without Ray and MLflow, for a machine that has neither.

    python -m distrain.bench_core [--device cuda] [--workers 1,2] [--precision fp32,bf16] [--model mlp784,wide,cnn]

Every row of the table with the same model and precision is the same run, of as many shards as there are workers at
most, and should end with the same weights; so the last column should be the same at each worker count.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distrain.config import TrainConfig
from distrain.data.synthetic import write_column_rows, write_list_rows
from distrain.devices import Arithmetic, Device, HostDevice, StreamedDevice
from distrain.devices.cuda import Cuda
from distrain.errors import DistrainError, LinkError, TrainingError
from distrain.exchange.link import Hub
from distrain.learning.task import build_task
from distrain.preparation import Preparation, prepare
from distrain.server.loop import Loop, LoopSettings
from distrain.server.loss_scale import LossScale, first_scale
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.step_sums import StepSums
from distrain.worker import Worker

_TOKEN = "in one process"
WARM_UP = 20  # steps that are not counted


def _mlp(hidden: list[int], outputs: int) -> dict[str, Any]:
    return {"hidden": hidden, "outputs": outputs}


@dataclass(frozen=True)
class Model:
    """What is trained: `rows` are those of a microbatch."""

    write: Callable[[Path, int], None]
    num_rows: int
    rows: int
    features: str
    label: str
    model: dict[str, Any]  # the configuration's section
    loss: str


_CNN = {"name": "cnn", "image_shape": [1, 28, 28], "channels": [64, 128, 256], "hidden": [128], "outputs": 10}
MODELS = {
    "mlp784": Model(write_list_rows, 20_000, 128, "pixels", "label", _mlp([512, 512], 10), "cross_entropy"),
    "mlp32": Model(write_column_rows, 400_000, 1024, "f*", "y", _mlp([256, 256], 1), "mse"),
    "wide": Model(write_list_rows, 20_000, 256, "pixels", "label", _mlp([2048, 2048], 10), "cross_entropy"),
    "cnn": Model(write_list_rows, 40_000, 1024, "pixels", "label", _CNN, "cross_entropy"),
}
DEVICES: dict[str, Callable[[], Device]] = {"cpu": HostDevice, "cuda": lambda: StreamedDevice(Cuda())}


@dataclass
class Crew:
    """Workers on threads."""

    devices: list[Device] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a step, after the warm-up, and what the run ended with. `loss` is the mean over the last epoch,
    as far as the run went into it."""

    samples_per_s: float
    step_ms: float
    data_ms: float
    compute_ms: float
    copy_ms: float
    exchange_ms: float
    update_ms: float
    loss: float
    overflowed: int
    parameters_sha256: str


def measure(
    preparation: Preparation, model: Model, num_workers: int, device: str, arithmetic: Arithmetic, num_steps: int
) -> Measured:
    """Train so many steps beyond the warm-up. Raises what went wrong in the server or in a worker."""
    built = build_task(preparation.task)
    scale = LossScale(first_scale(model.rows)) if arithmetic.precision == "fp16" else None
    config = TrainConfig(data={"train": "-", "label": model.label})
    server = ParameterServer(built.model, config.optimizer, loss_scale=scale)
    hub, reports = Hub(_TOKEN), Reports()
    settings = LoopSettings(epochs=1_000_000, max_steps=WARM_UP + num_steps, num_workers=num_workers)
    loop = Loop(server, hub, preparation.train.plan, settings, reports, built.metrics)
    crew = Crew()
    for rank in range(num_workers):
        work = (crew, loop, hub, preparation, rank, DEVICES[device], arithmetic)
        crew.threads.append(threading.Thread(target=_work, args=work, name=f"worker {rank}", daemon=True))
        crew.threads[-1].start()
    outcome = loop.run()
    for thread in crew.threads:
        thread.join(30)
    first, *others = reports.drain().steps[WARM_UP:]
    sums = StepSums.of(first)
    for record in others:
        sums.merge(StepSums.of(record))
    copy_ms = 1000 * sum(device.copy_s for device in crew.devices) / num_workers / (WARM_UP + num_steps)
    mean_ms = {name: 1000 * getattr(sums, f"{name}_s") / sums.num_steps for name in
               ("step", "data", "compute", "waiting", "exchange", "update")}  # fmt: skip
    return Measured(
        samples_per_s=sums.samples / sums.step_s,
        step_ms=mean_ms["step"],
        data_ms=mean_ms["data"],
        compute_ms=max(0.0, mean_ms["compute"] - copy_ms),
        copy_ms=copy_ms,
        exchange_ms=mean_ms["exchange"] + mean_ms["waiting"],
        update_ms=mean_ms["update"],
        loss=outcome.train_loss,
        overflowed=sums.num_overflowed,
        parameters_sha256=outcome.parameters_sha256,
    )


def _work(
    crew: Crew,
    loop: Loop,
    hub: Hub,
    preparation: Preparation,
    rank: int,
    make_device: Callable[[], Device],
    arithmetic: Arithmetic,
) -> None:
    """A worker's life."""
    torch.set_num_threads(1)
    try:
        task, device = build_task(preparation.task), make_device()
        crew.devices.append(device)
        worker = Worker(
            rank,
            task.model,
            task.loss,
            task.metrics,
            preparation.train,
            None,
            preparation.task.seed,
            device,
            arithmetic,
        )
        worker.join(hub.address, True, _TOKEN)
        worker.run()
    except LinkError:
        return  # the run is over, or the server knows from the link's end
    except DistrainError as error:
        loop.abort(error)
    except Exception as error:
        loop.abort(TrainingError(f"worker {rank}: {type(error).__name__}: {error}"))


def make_preparation(model: Model, folder: Path, num_shards: int) -> Preparation:
    """Open the data in a folder and plan a run of so many shards."""
    return prepare(
        TrainConfig(
            data={"train": str(folder), "features": model.features, "label": model.label},
            model=model.model,
            loss=model.loss,
            batch_size=model.rows * num_shards,
            shards=num_shards,
        )
    )


_COLUMNS = ("model", "device", "precision", "workers", "samples/s", "step ms", "data", "compute", "copy", "exchange",
            "update", "loss", "overflows", "weights")  # fmt: skip


def _cells(name: str, device: str, precision: str, num_workers: int, found: Measured) -> list[str]:
    parts = (found.step_ms, found.data_ms, found.compute_ms, found.copy_ms, found.exchange_ms, found.update_ms)
    return [name, device, precision, str(num_workers), f"{found.samples_per_s:,.0f}", *(f"{ms:.2f}" for ms in parts),
            f"{found.loss:.4f}", str(found.overflowed), found.parameters_sha256[:12]]  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, numbers to the right."""
    widths = [max(len(row[column]) for row in (_COLUMNS, *rows)) for column in range(len(_COLUMNS))]
    lines = []
    for row in (_COLUMNS, *rows):
        cells = [cell.ljust(width) if at < 3 else cell.rjust(width)
                 for at, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the arguments say, and print a table."""

    def some_of(names: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            for name in text.split(","):
                if name not in names:
                    raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(names)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(prog="python -m distrain.bench_core", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--workers", default="1,2", help="worker counts, with commas between them (default: 1,2)")
    parser.add_argument("--precision", type=some_of(("fp32", "bf16", "fp16")), default=["fp32"], help="likewise")
    parser.add_argument("--model", type=some_of(MODELS), default=["mlp784", "mlp32"], help=", ".join(MODELS))
    parser.add_argument("--steps", type=int, default=300, help="steps measured, after 20 (default: 300)")
    parser.add_argument("--rows", type=int, help="rows of the data made up (default: 20,000 or 400,000)")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic kernels")
    chosen = parser.parse_args(arguments)
    try:
        counts = [int(text) for text in chosen.workers.split(",")]
        if min(counts) < 1 or chosen.steps < 1:
            raise ValueError
    except ValueError:
        parser.error("--workers takes counts such as 1,2, and --steps a number of steps")
    rows = []
    try:
        for name in chosen.model:
            model = MODELS[name]
            with tempfile.TemporaryDirectory(prefix="distrain-bench-") as folder:
                model.write(Path(folder), chosen.rows or model.num_rows)
                preparation = make_preparation(model, Path(folder), max(counts))
                for precision in chosen.precision:
                    arithmetic = Arithmetic(precision, chosen.deterministic)
                    arithmetic.prepare_process()
                    for count in counts:
                        found = measure(preparation, model, count, chosen.device, arithmetic, chosen.steps)
                        rows.append(_cells(name, chosen.device, precision, count, found))
    except DistrainError as error:
        parser.exit(error.exit_code, f"{error.message}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
