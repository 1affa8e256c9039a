"""The model in MLflow gives what the module gives, without its code and without pickle."""

from __future__ import annotations

import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from distrain.tracking import ModelInput, RunDescription
from distrain.tracking.export import PROGRAM, ExportFailed, export_model

SCALARS = (("x", "double"), ("n", "int32"), ("b", "bool"), ("u", "uint8"))


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")


@pytest.fixture
def round_trip(store, monkeypatch):
    """Log a module and load it again: with mlflow.pyfunc, by the run's id."""
    import mlflow

    from distrain.tracking.store import MlflowRun

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)

    def log_and_load(module, inputs, **more):
        run = MlflowRun.open(store, "models", RunDescription("", "0" * 64))
        run.log_model(module, inputs, 7, **more)
        return mlflow.pyfunc.load_model(f"runs:/{run.run_id}/model")

    return log_and_load


def mlp(num_features):
    torch.manual_seed(0)
    hidden = nn.Linear(num_features, 8)
    return nn.Sequential(hidden, nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def outputs_of(module, *inputs, **named):
    with torch.no_grad():
        return module.eval()(*inputs, **named).numpy()


def test_columns_of_numbers(round_trip):
    module = mlp(4)
    module.train()
    loaded = round_trip(module, [ModelInput("features", torch.rand(1, 4), SCALARS)], registered_name="a model")
    assert module.training
    frame = pd.DataFrame(
        {
            "u": np.arange(9, dtype="uint8"),
            "other": "ignored",
            "b": np.arange(9) % 2 == 0,
            "n": np.arange(9),
            "x": np.linspace(0, 1, 9, dtype="float32"),
        },
        index=range(100, 109),
    )
    expected = outputs_of(module, torch.tensor(frame[["x", "n", "b", "u"]].to_numpy(dtype="float32")))
    predicted = loaded.predict(frame)
    assert predicted.dtype == np.float32
    np.testing.assert_array_equal(predicted, expected)
    assert loaded.predict(frame[:1]).shape == (1, 3)
    assert loaded.metadata.get_input_schema().input_names() == ["x", "n", "b", "u"]
    assert loaded.predict(loaded.input_example).shape == (1, 3)
    import mlflow

    np.testing.assert_array_equal(mlflow.pyfunc.load_model("models:/a model/1").predict(frame), expected)


def test_a_column_of_lists(round_trip):
    module = mlp(5)
    loaded = round_trip(module, [ModelInput("features", torch.rand(4, 5), (("pixels", "list<item: float>"),))])
    rows = np.random.default_rng(0).random((6, 5), dtype="float32")
    expected = outputs_of(module, torch.tensor(rows))
    for cells in (list(rows), rows.tolist(), list(rows.astype("float64"))):
        frame = pd.DataFrame({"pixels": pd.Series(cells, dtype=object)})
        np.testing.assert_array_equal(loaded.predict(frame), expected)
        # Bits depend on the batch's size on some processors.
        some = outputs_of(module, torch.tensor(rows[3:]))
        np.testing.assert_array_equal(loaded.predict(frame[frame.index > 2]), some)
    ragged = pd.DataFrame({"pixels": [[0.5] * 5, [0.5] * 4]})
    with pytest.raises(ValueError, match="column pixels, row 1: 4 values where the model takes 5"):
        loaded.predict(ragged)


def test_columns_of_types_that_mlflow_does_not_know(round_trip):
    """Beside others, and one alone."""
    module, columns = mlp(3), (("x", "float"), ("n", "uint64"), ("m", "uint64"))
    loaded = round_trip(module, [ModelInput("features", torch.arange(9.0).reshape(3, 3), columns)])
    example = loaded.input_example
    assert (
        example["x"].tolist() == [0, 3, 6] and example["n"].tolist() == [1, 4, 7] and example["m"].tolist() == [2, 5, 8]
    )
    rows = torch.tensor(example.to_numpy(dtype="float32"))
    np.testing.assert_array_equal(loaded.predict(example), outputs_of(module, rows))
    frame = pd.DataFrame({name: np.arange(4, dtype="uint64") for name in "xnm"}).astype({"x": "float32"})
    assert loaded.predict(frame).shape == (4, 3)
    one = nn.Linear(1, 1)
    loaded = round_trip(one, [ModelInput("features", torch.tensor([[1.0], [2.0]]), (("n", "uint64"),))])
    assert loaded.input_example["n"].tolist() == [1, 2]
    assert loaded.predict(pd.DataFrame({"n": np.arange(4, dtype="uint64")})).shape == (4, 1)


def test_a_single_number_and_a_whole_number_list(round_trip):
    one = nn.Linear(1, 1)
    loaded = round_trip(one, [ModelInput("features", torch.rand(2, 1), (("x", "float"),))])
    np.testing.assert_array_equal(
        loaded.predict(pd.DataFrame({"x": [1.0, 2.0]})), outputs_of(one, torch.tensor([[1.0], [2.0]]))
    )
    counts = ModelInput("features", torch.zeros(2, 2), (("counts", "fixed_size_list<item: uint8>[2]"),))
    loaded = round_trip(nn.Linear(2, 1), [counts])
    assert loaded.predict(pd.DataFrame({"counts": [[1, 2], [3, 4], [5, 6]]})).shape == (3, 1)


def test_inputs_that_a_transform_made(round_trip):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.Embedding(10, 4)
            self.flat = nn.Linear(6, 4)

        def forward(self, image, word):
            return (self.flat(image.flatten(1)) + self.bag(word)).sum(1)

    module = Two()
    images, words = torch.rand(3, 2, 3), torch.tensor([1, 5, 9])
    loaded = round_trip(module, [ModelInput("image", images), ModelInput("word", words)])
    frame = pd.DataFrame({"word": words.numpy(), "image": images.tolist()})
    predicted = loaded.predict(frame)
    assert predicted.shape == (3, 1)
    np.testing.assert_array_equal(predicted[:, 0], outputs_of(module, image=images, word=words))


def test_more_rows_than_are_computed_at_once(round_trip):
    module = nn.Linear(1, 2)
    loaded = round_trip(module, [ModelInput("features", torch.rand(2, 1), (("x", "float"),))])
    rows = torch.rand(20_000, 1)
    predicted = loaded.predict(pd.DataFrame({"x": rows[:, 0].numpy()}))
    np.testing.assert_allclose(predicted, outputs_of(module, rows), rtol=1e-6)
    assert loaded.predict(pd.DataFrame({"x": np.zeros(0)})).shape == (0, 2)


def test_the_file_holds_no_pickle(tmp_path):
    module = mlp(4)
    export_model(module, [ModelInput("features", torch.rand(2, 4))], tmp_path)
    with zipfile.ZipFile(tmp_path / PROGRAM) as archive:
        for entry in archive.infolist():
            data = archive.read(entry)
            name = entry.filename.rpartition("/")[2]
            is_floats = name.startswith("weight_") and name.removeprefix("weight_").isdigit()
            assert is_floats or data.startswith(b"{") or data.decode("ascii").isprintable() or data == b"6\n", name


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda x: (x, x), "a tuple, not one tensor"),
        (lambda x: x if x.sum() > 0 else -x, "."),
        (lambda x: 1 / 0, "Zero"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(tmp_path, forward, told):
    class Module(nn.Module):
        def forward(self, x):
            return forward(x)

    module = Module()
    with pytest.raises(ExportFailed, match=told) as caught:
        export_model(module, [ModelInput("features", torch.rand(2, 4))], tmp_path)
    assert "\n" not in str(caught.value)
    assert module.training


@pytest.mark.parametrize("encoder", ["bag", "transformer"])
def test_lists_of_any_length(round_trip, encoder):
    """Lists longer than those of the example too, and empty ones."""
    from distrain.config import ModelConfig
    from distrain.learning.models import build_model

    torch.manual_seed(0)
    config = ModelConfig(name="text", vocabulary=9, embedding=8, hidden=[4], encoder=encoder, dropout=0.1)
    module = build_model(config, None, 3)
    features, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]])
    inputs = [ModelInput("features", features, (("tokens", "list<element: int32>"),), "ragged"),
              ModelInput("mask", mask, form="mask")]  # fmt: skip
    loaded = round_trip(module, inputs)
    assert loaded.metadata.get_input_schema().input_names() == ["tokens"]
    lists = [[1, 2, 3, 4, 5], [], [8], [7, 7]]
    padded = torch.tensor([row + [0] * (5 - len(row)) for row in lists])
    expected = outputs_of(module, padded, torch.arange(5) < torch.tensor([5, 0, 1, 2])[:, None])
    for cells in (lists, [np.array(row, dtype="int64") for row in lists]):
        predicted = loaded.predict(pd.DataFrame({"tokens": pd.Series(cells, dtype=object)}))
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)
    assert loaded.predict(pd.DataFrame({"tokens": [[4]]})).shape == (1, 3)
    assert loaded.predict(loaded.input_example).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_images(round_trip, channels):
    from distrain.config import ModelConfig
    from distrain.learning.models import build_model
    from distrain.tracking.logged_model import _encoded

    module = build_model(ModelConfig(name="cnn", channels=[4], hidden=[5]), channels * 20, 3, None, (channels, 5, 4))
    pixels = torch.randint(0, 256, (6, channels, 5, 4), dtype=torch.uint8)
    loaded = round_trip(module, [ModelInput("features", pixels[:2], (("image", "binary"),), "image")])
    frame = pd.DataFrame({"image": [_encoded(image.numpy()) for image in pixels]})
    np.testing.assert_array_equal(loaded.predict(frame), outputs_of(module, pixels))
    assert loaded.predict(loaded.input_example).shape == (2, 3)
    other = pd.DataFrame({"image": [_encoded(np.zeros((channels, 4, 4), np.uint8))]})
    with pytest.raises(ValueError, match="column image, row 0: an image of"):
        loaded.predict(other)
    deep = pd.DataFrame({"image": [_encoded(np.full((1, 5, 4), 300, np.uint16))]})
    with pytest.raises(ValueError, match="column image, row 0: Pillow's mode I;16; images have 8 bits a channel"):
        loaded.predict(deep)
