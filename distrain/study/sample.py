"""A fixed sample of a data set's rows."""

from __future__ import annotations

import numpy as np
import torch

from distrain.data.dataset import Dataset
from distrain.data.ragged import Batch, cut


def sample_rows(dataset: Dataset, rows: int, batch_rows: int, seed: int) -> list[Batch]:
    """Up to `rows` rows, drawn without replacement, the same for the same data and seed, in batches of `batch_rows`.

    Row groups are streamed one after the other; only the sample stays in memory.
    """
    total = dataset.num_rows
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(rows, total), replace=False))
    batches: list[Batch] = []
    first = 0
    for number, count in enumerate(dataset.row_counts):
        here = torch.from_numpy(chosen[(chosen >= first) & (chosen < first + count)] - first)
        position = 0
        for batch in dataset.read(number, 0, count) if len(here) else ():
            size = len(next(iter(batch.values())))
            inside = here[(here >= position) & (here < position + size)] - position
            if len(inside):
                picked = {name: value.index_select(0, inside) for name, value in batch.items()}
                batches += cut(picked, batch_rows)
            position += size
        first += count
    return batches
