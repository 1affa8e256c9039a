"""The command line as a person meets it: messages, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from torch import nn

from distrain.checkpoint import CheckpointStore, Snapshot
from distrain.cli import main
from distrain.errors import Interrupted
from distrain.trainer import Trainer
from tests.support.jobs import distrain, write_job, write_rows
from tests.support.results import without_a_step


def four_outputs() -> nn.Module:
    return nn.Linear(4, 4)


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def mean_loss() -> nn.Module:
    return nn.CrossEntropyLoss()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def strict_json(text: str) -> Any:
    """Read JSON as others do, who know no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def change(path: Path, rows: int = 300, **columns: object) -> None:
    """Rewrite one Parquet file with other columns; None leaves one out."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, path, row_group_size=37)


def test_an_exit_code_does_not_need_a_reader(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "distrain.cli", "train", "nothing.yaml"]
    assert subprocess.run(command, cwd=tmp_path, stderr=write, timeout=60).returncode == 2
    os.close(write)


class TestBadInputBeforeTheStart:
    """Each a one-line error that names what and where, exit code 2, and nothing written."""

    def refused(self, job: Path, *overrides: str) -> str:
        before = sorted(job.parent.rglob("*"))
        result = run("train", job, *overrides)
        assert result.exit_code == 2, result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in result.output
        assert sorted(job.parent.rglob("*")) == before
        return errors[0].removeprefix("error: ")

    def test_a_missing_path(self, job: Path):
        assert self.refused(job, "data.train=nowhere/rows") == "nowhere/rows: no such file or folder"

    def test_an_empty_folder(self, job: Path, tmp_path: Path):
        (tmp_path / "empty").mkdir()
        assert "empty: the folder holds no files" in self.refused(job, f"data.train={tmp_path / 'empty'}")

    def test_a_glob_that_matches_nothing(self, job: Path, tmp_path: Path):
        assert self.refused(job, f"data.train={tmp_path}/*.orc").endswith("*.orc: matches no file")

    def test_a_file_that_is_not_parquet(self, job: Path, tmp_path: Path):
        (tmp_path / "train" / "part-1.parquet").write_text("not parquet at all")
        assert "part-1.parquet: not a readable Parquet file" in self.refused(job)

    def test_a_missing_column(self, job: Path):
        message = self.refused(job, "data.label=labl")
        assert "part-0.parquet: no column 'labl' (data.label); did you mean 'label'?" in message

    def test_a_duplicated_column(self, job: Path, tmp_path: Path):
        table = pq.read_table(tmp_path / "train" / "part-0.parquet")
        twice = pa.Table.from_arrays([*table.columns, table.column("f0")], names=[*table.column_names, "f0"])
        pq.write_table(twice, tmp_path / "train" / "part-0.parquet")
        assert "column 'f0' is there 2 times" in self.refused(job)

    def test_files_whose_schemas_differ(self, job: Path, tmp_path: Path):
        change(tmp_path / "train" / "part-1.parquet", f2=np.zeros(150))
        message = self.refused(job)
        assert "part-1.parquet: column 'f2' is double, and float in" in message and "part-0.parquet" in message

    def test_a_label_out_of_range_that_the_footer_shows(self, job: Path):
        message = self.refused(job, "model.outputs=2")
        assert "row group 0, column 'label': label 2 is out of range" in message

    def test_a_label_of_the_wrong_type(self, job: Path):
        assert "cross_entropy needs integer labels" in self.refused(job, "data.label=f0")

    def test_an_own_model_whose_outputs_do_not_fit_the_label(self, job: Path):
        own = "model={factory: 'tests.test_cli:four_outputs'}"
        said = "the model gives (2, 4) where the label is (2,): the model's outputs must match"
        assert said in self.refused(job, own, "loss=mse")
        plan = run("plan", job, own, "loss=mse")
        assert plan.exit_code == 2 and said in plan.stderr

    def test_an_own_loss_that_gives_one_value_for_all_rows(self, job: Path):
        message = self.refused(job, "loss={factory: 'tests.test_cli:mean_loss'}", "model.outputs=3")
        assert message.startswith("loss.factory: tests.test_cli:mean_loss gave () for 2 rows; a loss must give one")

    def test_an_own_model_with_more_rows_needed_than_there_are(self, job: Path):
        own = "model={factory: 'tests.test_cli:normalized'}"
        assert "smallest microbatch of an epoch has 1 rows" in self.refused(job, own, "batch_size=299")

    def test_an_own_model_that_is_not_there(self, job: Path):
        own = "model={factory: 'tests.test_cli:four_output'}"
        assert "has no 'four_output'; did you mean four_outputs?" in self.refused(job, own)

    def test_a_text_column(self, job: Path, tmp_path: Path):
        for part in (0, 1):
            change(tmp_path / "train" / f"part-{part}.parquet", f3=["text"] * 150)
        assert "column 'f3' is string: features are integer, float or bool" in self.refused(
            job, "data.features=[f0, f3]"
        )

    def test_more_workers_than_the_machine_can_lend(self, job: Path):
        result = run("train", job, "workers.count=999", "workers.min=1", "shards=4")
        assert result.exit_code == 3
        assert "error: asked for 999 CPUs (999 workers of 1), this machine has" in result.stderr

    def test_all_mistakes_in_a_configuration_at_once(self, job: Path):
        text = job.read_text() + "optimiser: {}\n"
        job.write_text(text.replace("lr: 0.01", "lrr: 0.01"))
        line = 1 + next(n for n, line in enumerate(job.read_text().splitlines()) if "lrr" in line)
        result = run("train", job, "batch_size=none")
        assert result.exit_code == 2
        errors = result.stderr.splitlines()
        assert f"error: {job}:{line}: optimizer.lrr: torch.optim.AdamW has no such keyword; did you mean lr?" in errors
        assert any("optimiser: no such key; did you mean optimizer?" in error for error in errors)
        assert any('override "batch_size=none": batch_size: expected a number of rows' in error for error in errors)


def test_a_mistyped_keyword_of_an_optimizer_names_file_line_and_key(job: Path):
    values = yaml.safe_load(job.read_text())
    values["optimizer"] = {"name": "Adam", "lrr": 0.1}
    job.write_text(yaml.safe_dump(values))
    result = run("config", job)
    assert result.exit_code == 2
    assert "optimizer.lrr: " in result.stderr and result.stderr.rstrip().endswith("did you mean lr?")
    assert result.stderr.startswith(f"error: {job}:")


def test_values_that_torch_refuses_are_said_with_all_else(job: Path):
    settings = ("batchsize=3", 'optimizer={name: Adam, amsgrad: "no"}', "schedule={name: StepLR, step_size: 0}")
    result = run("config", job, *settings)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        'error: override "batchsize=3": batchsize: no such key; did you mean batch_size?',
        f"error: override \"{settings[1]}\": optimizer.amsgrad: expected true or false, got 'no'",
    ], "a schedule is tried on a good optimizer only"
    assert run("config", job, settings[2]).stderr == (
        f'error: override "{settings[2]}": schedule: torch.optim.lr_scheduler.StepLR refused its values (step_size=0): '
        "integer modulo by zero\n"
    )
    assert run("config", job, "schedule={name: MultiStepLR, milestones: [1e3]}").exit_code == 0


@pytest.mark.parametrize(
    ("column", "bad", "said"),
    [
        ("f1", np.nan, "column 'f1', row 5: nan is not finite"),
        ("f1", np.inf, "column 'f1', row 5: inf is not finite"),
        ("f1", None, "column 'f1', row 5: null"),
        ("label", None, "column 'label', row 5: null"),
    ],
)
def test_bad_values_met_while_reading_name_file_row_group_column_and_row(tmp_path: Path, column, bad, said: str):
    from distrain.config import DataConfig
    from distrain.data.dataset import open_dataset
    from distrain.errors import DataError

    folder = write_rows(tmp_path / "rows", 300)
    path = folder / "part-1.parquet"
    values = pq.read_table(path).column(column).to_pylist()
    values[37 + 5] = bad
    kind = pa.int64() if column == "label" else pa.float32()
    change(path, **{column: pa.array(values, kind)})
    dataset = open_dataset(str(folder), DataConfig(train=str(folder), label="label"))
    with pytest.raises(DataError) as error:
        for number, rows in enumerate(dataset.row_counts):
            list(dataset.read(number, 0, rows))
    assert error.value.message.startswith(f"{path}: row group 1, {said}")


@pytest.mark.ray
def test_bad_values_met_in_training_end_it_with_1_and_one_line(tmp_path: Path):
    job = write_job(tmp_path, tracking={"enabled": False})
    path = tmp_path / "train" / "part-1.parquet"
    values = pq.read_table(path).column("f1").to_numpy().copy()
    values[100] = np.nan
    change(path, f1=values)
    done = distrain("train", str(job), "data.standardize=false", cwd=tmp_path)
    assert done.code == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{path}: row group 2, column 'f1', row 26: nan is not finite" in line
    assert not list(tmp_path.glob("checkpoints/*/step-*"))


@pytest.mark.ray
def test_a_batch_larger_than_the_data_is_one_partial_batch(tmp_path: Path):
    job = write_job(tmp_path, tracking={"enabled": False})
    done = distrain("train", str(job), "batch_size=1000", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.result["steps"] == 4 and done.result["samples"] == 4 * 300
    assert done.stdout.count("\n") == 1
    assert set(done.result) >= {
        "run_id", "status", "epochs", "steps", "samples", "samples_per_second", "train_loss", "validation",
        "parameters_sha256", "checkpoint", "rows_per_epoch", "worker_failures", "seconds",
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_its_line_too(job: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def fit(trainer: Trainer) -> None:
        raise Interrupted("stopped after step 0", number, without_a_step(status="stopped", steps=0))

    monkeypatch.setattr(Trainer, "fit", fit)
    done = run("train", job, "--json")
    assert done.exit_code == 128 + number and done.stderr == "error: stopped after step 0\n"
    said = strict_json(done.stdout)
    assert (said["status"], said["steps"], said["train_loss"]) == ("stopped", 0, None)
    assert said["validation"] == {"loss": None} and said["seconds"] == {"startup": None, "training": 0.1, "total": 5.0}
    assert run("train", job).stdout == "", "only where it is asked for"


def test_config_prints_what_reads_back_as_the_same(job: Path, tmp_path: Path):
    printed = run("config", job, "optimizer.lr=1e-3")
    assert printed.exit_code == 0
    (tmp_path / "resolved.yaml").write_text(printed.stdout)
    again = run("config", tmp_path / "resolved.yaml")
    assert again.stdout == printed.stdout
    assert yaml.safe_load(printed.stdout)["optimizer"]["lr"] == 0.001


def test_the_schema_describes_every_key(job: Path):
    schema = json.loads(run("config", "--schema").stdout)
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for name, field in section["properties"].items():
            assert "description" in field, name


def test_plan_says_what_a_run_would_be(job: Path):
    result = run("plan", job, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["num_rows"] == 300 and said["steps_per_epoch"] == 10 and said["total_steps"] == 40
    assert said["num_shards"] == 4 and said["asked"] == {"CPU": 2}
    assert run("plan", job).exit_code == 0
    assert said["warnings"] == []
    assert (
        "beyond that the learning rate rises again; schedule.T_max=35 makes"
        in run("plan", job, "schedule.T_max=34").stdout
    )


def test_checkpoints_are_listed_verified_and_pruned(tmp_path: Path):
    store = CheckpointStore(tmp_path / "runs" / "calm-owl", keep=4)
    written = [store.write(Snapshot(n, 0, False, b"m", b"o", {}, {"loss": 1 / n}), {}) for n in (10, 20, 30, 40)]
    result = run("checkpoints", tmp_path / "runs", "--json")
    assert result.exit_code == 0
    assert [(e["step"], e["is_best"], e["problem"]) for e in json.loads(result.stdout)] == [
        (40, True, None), (30, False, None), (20, False, None), (10, False, None),
    ]  # fmt: skip
    (written[1] / "model.safetensors").write_bytes(b"x")
    result = run("checkpoints", tmp_path / "runs", "--json")
    assert result.exit_code == 1 and "its content does not match its SHA-256" in result.stdout
    result = run("checkpoints", tmp_path / "runs" / "calm-owl", "--prune", "1")
    assert [path.is_dir() for path in written] == [False, True, False, True], "a damaged one is left to be looked at"
    assert result.stderr.count("removed ") == 2 and "good, the best" in result.stdout.replace("\n", " ")
    assert run("checkpoints", tmp_path / "runs").exit_code == 1, "the damaged one of all runs"
    assert "holds no checkpoints" in run("checkpoints", written[0].parent.parent.parent / "none").stderr


def test_what_is_not_finite_is_null_in_json(tmp_path: Path):
    CheckpointStore(tmp_path / "run").write(Snapshot(10, 0, False, b"m", b"o", {}, {"loss": np.nan}), {})
    [entry] = strict_json(run("checkpoints", tmp_path / "run", "--json").stdout)
    assert entry["step"] == 10 and entry["metrics"] == {"loss": None}


def test_help_and_usage():
    assert "distrain train jobs/digits.yaml" in run("--help").output
    assert run("trian").exit_code == 2
    assert run("config").exit_code == 2
    assert run("train", "nowhere.yaml").exit_code == 2
