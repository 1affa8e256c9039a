"""Files and schemas that cannot be trained on: one line each, naming the file and what to do."""

from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrain.config import DataConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.data.files import find_files
from distrain.errors import DataError


def opened(path: Path | str, **data: Any) -> Dataset:
    return open_dataset(str(path), DataConfig(**{"train": "given apart", "label": "label", **data}))


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": [0, 1], **columns}), path)
    return path


def refused(path: Path | str, **data: Any) -> str:
    """The message with which opening or reading is refused; one line."""
    with pytest.raises(DataError) as error:
        dataset = opened(path, **data)
        for number, rows in enumerate(dataset.row_counts):
            for _ in dataset.read(number, 0, rows):
                pass
    assert error.value.exit_code == 2 and "\n" not in error.value.message
    return error.value.message


class TestPaths:
    def test_nothing_there(self, tmp_path: Path):
        assert refused(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
        assert refused(tmp_path) == f"{tmp_path}: the folder holds no files"
        assert refused(tmp_path / "*.parquet") == f"{tmp_path}/*.parquet: matches no file"
        assert refused(tmp_path / "none" / "**" / "x") == f"{tmp_path}/none/**/x: matches no file"

    def test_only_bookkeeping(self, tmp_path: Path):
        (tmp_path / "_SUCCESS").touch()
        (tmp_path / ".hidden").mkdir()
        write(tmp_path / ".hidden" / "x.parquet", x=[1.0, 2.0])
        assert refused(tmp_path) == f"{tmp_path}: the folder holds no files"

    def test_a_wildcard_finds_no_bookkeeping_unless_it_says_so(self, tmp_path: Path):
        for name in ("year=1/a.parquet", "_temporary/0/a.parquet", "year=1/_change_data/a.parquet", "b.parquet"):
            write(tmp_path / name, x=[1.0, 2.0])
        for name in ("_SUCCESS", ".b.parquet.crc"):
            (tmp_path / name).touch()

        def found(pattern: str) -> list[str]:
            return [str(Path(path).relative_to(tmp_path)) for path, _ in find_files(f"{tmp_path}/{pattern}")]

        assert found("**/*.parquet") == found("**") == found("") == ["b.parquet", "year=1/a.parquet"]
        assert found("*") == ["b.parquet"] and found("*/*.parquet") == ["year=1/a.parquet"]
        assert found("_temporary/**/*.parquet") == found("_*/*/*") == ["_temporary/0/a.parquet"]
        assert found("**/_*/*.parquet") == ["year=1/_change_data/a.parquet"] and found("_*") == ["_SUCCESS"]
        assert found(".*") == [".b.parquet.crc"]

    @pytest.mark.parametrize(
        ("log", "kind"),
        [
            ("_delta_log/0.json", "Delta Lake"),
            (".hoodie/hoodie.properties", "Hudi"),
            ("metadata/v1.metadata.json", "Iceberg"),
        ],
    )
    def test_a_table_whose_folder_holds_replaced_rows_too(self, tmp_path: Path, log: str, kind: str):
        path = write(tmp_path / "all" / "table" / "data" / "a.parquet", x=[1.0, 2.0])
        write(tmp_path / "all" / "plain" / "a.parquet", x=[1.0, 2.0])
        (tmp_path / "all" / "table" / log).parent.mkdir()
        (tmp_path / "all" / "table" / log).touch()
        said = f"{tmp_path}/all/table: a table of {kind}, whose folder holds rows too that were replaced or deleted: "
        for pattern in ("all", "all/table", "all/table/*/*.parquet", "all/**/*.parquet"):
            assert refused(tmp_path / pattern).startswith(said)
        assert refused((tmp_path / "all").as_uri()).startswith(f"file://{said}")
        assert opened(path).num_rows == opened(tmp_path / "all" / "p*" / "*").num_rows == 2

    def test_a_uri_of_no_known_kind(self):
        assert refused("nfs://server/rows").startswith("nfs://server/rows: not a path or URI that can be read: ")

    @pytest.mark.parametrize("content", [b"", b"x,label\n1,2\n", b"PAR1" + bytes(100) + b"PAR1"])
    def test_not_parquet(self, tmp_path: Path, content: bytes):
        write(tmp_path / "a.parquet", x=[1.0, 2.0])
        (tmp_path / "b.csv").write_bytes(content)
        assert refused(tmp_path).startswith(f"{tmp_path}/b.csv: not a readable Parquet file: ")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path: Path):
        write(tmp_path / "a.parquet", x=[1.0, 2.0]).chmod(0)
        assert "a.parquet: not a readable Parquet file: " in refused(tmp_path)

    def test_a_folder_whose_own_name_holds_wildcards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Only what the user wrote is a pattern, not the folder the command runs in."""
        write(tmp_path / "run[1]" / "a.parquet", x=[1.0, 2.0])
        monkeypatch.chdir(tmp_path / "run[1]")
        for path in ("*.parquet", "./*.parquet", "**/*.parquet", "."):
            assert [name for name, _ in find_files(path)] == [f"{tmp_path}/run[1]/a.parquet"]

    @pytest.mark.parametrize("name", ["a b%20.parquet", "date=2024-01-01 00%3A00.parquet", "ü#1.parquet"])
    def test_names_that_a_uri_has_to_escape(self, tmp_path: Path, name: str):
        folder = tmp_path / "rows"
        write(folder / name, x=[1.0, 2.0])
        [group] = opened(folder.as_uri()).row_groups
        assert group.num_rows == 2
        assert opened(f"{folder.as_uri()}/*.parquet").fingerprint == opened(folder).fingerprint
        dataset = opened((folder / name).as_uri())
        assert [len(batch["label"]) for batch in dataset.read(0, 0, 2)] == [2]

    def test_many_files_are_listed_quickly(self, tmp_path: Path):
        """Looking for files named twice must not compare each with each."""
        for number in range(3000):
            (tmp_path / f"{number:05}").touch()
        assert len(find_files([str(tmp_path)])) == 3000


class TestSchemas:
    def test_a_missing_column(self, tmp_path: Path):
        path = write(tmp_path / "a.parquet", height=[1.0, 2.0])
        assert refused(path, label="labels") == f"{path}: no column 'labels' (data.label); did you mean 'label'?"
        assert refused(path, features=["hight"]) == f"{path}: no column 'hight' (data.features); did you mean 'height'?"
        assert refused(path, features="zzz") == f"{path}: no column 'zzz' (data.features); it has 'label', 'height'"

    def test_a_column_missing_in_a_later_file(self, tmp_path: Path):
        first = write(tmp_path / "a.parquet", x=[1.0, 2.0], z=[1.0, 2.0])
        second = write(tmp_path / "b.parquet", x=[1.0, 2.0])
        assert refused(tmp_path).startswith(f"{second}: no column 'z' (as in {first})")

    def test_a_duplicated_column(self, tmp_path: Path):
        table = pa.table([pa.array([0, 1]), pa.array([1.0, 2.0]), pa.array([3.0, 4.0])], ["label", "x", "x"])
        pq.write_table(table, tmp_path / "a.parquet")
        assert refused(tmp_path) == f"{tmp_path}/a.parquet: column 'x' is there 2 times; names must be unique"

    def test_differing_types(self, tmp_path: Path):
        first = write(tmp_path / "a.parquet", x=[1.0, 2.0])
        second = write(tmp_path / "b.parquet", x=[1, 2])
        assert refused(tmp_path) == f"{second}: column 'x' is int64, and double in {first}"

    def test_columns_in_another_order_are_the_same_rows(self, tmp_path: Path):
        write(tmp_path / "a.parquet", x=[1.0, 2.0], z=[5.0, 6.0])
        write(tmp_path / "b.parquet", z=[5.0, 6.0], x=[1.0, 2.0])
        dataset = opened(tmp_path)
        a, b = (next(dataset.read(group, 0, 2))["features"].tolist() for group in (0, 1))
        assert a == b == [[1.0, 5.0], [2.0, 6.0]]

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            (pa.array(["a", "b"]), "string"),
            (pa.array([b"a", b"b"]), "binary"),
            (pa.array([date(2024, 1, 1)] * 2), "date32"),
            (pa.array(["a", "b"]).dictionary_encode(), "dictionary"),
            (pa.array([{"v": 1.0}] * 2), "struct"),
            (pa.array([[[1.0]], [[2.0]]]), "list<element: list"),
            (pa.array([1, 2], pa.decimal128(5)), "decimal128"),
            (pa.nulls(2), "null"),
        ],
    )
    def test_unsupported_types(self, tmp_path: Path, values: pa.Array, kind: str):
        path = write(tmp_path / "a.parquet", x=values, z=[1.0, 2.0])
        said = refused(path, features=["x", "z"])
        assert said.startswith(f"{path}: column 'x' is {kind}") and "features are integer, float or bool" in said
        said = refused(path, features=["z"], label="x")
        assert said.startswith(f"{path}: column 'x' is {kind}") and "a label is an integer, float or bool" in said
        assert opened(path).columns.features == ("z",)  # unasked, it is left aside

    def test_no_feature_at_all(self, tmp_path: Path):
        path = write(tmp_path / "a.parquet", x=["a", "b"])
        assert refused(path) == (
            f"{path}: no integer, float or bool column beside the label; name one in data.features"
        )

    def test_lists_beside_other_features_and_lists_of_nothing(self, tmp_path: Path):
        path = write(tmp_path / "a.parquet", x=[[1.0], [2.0]], z=[1.0, 2.0])
        assert refused(path, features=["x", "z"]).endswith("; a list column must be the only feature")
        path = write(tmp_path / "b.parquet", x=pa.array([[], []], pa.list_(pa.float32(), 0)))
        assert refused(path, features="x").endswith("its lists hold no values")
        path = write(tmp_path / "c.parquet", x=pa.array([None, [1.0]]))
        assert refused(path, features="x") == f"{path}: row group 0, column 'x', row 0: null"

    @pytest.mark.parametrize(("num_rows", "row"), [(20, 6), (5000, 0), (5000, 4321)])
    @pytest.mark.parametrize("width", [1, 3])
    def test_a_null_among_lists_of_fixed_size(self, tmp_path: Path, num_rows: int, row: int, width: int):
        """pyarrow reads none of them, and says neither that one is null nor of which column and row."""
        rows: list[Any] = [[0.5] * width] * num_rows
        rows[row] = None
        table = pa.table({"label": [0] * 2 * num_rows, "x": pa.array([[0.5] * width] * num_rows + rows, _fixed(width))})
        path = tmp_path / "a.parquet"
        pq.write_table(table, path, row_group_size=num_rows)
        said = f"{path}: row group 1, column 'x', row {row}: null; fill it in or leave the row out"
        assert refused(path, features="x") == said

    def test_a_null_list_that_only_predictions_keep_is_named(self, tmp_path: Path):
        lists = {"x": pa.array([[1.0], [2.0]], _fixed(1)), "kept": pa.array([[1.0], None], _fixed(1))}
        path = write(tmp_path / "a.parquet", **lists)
        dataset = opened(path, features="x")
        with pytest.raises(DataError, match="row group 0, column 'kept', row 1: null"):
            list(dataset.read_beside(0, 0, 2, also=("kept",)))

    def test_a_feature_named_twice(self, tmp_path: Path):
        path = write(tmp_path / "a.parquet", x=[1.0, 2.0])
        assert refused(path, features=["x", "x"]) == f"{path}: data.features names column 'x' more than once"


def _fixed(width: int) -> pa.DataType:
    return pa.list_(pa.float32(), width)


class TestLeftOut:
    """Columns that `features: null` does not take."""

    def test_the_index_of_a_pandas_table_is_no_feature(self, tmp_path: Path):
        """Sorted by the label and split at random, the rows' numbers would tell the label."""
        table = pd.DataFrame({"x": np.arange(10.0), "label": np.arange(10) // 5})
        table.sample(8, random_state=0).to_parquet(tmp_path / "a.parquet")
        table.to_parquet(tmp_path / "b.parquet")  # numbered without a gap: no column
        dataset = opened(tmp_path)
        assert dataset.columns.features == ("x",)
        assert dataset.left_out == (
            "data.features: null leaves out '__index_level_0__': the index of a pandas table; name it in data.features "
            "if it is a feature",
        )
        assert opened(tmp_path / "b.parquet").left_out == ()
        table.set_index("x").to_parquet(tmp_path / "named.parquet")
        assert refused(tmp_path / "named.parquet").endswith("beside the label; name one in data.features")
        assert opened(tmp_path / "named.parquet", features=["x"]).columns.features == ("x",)

    def test_a_transform_gets_every_column(self, tmp_path: Path):
        pd.DataFrame({"x": ["a", "b"], "label": [0, 1]}, index=[7, 3]).to_parquet(tmp_path / "a.parquet")
        dataset = opened(tmp_path, transform="some:function")
        assert dataset.columns.features == ("x", "__index_level_0__") and dataset.left_out == ()

    def test_each_reason_is_said_once_with_a_few_names(self, tmp_path: Path):
        columns: dict[str, Any] = {f"text{number}": ["a", "b"] for number in range(7)}
        columns |= {"embedding": [[1.0], [2.0]], "price": pa.array([1, 2], pa.decimal128(5)), "id": [1, 2]}
        for year in (2023, 2024):
            write(tmp_path / "at=home" / f"year={year}" / "a.parquet", **columns)
        said = "data.features: null leaves out "
        assert opened(tmp_path).left_out == (
            f"{said}'text0', 'text1', 'text2', 'text3', 'text4', ... (7 columns): neither integer, float nor bool",
            f"{said}'embedding': lists and images are features only where data.features names the one column",
            f"{said}'price': decimals; cast them to double to learn from them",
            f"{said}'year': held by the folders' names only, which are not read",
        )
        assert opened(tmp_path, features=["id"]).left_out == opened(tmp_path, features="embedding").left_out == ()

    def test_nothing_is_said_where_all_is_taken(self, tmp_path: Path):
        path = write(tmp_path / "year=2024" / "a.parquet", x=[1.0, 2.0], w=[1.0, 2.0])
        assert opened(path, weight="w").left_out == ()
        write(tmp_path / "year=2025" / "a.parquet", x=[1.0, 2.0], w=[1.0, 2.0], year=[2025, 2025])
        assert opened(tmp_path / "year=2025", weight="w").left_out == ()


class TestDamage:
    """Files that change or break while training."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.parquet"
        rng = np.random.default_rng(0)
        table = pa.table({"x": rng.normal(size=5000), "label": np.arange(5000)})
        pq.write_table(table, path, row_group_size=1000, compression="snappy", write_page_checksum=True)
        return path

    def test_truncated(self, path: Path):
        dataset = opened(path)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        with pytest.raises(DataError) as error:
            list(dataset.read(4, 0, 1000))
        assert error.value.message == (
            f"{path}: {size // 2} bytes now, {size} when the run started: the file was replaced while training"
        )

    def test_another_file_of_the_same_size(self, path: Path):
        dataset = opened(path)
        path.write_bytes(os.urandom(path.stat().st_size))
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: row group 1: cannot be read: "):
            list(dataset.read(1, 0, 1000))

    def test_one_flipped_bit_is_caught_by_the_pages_checksum(self, path: Path):
        dataset = opened(path)
        chunk = pq.read_metadata(path).row_group(2).column(0)
        content = bytearray(path.read_bytes())
        content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: row group 2: cannot be read: "):
            list(dataset.read(2, 0, 1000))
        assert sum(len(batch["label"]) for batch in dataset.read(3, 0, 1000)) == 1000  # the others are whole

    @pytest.mark.parametrize("claimed", [999, 1001])
    def test_a_footer_that_contradicts_itself_about_its_rows(self, path: Path, claimed: int):
        parts = _footer(path).split(_varint(1000))  # the last of each row group is its count of rows
        assert len(parts) == 1 + 5 * 5
        lie = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            lie += _varint(claimed if number % 5 == 0 else 1000) + part
        _set_footer(path, lie)
        said = f"{path}: row group 0, column 'x': the footer says {claimed} rows, and 1000 values: the file is damaged"
        assert refused(path) == said

    def test_a_footer_that_promises_too_many_rows(self, path: Path):
        _set_footer(path, _footer(path).replace(_varint(1000), _varint(1001)))
        dataset = opened(path)
        assert dataset.row_counts == (1001,) * 5
        with pytest.raises(DataError, match=r"a\.parquet: row group 0: "):
            list(dataset.read(0, 0, 1001))


def _footer(path: Path) -> bytes:
    content = path.read_bytes()
    return content[-8 - int.from_bytes(content[-8:-4], "little") : -8]


def _set_footer(path: Path, footer: bytes) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    assert len(footer) == length
    path.write_bytes(content[: -8 - length] + footer + content[-8:])


def _varint(value: int) -> bytes:
    """As Thrift's compact protocol writes an integer: zigzag, seven bits a byte."""
    value <<= 1
    return bytes([value & 0x7F | 0x80, value >> 7])


class TestLabelRange:
    def test_comes_from_the_footers(self, tmp_path: Path):
        pq.write_table(pa.table({"x": [1.0] * 4, "label": [3, 1, 7, 2]}), tmp_path / "a.parquet", row_group_size=2)
        dataset = opened(tmp_path)
        assert dataset.label_range == (1, 7)
        assert dataset.label_place(7) == f"{tmp_path}/a.parquet: row group 1"
        assert dataset.label_place(1) == f"{tmp_path}/a.parquet: row group 0"

    def test_is_unknown_without_statistics_and_for_other_labels(self, tmp_path: Path):
        table = pa.table({"x": [1.0] * 4, "label": [3, 1, 7, 2], "y": [0.5] * 4})
        pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
        assert opened(tmp_path).label_range is None
        pq.write_table(table, tmp_path / "a.parquet")
        assert opened(tmp_path, label="y").label_range is None
        assert opened(tmp_path, label=["label", "y"]).label_range is None


def test_a_column_whose_name_begins_like_another_is_not_read_with_it(tmp_path: Path):
    """pandas calls a second "x" "x.1"; in Parquet, dots also lead into structs."""
    write(tmp_path / "a.parquet", **{"x": [1.0, 2.0], "x.1": [3.0, 4.0], "s": pa.array([{"x": 9.0}] * 2)})
    dataset = opened(tmp_path, features=["x"])
    [(rows, tensors)] = dataset.read_beside(0, 0, 2)
    assert sorted(rows.schema.names) == ["label", "x"] and tensors["features"].tolist() == [[1.0], [2.0]]
    assert next(opened(tmp_path, features=["x.1"]).read(0, 0, 2))["features"].tolist() == [[3.0], [4.0]]


def test_columns_that_predictions_keep_come_beside_the_tensors(tmp_path: Path):
    path = write(tmp_path / "a.parquet", x=[1.0, 2.0], id=["a", "b"])
    dataset = open_dataset(str(path), DataConfig(train="-", label="label"), with_labels=False)
    [(rows, tensors)] = dataset.read_beside(0, 1, 2, also=("id", "x"))
    assert rows.to_pydict() == {"x": [2.0], "id": ["b"]} and set(tensors) == {"features"}
