"""Mean and deviation of the features, in one streaming pass."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.data.dataset import Dataset


def feature_statistics(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the population) of each feature: float32 [num_features] each.

    Batches are merged in file order in float64 (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm
    for computing sample variances"). A constant feature gets deviation 1. Raises DataError as reading does.
    """
    count = 0
    mean = squares = torch.zeros(())
    for number, row_group in enumerate(dataset.row_groups):
        for batch in dataset.read(number, 0, row_group.num_rows):
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
    deviation = (squares / count).sqrt().to(torch.float32)
    return mean.to(torch.float32), torch.where(deviation > 0, deviation, torch.ones(()))
