"""Reading at any position gives what reading in order gives; errors come at the right call; memory is bounded."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from distrain.data.plan import Plan
from distrain.data.reader import Reader
from distrain.errors import DataError, TrainingError
from tests.support.datasets import ArrayDataset


def make(rows: int = 500, group: int = 45, **plan) -> tuple[ArrayDataset, Plan]:
    features = np.arange(rows, dtype=np.float32)[:, None].repeat(3, axis=1)
    dataset = ArrayDataset(features, np.arange(rows), group)
    return dataset, Plan(dataset.row_counts, **{"batch_size": 32, "num_shards": 3, "shuffle_rows": 60, **plan})


def read_all(dataset, plan: Plan, shard: int, epochs: int = 2) -> dict[tuple[int, int], list[int]]:
    """Every microbatch of a shard, read in order."""
    reader = Reader(dataset, plan, shard)
    positions = [(epoch, step) for epoch in range(epochs) for step in range(plan.steps_per_epoch)]
    found = {position: reader.microbatch(*position)["label"].tolist() for position in positions}
    reader.close()
    return found


@pytest.mark.parametrize("changes", [{}, {"batch_size": 200}, {"shuffle_rows": 7}, {"group": 500}, {"rows": 31}])
def test_reading_from_every_position_equals_reading_in_order(changes: dict):
    dataset, plan = make(**changes)
    for shard in range(plan.num_shards):
        expected = read_all(dataset, plan, shard)
        for position in expected:
            reader = Reader(dataset, plan, shard)
            following = [p for p in expected if p >= position][:3]
            assert [reader.microbatch(*p)["label"].tolist() for p in following] == [expected[p] for p in following]
            reader.close()


def test_jumping_about_gives_the_same():
    dataset, plan = make()
    expected = read_all(dataset, plan, 1)
    reader = Reader(dataset, plan, 1)
    for position in random.Random(0).choices(list(expected), k=100):
        assert reader.microbatch(*position)["label"].tolist() == expected[position]
    reader.close()


def test_shards_together_give_every_row_once_with_features_and_label_of_the_same_row():
    dataset, plan = make()
    readers = [Reader(dataset, plan, shard) for shard in range(3)]
    seen = []
    for step in range(plan.steps_per_epoch):
        for reader in readers:
            batch = reader.microbatch(0, step)
            assert torch.equal(batch["features"][:, 0].long(), batch["label"])
            assert batch["features"].is_contiguous()
            seen += batch["label"].tolist()
    assert sorted(seen) == list(range(500))
    for reader in readers:
        reader.close()


def test_an_epoch_may_begin_in_the_row_where_the_last_one_ended():
    """In the row group that is open, but beyond what was opened of it."""
    dataset, plan = make(rows=120, group=25, batch_size=24, num_shards=4, shuffle_rows=40)
    met = 0
    for shard in range(4):
        for epoch in range(11):
            last, first = plan.windows(epoch, shard)[-1].pieces[-1], plan.windows(epoch + 1, shard)[0].pieces[0]
            met += (last.row_group, last.stop) == (first.row_group, first.start)
        labels = read_all(dataset, plan, shard, epochs=12)
        for epoch in range(12):
            assert sum(len(labels[epoch, step]) for step in range(plan.steps_per_epoch)) == 30
    assert met


def test_a_microbatch_of_no_rows_is_empty():
    dataset, plan = make(rows=10, batch_size=9, num_shards=3)
    reader = Reader(dataset, plan, 0)
    assert [len(reader.microbatch(0, step)["label"]) for step in range(2)] == [3, 0]
    reader.close()


class Damaged(ArrayDataset):
    """Row group 7 cannot be read, until it is mended."""

    mended = False

    def read(self, row_group: int, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        if row_group == 7 and not self.mended:
            raise DataError("row group 7: cannot be read")
        yield from super().read(row_group, start, stop)


def test_an_error_comes_at_the_call_that_needs_the_rows_and_reading_can_go_on():
    rows = 500
    dataset = Damaged(np.zeros((rows, 1), np.float32), np.arange(rows), 45)
    plan = Plan(dataset.row_counts, 32, 1, shuffle_rows=60, shuffle=False)
    reader = Reader(dataset, plan, 0)
    window = next(w for w in plan.windows(0, 0) if any(piece.row_group == 7 for piece in w.pieces))
    good = window.start // 32
    for step in range(good):
        reader.microbatch(0, step)
    with pytest.raises(DataError, match="row group 7"):
        for step in range(good, plan.steps_per_epoch):
            reader.microbatch(0, step)
    dataset.mended = True
    assert reader.microbatch(0, 0)["label"].tolist() == list(range(32))
    assert len(reader.microbatch(0, plan.steps_per_epoch - 1)["label"]) == rows % 32
    reader.close()


class Uneven(ArrayDataset):
    """From row 300 on, the rows are `late`."""

    late: dict[str, torch.Tensor]

    def read(self, row_group: int, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        for batch in super().read(row_group, start, stop):
            rows = len(batch["label"])
            late = {name: values.expand(rows, *values.shape[1:]) for name, values in self.late.items()}
            yield late if int(batch["label"][0]) >= 300 else batch


LABEL = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("shuffle_rows", [40, 500])  # the change comes between windows, and within one
@pytest.mark.parametrize(
    ("late", "said"),
    [
        (
            {"features": torch.zeros(1, 3), "label": LABEL.double()},
            "'label' as torch.float64 [rows], and gave torch.int64",
        ),
        (
            {"features": torch.zeros(1, 1), "label": LABEL},
            "'features' as torch.float32 [rows, 1], and gave torch.float32",
        ),
        ({"label": LABEL}, "'features' as nothing, and gave torch.float32 [rows, 3] for earlier rows"),
        (
            {"features": torch.zeros(1, 3), "label": LABEL, "new": LABEL},
            "'new' as torch.int64 [rows], and gave nothing",
        ),
    ],
)
def test_batches_unlike_the_first_are_not_merged_with_it(late: dict, said: str, shuffle_rows: int):
    dataset = Uneven(np.zeros((500, 3), np.float32), np.arange(500), 50)
    dataset.late = late
    plan = Plan(dataset.row_counts, 32, 1, shuffle_rows, shuffle=False)
    reader = Reader(dataset, plan, 0)
    with pytest.raises(TrainingError) as error:
        for step in range(plan.steps_per_epoch):
            reader.microbatch(0, step)
    reader.close()
    assert error.value.message.startswith(f"rows: row group 6: data.transform gives {said}")


def test_closing_ends_the_thread():
    dataset, plan = make()
    reader = Reader(dataset, plan, 0)
    reader.microbatch(0, 0)
    assert any(thread.name == "reader of shard 0" for thread in threading.enumerate())
    reader.close()
    assert not any(thread.name == "reader of shard 0" for thread in threading.enumerate())


def test_at_most_two_windows_are_held_and_their_memory_is_used_again():
    dataset, plan = make(rows=3000, num_shards=1)
    reader = Reader(dataset, plan, 0)
    places = set()
    for step in range(plan.steps_per_epoch):
        reader.microbatch(0, step)
        with reader._loader._changed:
            held = list(reader._loader._loaded.values())
            assert len(held) + len(reader._loader._buffers) <= 2
            places |= {loaded.buffer["features"].data_ptr() for loaded in held}
    reader.close()
    assert len(plan.windows(0, 0)) > 20
    assert len(places) <= 6  # grown a few times at the start, then the same


def test_a_large_row_group_that_windows_share_is_opened_once():
    dataset, plan = make(rows=1000, group=1000, num_shards=1, shuffle_rows=50)
    assert len(plan.windows(0, 0)) == 20
    reader = Reader(dataset, plan, 0)
    for step in range(plan.steps_per_epoch):
        reader.microbatch(0, step)
    assert dataset.opened[0] == (0, 0, 1000)
    assert len(dataset.opened) <= 2  # the second is the next epoch's, read ahead
    reader.close()
