"""Runs of a real store side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from distrain.errors import TrackingError
from distrain.tracking import compare_runs


def test_a_run_is_found_by_its_id_its_name_or_its_checkpoints_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two points of sweeps have the same name: the folder tells them apart."""
    monkeypatch.chdir(tmp_path)
    client, ids = MlflowClient(store), {}
    experiment = client.create_experiment("digits")
    folders = {"FINISHED": str(tmp_path / "checkpoints/a/seed=1"), "KILLED": "s3://bucket/runs/b/seed=1"}
    for status, folder in folders.items():
        run = client.create_run(experiment, run_name="seed=1", tags={"distrain.checkpoints": folder})
        client.set_terminated(run.info.run_id, status)
        ids[status] = run.info.run_id
    client.set_terminated(client.create_run(experiment, run_name="team/digits").info.run_id, "FAILED")

    def status_of(reference: str) -> str:
        [row] = compare_runs(store, "digits", [reference])
        return row["team/digits" if reference == "team/digits" else "seed=1"]

    found = {
        "FINISHED": (
            *("checkpoints/a/seed=1", "checkpoints/a/seed=1/", "checkpoints/a/seed=1/step-00000092"),
            *(folders["FINISHED"], ids["FINISHED"]),
        ),
        "KILLED": (folders["KILLED"], f"{folders['KILLED']}/", f"{folders['KILLED']}/step-123456789", ids["KILLED"]),
        "FAILED": ("team/digits",),
    }
    assert {status: {status_of(each) for each in references} for status, references in found.items()} == {
        status: {status} for status in found
    }


@pytest.mark.parametrize("experiment", ["digits", "unknown"])
def test_an_unknown_run_is_said_as_it_was_given(store: str, experiment: str):
    client = MlflowClient(store)
    client.create_run(client.create_experiment("digits"), run_name="x")
    match = f"the experiment '{experiment}' has no run of the name or folder 'checkpoints/x'"
    with pytest.raises(TrackingError, match=match):
        compare_runs(store, experiment, ["checkpoints/x"])
