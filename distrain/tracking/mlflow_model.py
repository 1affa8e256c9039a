"""The model as `mlflow.pyfunc.load_model` gives it back. MLflow stores a copy of this file with each model and runs
that copy; so it imports nothing of distrain, and nothing imports it.

predict(DataFrame of the feature columns) returns the model's raw outputs as float32 [rows, outputs]: logits of the
classes for cross-entropy, of the labels for binary cross-entropy, values for mse. A feature column holds numbers, lists
or arrays of them, or encoded images as bytes; columns that are no features are ignored.
"""

import io
import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

_ROWS = 8192  # at a time, to bound the memory of the hidden layers


class ExportedModel(PythonModel):
    """A torch.export program and the columns that its inputs are made of."""

    def load_context(self, context: PythonModelContext) -> None:
        self._program = torch.export.load(context.artifacts["program"]).module()
        self._inputs = json.loads(Path(context.artifacts["inputs"]).read_text())

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None) -> np.ndarray:
        parts = [model_input[first : first + _ROWS] for first in range(0, max(1, len(model_input)), _ROWS)]
        with torch.inference_mode():
            outputs = torch.cat([self._forward(self._tensors(part)) for part in parts])
        return outputs.reshape(len(outputs), -1).numpy() if outputs.ndim < 2 else outputs.numpy()

    def _tensors(self, frame: pd.DataFrame) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for each in self._inputs:
            form = each.get("form", "dense")
            if form == "ragged":
                tensors[each["name"]], tensors["mask"] = _to_padded(frame, each)
            elif form == "image":
                tensors[each["name"]] = torch.from_numpy(_to_pixels(frame, each))
            elif form == "dense":
                tensors[each["name"]] = torch.tensor(_to_array(frame, each))
        return tensors

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if list(inputs) == ["features"]:
            return self._program(inputs["features"])
        return self._program(**inputs)


def _to_array(frame: pd.DataFrame, described: dict) -> np.ndarray:
    """The input's columns as one array [rows, *shape]. Raises ValueError where cells have other lengths."""
    columns, dtype, shape = described["columns"], described["dtype"], described["shape"]
    if len(columns) > 1:
        array = frame[columns].to_numpy(dtype=dtype)
    elif frame[columns[0]].dtype != object:
        array = frame[columns[0]].to_numpy(dtype=dtype)
    else:
        cells = [_cell_to_array(cell, dtype) for cell in frame[columns[0]]]
        size = int(np.prod(shape))
        for row, cell in enumerate(cells):
            if cell.size != size:
                raise ValueError(f"column {columns[0]}, row {row}: {cell.size} values where the model takes {size}")
        array = np.stack(cells) if cells else np.empty(0, dtype)
    return array.reshape(len(frame), *shape)


def _to_padded(frame: pd.DataFrame, described: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The input's lists, padded with zeros to the longest, and the mask of where they have values."""
    cells = [torch.tensor(_cell_to_array(cell, described["dtype"])) for cell in frame[described["columns"][0]]]
    lengths = torch.tensor([len(cell) for cell in cells], dtype=torch.int64)
    width = max(1, int(lengths.max()) if cells else 1)
    padded = torch.zeros(len(cells), width, dtype=getattr(torch, described["dtype"]))
    for row, cell in zip(padded, cells, strict=True):
        row[: len(cell)] = cell
    return padded, torch.arange(width) < lengths[:, None]


def _to_pixels(frame: pd.DataFrame, described: dict) -> np.ndarray:
    """The input's encoded images as uint8 [rows, channels, height, width]. Raises ValueError where one has another
    shape, or other than 8 bits a channel."""
    from PIL import Image  # only for models that take images

    (name,), shape = described["columns"], tuple(described["shape"])
    as_mode = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}  # as in training
    pixels = np.empty((len(frame), *shape), np.uint8)
    for row, content in enumerate(frame[name]):
        with Image.open(io.BytesIO(content)) as image:
            mode = as_mode.get(image.mode, image.mode)
            if mode not in ("L", "LA", "RGB", "RGBA"):
                raise ValueError(f"column {name}, row {row}: Pillow's mode {mode}; images have 8 bits a channel")
            array = np.asarray(image if image.mode == mode else image.convert(mode))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if array.shape != shape:
            raise ValueError(f"column {name}, row {row}: an image of {array.shape} where the model takes {shape}")
        pixels[row] = array
    return pixels


def _cell_to_array(cell: object, dtype: str) -> np.ndarray:
    if isinstance(cell, np.ndarray) and cell.dtype == object:  # pandas reads a list of lists as that
        return np.asarray(cell.tolist(), dtype)
    return np.asarray(cell, dtype)


mlflow.models.set_model(ExportedModel())
