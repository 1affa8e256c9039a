"""Results of runs with plausible values, for tests of what is done with them."""

from __future__ import annotations

import math
from typing import Any

from distrain.trainer import Result


def result(**changes: Any) -> Result:
    """A finished run of 40 steps."""
    values: dict[str, Any] = {
        "run_id": "f" * 32, "run_name": "a-run", "status": "finished", "reason": "all epochs done", "epochs": 4,
        "steps": 40, "samples": 1200, "samples_per_second": 17312.4, "train_loss": 0.12345,
        "validation": {"loss": 0.1, "accuracy": 0.975}, "parameters_sha256": "e" * 64,
        "checkpoint": "checkpoints/a-run/step-00000040", "rows_per_epoch": 300, "worker_failures": 0,
        "skipped_microbatches": 0, "skipped_rows": 0, "overfitting": None, "warnings": (), "peak_worker_bytes": 0,
        "seconds": {"startup": 6.2, "training": 61.0, "total": 67.9},
    }  # fmt: skip
    return Result(**(values | changes))


def without_a_step(**changes: Any) -> Result:
    """A run that trained and did no step."""
    nothing = {"samples": 0, "samples_per_second": 0.0, "train_loss": math.nan, "validation": {"loss": math.nan}}
    return result(**(nothing | {"seconds": {"startup": math.nan, "training": 0.1, "total": 5.0}} | changes))
