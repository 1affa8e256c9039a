"""A history that holds passes; each way in which it may not hold is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distrain.history import History, check
from tests.support.records import step

WHOLE = ((0, 0, 2), (1, 2, 4))  # (incarnation, first shard, stop)


def history(path: Path, first_step: int = 0) -> History:
    return History(path / "history.jsonl", num_shards=4, steps_per_epoch=3, num_rows=150, first_step=first_step)


def done(*numbers: int, taken: tuple[tuple[int, int, int], ...] = WHOLE):
    return [
        step(number, samples=[64, 64, 22][(number - 1) % 3], taken=of_step(number - 1, taken)) for number in numbers
    ]


def of_step(number: int, taken: tuple[tuple[int, int, int], ...] = WHOLE):
    return tuple((incarnation, number, first, stop) for incarnation, first, stop in taken)


def problems(path: Path) -> list[str]:
    return check(path / "history.jsonl")[1]


def test_a_run_with_a_restore_and_a_resume_holds(tmp_path: Path):
    first = history(tmp_path)
    first.steps(done(1, 2, 3))
    first.durable(3)
    first.steps(done(4, 5))
    first.restored(3)
    first.steps(done(4, 5, 6))
    first.durable(6)
    first.close()
    again = history(tmp_path, first_step=6)
    again.steps(done(7, 8, 9, taken=((0, 0, 4),)))
    again.close()
    found, wrong = check(tmp_path / "history.jsonl")
    assert wrong == []
    assert (found.steps, found.repeated_steps, found.restores, found.incarnations) == (9, 2, 1, 5)
    said = subprocess.run(
        [sys.executable, "-m", "distrain.history", str(tmp_path / "history.jsonl")], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout == (
        "9 steps, each microbatch in one of them; 2 done again after 1 restores, with 0 checkpoints damaged; 5 "
        "incarnations of workers\n"
    )


@pytest.mark.parametrize(
    ("taken", "shards"),
    [(((0, 0, 2),), [0, 1]), (((0, 0, 2), (1, 1, 4)), [0, 1, 1, 2, 3]), ((), [])],
)
def test_a_shard_that_is_missing_or_counted_twice(tmp_path: Path, taken, shards):
    history(tmp_path).steps(done(1, taken=taken))
    assert problems(tmp_path)[0] == f"line 2: step 1 took shards {shards} of 4"


def test_a_step_left_out_and_one_done_twice(tmp_path: Path):
    history(tmp_path).steps(done(1, 3, 3))
    wrong = problems(tmp_path)
    assert "line 3: step 3 follows step 1" in wrong and "line 4: step 3 follows step 3" in wrong
    assert "line 4: step 3 took shard 0 of the plan's step 2, which step 3 had taken" in wrong


def test_a_checkpoint_that_was_acknowledged_and_lost(tmp_path: Path):
    run = history(tmp_path)
    run.steps(done(1, 2, 3))
    run.durable(3)
    run.restored(0)
    assert problems(tmp_path) == ["line 6: went back to step 0, 3 was durable"]


def test_a_checkpoint_that_was_found_damaged(tmp_path: Path):
    run = history(tmp_path)
    for number in (1, 2, 3):
        run.steps(done(number))
        run.durable(number)
    run.restored(2, damaged=1)
    run.steps(done(3))
    assert problems(tmp_path) == []
    assert check(tmp_path / "history.jsonl")[0].damaged == 1
    run.durable(3)
    run.restored(1, damaged=1)
    assert problems(tmp_path) == ["line 11: went back to step 1, 3 was durable"]


def test_rows_that_are_missing_from_an_epoch(tmp_path: Path):
    history(tmp_path).steps([step(number, samples=50, taken=of_step(number - 1)) for number in (1, 2)] + [
        step(3, samples=49, taken=of_step(2))])  # fmt: skip
    assert problems(tmp_path) == ["epoch 0: 149 samples of 150 rows"]


def test_updates_that_need_not_be_whole_steps(tmp_path: Path):
    run = History(tmp_path / "history.jsonl", 2, 2, 40, 0, whole_steps=False)
    microbatches = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 1)]
    run.steps([step(n + 1, samples=10, taken=((0, t, k, k + 1),)) for n, (t, k) in enumerate(microbatches)])
    assert problems(tmp_path) == []
    run.steps([step(8, samples=10, taken=((0, 1, 1, 2),)), step(9, samples=10, taken=((0, 4, 0, 1),))])
    assert problems(tmp_path) == [
        "line 9: step 8 took shard 1 of the plan's step 1, which step 4 had taken",
        "epoch 0: 50 samples of 40 rows",
        "epoch 1: 30 samples of 40 rows",
    ]


def test_the_program_fails_and_says_where(tmp_path: Path):
    history(tmp_path).steps(done(2))
    said = subprocess.run(
        [sys.executable, "-m", "distrain.history", str(tmp_path / "history.jsonl")], capture_output=True, text=True
    )
    assert said.returncode == 1
    assert "error: line 2: step 2 follows step 0" in said.stderr
