"""Writes the digits data set beside this file: scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels of 0..16.

Three training files of several row groups (1,437 rows) and one validation file (360 rows), every class in the same
share in both. Needs scikit-learn: pip install scikit-learn
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HERE = Path(__file__).parent
ROW_GROUP_ROWS = 120
NUM_TRAIN_FILES = 3


def table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    """`pixels`: a list of 64 values, row by row from the top left; `label`: the digit."""
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(images.astype(np.float32).ravel()), 64)
    return pa.table({"pixels": pixels, "label": pa.array(labels.astype(np.int64))})


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    (HERE / "train").mkdir(exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(train_y)), NUM_TRAIN_FILES)):
        part = table(train_x[rows], train_y[rows])
        pq.write_table(part, HERE / "train" / f"part-{number}.parquet", row_group_size=ROW_GROUP_ROWS)
    pq.write_table(table(held_x, held_y), HERE / "validation.parquet", row_group_size=ROW_GROUP_ROWS)


if __name__ == "__main__":
    main()
