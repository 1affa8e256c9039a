"""The error tree: every error a user can meet, with the exit code the command line ends with."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrain.trainer import Result


class DistrainError(Exception):
    """Base of all errors meant for the user. Takes one message; survives pickling, so Ray can carry it.

    `exit_code` is what the command line exits with. `result`: of a run that trained nevertheless.
    """

    exit_code = 1
    result: Result | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(DistrainError):
    """The configuration is wrong. The message has one line for each problem."""

    exit_code = 2


class DataError(DistrainError):
    """The data is wrong: names file, row group and column. Exit code 2 before training starts."""

    exit_code = 2

    def during_training(self) -> DistrainError:
        """Return the same message as an error that ends a run already under way (exit code 1)."""
        return TrainingDataError(self.message)


class TrainingDataError(DataError):
    """The data turned out wrong while training was under way."""

    exit_code = 1


class CheckpointError(DistrainError):
    """A checkpoint is missing, damaged, or does not fit. Exit code 2 before training starts."""

    exit_code = 2


class TrainingCheckpointError(CheckpointError):
    """The last checkpoint of a run could not be written, or the one that it had to go on from cannot be read."""

    exit_code = 1


class CheckpointUnreadable(CheckpointError):
    """What may be a good checkpoint cannot be read: its disk or object store does not answer, or not to us."""


class TrainingError(DistrainError):
    """Training failed: the user's model, loss or transform raised, or no worker could be kept alive."""

    exit_code = 1


class ServerLost(TrainingError):
    """The parameter server's process is gone. A run goes on from its last checkpoint."""


class ClusterError(DistrainError):
    """The Ray cluster is out of reach or too small."""

    exit_code = 3


class TrackingError(DistrainError):
    """The MLflow tracking store is out of reach."""

    exit_code = 3


class TrackingRefused(TrackingError):
    """The MLflow tracking store answers, and says no: trying again is useless."""


class LinkError(DistrainError):
    """A link between worker and server broke, or its peer could not prove that it holds the run's token."""

    exit_code = 1


class DivergenceError(DistrainError):
    """The loss or a gradient is not finite."""

    exit_code = 4


class Interrupted(DistrainError):
    """The run was stopped by a signal; it wrote a checkpoint first. Exit code 128 + signal number.

    It has no result where it was stopped before it could train.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT, result: Result | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.result = result
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int, Result | None]]:
        return type(self), (self.message, self.signal_number, self.result)
