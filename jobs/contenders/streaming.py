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

Window = tuple[Tensor, Tensor]  # features float32 [rows, n] and label [rows]
Place = tuple[Path, int, int]  # file, row group, its rows
_BLOCK_ROWS = 2048  # columns are put side by side so many rows at a time: what fits the cache


def batches(spec: Spec, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled minibatches of this worker's share of the row groups: features float32 [rows, n] and label."""
    windows: queue.Queue[Window | Exception] = queue.Queue(maxsize=1)
    threading.Thread(target=_run, args=(spec, rank, windows), daemon=True).start()
    generator = torch.Generator().manual_seed(rank)
    while True:
        window = windows.get()
        if isinstance(window, Exception):
            raise window
        features, label = window
        order = torch.randperm(len(label), generator=generator)
        for start in range(0, len(label) - spec.batch_size + 1, spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            yield features.index_select(0, chosen), label.index_select(0, chosen)


def _run(spec: Spec, rank: int, windows: queue.Queue[Window | Exception]) -> None:
    try:
        for window in _windows(spec, rank):
            windows.put(window)
    except Exception as error:
        windows.put(error)


def _windows(spec: Spec, rank: int) -> Iterator[Window]:
    """Endless windows of at least `shuffle_rows` rows: whole row groups, drawn in a new order each epoch."""
    places: list[Place] = []
    for file in sorted(Path(spec.folder).glob("*.parquet")):
        footer = pq.read_metadata(file)
        places += [(file, group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
    mine = places[rank :: spec.num_workers]
    if not mine:
        raise ValueError(f"{spec.folder}: fewer row groups than workers")
    generator = np.random.default_rng(rank)
    while True:
        chosen: list[Place] = []
        for index in generator.permutation(len(mine)):
            chosen.append(mine[index])
            if sum(rows for _, _, rows in chosen) >= spec.shuffle_rows:
                yield _load(spec, chosen)
                chosen = []
        if chosen:
            yield _load(spec, chosen)


def _load(spec: Spec, places: list[Place]) -> Window:
    """Read row groups straight into the window's memory."""
    total = sum(rows for _, _, rows in places)
    names = ["pixels"] if spec.features == "list" else [f"f{i}" for i in range(spec.num_features)]
    features = np.empty((total, spec.num_features), np.float32)
    label = np.empty(total, np.int64 if spec.loss == "cross_entropy" else np.float32)
    first = 0
    for file, group, rows in places:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read_row_group(group, columns=[*names, spec.label], use_threads=False)
        part = features[first : first + rows]
        if spec.features == "list":
            part[:] = table.column("pixels").combine_chunks().flatten().to_numpy().reshape(part.shape)
        else:
            columns = [table.column(name).to_numpy() for name in names]
            for start in range(0, rows, _BLOCK_ROWS):
                stop = start + _BLOCK_ROWS
                np.stack([column[start:stop] for column in columns], axis=1, out=part[start:stop])
        label[first : first + rows] = table.column(spec.label).to_numpy()
        first += rows
    return torch.from_numpy(features), torch.from_numpy(label)
