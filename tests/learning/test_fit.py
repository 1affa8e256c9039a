"""What does not fit together is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrain.config import DataConfig, LossConfig, ModelConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.errors import ConfigError, DataError
from distrain.learning.fit import check_task, num_outputs
from distrain.learning.task import TaskSpec, build_task


def dataset(folder: Path, label: np.ndarray, **data) -> Dataset:
    columns = {"x": np.arange(len(label), dtype=np.float32), "w": np.linspace(0, 1, len(label)), "label": label}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return open_dataset(str(folder / "rows.parquet"), DataConfig(train="-", label="label", **data))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"name": "cross_entropy", "class_weights": [1.0, 2.0]}, "2 weights for 3 classes"),
        ({"name": "focal", "class_weights": [1.0] * 4}, "4 weights for 3 classes"),
    ],
)
def test_class_weights_of_another_length_are_refused(tmp_path: Path, loss: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        num_outputs(ModelConfig(), LossConfig(**loss), dataset(tmp_path, np.arange(9) % 3))


def test_a_label_out_of_range_names_the_loss_and_the_place(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"rows\.parquet: row group 0, column 'label': label -1 is out of range: focal over"
    ):
        num_outputs(ModelConfig(), LossConfig(name="focal"), dataset(tmp_path, np.array([0, 1, -1])))


def test_outputs_that_do_not_match_the_label_are_said_with_both_shapes(tmp_path: Path):
    rows = dataset(tmp_path, np.linspace(0, 1, 9))
    spec = TaskSpec(ModelConfig(name="linear"), LossConfig(name="huber"), 2, 3, False, 0)
    with pytest.raises(ConfigError, match=r"the model gives \(2, 3\) where the label is \(2,\)"):
        check_task(build_task(spec), rows, 1)
    check_task(build_task(TaskSpec(ModelConfig(name="linear"), LossConfig(name="huber"), 2, 1, False, 0)), rows, 1)


def test_a_weight_column_is_no_feature_and_is_checked(tmp_path: Path):
    rows = dataset(tmp_path, np.arange(4) % 2, weight="w")
    assert rows.columns.features == ("x",) and rows.columns.num_features == 1
    batch = next(rows.read(0, 0, 4))
    assert batch["weight"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    with pytest.raises(DataError, match="both the label and the weight"):
        dataset(tmp_path, np.arange(4), weight="label")
    with pytest.raises(DataError, match=r"no column 'wt' .data\.weight.; did you mean 'w'"):
        dataset(tmp_path, np.arange(4), weight="wt")
    pq.write_table(pa.table({"x": [1.0, 2.0], "w": [1.0, -0.5], "label": [0, 1]}), tmp_path / "rows.parquet")
    bad = open_dataset(str(tmp_path / "rows.parquet"), DataConfig(train="-", label="label", weight="w"))
    with pytest.raises(DataError, match=r"column 'w', row 1: a weight of -0\.5; weights are 0 or more"):
        next(bad.read(0, 0, 2))


def test_outputs_and_labels_of_a_loss_without_classes_are_compared_before_anything_starts(tmp_path: Path):
    rows = dataset(tmp_path, np.linspace(0, 1, 9))
    with pytest.raises(
        ConfigError, match=r"the model gives \[rows, 3\] where the label is \[rows\]: mse takes one output"
    ):
        num_outputs(ModelConfig(outputs=3), LossConfig(name="mse"), rows)
    assert num_outputs(ModelConfig(outputs=1), LossConfig(name="mse"), rows) == 1
    rows = dataset(tmp_path, np.arange(9) % 3)
    with pytest.raises(
        DataError, match=r"row group 0, column 'label': label 2 is out of range: binary_focal takes labels in \[0, 1\]"
    ):
        num_outputs(ModelConfig(), LossConfig(name="binary_focal"), rows)


def test_rows_that_are_all_ignored_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="label -100 is out of range: cross_entropy over 3 classes"):
        num_outputs(ModelConfig(outputs=3), LossConfig(name="cross_entropy"), dataset(tmp_path, np.full(9, -100)))
    with pytest.raises(ConfigError, match="class_weights are all 0: no row would count"):
        LossConfig(name="cross_entropy", class_weights=[0.0, 0.0])
