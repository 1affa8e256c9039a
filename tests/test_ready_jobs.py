"""The jobs on real data, against scikit-learn's nearest estimator on the same split."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from sklearn.linear_model import HuberRegressor, LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distrain.config import TrainConfig, load_config
from distrain.data.files import find_files
from distrain.trainer import Result, Trainer

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
