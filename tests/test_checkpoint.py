"""A checkpoint is whole or absent, damage is noticed and named, and the right ones are kept, found and refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from distrain import checkpoint
from distrain.checkpoint import (
    MODEL,
    CheckpointStore,
    Snapshot,
    as_overrides,
    differences,
    find,
    follow_changes,
    is_superseded,
    load,
    prune,
    survey,
    verify,
)
from distrain.durable import remove_leftovers
from distrain.errors import CheckpointError, CheckpointUnreadable
from distrain.manifest import FORMAT, read_manifest, seal
from tests.support.disk import largest_file

CONFIG: dict[str, Any] = {
    "data": {"train": "s3://key:secret@bucket/train", "validation": None, "label": "y", "shuffle_rows": 65536},
    "model": {"name": "mlp", "hidden": [8], "args": {}},
    "optimizer": {"name": "Adam", "lr": 0.001, "options": {"betas": [0.9, 0.999]}},
    "schedule": None,
    "batch_size": 32,
    "epochs": 3,
    "shards": None,
    "seed": 0,
    "workers": {"count": 2},
    "server": {"mode": "sync", "threads": None},
}
FIELDS: dict[str, Any] = {
    "run_name": "calm-owl",
    "mlflow_run_id": "0123456789abcdef0123456789abcdef",
    "tracking_uri": "https://me:p@ss@mlflow:5000",
    "config": CONFIG,
    "data": {"train": "f00d", "validation": None},
    "features": ["a", "b"],
    "labels": ["y"],
    "num_features": 2,
    "num_outputs": 3,
    "torch": {"version": "2.13.0", "threads": 2},
}


def snapshot(step: int, **metrics: float) -> Snapshot:
    model = {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)}
    optimizer = {"0.exp_avg": torch.arange(6.0).view(3, 2)}
    state = {"best": float("inf"), "optimizer": {"param_groups": [{"lr": 0.1}]}, "schedule": {"last_epoch": step}}
    return Snapshot(step, step // 10, False, save(model), save(optimizer), state, metrics)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints" / "calm-owl", keep=2)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def flip(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_what_is_written_is_loaded(store: CheckpointStore) -> None:
    path = store.write(snapshot(500, loss=0.25, accuracy=float("nan")), FIELDS)
    assert path == store.directory / "step-00000500"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    checkpoint = load(path)
    assert torch.equal(checkpoint.model["weight"], torch.full((3, 2), 500.0))
    assert checkpoint.model["count"].dtype == torch.int64
    assert torch.equal(checkpoint.optimizer["0.exp_avg"], torch.arange(6.0).view(3, 2))
    manifest = checkpoint.manifest
    assert (manifest["step"], manifest["epoch"], manifest["epoch_finished"], manifest["format"]) == (
        500,
        50,
        False,
        FORMAT,
    )
    assert manifest["state"] == snapshot(500).state
    assert manifest["metrics"]["loss"] == 0.25
    json.loads((path / "manifest.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_no_password_reaches_the_manifest(store: CheckpointStore) -> None:
    path = store.write(snapshot(1), FIELDS)
    text = (path / "manifest.json").read_text()
    assert "secret" not in text
    assert "ss@" not in text
    assert read_manifest(path)["tracking_uri"] == "https://***@mlflow:5000"
    assert read_manifest(path)["config"]["data"]["train"] == "s3://***@bucket/train"


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
        import sys
        from distrain.checkpoint import MODEL, CheckpointStore, Snapshot
        CheckpointStore({str(tmp_path)!r}).write(Snapshot(1, 0, False, b"model", b"optimizer", {{}}), {{}})
        assert "torch" not in sys.modules, "torch was imported"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_the_last_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, loss in [(1, 0.5), (2, 0.2), (3, 0.3), (4, 0.2), (5, float("nan"))]:
        store.write(snapshot(step, loss=loss), FIELDS)
    store.write(snapshot(6), FIELDS)
    assert names(store) == ["best.json", "step-00000002", "step-00000005", "step-00000006"]
    assert find(store.directory / "best").path.name == "step-00000002"


def test_higher_may_be_better(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, metric="accuracy", higher_is_better=True)
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7)]:
        store.write(snapshot(step, accuracy=accuracy, loss=float(step)), FIELDS)
    assert names(store) == ["best.json", "step-00000002", "step-00000003"]


def test_the_best_is_not_chosen_among_validations_of_other_rows_or_another_loss(store: CheckpointStore) -> None:
    def best_after(step: int, rows: str | None, name: str, **metrics: float) -> int:
        fields = {"data": {"train": "f00d", "validation": rows}, "config": CONFIG | {"loss": {"name": name}}}
        store.write(snapshot(step, **metrics), FIELDS | fields)
        return read_manifest(find(store.directory / "best").path)["step"]

    assert best_after(1, "f00d", "mse", loss=0.1) == 1
    assert best_after(2, "beef", "mse") == best_after(3, "beef", "mse") == 1, "it is kept until there is another"
    assert best_after(4, "beef", "mse", loss=0.9) == 4
    assert names(store) == ["best.json", "step-00000003", "step-00000004"]
    assert best_after(5, "beef", "mse", loss=1.0) == best_after(6, "beef", "mse", loss=1.1) == 4
    assert best_after(7, "beef", "huber", loss=2.0) == 7
    assert best_after(8, None, "huber") == best_after(9, None, "huber") == best_after(10, None, "huber") == 7


def test_without_validation_there_is_no_best(store: CheckpointStore) -> None:
    store.write(snapshot(1), FIELDS)
    assert names(store) == ["step-00000001"]
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        find(store.directory / "best")


def test_a_step_written_again_replaces_the_first(store: CheckpointStore) -> None:
    store.write(snapshot(7), FIELDS)
    store.write(snapshot(7, loss=0.5), FIELDS)
    assert names(store) == ["best.json", "step-00000007"]
    assert read_manifest(store.directory / "step-00000007")["metrics"] == {"loss": 0.5}


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.write(snapshot(20), FIELDS)
    (tmp_path / "step-00000020" / "manifest.json").write_text("{")
    store.write(snapshot(10), FIELDS)
    store.write(snapshot(12), FIELDS)
    assert names(store) == ["step-00000012", "step-00000020"]
    found = store.latest()
    assert found is not None
    assert found.path.name == "step-00000012"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "missing", "empty", "folder"])
def test_damage_is_named_and_passed_over(
    store: CheckpointStore, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = store.write(snapshot(1), FIELDS)
    newer = store.write(snapshot(2), FIELDS)
    file = newer / name
    if damage == "flipped":
        flip(file, len(file.read_bytes()) // 2)
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "long":
        file.write_bytes(file.read_bytes() + b"}")
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
    for check in (verify, load, find):
        with pytest.raises(CheckpointError, match=name):
            check(newer)
    found = find(store.directory)
    assert found.path == older
    assert name in caplog.text
    assert "going back to step-00000001" in caplog.text
    assert len(found.skipped) == 1
    assert name in found.skipped[0]
    flip(older / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint in it can be used") as caught:
        find(store.directory)
    assert str(older) in caught.value.message
    assert str(newer) in caught.value.message


def test_what_cannot_be_read_may_be_good(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, unread = store.write(snapshot(1), FIELDS), store.write(snapshot(2), FIELDS)
    (damaged / "model.safetensors").write_bytes(b"")
    num_bytes = checkpoint.num_bytes

    def asked(file: Path) -> int:
        if file.parent == unread:
            raise OSError(errno.EIO, "Input/output error")
        return num_bytes(file)

    monkeypatch.setattr(checkpoint, "num_bytes", asked)
    with pytest.raises(CheckpointUnreadable, match=r"(?s)step-00000002.*Input/output error.*step-00000001.*damaged"):
        store.latest()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(min_value=0), mask=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(tmp_path: Path, place: int, mask: int) -> None:
    store = CheckpointStore(tmp_path / "run")
    path = store.write(snapshot(1, loss=0.5), FIELDS)
    files = sorted(path.iterdir())
    content = bytearray(files[place % 3].read_bytes())
    content[(place // 3) % len(content)] ^= mask
    expected = read_manifest(path)
    files[place % 3].write_bytes(content)
    try:
        manifest = verify(path)
    except CheckpointError as error:
        assert files[place % 3].name in error.message
    else:
        assert manifest == expected  # a blank between two values


def test_a_newer_format_is_said(store: CheckpointStore) -> None:
    path = store.write(snapshot(1), FIELDS)
    manifest = read_manifest(path) | {"format": FORMAT + 1, "distrain_version": "9.0"}
    (path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError, match=r"written by distrain 9\.0"):
        verify(path)


def test_find_by_folder_name_and_mlflow_run(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    root = store.directory.parent
    path = store.write(snapshot(3), FIELDS)
    assert find(path).path == path
    assert find("calm-owl", root).path == path
    assert find("calm-owl/step-00000003", root).path == path
    assert find(FIELDS["mlflow_run_id"], root).path == path
    assert find(root).path == path
    store.directory.rename(root / "renamed")
    assert find("calm-owl", root).path == root / "renamed" / "step-00000003"
    monkeypatch.chdir(root.parent)
    assert find("checkpoints/renamed").path == Path("checkpoints/renamed/step-00000003")


def test_a_folder_without_checkpoints_hides_no_run(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    root = store.directory.parent
    path = store.write(snapshot(3, loss=0.5), FIELDS)
    (root.parent / "calm-owl" / "train").mkdir(parents=True)
    monkeypatch.chdir(root.parent)
    assert find("calm-owl", root).path == find("calm-owl/best", root).path == path
    store.directory.rename(root / "renamed")
    assert find("calm-owl", root).path == root / "renamed" / path.name
    with pytest.raises(CheckpointError, match=r"^calm-owl: no best checkpoint is marked in it"):
        find("calm-owl/best", root)
    shutil.rmtree(root)
    with pytest.raises(CheckpointError, match=r"^calm-owl: no checkpoint in this folder"):
        find("calm-owl", root)


def test_the_points_of_a_sweep_are_found_as_runs_are(tmp_path: Path) -> None:
    names = {"seed-0": "id0", "seed-1": "id1"}
    for sweep in ("tries", "others"):
        for name, run_id in names.items():
            fields = FIELDS | {"run_name": name, "mlflow_run_id": f"{sweep}-{run_id}"}
            CheckpointStore(tmp_path / sweep / name).write(snapshot(3), fields)
    step = "step-00000003"
    assert find("tries-id1", tmp_path).path == tmp_path / "tries" / "seed-1" / step
    assert find("others/seed-0", tmp_path).path == tmp_path / "others" / "seed-0" / step
    with pytest.raises(CheckpointError, match=r"tries: holds several runs, name one: \S+/tries/seed-0, \S+/seed-1$"):
        find("tries", tmp_path)
    with pytest.raises(CheckpointError, match=r"several runs are called so, name one: \S+/others/seed-0, \S+/tries/"):
        find("seed-0", tmp_path)
    with pytest.raises(CheckpointError, match="runs there: others/seed-0, others/seed-1, tries/seed-0, tries/seed-1"):
        find("0123456789abcdef0123456789abcdee", tmp_path)


def test_what_is_not_found_gets_a_hint(store: CheckpointStore, tmp_path: Path) -> None:
    root = store.directory.parent
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find("anything", root)
    store.write(snapshot(3), FIELDS)
    CheckpointStore(root / "brave-fox").write(snapshot(3), FIELDS)
    with pytest.raises(CheckpointError, match=r"did you mean .*/calm-owl\?"):
        find("calm-owk", root)
    with pytest.raises(CheckpointError, match="runs there: brave-fox, calm-owl"):
        find("0123456789abcdef0123456789abcdee", root)
    with pytest.raises(CheckpointError, match=r"several runs, name one: \S+/brave-fox, \S+/calm-owl"):
        find(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        find(tmp_path / "empty")


def test_latest_of_an_empty_run_is_none(store: CheckpointStore) -> None:
    assert store.latest() is None


def test_a_full_disk_leaves_nothing_behind(store: CheckpointStore) -> None:
    big = Snapshot(2, 0, False, bytes(100_000), b"", {})
    with largest_file(50_000), pytest.raises(CheckpointError, match="step-00000002: cannot write the checkpoint: File"):
        store.write(big, FIELDS)
    assert not store.directory.parent.exists()
    store.write(snapshot(1), FIELDS)
    with largest_file(50_000), pytest.raises(CheckpointError):
        store.write(big, FIELDS)
    assert names(store) == ["step-00000001"]


def test_a_failed_replacement_leaves_the_old_one(store: CheckpointStore) -> None:
    path = store.write(snapshot(2), FIELDS)
    with largest_file(50_000), pytest.raises(CheckpointError):
        store.write(Snapshot(2, 0, False, bytes(100_000), b"", {}), FIELDS)
    assert names(store) == ["step-00000002"]
    verify(path)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        CheckpointStore(tmp_path / "file" / "run").write(snapshot(1), FIELDS)
    with pytest.raises(CheckpointError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_killed_at_any_moment(store: CheckpointStore, step: int) -> None:
    """Kill a writer at each of its file operations in turn; what was there before, or the new one, is always found."""
    before = store.write(snapshot(1), FIELDS)
    events = "open", "os.mkdir", "os.rename", "shutil.rmtree", "os.listdir", "os.scandir"
    code = f"""
        import os, sys
        from distrain.checkpoint import MODEL, CheckpointStore, Snapshot
        seen = 0
        def hook(event, args):
            global seen
            if event in {events} and "step-" in str(args[0]):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), 9)
        sys.addaudithook(hook)
        for moment in range(1, 40):
            seen = 0
            child = os.fork()
            if not child:
                snapshot = Snapshot({step}, 0, False, b"model", b"optimizer", {{}})
                CheckpointStore({str(store.directory)!r}).write(snapshot, {{}})
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            print(moment, status, flush=True)
            sys.stdin.readline()
            if not status:
                break
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    kills = 0
    for line in process.stdout:
        _, status = line.split()
        found = find(store.directory)
        assert found.skipped == ()
        load_ok = read_manifest(found.path)["step"]
        assert load_ok in (1, step)
        kills += int(status) == signal.SIGKILL
        if int(status) == 0:
            assert [name for name in names(store) if not name.startswith("step-")] == []
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait() == 0
    assert kills >= 5
    verify(before)


def test_only_leftovers_of_dead_writers_are_taken_away(store: CheckpointStore) -> None:
    host = os.uname().nodename
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    store.directory.mkdir(parents=True)
    dead = store.directory / f".step-00000001.writing-{host}-{child.pid}-0123abcd"
    ours = [
        store.directory / f".step-00000001.writing-{host}-{os.getppid()}-0123abcd",  # alive
        store.directory / ".step-00000001.writing-another-host-1-0123abcd",  # who knows
        store.directory / "notes",
        store.directory / ".hidden",
    ]
    for folder in [dead, *ours]:
        folder.mkdir()
    store.write(snapshot(1), FIELDS)
    assert not dead.exists()
    assert all(folder.exists() for folder in ours)
    os.utime(ours[1], (0, 0))
    remove_leftovers(store.directory)
    assert not ours[1].exists()


def test_what_decides_the_result_is_compared_key_by_key() -> None:
    manifest = {"config": CONFIG, "data": {"train": "f00d", "validation": "beef"}}
    same = {"train": "f00d", "validation": "beef"}
    allowed = CONFIG | {"workers": {"count": 7}, "epochs": 9, "shards": 2, "server": {"mode": "sync", "threads": 1}}
    allowed["data"] = CONFIG["data"] | {"train": "/elsewhere", "validation": "/there"}
    assert differences(manifest, allowed, same) == {}
    assert differences(manifest, CONFIG, {"train": "f00d"}) == {}  # validation left out
    assert differences(manifest, CONFIG | {"workers": {"count": 5}}, same) == {}  # shards unset: the checkpoint's

    changed = CONFIG | {"shards": 3, "seed": 1, "schedule": {"name": "StepLR"}, "model": {"name": "mlp", "hidden": [9]}}
    changed["data"] = CONFIG["data"] | {"label": "z"}
    changed["optimizer"] = CONFIG["optimizer"] | {"options": {"betas": (0.9, 0.99)}}
    found = differences(manifest, changed, {"train": "cafe", "validation": "beef"})
    assert list(found) == [
        "data.label",
        "model.hidden",
        "optimizer.options.betas",
        "schedule.name",
        "seed",
        "shards",
        "data.train",
    ]
    assert (
        found["optimizer.options.betas"] == "optimizer.options.betas: [0.9, 0.999] in the checkpoint, now [0.9, 0.99]"
    )


def test_changed_keys_are_given_as_settings_that_a_configuration_takes() -> None:
    config = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "schedule": {"name": "StepLR"}, "clip": None, "seed": 1}
    keys = ["optimizer.lr", "schedule.name", "schedule.T_max", "clip.norm", "seed", "optimizer.betas"]
    assert as_overrides(config, keys) == [
        "optimizer.lr=0.1", 'schedule={"name": "StepLR"}', "clip=null", "seed=1", "optimizer.betas=[0.9, 0.99]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "schedule", "keeps_schedule", "keeps_moments", "told"),
    [
        (["seed"], "StepLR", True, True, 0),
        (["batch_size"], "StepLR", True, True, 0),
        (["data.validation"], "StepLR", True, True, 0),
        (["loss.gamma"], "StepLR", True, True, 0),
        (["optimizer.lr"], "StepLR", False, True, 0),
        (["optimizer.betas"], "ReduceLROnPlateau", True, True, 0),
        (["optimizer.lr"], "ReduceLROnPlateau", False, True, 1),
        (["optimizer.name"], "ReduceLROnPlateau", False, False, 2),
        (["optimizer.weight_decay"], "StepLR", False, False, 1),
    ],
)
def test_what_follows_changed_keys(
    changed: list[str], schedule: str, keeps_schedule: bool, keeps_moments: bool, told: int
) -> None:
    config = CONFIG | {"schedule": {"name": schedule}}
    state = {
        "schedule": {"steps": 7, "lr": [0.1]},
        "optimizer": {"state": [1], "param_groups": [{"params": [2], "lr": 0.1}]},
        "stopping": {"top": 0.5, "best": 0.5, "stale": 2, "losses": [3], "ended": "the target was reached"},
        "agenda": {"x": 1},
        "epoch_loss": {"epoch": 3, "weighted_loss": 1.0, "samples": 2},
    }
    manifest = {"epoch": 3, "config": config, "state": state}
    assert len(follow_changes(manifest, changed)) == told
    assert state["agenda"] == {"epoch": 3} and "epoch_loss" not in state
    assert ("lr" in state["schedule"]) == keeps_schedule and state["schedule"]["steps"] == 7
    assert state["optimizer"]["state"] == ([1] if keeps_moments else [])
    own_options = any(key.startswith("optimizer.") for key in changed)
    groups = (
        [{"params": [2]}] if own_options and keeps_moments else None if own_options else [{"params": [2], "lr": 0.1}]
    )
    assert state["optimizer"]["param_groups"] == groups
    is_comparable = changed not in (["data.validation"], ["loss.gamma"])
    best = {"top": 0.5, "best": 0.5, "stale": 2} if is_comparable else {"top": None, "best": None, "stale": 0}
    assert state["stopping"] == {**best, "losses": [3]}


def test_only_one_before_the_last_good_one_is_superseded(store: CheckpointStore) -> None:
    older, newer = store.write(snapshot(1), FIELDS), store.write(snapshot(2), FIELDS)
    assert is_superseded(older) and not is_superseded(newer)
    flip(newer / MODEL, 3)
    assert not is_superseded(older)


def test_a_lost_checkpoint_folder_is_not_a_crash(store: CheckpointStore) -> None:
    path = store.write(snapshot(1), FIELDS)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        verify(path)


def test_a_survey_tells_good_best_and_damaged_apart(tmp_path: Path):
    store = CheckpointStore(tmp_path / "run", keep=5)
    for step in (10, 20, 30):
        store.write(snapshot(step, loss=abs(step - 20) + 1.0), FIELDS)
    (tmp_path / "run" / "step-00000030" / MODEL).write_bytes(b"nothing")
    found = survey(tmp_path)
    assert [(entry.step, entry.epoch, entry.is_best) for entry in found] == [
        (30, None, False), (20, 2, True), (10, 1, False)]  # fmt: skip
    assert found[0].problem is not None and "damaged: 7 bytes" in found[0].problem
    assert found[1].problem is None and found[1].metrics == {"loss": 1.0}
    assert survey(tmp_path / "run") == found
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        survey(tmp_path / "run" / "step-00000010")


def test_pruning_keeps_the_last_the_best_and_the_damaged(tmp_path: Path):
    run = tmp_path / "run"
    store = CheckpointStore(run, keep=9)
    for step in (10, 20, 30, 40, 50):
        store.write(snapshot(step, loss=abs(step - 20) + 1.0), FIELDS)
    (run / "step-00000010" / MODEL).write_bytes(b"nothing")
    assert [path.name for path in prune(run, keep=2)] == ["step-00000030"]
    assert [entry.step for entry in survey(run)] == [50, 40, 20, 10]
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        prune(tmp_path, keep=2)
