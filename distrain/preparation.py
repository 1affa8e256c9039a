"""From a configuration to what a run is made of: data sets, plans and the task. Reads Parquet footers only."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config import TrainConfig
from distrain.data.dataset import open_dataset
from distrain.data.plan import Plan
from distrain.errors import ConfigError
from distrain.learning.fit import num_outputs
from distrain.learning.metrics import Metrics
from distrain.learning.task import TaskSpec
from distrain.worker import Source


@dataclass(frozen=True)
class Preparation:
    """Data and task of a run, the same for driver, server and workers."""

    train: Source
    validation: Source | None
    task: TaskSpec
    updates_per_epoch: int  # with a quorum, the fewest

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """What the data sets hold, to notice changed data when a run is resumed."""
        return {
            "train": self.train.dataset.fingerprint,
            "validation": self.validation.dataset.fingerprint if self.validation is not None else None,
        }


def prepare(config: TrainConfig) -> Preparation:
    """Open the data sets and plan the run.

    Raises DataError for data that cannot be used, ConfigError for a loss that does not fit the label.
    """
    _check_metrics(config)
    shards = config.resolved_shards
    dataset = open_dataset(config.data.train, config.data)
    train = Source(dataset, Plan(dataset.row_counts, config.batch_size, shards, config.data.shuffle_rows, config.seed))
    validation = None
    if config.data.validation is not None:
        held_out = open_dataset(config.data.validation, config.data, like=dataset)
        batch_size = config.validation.batch_size or config.batch_size
        plan = Plan(held_out.row_counts, batch_size, shards, config.data.shuffle_rows, shuffle=False)
        validation = Source(held_out, plan)
    task = TaskSpec(
        model=config.model,
        loss=config.loss,
        num_features=dataset.columns.num_features,
        num_outputs=num_outputs(config.model, config.loss, dataset),
        standardize=config.data.standardize,
        seed=config.seed,
    )
    updates = train.plan.num_microbatches if config.server.mode == "async" else train.plan.steps_per_epoch
    return Preparation(train, validation, task, updates)


def _check_metrics(config: TrainConfig) -> None:
    names = ("loss", *Metrics(config.loss).names)
    for key, rule in (("early_stopping", config.early_stopping), ("target", config.target)):
        if rule is not None and rule.metric not in names:
            raise ConfigError(
                f"{key}.metric: {rule.metric!r} is not a metric of this loss; there are {', '.join(names)}"
            )
