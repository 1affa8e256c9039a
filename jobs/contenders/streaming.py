"""Hand-written streaming of Parquet: a shuffled window at a time, the next one read by a thread meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.contenders.spec import Spec


def batches(spec: Spec, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled minibatches of this worker's share of the row groups: features float32 [rows, n] and label."""
    windows: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue(maxsize=1)
    threading.Thread(target=_read, args=(spec, rank, windows), daemon=True).start()
    generator = torch.Generator().manual_seed(rank)
    while True:
        features, label = windows.get()
        order = torch.randperm(len(label), generator=generator)
        for start in range(0, len(label) - spec.batch_size + 1, spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            yield features.index_select(0, chosen), label.index_select(0, chosen)


def _read(spec: Spec, rank: int, windows: queue.Queue[tuple[Tensor, Tensor]]) -> None:
    files = sorted(Path(spec.folder).glob("*.parquet"))
    places = [(file, group) for file in files for group in range(pq.read_metadata(file).num_row_groups)]
    mine = places[rank :: spec.num_workers]
    names = ["pixels"] if spec.features == "list" else [f"f{i}" for i in range(spec.num_features)]
    generator = np.random.default_rng(rank)
    while True:
        held: list[tuple[np.ndarray, np.ndarray]] = []
        for index in generator.permutation(len(mine)):
            file, group = mine[index]
            with pq.ParquetFile(file) as parquet:
                table = parquet.read_row_group(group, columns=[*names, spec.label], use_threads=False)
            if spec.features == "list":
                values = table.column("pixels").combine_chunks().flatten().to_numpy()
                features = values.reshape(-1, spec.num_features)
            else:
                features = np.stack([table.column(name).to_numpy() for name in names], axis=1)
            held.append((features, table.column(spec.label).to_numpy()))
            if sum(len(label) for _, label in held) >= spec.shuffle_rows:
                windows.put(_joined(held))
                held = []
        if held:
            windows.put(_joined(held))


def _joined(held: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    features = np.concatenate([features for features, _ in held])
    return torch.from_numpy(features), torch.from_numpy(np.concatenate([label for _, label in held]))
