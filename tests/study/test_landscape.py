"""The loss around a run against NumPy and scikit-learn: planes, directions, losses, and what the command leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save
from sklearn.decomposition import PCA
from torch import nn

from distrain.checkpoint import CheckpointStore, Snapshot
from distrain.cli import main
from distrain.config import DataConfig, TrainConfig
from distrain.data.dataset import open_dataset
from distrain.inference import evaluate
from distrain.learning.model_state import copied, model_state
from distrain.learning.task import TaskSpec, build_task
from distrain.study.landscape import filter_normalized, landscape, plane_of_path
from distrain.study.landscape_figure import draw
from distrain.study.sample import sample_rows

ROWS = 90


class Saved:
    """A run of regression on three features by plain gradient descent, a checkpoint every step, in MLflow too."""

    def __init__(self, folder: Path, model: dict[str, Any], steps: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(ROWS, 3)).astype(np.float32)
        self.y = (self.x @ np.array([1.0, -2.0, 0.5]) + rng.normal(0, 0.1, ROWS)).astype(np.float32)
        self.data = folder / "rows.parquet"
        columns = {f"x{i}": self.x[:, i] for i in range(3)} | {"y": self.y}
        pq.write_table(pa.table(columns), self.data, row_group_size=20)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.root = str(folder / "checkpoints")
        config = TrainConfig(
            data={"train": str(self.data), "validation": str(self.data), "label": "y"}, loss="mse", model=model,
            checkpoint={"dir": self.root}, tracking={"uri": self.uri},
        )  # fmt: skip
        client = mlflow.MlflowClient(self.uri)
        self.run_id = client.create_run("0").info.run_id
        fields = {"run_name": "descent", "mlflow_run_id": self.run_id, "tracking_uri": self.uri, "labels": ["y"],
                  "config": config.to_mapping(), "data": {}, "features": ["x0", "x1", "x2"], "num_features": 3,
                  "num_outputs": 1}  # fmt: skip
        task = build_task(TaskSpec(config.model, config.loss, 3, 1, False, config.seed))
        self.model = task.model
        self.trail = [self._vector()]
        store = CheckpointStore(Path(self.root, "descent"), keep=100)
        batch = {"features": torch.from_numpy(self.x), "label": torch.from_numpy(self.y)}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for step in range(steps):
            optimizer.zero_grad()
            (task.loss.per_sample(self.model.train()(batch["features"]), batch["label"]).mean()).backward()
            optimizer.step()
            self.trail.append(self._vector())
            tensors = save(copied(model_state(self.model)))
            store.write(Snapshot(step + 1, 0, False, tensors, save({}), {}, {}), fields)

    def _vector(self) -> np.ndarray:
        return np.concatenate([p.detach().double().flatten().numpy() for p in self.model.parameters()])


@pytest.fixture
def linear(tmp_path: Path) -> Saved:
    return Saved(tmp_path, {"name": "linear"}, 8)


def test_the_plane_of_a_path_is_that_of_principal_components(linear: Saved):
    found = landscape("descent", linear.root, points=5)
    assert found.path is not None and found.path.shares is not None and found.steps == tuple(range(9))
    points = np.stack(linear.trail) - linear.trail[-1]
    theirs = PCA(2).fit(points)
    np.testing.assert_allclose(found.path.shares, theirs.explained_variance_ratio_, rtol=1e-6)
    ours, expected = found.path.path, points @ theirs.components_.T
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-5)
    np.testing.assert_allclose(ours[-1], [0, 0], atol=1e-12)


def test_the_surface_is_the_loss_at_those_parameters(linear: Saved):
    """Of a linear model the loss is a quadratic form, computed here by NumPy from the four parameters."""
    found = landscape("descent", linear.root, rows=1000, points=5)
    surface = found.path
    assert surface is not None and found.num_rows == ROWS and found.rows_of == "validation"
    plane = plane_of_path([[torch.from_numpy(point)] for point in linear.trail])
    assert plane is not None
    first, second = (axis[0].double().numpy() for axis in plane[0])
    for j, i in np.ndindex(surface.loss.shape):
        weights = linear.trail[-1] + surface.x[i] * first + surface.y[j] * second
        expected = np.mean((linear.x @ weights[:3] + weights[3] - linear.y) ** 2)
        assert surface.loss[j, i] == pytest.approx(expected, rel=1e-4)
    assert surface.x[0] < surface.path[:, 0].min() and surface.x[-1] > surface.path[:, 0].max()


def test_filters_of_a_random_direction_have_the_models_norms_and_biases_and_normalization_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    for direction in filter_normalized(model, seed=1):
        for (name, parameter), drawn in zip(model.named_parameters(), direction, strict=True):
            assert drawn.shape == parameter.shape
            if name.endswith("bias") or name.startswith("1."):
                assert not drawn.any()
            else:
                norms = parameter.detach().flatten(1).norm(dim=1)
                torch.testing.assert_close(drawn.flatten(1).norm(dim=1), norms)
    one, again, other = (filter_normalized(model, seed)[0][0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_in_the_middle_is_the_runs_own_loss_with_its_running_statistics(tmp_path: Path):
    saved = Saved(tmp_path, {"hidden": [6], "normalization": "batch"}, 3)
    found = landscape("descent", saved.root, points=5)
    expected = evaluate("descent", root=saved.root)["loss"]
    assert found.random.x[2] == 0 and found.random.loss[2, 2] == pytest.approx(expected, rel=1e-6)


def test_a_path_of_two_points_spans_no_plane(tmp_path: Path):
    saved = Saved(tmp_path, {"name": "linear"}, 1)
    found = landscape("descent", saved.root, points=3)
    assert found.path is None and found.random.loss.shape == (3, 3)
    assert len(draw(found).axes) == 2  # one surface and its colour bar


def test_the_sample_is_fixed_and_without_repetition(linear: Saved):
    dataset = open_dataset(str(linear.data), DataConfig(train="-", label="y"))
    batches = sample_rows(dataset, 30, 7, seed=3)
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert len(labels) == 30 == len(set(labels)) and max(len(batch["label"]) for batch in batches) <= 7
    assert labels == torch.cat([batch["label"] for batch in sample_rows(dataset, 30, 7, seed=3)]).tolist()
    assert labels != torch.cat([batch["label"] for batch in sample_rows(dataset, 30, 7, seed=4)]).tolist()
    everything = torch.cat([batch["label"] for batch in sample_rows(dataset, 500, 50, seed=0)])
    assert sorted(everything.tolist()) == sorted(linear.y.tolist())


def test_the_command_leaves_a_file_and_the_picture_in_the_run(linear: Saved, tmp_path: Path):
    path = tmp_path / "picture.png"
    arguments = ["landscape", "descent", "--root", linear.root, "--points", "5", "-o", str(path), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert np.shape(found["path"]["loss"]) == (5, 5) == np.shape(found["random"]["loss"])
    assert path.read_bytes()[:4] == b"\x89PNG"
    client = mlflow.MlflowClient(linear.uri)
    assert [artifact.path for artifact in client.list_artifacts(linear.run_id)] == ["landscape.png"]
