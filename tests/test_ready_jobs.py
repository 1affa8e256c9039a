"""The jobs on real data, against scikit-learn's nearest estimator on the same split."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import CliRunner
from sklearn.linear_model import HuberRegressor, LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distrain.config import TrainConfig, load_config
from distrain.data.files import find_files
from distrain.study.point import Point
from distrain.study.record import Study
from distrain.study.sweep import Sweep
from distrain.trainer import Result, Trainer
from jobs import descent_modes

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
POINTS = 0.005  # half a point


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def config(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> TrainConfig:
    monkeypatch.chdir(ROOT)
    quiet = ["tracking.enabled=false", f"checkpoint.dir={folder}"]
    return load_config(ROOT / "jobs" / f"{name}.yaml", [*quiet, *overrides])


def rows(paths: Any, features: str | None) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table([path for path, _ in find_files(paths)])
    if features is not None:
        return np.stack(table[features].to_numpy()), table["label"].to_numpy()
    names = [name for name in table.column_names if name != "label"]
    return np.stack([table[name].to_numpy() for name in names], axis=1), table["label"].to_numpy()


def theirs(estimator: Any, job: TrainConfig) -> float:
    """What scikit-learn's estimator scores: accuracy, or R^2."""
    features = job.data.features if isinstance(job.data.features, str) else None
    fitted = estimator.fit(*rows(job.data.train, features))
    return float(fitted.score(*rows(job.data.validation, features)))


def compare(name: str, result: Result, metric: str, score: float) -> None:
    ours = result.validation[metric]
    print(f"{name}: {metric} {ours:.4f}, scikit-learn {score:.4f}", file=sys.stderr)
    assert ours >= score - POINTS


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("iris", make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
        ("wine", make_pipeline(StandardScaler(), MLPClassifier([16], max_iter=2000, random_state=0))),
        ("breast_cancer", make_pipeline(StandardScaler(), MLPClassifier([16], max_iter=2000, random_state=0))),
        ("digits", MLPClassifier([256], random_state=0)),
        ("digits_cnn", MLPClassifier([256], random_state=0)),
    ],
)
def test_a_job_is_as_good_as_scikit_learn(name: str, estimator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = config(name, tmp_path, monkeypatch)
    compare(name, Trainer(job).fit(), "accuracy", theirs(estimator, job))


def columns(path: Any, prefix: str) -> np.ndarray:
    """The columns of a table whose names begin so: [rows, columns]."""
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in table.column_names if name.startswith(prefix)], axis=1)


def test_several_labels_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = config("tags", tmp_path, monkeypatch)
    train, held_out = job.data.train, job.data.validation
    estimator = MLPClassifier([128], max_iter=100, random_state=0).fit(columns(train, "x"), columns(train, "tag"))
    score = (estimator.predict(columns(held_out, "x")) == columns(held_out, "tag")).mean()
    compare("tags", Trainer(job).fit(), "accuracy", float(score))


def word_counts(path: Any) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path)
    counts = [np.bincount(row, minlength=300) for row in table["tokens"].to_pylist()]
    return np.stack(counts), table["label"].to_numpy()


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = config("reviews", tmp_path, monkeypatch)
    estimator = LogisticRegression(max_iter=1000).fit(*word_counts(job.data.train))
    compare("reviews", Trainer(job).fit(), "accuracy", estimator.score(*word_counts(job.data.validation)))


def test_weighting_does_as_well_as_focal_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weighted = "loss={name: binary_cross_entropy, class_weights: balanced}"
    job = config("breast_cancer", tmp_path, monkeypatch, weighted)
    estimator = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    compare("breast_cancer, weighted", Trainer(job).fit(), "accuracy", theirs(estimator, job))


def test_huber_loss_withstands_outliers_and_squared_error_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = config("diabetes", tmp_path, monkeypatch)
    robust = Trainer(job).fit()
    huber = make_pipeline(StandardScaler(), HuberRegressor(max_iter=1000))
    compare("diabetes", robust, "r2", theirs(huber, job))
    squared = Trainer(config("diabetes", tmp_path, monkeypatch, "loss=mse")).fit()
    compare("diabetes, squared", squared, "r2", theirs(LinearRegression(), job))
    assert robust.validation["r2"] > squared.validation["r2"] + 0.1


def test_the_modes_of_gradient_descent_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    picture = tmp_path / "modes.png"
    quiet = ["tracking.enabled=false", f"checkpoint.dir={tmp_path / 'sweeps'}"]
    done = CliRunner().invoke(
        descent_modes.main, ["--epochs", "1", "--seconds", "0.5", "--output", str(picture), *quiet]
    )
    assert done.exit_code == 0, done.output
    samples, seconds = (Study.load(folder) for folder in sorted((tmp_path / "sweeps").iterdir()))
    # The same samples: as many steps as the mode takes for them, and the more steps, the further down.
    taken = {point.values["batch_size"]: point for point in samples.points}
    assert {mode: point.steps for mode, point in taken.items()} == {"full": 1, 32: 45, 1: 1437}
    assert {point.samples for point in taken.values()} == {1437}
    losses = {mode: point.validation["loss"] for mode, point in taken.items()}
    assert losses[1] < losses[32] < losses["full"]
    # The same seconds: every mode was stopped by the clock, and validated where it had come to.
    assert [point.reason for point in seconds.points] == 3 * ["0.5 seconds of training are over"]
    assert all(point.moments[-1].step == point.steps > 0 for point in seconds.points)
    # What a person gets: a line for each run, and the curves.
    assert done.output.count("full batch: 1,437 rows") == 2 and f"the curves: {picture}" in done.output
    figure = descent_modes.draw(samples, seconds)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3] and picture.read_bytes()[:4] == b"\x89PNG"
    assert list(figure.axes[0].lines[0].get_ydata()) == [m.metrics["loss"] for m in samples.points[0].moments]


def test_a_mode_that_fails_is_said(monkeypatch: pytest.MonkeyPatch):
    lost = Point("batch_size=32", {"batch_size": 32}, "failed", "step 1, shard 0: the loss is not finite (nan)")
    study = Study("modes", {}, {}, "none", 2.0, points=[lost])
    monkeypatch.setattr(Sweep, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(Sweep, "run", lambda _: (study, None))
    done = CliRunner().invoke(descent_modes.main, [])
    assert (
        done.exit_code == 1 and "nothing to compare" in done.output and f"batch_size=32: {lost.reason}" in done.output
    )
