"""The configuration: what may be said, with what meaning, and what is checked.

`load_config` reads YAML and overrides; Python users build `TrainConfig(...)` themselves, with nested dicts or models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distrain import config_file
from distrain.errors import ConfigError

_USER_INFO = re.compile(r"(?<=://)[^/\s@:]*:[^/\s]*@")
_REFERENCE = re.compile(r"[\w.]+:\w+")


def _number(value: Any) -> Any:
    """PyYAML reads 1e-3 as a string (YAML 1.1 wants 1.0e-3)."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _integer(value: Any) -> Any:
    """pydantic takes true as 1, and YAML reads yes as true."""
    if isinstance(value, bool):
        raise ValueError(f"expected an integer, got {str(value).lower()}")
    return value


def _reference(value: str) -> str:
    if not _REFERENCE.fullmatch(value):
        raise ValueError('give it as "module:function"')
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_integer), Field(ge=1)]
Reference = Annotated[str, AfterValidator(_reference)]
Paths = str | Annotated[list[str], Field(min_length=1)]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _PlainErrors(ModelMetaclass):
    """What Python users build raises ConfigError. (An __init__ would be called for nested sections too, and stop at
    the first problem.)"""

    def __call__(cls, **values: Any) -> Any:
        try:
            return super().__call__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(config_file.explain(error, cls))) from None


class _Section(BaseModel, metaclass=_PlainErrors):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class _OpenSection(_Section):
    """A section that takes further keywords, of a class of torch."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The further keywords. Numbers written like 1e-3 are numbers."""
        return {key: _numbers(value) for key, value in (self.__pydantic_extra__ or {}).items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value if isinstance(value, bool) else _number(value)


class DataConfig(_Section):
    """Where the rows are, and which columns matter."""

    train: Paths = Field(
        description="Training rows: a Parquet file, folder, glob, or list of them; local, s3://, gs://"
    )
    validation: Paths | None = Field(None, description="Validation rows, likewise; null: no validation")
    features: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description='Feature columns: a list of names, a glob of names such as "f*", or one list column. '
        "null: every numeric column but the label; with a transform, every column",
    )
    label: str | Annotated[list[str], Field(min_length=1)] = Field(description="The label column, or several")
    weight: str | None = Field(None, description="A column that says how much each row counts; null: all the same")
    shuffle_rows: Count = Field(65536, description="Rows shuffled together: a window. A worker "
                                "holds two windows of each of its shards in memory")  # fmt: skip
    standardize: bool = Field(False, description="Subtract each feature's mean over the training rows, divide by its "
                              "deviation, inside the model")  # fmt: skip
    transform: Reference | None = Field(
        None, description='"module:function" that turns a pyarrow RecordBatch into a dict of tensors with "label"'
    )


ModelName = Literal["linear", "logistic", "mlp", "cnn"]


class ModelConfig(_Section):
    """A model by name, or from a function of the user's."""

    name: ModelName | None = Field(
        "mlp",
        description="The model: linear or logistic (one linear layer; logistic takes losses from logits only), mlp, or "
        "cnn (convolutions over images, then the layers of an mlp)",
    )
    hidden: list[Count] = Field([256, 256], description="mlp, cnn: units of each hidden layer")
    image_shape: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = Field(
        None, description="cnn: channels, height and width that a row's features are the pixels of, in this order"
    )
    channels: list[Count] = Field(
        [16, 32], description="cnn: channels of each convolution; each halves height and width"
    )
    kernel_size: Annotated[Count, Field(le=15)] = Field(3, description="cnn: height and width of the convolutions")
    initialization: str | None = Field(
        None,
        description="Of the weights of linear and convolution layers, by torch.nn.init's names: he_normal or "
        "kaiming_normal, xavier_uniform, orthogonal, zeros, ...; biases become 0. null: torch's own",
    )
    activation: str = Field("relu", description="Between the layers: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid")
    dropout: Annotated[NotNegative, Field(lt=1)] = Field(0.0, description="Share of hidden units dropped in training")
    normalization: Literal["batch", "layer", "group"] | None = Field(
        None, description="After each hidden linear layer: batch, layer or group normalization; null: none"
    )
    outputs: Count | None = Field(None, description="Outputs; null: the classes that the footers show, or one for each "
                                  "label column")  # fmt: skip
    factory: Reference | None = Field(None, description='"module:function" that returns a torch.nn.Module, in place '
                                      "of name")  # fmt: skip
    args: dict[str, Any] = Field({}, description="Keyword arguments of the factory")

    @model_validator(mode="before")
    @classmethod
    def _factory_has_no_name(cls, value: Any) -> Any:
        return _name_or_factory(value)

    @model_validator(mode="after")
    def _image_has_a_shape(self) -> ModelConfig:
        if self.name == "cnn" and self.image_shape is None:
            raise ValueError("cnn needs image_shape: [channels, height, width]")
        return self


LossName = Literal["mse", "mae", "huber", "cross_entropy", "focal", "binary_cross_entropy", "binary_focal"]
CATEGORICAL = ("cross_entropy", "focal")
BINARY = ("binary_cross_entropy", "binary_focal")
_LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "gamma": ("focal", "binary_focal"),
    "delta": ("huber",),
    "label_smoothing": ("cross_entropy", "binary_cross_entropy"),
    "class_weights": (*CATEGORICAL, *BINARY),
}


class LossConfig(_Section):
    """A loss by name, or from a function of the user's. `loss: mse` is short for `loss: {name: mse}`."""

    name: LossName | None = Field(
        "cross_entropy",
        description="The loss: cross_entropy, focal (classes), binary_cross_entropy, binary_focal (0 or 1, one label "
        "or several), all from logits; mse, mae, huber",
    )
    gamma: NotNegative | None = Field(None, description="focal, binary_focal: how much less rows count that are right "
                                      "already; null: 2")  # fmt: skip
    delta: Positive | None = Field(None, description="huber: the error from which on it grows linearly; null: 1")
    label_smoothing: Annotated[NotNegative, Field(lt=1)] = Field(
        0.0, description="cross_entropy, binary_cross_entropy: share of the label spread over all classes"
    )
    class_weights: list[NotNegative] | Literal["balanced"] | None = Field(
        None, description="What a row of each class counts; balanced: rows / (classes x rows of the class), counted in "
                          "one pass over the training rows; null: all 1")  # fmt: skip
    factory: Reference | None = Field(None, description='"module:function" that returns a function of (outputs, label) '
                                      "that gives the loss of each row, in place of name")  # fmt: skip
    args: dict[str, Any] = Field({}, description="Keyword arguments of the factory")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return _name_or_factory({"name": value} if isinstance(value, str) else value)

    @model_validator(mode="after")
    def _options_fit(self) -> LossConfig:
        for key, names in _LOSS_OPTIONS.items():
            if getattr(self, key) and self.name not in names:
                raise ValueError(f"{key} goes with {', '.join(names)}, not with {self.name or 'a factory'}")
        if isinstance(self.class_weights, list) and not sum(self.class_weights):
            raise ValueError("class_weights are all 0: no row would count")
        return self

    @property
    def options(self) -> dict[str, float]:
        """The keywords of the loss's function that are set."""
        return {key: value for key in ("gamma", "delta", "label_smoothing") if (value := getattr(self, key))}

    @property
    def kind(self) -> str | None:
        """What the loss is for: classes, binary, numbers; None for one of the user's."""
        if self.factory is not None or self.name is None:
            return None
        return "classes" if self.name in CATEGORICAL else "binary" if self.name in BINARY else "numbers"


def _name_or_factory(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("factory") is not None:
        if value.get("name") is not None:
            raise ValueError("give either name or factory, not both")
        return {**value, "name": None}
    if isinstance(value, Mapping) and value.get("args"):
        raise ValueError("args go with a factory")
    return value


class OptimizerConfig(_OpenSection):
    """Any optimizer of torch.optim; further keys are its own keywords."""

    name: str = Field("Adam", description="A class of torch.optim, by its own name")
    lr: Positive = Field(0.001, description="Learning rate")
    weight_decay: NotNegative = Field(0.0, description="Weight decay; biases and normalization layers go without")
    decay_all: bool = Field(False, description="Decay biases and normalization layers too")


class ScheduleConfig(_OpenSection):
    """Any schedule of torch.optim.lr_scheduler, stepped after each update; further keys are its own keywords."""

    name: str | None = Field(None, description="A class of torch.optim.lr_scheduler; null: constant after the warm-up")
    warmup_steps: Annotated[int, BeforeValidator(_integer), Field(ge=0)] = Field(
        0, description="Steps in which the rate rises linearly first"
    )


class PenaltyConfig(_Section):
    """Added to the loss, once a step: l1 times the sum of |w|, and l2 times the sum of w^2, over all weights but biases
    and the parameters of normalization layers."""

    l1: NotNegative = Field(0.0, description="Factor of the sum of absolute weights")
    l2: NotNegative = Field(0.0, description="Factor of the sum of squared weights")


class ClipConfig(_Section):
    """Clip the averaged gradient, by its norm or by value."""

    norm: Positive | None = Field(None, description="Largest L2 norm of the whole gradient")
    value: Positive | None = Field(None, description="Largest absolute value of each entry")

    @model_validator(mode="after")
    def _one_of_them(self) -> ClipConfig:
        if (self.norm is None) == (self.value is None):
            raise ValueError("give exactly one of norm and value")
        return self


class WorkersConfig(_Section):
    """Who computes gradients."""

    count: Count = Field(2, description="Worker actors")
    min: Count = Field(1, description="Fewer than this many left end the run; with max set, enough to begin with")
    max: Count | None = Field(None, description="Grow up to so many as the cluster gains room; null: count, no fewer "
                              "at the start, no more later")  # fmt: skip
    cpus: Positive = Field(1, description="CPUs of each worker; it computes with as many threads")
    gpus: Literal[0] = Field(0, description="GPUs of each worker; only 0 is supported so far")
    precision: Literal["fp32"] = Field("fp32", description="Arithmetic of the workers; only fp32 is supported so far")
    timeout_seconds: Positive = Field(60, description="A worker silent for so long in a step is given up and replaced")

    @property
    def most(self) -> int:
        """Workers at most."""
        return self.count if self.max is None else self.max

    @property
    def needed(self) -> int:
        """Workers without which a run does not begin."""
        return self.count if self.max is None else self.min


class ServerConfig(_Section):
    """Who averages and updates."""

    mode: Literal["sync", "async"] = Field(
        "sync", description="sync: an update waits for every shard of its step; async: each microbatch is an update"
    )
    staleness: Annotated[int, BeforeValidator(_integer), Field(ge=0)] | None = Field(
        0, description="sync: step t uses the parameters of step t - staleness; async: steps that one shard may be "
                       "ahead of another, null: any number")  # fmt: skip
    quorum: Count | None = Field(None, description="An update takes the first so many microbatches of its step; the "
                                 "rows of the others come again at the epoch's end. null: all")  # fmt: skip
    delay_compensation: NotNegative = Field(0.0, description="async: how much of a gradient's change since it was "
                                            "computed is made up for (lambda of DC-ASGD); 0: none")  # fmt: skip
    slices: Literal[1] = Field(1, description="Parameter servers that share the model; only 1 so far")
    threads: Count | None = Field(
        None, description="Threads of an update; null: the cores that workers leave, at most 4"
    )


class CheckpointConfig(_Section):
    """What is kept on disk."""

    dir: str = Field("checkpoints", description="Folder; each run has one of its own in it")
    every_steps: Count | None = Field(500, description="Steps between checkpoints, beside each epoch's end; null: none")
    every_seconds: Positive | None = Field(None, description="Seconds between checkpoints, beside those; null: none")
    keep: Count = Field(3, description="The last so many are kept, and the best")
    history: bool = Field(False, description="Keep a history.jsonl of every step, shard and restore beside them, "
                          "for python -m distrain.history to check")  # fmt: skip


class TrackingConfig(_Section):
    """MLflow."""

    uri: str = Field("sqlite:///mlflow.db", description="Tracking store: sqlite:///FILE, or a server's http(s):// URI")
    experiment: str = Field("distrain", description="Experiment that the run belongs to")
    run_name: str | None = Field(None, description="The run's name, and its checkpoints' folder; null: date and time")
    every_steps: Count | None = Field(None, description="Steps averaged into one point of a metric; null: each of the "
                                      "first 1000 steps, then half seconds")  # fmt: skip
    registered_model_name: str | None = Field(None, description="Register the final model under this name")
    enabled: bool = Field(True, description="false: no tracking at all")


class ValidationConfig(_Section):
    """When and how to validate; the rows are data.validation."""

    every_steps: Count | None = Field(None, description="Steps between validations, beside each epoch's end")
    batch_size: Count | None = Field(None, description="Rows of a validation step; null: batch_size")


class EarlyStoppingConfig(_Section):
    """End the run when validation no longer improves."""

    metric: str = Field("loss", description="The validation metric: loss, accuracy, mean_absolute_error, r2")
    patience: Count = Field(3, description="Validations without improvement")
    min_delta: NotNegative = Field(0.0, description="What counts as one")


class TargetConfig(_Section):
    """End the run once validation is good enough."""

    metric: str = Field("accuracy", description="The validation metric: loss, accuracy, mean_absolute_error, r2")
    value: Number = Field(description="Good enough")


class SweepConfig(_Section):
    """What `distrain sweep` tries."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Dotted keys, each with its values; every combination is a run: {batch_size: [64, 256], "
                        "workers.count: [1, 2]}")  # fmt: skip
    scale_lr: Literal["linear", "sqrt", "none"] = Field(
        "none", description="How optimizer.lr follows batch_size from point to point: in proportion, with its square "
                            "root, not at all")  # fmt: skip


class ConvergenceConfig(_Section):
    """End the run when training no longer moves."""

    loss_change: Positive | None = Field(None, description="The mean loss changes by less from one window to the next")
    grad_norm: Positive | None = Field(None, description="The mean gradient norm over a window is less")
    window: Count = Field(100, description="Steps of a window")

    @model_validator(mode="after")
    def _some_rule(self) -> ConvergenceConfig:
        if self.loss_change is None and self.grad_norm is None:
            raise ValueError("give loss_change, grad_norm or both")
        return self


class ClusterConfig(_Section):
    """Which Ray cluster."""

    address: str | None = Field(None, description='A Ray cluster\'s address; null: RAY_ADDRESS if set, else a Ray of '
                                'its own on this machine; "local": always that')  # fmt: skip


class TrainConfig(_Section):
    """One training run."""

    data: DataConfig = Field(description="The rows")
    model: ModelConfig = Field(ModelConfig(), description="The model")
    loss: LossConfig = Field(LossConfig(), description="The loss")
    penalty: PenaltyConfig = Field(PenaltyConfig(), description="L1 and L2 penalties on the weights")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer")
    schedule: ScheduleConfig | None = Field(None, description="The learning rate's schedule; null: constant")
    clip: ClipConfig | None = Field(None, description="Gradient clipping; null: none")
    batch_size: Count = Field(256, description="Rows of a step, over all workers: the global minibatch")
    epochs: Count = Field(3, description="Passes over the training rows")
    max_steps: Count | None = Field(None, description="End after so many steps, if that is sooner")
    shards: Count | None = Field(None, description="Equal spans of an epoch's rows; decides the weights' bits, unlike "
                                 "the worker count. null: workers.count")  # fmt: skip
    seed: Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**63)] = Field(
        0, description="Of initial weights, shuffling and dropout"
    )
    workers: WorkersConfig = Field(WorkersConfig(), description="Who computes gradients")
    server: ServerConfig = Field(ServerConfig(), description="Who averages and updates")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="What is kept on disk")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    validation: ValidationConfig = Field(ValidationConfig(), description="When to validate")
    early_stopping: EarlyStoppingConfig | None = Field(None, description="Stop on validation; null: never")
    convergence: ConvergenceConfig | None = Field(None, description="Stop when nothing moves; null: never")
    target: TargetConfig | None = Field(None, description="Stop when validation is good enough; null: never")
    sweep: SweepConfig | None = Field(None, description="What distrain sweep tries; nothing else looks at it")
    resume: Literal["auto"] | None = Field(
        None, description="auto: go on from the last checkpoint of the run called tracking.run_name, where there is one"
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="Which Ray cluster")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.resolved_shards > self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size} and there are {self.resolved_shards} shards: a step needs a row for "
                "each (raise batch_size, or lower shards or workers.count)"
            )
        self._check_server()
        if self.workers.max is not None and self.workers.max < self.workers.count:
            raise ValueError(f"workers.max is {self.workers.max}, less than workers.count, {self.workers.count}")
        if self.workers.min > self.workers.count:
            raise ValueError(f"workers.min is {self.workers.min}, more than workers.count, {self.workers.count}")
        if self.data.validation is None:
            for key, value in (
                ("early_stopping", self.early_stopping),
                ("target", self.target),
                ("validation.every_steps", self.validation.every_steps),
            ):
                if value is not None:
                    raise ValueError(f"{key} needs data.validation")
        if self.resume == "auto" and self.tracking.run_name is None:
            raise ValueError("resume: auto needs tracking.run_name, by which the run is found again")
        if self.model.name == "logistic" and self.loss.kind == "numbers":
            raise ValueError(
                f"model: logistic gives logits, which {self.loss.name} does not take; use cross_entropy or "
                "binary_cross_entropy, or model: linear"
            )
        if self.data.standardize and self.data.transform is not None:
            raise ValueError("data.standardize has no features to measure with data.transform; leave one of them out")
        return self

    def _check_server(self) -> None:
        server = self.server
        if server.mode == "sync" and server.staleness is None:
            raise ValueError("server.staleness is null, any number, which only server.mode: async allows")
        if server.mode == "sync" and server.delay_compensation:
            raise ValueError("server.delay_compensation needs server.mode: async")
        if server.mode == "async" and server.quorum is not None:
            raise ValueError("server.quorum needs server.mode: sync, since async waits for nobody")
        if server.quorum is not None and server.quorum > self.resolved_shards:
            raise ValueError(f"server.quorum is {server.quorum}, more than the {self.resolved_shards} shards of a step")

    @property
    def resolved_shards(self) -> int:
        """The number of shards: `shards`, else the worker count."""
        return self.shards or self.workers.count

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
        """Build from nested values and `dotted.key=value` overrides. Raises ConfigError with every problem."""
        return _build(config_file.Document(dict(values)), overrides)

    def to_mapping(self) -> dict[str, Any]:
        """The resolved configuration as nested JSON-able values, without credentials, in the order of the keys."""
        return _without_secrets(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that reads back as the same, but for credentials."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, default_flow_style=None, width=100)

    def sha256(self) -> str:
        """Fingerprint of the resolved configuration."""
        canonical = json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


Check = Callable[["TrainConfig"], list[tuple[str, str]]]
"""Says what is wrong with a configuration beyond its form: (dotted key, what)."""


def load_config(path: str | Path, overrides: Sequence[str] = (), check: Check | None = None) -> TrainConfig:
    """Read a configuration from YAML, with `dotted.key=value` overrides; `check` may find further problems.

    Raises ConfigError that lists every problem, a line each: file, line, key, what is wrong, what was meant.
    """
    return _build(config_file.read(path), overrides, check)


def _build(document: config_file.Document, overrides: Sequence[str], check: Check | None = None) -> TrainConfig:
    problems = list(document.problems)
    for override in overrides:
        problems += document.override(override)
    try:
        config = TrainConfig.model_validate(document.values)
        if check is not None:
            problems += [f"{document.where(tuple(key.split('.')))}: {text}" for key, text in check(config)]
    except ValidationError as error:
        problems += config_file.explain(error, TrainConfig, document)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return _USER_INFO.sub("***@", value)
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value
