"""Ray Train with Ray Data, as their documentation shows it."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from jobs.contenders.spec import Spec


def train_worker(config: dict) -> None:
    spec = Spec.from_json(config["spec"])
    torch.set_num_threads(1)
    model = prepare_model(spec.model())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    shard = ray.train.get_dataset_shard("train")
    steps, start = -spec.warmup_steps, 0.0
    stop = torch.zeros(1)
    while not stop.item():
        stream = shard.iter_torch_batches(
            batch_size=spec.batch_size,
            local_shuffle_buffer_size=min(spec.shuffle_rows, 16 * spec.batch_size),
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
            if steps > 0 and steps % 20 == 0:
                stop.fill_(float(time.perf_counter() - start >= spec.seconds))
                torch.distributed.broadcast(stop, 0)
                if stop.item():
                    break
    rate = steps * spec.batch_size * spec.num_workers / (time.perf_counter() - start)
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps(rate))


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    names = [f"f{i}" for i in range(spec.num_features)]

    def to_features(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One tensor column of all features, so that a batch need not be put together in training."""
        features = np.stack(batch["pixels"]) if spec.features == "list" else np.stack([batch[n] for n in names], axis=1)
        return {"features": features, spec.label: batch[spec.label]}

    dataset = ray.data.read_parquet(spec.folder).map_batches(to_features, batch_size=4096)
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
