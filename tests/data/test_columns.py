"""What may stand in a column: every type becomes the same float32, every bad value is named with its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import DataConfig
from distrain.data.columns import Columns, type_name
from distrain.data.dataset import open_dataset
from distrain.data.location import Location
from distrain.data.ragged import pad
from distrain.errors import DataError

HERE = Location("rows.parquet", 4, 100)
NAN, INF = float("nan"), float("inf")


def scalars(features: tuple[str, ...] = ("a", "b"), labels: tuple[str, ...] = ("y",), **changes: Any) -> Columns:
    return Columns(**{"features": features, "labels": labels, "types": (), "num_features": len(features), **changes})


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch({name: pa.array(values) for name, values in columns.items()})


def test_reading_rows_does_not_wait_for_pandas(tmp_path: Path):
    """pyarrow imports it for `to_numpy`: half a second of each worker's start."""
    table = pa.table({"a": [1.0, 2.0], "b": [True, False], "l": [[1, 2], [3, 4]], "y": [0, 1]})
    pq.write_table(table, tmp_path / "rows.parquet")
    code = (
        "import sys\n"
        "from distrain.config import DataConfig\n"
        "from distrain.data.dataset import open_dataset\n"
        "for features, ragged in ((['a', 'b'], False), ('l', False), ('l', True)):\n"
        "    data = DataConfig(train='rows.parquet', label='y', features=features, ragged=ragged)\n"
        "    print(next(open_dataset('rows.parquet', data).read(0, 0, 2))['label'].tolist())\n"
        "assert 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    assert done.stdout.split(b"\n")[:-1] == 3 * [b"[0, 1]"]


@given(
    rows=st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 3), min_size=1),
    start=st.integers(0, 5),
)
def test_finite_values_come_through_to_the_bit(rows: list[tuple[float, ...]], start: int):
    """A slice too; and values whose sum overflows float32 are not taken for infinite ones."""
    a, b, y = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    tensors = scalars().to_tensors(batch(a=a, b=b, y=y).slice(start), HERE)
    assert torch.equal(tensors["features"], torch.from_numpy(np.stack([a, b], axis=1))[start:])
    assert torch.equal(tensors["label"], torch.from_numpy(y)[start:])


def test_the_order_of_the_features_is_the_configurations():
    tensors = scalars(("b", "a")).to_tensors(batch(a=[1.0], y=[0.0], b=[2.0]), HERE)
    assert tensors["features"].tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("column", ["a", "y"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null; fill it in or leave the row out"),
        (NAN, "nan is not finite in float32"),
        (INF, "inf is not finite in float32"),
        (-INF, "-inf is not finite in float32"),
        (1e39, "inf is not finite in float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_bad_value_is_named_with_its_row_in_the_row_group(column: str, value: float | None, said: str):
    columns: dict[str, list[float | None]] = {name: [1.0, 2.0, 3.0] for name in ("a", "b", "y")}
    columns[column][2] = value
    with pytest.raises(DataError) as error:
        scalars().to_tensors(batch(**columns), HERE)
    assert error.value.message == f"rows.parquet: row group 4, column {column!r}, row 102: {said}"


def test_infinities_that_cancel_are_seen():
    with pytest.raises(DataError, match="column 'a', row 100: inf"):
        scalars().to_tensors(batch(a=[INF, 1.0], b=[-INF, 1.0], y=[0.0, 0.0]), HERE)


def test_a_null_in_an_integer_label_is_not_a_number():
    with pytest.raises(DataError, match="column 'y', row 101: null"):
        scalars(label_is_integer=True).to_tensors(batch(a=[1.0] * 2, b=[1.0] * 2, y=[1, None]), HERE)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.large_list(pa.float32())])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([1.0, NAN], "nan is not finite"),
        ([INF, 1.0], "inf is not finite"),
        ([None, 1.0], "a null in the list"),
        (None, "null; fill it in"),
    ],
)
def test_a_bad_value_in_a_list_is_named(kind: pa.DataType, bad: list | None, said: str):
    lists = pa.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], bad], kind)
    columns = scalars(("x",), (), feature_list=True, num_features=2)
    rows = pa.record_batch({"x": lists})
    assert columns.to_tensors(rows.slice(1, 2), HERE)["features"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(DataError) as error:
        columns.to_tensors(rows.slice(1), HERE)
    assert error.value.message.startswith(f"rows.parquet: row group 4, column 'x', row 102: {said}")


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64(), pa.bool_(), pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("size", [-1, 2])
def test_lists_of_any_number_become_float32(kind: pa.DataType, size: int):
    values = np.array([[0, 1], [1, 1]]).astype(kind.to_pandas_dtype())
    lists = pa.array(list(values), pa.list_(kind, size))
    tensors = scalars(("x",), (), feature_list=True, num_features=2).to_tensors(pa.record_batch({"x": lists}), HERE)
    assert tensors["features"].dtype == torch.float32 and tensors["features"].tolist() == [[0, 1], [1, 1]]


def test_lists_of_differing_length_are_named_even_where_the_total_fits():
    rows = pa.record_batch({"x": pa.array([[1.0, 2.0], [3.0, 4.0, 5.0], [6.0]])})
    with pytest.raises(DataError, match="column 'x', row 101: a list of 3 values where the first row of the data has"):
        scalars(("x",), (), feature_list=True, num_features=2).to_tensors(rows, HERE)


def test_the_text_of_a_type_leaves_out_what_only_writers_differ_in():
    spark = pa.list_(pa.field("element", pa.float32(), nullable=False))
    old = pa.list_(pa.field("item", pa.float32()))
    assert type_name(spark) == type_name(old) == "list<element: float>"
    assert type_name(pa.list_(pa.field("item", pa.float32()), 3)) == "fixed_size_list<element: float>[3]"
    assert type_name(pa.large_list(pa.field("item", pa.float32()))) == "list<element: float>"
    assert type_name(pa.large_list(pa.list_(pa.large_string()))) == "list<element: list<element: string>>"
    assert type_name(pa.large_string()) == "string" and type_name(pa.large_binary()) == "binary"
    assert type_name(pa.list_(pa.float64())) == "list<element: double>"
    assert type_name(pa.timestamp("ms")) == "timestamp[ms]"


@pytest.mark.parametrize("ragged", [False, True])
def test_files_whose_lists_are_written_differently_are_one_data_set(tmp_path: Path, ragged: bool):
    for name in ("element", "item"):
        for size, kind in (("small", pa.list_), ("large", pa.large_list)):
            lists = pa.array([[1.0, 2.0]], kind(pa.field(name, pa.float32())))
            table = pa.table({"x": lists, "label": [0]})
            pq.write_table(table, tmp_path / f"{name}-{size}.parquet", use_compliant_nested_type=False)
    dataset = open_dataset(str(tmp_path), DataConfig(train="-", features="x", label="label", ragged=ragged))
    for number in range(4):
        [batch] = map(pad, dataset.read(number, 0, 1))
        assert batch["features"].tolist() == [[1.0, 2.0]]
