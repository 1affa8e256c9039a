"""Points that wait in a file."""

from __future__ import annotations

import math

import pytest

from distrain.tracking.spool import Spool
from distrain.tracking.thinning import Point

POINTS = [Point("train/loss", n / 3, 1000 + n, n) for n in range(2500)]


def test_points_come_back_in_order_and_the_file_goes(tmp_path):
    spool = Spool(tmp_path / "below" / "spool.jsonl")
    assert not spool
    spool.append([])
    assert not spool.path.exists()
    spool.append(POINTS[:10])
    spool.append(POINTS[10:])
    assert spool
    assert len(spool) == 2500
    batches = []
    spool.deliver(batches.append)
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert [point for batch in batches for point in batch] == POINTS
    assert not spool
    assert len(spool) == 0


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_delivery_goes_on_where_it_failed(tmp_path, fail_at):
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append(POINTS)
    sent, calls = [], 0

    def send(batch):
        nonlocal calls
        calls += 1
        if calls == fail_at + 1:
            raise ConnectionError
        sent.extend(batch)

    with pytest.raises(ConnectionError):
        spool.deliver(send)
    assert len(spool) == 2500 - len(sent)
    more = Point("val/loss", 1.0, 5, 5)
    spool.append([more])
    spool.deliver(send)
    assert sent == [*POINTS, more]
    assert not spool


def test_a_line_cut_short_by_a_crash_is_left_out_and_nan_survives(tmp_path):
    path = tmp_path / "spool.jsonl"
    Spool(path).append([Point("train/loss", math.nan, 1, 1)])
    with path.open("a") as file:
        file.write('["train/lo')
    got = []
    Spool(path).deliver(got.extend)  # of a new process
    assert len(got) == 1
    assert math.isnan(got[0].value)
