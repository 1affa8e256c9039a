"""Which columns of a schema become features, label and weight, and what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch

import pyarrow as pa

from distrain.config import DataConfig
from distrain.data.columns import Columns, is_number, is_number_list, type_name
from distrain.data.images import is_encoded
from distrain.errors import DataError


def choose_columns(
    schema: pa.Schema, path: str, data: DataConfig, with_labels: bool, vocabulary: int | None
) -> Columns:
    """Features and labels, from the first file's schema."""
    labels = (data.label,) if isinstance(data.label, str) else tuple(data.label)
    names = Counter(schema.names)
    if with_labels:
        for name in labels:
            _check_there(names, name, path, "data.label")
        if data.weight is not None:
            _check_there(names, data.weight, path, "data.weight")
            if data.weight in labels:
                raise DataError(f"{path}: column {data.weight!r} is both the label and the weight")
    features = _features(schema, path, data, labels)
    beside = labels if data.weight is None else (*labels, data.weight)
    kinds = {name: schema.field(name).type for name in (*features, *beside) if name in names}
    is_list = is_image = False
    ragged = data.ragged or vocabulary is not None
    width: int | None = len(features)
    if data.transform is None:
        is_list = len(features) == 1 and is_number_list(kinds[features[0]])
        is_image = len(features) == 1 and is_encoded(kinds[features[0]])
        _check_ragged(path, data, features, kinds, vocabulary)
        for name in features:
            if not is_list and not is_image and not is_number(kinds[name]):
                what = "a list" if is_number_list(kinds[name]) else "an image" if is_encoded(kinds[name]) else None
                hint = f"; {what} column must be the only feature" if what is not None else ""
                raise DataError(
                    f"{path}: column {name!r} is {kinds[name]}: features are integer, float or bool columns, or one "
                    f"list column of them, or one column of encoded images (binary){hint}"
                )
        for name in labels if with_labels else ():
            if not is_number(kinds[name]):
                raise DataError(f"{path}: column {name!r} is {kinds[name]}: a label is an integer, float or bool")
    if with_labels and data.weight is not None and not is_number(kinds[data.weight]):
        raise DataError(
            f"{path}: column {data.weight!r} is {kinds[data.weight]}: a weight is an integer, float or bool"
        )
    if data.transform is not None or is_image or ragged:
        width = None
    elif is_list:
        fixed = pa.types.is_fixed_size_list(kinds[features[0]])
        width = kinds[features[0]].list_size if fixed else None
        if width == 0:
            raise DataError(f"{path}: column {features[0]!r} is {kinds[features[0]]}: its lists hold no values")
    return Columns(
        features=features,
        labels=labels,
        types=tuple((name, type_name(kind)) for name, kind in kinds.items()),
        num_features=width,
        feature_list=is_list,
        label_is_integer=len(labels) == 1 and with_labels and bool(pa.types.is_integer(kinds[labels[0]])),
        transform=data.transform,
        weight=data.weight if with_labels else None,
        ragged=ragged,
        vocabulary=vocabulary,
    )


def _check_ragged(
    path: str, data: DataConfig, features: tuple[str, ...], kinds: dict[str, pa.DataType], vocabulary: int | None
) -> None:
    """Rows of different length come from one list column; token ids are integers."""
    if not data.ragged and vocabulary is None:
        return
    key, of = ("model: text", "integers") if vocabulary is not None else ("data.ragged", "numbers")
    kind = kinds[features[0]]
    good = len(features) == 1 and is_number_list(kind)
    if not good or (vocabulary is not None and not pa.types.is_integer(kind.value_type)):
        raise DataError(
            f"{path}: {key} takes one column of lists of {of} (data.features), and not "
            + ", ".join(f"{name!r}, {kinds[name]}" for name in features[:3])
        )


def _features(schema: pa.Schema, path: str, data: DataConfig, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The feature columns that the configuration names."""
    beside = labels if data.weight is None else (*labels, data.weight)
    others = [name for name in schema.names if name not in beside]
    if data.features is None:
        unwanted = {*beside, *_pandas_index(schema)}
        kinds = zip(schema.names, schema.types, strict=True)
        numbers = [name for name, kind in kinds if is_number(kind) and name not in unwanted]
        chosen = others if data.transform is not None else numbers
        if not chosen:
            raise DataError(f"{path}: no integer, float or bool column beside the label; name one in data.features")
    elif isinstance(data.features, str) and set("*?[") & set(data.features):
        chosen = [name for name in others if fnmatch(name, data.features)]
        if not chosen:
            raise DataError(f"{path}: data.features {data.features!r} matches none of the columns {_listed(others)}")
    else:
        chosen = [data.features] if isinstance(data.features, str) else list(data.features)
    names, times = Counter(schema.names), Counter(chosen)
    for name in chosen:
        _check_there(names, name, path, "data.features")
        if name in beside:
            raise DataError(
                f"{path}: column {name!r} is both a feature and the {'label' if name in labels else 'weight'}"
            )
        if times[name] > 1:
            raise DataError(f"{path}: data.features names column {name!r} more than once")
    return tuple(chosen)


def _pandas_index(schema: pa.Schema) -> frozenset[str]:
    """The columns that were the index of a pandas table: as a rule the rows' numbers, which are no features."""
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    return frozenset(name for name in index if isinstance(name, str))  # a plain range is no column


def left_out(schema: pa.Schema, paths: Iterable[str], columns: Columns) -> tuple[str, ...]:
    """What `data.features: null` leaves out, a line for each reason: columns of the first file, and keys in folders'
    names (year=2024) that tell the files apart."""
    index, taken = _pandas_index(schema), {name for name, _ in columns.types}
    names: dict[str, list[str]] = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name not in taken:
            names.setdefault(_reason(kind, name in index), []).append(name)
    if keys := [key for key in _folder_keys(paths) if key not in schema.names]:
        names["held by the folders' names only, which are not read"] = keys
    return tuple(f"data.features: null leaves out {_listed(those, 5)}: {reason}" for reason, those in names.items())


def _reason(kind: pa.DataType, is_index: bool) -> str:
    if is_index:
        return "the index of a pandas table; name it in data.features if it is a feature"
    if pa.types.is_decimal(kind):
        return "decimals; cast them to double to learn from them"
    if is_number_list(kind) or is_encoded(kind):
        return "lists and images are features only where data.features names the one column"
    return "neither integer, float nor bool"


def _folder_keys(paths: Iterable[str]) -> list[str]:
    """The keys of folders that are called key=value, as Hive does, with more than one value."""
    values: dict[str, set[str]] = {}
    for path in paths:
        for part in (path.partition("?")[0] if "://" in path else path).split("/")[:-1]:
            key, is_pair, value = part.partition("=")
            if is_pair:
                values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _check_there(names: Counter[str], name: str, path: str, key: str) -> None:
    count = names[name]
    if count == 0:
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {_listed([*names])}"
        raise DataError(f"{path}: no column {name!r} ({key}){hint}")
    if count > 1:
        raise DataError(f"{path}: column {name!r} is there {count} times; names must be unique")


def check_columns(path: str, schema: pa.Schema, columns: Columns, first: str) -> None:
    """Every file must have the columns, with the first file's types: pyarrow would fill in nulls or cast."""
    names, types = Counter(schema.names), dict(columns.types)
    for name in columns.read:
        _check_there(names, name, path, f"as in {first}")
        kind = type_name(schema.field(name).type)
        if kind != types[name]:
            raise DataError(f"{path}: column {name!r} is {kind}, and {types[name]} in {first}")


def have_columns(schemas: Iterable[pa.Schema], columns: Columns, names: Iterable[str]) -> bool:
    """Whether every file has these columns, once, with the types of `columns`."""
    types = dict(columns.types)
    return all(
        schema.names.count(name) == 1 and type_name(schema.field(name).type) == types.get(name)
        for schema in schemas
        for name in names
    )


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown}, ... ({len(names)} columns)" if len(names) > most else shown
