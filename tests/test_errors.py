"""Errors as the command line and Ray meet them."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator

import pytest

from distrain import errors
from distrain.errors import CheckpointError, DistrainError, Interrupted, TrainingCheckpointError
from tests.support.results import result


def tree(kind: type[DistrainError] = DistrainError) -> Iterator[type[DistrainError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("kind", [kind for kind in tree() if kind.__module__ == errors.__name__])
def test_every_error_survives_pickling(kind: type[DistrainError]):
    again = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert (type(again), again.message, again.exit_code) == (kind, "what was wrong", kind("").exit_code)


def test_an_interrupted_run_keeps_its_signal_and_its_result():
    stopped = Interrupted("stopped", signal.SIGTERM, result(steps=7))
    again = pickle.loads(pickle.dumps(stopped))
    assert (again.message, again.exit_code, again.result) == ("stopped", 143, result(steps=7))
    assert Interrupted("stopped").exit_code == 130 and Interrupted("stopped").result is None


def test_a_checkpoint_is_a_matter_of_usage_only_before_training():
    assert (CheckpointError("").exit_code, TrainingCheckpointError("").exit_code) == (2, 1)
