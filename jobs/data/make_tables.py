"""Writes scikit-learn's small real tables beside this file: iris, wine, breast_cancer, diabetes.

Each has a training file of several row groups and a validation file, one fifth of the rows, classes in the same share
in both. diabetes/train_outliers.parquet is its training file with every twentieth label, by a seed, ten times as large,
as if somebody had slipped a digit. Needs scikit-learn: pip install scikit-learn
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn import datasets
from sklearn.model_selection import train_test_split

HERE = Path(__file__).parent
ROW_GROUP_ROWS = 50


def write(path: Path, names: list[str], features: np.ndarray, label: np.ndarray) -> None:
    """One float32 column for each feature, and `label`."""
    path.parent.mkdir(exist_ok=True)
    columns = {name: features[:, number].astype(np.float32) for number, name in enumerate(names)}
    pq.write_table(pa.table({**columns, "label": label}), path, row_group_size=ROW_GROUP_ROWS)


def main() -> None:
    for name in ("iris", "wine", "breast_cancer", "diabetes"):
        bunch = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
        names = [each.replace(" (cm)", "").replace(" ", "_").replace("/", "_") for each in bunch.feature_names]
        is_number = name == "diabetes"
        label = bunch.target.astype(np.float32 if is_number else np.int64)
        train_x, held_x, train_y, held_y = train_test_split(
            bunch.data, label, test_size=0.2, stratify=None if is_number else label, random_state=0
        )
        write(HERE / name / "train.parquet", names, train_x, train_y)
        write(HERE / name / "validation.parquet", names, held_x, held_y)
        if is_number:
            spoiled = train_y.copy()
            chosen = np.random.default_rng(0).choice(len(spoiled), size=len(spoiled) // 20, replace=False)
            spoiled[chosen] *= 10
            write(HERE / name / "train_outliers.parquet", names, train_x, spoiled)


if __name__ == "__main__":
    main()
