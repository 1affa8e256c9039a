"""Points of a sweep as values: what a model of step times would have measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrain.study.point import Moment, Point, Target


def point(batch_size: int = 64, workers: int = 1, **changes: Any) -> Point:
    """A finished point; its step takes 10 ms for each worker's share of 64 rows, and 1 ms beside."""
    work, rng = 0.01 * batch_size / workers / 64, np.random.default_rng(batch_size + workers)
    blocks = [(0.1 * work * n, 0.9 * work * n, 0.0, 0.0008, 0.0002) for n in 1 + 0.02 * rng.normal(size=10)]
    step_s = work + 0.001
    steps = round(100 + 6400 / batch_size)
    seconds = steps * step_s
    fifths = [(steps * k // 5, steps * k // 5 * batch_size, seconds * k / 5, 1 / k) for k in range(1, 6)]
    values = {
        "name": f"batch_size={batch_size} workers.count={workers}",
        "values": {"batch_size": batch_size, "workers.count": workers},
        "status": "finished",
        "reason": "all epochs done",
        "batch_size": batch_size,
        "workers": workers,
        "shards": workers,
        "num_bytes": 4000,
        "steps": steps,
        "samples": steps * batch_size,
        "samples_per_second": batch_size / step_s,
        "train_loss": 0.1,
        "validation": {"loss": 0.2, "accuracy": 0.97},
        "seconds": seconds,
        "peak_worker_bytes": 400 << 20,
        "target": Target(steps, steps * batch_size, seconds, 0.9 * seconds),
        "moments": [Moment(*where, {"loss": loss, "accuracy": 1 - loss / 2}) for *where, loss in fifths],
        "losses": fifths,
        "blocks": blocks,
    }
    return Point(**{**values, **changes})
