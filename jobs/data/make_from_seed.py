"""Writes the two tables that are made from a seed beside this file: reviews (token ids) and tags (several labels).

reviews: made-up reviews of 5 to 30 words, as token ids. A review praises or blames; most words are filler, a few are
good or bad, and one in five words of feeling is turned around by the word "not" before it.
tags: 24 numbers a row, and six labels of which any may hold: each is a weighted sum of products of a few numbers with
noise, above a threshold. Needs numpy and pyarrow alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
ROW_GROUP_ROWS = 200
NOT, GOOD, BAD, FILLER = 0, range(1, 21), range(21, 41), range(41, 300)
ROWS, HELD_OUT = 2400, 600


def write(folder: str, table: pa.Table) -> None:
    (HERE / folder).mkdir(exist_ok=True)
    train = table.slice(0, ROWS - HELD_OUT)
    pq.write_table(train, HERE / folder / "train.parquet", row_group_size=ROW_GROUP_ROWS, compression="zstd")
    pq.write_table(table.slice(ROWS - HELD_OUT), HERE / folder / "validation.parquet", compression="zstd")


def review(rng: np.random.Generator, praises: bool) -> list[int]:
    words: list[int] = []
    length = int(rng.integers(5, 31))
    feeling = max(1, length // 6)
    places = set(rng.choice(length, size=feeling, replace=False).tolist())
    for place in range(length):
        if place not in places:
            words.append(int(rng.choice(FILLER)))
            continue
        agrees = rng.random() < 0.95
        is_turned = rng.random() < 0.2
        kind = GOOD if (praises == agrees) != is_turned else BAD
        words += [NOT] * is_turned + [int(rng.choice(kind))]
    return words


def reviews() -> pa.Table:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, ROWS)
    tokens = [review(rng, bool(praises)) for praises in label]
    return pa.table({"tokens": pa.array(tokens, pa.list_(pa.int16())), "label": label.astype(np.int64)})


def tags() -> pa.Table:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(ROWS, 24)).astype(np.float32)
    columns = {f"x{i}": features[:, i] for i in range(24)}
    for tag in range(6):
        first, second = rng.choice(24, (2, 3))
        score = features[:, first].sum(1) + features[:, second].prod(1) + features[:, first[0]] * features[:, second[0]]
        noisy = score + rng.normal(0, 0.3, ROWS)
        columns[f"tag{tag}"] = (noisy > np.quantile(noisy, 0.5 + 0.08 * tag)).astype(np.int8)
    return pa.table(columns)


if __name__ == "__main__":
    write("reviews", reviews())
    write("tags", tags())
