"""Mean and deviation in one pass over any row groups, against NumPy in float64."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from distrain.config import DataConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.data.statistics import measure
from distrain.errors import DataError


def dataset_of(path: Path, values: np.ndarray, row_group_size: int) -> Dataset:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": lists, "label": np.zeros(len(values))}), buffer, row_group_size=row_group_size)
    path.write_bytes(buffer.getvalue())
    return open_dataset(str(path), DataConfig(train="-", features="x", label="label"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(1, 300),
    group=st.integers(1, 300),
    center=st.floats(-1e4, 1e4),
    spread=st.floats(1e-2, 1e4),
    seed=st.integers(0, 9),
)
def test_any_grouping_of_the_rows_agrees_with_numpy(
    tmp_path: Path, rows: int, group: int, center: float, spread: float, seed: int
):
    values = np.random.default_rng(seed).normal(center, spread, size=(rows, 3)).astype(np.float32)
    assume(rows == 1 or values.std(0).any())
    found = measure(dataset_of(tmp_path / "x.parquet", values, group), True)
    mean, deviation = found.mean, found.deviation
    exact = values.astype(np.float64)
    expected = exact.std(0)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6, atol=1e-6 * spread)
    np.testing.assert_allclose(deviation, np.where(expected > 0, expected, 1.0), rtol=1e-5)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), rows=st.integers(1, 500))
def test_a_constant_feature_has_deviation_one_whatever_its_value(tmp_path: Path, value: float, rows: int):
    """Rounding must not leave a tiny deviation: dividing by it would blow up every other value."""
    values = np.stack([np.full(rows, value, np.float32), np.arange(rows, dtype=np.float32)], axis=1)
    found = measure(dataset_of(tmp_path / "x.parquet", values, 7), True)
    assert found.mean is not None and found.deviation is not None
    assert (found.mean[0].item(), found.deviation[0].item()) == (value, 1.0)


def test_nothing_but_constant_features_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="every feature is constant over all 20 rows"):
        measure(dataset_of(tmp_path / "x.parquet", np.ones((20, 3), np.float32), 7), True)


def test_classes_are_counted_in_the_same_pass_and_balanced_as_scikit_learn_does(tmp_path: Path):
    rng = np.random.default_rng(0)
    label = rng.choice(4, size=500, p=[0.7, 0.2, 0.1, 0.0])
    table = pa.table({"x": rng.normal(size=500), "label": label})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=33)
    dataset = open_dataset(str(tmp_path / "x.parquet"), DataConfig(train="-", features="x", label="label"))
    found = measure(dataset, True, 4)
    assert found.class_rows is not None and found.class_rows.tolist() == np.bincount(label, minlength=4).tolist()
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=label) * 3 / 4  # it knows of three classes only
    np.testing.assert_allclose(found.balanced_weights, [*balanced, 1.0], rtol=1e-6)
    assert found.mean is not None and measure(dataset, False, 4).mean is None


def test_a_bad_value_is_named(tmp_path: Path):
    values = np.zeros((20, 2), np.float32)
    values[13, 1] = np.nan
    with pytest.raises(DataError, match=r"x\.parquet: row group 1, column 'x', row 3: nan is not finite"):
        measure(dataset_of(tmp_path / "x.parquet", values, 10), True)
