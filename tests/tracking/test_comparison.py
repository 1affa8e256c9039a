"""Runs of a real store side by side."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from distrain.errors import TrackingError
from distrain.tracking import compare_runs


@pytest.mark.parametrize("name", ["20261123-150130-bb44", "team/digits"])
def test_a_run_is_found_by_its_id_its_name_or_its_checkpoints_folder(store: str, name: str):
    client = MlflowClient(store)
    run = client.create_run(client.create_experiment("digits"), run_name=name).info.run_id
    client.set_terminated(run)
    for reference in (run, name, f"checkpoints/{name}", f"s3://bucket/runs/{name}/"):
        assert compare_runs(store, "digits", [reference]) == [{"": "status", name: "FINISHED"}]


@pytest.mark.parametrize("experiment", ["digits", "unknown"])
def test_an_unknown_run_is_said_as_it_was_given(store: str, experiment: str):
    MlflowClient(store).create_experiment("digits")
    with pytest.raises(TrackingError, match=f"the experiment '{experiment}' has no run of the name 'checkpoints/x'"):
        compare_runs(store, experiment, ["checkpoints/x"])
