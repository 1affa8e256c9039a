"""Rows made up for benchmarks: random features, and a label that depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_list_rows(folder: Path, num_rows: int = 200_000, num_files: int = 4) -> None:
    """One list column `pixels` of 784 floats, and a class of 10, `label`, that depends on it."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(784, 10)).astype(np.float32)
    schema = pa.schema([("pixels", pa.list_(pa.float32())), ("label", pa.int64())])
    for number, rows_of_file in enumerate(_shares(num_rows, num_files)):
        with pq.ParquetWriter(folder / f"part-{number}.parquet", schema) as writer:
            for rows in _pieces(rows_of_file, 10_000):
                pixels = rng.normal(size=(rows, 784)).astype(np.float32)
                offsets = pa.array(np.arange(0, rows + 1) * 784, pa.int32())
                lists = pa.ListArray.from_arrays(offsets, pa.array(pixels.ravel()))
                writer.write_table(pa.table([lists, pa.array((pixels @ directions).argmax(1))], schema=schema))


def write_column_rows(folder: Path, num_rows: int = 4_000_000, num_files: int = 4) -> None:
    """32 float columns, f0 to f31, and a target `y` that depends on them."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=32).astype(np.float32)
    schema = pa.schema([(name, pa.float32()) for name in (*(f"f{i}" for i in range(32)), "y")])
    for number, rows_of_file in enumerate(_shares(num_rows, num_files)):
        with pq.ParquetWriter(folder / f"part-{number}.parquet", schema) as writer:
            for rows in _pieces(rows_of_file, 100_000):
                features = rng.normal(size=(rows, 32)).astype(np.float32)
                columns = [*features.T, np.tanh(features @ weights).astype(np.float32)]
                writer.write_table(pa.table([np.ascontiguousarray(c) for c in columns], schema=schema))


def _shares(total: int, count: int) -> list[int]:
    return [total * (number + 1) // count - total * number // count for number in range(count)]


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
