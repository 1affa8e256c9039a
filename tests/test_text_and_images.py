"""Whole runs over token ids of any length and over encoded images: equal bits at any worker count (in one process),
evaluate, predict, and the model in MLflow (on Ray)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from torch import Tensor, nn

from distrain.config import TrainConfig
from distrain.errors import DataError
from distrain.inference import evaluate, predict
from distrain.preparation import prepare
from distrain.server.loop import LoopSettings
from distrain.trainer import Result, Trainer
from tests.support.runs import Job, train


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


class MaskedMean(nn.Module):
    """A user's model over padded rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 2)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        assert not features[~mask].any()
        return self.out(features.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1))


def tokens(folder: Path, rows: int = 160, low: int = 0, seed: int = 0) -> Path:
    """Lists of 0 to 8 token ids; the label is whether even ids outweigh odd ones."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(low, 20, rng.integers(0, 9)) for _ in range(rows)]
    label = np.array([(np.where(row % 2, -1, 1)).sum() > 0 for row in lists], np.int64)
    folder.mkdir(exist_ok=True)
    table = pa.table({"tokens": pa.array([row.tolist() for row in lists], pa.list_(pa.int32())), "label": label})
    pq.write_table(table, folder / "rows.parquet", row_group_size=25)
    return folder / "rows.parquet"


def pictures(folder: Path, rows: int = 120) -> Path:
    """Images whose left (0) or right (1) half is brighter."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, rows)
    contents = []
    for side in label:
        pixels = rng.integers(0, 120, (6, 8, 3), dtype=np.uint8)
        pixels[:, 4 * side : 4 * side + 4] += 100
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": contents, "label": label}), folder / "rows.parquet", row_group_size=25)
    return folder / "rows.parquet"


def convolution() -> nn.Module:
    """A user's model over images of 0 to 1."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 2))


def config(folder: Path, path: Path, lr: float, model: dict[str, Any], **data: Any) -> TrainConfig:
    return TrainConfig(
        data={"train": str(path), "validation": str(path), "label": "label", "shuffle_rows": 40, **data},
        model=model,
        optimizer={"name": "Adam", "lr": lr},
        batch_size=24,
        epochs=12,
        shards=4,
        checkpoint={"dir": str(folder / "checkpoints")},
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    )


def in_one_process(job: TrainConfig, workers: int) -> tuple[str, float]:
    """The run's parameters_sha256, and its accuracy at the end."""
    prepared = prepare(job)
    loop = LoopSettings(epochs=job.epochs, num_workers=workers)
    run, report = train(Job(prepared.train, prepared.task, prepared.validation, job.optimizer, loop=loop), workers)
    assert run.outcome is not None
    return run.outcome.parameters_sha256, report.validations[-1].metrics["accuracy"]


# No dropout: worker threads of one process share the generator that seeds it.
TEXT = {"name": "text", "vocabulary": 20, "embedding": 8, "heads": 2, "layers": 1, "hidden": [8]}
CNN = {"name": "cnn", "channels": [4], "hidden": [8], "image_shape": [3, 6, 8]}


@pytest.mark.parametrize("encoder", ["bag", "transformer"])
def test_text_has_equal_bits_at_any_worker_count(tmp_path: Path, encoder: str):
    job = config(tmp_path, tokens(tmp_path / "rows"), 0.02, {**TEXT, "encoder": encoder}, features="tokens")
    bits, accuracy = in_one_process(job, 1)
    assert accuracy > 0.8
    assert in_one_process(job, 3)[0] == bits


@pytest.mark.parametrize("model", [CNN, {"factory": "tests.test_text_and_images:convolution"}])
def test_images_have_equal_bits_at_any_worker_count(tmp_path: Path, model: dict):
    job = config(tmp_path, pictures(tmp_path / "rows"), 0.005, model, features="image")
    bits, accuracy = in_one_process(job, 1)
    assert accuracy > 0.9
    assert in_one_process(job, 3)[0] == bits


def test_a_factorys_model_takes_the_mask(tmp_path: Path):
    rng = np.random.default_rng(0)
    lists = [rng.normal(sign, 0.5, rng.integers(1, 9)).tolist() for sign in rng.choice([-1, 1], 120)]
    label = np.array([np.mean(row) > 0 for row in lists], np.int64)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": pa.array(lists, pa.list_(pa.float64())), "label": label}), path, row_group_size=25)
    model = {"factory": "tests.test_text_and_images:MaskedMean"}
    job = config(tmp_path, path, 0.1, model, features="x", ragged=True)
    bits, accuracy = in_one_process(job, 1)
    assert accuracy > 0.95
    assert in_one_process(job, 3)[0] == bits


def served(folder: Path, result: Result, frame: pd.DataFrame) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        return mlflow.pyfunc.load_model(f"runs:/{result.run_id}/model").predict(frame)


def artifacts(folder: Path, result: Result) -> set[str]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return {entry.path for entry in client.list_artifacts(result.run_id)}


def predicted(folder: Path, result: Result, data: Path) -> np.ndarray:
    assert result.checkpoint is not None
    [path] = predict(result.checkpoint, str(data), folder / "predictions.parquet")
    return pq.read_table(path)["prediction"].to_numpy()


@pytest.mark.ray
def test_text_is_evaluated_predicted_and_served(cluster, tmp_path: Path):
    data = tokens(tmp_path / "rows")
    job = config(tmp_path, data, 0.02, {**TEXT, "encoder": "transformer"}, features="tokens")
    result = Trainer(job).fit()
    assert result.parameters_sha256 == in_one_process(job, 1)[0]
    assert result.checkpoint is not None
    assert evaluate(result.checkpoint)["accuracy"] == pytest.approx(result.validation["accuracy"])
    table = pq.read_table(data).to_pandas()
    found = predicted(tmp_path, result, data)
    assert (found == table["label"]).mean() == pytest.approx(result.validation["accuracy"])
    np.testing.assert_array_equal(served(tmp_path, result, table[["tokens"]]).argmax(1), found)
    assert "graph.png" in artifacts(tmp_path, result)
    with pytest.raises(DataError, match=r"row group 0, column 'tokens', row \d+: token id -\d is out of range"):
        evaluate(result.checkpoint, str(tokens(tmp_path / "bad", low=-3)))


@pytest.mark.ray
def test_images_are_predicted_and_served(cluster, tmp_path: Path):
    data = pictures(tmp_path / "rows")
    result = Trainer(config(tmp_path, data, 0.005, CNN, features="image")).fit()
    table = pq.read_table(data).to_pandas()
    found = predicted(tmp_path, result, data)
    assert (found == table["label"]).mean() == pytest.approx(result.validation["accuracy"])
    np.testing.assert_array_equal(served(tmp_path, result, table[["image"]]).argmax(1), found)
    assert "graph.png" in artifacts(tmp_path, result)
