"""What training needs to know of all rows beforehand, in one streaming pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.data.dataset import Dataset
from distrain.data.ragged import pad
from distrain.errors import DataError


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation (of the population) of each feature, float32 [num_features], where they were asked
    for; and the rows of each class, int64 [classes], likewise. A constant feature has deviation 1."""

    mean: Tensor | None = None
    deviation: Tensor | None = None
    class_rows: Tensor | None = None

    @property
    def balanced_weights(self) -> Tensor:
        """rows / (classes x rows of the class), float32 [classes], as scikit-learn's class_weight="balanced"; 1 for a
        class without rows."""
        assert self.class_rows is not None
        rows = self.class_rows.to(torch.float64)
        weights = torch.where(rows > 0, rows.sum() / (len(rows) * rows), torch.ones((), dtype=torch.float64))
        return weights.to(torch.float32)


def measure(dataset: Dataset, features: bool, num_classes: int | None = None) -> Statistics:
    """Read every row once and measure its features, and count the rows of `num_classes` classes where that is given.

    Means and deviations of batches are merged in file order in float64 (Chan, Golub, LeVeque 1979, "Updating formulae
    and a pairwise algorithm for computing sample variances"). Raises DataError as reading does, and where every feature
    is constant; labels out of range are
    not counted, since training names them with their place.
    """
    count = 0
    mean = squares = torch.zeros(())
    class_rows = torch.zeros(num_classes or 0, dtype=torch.int64)
    for number, row_group in enumerate(dataset.row_groups):
        for batch in map(pad, dataset.read(number, 0, row_group.num_rows)):
            if num_classes is not None:
                label = batch["label"].to(torch.int64)
                known = label[(label >= 0) & (label < num_classes)]
                class_rows += torch.bincount(known, minlength=num_classes)
            if not features:
                continue
            values = batch["features"].to(torch.float64)
            rows = len(values)
            batch_mean = values.mean(0)
            batch_squares = (values - batch_mean).square().sum(0)
            if count == 0:
                count, mean, squares = rows, batch_mean, batch_squares
                continue
            delta = batch_mean - mean
            total = count + rows
            mean = mean + delta * (rows / total)
            squares = squares + batch_squares + delta.square() * (count * rows / total)
            count = total
    counted = class_rows if num_classes is not None else None
    if not features:
        return Statistics(class_rows=counted)
    deviation = (squares / count).sqrt().to(torch.float32)
    if count > 1 and not deviation.any():
        raise DataError(
            f"{dataset.source}: every feature is constant over all {count:,} rows: there is nothing to learn"
        )
    return Statistics(mean.to(torch.float32), torch.where(deviation > 0, deviation, torch.ones(())), class_rows=counted)
