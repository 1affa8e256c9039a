"""Which rows of a microbatch have a loss or a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distrain.learning.losses import Loss

Batch = dict[str, Tensor]
Outputs = Callable[[Batch], Tensor]
_MOST_ROWS = 8  # looked for one by one


def bad_rows(is_bad: Callable[[int, int], bool], num_rows: int, most: int = _MOST_ROWS) -> list[int]:
    """The first rows (at most so many) that are bad on their own, found by halving: `is_bad(start, stop)` says whether
    rows [start, stop) are bad taken together."""
    found: list[int] = []

    def look(start: int, stop: int) -> None:
        if len(found) >= most or not is_bad(start, stop):
            return
        if stop - start == 1:
            found.append(start)
            return
        middle = (start + stop) // 2
        look(start, middle)
        look(middle, stop)

    if num_rows:
        look(0, num_rows)
    return found


def rows_without_finite_loss(model: nn.Module, outputs: Outputs, loss: Loss, batch: Batch) -> list[int]:
    """All rows whose loss is not finite. `outputs` runs the model."""
    with torch.no_grad():
        values = loss.per_sample(outputs(batch), batch["label"])
        weights = loss.weights(batch)
    values = values if weights is None else values * weights
    return [int(row) for row in (~values.isfinite()).nonzero().flatten()]


def rows_without_finite_gradient(model: nn.Module, outputs: Outputs, loss: Loss, batch: Batch) -> list[int]:
    """The first rows whose gradient is not finite on their own. In evaluation mode, in which rows do not depend on each
    other: without dropout, and with the running statistics of batch normalization."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def is_bad(start: int, stop: int) -> bool:
        rows = {name: tensor[start:stop] for name, tensor in batch.items()}
        total, _ = loss.total(outputs(rows), rows)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return any(not bool(gradient.to_dense().isfinite().all()) for gradient in gradients if gradient is not None)

    training = model.training
    model.eval()
    try:
        return bad_rows(is_bad, len(batch["label"]))
    finally:
        model.train(training)
