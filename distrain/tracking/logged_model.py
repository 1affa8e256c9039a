"""The model in MLflow's format: signature, example, requirements, and the script that loads it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType, Array
from PIL import Image
from torch import Tensor

from distrain.tracking.description import Column, ModelInput
from distrain.tracking.export import INPUTS, PROGRAM

_EXAMPLE_ROWS = 3
_NUMPY_TYPES = {DataType.long: "int64", DataType.double: "float64", DataType.boolean: "bool"}


def save_model(folder: Path, logged: LoggedModel, run_id: str, inputs: Sequence[ModelInput], outputs: Tensor) -> Path:
    """Write the exported model that lies in `folder` in MLflow's format, into a folder below it, which is returned."""
    path = folder / "model"
    description = Model(
        artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=description,
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={"program": str(folder / PROGRAM), "inputs": str(folder / INPUTS)},
            signature=_signature(inputs, outputs),
            input_example=_input_example(inputs),
            pip_requirements=_requirements(inputs),  # else MLflow loads the model in a process of its own to find out
        )
    return path


def mlflow_type(arrow: str) -> DataType | Array | AnyType:
    """The type of a DataFrame's column that MLflow accepts for an Arrow type. Widest of its kind, since MLflow refuses
    to narrow: a DataFrame made by hand has int64 and float64 columns."""
    inner = re.search(r": (\w+)", arrow) if "list<" in arrow else None
    if inner is not None:
        element = mlflow_type(inner.group(1))
        return element if isinstance(element, AnyType) else Array(element)
    if re.fullmatch(r"u?int(8|16|32)|int64", arrow):
        return DataType.long
    return {"bool": DataType.boolean, "binary": DataType.binary, "large_binary": DataType.binary,
            "halffloat": DataType.double, "float": DataType.double,
            "double": DataType.double, "string": DataType.string}.get(arrow, AnyType())  # fmt: skip


def _columns(model_input: ModelInput) -> Sequence[Column]:
    """The DataFrame's columns that an input is made of; a mask has none of its own."""
    return () if model_input.form == "mask" else model_input.columns or ((model_input.name, ""),)


def _signature(inputs: Sequence[ModelInput], outputs: Tensor) -> ModelSignature:
    columns = [column for each in inputs for column in _columns(each)]
    shape = tuple(outputs.shape[1:]) or (1,)
    return ModelSignature(
        inputs=Schema([ColSpec(mlflow_type(kind), name) for name, kind in columns]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *shape))]),
    )


def _input_example(inputs: Sequence[ModelInput]) -> pd.DataFrame:
    """The first rows of the examples, in the types that the signature asks for."""
    columns: dict[str, object] = {}
    for each in inputs:
        rows = each.example[:_EXAMPLE_ROWS].numpy()
        if each.form == "image":
            columns[each.columns[0][0]] = [_encoded(pixels) for pixels in rows]
            continue
        for i, (name, kind) in enumerate(_columns(each)):
            kind_there = mlflow_type(kind)
            is_number = kind and "list<" not in kind
            cells = rows.reshape(len(rows), -1)[:, i] if is_number else rows
            if isinstance(kind_there, DataType):
                columns[name] = cells.astype(_NUMPY_TYPES[kind_there])
            else:
                element = kind_there.dtype if isinstance(kind_there, Array) else None
                columns[name] = cells.astype(_NUMPY_TYPES.get(element, rows.dtype)).tolist()
    return pd.DataFrame(columns)


def _encoded(pixels: np.ndarray) -> bytes:
    """uint8 [channels, height, width] -> a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _requirements(inputs: Sequence[ModelInput]) -> list[str]:
    names = ["mlflow", "torch", "numpy", "pandas", *(["pillow"] if any(i.form == "image" for i in inputs) else [])]
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]
