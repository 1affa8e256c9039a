"""Encoded images -> pixels, decoded by Pillow."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from distrain.data.location import Location, null_error
from distrain.errors import DataError

Shape = tuple[int, int, int]  # channels, height, width

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no formats for which Pillow starts other programs
_AS = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}  # what the other modes are decoded to
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column's type may hold encoded images."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def image_shape(array: pa.Array, name: str, where: Location) -> Shape:
    """Channels, height and width of a column's first image. Raises DataError as `image_column` does."""
    if array.null_count:
        raise null_error(array, name, where)
    return _decode(array[0].as_py(), f"{where}, column {name!r}, row {where.first_row}", None)[1]


def image_column(array: pa.Array, name: str, where: Location, shape: Shape) -> NDArray[np.uint8]:
    """A column of encoded images as uint8 [rows, channels, height, width].

    Raises DataError naming file, row group, column and row for a null, bytes that are no PNG, JPEG, WebP or BMP, or an
    image of another shape than `shape`: nothing is scaled or converted between grey and colour.
    """
    if array.null_count:
        raise null_error(array, name, where)
    pixels = np.empty((len(array), *shape), dtype=np.uint8)
    for row, content in enumerate(array):
        pixels[row], _ = _decode(content.as_py(), f"{where}, column {name!r}, row {where.first_row + row}", shape)
    return pixels


def _decode(content: bytes, place: str, expected: Shape | None) -> tuple[NDArray[np.uint8], Shape]:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            mode = _AS.get(image.mode, image.mode)
            if mode not in _CHANNELS:
                raise DataError(f"{place}: an image of Pillow's mode {image.mode}; images have 8 bits a channel")
            shape = (_CHANNELS[mode], image.height, image.width)
            if expected is not None and shape != expected:  # before its pixels take memory
                raise DataError(
                    f"{place}: an image of {_by(shape)} (channels x height x width) where {_by(expected)} is expected"
                )
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except _ERRORS as error:
        said = "not a PNG, JPEG, WebP or BMP" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(f"{place}: the image cannot be decoded: {said}") from error
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), shape


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))
