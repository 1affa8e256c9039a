"""The model as `mlflow.pyfunc.load_model` gives it back. MLflow stores a copy of this file with each model and runs
that copy; so it imports nothing of distrain, and nothing imports it.

predict(DataFrame of the feature columns) returns the model's raw outputs as float32 [rows, outputs]: logits of the
classes for cross-entropy, of the labels for binary cross-entropy, values for mse. A feature column holds numbers, or
lists or arrays of them; columns that are no features are ignored.
"""

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
        inputs = {each["name"]: torch.tensor(_to_array(model_input, each)) for each in self._inputs}
        parts = zip(*(tensor.split(_ROWS) for tensor in inputs.values()), strict=True)
        with torch.inference_mode():
            outputs = torch.cat([self._forward(dict(zip(inputs, part, strict=True))) for part in parts])
        return outputs.reshape(len(outputs), -1).numpy() if outputs.ndim < 2 else outputs.numpy()

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


def _cell_to_array(cell: object, dtype: str) -> np.ndarray:
    if isinstance(cell, np.ndarray) and cell.dtype == object:  # pandas reads a list of lists as that
        return np.asarray(cell.tolist(), dtype)
    return np.asarray(cell, dtype)


mlflow.models.set_model(ExportedModel())
