"""From a configuration to what a run is made of: data sets, plans and the task. Reads Parquet footers only."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from distrain.config import TrainConfig
from distrain.data.dataset import open_dataset
from distrain.data.plan import Plan
from distrain.errors import ConfigError, DataError
from distrain.learning.fit import check_labels, check_task, num_outputs
from distrain.learning.metrics import Metrics
from distrain.learning.models import check_features
from distrain.learning.optimizers import refuse
from distrain.learning.schedules import check_optimization, what_comes_after
from distrain.learning.task import TaskSpec, build_task
from distrain.worker import Source


@dataclass(frozen=True)
class Preparation:
    """Data and task of a run, the same for driver, server and workers."""

    train: Source
    validation: Source | None
    task: TaskSpec
    updates_per_epoch: int  # with a quorum, the fewest
    total_steps: int  # after which the run ends, if nothing ends it before
    warnings: tuple[str, ...]  # of settings that count for nothing, a schedule that ends early, columns left out

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """What the data sets hold, to notice changed data when a run is resumed."""
        return {
            "train": self.train.dataset.fingerprint,
            "validation": self.validation.dataset.fingerprint if self.validation is not None else None,
        }


def prepare(config: TrainConfig) -> Preparation:
    """Open the data sets and plan the run.

    Raises DataError for data that cannot be used, ConfigError for an optimizer or a schedule that torch refuses, a loss
    that does not fit the label, or a model or `standardize` that does not fit the features.
    """
    _check_metrics(config)
    refuse(check_optimization(config.optimizer, config.schedule))
    shards = config.resolved_shards
    dataset = open_dataset(config.data.train, config.data, vocabulary=config.model.vocabulary)
    if dataset.is_constant and dataset.num_rows > 1:
        raise DataError(
            f"{dataset.source}: every feature is constant over all {dataset.num_rows:,} rows: there is nothing to learn"
        )
    check_features(config.model, dataset.columns.num_features, dataset.columns.image_shape)
    if config.data.standardize and dataset.columns.image_shape is not None:
        raise ConfigError("data.standardize: the pixels of encoded images are scaled to 0..1 already; leave it out")
    outputs = num_outputs(config.model, config.loss, dataset)
    rows = config.step_rows(sum(dataset.row_counts))
    plan = Plan(dataset.row_counts, rows, shards, config.data.shuffle_rows, config.seed, True, config.forward_rows)
    train = Source(dataset, plan)
    validation = None
    if config.data.validation is not None:
        held_out = open_dataset(config.data.validation, config.data, like=dataset)
        check_labels(config.model, config.loss, outputs, held_out)
        rows = config.validation.batch_size or config.step_rows(sum(held_out.row_counts))
        plan = Plan(held_out.row_counts, rows, shards, config.data.shuffle_rows, 0, False, config.forward_rows)
        validation = Source(held_out, plan)
    task = TaskSpec(
        model=config.model,
        loss=config.loss,
        num_features=dataset.columns.num_features,
        num_outputs=outputs,
        standardize=config.data.standardize,
        seed=config.seed,
        image_shape=dataset.columns.image_shape,
    )
    updates = train.plan.num_microbatches if config.server.mode == "async" else train.plan.steps_per_epoch
    total = min(config.epochs * updates, config.max_steps or sys.maxsize)
    beyond = what_comes_after(config.schedule, total)
    warnings = (*config.without_effect, *([beyond] if beyond else []), *dataset.left_out)
    return Preparation(train, validation, task, updates, total, warnings)


def check_own_code(preparation: Preparation) -> None:
    """Build a model or loss that is the user's own, and run two rows through it: what does not fit is said before Ray
    starts. Those by name are checked without being built, since a large model takes its time.

    Raises ConfigError, and what the user's code raises while it builds.
    """
    task, train = preparation.task, preparation.train
    if task.model.factory is not None or task.loss.factory is not None:
        check_task(build_task(task), train.dataset, train.plan.smallest_forward)


def _check_metrics(config: TrainConfig) -> None:
    has_one_label = isinstance(config.data.label, str) or len(config.data.label) == 1
    names = ("loss", *(name for name in Metrics(config.loss).names if has_one_label or name != "r2"))
    for key, rule in (("early_stopping", config.early_stopping), ("target", config.target)):
        if rule is not None and rule.metric not in names:
            raise ConfigError(
                f"{key}.metric: {rule.metric!r} is not a metric of this loss; there are {', '.join(names)}"
            )
