"""Ray Train with Ray Data, as their documentation shows it, with what made it faster here.

Features are put together on Arrow's memory, a block at a time, while reading; stacking NumPy rows was slower. Workers
take half a CPU each, so that on two cores Ray Data has one to read with. The shuffle buffer is as large as the others'.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from jobs.contenders.process import prepare_process
from jobs.contenders.spec import Spec

_BLOCK_ROWS = 2048  # columns are put side by side so many rows at a time: what fits the cache


def train_worker(config: dict) -> None:
    """A worker's loop; the first writes the rate of all to `config["result"]`."""
    spec = Spec.from_json(config["spec"])
    prepare_process(spec.keeps_memory)
    model = prepare_model(spec.model(), parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    shard = ray.train.get_dataset_shard("train")
    steps, start = -spec.warmup_steps, 0.0
    stop = torch.zeros(1)
    while not stop.item():
        stream = shard.iter_torch_batches(
            batch_size=spec.batch_size,
            local_shuffle_buffer_size=spec.shuffle_rows,
            prefetch_batches=4,
            drop_last=True,
        )
        for batch in stream:
            if steps == 0:
                torch.distributed.barrier()
                start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            spec.loss_of(model(batch["features"]), batch[spec.label]).backward()
            optimizer.step()
            steps += 1
            if steps > 0 and steps % 20 == 0:  # rank 0 decides for all, or the others would wait for ever
                stop.fill_(float(time.perf_counter() - start >= spec.seconds))
                torch.distributed.broadcast(stop, 0)
                if stop.item():
                    break
    rate = steps * spec.batch_size * spec.num_workers / (time.perf_counter() - start)
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps(rate))


def tensors(table: pa.Table, spec: Spec) -> dict[str, np.ndarray]:
    """One tensor column `features`, float32 [rows, num_features], and the label [rows]."""
    label = table.column(spec.label).to_numpy()
    if spec.features == "list":
        values = table.column("pixels").combine_chunks().flatten().to_numpy()
        return {"features": values.reshape(-1, spec.num_features), spec.label: label}
    columns = [table.column(f"f{i}").to_numpy() for i in range(spec.num_features)]
    features = np.empty((table.num_rows, spec.num_features), np.float32)
    for start in range(0, table.num_rows, _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        np.stack([column[start:stop] for column in columns], axis=1, out=features[start:stop])
    return {"features": features, spec.label: label}


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    dataset = ray.data.read_parquet(spec.folder).map_batches(
        tensors, fn_kwargs={"spec": spec}, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rate.json")
        TorchTrainer(
            train_worker,
            train_loop_config={"spec": spec.to_json(), "result": str(result)},
            scaling_config=ScalingConfig(num_workers=spec.num_workers, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(storage_path=folder),
            datasets={"train": dataset},
        ).fit()
        print(json.loads(result.read_text()))
    ray.shutdown()


if __name__ == "__main__":
    main()
