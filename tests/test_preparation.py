"""What footers tell is said before anything starts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distrain.config import TrainConfig
from distrain.errors import ConfigError, DataError
from distrain.preparation import prepare


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def config(train: str, validation: str | None = None, loss: str | None = None, **data: Any) -> TrainConfig:
    values = {"data": {"train": train, "validation": validation, "label": "y", **data}}
    return TrainConfig(**values if loss is None else {**values, "loss": loss})


@pytest.mark.parametrize(
    ("loss", "bad", "said"),
    [
        ("cross_entropy", 2, "label 2 is out of range: cross_entropy over 2 classes takes labels 0..1"),
        ("focal", -1, "label -1 is out of range: focal over 2 classes takes labels 0..1"),
        ("binary_cross_entropy", 2, "label 2 is out of range: binary_cross_entropy takes labels in [0, 1]"),
    ],
)
def test_a_label_that_only_validation_has(tmp_path: Path, loss: str, bad: int, said: str):
    train = write(tmp_path / "train.parquet", x=[1.0, 2.0], y=[0, 1])
    held_out = write(tmp_path / "held_out.parquet", x=[1.0, 2.0, 3.0], y=[0, bad, 1])
    with pytest.raises(DataError) as error:
        prepare(config(train, held_out, loss))
    assert error.value.message == f"{held_out}: row group 0, column 'y': {said}"
    one_class = write(tmp_path / "one.parquet", x=[1.0, 2.0], y=[0, 0])
    prepared = prepare(config(train, one_class, loss))
    assert prepared.validation is not None and prepared.task.num_outputs == (1 if loss.startswith("binary") else 2)


def test_columns_left_out_are_among_the_warnings(tmp_path: Path):
    path = write(tmp_path / "train.parquet", x=[1.0, 2.0], name=["a", "b"], y=[0, 1])
    assert prepare(config(path, path)).warnings == (
        "data.features: null leaves out 'name': neither integer, float nor bool",
    )
    assert prepare(config(path, features=["x"])).warnings == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": {"name": "CosineAnnealingLR", "T_max": "abc"}}, "schedule.T_max: expected an integer, got 'abc'"),
        ({"schedule": {"name": "StepLR", "step_size": 0}}, "schedule: .*StepLR refused its values .step_size=0.: "),
        ({"optimizer": {"name": "Adamm"}}, "optimizer.name: torch.optim has no optimizer 'Adamm'; did you mean Adam"),
    ],
)
def test_what_torch_refuses_is_said_before_anything_is_read(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        prepare(TrainConfig(data={"train": "nowhere", "label": "y"}, **settings))


def test_pixels_are_not_standardized(tmp_path: Path):
    images = []
    for value in (0, 200):
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    path = write(tmp_path / "train.parquet", image=images, y=[0, 1])
    with pytest.raises(ConfigError, match=r"data\.standardize: the pixels of encoded images are scaled to 0\.\.1"):
        prepare(config(path, features="image", standardize=True))
    assert prepare(config(path, features="image")).task.image_shape == (1, 4, 4)
