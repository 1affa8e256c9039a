"""Predictions as Parquet: which columns a loss makes of a model's outputs, and the files they go to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs
from torch import Tensor

from distrain.data.dataset import Dataset
from distrain.data.files import filesystem
from distrain.durable import creating_folder, remove_leftovers, replacing_file
from distrain.errors import ConfigError, DataError, TrainingError

_ROW_GROUP_ROWS = 65536
_ROW_GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class OutputColumns:
    """What is written for each row, given a model's `width` outputs, by the kind of the loss:

    - classes: `prediction` (int64, the likeliest class), `probability` (float32, of that class) and, on request,
      `probabilities` (list of float32, of every class)
    - binary: `prediction` (int8, 0 or 1) and `probability` (float32, of 1)
    - numbers: `prediction` (float32)
    - a loss of the user's own (None): `prediction`, the outputs as they are (float32, or a list of it)

    With several label columns there is one of each for every label: `prediction_<label>`, `probability_<label>`.
    """

    kind: str | None  # of the loss, as LossConfig has it
    labels: tuple[str, ...]
    width: int
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.probabilities and self.kind != "classes":
            raise ConfigError("probabilities of every class are there for losses over classes only")
        if self.kind in ("numbers", "binary") and self.width != len(self.labels):
            raise TrainingError(f"the model gives {self.width} outputs for {len(self.labels)} label columns")

    @property
    def fields(self) -> list[pa.Field]:
        """Names and types of the columns, in the order of `arrays`."""
        number, whole = pa.float32(), pa.int64()
        if self.kind == "classes":
            fields = [pa.field("prediction", whole), pa.field("probability", number)]
            return [*fields, pa.field("probabilities", pa.list_(number))] if self.probabilities else fields
        if self._as_list:
            return [pa.field("prediction", pa.list_(number))]
        suffixes = [f"_{label}" for label in self.labels] if self.width > 1 else [""]
        if self.kind == "binary":
            pairs = [
                (pa.field(f"prediction{end}", pa.int8()), pa.field(f"probability{end}", number)) for end in suffixes
            ]
            return [field for pair in pairs for field in pair]
        return [pa.field(f"prediction{end}", number) for end in suffixes]

    def arrays(self, outputs: Tensor) -> list[pa.Array]:
        """The columns for the model's outputs, float32 [rows, width] (or [rows] for a width of 1)."""
        outputs = outputs.to("cpu", torch.float32).reshape(len(outputs), self.width)
        if self.kind == "classes":
            shares, likeliest = outputs.softmax(1), outputs.argmax(1)
            arrays = [_array(likeliest), _array(shares.gather(1, likeliest[:, None])[:, 0])]
            return [*arrays, _lists(shares)] if self.probabilities else arrays
        if self._as_list:
            return [_lists(outputs)]
        columns = outputs.unbind(1)
        if self.kind == "binary":
            return [_array(values) for logit in columns for values in ((logit > 0).to(torch.int8), logit.sigmoid())]
        return [_array(values) for values in columns]

    @property
    def _as_list(self) -> bool:
        return self.kind is None and self.width not in (1, len(self.labels))


class PredictionFile:
    """Writes record batches to a Parquet file in row groups of a sensible size. A context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(self._sink, schema, write_page_checksum=True)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows at the end."""
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= _ROW_GROUP_ROWS or sum(waiting.nbytes for waiting in self._waiting) >= _ROW_GROUP_BYTES:
            self._flush()

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                self._writer.close()
        finally:
            with suppress(OSError, ValueError):  # after an error nobody wants the file
                self._writer.close()
            self._sink.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema))
            self._waiting = []


def target_files(dataset: Dataset, target: str | Path) -> dict[Path, list[int]]:
    """Which files to write, and which of the data set's files (by number) go into each.

    One file where `target` ends in .parquet, else a file for each input file in the folder `target`. Raises ConfigError
    where that would overwrite the input, or mix with other Parquet files in the folder.
    """
    if "://" in str(target):
        raise ConfigError(f"{target}: predictions are written to a path on this machine, not to a URI")
    output = Path(target)
    if output.suffix == ".parquet":
        if output.is_dir():
            raise ConfigError(f"{output}: is a folder; name a file, or a folder without .parquet at its end")
        targets = {output: list(range(len(dataset.files)))}
    else:
        names = [Path(file.path.partition("?")[0]).name.removesuffix(".parquet") for file in dataset.files]
        clash = len(set(names)) < len(names)  # of files in different folders
        targets = {
            output / (f"{number:05d}-{name}.parquet" if clash else f"{name}.parquet"): [number]
            for number, name in enumerate(names)
        }
        others = [path.name for path in output.glob("*.parquet") if path not in targets]
        if others:
            raise ConfigError(f"{output}: holds other Parquet files ({others[0]}); name another folder")
    places = [filesystem(file.path) for file in dataset.files]
    inputs = {Path(path).resolve() for files, path in places if isinstance(files, fs.LocalFileSystem)}
    for target in targets:
        if target.resolve() in inputs:
            raise ConfigError(f"{target}: is a file of the data itself; name another output")
    return targets


def kept_fields(dataset: Dataset, names: Sequence[str], written: Sequence[str]) -> list[pa.Field]:
    """The fields of the input columns to copy. Raises DataError where a file lacks one or has it with another type,
    ConfigError where a prediction has the same name."""
    for name in names:
        if name in written or list(names).count(name) > 1:
            raise ConfigError(f"column {name!r} would be there twice in the output")
    fields: list[pa.Field] = []
    for file in dataset.files if names else ():
        files, path = filesystem(file.path)
        try:
            with files.open_input_file(path) as source:
                schema = pq.read_schema(source)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file.path}: cannot be read: {error}") from error
        for name in names:
            if schema.names.count(name) != 1:
                near = get_close_matches(name, schema.names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"{file.path}: no column {name!r} to keep{hint}")
        here = [schema.field(name).remove_metadata().with_nullable(True) for name in names]
        fields = fields or here
        for field, first in zip(here, fields, strict=True):
            if field.type != first.type:
                first_path = dataset.files[0].path
                raise DataError(f"{file.path}: column {field.name!r} is {field.type}, and {first.type} in {first_path}")
    return fields


@contextmanager
def all_or_nothing(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Give a hidden path for each target; they get their names when the block ends well and are removed when not.

    Raises DataError with path and reason for what the file system refuses.
    """
    folder = targets[0].parent
    try:
        with ExitStack() as stack:
            stack.enter_context(creating_folder(folder))
            remove_leftovers(folder)
            yield [stack.enter_context(replacing_file(target)) for target in targets]
    except OSError as error:
        raise DataError(f"{folder}: predictions cannot be written: {error.strerror or error}") from error


def _array(values: Tensor) -> pa.Array:
    return pa.array(values.contiguous().numpy())


def _lists(values: Tensor) -> pa.Array:
    """[rows, width] -> a list of `width` numbers for each row."""
    offsets = torch.arange(len(values) + 1, dtype=torch.int32) * values.shape[1]
    return pa.ListArray.from_arrays(_array(offsets), _array(values.flatten()))
