"""Whether a run would find its store open."""

from __future__ import annotations

from distrain.tracking.environment import quiet_environment
from distrain.tracking.local import check_reachable, database_path


def check_opens(uri: str, experiment: str) -> None:
    """Open the store as a run does, which takes seconds, but make no run, no experiment and no file.

    MLflow itself makes the tables of a database that has none, and brings old ones up to date. Raises TrackingError
    where the store is out of reach, TrackingRefused where it does not take our credentials, or the experiment was
    deleted.
    """
    check_reachable(uri)
    path = database_path(uri)
    if path is not None and not path.exists():
        return
    quiet_environment()
    from distrain.tracking.store import check_experiment  # here, since importing MLflow takes seconds

    check_experiment(uri, experiment)
