"""A data set of Parquet files: footers at the start, rows when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from distrain.config import DataConfig
from distrain.data.columns import Columns
from distrain.data.files import filesystem, find_files
from distrain.data.images import Shape, image_shape
from distrain.data.location import Location, null_error
from distrain.data.ragged import RawBatch
from distrain.data.schema import check_columns, choose_columns, have_columns, left_out
from distrain.errors import DataError

_FOOTER_THREADS = 8
_BATCH_BYTES = 2 << 20  # of one decoded batch: small enough for the cache
_BUFFER_BYTES = 1 << 20
_VALUE_BYTES = 4  # of a number, as float32
_LOOK_ROWS = 1024  # of a batch in which a null is looked for
_READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError)


@dataclass(frozen=True)
class DataFile:
    """One Parquet file, from its footer."""

    path: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True)
class RowGroup:
    """One row group: in which file (by number), which one there, and how large."""

    file: int
    index: int
    num_rows: int
    num_bytes: int  # of the columns read, decoded
    label_min: int | None = None  # of one integer label column, where the footer says
    label_max: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Parquet files read as one. Small: it travels to every worker, and each opens the files itself."""

    source: str
    files: tuple[DataFile, ...]
    row_groups: tuple[RowGroup, ...]
    columns: Columns
    fingerprint: str
    is_constant: bool = False  # every feature has one value in all rows, as the footers say
    left_out: tuple[str, ...] = ()  # columns that nobody named and that are no features: a line for each reason

    @cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of each row group, over all files in order."""
        return tuple(group.num_rows for group in self.row_groups)

    @cached_property
    def num_rows(self) -> int:
        return sum(self.row_counts)

    @cached_property
    def label_range(self) -> tuple[int, int] | None:
        """Least and greatest value of an integer label, if every footer gives them."""
        lows = [g.label_min for g in self.row_groups if g.num_rows]
        highs = [g.label_max for g in self.row_groups if g.num_rows]
        if any(value is None for value in [*lows, *highs]):
            return None
        return min(v for v in lows if v is not None), max(v for v in highs if v is not None)

    def label_place(self, value: int) -> str:
        """File and row group where the footers show this least or greatest label."""
        group = next(g for g in self.row_groups if value in (g.label_min, g.label_max))
        return str(Location(self.files[group.file].path, group.index))

    def place(self, row_group: int) -> Location:
        """Where a row group lies."""
        group = self.row_groups[row_group]
        return Location(self.files[group.file].path, group.index)

    def read(self, row_group: int, start: int, stop: int) -> Iterator[RawBatch]:
        """Rows [start, stop) of a row group, in order, as batches of tensors of a few MB.

        Only the columns needed are read. Raises DataError naming file, row group and column.
        """
        for _, tensors in self.read_beside(row_group, start, stop):
            yield tensors

    def read_beside(
        self, row_group: int, start: int, stop: int, also: tuple[str, ...] = ()
    ) -> Iterator[tuple[pa.RecordBatch, RawBatch]]:
        """As `read`, with the Arrow rows beside their tensors; they hold the columns named in `also` too."""
        group = self.row_groups[row_group]
        file = self.files[group.file]
        where = Location(file.path, group.index)
        position = 0
        try:
            for batch in self._batches(file, group, also):
                first = max(start, position)
                position += batch.num_rows
                if position <= first:
                    continue
                count = min(stop, position) - first
                if count > 0:
                    rows = batch.slice(first - (position - batch.num_rows), count)
                    needed = rows.select(self.columns.read) if also else rows
                    yield rows, self.columns.to_tensors(needed, Location(file.path, group.index, first))
                if position >= stop and stop < group.num_rows:
                    return
        except _READ_ERRORS as error:
            null = _null_list(where, (*self.columns.read, *also)) if isinstance(error, pa.ArrowInvalid) else None
            raise null or DataError(f"{where}: cannot be read: {_said(error)}") from error
        if position != group.num_rows:
            raise DataError(f"{where}: the footer says {group.num_rows} rows, and {position} came: the file is damaged")

    def _batches(self, file: DataFile, group: RowGroup, also: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        files, path = filesystem(file.path)
        with files.open_input_file(path) as source:
            if source.size() != file.size_bytes:
                raise DataError(
                    f"{file.path}: {source.size()} bytes now, {file.size_bytes} when the run started: the file was "
                    "replaced while training"
                )
            parquet = pq.ParquetFile(
                source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            beside = _leaves(parquet.metadata.row_group(group.index), {*also} - {*self.columns.read})
            num_bytes = group.num_bytes + sum(_num_bytes(column) for _, column in beside)
            row_bytes = max(1, num_bytes // max(1, group.num_rows), prod(self.columns.image_shape or (0,)))
            batch_rows = max(256, min(65536, _BATCH_BYTES // row_bytes))
            yield from parquet.iter_batches(
                batch_rows,
                row_groups=[group.index],
                columns=list(dict.fromkeys((*self.columns.read, *also))),
                use_threads=False,
            )


def open_dataset(
    paths: str | list[str],
    data: DataConfig,
    like: Dataset | None = None,
    with_labels: bool = True,
    vocabulary: int | None = None,
) -> Dataset:
    """Open a data set by reading every file's footer.

    `like`: a data set whose columns this one must have (validation has the training set's). `with_labels=False` opens
    rows for prediction, which need no label: only a transform is given it, where every file has it, of one type; it may
    hold nulls. With a `vocabulary`
    features are lists of token ids below it, of any length. Raises DataError naming file and column.
    """
    found = find_files(paths)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda entry: _footer(entry[0]), found))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    first_path, first = found[0][0], schemas[0]
    columns = like.columns if like is not None else choose_columns(first, first_path, data, with_labels, vocabulary)
    if not with_labels:
        is_shown = columns.transform is not None and have_columns(schemas, columns, columns.labels)
        columns = replace(columns, labels=columns.labels if is_shown else (), label_is_integer=False, weight=None)
    for (path, _), schema in zip(found, schemas, strict=True):
        check_columns(path, schema, columns, first_path if like is None else like.files[0].path)
    label = columns.labels[0] if len(columns.labels) == 1 and columns.label_is_integer else None
    files = tuple(DataFile(path, size, footer.num_rows) for (path, size), footer in zip(found, footers, strict=True))
    groups = tuple(
        _row_group(number, files[number].path, footer, index, columns, label)
        for number, footer in enumerate(footers)
        for index in range(footer.num_row_groups)
    )
    source = paths if isinstance(paths, str) else ", ".join(paths)
    dataset = Dataset(source, files, groups, columns, _fingerprint(files, groups, columns))
    if dataset.num_rows == 0:
        raise DataError(f"{source}: {len(files)} files, and no rows in them")
    if columns.transform is None and columns.num_features is None and not columns.ragged:
        dataset = replace(dataset, columns=_with_width(dataset))
    unused = left_out(first, [path for path, _ in found], columns) if like is None and data.features is None else ()
    return replace(dataset, is_constant=_is_constant(footers, columns), left_out=unused)


def _is_constant(footers: list[pq.FileMetaData], columns: Columns) -> bool:
    """Whether the footers' statistics show one value for every feature. Looks no further than the first that varies."""
    if columns.transform is not None:
        return False
    places = [_places(footer) for footer in footers]
    for feature in columns.features:
        value = None
        for footer, place in zip(footers, places, strict=True):
            for index in range(footer.num_row_groups):
                group = footer.row_group(index)
                found = group.column(place[feature]).statistics
                if not group.num_rows:
                    continue
                if found is None or not found.has_min_max or found.min != found.max or value not in (None, found.min):
                    return False
                value = found.min
    return True


def _places(footer: pq.FileMetaData) -> dict[str, int]:
    """Where a row group holds each column, by its name; the first leaf of a nested one, whose name may have dots."""
    leaves = [footer.schema.column(number).path for number in range(footer.num_columns)]
    firsts: dict[str, int] = {}
    for number, path in enumerate(leaves):
        parts = path.split(".")
        for depth in range(1, len(parts)):
            firsts.setdefault(".".join(parts[:depth]), number)
    return firsts | {path: number for number, path in enumerate(leaves)}


def _footer(path: str) -> pq.FileMetaData:
    files, inner = filesystem(path)
    try:
        with files.open_input_file(inner) as source:
            return pq.read_metadata(source)
    except _READ_ERRORS as error:
        raise DataError(f"{path}: not a readable Parquet file: {_said(error)}") from error


def _row_group(
    file: int, path: str, footer: pq.FileMetaData, index: int, columns: Columns, label: str | None
) -> RowGroup:
    group = footer.row_group(index)
    num_bytes, low, high = 0, None, None
    for name, column in _leaves(group, set(columns.read)):
        num_bytes += _num_bytes(column)
        is_flat = column.path_in_schema == name
        if column.num_values < group.num_rows or (is_flat and column.num_values > group.num_rows):
            raise DataError(
                f"{Location(path, index)}, column {name!r}: the footer says {group.num_rows} rows, and "
                f"{column.num_values} values: the file is damaged"
            )
        statistics = column.statistics if column.path_in_schema == label else None
        if statistics is not None and statistics.has_min_max:
            low, high = int(statistics.min), int(statistics.max)
    return RowGroup(file, index, group.num_rows, num_bytes, low, high)


def _leaves(group: pq.RowGroupMetaData, wanted: set[str]) -> Iterator[tuple[str, pq.ColumnChunkMetaData]]:
    """What a row group stores of the columns wanted: each one's name, which may have dots, and its parts."""
    for number in range(group.num_columns) if wanted else ():
        column = group.column(number)
        name = column.path_in_schema
        while name and name not in wanted:
            name = name.rpartition(".")[0]
        if name:
            yield name, column


def _num_bytes(column: pq.ColumnChunkMetaData) -> int:
    """How much memory a column takes, about: values that repeat lie in the file in less."""
    return int(max(column.total_uncompressed_size, column.num_values * _VALUE_BYTES))


def _with_width(dataset: Dataset) -> Columns:
    """The columns with the lists' width, or the images' shape, which only the first row knows."""
    columns = dataset.columns
    group = next(g for g in dataset.row_groups if g.num_rows)
    file = dataset.files[group.file]
    files, path = filesystem(file.path)
    name = columns.features[0]
    where = Location(file.path, group.index)
    try:
        with files.open_input_file(path) as source:
            parquet = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            batch = next(parquet.iter_batches(1, row_groups=[group.index], columns=[name], use_threads=False))
    except _READ_ERRORS as error:
        raise DataError(f"{where}, column {name!r}: cannot be read: {_said(error)}") from error
    if not columns.feature_list:
        shape: Shape = image_shape(batch.column(0), name, where)
        return replace(columns, num_features=prod(shape), image_shape=shape)
    first = batch.column(0)[0].as_py()
    if not first:
        raise DataError(f"{where}, column {name!r}, row 0: {'null' if first is None else 'an empty list'}")
    return replace(columns, num_features=len(first))


def _null_list(where: Location, names: tuple[str, ...]) -> DataError | None:
    """The error of a row group's first null among lists of fixed size, if there is one: pyarrow reads no such lists
    where one of them is null, and names neither column nor row."""
    files, path = filesystem(where.file)
    with suppress(*_READ_ERRORS), files.open_input_file(path) as source:
        footer = pq.read_metadata(source)
        schema = footer.schema.to_arrow_schema()
        parquet = pq.ParquetFile(source, metadata=_of_parquets_types(footer), pre_buffer=False)
        for name in names:
            index = schema.get_field_index(name)
            if index < 0 or not pa.types.is_fixed_size_list(schema.field(index).type):
                continue
            first = 0
            for batch in parquet.iter_batches(_LOOK_ROWS, [where.row_group], [name], use_threads=False):
                if batch.column(0).null_count:
                    return null_error(batch.column(0), name, replace(where, first_row=first))
                first += batch.num_rows
    return None


def _of_parquets_types(footer: pq.FileMetaData) -> pq.FileMetaData:
    """A footer without Arrow's own types, which Parquet keeps beside its own: its lists are of any length."""
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return pq.read_metadata(pa.BufferReader(sink.getvalue().to_pybytes().replace(b"ARROW:schema", b"arrow:schema")))


def _fingerprint(files: tuple[DataFile, ...], groups: tuple[RowGroup, ...], columns: Columns) -> str:
    """SHA-256 over names, sizes and rows of the files and the columns read: the same rows in the same order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{_name(file.path)} {file.size_bytes} {file.num_rows}\n".encode())
    digest.update(" ".join(str(group.num_rows) for group in groups).encode())
    digest.update(repr(columns.types).encode())
    return digest.hexdigest()


def _name(path: str) -> str:
    """A file's own name, the same whether it is reached by path or by URI."""
    return unquote(path.partition("?")[0].rpartition("/")[2]) if "://" in path else path.rpartition("/")[2]


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
