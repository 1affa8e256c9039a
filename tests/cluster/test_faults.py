"""Real faults on a real Ray: each costs no bit, and every shard of every step is applied once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from distrain.checkpoint import MODEL, CheckpointStore, Snapshot, load, verify
from distrain.config import load_config
from distrain.errors import DistrainError, TrainingDataError, TrainingError
from distrain.history import Checked, check
from distrain.progress import SilentProgress
from distrain.records import Event, Report
from distrain.trainer import Result, Trainer
from tests.support.faults import MOMENTS
from tests.support.jobs import distrain, is_alive, start, wait_for, workers_of, write_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

STEPS = 600


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("faults"), tracking={"enabled": False}, epochs=STEPS // 10)


class Watcher(SilentProgress):
    """Sees what the server reports; calls `act` once, after step `step`.

    Makes the file `until`, for models that wait for it, when the worker that joined as number `joined` takes part.
    """

    def __init__(
        self,
        act: Callable[[], None] = lambda: None,
        step: int = 30,
        until: Path | None = None,
        joined: int = 0,
    ) -> None:
        self.act, self.step, self.acted_at = act, step, 0.0
        self.until, self.incarnation = until, joined - 1
        self.events: list[Event] = []
        self.seen: list[tuple[float, int]] = []  # (when, step)
        self.notes: list[str] = []

    def report(self, report: Report) -> None:
        self.events += report.events
        if report.steps:
            self.seen.append((time.time(), report.steps[-1].step))
        took_part = {incarnation for record in report.steps for incarnation, *_ in record.taken}
        if self.until is not None and self.incarnation in took_part:
            self.until.touch()
        if not self.acted_at and self.seen and self.seen[-1][1] >= self.step:
            self.acted_at = time.time()
            self.act()

    def note(self, message: str) -> None:
        self.notes.append(message)

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def fit(job: Path, watcher: Watcher, *overrides: str) -> tuple[Result, Checked]:
    """Run to the end. The history must hold."""
    config = load_config(job, ["checkpoint.history=true", "workers.count=2", *overrides])
    result = Trainer(config, watcher).fit()
    found, problems = check(Path(config.checkpoint.dir, result.run_name, "history.jsonl"))
    assert problems == []
    assert found.steps == result.steps == STEPS and result.samples == STEPS * 30
    return result, found


@pytest.fixture(scope="module")
def undisturbed(cluster: None, job: Path) -> str:
    return fit(job, Watcher())[0].parameters_sha256


def waits_for(file: Path) -> tuple[str, ...]:
    """A model that takes its time until there is this file, so that a run is not over before something happens."""
    model = f"model={{factory: 'tests.support.slow:build', args: {{seconds: 0.02, until: '{file}'}}}}"
    return model, "data.standardize=false"


@pytest.fixture(scope="module")
def undisturbed_wait(cluster: None, job: Path) -> str:
    """The hash of such a run, which nothing happens to and which does not wait."""
    return fit(job, Watcher(), *waits_for(job))[0].parameters_sha256


def kill(actor: str, count: int = 1) -> None:
    found = workers_of(os.getpid(), actor)
    for process in found[:count]:
        process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_moment_of_a_step(cluster: None, job: Path, tmp_path: Path, moment: str):
    def model(flag: str, until: str) -> tuple[str, ...]:
        args = f"args: {{moment: {moment}, flag: '{tmp_path / flag}', until: '{tmp_path / until}'}}"
        return (f"model={{factory: 'tests.support.faults:build', {args}}}", "data.standardize=false")

    (tmp_path / "taken").touch()
    expected, _ = fit(job, Watcher(), *model("taken", "taken"))
    watcher = Watcher(until=tmp_path / "replaced", joined=3)
    result, found = fit(job, watcher, *model("free", "replaced"))
    assert result.worker_failures == 1 and found.incarnations >= 2
    assert result.parameters_sha256 == expected.parameters_sha256
    [lost] = watcher.of_kind("lost")
    assert lost.message == f"worker {lost.rank} was given up: the other end of the link is gone"
    for event in watcher.of_kind("recovered"):
        assert event.seconds is not None and event.seconds < 1.0
    again = [event for event in watcher.of_kind("joined") if event.time_ms > lost.time_ms]
    assert [event.rank for event in again] == [lost.rank]
    assert again[0].time_ms - lost.time_ms < 10_000


def test_all_workers_killed_at_once(undisturbed: str, job: Path):
    watcher = Watcher(lambda: kill("WorkerActor", 2))
    result, _ = fit(job, watcher)
    assert result.parameters_sha256 == undisturbed and result.worker_failures == 2
    [recovered] = watcher.of_kind("recovered")
    assert recovered.seconds is not None and recovered.seconds < 15


def test_the_second_worker_that_a_node_loses_is_replaced_by_a_spare_that_waits(
    cluster: None, job: Path, tmp_path: Path
):
    """It is not killed for a worker while it waits, nor left behind when the run ends."""
    spares: list[psutil.Process] = []

    def lose_two() -> None:
        first = workers_of(os.getpid())[0]
        first.kill()
        wait_for(lambda: len(watcher.of_kind("joined")) == 3, what="the first one's replacement")  # a spare so far, too
        spares.extend(wait_for(lambda: workers_of(os.getpid(), "SpareActor"), what="the spare"))
        workers_of(os.getpid())[0].kill()
        wait_for(lambda: spares[0].pid in [process.pid for process in workers_of(os.getpid())], 10, "the takeover")

    thread = threading.Thread(target=lose_two)  # what the watcher does holds the driver up
    watcher = Watcher(thread.start, until=tmp_path / "replaced", joined=4)
    result, found = fit(job, watcher, *waits_for(tmp_path / "replaced"))
    thread.join(1)
    assert not thread.is_alive() and len(spares) == 1
    assert result.worker_failures == 2 and len(watcher.of_kind("joined")) == 4
    assert (tmp_path / "replaced").exists() and found.incarnations >= 3  # the first replacement may have done no part
    wait_for(lambda: not workers_of(os.getpid(), "SpareActor"), 10, "the spare's end")


def test_a_worker_that_hangs_is_given_up_at_the_deadline(undisturbed_wait: str, job: Path, tmp_path: Path):
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.append(workers_of(os.getpid())[0])
        stopped[0].suspend()

    watcher = Watcher(stop, until=tmp_path / "replaced", joined=3)
    result, _ = fit(job, watcher, "workers.timeout_seconds=2", *waits_for(tmp_path / "replaced"))
    assert result.parameters_sha256 == undisturbed_wait and result.worker_failures == 1
    [lost] = watcher.of_kind("lost")
    assert lost.message.endswith("was given up: it was silent for 2 s")
    assert lost.time_ms / 1000 - watcher.acted_at < 2 + 2
    wait_for(lambda: not is_alive(stopped[0]), 15, "the hung worker's end")


def test_a_worker_that_crashes_at_every_start_ends_the_run_with_its_cause(cluster: None, job: Path):
    watcher = Watcher()
    model = "model={factory: 'tests.support.faults:build', args: {moment: start}}"
    with pytest.raises(TrainingError, match=r"worker \d failed \d times in a row before finishing a step: its process"):
        fit(job, watcher, model, "data.standardize=false")
    lost = watcher.of_kind("lost")
    assert len(lost) >= 4
    assert time.time() - lost[0].time_ms / 1000 < 15


@pytest.mark.parametrize("unnoticed_s", [0, 3])
def test_the_server_killed_goes_on_from_the_last_checkpoint(undisturbed: str, job: Path, unnoticed_s: int):
    """Its workers end with it, which is no failure of theirs, however long Ray takes to say that it is dead."""

    def end_the_server() -> None:
        [raylet] = [process for process in psutil.Process().children() if process.name() == "raylet"]
        if unnoticed_s:
            raylet.suspend()
            threading.Timer(unnoticed_s, raylet.resume).start()
        kill("ServerActor")

    watcher = Watcher(end_the_server, step=STEPS // 2)
    result, found = fit(job, watcher)
    assert result.parameters_sha256 == undisturbed
    assert found.restores == 1 and found.repeated_steps < STEPS // 2
    assert result.worker_failures == 0
    [note] = [note for note in watcher.notes if "the parameter server died" in note]
    assert "going on from step" in note
    [recovered] = watcher.of_kind("recovered")
    assert recovered.seconds is not None and recovered.seconds < 15


def test_an_owner_that_dies_before_it_joins_is_replaced(cluster: None, job: Path, tmp_path: Path):
    """The server has no link to it that could end, and would wait for it for ever."""
    (tmp_path / "taken").touch()

    def model(flag: str) -> tuple[str, ...]:
        args = f"args: {{moment: relay, flag: '{tmp_path / flag}'}}"
        return (f"model={{factory: 'tests.support.faults:build', {args}}}", "data.standardize=false", "server.slices=2")

    expected, _ = fit(job, Watcher(), *model("taken"))
    watcher = Watcher()
    result, _ = fit(job, watcher, *model("free"))
    assert (tmp_path / "free").exists() and result.parameters_sha256 == expected.parameters_sha256
    assert any("the server of slice 0 is lost: its process" in note for note in watcher.notes), watcher.notes


def test_the_server_killed_before_the_first_checkpoint_starts_over(cluster: None, tmp_path: Path):
    long_epoch = write_job(tmp_path, rows=20_000, tracking={"enabled": False}, epochs=1)
    config = load_config(long_epoch, ["checkpoint.history=true", "checkpoint.every_steps=null"])
    expected = Trainer(config).fit()
    result = Trainer(config, Watcher(lambda: kill("ServerActor"))).fit()
    assert result.parameters_sha256 == expected.parameters_sha256
    assert result.samples == expected.samples == 20_000
    found, problems = check(Path(config.checkpoint.dir, result.run_name, "history.jsonl"))
    assert problems == [] and found.restores == 1 and found.repeated_steps >= 30


def test_the_server_killed_before_it_wrote_what_was_changed(cluster: None, tmp_path: Path):
    job = write_job(tmp_path, rows=20_000, tracking={"enabled": False}, epochs=1, schedule=None)
    first = Trainer(load_config(job, ["max_steps=30"])).fit()
    changes = ["optimizer.lr=0.002", "max_steps=null", "checkpoint.every_steps=null"]
    watcher = Watcher(lambda: kill("ServerActor"), step=60)
    disturbed = Trainer.resume(str(first.checkpoint), changes, watcher, anyway=True).fit()
    assert any("going on from step 30" in note for note in watcher.notes), watcher.notes
    undisturbed = Trainer.resume(str(first.checkpoint), changes, anyway=True).fit()
    assert disturbed.parameters_sha256 == undisturbed.parameters_sha256
    optimizer = load(Path(str(disturbed.checkpoint))).manifest["state"]["optimizer"]
    assert {group["lr"] for group in optimizer["param_groups"]} == {0.002}


def test_the_server_killed_and_the_latest_checkpoint_damaged(undisturbed: str, job: Path):
    runs = Path(load_config(job).checkpoint.dir)
    before = set(runs.iterdir())
    damaged: list[str] = []

    def damage_and_kill() -> None:
        kill("ServerActor")
        time.sleep(1)  # for what was being written
        [run] = set(runs.iterdir()) - before
        newest = max(path for path in run.iterdir() if path.name.startswith("step-"))
        os.truncate(newest / MODEL, 100)
        damaged.append(newest.name)

    watcher = Watcher(damage_and_kill, step=100)
    result, found = fit(job, watcher)
    assert result.parameters_sha256 == undisturbed and found.restores == 1
    assert len(damaged) == found.damaged == 1


def test_the_server_killed_while_a_checkpoint_is_being_written(
    undisturbed: str, job: Path, monkeypatch: pytest.MonkeyPatch
):
    write, killed = CheckpointStore.write, []

    def write_and_kill(store: CheckpointStore, snapshot: Snapshot, fields: Mapping[str, Any]) -> Path:
        if not killed and snapshot.step >= 50:
            killed.append(snapshot.step)
            kill("ServerActor")
        return write(store, snapshot, fields)

    monkeypatch.setattr(CheckpointStore, "write", write_and_kill)
    result, found = fit(job, Watcher())
    assert killed and found.restores == 1
    assert result.parameters_sha256 == undisturbed


def test_a_full_disk_costs_checkpoints_and_not_the_run(undisturbed: str, job: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]).returncode:
        pytest.skip("a small disk can be mounted by root only")

    class Filler(Watcher):
        """Fills the disk as soon as there are steps, and makes room again once that was said."""

        def note(self, message: str) -> None:
            super().note(message)
            if message.startswith("no checkpoint of step "):
                (disk / "filler").unlink(missing_ok=True)

    def fill() -> None:
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))

    watcher = Filler(fill, step=1)
    try:
        config = load_config(job, ["workers.count=2", f"checkpoint.dir={disk}", "checkpoint.keep=1"])
        result = Trainer(config, watcher).fit()
        assert result.parameters_sha256 == undisturbed
        said = [note for note in watcher.notes if note.startswith("no checkpoint of step ")]
        assert said and all("No space left on device" in note for note in said)
        assert result.checkpoint is not None and verify(result.checkpoint)["step"] == STEPS
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("how", ["truncated", "deleted", "replaced"])
def test_a_data_file_that_changes_stops_the_run_and_is_named(cluster: None, tmp_path: Path, how: str):
    job = write_job(tmp_path, tracking={"enabled": False}, epochs=10_000)
    file = tmp_path / "train" / "part-1.parquet"

    def change() -> None:
        if how == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        elif how == "deleted":
            file.unlink()
        else:
            (tmp_path / "other").write_bytes(os.urandom(file.stat().st_size + 1))
            os.replace(tmp_path / "other", file)

    with pytest.raises(DistrainError) as error:
        Trainer(load_config(job, ["workers.count=2"]), Watcher(change)).fit()
    assert isinstance(error.value, TrainingDataError) and error.value.exit_code == 1
    assert str(file) in error.value.message


def test_the_driver_killed_then_resumed(undisturbed: str, tmp_path: Path):
    own = write_job(tmp_path, tracking={"enabled": False}, epochs=STEPS // 10)
    folder = tempfile.mkdtemp()  # a short name: Ray has sockets in it
    process = start("train", str(own), "checkpoint.history=true", cwd=tmp_path, TMPDIR=folder)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/step-*")), 60, "a first checkpoint")
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(workers_of(process.pid)) == 2 and len(workers_of(process.pid, "ServerActor")) == 1
    assert list(Path(folder).glob("distrain-ray-*"))
    process.kill()
    process.communicate()
    wait_for(lambda: not [p for p in started if is_alive(p)], 2, "the end of all that it had started")
    wait_for(lambda: not list(Path(folder).glob("distrain-ray-*")), 2, "the end of its Ray's files")
    shutil.rmtree(folder)
    [run] = (tmp_path / "checkpoints").iterdir()
    resumed = distrain("resume", str(run), "workers.count=3", "--json", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["parameters_sha256"] == undisturbed
    found, problems = check(run / "history.jsonl")
    assert problems == [] and found.steps == STEPS


def test_a_worker_woken_after_it_was_given_up_changes_nothing(undisturbed_wait: str, job: Path, tmp_path: Path):
    class Waker(Watcher):
        """Stops a worker, and lets it go on when it was given up."""

        def report(self, report: Report) -> None:
            super().report(report)
            if stopped and self.of_kind("lost"):
                with suppress(psutil.NoSuchProcess):
                    stopped.pop().resume()

    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.append(workers_of(os.getpid())[0])
        stopped[0].suspend()

    waker = Waker(stop, until=tmp_path / "replaced", joined=3)
    result, _ = fit(job, waker, "workers.timeout_seconds=1", *waits_for(tmp_path / "replaced"))
    assert result.parameters_sha256 == undisturbed_wait
    assert len(waker.of_kind("lost")) == 1 and not stopped
