"""Checkpoints in an object store keep the same promises: whole or absent, verified, found, resumed, pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from distrain import doctor, objects
from distrain.checkpoint import MODEL, OPTIMIZER, CheckpointStore, find, load, prune, survey, verify
from distrain.config import CheckpointConfig
from distrain.errors import CheckpointError
from distrain.manifest import MANIFEST
from distrain.objects import ObjectPath
from distrain.storage import Mirror, place
from tests.support.jobs import distrain, write_job
from tests.test_checkpoint import FIELDS, snapshot


@pytest.fixture
def runs(s3: Any, s3_endpoint: str, tmp_path: Path) -> ObjectPath:
    """A folder in a bucket of its own."""
    bucket = f"b{abs(hash(str(tmp_path))):x}"
    s3.create_bucket(Bucket=bucket)
    found = place(f"s3://{bucket}/all runs?endpoint_override={s3_endpoint}&region=us-east-1".replace(" ", "%20"))
    assert isinstance(found, ObjectPath)
    return found


def names(folder: ObjectPath) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(file: ObjectPath, content: bytes) -> None:
    objects.write_file(file, content)


def test_places_are_what_their_uris_say(s3: Any):
    uri = "s3://me:secret@bucket/a%20b/run?region=us-east-1"
    found = place(uri)
    assert isinstance(found, ObjectPath)
    assert found.key == "bucket/a b/run" and found.name == "run" and found.parent.name == "a b"
    assert str(found / "step-1") == "s3://***@bucket/a%20b/run/step-1?region=us-east-1"
    assert place("s3://bucket/a/?region=us-east-1") == place("s3://bucket/a?region=us-east-1")
    assert isinstance(place("gs://anonymous@bucket/runs"), ObjectPath)
    assert place("file:///tmp/runs") == Path("/tmp/runs") and place("~/runs") == Path.home() / "runs"
    with pytest.raises(CheckpointError, match=r"^ftp://\*\*\*@host/x: not a path or URI"):
        place("ftp://me:secret@host/x")


def test_what_is_written_is_loaded_found_and_kept(runs: ObjectPath):
    store = CheckpointStore(runs / "calm-owl", keep=2)
    assert store.latest() is None
    for step, loss in [(1, 0.5), (2, 0.2), (3, 0.3), (4, 0.4)]:
        path = store.write(snapshot(step, loss=loss), FIELDS)
    assert str(path) == f"{runs.prefix}{runs.key.replace(' ', '%20')}/calm-owl/step-00000004{runs.query}"
    assert names(runs / "calm-owl") == ["best.json", "step-00000002", "step-00000003", "step-00000004"]
    checkpoint = load(str(path))
    assert torch.equal(checkpoint.model["weight"], torch.full((3, 2), 4.0)) and checkpoint.manifest["step"] == 4
    for reference in (path, str(path), str(runs / "calm-owl"), "calm-owl", FIELDS["mlflow_run_id"]):
        assert find(reference, runs).path == path
    assert find(str(runs / "calm-owl" / "best")).path.name == "step-00000002"
    with pytest.raises(CheckpointError, match=r"did you mean s3://.*/calm-owl\?endpoint"):
        find("calm-owk", runs)
    store.write(snapshot(4, loss=0.1), FIELDS)
    assert find(runs / "calm-owl" / "best").path.name == "step-00000004"


@pytest.mark.parametrize("uploads", [0, 1, 2])
def test_a_checkpoint_is_there_when_its_manifest_is(runs: ObjectPath, monkeypatch: pytest.MonkeyPatch, uploads: int):
    """Whatever a writer that dies leaves, the one before is found; and what it left goes when it is old."""
    store = CheckpointStore(runs / "run")
    older = store.write(snapshot(1), FIELDS)
    done: list[str] = []

    def dying(path: ObjectPath, content: bytes) -> None:
        if len(done) == uploads:
            raise OSError("the network is gone")
        done.append(path.name)
        write(path, content)

    write = objects.write_file
    with monkeypatch.context() as patched:
        patched.setattr(objects, "write_file", dying)
        with pytest.raises(CheckpointError, match=r"step-00000002.*cannot write the checkpoint: the network is gone"):
            store.write(snapshot(2), FIELDS)
    assert done == [MODEL, OPTIMIZER][:uploads]
    assert find(runs / "run").path == older and [entry.step for entry in survey(runs / "run")] == [1]
    assert ("step-00000002" in names(runs / "run")) == (uploads > 0)
    monkeypatch.setattr(objects, "_ABANDONED_S", -1.0)
    store.write(snapshot(3), FIELDS)
    assert names(runs / "run") == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, MANIFEST])
def test_damage_is_named_and_passed_over(runs: ObjectPath, name: str):
    store = CheckpointStore(runs / "run")
    older = store.write(snapshot(1), FIELDS)
    newer = store.write(snapshot(2), FIELDS)
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 1
    put(newer / name, bytes(content))
    for use in (verify, load, find):
        with pytest.raises(CheckpointError, match=f"s3://.*/{name}.*damaged"):
            use(newer)
    found = find(runs / "run")
    assert found.path == older and len(found.skipped) == 1
    newer.files.delete_file((newer / MODEL).key)
    with pytest.raises(CheckpointError, match=r"missing|damaged"):
        verify(newer)


def test_a_survey_and_pruning(runs: ObjectPath):
    store = CheckpointStore(runs / "run", keep=9)
    for step in (10, 20, 30, 40):
        store.write(snapshot(step, loss=abs(step - 20) + 1.0), FIELDS)
    put(runs / "run" / "step-00000010" / MODEL, b"nothing")
    assert [(entry.step, entry.is_best, entry.problem is None) for entry in survey(runs)] == [
        (40, False, True), (30, False, True), (20, True, True), (10, False, False)]  # fmt: skip
    assert [path.name for path in prune(str(runs / "run"), keep=1)] == ["step-00000030"]
    assert [entry.step for entry in survey(str(runs / "run"))] == [40, 20, 10]


def test_a_bucket_that_is_not_there_is_said(runs: ObjectPath):
    missing = place(str(runs).replace(runs.key.split("/")[0], "nobody-has-this-one"))
    with pytest.raises(CheckpointError, match=r"s3://nobody-has-this-one/.*: cannot write the checkpoint: "):
        CheckpointStore(missing / "run").write(snapshot(1), FIELDS)


def test_any_file_system_of_pyarrow_will_do(tmp_path: Path):
    """Here a local folder through pyarrow's eyes: as strict about folders as others are."""
    root = ObjectPath(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "runs", "test://")
    store = CheckpointStore(root / "run", keep=1)
    for step in (1, 2):
        store.write(snapshot(step), FIELDS)
    assert find(root).path == root / "run" / "step-00000002" and names(root / "run") == ["step-00000002"]


def test_a_mirror_goes_on_where_this_machine_was(runs: ObjectPath):
    mirror = Mirror(runs / "history.jsonl")
    mirror.path.write_text("one\n")
    mirror.push()
    mirror.path.write_text("one\ntwo\n")
    assert Mirror(runs / "history.jsonl").path.read_text() == "one\ntwo\n", "what was not copied yet"
    put(runs / "history.jsonl", b"another run\n")
    again = Mirror(runs / "history.jsonl")
    assert again.path.read_text() == "another run\n"
    again.drop()
    assert not again.path.exists()


@pytest.mark.ray
def test_a_run_keeps_its_checkpoints_in_a_bucket(runs: ObjectPath, tmp_path: Path):
    """Train, list, resume, evaluate and predict by URI; the weights are those of a run with a local folder."""
    job = write_job(tmp_path, epochs=2)
    local = distrain("train", str(job), "epochs=4", "tracking.enabled=false", "--json", cwd=tmp_path)
    assert local.code == 0, local.stderr
    there = (f"checkpoint.dir={runs}", "checkpoint.history=true", "tracking.run_name=remote", "resume=auto")
    first = distrain("train", str(job), *there, "--json", cwd=tmp_path)
    assert first.code == 0, first.stderr
    assert first.result["checkpoint"] == str(runs / "remote" / "step-00000020")
    done = distrain("train", str(job), "epochs=4", *there, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.result["steps"] == 40 and done.result["parameters_sha256"] == local.result["parameters_sha256"]
    assert done.result["run_id"] == first.result["run_id"], "the same run goes on"
    listed = distrain("checkpoints", str(runs / "remote"), "--json", cwd=tmp_path)
    assert json.loads(listed.stdout)[0]["step"] == 40
    measured = distrain("evaluate", str(runs / "remote"), "--json", cwd=tmp_path)
    assert measured.result["loss"] == pytest.approx(done.result["validation"]["loss"], rel=1e-5)
    to = str(tmp_path / "predictions.parquet")
    rows, best = str(tmp_path / "train"), str(runs / "remote" / "best")
    predicted = distrain("predict", best, rows, "--output", to, cwd=tmp_path)
    assert predicted.code == 0, predicted.stderr
    history = subprocess.run(
        [sys.executable, "-m", "distrain.history", str(runs / "remote" / "history.jsonl")],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert history.stdout.startswith("40 steps, each microbatch in one of them"), history.stderr


def test_doctor_writes_where_checkpoints_go_and_leaves_nothing(s3: Any, s3_endpoint: str):
    s3.create_bucket(Bucket="checked")
    query = f"?endpoint_override={s3_endpoint}&region=us-east-1"
    found = doctor.checkpoints(CheckpointConfig(dir=f"s3://checked/runs{query}"))
    assert found.verdict == "ok", found
    keys = {each["Key"] for each in s3.list_objects_v2(Bucket="checked").get("Contents", [])}
    assert keys <= {"runs/"}  # pyarrow marks the folder
    missing = doctor.checkpoints(CheckpointConfig(dir=f"s3://no-such-bucket/runs{query}"))
    assert (missing.verdict, missing.exit_code) == ("failed", 2) and "bucket" in missing.advice
