"""Encoded images: pixels as they were, and bad ones named with their place."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distrain.config import DataConfig
from distrain.data.dataset import Dataset, open_dataset
from distrain.errors import DataError


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(folder: Path, contents: list, kind: pa.DataType | None = None) -> Dataset:
    table = pa.table({"image": pa.array(contents, kind or pa.binary()), "y": np.arange(len(contents))})
    pq.write_table(table, folder / "rows.parquet", row_group_size=3)
    return open_dataset(str(folder / "rows.parquet"), DataConfig(train="-", label="y", features="image"))


def read(dataset: Dataset) -> torch.Tensor:
    batches = [
        batch["features"] for number, rows in enumerate(dataset.row_counts) for batch in dataset.read(number, 0, rows)
    ]
    return torch.cat(batches)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 4)])
def test_pixels_of_lossless_images_come_through(tmp_path: Path, shape: tuple[int, ...], kind: pa.DataType):
    images = [pixels(*shape, seed=seed) for seed in range(4)]
    dataset = opened(tmp_path, [encoded(image) for image in images], kind)
    channels = shape[2] if len(shape) == 3 else 1
    assert dataset.columns.image_shape == (channels, 5, 4) and dataset.columns.num_features == channels * 20
    found = read(dataset)
    assert found.dtype == torch.uint8 and found.shape == (4, channels, 5, 4)
    for image, expected in zip(found.numpy(), images, strict=True):
        np.testing.assert_array_equal(image.transpose(1, 2, 0).squeeze(), expected)


def test_jpegs_palettes_and_black_and_white_are_decoded_too(tmp_path: Path):
    image = pixels(8, 8, 3)
    decoded = read(opened(tmp_path, [encoded(image, "JPEG"), encoded(image, mode="P")]))
    expected = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG"))))
    np.testing.assert_array_equal(decoded[0].numpy().transpose(1, 2, 0), expected)
    assert read(opened(tmp_path, [encoded(image[:, :, 0], mode="1")])).unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "the image cannot be decoded: not a PNG, JPEG, WebP or BMP"),
        (encoded(pixels(4, 4))[:-30], "the image cannot be decoded"),
        (encoded(pixels(4, 5)), r"an image of 1 x 4 x 5 \(channels x height x width\) where 1 x 4 x 4 is expected"),
        (encoded(pixels(4, 4, 3)), "an image of 3 x 4 x 4"),
        (encoded(pixels(4, 4).astype(np.uint16)), "an image of Pillow's mode I;16; images have 8 bits a channel"),
        (None, "null; fill it in or leave the row out"),
    ],
)
def test_a_bad_image_is_named_with_its_row(tmp_path: Path, content: bytes | None, said: str):
    good = encoded(pixels(4, 4))
    dataset = opened(tmp_path, [good, good, good, good, content])
    with pytest.raises(DataError, match=rf"rows\.parquet: row group 1, column 'image', row 1: {said}"):
        read(dataset)


def test_images_beside_other_features_are_refused(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [encoded(pixels(4, 4))], "z": [1.0], "y": [0]}), path)
    with pytest.raises(DataError, match="an image column must be the only feature"):
        open_dataset(str(path), DataConfig(train="-", label="y", features=["image", "z"]))
