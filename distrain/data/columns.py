"""Arrow columns -> tensors, checked: no null, nothing that is not finite, nothing cast in silence."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data.images import Shape, image_column
from distrain.data.location import Location, null_error
from distrain.data.ragged import Ragged, RawBatch, ragged_column
from distrain.data.values import values_of
from distrain.errors import DataError, TrainingError
from distrain.imports import load_object

Batch = dict[str, Tensor]

# Tensors over Arrow's memory are only ever copied from.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def is_number(kind: pa.DataType) -> bool:
    """Integer, float or bool: what a feature or label may be."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_number_list(kind: pa.DataType) -> bool:
    """A list of numbers, of fixed size or not."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list) and is_number(kind.value_type)


def type_name(kind: pa.DataType) -> str:
    """A type as text. What writers differ in is left out: the name and nullability of a list's element, and how many
    bits count the elements of a list, a string or a binary."""
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<element: {type_name(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<element: {type_name(kind.value_type)}>"
    return str(kind).removeprefix("large_")


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and how they become tensors.

    `features` are numeric columns, or one list column (`feature_list`), whose rows may differ in length (`ragged`), or
    one column of encoded images (`image_shape`). `num_features` is None with a `transform` and with ragged rows.
    """

    features: tuple[str, ...]
    labels: tuple[str, ...]
    types: tuple[tuple[str, str], ...]  # (name, Arrow type) of every column read
    num_features: int | None
    feature_list: bool = False
    label_is_integer: bool = False
    transform: str | None = None
    weight: str | None = None
    ragged: bool = False
    vocabulary: int | None = None  # ragged rows are token ids below this
    image_shape: Shape | None = None

    @property
    def read(self) -> tuple[str, ...]:
        """The only columns that are ever read."""
        return (*self.features, *self.labels, *((self.weight,) if self.weight is not None else ()))

    def to_tensors(self, batch: pa.RecordBatch, where: Location) -> RawBatch:
        """One batch of rows as {"features": float32 [rows, num_features], "label": int64 or float32 [rows] or
        [rows, labels], "weight": float32 [rows] where there is a weight column}, or what the transform makes of it.
        Features of lists that differ in length are `Ragged`, to be padded microbatch by microbatch; encoded images are
        uint8 [rows, channels, height, width].

        Raises DataError naming file, row group, column and row for a null or a value that is not finite, TrainingError
        where the transform raises or returns something else than tensors of these rows.
        """
        if self.transform is not None:
            return self._transformed(batch, where) | self._weights(batch, where)
        tensors: dict[str, Tensor | Ragged] = {**self._weights(batch, where)}
        if self.ragged:
            tensors["features"] = ragged_column(
                batch.column(self.features[0]), self.features[0], where, self.vocabulary
            )
        elif self.image_shape is not None:
            pixels = image_column(batch.column(self.features[0]), self.features[0], where, self.image_shape)
            tensors["features"] = torch.from_numpy(pixels)
        elif self.features:
            tensors["features"] = torch.from_numpy(self._features(batch, where))
        if self.labels:
            tensors["label"] = torch.from_numpy(self._label(batch, where))
        return tensors

    def _features(self, batch: pa.RecordBatch, where: Location) -> NDArray[np.float32]:
        if self.feature_list:
            return self._list(batch.column(self.features[0]), self.features[0], where)
        values = np.empty((batch.num_rows, len(self.features)), dtype=np.float32)
        for index, name in enumerate(self.features):
            values[:, index] = _numbers(batch.column(name), name, where)
        if not np.isfinite(values.sum(dtype=np.float32)):  # cheap; finite values may overflow it, so look closer then
            for index, name in enumerate(self.features):
                _check_finite(values[:, index], name, where)
        return values

    def _list(self, array: pa.Array, name: str, where: Location) -> NDArray[np.float32]:
        """A list column as [rows, width]; rows of another length than the first are an error."""
        if array.null_count:
            raise null_error(array, name, where)
        values = array.flatten()
        assert self.num_features is not None
        width = self.num_features
        if not pa.types.is_fixed_size_list(array.type):
            lengths = values_of(pc.list_value_length(array))
            if (lengths != width).any():
                row = int(np.argmax(lengths != width))
                raise DataError(
                    f"{where}, column {name!r}, row {where.first_row + row}: a list of {lengths[row]} values where "
                    f"the first row of the data has {width}; every row must have as many"
                )
        if values.null_count:
            row = int(np.argmax(values_of(values.is_null()))) // width
            raise DataError(f"{where}, column {name!r}, row {where.first_row + row}: a null in the list")
        flat = values_of(values).astype(np.float32, copy=False)
        if not np.isfinite(flat.sum(dtype=np.float32)):
            bad = ~np.isfinite(flat)
            if bad.any():
                row = int(np.argmax(bad)) // width
                raise DataError(
                    f"{where}, column {name!r}, row {where.first_row + row}: {flat[np.argmax(bad)]} is not finite"
                )
        return flat.reshape(-1, width)

    def _label(self, batch: pa.RecordBatch, where: Location) -> NDArray[Any]:
        dtype = np.int64 if self.label_is_integer else np.float32
        arrays = []
        for name in self.labels:
            values = _numbers(batch.column(name), name, where).astype(dtype)
            if not self.label_is_integer:
                _check_finite(values, name, where)
            arrays.append(values)
        return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)

    def _weights(self, batch: pa.RecordBatch, where: Location) -> Batch:
        if self.weight is None:
            return {}
        values = _numbers(batch.column(self.weight), self.weight, where).astype(np.float32)
        _check_finite(values, self.weight, where)
        if (values < 0).any():
            row = int(np.argmax(values < 0))
            raise DataError(
                f"{where}, column {self.weight!r}, row {where.first_row + row}: a weight of {values[row]:g}; weights "
                "are 0 or more"
            )
        return {"weight": torch.from_numpy(values)}

    def _transformed(self, batch: pa.RecordBatch, where: Location) -> Batch:
        assert self.transform is not None
        function: Callable[[pa.RecordBatch], Any] = load_object(self.transform, "data.transform")
        try:
            result = function(batch if self.weight is None else batch.drop_columns([self.weight]))
        except Exception as error:
            text = "".join(traceback.format_exception(error)).rstrip()
            raise TrainingError(
                f"{where}: data.transform {self.transform} raised {type(error).__name__}: {error}\n{text}"
            ) from error
        said = f"{where}: data.transform {self.transform} returned"
        if not isinstance(result, dict) or not all(isinstance(value, Tensor) for value in result.values()):
            raise TrainingError(f"{said} {type(result).__name__}, not a dict of tensors")
        if not result.keys() - {"label"} or (self.labels and "label" not in result):
            raise TrainingError(f'{said} {sorted(result)}: it needs "label" and at least one input of the model')
        for name, tensor in result.items():
            if tensor.ndim == 0 or len(tensor) != batch.num_rows:
                raise TrainingError(f"{said} {name!r} of shape {tuple(tensor.shape)} for {batch.num_rows} rows")
        return result


def _numbers(array: pa.Array, name: str, where: Location) -> NDArray[Any]:
    """A column's values; a null is an error."""
    if array.null_count:
        raise null_error(array, name, where)
    return values_of(array)


def _check_finite(values: NDArray[Any], name: str, where: Location) -> None:
    if np.isfinite(values).all():
        return
    row = int(np.argmax(~np.isfinite(values)))
    raise DataError(f"{where}, column {name!r}, row {where.first_row + row}: {values[row]} is not finite in float32")
