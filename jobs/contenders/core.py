"""distrain's server, relays and workers as plain processes of the hosts that they are started on, without Ray."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrain.config import OptimizerConfig, TrainConfig
from distrain.errors import LinkError
from distrain.exchange.layout import Layout
from distrain.exchange.link import Address, Hub
from distrain.exchange.slices import cut
from distrain.exchange.wire import WIRES, WireDtype
from distrain.learning.task import build_task
from distrain.preparation import Preparation, prepare
from distrain.records import StepRecord
from distrain.relay import Relay
from distrain.server.loop import Loop, LoopSettings
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.worker import Worker, WorkerOptions
from jobs.contenders.process import prepare_process

_FORK = multiprocessing.get_context("fork")
_TOKEN = "a benchmark's token"
_JOIN_SECONDS = 120.0


@dataclass(frozen=True)
class Model:
    """`floats` parameters in so many equal tensors; a forward pass takes `seconds` and a backward pass
    `backward_seconds`, asleep."""

    floats: int
    tensors: int = 24
    seconds: float = 0.0
    backward_seconds: float = 0.0

    def prepare(self, folder: str, num_workers: int) -> Preparation:
        """A run with a shard and a row a step for each worker."""
        rows = np.linspace(0.0, 1.0, 64 * num_workers, dtype=np.float32)
        pq.write_table(pa.table({"f0": rows, "y": rows}), Path(folder, "rows.parquet"))
        args = asdict(self)
        return prepare(
            TrainConfig.from_mapping(
                {
                    "data": {"train": folder, "label": "y"},
                    "model": {"factory": "jobs.contenders.preset:build", "args": args},
                    "loss": "mse",
                    "batch_size": num_workers,
                    "shards": num_workers,
                }
            )
        )


@dataclass(frozen=True)
class Exchange:
    """The keys of the configuration's `server` of the same names."""

    slices: int = 1
    wire_dtype: WireDtype = "fp32"
    staleness: int = 0


def serve(
    model: Model,
    num_workers: int,
    local: Sequence[int],
    steps: int,
    exchange: Exchange = Exchange(),
    ip: str | None = None,
    port: int = 0,
) -> list[StepRecord]:
    """The parameter server, and the workers of the ranks `local`, of a run of so many steps."""
    prepare_process(keeps_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        preparation = model.prepare(folder, num_workers)
        hub = Hub(_TOKEN, ip, port)
        task, server = _server(preparation, exchange.slices - 1, exchange)
        reports = Reports()
        settings = LoopSettings(
            epochs=10**6,
            max_steps=steps,
            num_workers=num_workers,
            min_workers=num_workers,
            grace_s=_JOIN_SECONDS,
            slices=exchange.slices,
            staleness=exchange.staleness,
        )
        with _workers(preparation, local, hub.address, exchange.wire_dtype):
            Loop(server, hub, preparation.train.plan, settings, reports, task.metrics).run()
        steps_done = reports.drain().steps
        if any(record.workers < num_workers for record in steps_done):
            raise RuntimeError(f"not all of the {num_workers} workers took part in every step: nothing was measured")
        return steps_done


def relay(
    model: Model,
    num_workers: int,
    local: Sequence[int],
    address: tuple[str, int],
    exchange: Exchange = Exchange(),
    slice_: int | None = None,
    ip: str | None = None,
) -> None:
    """A relay of the run whose server listens at `address`, and the workers of the ranks `local`."""
    prepare_process(keeps_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        preparation = model.prepare(folder, num_workers)
        layout = Layout.of(build_task(preparation.task).model)
        server = _server(preparation, slice_, exchange)[1] if slice_ is not None else None
        wire = WIRES[exchange.wire_dtype](layout)
        its_relay = Relay(layout, num_workers, _TOKEN, ip, slice_, exchange.slices, server, wire)
        with _workers(preparation, local, its_relay.address, exchange.wire_dtype):
            _join(its_relay, Address("", address))
            its_relay.run()


def _server(preparation: Preparation, slice_: int, exchange: Exchange):
    task = build_task(preparation.task)
    span = cut(Layout.of(task.model), exchange.slices)[slice_]
    server = ParameterServer(
        task.model, OptimizerConfig(), staleness=exchange.staleness, span=span, wire_dtype=exchange.wire_dtype
    )
    return task, server


def _join(its_relay: Relay, address: Address) -> None:
    """Join the server, which may be slower to start."""
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            return its_relay.join(address)
        except LinkError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def _workers(preparation: Preparation, ranks: Sequence[int], address: Address, wire_dtype: WireDtype) -> Iterator[None]:
    options = WorkerOptions(wire_dtype=wire_dtype)
    processes = [_FORK.Process(target=_work, args=(preparation, rank, address, options), daemon=True) for rank in ranks]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _work(preparation: Preparation, rank: int, address: Address, options: WorkerOptions) -> None:
    prepare_process(keeps_memory=True)
    task = build_task(preparation.task)
    worker = Worker(rank, task.model, task.loss, task.metrics, preparation.train, None, 0, options=options)
    worker.join(address, True, _TOKEN)
    worker.run()
