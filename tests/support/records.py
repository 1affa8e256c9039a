"""Step and validation records with plausible values, for tests of what is done with them."""

from __future__ import annotations

from typing import Any

from distrain.records import StepRecord, ValidationRecord

START_MS = 1_700_000_000_000


def step(number: int, **changes: Any) -> StepRecord:
    """Step `number`: 10 ms after the one before it, 64 samples, loss 1 / number."""
    values: dict[str, Any] = {
        "step": number, "epoch": (number - 1) // 100, "time_ms": START_MS + 10 * number, "loss": 1 / number,
        "grad_norm": 2.0, "lr": 0.01, "clipped": False, "samples": 64, "weight": float(changes.get("samples", 64)),
        "num_bytes": 640, "data_s": 0.001,
        "compute_s": 0.006, "exchange_s": 0.002, "update_s": 0.001, "step_s": 0.01, "workers": 2,
    }  # fmt: skip
    return StepRecord(**(values | changes))


def validation(number: int, **metrics: float) -> ValidationRecord:
    """A validation after step `number`."""
    return ValidationRecord(number, (number - 1) // 100, START_MS + 10 * number, metrics or {"loss": 0.5}, 360, 0.1)
