"""Evaluating and predicting from a checkpoint gives what the model gives, row for row, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from distrain.checkpoint import Checkpoint, CheckpointStore, Snapshot, load
from distrain.config import TrainConfig
from distrain.errors import CheckpointError, ConfigError, DataError, TrainingError
from distrain.inference import evaluate, predict
from distrain.learning.model_state import copied, model_state
from distrain.learning.models import build_model
from tests.support.disk import largest_file

NAMES = [f"p{number}" for number in range(64)]


def checkpoint_of(
    folder: Path,
    model: nn.Module,
    config: TrainConfig,
    features: list[str],
    num_features: int | None,
    num_outputs: int,
    beside: dict[str, Tensor] | None = None,
) -> Checkpoint:
    labels = [config.data.label] if isinstance(config.data.label, str) else config.data.label
    fields: dict[str, Any] = {
        "config": config.to_mapping(),
        "data": {"train": "f00d", "validation": None},
        "features": features,
        "labels": labels,
        "num_features": num_features,
        "num_outputs": num_outputs,
    }
    snapshot = Snapshot(1, 0, False, save(copied(model_state(model))), save(beside or {}), {}, {})
    return load(CheckpointStore(folder / "run").write(snapshot, fields))


def write(path: Path, columns: dict[str, Any], row_group_size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


class Digits:
    """The digits as Parquet, and a checkpoint of a model trained on 1,400 of them."""

    def __init__(self, folder: Path) -> None:
        pixels, label = load_digits(return_X_y=True)
        self.pixels, self.label = pixels.astype(np.float32), label.astype(np.int64)
        columns = {name: self.pixels[1400:, number] for number, name in enumerate(NAMES)}
        rows = len(self.label) - 1400
        columns |= {"id": np.arange(rows) * 3, "text": [f"row {row}" for row in range(rows)], "y": self.label[1400:]}
        table = pa.table(columns)
        self.held_out = folder / "held_out"
        self.held_out.mkdir()
        pq.write_table(table.slice(0, 250), self.held_out / "a.parquet", row_group_size=90)
        pq.write_table(table.slice(250, 0), self.held_out / "b.parquet")
        pq.write_table(table.slice(250), self.held_out / "c.parquet", row_group_size=64)
        self.unlabelled = folder / "unlabelled"
        self.unlabelled.mkdir()
        for name in "abc":
            part = pq.read_table(self.held_out / f"{name}.parquet")
            pq.write_table(part.drop_columns(["y"]), self.unlabelled / f"{name}.parquet", row_group_size=50)

        self.config = TrainConfig(
            data={
                "train": "gone",
                "validation": str(self.held_out),
                "features": "p*",
                "label": "y",
                "standardize": True,
            },
            model={"hidden": [32], "normalization": "batch", "dropout": 0.2},
        )
        train = torch.from_numpy(self.pixels[:1400])
        target = torch.from_numpy(self.label[:1400])
        deviation, mean = torch.std_mean(train, 0)
        torch.manual_seed(0)
        self.model = build_model(self.config.model, 64, 10, (mean, torch.where(deviation > 0, deviation, 1.0)))
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.03)
        for _ in range(40):
            optimizer.zero_grad()
            functional.cross_entropy(self.model(train), target).backward()
            optimizer.step()
        self.model.eval()
        with torch.no_grad():
            self.outputs = self.model(torch.from_numpy(self.pixels[1400:]))
        self.expected = torch.from_numpy(self.label[1400:])
        self.checkpoint = checkpoint_of(folder, self.model, self.config, NAMES, 64, 10)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("batch_size", [None, 1, 7, 10_000])
def test_evaluate_is_the_model_over_all_rows(digits: Digits, batch_size: int | None) -> None:
    metrics = evaluate(digits.checkpoint, batch_size=batch_size)
    accuracy = (digits.outputs.argmax(1) == digits.expected).double().mean().item()
    assert metrics.keys() == {"loss", "accuracy", "samples"}
    assert metrics["samples"] == 397
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["accuracy"] > 0.88
    assert metrics["loss"] == pytest.approx(functional.cross_entropy(digits.outputs, digits.expected).item(), rel=1e-5)


def test_a_checkpoint_may_be_named(digits: Digits, tmp_path: Path) -> None:
    run = digits.checkpoint.path.parent
    assert evaluate(run.name, root=run.parent) == evaluate(digits.checkpoint)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        predict("nothing", str(digits.unlabelled), tmp_path / "out", root=run.parent)


def test_predictions_in_one_file_keep_the_rows_order(digits: Digits, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.parquet"
    answer = predict(digits.checkpoint, str(digits.unlabelled), output, ["text", "id", "p3"], probabilities=True)
    assert answer == [output]
    table = pq.read_table(output)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("text", "string"),
        ("id", "int64"),
        ("p3", "float"),
        ("prediction", "int64"),
        ("probability", "float"),
        ("probabilities", "list<element: float>"),
    ]
    shares = digits.outputs.softmax(1)
    assert table["id"].to_pylist() == [row * 3 for row in range(397)]
    assert table["text"][396].as_py() == "row 396"
    assert table["prediction"].to_pylist() == digits.outputs.argmax(1).tolist()
    np.testing.assert_allclose(table["probability"].to_numpy(), shares.max(1).values.numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.stack(table["probabilities"].to_numpy()), shares.numpy(), rtol=1e-4, atol=1e-7)
    assert [path.name for path in output.parent.iterdir()] == ["out.parquet"]


def test_a_folder_gets_a_file_for_each(digits: Digits, tmp_path: Path) -> None:
    output = tmp_path / "out"
    answer = predict(digits.checkpoint, str(digits.unlabelled), output, ["id"], batch_size=11)
    assert answer == [output / f"{name}.parquet" for name in "abc"]
    tables = [pq.read_table(output / f"{name}.parquet") for name in "abc"]
    assert [table.num_rows for table in tables] == [250, 0, 147]
    assert len({str(table.schema) for table in tables}) == 1
    assert pa.concat_tables(tables)["prediction"].to_pylist() == digits.outputs.argmax(1).tolist()
    predict(digits.checkpoint, str(digits.unlabelled), output)  # again, over the first
    assert pq.read_schema(output / "a.parquet").names == ["prediction", "probability"]


def test_files_of_one_name_stay_apart(digits: Digits, tmp_path: Path) -> None:
    sources = [str(digits.held_out / "a.parquet"), str(digits.unlabelled / "a.parquet")]
    answer = predict(digits.checkpoint, sources, tmp_path / "out")
    assert [file.name for file in answer] == ["00000-a.parquet", "00001-a.parquet"]


def test_an_output_that_cannot_be_is_refused(digits: Digits, tmp_path: Path) -> None:
    data = str(digits.unlabelled)
    before = (digits.unlabelled / "a.parquet").read_bytes()
    with pytest.raises(ConfigError, match="is a file of the data itself"):
        predict(digits.checkpoint, f"file://{data}/a.parquet", digits.unlabelled / "a.parquet")
    for output in (digits.unlabelled, digits.unlabelled / "a.parquet"):
        with pytest.raises(ConfigError, match="is a file of the data itself"):
            predict(digits.checkpoint, data, output)
    assert (digits.unlabelled / "a.parquet").read_bytes() == before
    write(tmp_path / "mixed" / "other.parquet", {"a": [1]})
    with pytest.raises(ConfigError, match=r"holds other Parquet files \(other\.parquet\)"):
        predict(digits.checkpoint, data, tmp_path / "mixed")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        predict(digits.checkpoint, data, tmp_path / "folder.parquet")
    with pytest.raises(ConfigError, match="not to a URI"):
        predict(digits.checkpoint, data, "s3://bucket/out.parquet")
    with pytest.raises(ConfigError, match="'id' would be there twice"):
        predict(digits.checkpoint, data, tmp_path / "out", ["id", "id"])
    with pytest.raises(DataError, match="no column 'idd' to keep; did you mean 'id'"):
        predict(digits.checkpoint, data, tmp_path / "out", ["idd"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        predict(digits.checkpoint, data, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predict(digits.checkpoint, data, tmp_path / "out", batch_size=0)


def test_bad_rows_leave_nothing_half_written(digits: Digits, tmp_path: Path) -> None:
    columns = {name: digits.pixels[:300, number].tolist() for number, name in enumerate(NAMES)}
    write(tmp_path / "in" / "1.parquet", columns)
    columns["p7"][260] = None
    write(tmp_path / "in" / "2.parquet", columns)
    with pytest.raises(DataError, match=r"2\.parquet: row group 2, column 'p7', row 60: null"):
        predict(digits.checkpoint, str(tmp_path / "in"), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(DataError, match="no column 'p0'"):
        predict(digits.checkpoint, str(write(tmp_path / "x.parquet", {"p4": [1.0]})), tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(digits: Digits, tmp_path: Path) -> None:
    predict(digits.checkpoint, str(digits.unlabelled), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with largest_file(4000), pytest.raises(DataError, match=r"out: predictions cannot be written: .*File too large"):
        predict(digits.checkpoint, str(digits.unlabelled), tmp_path / "out", ["text"], probabilities=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_data_that_does_not_fit_is_refused(digits: Digits, tmp_path: Path) -> None:
    columns: dict[str, Any] = {name: np.zeros(150) for name in NAMES}
    path = write(tmp_path / "high.parquet", columns | {"y": np.arange(150) % 9 + 2})
    with pytest.raises(DataError, match=r"high\.parquet: row group 0, column 'y': label 10 is out of range"):
        evaluate(digits.checkpoint, str(path))
    unsaid = tmp_path / "unsaid.parquet"
    pq.write_table(pq.read_table(path), unsaid, row_group_size=100, write_statistics=False)
    with pytest.raises(DataError, match=r"unsaid\.parquet: row group 0: label 10 is out of range"):
        evaluate(digits.checkpoint, str(unsaid))
    with pytest.raises(DataError, match="no column 'y'"):
        evaluate(digits.checkpoint, str(digits.unlabelled))
    with pytest.raises(DataError, match="no such file"):
        evaluate(digits.checkpoint, str(tmp_path / "nowhere"))


def test_without_validation_data_the_data_must_be_named(tmp_path: Path) -> None:
    config = TrainConfig(data={"train": "gone", "label": "y"})
    model = build_model(config.model, 2, 2)
    with pytest.raises(ConfigError, match="no validation data"):
        evaluate(checkpoint_of(tmp_path, model, config, ["a", "b"], 2, 2))


def regression(tmp_path: Path, loss: str, labels: list[str]) -> tuple[Checkpoint, Path, Tensor, Tensor]:
    """A linear model of two features, its data, its outputs and the labels."""
    config = TrainConfig(data={"train": "gone", "label": labels}, model={"hidden": []}, loss=loss)
    torch.manual_seed(0)
    model = build_model(config.model, 2, len(labels))
    features = torch.randn(500, 2)
    label = (torch.randn(500, len(labels)) > 0).float()
    columns = {"a": features[:, 0].numpy(), "b": features[:, 1].numpy()}
    path = write(tmp_path / "in.parquet", columns | {n: label[:, i].numpy() for i, n in enumerate(labels)}, 300)
    with torch.no_grad():
        return checkpoint_of(tmp_path, model, config, ["a", "b"], 2, len(labels)), path, model(features), label


@pytest.mark.parametrize("labels", [["u"], ["u", "v"]])
def test_binary_cross_entropy(tmp_path: Path, labels: list[str]) -> None:
    checkpoint, path, outputs, label = regression(tmp_path, "binary_cross_entropy", labels)
    metrics = evaluate(checkpoint, str(path))
    expected = functional.binary_cross_entropy_with_logits(outputs, label).item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(((outputs > 0) == (label > 0.5)).double().mean().item())
    predict(checkpoint, str(path), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    ends = [""] if len(labels) == 1 else ["_u", "_v"]
    assert table.schema.names == [f"{name}{end}" for end in ends for name in ("prediction", "probability")]
    for number, end in enumerate(ends):
        assert table.schema.field(f"prediction{end}").type == pa.int8()
        np.testing.assert_allclose(table[f"probability{end}"], outputs[:, number].sigmoid(), rtol=1e-5)
        assert table[f"prediction{end}"].to_pylist() == (outputs[:, number] > 0).int().tolist()


@pytest.mark.parametrize("labels", [["u"], ["u", "v"]])
def test_mse(tmp_path: Path, labels: list[str]) -> None:
    checkpoint, path, outputs, label = regression(tmp_path, "mse", labels)
    assert evaluate(checkpoint, str(path))["loss"] == pytest.approx(
        functional.mse_loss(outputs, label).item(), rel=1e-6
    )
    predict(checkpoint, str(path), tmp_path / "out.parquet", ["a"])
    table = pq.read_table(tmp_path / "out.parquet")
    ends = [""] if len(labels) == 1 else ["_u", "_v"]
    assert table.schema.names == ["a", *(f"prediction{end}" for end in ends)]
    for number, end in enumerate(ends):
        np.testing.assert_allclose(table[f"prediction{end}"], outputs[:, number], rtol=1e-5, atol=1e-7)


def test_a_list_column_of_another_width_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(data={"train": "gone", "features": "pixels", "label": "y"}, model={"hidden": []})
    checkpoint = checkpoint_of(tmp_path, build_model(config.model, 3, 2), config, ["pixels"], 3, 2)
    path = write(tmp_path / "fits.parquet", {"pixels": [[1.0, 2.0, 3.0]] * 5})
    predict(checkpoint, str(path), tmp_path / "out.parquet", ["pixels"])
    assert pq.read_table(tmp_path / "out.parquet")["pixels"][0].as_py() == [1.0, 2.0, 3.0]
    path = write(tmp_path / "wide.parquet", {"pixels": [[1.0, 2.0, 3.0, 4.0]] * 5})
    with pytest.raises(DataError, match="4 features a row, the model was trained on 3"):
        predict(checkpoint, str(path), tmp_path / "out2.parquet")


class TwoInputs(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.wrong = wrong

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left + right[:, 0])[1:] * self.scale if self.wrong else torch.stack([left * self.scale, right[:, 0]], 1)


def two_inputs(batch: pa.RecordBatch) -> dict[str, Tensor]:
    tensors = {"left": torch.tensor(batch.column("a").to_numpy()), "right": torch.tensor(batch.column("b").to_numpy())}
    tensors["right"] = tensors["right"][:, None]
    if "y" in batch.schema.names:
        tensors["label"] = torch.tensor(batch.column("y").to_numpy())
    return tensors


def as_documented(batch: pa.RecordBatch) -> dict[str, Tensor]:
    return {name: torch.tensor(batch.column(column).to_numpy()) for name, column in (("left", "a"), ("label", "y"))}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor) -> Tensor:
        return left * self.scale


@pytest.mark.parametrize("other", [{}, {"y": [7]}])
def test_a_transform_gets_the_label_where_the_data_hold_it(tmp_path: Path, other: dict[str, list[int]]) -> None:
    config = TrainConfig(
        data={"train": "gone", "features": ["a"], "label": "y", "transform": f"{__name__}:as_documented"},
        model={"factory": f"{__name__}:Twice"},
        loss="mse",
    )
    checkpoint = checkpoint_of(tmp_path, Twice(), config, ["a"], None, 1)
    write(tmp_path / "in" / "1.parquet", {"a": [1.0, 2.0], "y": [5.0, 6.0]})
    predict(checkpoint, str(tmp_path / "in"), tmp_path / "out.parquet", ["y", "a"])
    expected = {"y": [5.0, 6.0], "a": [1.0, 2.0], "prediction": [2.0, 4.0]}
    assert pq.read_table(tmp_path / "out.parquet").to_pydict() == expected
    # Not in every file, or of another type in one: now it is hidden in all of them.
    write(tmp_path / "in" / "2.parquet", {"a": [3.0], **other})
    with pytest.raises(TrainingError, match=r"1\.parquet: row group 0: data.transform .* raised KeyError"):
        predict(checkpoint, str(tmp_path / "in"), tmp_path / "out.parquet")


def total(outputs: Tensor, label: Tensor) -> Tensor:
    return (outputs.sum(1) - label) ** 2


def own_total() -> Any:
    return total


class Shifted(nn.Linear):
    """By a buffer that its `state_dict` leaves out."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) + self.shift


def test_a_buffer_that_training_changed_counts_though_the_model_s_state_leaves_it_out(tmp_path: Path) -> None:
    config = TrainConfig(
        data={"train": "gone", "features": ["a"], "label": "y"}, model={"factory": f"{__name__}:Shifted"}, loss="mse"
    )
    model = Shifted()
    nn.init.ones_(model.weight)
    path = write(tmp_path / "in.parquet", {"a": np.arange(3, dtype=np.float32), "y": np.full(3, 2.0, np.float32)})
    for name, shift in (("built", 0.0), ("trained", 2.0)):
        beside = {"buffer.shift": torch.tensor([shift])} if shift else {}
        checkpoint = checkpoint_of(tmp_path / name, model, config, ["a"], 1, 1, beside)
        predict(checkpoint, str(path), tmp_path / f"{name}.parquet")
        predictions = pq.read_table(tmp_path / f"{name}.parquet")["prediction"].to_pylist()
        assert predictions == [shift, 1 + shift, 2 + shift]
        assert evaluate(checkpoint, str(path))["loss"] == pytest.approx(sum((p - 2) ** 2 for p in predictions) / 3)


def test_own_model_transform_and_loss(tmp_path: Path) -> None:
    config = TrainConfig(
        data={"train": "gone", "features": ["a", "b"], "label": "y", "transform": f"{__name__}:two_inputs"},
        model={"factory": f"{__name__}:TwoInputs"},
        loss={"factory": f"{__name__}:own_total"},
    )
    checkpoint = checkpoint_of(tmp_path, TwoInputs(), config, ["a", "b"], None, 1)
    columns = {"a": np.arange(6.0, dtype=np.float32), "b": np.ones(6, dtype=np.float32)}
    path = write(tmp_path / "in.parquet", columns)
    predict(checkpoint, str(path), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["prediction"].to_pylist() == [[2.0 * i, 1.0] for i in range(6)]
    labelled = write(tmp_path / "labelled.parquet", columns | {"y": np.full(6, 1.0, dtype=np.float32)})
    assert evaluate(checkpoint, str(labelled)) == {"loss": sum((2.0 * i) ** 2 for i in range(6)) / 6, "samples": 6}

    wrong = config.to_mapping() | {"model": {"factory": f"{__name__}:TwoInputs", "args": {"wrong": True}}}
    checkpoint = checkpoint_of(tmp_path / "wrong", TwoInputs(), TrainConfig.from_mapping(wrong), ["a", "b"], None, 1)
    with pytest.raises(TrainingError, match=r"row group 0: the model gives \[5\] for 6 rows"):
        predict(checkpoint, str(path), tmp_path / "wrong.parquet")
    with pytest.raises(TrainingError, match=r"(?s)row group 0: the model or the loss raised .*Traceback"):
        evaluate(checkpoint, str(labelled))
    assert not (tmp_path / "wrong.parquet").exists()
