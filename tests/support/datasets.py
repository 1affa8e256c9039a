"""Data sets without files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class ArrayDataset:
    """Arrays cut into row groups; read like a data set of Parquet files, in small batches."""

    def __init__(self, features: np.ndarray, label: np.ndarray, row_group_rows: int, batch_rows: int = 7) -> None:
        self.features, self.label = torch.from_numpy(features), torch.from_numpy(label)
        self.batch_rows = batch_rows
        self.starts = list(range(0, len(label), row_group_rows))
        self.row_counts = tuple(min(row_group_rows, len(label) - start) for start in self.starts)
        self.weight: Tensor | None = None
        self.opened: list[tuple[int, int, int]] = []

    def place(self, row_group: int) -> str:
        """Where a row group lies."""
        return f"rows: row group {row_group}"

    def read(self, row_group: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Rows [start, stop) of a row group."""
        self.opened.append((row_group, start, stop))
        first, last = self.starts[row_group] + start, self.starts[row_group] + stop
        for at in range(first, last, self.batch_rows):
            end = min(at + self.batch_rows, last)
            rows = {"features": self.features[at:end], "label": self.label[at:end]}
            yield rows if self.weight is None else {**rows, "weight": self.weight[at:end]}
