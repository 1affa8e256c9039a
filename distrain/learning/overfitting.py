"""Whether validation has turned while training goes on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_LOOKS = 3  # validations after the best one, before anything is said
_WORSE = 1.02  # the last validation loss over the best


class Look(NamedTuple):
    """A validation, and the mean training loss over the steps since the one before."""

    step: int
    training: float
    validation: float


def overfitting(looks: Sequence[Look]) -> str | None:
    """Say where validation was best, when since then it got worse while the training loss went on falling."""
    if len(looks) <= _LOOKS:
        return None
    best = min(range(len(looks)), key=lambda i: looks[i].validation)
    last = looks[-1]
    if len(looks) - 1 - best < _LOOKS or best == 0:
        return None
    if last.validation < _WORSE * looks[best].validation or last.training >= looks[best].training:
        return None
    return (
        f"overfitting since step {looks[best].step:,}: validation loss rose from {looks[best].validation:.4g} to "
        f"{last.validation:.4g} while training loss fell from {looks[best].training:.4g} to {last.training:.4g}; "
        "early_stopping, model.dropout, optimizer.weight_decay, penalty or more data may help"
    )
