"""Whole runs on a real Ray: the same bits at any worker count, after a kill, a stop and a resume."""

from __future__ import annotations

import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from safetensors.torch import load_file, save

from distrain.checkpoint import CheckpointStore, Found, Snapshot, load
from distrain.checkpoint_writer import CheckpointWriter
from distrain.config import TrainConfig, load_config
from distrain.errors import (
    CheckpointError,
    CheckpointUnreadable,
    ClusterError,
    ConfigError,
    DistrainError,
    Interrupted,
    ServerLost,
    TrackingError,
    TrackingRefused,
    TrainingCheckpointError,
    TrainingError,
)
from distrain.history import check
from distrain.manifest import seal
from distrain.progress import LineProgress, RunInfo, SilentProgress
from distrain.records import Report
from distrain.run_lock import is_trained
from distrain.signals import StopSignals
from distrain.storage import Place
from distrain.tracking import NullTracker
from distrain.trainer import Result, Trainer
from tests.support.jobs import distrain, finish, is_alive, leftovers, start, wait_for, workers_of, write_job
from tests.support.results import result, without_a_step

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the runs that do not test starting one."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def job(folder: Path) -> Path:
    return write_job(folder, tracking={"enabled": False})


def fit(job: Path, *overrides: str) -> Result:
    """Run it, with one worker where more are not the matter."""
    return Trainer(load_config(job, ["workers.count=1", *overrides])).fit()


@pytest.fixture(scope="module")
def undisturbed(cluster: None, job: Path) -> Result:
    return fit(job)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_same_bits_at_any_worker_count(undisturbed: Result, job: Path, count: int):
    result = fit(job, f"workers.count={count}")
    assert result.parameters_sha256 == undisturbed.parameters_sha256
    assert result.status == "finished" and result.steps == 40 and result.samples == 4 * 300
    assert result.validation["accuracy"] > 0.6
    assert result.worker_failures == 0


def test_another_seed_gives_other_bits(undisturbed: Result, job: Path):
    assert fit(job, "seed=1").parameters_sha256 != undisturbed.parameters_sha256


def test_a_run_ended_in_the_middle_of_an_epoch_resumes_at_another_worker_count(undisturbed: Result, job: Path):
    first = fit(job, "workers.count=3", "max_steps=13")
    assert first.steps == 13 and first.checkpoint is not None
    assert first.parameters_sha256 != undisturbed.parameters_sha256
    resumed = Trainer.resume(first.checkpoint, ["max_steps=null", "workers.count=2"]).fit()
    assert resumed.steps == 40
    assert resumed.parameters_sha256 == undisturbed.parameters_sha256


def test_a_finished_run_that_is_resumed_is_finished(undisturbed: Result):
    shown = io.StringIO()
    again = Trainer.resume(str(undisturbed.checkpoint), progress=LineProgress(shown)).fit()
    assert (again.status, again.steps, again.samples) == ("finished", 40, 0)
    assert again.parameters_sha256 == undisturbed.parameters_sha256 and again.checkpoint == undisturbed.checkpoint
    assert again.to_json()["seconds"]["startup"] is None and "finished" in shown.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_with_its_code(
    job: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def stopped(trainer: Trainer, signals: StopSignals) -> Result:
        os.kill(os.getpid(), number)
        wait_for(lambda: trainer._stop_reason, 5, "the stop")
        return without_a_step(status="stopped", steps=0)

    monkeypatch.setattr(Trainer, "_fit", stopped)
    with pytest.raises(Interrupted, match="stopped after step 0; go on with: distrain resume ") as caught:
        Trainer(load_config(job), LineProgress(io.StringIO())).fit()
    assert caught.value.exit_code == 128 + number
    assert caught.value.result is not None and caught.value.result.status == "stopped"


RoomFor = Callable[[int], list[Place]]


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> RoomFor:
    """A disk with room for so many checkpoints. Gives the list of those that were written."""
    write = CheckpointStore.write

    def fill(count: int) -> list[Place]:
        written: list[Place] = []

        def until_full(store: CheckpointStore, snapshot: Snapshot, fields: Mapping[str, Any]) -> Place:
            if len(written) == count:
                raise CheckpointError("the checkpoint: cannot be written: No space left on device")
            written.append(write(store, snapshot, fields))
            return written[-1]

        monkeypatch.setattr(CheckpointStore, "write", until_full)
        return written

    return fill


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_with_1_and_the_way_on(
    undisturbed: Result, job: Path, room_for: RoomFor, monkeypatch: pytest.MonkeyPatch
):
    written = room_for(1)
    with pytest.raises(TrainingCheckpointError) as caught:
        fit(job)
    assert caught.value.exit_code == 1
    said, _, checkpoint = caught.value.message.partition("go on from the last good checkpoint with: distrain resume ")
    assert said == "the checkpoint: cannot be written: No space left on device; once that is mended, "
    assert [checkpoint] == list(map(str, written))
    monkeypatch.undo()
    assert Trainer.resume(checkpoint).fit().parameters_sha256 == undisturbed.parameters_sha256


def test_a_last_checkpoint_that_is_the_first_says_that_there_is_no_other(cluster: None, job: Path, room_for: RoomFor):
    room_for(0)
    with pytest.raises(TrainingCheckpointError, match="there is no other checkpoint: once that is mended, begin"):
        fit(job, "max_steps=3")


def test_a_stopped_run_whose_checkpoint_cannot_be_written_ends_as_stopped(cluster: None, job: Path, room_for: RoomFor):
    written = room_for(1)

    class Stops(SilentProgress):
        """Stops the run once it has a checkpoint."""

        stopped = False

        def report(self, report: Report) -> None:
            if written and not self.stopped:
                self.stopped = True
                os.kill(os.getpid(), signal.SIGINT)

    config = load_config(job, ["workers.count=1", "epochs=10000"])
    with pytest.raises(Interrupted) as caught:
        Trainer(config, Stops()).fit()
    assert caught.value.exit_code == 130
    result = caught.value.result
    assert result is not None and result.status == "stopped" and [result.checkpoint] == list(map(str, written))
    assert caught.value.message == (
        f"stopped after step {result.steps}: the checkpoint: cannot be written: No space left on device; once that is "
        f"mended, go on from the last good checkpoint with: distrain resume {result.checkpoint}"
    )


def test_a_server_that_dies_with_its_last_snapshot_is_lost(tmp_path: Path, job: Path):
    class Finished:
        """A crew that is done, and whose server dies then."""

        failures = 0

        def train(self) -> None:
            pass

        def watch(self, stop_reason: str | None) -> str:
            return "the outcome"

        def report(self) -> Report:
            return Report()

        def take_snapshot(self) -> None:
            raise ServerLost("it died")

    crew = Finished()
    writer = CheckpointWriter(CheckpointStore(tmp_path), crew.take_snapshot, dict, print, print)
    with pytest.raises(ServerLost, match="it died"):
        Trainer(load_config(job))._watch(crew, writer, NullTracker())


def test_a_store_that_refuses_the_run_ends_it_at_its_first_steps(tmp_path: Path, job: Path):
    class Refusing(NullTracker):
        def wait_ready(self, timeout_s: float = 60.0) -> str | None:
            raise TrackingRefused("the experiment was deleted")

        def check(self) -> None:
            self.wait_ready()

    crew = SimpleNamespace(train=lambda: None, watch=lambda reason: reason, report=Report, failures=0)

    def writer() -> CheckpointWriter:
        return CheckpointWriter(CheckpointStore(tmp_path), lambda: None, dict, print, print)

    trainer = Trainer(load_config(job))
    with pytest.raises(TrackingRefused):
        trainer._watch(crew, writer(), Refusing())
    trainer.stop("asked first")  # which ends it with a checkpoint
    assert trainer._watch(crew, writer(), Refusing()) == "asked first"


def test_a_run_that_was_over_before_its_store_refused_it_has_its_result(job: Path, monkeypatch: pytest.MonkeyPatch):
    class Refusing(NullTracker):
        def wait_ready(self, timeout_s: float = 60.0) -> str | None:
            raise TrackingRefused("the experiment was deleted")

    trainer = Trainer(load_config(job))

    def run(*_: Any) -> Result:
        assert is_trained(trainer._folder) and trainer._logged_run_id(Refusing()) is None
        return result()

    monkeypatch.setattr(trainer, "_run", run)
    with pytest.raises(TrackingRefused, match="the experiment was deleted") as refused:
        trainer.fit()
    assert refused.value.result is not None and refused.value.result.steps == 40
    assert not is_trained(trainer._folder)


def test_a_store_that_does_not_open_costs_no_run_its_result(job: Path):
    class Away(NullTracker):
        def wait_ready(self, timeout_s: float = 60.0) -> str | None:
            raise TrackingError("no answer")

    notes = Notes()
    assert Trainer(load_config(job), notes)._logged_run_id(Away()) is None
    assert notes.said == ["the run is not in MLflow: no answer"]


def test_what_decides_the_result_may_only_change_on_request(cluster: None, job: Path):
    first = fit(job, "max_steps=13")
    assert first.checkpoint is not None
    changes = ["batch_size=24", "max_steps=null"]
    with pytest.raises(CheckpointError, match=r"batch_size: 32 in the checkpoint, now 24\n.*--anyway"):
        Trainer.resume(first.checkpoint, changes)
    resumed = Trainer.resume(first.checkpoint, changes, anyway=True).fit()
    assert resumed.epochs == 4 and resumed.samples == 3 * 300, "the second epoch began again"


@pytest.fixture(scope="module")
def thirteen_steps(cluster: None, job: Path) -> Path:
    """The last checkpoint of a run."""
    settings = ("max_steps=13", "optimizer={name: AdamW, lr: 0.01, weight_decay: 0}", "schedule=null")
    return Path(str(fit(job, *settings).checkpoint))


@pytest.mark.parametrize(
    ("changes", "lr", "keeps_moments", "slices"),
    [
        (["optimizer.lr=0.002"], 0.002, True, 1),
        (["schedule={name: StepLR, step_size: 5, gamma: 0.5}"], 0.01 / 2**3, True, 2),
        (["optimizer.weight_decay=0.01"], 0.01, False, 1),
        (["optimizer.weight_decay=0.01"], 0.01, False, 2),
    ],
)
def test_a_changed_learning_rate_is_followed(
    thirteen_steps: Path, tmp_path: Path, changes: list[str], lr: float, keeps_moments: bool, slices: int
):
    run = tmp_path / thirteen_steps.parent.name  # a run of its own to go on with
    shutil.copytree(thirteen_steps.parent, run)
    longer = ["max_steps=15", f"server.slices={slices}"]
    resumed = Trainer.resume(str(run / thirteen_steps.name), [*changes, *longer], anyway=True).fit()
    assert resumed.steps == 15 and resumed.checkpoint is not None
    optimizer = load(Path(resumed.checkpoint)).manifest["state"]["optimizer"]
    assert [group["lr"] for group in optimizer["param_groups"]] == pytest.approx([lr] * (1 if keeps_moments else 2))
    saved = load_file(Path(resumed.checkpoint) / "optimizer.safetensors")
    steps = {tensor.item() for name, tensor in saved.items() if name.endswith(".step")}
    assert steps == {15 if keeps_moments else 2}


def test_a_name_that_is_taken_by_another_training_is_said_with_what_to_do(cluster: None, job: Path):
    named = ("tracking.run_name=taken", "resume=auto", "max_steps=3")
    assert Trainer(load_config(job, named)).fit().steps == 3
    again = Trainer(load_config(job, [*named, "max_steps=5"])).fit()
    assert again.steps == 5 and again.samples == 2 * 32, "it went on"
    with pytest.raises(
        CheckpointError,
        match=r"(?s)batch_size.*another tracking\.run_name.*distrain resume .*/taken batch_size=24 --any",
    ):
        Trainer(load_config(job, [*named, "batch_size=24"]))


def test_a_name_whose_run_has_no_checkpoint_yet_is_kept(tmp_path: Path):
    """The next attempt looks for checkpoints under it, and would begin anew again and again."""
    job = write_job(tmp_path, resume="auto", tracking={"run_name": "spot", "enabled": False})
    (tmp_path / "checkpoints" / "spot").mkdir(parents=True)
    (tmp_path / "checkpoints" / "spot" / "history.jsonl").touch()
    assert Trainer(load_config(job)).run_name == "spot"
    assert Trainer(load_config(job, ["resume=null"])).run_name == "spot-2"


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("answers_again", [True, False])
def test_checkpoints_out_of_reach_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_again: bool
):
    calls: list[int] = []

    def latest(store: CheckpointStore) -> Found | None:
        calls.append(1)
        if len(calls) == 1 or not answers_again:
            raise CheckpointUnreadable("s3://bucket/runs/a: cannot be listed: no answer")
        return None

    monkeypatch.setattr(CheckpointStore, "latest", latest)
    monkeypatch.setattr("distrain.trainer._UNREADABLE_SECONDS", 5.0 if answers_again else 0.5)
    notes = Notes()
    trainer = Trainer(load_config(write_job(tmp_path)), notes)
    if answers_again:
        assert trainer._last_good() == (None, 0) and len(calls) == 2
    else:
        with pytest.raises(CheckpointUnreadable):
            trainer._last_good()
    [note] = notes.said
    assert note.startswith("s3://bucket/runs/a: cannot be listed: no answer; trying again for")


def test_a_name_goes_on_at_another_worker_count_with_the_shards_that_it_has(cluster: None, job: Path):
    named = ("tracking.run_name=grown", "resume=auto", "shards=null")
    expected = fit(job, "shards=2")
    assert fit(job, *named, "workers.count=2", "max_steps=13").steps == 13
    again = Trainer(load_config(job, [*named, "workers.count=3"])).fit()
    assert again.steps == 40 and again.parameters_sha256 == expected.parameters_sha256


def test_a_name_that_is_taken_is_said_with_the_settings_to_go_on_with(cluster: None, job: Path):
    named = ["tracking.run_name=edited", "resume=auto", "max_steps=3"]
    fit(job, *named)
    with pytest.raises(
        CheckpointError, match=r"/edited optimizer\.lr=0\.5 'schedule=\{\"name\": \"StepLR\".* --anyway"
    ):
        Trainer(load_config(job, [*named, "optimizer.lr=0.5", "schedule={name: StepLR, step_size: 3}"]))


def test_from_a_checkpoint_before_the_last_the_run_goes_on_and_a_changed_one_as_its_own(undisturbed: Result, job: Path):
    first = fit(job, "tracking.run_name=way", "checkpoint.every_steps=5", "max_steps=20")
    folder = Path(str(first.checkpoint)).parent
    before = sorted(path.name for path in folder.iterdir())
    changed = Trainer.resume(str(folder / "step-00000010"), ["max_steps=12", "optimizer.lr=0.1"], anyway=True).fit()
    assert changed.run_name == "way-2" and Path(str(changed.checkpoint)).parent == folder.with_name("way-2")
    assert sorted(path.name for path in folder.iterdir()) == before
    again = Trainer.resume("way-2", ["max_steps=13"], root=str(folder.parent)).fit()
    assert again.steps == 13 and again.run_name == "way-2"
    resumed = Trainer.resume(str(folder / "step-00000010"), ["max_steps=null"]).fit()
    assert resumed.parameters_sha256 == undisturbed.parameters_sha256 and resumed.run_name == "way"


def test_a_password_is_given_again_and_not_shown(cluster: None, job: Path):
    checkpoint = load(Path(str(fit(job, "max_steps=3").checkpoint)))
    checkpoint.manifest["config"]["checkpoint"]["dir"] = "s3://***@bucket/runs"
    (checkpoint.path / "manifest.json").write_bytes(seal(checkpoint.manifest))
    given = "checkpoint.dir=s3://key:secret@bucket/runs"
    assert Trainer.resume(str(checkpoint.path), [given]).config.checkpoint.dir == given.partition("=")[2]
    with pytest.raises(CheckpointError, match=r"checkpoint\.dir: 's3://\*\*\*@bucket/other', and a resumed run keeps"):
        Trainer.resume(str(checkpoint.path), ["checkpoint.dir=s3://key:secret@bucket/other"])


def test_a_mistyped_keyword_is_no_change_to_resume_with(tmp_path: Path):
    config = TrainConfig(data={"train": "rows", "label": "y"})
    store = CheckpointStore(tmp_path / "run")
    path = store.write(Snapshot(1, 0, False, save({}), save({}), {}), {"config": config.to_mapping()})
    with pytest.raises(ConfigError) as error:
        Trainer.resume(str(path), ["optimizer.lrr=0.1", "epoch=3"])
    assert error.value.message.splitlines() == [
        'override "epoch=3": epoch: no such key; did you mean epochs?',
        'override "optimizer.lrr=0.1": optimizer.lrr: torch.optim.Adam has no such keyword; did you mean lr?',
    ]


@pytest.mark.parametrize("setting", ["checkpoint.dir=elsewhere", "tracking.run_name=x", "tracking.experiment=x"])
def test_where_a_resumed_run_is_kept_does_not_change(cluster: None, job: Path, setting: str):
    first = fit(job, "max_steps=3")
    with pytest.raises(CheckpointError, match=rf"{setting.partition('=')[0]}: .* keeps its name"):
        Trainer.resume(str(first.checkpoint), [setting])


def test_a_server_that_takes_over_has_what_is_left_of_the_time(job: Path):
    trainer = Trainer(load_config(job, ["max_seconds=100"]))
    assert trainer._spent_s == 0
    trainer._first_step_ms = round((time.time() - 40) * 1000)
    assert trainer._spent_s == pytest.approx(40, abs=1)


def test_passwords_that_a_checkpoint_does_not_hold_are_asked_for(
    cluster: None, job: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = load(fit(job, "max_steps=3").checkpoint)
    checkpoint.manifest["config"]["data"]["validation"] = "s3://***@bucket/rows"
    monkeypatch.setattr("distrain.trainer.load", lambda path: checkpoint)
    with pytest.raises(
        CheckpointError, match=r"does not hold passwords: data\.validation had one\. .*data\.validation=\.\.\."
    ):
        Trainer.resume(str(checkpoint.path))
    assert Trainer.resume(str(checkpoint.path), ["data.validation=null", "max_steps=4"]).fit().steps == 4


@pytest.mark.parametrize(
    ("overrides", "train_on"),
    [
        (["schedule=null", "epochs=1"], "epochs=2"),
        (["schedule=null", "max_steps=3"], "max_steps=6"),
        (["schedule={name: CosineAnnealingLR, T_max: 3}", "max_steps=3"], ""),
    ],
)
def test_a_run_says_with_what_to_train_on(cluster: None, job: Path, overrides: list[str], train_on: str):
    class Watcher(SilentProgress):
        def started(self, info: RunInfo) -> None:
            self.info = info

    watcher = Watcher()
    Trainer(load_config(job, overrides), watcher).fit()
    assert watcher.info.train_on == train_on


def test_staleness_gives_the_same_bits_at_any_worker_count(undisturbed: Result, job: Path):
    one, three = (fit(job, "server.staleness=2", f"workers.count={count}") for count in (1, 3))
    assert one.parameters_sha256 == three.parameters_sha256 != undisturbed.parameters_sha256
    assert one.steps == 40 and one.samples == 4 * 300


@pytest.mark.parametrize(("server", "steps"), [("{mode: async, staleness: 1}", 160), ("{quorum: 3}", 40)])
def test_updates_that_do_not_wait_for_all_take_every_row_once_an_epoch(
    cluster: None, job: Path, server: str, steps: int
):
    result = fit(job, "workers.count=3", f"server={server}", "checkpoint.history=true")
    assert result.samples == 4 * 300 and result.epochs == 4 and result.steps >= steps
    assert result.checkpoint is not None
    found, problems = check(Path(result.checkpoint).parent / "history.jsonl")
    assert problems == [] and found.steps == result.steps


def test_python_users_get_the_same_from_nested_values(undisturbed: Result, job: Path):
    config = TrainConfig(**load_config(job, ["workers.count=1"]).to_mapping())
    assert Trainer(config).fit().parameters_sha256 == undisturbed.parameters_sha256


def test_a_killed_worker_is_replaced_and_costs_no_bit(cluster: None, job: Path):
    """A progress display that sees each report is the fault injector: it kills a worker after the first steps."""

    class Killer(SilentProgress):
        killed = 0

        def report(self, report: Report) -> None:
            if report.steps and not self.killed:
                workers_of(os.getpid())[0].kill()
                self.killed += 1

    overrides = ("workers.count=2", "epochs=100", "data.validation=null")
    expected = fit(job, *overrides)
    killer = Killer()
    result = Trainer(load_config(job, overrides), killer).fit()
    assert killer.killed == 1
    assert result.worker_failures == 1
    assert result.steps == expected.steps == 1000
    assert result.parameters_sha256 == expected.parameters_sha256


def test_a_cluster_that_is_too_small_says_so(cluster: None, job: Path):
    with pytest.raises(ClusterError, match=r"asked for 9 CPUs \(9 workers of 1\), the cluster has 4"):
        fit(job, "workers.count=9")


def test_what_the_users_factory_or_model_raises_is_shown(cluster: None, job: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Linear):\n"
        "    def forward(self, features):\n"
        "        return features @ torch.zeros(99, 3)\n"
        "def broken():\n"
        "    return Broken(4, 3)\n"
        "def half():\n"
        "    return torch.nn.Linear(4, 3).half()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TrainingError, match=r"features @ torch.zeros\(99, 3\)"):
        fit(job, "model={factory: 'my_models:broken'}", "data.standardize=false")
    with pytest.raises(ConfigError, match=r"model.factory: my_models:half: weight is torch.float16"):
        fit(job, "model={factory: 'my_models:half'}", "data.standardize=false")
    with pytest.raises(ConfigError, match=r"has no .brokn.; did you mean broken"):
        fit(job, "model={factory: 'my_models:brokn'}", "data.standardize=false")


PARTS = """
import torch

calls = 0

def later():
    global calls
    calls += 1
    if calls > 4:
        raise RuntimeError("the user's own words")

class Model(torch.nn.Linear):
    def forward(self, features):
        if self.training and torch.is_grad_enabled():
            later()
        return super().forward(features)

def model():
    return Model(4, 3)

def plain():
    return torch.nn.Linear(4, 3)

def loss():
    def of_rows(output, label):
        if torch.is_grad_enabled():
            later()
        return torch.nn.functional.cross_entropy(output, label, reduction="none")
    return of_rows

def rows(batch):
    later()
    features = torch.stack([torch.tensor(batch[f"f{i}"].to_numpy()) for i in range(4)], dim=1)
    return {"features": features, "label": torch.tensor(batch["label"].to_numpy())}
"""


@pytest.mark.parametrize(
    "part",
    [
        "model={factory: 'my_parts:model'}",
        "loss={factory: 'my_parts:loss'}",
        "data.transform='my_parts:rows'",
    ],
    ids=["model", "loss", "transform"],
)
def test_what_the_users_code_raises_on_the_way_ends_the_run_at_once(
    cluster: None, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = ("data.standardize=false", "model={factory: 'my_parts:plain'}", "loss=cross_entropy", "epochs=50", part)
    notes = Notes()
    with pytest.raises(
        DistrainError, match=r"(?s)my_parts\.py.*the user's own words|the user's own words.*my_parts\.py"
    ):
        Trainer(load_config(job, plain), notes).fit()
    assert not [note for note in notes.said if "is replaced" in note]


def test_one_row_for_batch_normalization_is_refused_before_the_start(cluster: None, job: Path):
    with pytest.raises(ConfigError, match="batch normalization needs 2"):
        fit(job, "batch_size=299")


class TestOnItsOwnRay:
    """The command line, which starts a Ray of its own and leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_left(self):
        before = {process.pid for process in psutil.process_iter()}
        yield
        wait_for(lambda: not leftovers(before), 15, f"the end of {leftovers(before)}")

    def test_sigterm_then_resume_at_another_count(self, tmp_path: Path):
        job = write_job(tmp_path, epochs=80)
        process = start("train", str(job), "workers.count=2", "--json", cwd=tmp_path)
        wait_for(lambda: list(tmp_path.glob("checkpoints/*/step-*")), 60, "a first checkpoint")
        process.send_signal(signal.SIGTERM)
        stopped = finish(process)
        assert stopped.code == 143, stopped.stderr
        assert "go on with: distrain resume" in stopped.stderr
        assert stopped.result["status"] == "stopped" and stopped.result["checkpoint"] in stopped.stderr
        [run] = (tmp_path / "checkpoints").iterdir()
        resumed = distrain("resume", str(run), "workers.count=3", "--json", cwd=tmp_path)
        assert resumed.code == 0, resumed.stderr
        expected = distrain("train", str(job), "workers.count=1", "--json", cwd=tmp_path)
        assert resumed.result["parameters_sha256"] == expected.result["parameters_sha256"]
        assert resumed.result["steps"] == expected.result["steps"] == 800
        again = distrain("resume", str(run), "workers.count=1", "--json", cwd=tmp_path)
        assert again.code == 0 and "Traceback" not in again.stderr, again.stderr
        assert again.result["parameters_sha256"] == resumed.result["parameters_sha256"]
        assert again.result["seconds"]["startup"] is None

        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        [experiment] = [e for e in client.search_experiments() if e.name == "distrain"]
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 2
        history = client.get_metric_history(resumed.result["run_id"], "train/loss")
        steps = [point.step for point in history]
        assert len(steps) == len(set(steps)), "a step was logged twice"
        assert client.get_run(resumed.result["run_id"]).info.status == "FINISHED"

    def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(self, tmp_path: Path):
        job = write_job(tmp_path, epochs=10_000, tracking={"enabled": False})
        process = start("train", str(job), cwd=tmp_path)
        wait_for(lambda: list(tmp_path.glob("checkpoints/*/step-*")), 60, "a first checkpoint")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        stopped = finish(process)
        assert stopped.code == 130, stopped.stderr
        assert "finishing the step" in stopped.stderr

    def test_a_killed_driver_takes_its_workers_along(self, tmp_path: Path):
        job = write_job(tmp_path, epochs=10_000, tracking={"enabled": False})
        process = start("train", str(job), cwd=tmp_path)
        workers = wait_for(lambda: workers_of(process.pid), 60, "the workers' start")
        process.kill()
        process.wait()
        wait_for(lambda: not any(is_alive(worker) for worker in workers), 15, "the workers' end")
