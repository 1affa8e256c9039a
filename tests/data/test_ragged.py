"""Rows of different length: held end to end, padded to the longest of their microbatch, checked against plain lists."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.config import DataConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.data.plan import Plan
from distrain.data.ragged import Ragged, RaggedBuffer, cut, pad
from distrain.data.reader import Reader
from distrain.errors import DataError

rows_of_any_length = st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=8)


def ragged(rows: list[list[int]]) -> Ragged:
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return Ragged(torch.tensor([value for row in rows for value in row], dtype=torch.int64), lengths.cumsum(0))


def plain(rows: Ragged) -> list[list[int]]:
    values, mask = rows.padded()
    assert not values[~mask].any()
    return [value[there].tolist() for value, there in zip(values, mask, strict=True)]


@settings(deadline=None, max_examples=40)  # threads on a busy machine
@given(rows_of_any_length, st.randoms(use_true_random=False))
def test_slices_choices_and_joins_are_those_of_lists(rows: list[list[int]], chance: random.Random):
    whole = ragged(rows)
    assert plain(whole) == rows
    chosen = [chance.randrange(len(rows)) for _ in range(5)]
    assert plain(whole.index_select(0, torch.tensor(chosen))) == [rows[i] for i in chosen]
    first, stop = sorted((chance.randrange(len(rows) + 1), chance.randrange(len(rows) + 1)))
    part = whole[first:stop]
    assert plain(part) == rows[first:stop] and len(part) == stop - first
    if len(part):
        order = list(range(len(part)))[::-1]
        assert plain(part.index_select(0, torch.tensor(order))) == rows[first:stop][::-1]
    assert plain(Ragged.cat([part, whole])) == rows[first:stop] + rows


@settings(deadline=None, max_examples=40)  # threads on a busy machine
@given(st.lists(rows_of_any_length, min_size=1, max_size=4))
def test_a_buffer_used_again_holds_the_last_window(windows: list[list[list[int]]]):
    buffer = RaggedBuffer(torch.int64)
    for rows in windows:
        buffer.start(len(rows))
        middle = len(rows) // 2
        buffer.append(ragged(rows)[:middle])
        buffer.append(ragged([[7], *rows])[middle + 1 :])
        assert plain(buffer.rows) == rows


def test_the_width_is_the_longest_rows_and_a_row_without_values_has_none():
    batch = pad({"features": ragged([[1], [], [2, 3]]), "label": torch.arange(3)})
    assert batch["features"].tolist() == [[1, 0], [0, 0], [2, 3]]
    assert batch["mask"].tolist() == [[True, False], [False, False], [True, True]]
    parts = list(cut({"features": ragged([[1], [], [2, 3]]), "label": torch.arange(3)}, 2))
    assert [tuple(part["features"].shape) for part in parts] == [(2, 1), (1, 2)]
    assert pad({"features": ragged([[]])})["features"].shape == (1, 1)


def write(path: Path, lists: list, kind: pa.DataType | None = None, group: int = 20, **columns) -> Path:
    labels = {"y": np.arange(len(lists))} | columns
    pq.write_table(pa.table({"x": pa.array(lists, kind), **labels}), path, row_group_size=group)
    return path


def opened(path: Path, vocabulary: int | None = None, **data) -> Dataset:
    return open_dataset(str(path), DataConfig(train="-", label="y", features="x", **data), vocabulary=vocabulary)


def of_many_lengths(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, rng.integers(0, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64())])
def test_every_row_comes_once_with_its_own_label_however_it_is_sought(tmp_path: Path, kind: pa.DataType):
    lists = of_many_lengths(130)
    dataset = opened(write(tmp_path / "rows.parquet", lists, kind), vocabulary=50)
    assert dataset.columns.num_features is None
    plan = Plan(dataset.row_counts, 16, 2, shuffle_rows=30)
    expected = {}
    for shard in range(2):
        reader = Reader(dataset, plan, shard)
        for step in range(plan.steps_per_epoch):
            batch = reader.microbatch(0, step)
            expected[shard, step] = batch
            for row, there, label in zip(batch["features"], batch["mask"], batch["label"].tolist(), strict=True):
                assert row[there].tolist() == lists[label]
            assert batch["features"].dtype == torch.int64
            assert batch["features"].shape[1] == max(1, *(len(lists[label]) for label in batch["label"].tolist()))
        reader.close()
    assert sorted(label for batch in expected.values() for label in batch["label"].tolist()) == list(range(130))
    reader = Reader(dataset, plan, 1)
    for step in random.Random(0).choices(range(plan.steps_per_epoch), k=20):
        batch = reader.microbatch(0, step)
        assert all(torch.equal(batch[name], expected[1, step][name]) for name in batch)
    reader.close()


def test_one_long_row_does_not_widen_the_window(tmp_path: Path):
    """Memory is what the values take, and not rows times the longest."""
    dataset = opened(write(tmp_path / "rows.parquet", [[1] * 5000] + [[1, 2]] * 999), vocabulary=3)
    reader = Reader(dataset, Plan(dataset.row_counts, 10, 1, shuffle_rows=1000, shuffle=False), 0)
    assert reader.microbatch(0, 1)["features"].shape == (10, 2)
    with reader._loader._changed:
        held = [loaded.rows["features"].nbytes for loaded in reader._loader._loaded.values()]
    assert held and max(held) < 100_000
    reader.close()


def test_floats_keep_their_values(tmp_path: Path):
    dataset = opened(write(tmp_path / "rows.parquet", [[0.5], [], [1.5, -2.0]]), ragged=True)
    batch = pad(next(dataset.read(0, 0, 3)))
    assert batch["features"].dtype == torch.float32
    assert batch["features"].tolist() == [[0.5, 0.0], [0.0, 0.0], [1.5, -2.0]]


def refused(path: Path, vocabulary: int | None = None, **data) -> str:
    with pytest.raises(DataError) as error:
        dataset = opened(path, vocabulary, **data)
        for number in range(len(dataset.row_groups)):
            list(dataset.read(number, 0, dataset.row_counts[number]))
    return error.value.message


@pytest.mark.parametrize(
    ("lists", "vocabulary", "said"),
    [
        (
            [[1], [2, 10]],
            10,
            "row group 1, column 'x', row 0: token id 10 is out of range: model.vocabulary is 10, so ids",
        ),
        ([[1], [], [3, -1]], 10, "row group 1, column 'x', row 1: token id -1 is out of range"),
        ([[1], None], None, "row group 1, column 'x', row 0: null; fill it in"),
        ([[1.0], [2.0, None]], None, "row group 1, column 'x', row 0: a null in the list"),
        ([[1.0], [], [2.0, float("nan")]], None, "row group 1, column 'x', row 1: nan is not finite"),
    ],
)
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, lists: list, vocabulary: int | None, said: str):
    rows = [lists[0]] * 20 + lists[1:]
    assert f"rows.parquet: {said}" in refused(write(tmp_path / "rows.parquet", rows), vocabulary, ragged=True)


def test_what_is_no_list_of_token_ids_is_refused_when_opened(tmp_path: Path):
    path = write(tmp_path / "rows.parquet", [[0.5]])
    assert "model: text takes one column of lists of integers (data.features), and not 'x', list<" in refused(path, 5)
    path = write(tmp_path / "rows.parquet", [1.0])
    assert "data.ragged takes one column of lists of numbers (data.features), and not 'x', double" in refused(
        path, ragged=True
    )


class Lists:
    """Lists in memory, read in small batches."""

    def __init__(self, lists: list[list[int]]) -> None:
        self.lists = lists

    def read(self, row_group: int, start: int, stop: int) -> Iterator[dict]:
        for at in range(start, stop, 3):
            end = min(at + 3, stop)
            yield {"features": ragged(self.lists[at:end]), "label": torch.arange(at, end)}


@settings(deadline=None, max_examples=40)  # threads on a busy machine
@given(rows_of_any_length, st.integers(1, 5), st.integers(1, 3), st.integers(1, 8))
def test_microbatches_do_not_depend_on_windows_or_batches_read(
    lists: list[list[int]], batch_size: int, shards: int, window: int
):
    plan = Plan((len(lists),), max(batch_size, shards), shards, shuffle_rows=window, shuffle=False)
    seen = []
    for shard in range(shards):
        reader = Reader(Lists(lists), plan, shard)
        for step in range(plan.steps_per_epoch):
            batch = reader.microbatch(0, step)
            for index, label in enumerate(batch["label"].tolist()):
                assert batch["features"][index][batch["mask"][index]].tolist() == lists[int(label)]
                seen.append(int(label))
        reader.close()
    assert sorted(seen) == list(range(len(lists)))
