"""Finding files, comparing schemas, reading rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distrain.config import DataConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.data.statistics import measure
from distrain.errors import DataError, TrainingError
from tests.support.jobs import write_rows


def opened(path: Path | str | list[str], **data) -> Dataset:
    values = {"train": "given apart", "label": "label", **data}
    return open_dataset(path if isinstance(path, list) else str(path), DataConfig(**values))


def everything(dataset: Dataset) -> dict[str, torch.Tensor]:
    batches = [batch for number, rows in enumerate(dataset.row_counts) for batch in dataset.read(number, 0, rows)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def write(path: Path, row_group_size: int = 10, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


class TestFindingFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_rows(tmp_path / "a", 20, files=2)
        write_rows(tmp_path / "a" / "deep", 20, files=1)
        write_rows(tmp_path / "b", 20, files=1)
        for ignored in ("a/_metadata", "a/.part.crc", "a/_temporary/part-9.parquet"):
            (tmp_path / ignored).parent.mkdir(exist_ok=True)
            (tmp_path / ignored).write_text("not rows")
        return tmp_path

    @pytest.mark.parametrize(
        ("path", "names"),
        [
            ("a", ["a/deep/part-0", "a/part-0", "a/part-1"]),
            ("a/part-1.parquet", ["a/part-1"]),
            ("a/*.parquet", ["a/part-0", "a/part-1"]),
            ("*/part-0.parquet", ["a/part-0", "b/part-0"]),
            ("**/part-0.parquet", ["a/deep/part-0", "a/part-0", "b/part-0"]),
            ("a/part-[1-9].parquet", ["a/part-1"]),
        ],
    )
    def test_files_folders_and_globs(self, folder: Path, path: str, names: list[str]):
        found = [Path(file.path).relative_to(folder).with_suffix("") for file in opened(folder / path).files]
        assert [str(name) for name in found] == names

    def test_lists_and_relative_paths(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(folder)
        dataset = opened(["b", "a/part-0.parquet"])
        assert [file.path for file in dataset.files] == [f"{folder}/b/part-0.parquet", f"{folder}/a/part-0.parquet"]
        with pytest.raises(DataError, match="named more than once"):
            opened(["b", "b/part-0.parquet"])


class TestColumns:
    @pytest.mark.parametrize(
        "kind", [pa.int8(), pa.uint16(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()]
    )
    def test_numeric_types_become_float32(self, tmp_path: Path, kind: pa.DataType):
        values = np.array([0, 1, 1, 0], dtype=np.float16)
        column = pa.array(values.astype(bool) if pa.types.is_boolean(kind) else values.astype(kind.to_pandas_dtype()))
        write(tmp_path / "x.parquet", x=column, label=[1.5, 2.5, 3.5, 4.5])
        rows = everything(opened(tmp_path))
        assert rows["features"].dtype == torch.float32 and rows["features"].tolist() == [[0], [1], [1], [0]]
        assert rows["label"].dtype == torch.float32

    @pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.uint8(), 3), pa.large_list(pa.int32())])
    def test_one_list_column(self, tmp_path: Path, kind: pa.DataType):
        write(tmp_path / "x.parquet", x=pa.array([[1, 2, 3], [4, 5, 6]], kind), label=[0, 1])
        dataset = opened(tmp_path, features="x")
        assert dataset.columns.num_features == 3
        rows = everything(dataset)
        assert rows["features"].tolist() == [[1, 2, 3], [4, 5, 6]] and rows["label"].dtype == torch.int64

    @pytest.mark.parametrize(
        ("lists", "said"),
        [
            ([[1.0, 2.0], [3.0]], "column 'x', row 1: a list of 1 values where the first row of the data has 2"),
            ([[1.0, 2.0], None], "column 'x', row 1: null"),
            ([[1.0, 2.0], [3.0, None]], "column 'x', row 1: a null in the list"),
            ([[1.0, 2.0], [float("nan"), 1.0]], "column 'x', row 1: nan is not finite"),
            ([[], [1.0]], "column 'x', row 0: an empty list"),
        ],
    )
    def test_bad_lists(self, tmp_path: Path, lists: list, said: str):
        write(tmp_path / "x.parquet", x=pa.array(lists, pa.list_(pa.float32())), label=[0] * len(lists))
        with pytest.raises(DataError) as error:
            everything(opened(tmp_path, features="x"))
        assert error.value.message.startswith(f"{tmp_path / 'x.parquet'}: row group 0, {said}")

    def test_several_labels(self, tmp_path: Path):
        write(tmp_path / "x.parquet", x=[1.0, 2.0], a=[1, 0], b=[True, False])
        rows = everything(opened(tmp_path, label=["a", "b"]))
        assert rows["label"].tolist() == [[1, 1], [0, 0]] and rows["label"].dtype == torch.float32

    def test_a_glob_of_names_and_a_list(self, tmp_path: Path):
        write_rows(tmp_path, 20)
        assert opened(tmp_path, features="f[12]").columns.features == ("f1", "f2")
        assert opened(tmp_path, features=["f3", "f0"]).columns.features == ("f3", "f0")
        with pytest.raises(DataError, match="matches none of the columns"):
            opened(tmp_path, features="g*")
        with pytest.raises(DataError, match="both a feature and the label"):
            opened(tmp_path, features=["f1", "label"])

    def test_only_the_columns_needed_are_read(self, tmp_path: Path):
        """An unused column of damaged bytes does no harm."""
        path = write(tmp_path / "x.parquet", x=np.arange(100.0), unused=np.arange(100.0) + 0.5, label=np.zeros(100))
        column = pq.read_metadata(path).row_group(0).column(1)
        content = bytearray(path.read_bytes())
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(content)
        with pytest.raises(DataError, match="row group 0: cannot be read"):
            everything(opened(tmp_path))
        assert everything(opened(tmp_path, features=["x"]))["features"].shape == (100, 1)


class TestReading:
    def test_any_part_of_a_row_group(self, tmp_path: Path):
        dataset = opened(write(tmp_path / "x.parquet", 1000, x=np.arange(1000.0), label=np.arange(1000)))
        for start, stop in [(0, 1000), (0, 1), (999, 1000), (300, 777), (5, 5)]:
            labels = [label for batch in dataset.read(0, start, stop) for label in batch["label"].tolist()]
            assert labels == list(range(start, stop))

    @pytest.mark.parametrize(("name", "ragged"), [("x", False), ("a.b", False), ("x", True)])
    def test_lists_that_lie_in_the_file_in_little_are_read_in_small_batches(
        self, tmp_path: Path, name: str, ragged: bool
    ):
        zeros = pa.FixedSizeListArray.from_arrays(np.zeros(5000 * 1000, np.float32), 1000)
        path = write(tmp_path / "x.parquet", 5000, **{name: zeros.cast(pa.list_(pa.float32())), "label": [0] * 5000})
        assert path.stat().st_size < 100_000
        dataset = opened(path, features=[name], ragged=ragged)
        sizes = [batch["features"].nbytes for batch in dataset.read(0, 0, 5000)]
        assert len(sizes) == 10 and max(sizes) < 3 << 20

    def test_columns_that_are_kept_count_as_well(self, tmp_path: Path):
        text = [f"{row:4000}" for row in range(3000)]
        dataset = opened(write(tmp_path / "x.parquet", 3000, x=np.arange(3000.0), text=text, label=[0] * 3000))
        assert len(list(dataset.read(0, 0, 3000))) == 1
        rows = [beside.num_rows for beside, _ in dataset.read_beside(0, 0, 3000, ("text", "x"))]
        assert sum(rows) == 3000 and max(rows) * 4000 < 3 << 20

    def test_a_replaced_or_deleted_file_is_named(self, tmp_path: Path):
        path = write(tmp_path / "x.parquet", x=np.arange(50.0), label=np.arange(50))
        dataset = opened(tmp_path)
        write(path, x=np.arange(90.0), label=np.arange(90))
        with pytest.raises(DataError, match=r"x.parquet: .* the file was replaced while training"):
            everything(dataset)
        path.unlink()
        with pytest.raises(DataError, match=r"x.parquet: row group 0: cannot be read"):
            everything(dataset)

    def test_the_fingerprint_follows_the_rows_not_the_folder(self, tmp_path: Path):
        a, b = write_rows(tmp_path / "a", 50), write_rows(tmp_path / "b", 50)
        assert opened(a).fingerprint == opened(b).fingerprint
        assert opened(a).fingerprint != opened(write_rows(tmp_path / "c", 51)).fingerprint

    def test_no_rows_at_all(self, tmp_path: Path):
        write(tmp_path / "x.parquet", x=pa.array([], pa.float32()), label=pa.array([], pa.int64()))
        with pytest.raises(DataError, match="1 files, and no rows in them"):
            opened(tmp_path)

    def test_validation_must_have_the_training_columns(self, tmp_path: Path):
        train = opened(write_rows(tmp_path / "a", 20))
        write(tmp_path / "b" / "x.parquet", f0=pa.array([1.0], pa.float32()), label=[0])
        with pytest.raises(DataError, match="no column 'f1'"):
            open_dataset(str(tmp_path / "b"), DataConfig(train="-", label="label"), like=train)


class TestTransform:
    @pytest.fixture
    def rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "hooks_of_test.py").write_text(
            "import torch\n"
            "def good(batch):\n"
            "    f0 = torch.tensor(batch.column('f0').to_numpy())\n"
            "    return {'wide': f0[:, None].repeat(1, 5), 'label': torch.tensor(batch.column('label').to_numpy())}\n"
            "def wrong_rows(batch):\n"
            "    return {'x': torch.zeros(1), 'label': torch.zeros(1)}\n"
            "def no_label(batch):\n"
            "    return {'x': torch.zeros(batch.num_rows), 'y': torch.zeros(batch.num_rows)}\n"
            "def raises(batch):\n"
            "    raise RuntimeError('my own mistake')\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return write_rows(tmp_path / "rows", 20)

    def test_its_tensors_are_the_models_inputs(self, rows: Path):
        tensors = everything(opened(rows, transform="hooks_of_test:good"))
        assert tensors["wide"].shape == (20, 5) and tensors["label"].shape == (20,)

    @pytest.mark.parametrize(
        ("hook", "said"),
        [
            ("wrong_rows", r"returned 'x' of shape \(1,\) for 10 rows"),
            ("no_label", 'it needs "label" and at least one input'),
            ("raises", r"raised RuntimeError: my own mistake\nTraceback"),
        ],
    )
    def test_its_mistakes_are_shown(self, rows: Path, hook: str, said: str):
        with pytest.raises(TrainingError, match=said):
            everything(opened(rows, transform=f"hooks_of_test:{hook}"))


def test_statistics_in_one_pass_agree_with_numpy(tmp_path: Path):
    rng = np.random.default_rng(0)
    values = rng.normal(1e3, 0.1, size=(500, 2))
    write(tmp_path / "x.parquet", 33, a=values[:, 0], b=values[:, 1], constant=np.full(500, 7.0), label=np.zeros(500))
    found = measure(opened(tmp_path), True)
    mean, deviation = found.mean, found.deviation
    kept = values.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(mean.numpy()[:2], kept.mean(0), rtol=1e-7)
    np.testing.assert_allclose(deviation.numpy()[:2], kept.std(0), rtol=1e-5)
    assert (mean[2].item(), deviation[2].item()) == (7.0, 1.0)


def test_constant_features_are_seen_in_the_footers(tmp_path: Path):
    def is_constant(*values: float, last: float = 1.0, **data) -> bool:
        table = pa.table({"x": [*values, last], "z": [2.0] * (len(values) + 1), "y": list(range(len(values) + 1))})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
        return open_dataset(str(tmp_path), DataConfig(train="-", label="y", **data)).is_constant

    assert is_constant(1.0, 1.0, 1.0) and is_constant(1.0, 2.0, 3.0, features="z")
    assert not is_constant(1.0, 1.0, 1.0, last=2.0) and not is_constant(1.0, 2.0)
    assert not is_constant(1.0, 1.0, 2.0, last=2.0)  # constant within each row group, but not over all
    for name in ("x", "x.v1"):
        lists = pa.table({name: [[1.0, 1.0], [1.0, 1.0]], "y": [0, 1]})
        pq.write_table(lists, tmp_path / "rows.parquet")
        assert open_dataset(str(tmp_path), DataConfig(train="-", label="y", features=name)).is_constant
