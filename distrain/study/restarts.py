"""Random restarts: the same configuration from several seeds, of which the run that validates best is kept.

They are a sweep over the seed: side by side where there is room, nested runs in MLflow, gone on with after a break.
"""

from __future__ import annotations

import time
from typing import Any

from distrain.config import TrainConfig
from distrain.errors import TrainingError
from distrain.progress import SweepProgress
from distrain.server.stopping import best_metric, better
from distrain.study.point import Point
from distrain.study.sweep import Sweep


def train_restarts(
    config: TrainConfig, progress: SweepProgress | None = None, num_parallel: int | None = None
) -> dict[str, Any]:
    """Train with `config.restarts` seeds, from `config.seed` on.

    Returns the best run's result as `--json` has it, with every seed's "restarts". Under a `tracking.run_name` that was
    used before, seeds that are finished are not trained again. Raises what `Sweep` raises, and TrainingError where no
    seed came to an end.
    """
    seeds = list(range(config.seed, config.seed + (config.restarts or 1)))
    name = config.tracking.run_name or f"restarts-{time.strftime('%Y%m%d-%H%M%S')}"
    overrides = ["restarts=null", f"sweep={{grid: {{seed: {seeds}}}}}"]
    study, _ = Sweep(config.changed(overrides), name, progress, num_parallel, resumes=True).run()
    metric = best_metric(config.early_stopping)
    points = sorted(study.points, key=lambda point: int(point.values["seed"]))
    best = best_point(points, metric)
    if best is None and any(point.is_finished for point in points):
        raise TrainingError(f"no validation {metric} of the {len(points)} restarts is a number")
    if best is None:
        reasons = "\n".join(f"  {point.name}: {point.reason}" for point in points)
        raise TrainingError(f"none of the {len(points)} restarts came to an end:\n{reasons}")
    told = [
        {"seed": p.values["seed"], "status": p.status, "run_id": p.run_id, "validation": p.validation} for p in points
    ]
    return {**best.result, "seed": best.values["seed"], "restarts": told}


def best_point(points: list[Point], metric: str) -> Point | None:
    """The finished point that validates best; of equals the first."""
    best: Point | None = None
    for point in points:
        value = point.validation.get(metric)
        than = best.validation[metric] if best is not None else None
        if point.is_finished and value is not None and better(metric, value, than):
            best = point
    return best
