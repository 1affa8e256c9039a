"""Evaluate and predict from a checkpoint: Parquet in, metrics or Parquet out. Memory does not grow with the data."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from distrain.checkpoint import Checkpoint, find, load
from distrain.config import TrainConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.data.location import Location
from distrain.data.predictions import OutputColumns, PredictionFile, all_or_nothing, kept_fields, target_files
from distrain.data.ragged import Batch, cut, pad
from distrain.errors import ConfigError, DataError, DistrainError, TrainingError
from distrain.learning.fit import check_labels
from distrain.learning.model_state import restore_model
from distrain.learning.models import forward
from distrain.learning.task import Task, TaskSpec, build_task

Paths = str | list[str]


def evaluate(
    checkpoint: Checkpoint | str | Path,
    data: Paths | None = None,
    batch_size: int | None = None,
    root: str | Path = "checkpoints",
) -> dict[str, float]:
    """Return a checkpoint's loss and metrics over `data` (default: the run's validation data), and "samples".

    `checkpoint` is one in memory, or anything that `find` finds under `root`. `batch_size` rows at a time go through
    the model (default: as in training). Raises CheckpointError, DataError for data that does not fit, naming file, row
    group and column, and TrainingError when the user's code raises.
    """
    checkpoint = _loaded(checkpoint, root)
    config = TrainConfig.from_mapping(checkpoint.manifest["config"])
    rows = batch_rows(config, batch_size)
    dataset = open_data(checkpoint, config, _validation_data(config) if data is None else data, with_labels=True)
    check_labels(config.model, config.loss, checkpoint.manifest["num_outputs"], dataset)
    task = restored_task(checkpoint, config)
    loss = weight = 0.0
    sums = torch.zeros(task.metrics.num_sums, dtype=torch.float64)
    with torch.inference_mode():
        for number, group in enumerate(dataset.row_groups):
            for tensors in dataset.read(number, 0, group.num_rows):
                for batch in cut(tensors, rows):
                    with _blame(dataset.place(number), batch):
                        outputs = forward(task.model, batch)
                        total, count = task.loss.total(outputs, batch, torch.float64)
                        loss, weight = loss + float(total), weight + count
                        sums += torch.tensor(task.metrics.sums(outputs, batch["label"]), dtype=torch.float64)
    metrics = task.metrics.combine(sums.tolist())
    if not weight:
        raise DataError(f"{dataset.source}: the weights of all rows add up to 0")
    return {"loss": loss / weight, **metrics, "samples": dataset.num_rows}


def predict(
    checkpoint: Checkpoint | str | Path,
    data: Paths,
    output: str | Path,
    columns: Sequence[str] | None = None,
    probabilities: bool = False,
    batch_size: int | None = None,
    root: str | Path = "checkpoints",
) -> list[Path]:
    """Write a checkpoint's predictions for `data`, in the order of its rows. The label need not be in the data;
    a transform is given it where it is.

    `output` is a file (its name ends in .parquet), or a folder that gets a file for each input file, of the same name.
    `columns` are input columns to copy in front of the predictions; what those are says `OutputColumns`, which takes
    `probabilities`. Returns the files written.

    Takes and raises what `evaluate` does, and ConfigError for an output that cannot be. After an error nothing new is
    there.
    """
    checkpoint = _loaded(checkpoint, root)
    config = TrainConfig.from_mapping(checkpoint.manifest["config"])
    rows = batch_rows(config, batch_size)
    dataset = open_data(checkpoint, config, data, with_labels=False)
    targets = target_files(dataset, output)
    task = restored_task(checkpoint, config)
    with torch.inference_mode():
        width = _first_outputs(task, dataset, rows).flatten(1).shape[1]
        made = OutputColumns(config.loss.kind, tuple(checkpoint.manifest["labels"]), width, probabilities)
        kept = kept_fields(dataset, columns or (), [field.name for field in made.fields])
        schema = pa.schema([*kept, *made.fields])
        with all_or_nothing(list(targets)) as hidden:
            for path, files in zip(hidden, targets.values(), strict=True):
                with PredictionFile(path, schema) as file:
                    for number in _row_groups_of(dataset, files):
                        for batch in _predicted(task, dataset, number, rows, made, schema):
                            file.write(batch)
    return list(targets)


def _loaded(checkpoint: Checkpoint | str | Path, root: str | Path) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load(find(checkpoint, root).path)


def _predicted(
    task: Task, dataset: Dataset, row_group: int, rows: int, made: OutputColumns, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group as they are written."""
    kept = tuple(schema.names[: len(schema) - len(made.fields)])
    for beside, tensors in dataset.read_beside(row_group, 0, dataset.row_groups[row_group].num_rows, kept):
        outputs = torch.cat([_outputs(task, batch, dataset.place(row_group)) for batch in cut(tensors, rows)])
        yield pa.RecordBatch.from_arrays(
            [*(beside.column(name) for name in kept), *made.arrays(outputs)], schema=schema
        )


def _outputs(task: Task, batch: Batch, where: Location) -> Tensor:
    """The model's outputs for a batch, [rows, outputs], checked."""
    rows = len(next(iter(batch.values())))
    with _blame(where, batch):
        outputs = forward(task.model, batch)
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != rows:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TrainingError(f"{where}: the model gives {shape} for {rows} rows; one row of outputs for each is needed")
    return outputs.unsqueeze(1) if outputs.ndim == 1 else outputs


def _first_outputs(task: Task, dataset: Dataset, rows: int) -> Tensor:
    number = next(number for number, group in enumerate(dataset.row_groups) if group.num_rows)
    first = next(dataset.read(number, 0, min(rows, dataset.row_groups[number].num_rows)))
    return _outputs(task, pad(first), dataset.place(number))


def _row_groups_of(dataset: Dataset, files: Sequence[int]) -> list[int]:
    wanted = set(files)
    return [number for number, group in enumerate(dataset.row_groups) if group.file in wanted]


def open_data(checkpoint: Checkpoint, config: TrainConfig, paths: Paths, with_labels: bool) -> Dataset:
    """Open data with the columns that the model was trained on, whatever other columns there are."""
    features = list(checkpoint.manifest["features"])
    data = config.data.model_copy(update={"features": features})
    dataset = open_dataset(paths, data, with_labels=with_labels, vocabulary=config.model.vocabulary)
    expected, found = checkpoint.manifest["num_features"], dataset.columns.num_features
    if expected != found:
        raise DataError(f"{dataset.source}: {found} features a row, the model was trained on {expected}")
    if dataset.columns.image_shape != _image_shape(checkpoint):
        shapes = dataset.columns.image_shape, _image_shape(checkpoint)
        raise DataError(f"{dataset.source}: images of {shapes[0]}, the model was trained on {shapes[1]}")
    return dataset


def _validation_data(config: TrainConfig) -> Paths:
    if config.data.validation is None:
        raise ConfigError("the run had no validation data: name the data to evaluate on")
    if "data.validation" in config.without_credentials:
        raise ConfigError("the checkpoint does not hold the password of the run's validation data: name the data")
    return config.data.validation


def batch_rows(config: TrainConfig, batch_size: int | None) -> int:
    """How many rows go through the model at a time: as many as given, else as in the run's validation."""
    size = None if config.batch_size == "full" else config.batch_size
    rows = config.validation.batch_size or size or config.forward_rows if batch_size is None else batch_size
    assert rows is not None
    if rows < 1:
        raise ConfigError(f"batch_size is {rows}: at least 1 row is needed")
    return rows


def _image_shape(checkpoint: Checkpoint) -> tuple[int, int, int] | None:
    shape = checkpoint.manifest.get("image_shape")
    return tuple(shape) if shape is not None else None


def task_spec(checkpoint: Checkpoint, config: TrainConfig) -> TaskSpec:
    """What a checkpoint's run learned: enough to build its model as it began."""
    manifest, standardize = checkpoint.manifest, config.data.standardize
    return TaskSpec(
        config.model, config.loss, manifest["num_features"], manifest["num_outputs"], standardize, config.seed,
        _image_shape(checkpoint),
    )  # fmt: skip


def restored_task(checkpoint: Checkpoint, config: TrainConfig) -> Task:
    """Model, loss and metrics with the checkpoint's weights, ready to evaluate."""
    task = build_task(task_spec(checkpoint, config))
    restore_model(task.model, checkpoint.model, checkpoint.optimizer)
    task.model.eval()
    return task


@contextmanager
def _blame(where: Location, batch: Batch) -> Iterator[None]:
    """Say where in the data it was that a label was refused, or the user's model or loss raised."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error.message}") from error
    except DistrainError as error:
        raise type(error)(f"{where}: {error.message}") from error
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in batch.items())
        text = "".join(traceback.format_exception(error)).rstrip()
        raise TrainingError(
            f"{where}: the model or the loss raised {type(error).__name__}: {error} (batch: {shapes})\n{text}"
        ) from error
