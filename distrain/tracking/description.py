"""What tracking is told about a run, its data sets and its model: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Column = tuple[str, str]  # name, and Arrow type as text: ("x1", "double"), ("pixels", "list<item: float>")


@dataclass(frozen=True)
class DatasetDescription:
    """A data set as the run's page shows it. `digest` changes when the data does."""

    name: str
    source: str  # as configured: a path, a glob, a URI
    digest: str
    num_rows: int
    columns: tuple[Column, ...]  # those that are read
    context: str  # training or validation


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run before its first step. `resume_run_id` continues that MLflow run. `is_resumed`: it goes on
    from a checkpoint, whether or not MLflow has a run of it.

    `tags` gets distrain.version and distrain.config_sha256 by itself.
    """

    config_yaml: str  # resolved, without secrets
    config_sha256: str
    params: Mapping[str, object] = field(default_factory=dict)  # flat: dotted key -> value
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[DatasetDescription, ...] = ()
    run_name: str | None = None  # None: MLflow makes one up
    resume_run_id: str | None = None
    is_resumed: bool = False


@dataclass(frozen=True)
class ModelInput:
    """One input of the model, and the DataFrame columns it is made of.

    Several columns hold one number each; a single column may hold lists. `columns` empty: one column of the input's
    name, whose cells are (nested) lists. `example` is [rows, ...], one row or more.

    `form` says what the cells are: "dense", numbers or lists of one length; "ragged", lists of any length, padded to
    the longest; "mask", no column of its own but where the ragged input has values; "image", encoded images.
    """

    name: str  # "features" alone is passed by position, others by name
    example: Tensor
    columns: tuple[Column, ...] = ()
    form: Literal["dense", "ragged", "mask", "image"] = "dense"
