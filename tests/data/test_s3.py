"""The same code reads from S3: moto's server stands in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrain.config import DataConfig
from distrain.data.dataset import open_dataset
from distrain.errors import DataError
from tests.support.jobs import write_rows


@pytest.fixture
def bucket(s3: Any, s3_endpoint: str, tmp_path: Path) -> str:
    s3.create_bucket(Bucket="rows")
    for file in sorted(write_rows(tmp_path / "rows", 60).iterdir()):
        s3.upload_file(str(file), "rows", f"train/{file.name}")
    return f"?endpoint_override={s3_endpoint}&region=us-east-1"


def test_folders_globs_and_files_of_a_bucket(bucket: str, tmp_path: Path):
    config = DataConfig(train="-", label="label")
    for path, files in [("rows/train", 2), ("rows/train/*.parquet", 2), ("rows/train/part-1.parquet", 1)]:
        dataset = open_dataset(f"s3://{path}{bucket}", config)
        assert len(dataset.files) == files
        rows = [len(batch["label"]) for n, rows in enumerate(dataset.row_counts) for batch in dataset.read(n, 0, rows)]
        assert sum(rows) == dataset.num_rows == 30 * files
    local = open_dataset(str(tmp_path / "rows"), config)
    assert open_dataset(f"s3://rows/train{bucket}", config).fingerprint == local.fingerprint
    with pytest.raises(DataError, match=r"s3://rows/nothing.*: no such file or folder"):
        open_dataset(f"s3://rows/nothing{bucket}", config)
