"""The configuration reads back as written, and names every mistake with file, line and key."""

from __future__ import annotations

import pickle
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import ClipConfig, OptimizerConfig, TrainConfig, load_config
from distrain.errors import ConfigError

DATA = {"train": "rows", "validation": "held-out", "label": "y"}

configs = st.fixed_dictionaries(
    {"data": st.just(DATA)},
    optional={
        "loss": st.sampled_from(["mse", "cross_entropy", {"factory": "mine:loss", "args": {"gamma": 2.0}}]),
        "model": st.fixed_dictionaries({"hidden": st.lists(st.integers(1, 999), max_size=3)}),
        "optimizer": st.fixed_dictionaries(
            {"name": st.sampled_from(["SGD", "Adam"]), "lr": st.floats(1e-6, 10)},
            optional={"momentum": st.floats(0, 0.99), "betas": st.just([0.9, 0.99])},
        ),
        "clip": st.sampled_from([None, {"norm": 1.0}, {"value": 0.5}]),
        "batch_size": st.integers(8, 4096),
        "shards": st.sampled_from([None, 1, 4, 8]),
        "seed": st.integers(0, 2**63 - 1),
        "early_stopping": st.sampled_from([None, {"metric": "accuracy", "patience": 2}]),
        "convergence": st.sampled_from([None, {"grad_norm": 1e-3}]),
    },
)


@given(values=configs)
def test_what_is_written_reads_back_as_the_same(values: dict):
    config = TrainConfig(**values)
    text = config.to_yaml()
    again = TrainConfig.from_mapping(yaml.safe_load(text))
    assert again == config
    assert again.sha256() == config.sha256() and again.to_yaml() == text
    assert pickle.loads(pickle.dumps(config)) == config


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return [line.replace(f"{tmp_path}/", "") for line in error.value.message.splitlines()]


GOOD = "data: {train: rows, label: y}\n"


def test_every_mistake_at_once_with_file_line_and_key(tmp_path: Path):
    text = "data:\n  train: rows\nbatchsize: 3\nmodel: {hidden: [8, -1]}\nloss: mes\nclip: {}\nserver: {mode: asinc}\n"
    assert sorted(problems(tmp_path, text, "optimizer.lr=fast", "nonsense")) == sorted(
        [
            'override "nonsense": write it as dotted.key=value, such as optimizer.lr=0.01',
            "train.yaml:1: data.label: missing; it has no default",
            "train.yaml:3: batchsize: no such key; did you mean batch_size?",
            "train.yaml:4: model.hidden[1]: must be at least 1, got -1",
            "train.yaml:5: loss.name: 'mes' is not supported; it may be mse, mae, huber, cross_entropy, focal, "
            "binary_cross_entropy, binary_focal; "
            "did you mean mse?",
            "train.yaml:6: clip: give exactly one of norm and value",
            "train.yaml:7: server.mode: 'asinc' is not supported; it may be sync, async; did you mean async?",
            "override \"optimizer.lr=fast\": optimizer.lr: expected a number, got 'fast'",
        ]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "train.yaml: the file is empty"),
        ("- 1\n", "train.yaml:1: a configuration is a mapping of keys, this is a list"),
        ("data: {\n", "not valid YAML"),
        (GOOD + "epochs: 1\nepochs: 2\n", "train.yaml:3: epochs: the same key stands in line 2 already"),
        (GOOD + "model: {activation: no}\n", "YAML reads yes, no, on and off as true and false"),
        (
            GOOD + "shards: 999\nserver: {mode: async}\n",
            "train.yaml: batch_size: 256 rows for 999 shards: with server.mode: async",
        ),
        (
            GOOD + "batch_size: ful\n",
            "train.yaml:2: batch_size: expected a number of rows, at least 1, or full, got 'ful'",
        ),
        (GOOD + "workers: {count: 1, min: 2}\n", "train.yaml:2: workers.min: 2 is more than workers.count, 1"),
        (
            GOOD + "server: {staleness: null}\n",
            "train.yaml:2: server.staleness: null, any number, which only server.mode: async allows",
        ),
        (GOOD + "workers: {count: 3, max: 2}\n", "train.yaml:2: workers.max: 2 is less than workers.count, 3"),
        (GOOD + "server: {quorum: 3}\n", "train.yaml:2: server.quorum: 3 is more than the 2 shards of a step"),
        (GOOD + "server: {mode: async, quorum: 2}\n", "train.yaml:2: server.quorum: needs server.mode: sync"),
        (
            GOOD + "server: {delay_compensation: 0.1}\n",
            "train.yaml:2: server.delay_compensation: needs server.mode: async",
        ),
        (
            GOOD + "server: {mode: async, wire_dtype: bf16}\n",
            "train.yaml:2: server.wire_dtype: bf16, and server.mode: async works with fp32 only",
        ),
        (
            GOOD + "server: {wire_dtype: bf16}\naveraging: {decay: 0.9}\n",
            "train.yaml:2: server.wire_dtype: bf16, and averaging works with fp32 only",
        ),
        (GOOD + "early_stopping: {patience: 2}\n", "train.yaml:2: early_stopping: needs data.validation"),
        (GOOD + "model: {name: mlp, factory: 'a:b'}\n", "train.yaml:2: model: give either name or factory, not both"),
        (GOOD + "workers: {gpus: 2}\n", "train.yaml:2: workers.gpus: "),
        (GOOD + "workers: {gpu_count: 1}\n", "train.yaml:2: workers.gpu_count: 1, and workers.gpus is 0"),
        (GOOD + "workers: {precision: fp8}\n", "train.yaml:2: workers.precision: "),
        (
            GOOD + "server: {mode: async, slices: 2}\n",
            "train.yaml:2: server.slices: 2, and server.mode: async works with",
        ),
        (GOOD + "resume: auto\n", "train.yaml:2: resume: auto needs tracking.run_name"),
        (
            GOOD + "restarts: 2\ntracking: {registered_model_name: mine}\n",
            "train.yaml:3: tracking.registered_model_name: restarts register no model",
        ),
        (
            GOOD + "optimizer: {scale_lr: sqrt, base_batch_size: 8}\nschedule: {name: CyclicLR}\n",
            "train.yaml:2: optimizer.scale_lr: scales optimizer.lr, and CyclicLR goes by its own base_lr",
        ),
        (
            "data: {train: rows, label: y, standardize: true, transform: 'a:b'}\n",
            "train.yaml:1: data.standardize: has no features to measure with data.transform",
        ),
        (
            "data: {train: rows, label: y, ragged: true, transform: 'a:b'}\nmodel: {factory: 'a:b'}\n",
            "train.yaml:1: data.transform: makes the model's inputs itself",
        ),
        (GOOD + "data2: 1\n", "train.yaml:2: data2: no such key; did you mean data?"),
    ],
)
def test_one_mistake(tmp_path: Path, text: str, said: str):
    assert any(said in line for line in problems(tmp_path, text)), problems(tmp_path, text)


def test_all_that_does_not_fit_together_is_said_at_once(tmp_path: Path):
    text = GOOD + "workers: {count: 1, min: 5}\nearly_stopping: {patience: 2}\n"
    assert problems(tmp_path, text, "server.staleness=null", "model=logistic", "loss=mse") == [
        "train.yaml:2: workers.min: 5 is more than workers.count, 1",
        "train.yaml:3: early_stopping: needs data.validation",
        'override "server.staleness=null": server.staleness: null, any number, which only server.mode: async allows',
        'override "model=logistic": model.name: logistic gives logits, which mse does not take; use cross_entropy or '
        "binary_cross_entropy, or model: linear",
    ]
    with pytest.raises(ConfigError) as error:
        TrainConfig(data={"train": "rows", "label": "y"}, workers={"count": 1, "min": 5}, target={"value": 1})
    assert error.value.message.splitlines() == [
        "workers.min: 5 is more than workers.count, 1",
        "target: needs data.validation",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("batchsize: 3\n", [], ["optimizer", "schedule"]),
        ("workers: {min: 9}\n", [], ["optimizer", "schedule"]),
        ("", ["optimizer.lr=fast"], ["schedule"]),
        ("", ["schedule.warmup_steps=-1"], ["optimizer"]),
        ("", ["schedule=null"], ["optimizer"]),
        ("", ["optimizer=null"], ["schedule"]),
    ],
)
def test_optimizer_and_schedule_are_checked_whatever_else_is_wrong(tmp_path: Path, text, overrides, said):
    def check(*sections):
        given = zip(("optimizer", "schedule"), sections, strict=True)
        return [(f"{key}.name", f"no {section.name}") for key, section in given if section is not None]

    path = tmp_path / "train.yaml"
    path.write_text(GOOD + "optimizer: Adamm\nschedule: {name: Step}\n" + text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, check)
    lines = error.value.message.splitlines()
    expected = {"optimizer": f"{path}:2: optimizer.name: no Adamm", "schedule": f"{path}:3: schedule.name: no Step"}
    assert lines[len(lines) - len(said) :] == [expected[key] for key in said]
    assert len(lines) - len(said) == (overrides != ["schedule=null"]), "and what else is wrong, once"
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_mapping(yaml.safe_load(path.read_text()), overrides, check)
    assert len(error.value.message.splitlines()) == len(lines)


def test_a_missing_file_names_the_near_one(tmp_path: Path):
    (tmp_path / "train.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"tran.yaml: no such file; did you mean .*train.yaml"):
        load_config(tmp_path / "tran.yaml")


def test_overrides_go_before_the_file_and_into_short_forms(tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text(GOOD + "loss: cross_entropy\noptimizer: {lr: 1e-3}\n")
    assert load_config(path).optimizer.lr == 0.001  # YAML 1.1 reads 1e-3 as a text
    config = load_config(path, ["loss.name=mse", "optimizer.lr=2e-2", "model.hidden=[4, 5]", "clip.norm=1"])
    assert (config.loss.name, config.optimizer.lr, config.model.hidden) == ("mse", 0.02, [4, 5])
    assert config.clip == ClipConfig(norm=1.0)


def test_what_has_a_name_may_be_said_by_it(tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text(GOOD + "model: cnn\nloss: mse\noptimizer: SGD\nschedule: ReduceLROnPlateau\n")
    config = load_config(path, ["optimizer.lr=0.1", "model.channels=[4]"])
    assert (config.model.name, config.loss.name, config.schedule.name) == ("cnn", "mse", "ReduceLROnPlateau")
    assert (config.optimizer.name, config.optimizer.lr, config.model.channels) == ("SGD", 0.1, [4])
    with pytest.raises(ConfigError, match='override "model=text": model: text needs vocabulary'):
        load_config(path, ["model=text"])
    schema = TrainConfig.model_json_schema()
    given = {"data": DATA, "model": "cnn", "loss": "mse", "optimizer": "SGD", "schedule": {"name": "StepLR"}}
    jsonschema.Draft202012Validator(schema).validate(given)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**given, "loss": 3})


def test_python_users_get_the_same_errors_without_a_file():
    with pytest.raises(ConfigError) as error:
        TrainConfig(data={"train": "rows"}, optimizer={"lr": -1})
    assert error.value.message.splitlines() == [
        "data.label: missing; it has no default",
        "optimizer.lr: must be greater than 0, got -1",
    ]
    assert OptimizerConfig(betas=["1e-1", 0.9]).options == {"betas": [0.1, 0.9]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": {"name": "linear", "dropout": 0.5}}, ["model.dropout counts for nothing: model: linear has none"]),
        ({"model": {"factory": "a:b", "hidden": [9]}},
         ["model.hidden counts for nothing: the model of a factory has none"]),
        ({"model": {"channels": [4], "heads": 8}},
         [f"model.{key} counts for nothing: model: mlp has none" for key in ("channels", "heads")]),
        ({"model": {"name": "text", "vocabulary": 9, "heads": 8}},
         ["model.heads counts for nothing: encoder: bag has none"]),
        ({"model": {"name": "text", "vocabulary": 9, "heads": 8, "encoder": "transformer"}}, []),
        ({"schedule": {"name": "ReduceLROnPlateau"}},
         ["schedule counts for nothing: ReduceLROnPlateau goes by data.validation, and there is none"]),
        ({"schedule": {"name": "ReduceLROnPlateau"}, "data": DATA}, []),
        ({"schedule": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0}, "optimizer": {"name": "SGD", "lr": 0.5}},
         ["optimizer.lr counts for nothing: the schedule goes by its own base_lr"]),
        ({}, []),
    ],
)  # fmt: skip
def test_what_counts_for_nothing_is_told(settings: dict, said: list[str]):
    assert TrainConfig(**{"data": {"train": "rows", "label": "y"}, **settings}).without_effect == said


@pytest.mark.parametrize("user", ["me", "me@example.com"])
def test_credentials_do_not_travel(user: str):
    uri = f"https://{user}:secret@mlflow.example"
    config = TrainConfig(data=DATA, tracking={"uri": uri})
    assert "secret" not in config.to_yaml() and "https://***@mlflow.example" in config.to_yaml()
    assert config.changed(["epochs=3"]).tracking.uri == uri
    assert config.without_credentials == []
    assert TrainConfig.from_mapping(config.to_mapping()).without_credentials == ["tracking.uri"]


def test_relative_paths_are_taken_from_a_folder():
    data = {"train": ["a", "/b", "s3://c/d"], "validation": "v/*.parquet", "label": "y"}
    found = TrainConfig(data=data).in_folder(Path("/here"))
    assert found.data.train == ["/here/a", "/b", "s3://c/d"] and found.data.validation == "/here/v/*.parquet"
    assert found.checkpoint.dir == "/here/checkpoints" and found.tracking.uri == "sqlite:////here/mlflow.db"
    assert found.in_folder(Path("/elsewhere")) == found
    assert TrainConfig(data={**DATA, "train": "~/rows"}).in_folder(Path("/here")).data.train == str(
        Path.home() / "rows"
    )
    server = TrainConfig(data=data, tracking={"uri": "http://mlflow:5000"}).in_folder(Path("/here"))
    assert server.tracking.uri == "http://mlflow:5000"


def test_what_is_not_said_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("DISTRAIN_CHECKPOINT_DIR", "/checkpoints")
    assert TrainConfig(data=DATA).tracking.uri == "http://mlflow:5000"
    assert TrainConfig(data=DATA).checkpoint.dir == "/checkpoints"
    assert TrainConfig(data=DATA).cluster.wait_seconds is None
    monkeypatch.setenv("DISTRAIN_CLUSTER_WAIT_SECONDS", "600")
    assert TrainConfig(data=DATA).cluster.wait_seconds == 600
    here = {"checkpoint": {"dir": "here"}, "tracking": {"uri": "sqlite:///mine.db"}, "cluster": {"wait_seconds": None}}
    said = TrainConfig(data=DATA, **here)
    assert (said.checkpoint.dir, said.tracking.uri) == ("here", "sqlite:///mine.db")
    assert said.cluster.wait_seconds is None
