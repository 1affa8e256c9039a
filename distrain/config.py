"""The configuration: what may be said, with what meaning, and what is checked.

`load_config` reads YAML and overrides; Python users build `TrainConfig(...)` themselves, with nested dicts or models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distrain import config_file
from distrain.credentials import HIDDEN, redacted
from distrain.errors import ConfigError

S = TypeVar("S", bound=BaseModel)

_REFERENCE = re.compile(r"[\w.]+:\w+")
_FULL_FORWARD_ROWS = 4096  # of a forward pass of a full batch: enough for speed, little memory


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


def _batch_size(value: Any) -> Any:
    """A union's own messages would say nothing."""
    if value != "full" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        got = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"expected a number of rows, at least 1, or full, got {got}")
    return value


def _reference(value: str) -> str:
    if not _REFERENCE.fullmatch(value):
        raise ValueError('give it as "module:function"')
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_integer), Field(ge=1)]
BatchSize = Annotated[Count | Literal["full"], BeforeValidator(_batch_size)]
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


class _NamedSection(_Section):
    """A section that says what by its name: `loss: mse` is short for `loss: {name: mse}`."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _or_its_name(schema: dict[str, Any]) -> None:
    """In JSON schema: a section, or only its name."""
    kinds = schema.pop("anyOf", None) or [{"$ref": schema.pop("$ref")}]
    schema["anyOf"] = [*kinds, {"type": "string"}]


class _OpenSection(_NamedSection):
    """A section that takes further keywords, of a class of torch."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The further keywords. Numbers written like 1e-3 are numbers."""
        return {key: _numbers(value) for key, value in (self.__pydantic_extra__ or {}).items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):  # a tuple: from Python
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
        description='Feature columns: a list of names, a glob of names such as "f*", one list column, or one column of '
        "encoded images (PNG, JPEG). null: every numeric column but the label and a pandas table's index; with a "
        "transform, every column",
    )
    label: str | Annotated[list[str], Field(min_length=1)] = Field(description="The label column, or several")
    weight: str | None = Field(None, description="A column that says how much each row counts; null: all the same")
    shuffle_rows: Count = Field(65536, description="Rows shuffled together: a window. A worker "
                                "holds two windows of each of its shards in memory")  # fmt: skip
    standardize: bool = Field(False, description="Subtract each feature's mean over the training rows, divide by its "
                              "deviation, inside the model")  # fmt: skip
    ragged: bool = Field(False, description="The one list column's rows differ in length: each microbatch is padded "
                         "with zeros to its longest row, and the model takes `mask`, true where there is a value, "
                         "beside `features`. model: text does so by itself")  # fmt: skip
    transform: Reference | None = Field(
        None,
        description='"module:function" that turns a pyarrow RecordBatch into a dict of tensors with "label". It gets a '
        "few rows at a time, on a reading thread; random numbers come from a torch.Generator of its own, since torch's "
        "global one is dropout's",
    )


ModelName = Literal["linear", "logistic", "mlp", "cnn", "text"]
_LAYERED = ("mlp", "cnn", "text")
_MODEL_OPTIONS: dict[str, tuple[str, ...]] = {
    "hidden": _LAYERED,
    "activation": _LAYERED,
    "dropout": _LAYERED,
    "normalization": _LAYERED,
    "initialization": ("linear", "logistic", *_LAYERED),
    **dict.fromkeys(("image_shape", "channels", "kernel_size"), ("cnn",)),
    **dict.fromkeys(("encoder", "embedding", "layers", "heads"), ("text",)),
}
_ENCODER_OPTIONS = dict.fromkeys(("layers", "heads"), ("transformer",))


class ModelConfig(_NamedSection):
    """A model by name, or from a function of the user's."""

    name: ModelName | None = Field(
        "mlp",
        description="The model: linear or logistic (one linear layer; logistic takes losses from logits only), mlp, "
        "cnn (convolutions over images, then the layers of an mlp), or text (an encoder over lists of token ids of any "
        "length, then the layers of an mlp)",
    )
    hidden: list[Count] = Field([256, 256], description="mlp, cnn, text: units of each hidden layer")
    image_shape: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = Field(
        None, description="cnn: channels, height and width that a row's features are the pixels of, in this order; "
                          "null: those of the first encoded image"
    )  # fmt: skip
    channels: list[Count] = Field(
        [16, 32], description="cnn: channels of each convolution; each halves height and width"
    )
    kernel_size: Annotated[Count, Field(le=15)] = Field(3, description="cnn: height and width of the convolutions")
    vocabulary: Count | None = Field(None, description="text: token ids are 0 to this less 1")
    encoder: Literal["bag", "transformer"] = Field(
        "bag", description="text: bag, the mean of the tokens' embeddings, or transformer, which sees their order"
    )
    embedding: Count = Field(64, description="text: width of a token's embedding, and of the transformer")
    layers: Count = Field(2, description="text: layers of the transformer")
    heads: Count = Field(4, description="text: attention heads of each; embedding is a multiple of it")
    initialization: str | None = Field(
        None,
        description="Of the weights of linear and convolution layers, by torch.nn.init's names: he_normal or "
        "kaiming_normal, xavier_uniform, orthogonal, zeros, ...; biases become 0. null: torch's own",
    )
    activation: str = Field("relu", description="Between the layers: relu, leaky_relu, elu, selu, gelu, silu, mish, "
                            "hardswish, softplus, tanh, sigmoid, identity")  # fmt: skip
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
    def _text_has_a_vocabulary(self) -> ModelConfig:
        if self.name == "text" and self.vocabulary is None:
            raise ValueError("text needs vocabulary: the number of token ids")
        if self.name != "text" and self.vocabulary is not None:
            raise ValueError(f"vocabulary goes with name: text, not with {self.name or 'a factory'}")
        if self.name == "text" and self.encoder == "transformer" and self.embedding % self.heads:
            raise ValueError(f"embedding is {self.embedding}, no multiple of the {self.heads} heads")
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


class LossConfig(_NamedSection):
    """A loss by name, or from a function of the user's."""

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
    def _factory_has_no_name(cls, value: Any) -> Any:
        return _name_or_factory(value)

    @model_validator(mode="after")
    def _options_fit(self) -> LossConfig:
        for key, names in _set_without_effect(self, _LOSS_OPTIONS, self.name).items():
            raise ValueError(f"{key} goes with {', '.join(names)}, not with {self.name or 'a factory'}")
        if isinstance(self.class_weights, list) and not sum(self.class_weights):
            raise ValueError("class_weights are all 0: no row would count")
        return self

    @property
    def options(self) -> dict[str, float]:
        """The keywords of the loss's function that are set."""
        keys = ("gamma", "delta", "label_smoothing")
        return {key: value for key in keys if (value := getattr(self, key)) != type(self).model_fields[key].default}

    @property
    def kind(self) -> str | None:
        """What the loss is for: classes, binary, numbers; None for one of the user's."""
        if self.factory is not None or self.name is None:
            return None
        return "classes" if self.name in CATEGORICAL else "binary" if self.name in BINARY else "numbers"


def _set_without_effect(
    section: _Section, options: Mapping[str, Sequence[str]], name: str | None
) -> dict[str, Sequence[str]]:
    """The options that are set, and that what is called `name` does not have, with what has them: of `options`."""
    fields = type(section).model_fields
    return {
        key: names
        for key, names in options.items()
        if getattr(section, key) != fields[key].default and name not in names
    }


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
    scale_lr: Literal["linear", "sqrt", "none"] = Field(
        "none", description="lr is meant for base_batch_size, and follows batch_size: in proportion (Goyal et al. "
                            "2017), with its square root (Krizhevsky 2014), not at all"
    )  # fmt: skip
    base_batch_size: Count | None = Field(None, description="scale_lr: the rows of a step that lr is meant for")

    @model_validator(mode="after")
    def _scale_has_a_base(self) -> OptimizerConfig:
        if (self.scale_lr == "none") != (self.base_batch_size is None):
            raise ValueError("scale_lr and base_batch_size go together: lr is multiplied by what batch_size is of it")
        return self

    def scaled(self, batch_rows: int) -> OptimizerConfig:
        """The same for a step of so many rows, with the learning rate scaled to it."""
        if self.base_batch_size is None:
            return self
        ratio = batch_rows / self.base_batch_size
        lr = self.lr * (ratio if self.scale_lr == "linear" else math.sqrt(ratio))
        return self.model_copy(update={"lr": lr, "scale_lr": "none", "base_batch_size": None})


class ScheduleConfig(_OpenSection):
    """Any schedule of torch.optim.lr_scheduler, stepped after each update; further keys are its own keywords."""

    name: str | None = Field(None, description="A class of torch.optim.lr_scheduler; null: constant after the warm-up")
    warmup_steps: Annotated[int, BeforeValidator(_integer), Field(ge=0)] = Field(
        0, description="Steps in which the rate rises linearly first"
    )

    @property
    def own_rate(self) -> str | None:
        """The keyword by which the schedule goes in place of optimizer.lr; None where it goes by that."""
        return {"OneCycleLR": "max_lr", "CyclicLR": "base_lr"}.get(self.name or "")


Check = Callable[[OptimizerConfig | None, ScheduleConfig | None], list[tuple[str, str]]]
"""Says what is wrong with an optimizer and a schedule beyond their form: (dotted key, what). None: there is none, or
its form is wrong already."""


class GradientNoiseConfig(_Section):
    """Simulated annealing: noise of variance eta / (1 + step)^gamma on each entry of the averaged gradient."""

    eta: Positive = Field(0.01, description="Variance of the noise in the first step: how hot it begins")
    gamma: NotNegative = Field(0.55, description="How fast it cools: the power of the step")


class AveragingConfig(_Section):
    """A moving average of the weights, which is validated, written to checkpoints and exported in their place."""

    decay: Annotated[Positive, Field(lt=1)] = Field(
        0.999, description="Share of the average that an update leaves; less in the first updates: (1 + n) / (10 + n)"
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
    gpus: Annotated[NotNegative, Field(le=1)] = Field(
        0, description="The share of a GPU that each worker has and computes on: 1, or less for workers that share "
                       "one; 0: it computes on CPUs")  # fmt: skip
    gpu_count: Count | None = Field(None, description="So many of the workers have that, and the others compute on "
                                    "CPUs; null: all")  # fmt: skip
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="What workers compute the model in: bf16 and fp16 under torch.autocast, fp16 with a loss "
                            "scale; parameters, loss and update are float32")  # fmt: skip
    deterministic: bool = Field(False, description="Only kernels that give the same bits each time, which are slower, "
                                "and are not there for every operation of a GPU")  # fmt: skip
    timeout_seconds: Positive = Field(60, description="A worker silent for so long in a step is given up and replaced")

    @property
    def most(self) -> int:
        """Workers at most."""
        return self.count if self.max is None else self.max

    def gpus_of(self, rank: int) -> float:
        """The share of a GPU that this worker has."""
        return self.gpus if self.gpu_count is None or rank < self.gpu_count else 0.0

    @property
    def all_cpus(self) -> float:
        """The CPUs that `count` workers ask for."""
        return self.count * self.cpus

    @property
    def all_gpus(self) -> float:
        """The GPUs that `count` workers ask for."""
        return sum(self.gpus_of(rank) for rank in range(self.count))

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
    slices: Count = Field(
        1,
        description="Parameter servers that share the model, each with whole tensors and about "
        "as many bytes, on hosts of their own where there are so many. Same bits at any number",
    )
    wire_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="What gradients and parameters are between hosts. bf16: half the bytes. Every worker then computes "
        "with rounded parameters, and the update goes on from float32 ones; gradients are rounded so that errors "
        "cancel over the steps, without state that a fault could lose. Other bits than fp32's, and as those the same "
        "at any number of workers, hosts and slices, after faults and resumes",
    )
    threads: Count | None = Field(
        None, description="Threads of an update; null: the cores that workers leave, at most 4"
    )


class DiagnosticsConfig(_Section):
    """A look at each layer: norms of its gradient and activations, dead units, how far an update moves it; and warnings
    of what is wrong."""

    every_steps: Count | None = Field(50, description="Steps between looks, and 1, 2, 4, ... before the first of them; "
                                      "null: none, as with server.slices of more than 1")  # fmt: skip


class CheckpointConfig(_Section):
    """What is kept on disk."""

    dir: str = Field(default_factory=lambda: os.environ.get("DISTRAIN_CHECKPOINT_DIR", "checkpoints"),
                     description="Folder, or s3:// or gs:// URI of one; each run has one of its own in it. "
                     "Not set: DISTRAIN_CHECKPOINT_DIR, else checkpoints")  # fmt: skip
    every_steps: Count | None = Field(
        500,
        description="Steps between checkpoints, beside each epoch's end and each validation that is the best so far; "
        "null: none",
    )
    every_seconds: Positive | None = Field(None, description="Seconds between checkpoints, beside those; null: none")
    keep: Count = Field(3, description="The last so many are kept, and the best")
    history: bool = Field(False, description="Keep a history.jsonl of every step, shard and restore beside them, "
                          "for python -m distrain.history to check")  # fmt: skip


class TrackingConfig(_Section):
    """MLflow."""

    uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),
                     description="Tracking store: sqlite:///FILE, or a server's http(s):// URI. Not set: "
                     "MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")  # fmt: skip
    experiment: str = Field("distrain", description="Experiment that the run belongs to")
    run_name: str | None = Field(None, description="The run's name, and its checkpoints' folder; null: date and time")
    every_steps: Count | None = Field(None, description="Steps averaged into one point of a metric; null: as many as "
                                      "take a hundredth of the time so far, at most half a second")  # fmt: skip
    registered_model_name: str | None = Field(None, description="Register the final model under this name")
    system_metrics: bool = Field(
        default_factory=lambda: os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in ("true", "1"),
        description="Processor, memory, disk, network and NVIDIA GPUs (with the extra gpu) of the driver's machine, "
        "every MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (10) seconds. Not set: as MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING "
        "says, else false",
    )
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
    wait_seconds: NotNegative | None = Field(
        default_factory=lambda: os.environ.get("DISTRAIN_CLUSTER_WAIT_SECONDS") or None,
        validate_default=True,
        description="How long to wait for machines that the cluster does not have yet, where something adds them (ray "
        "up, KubeRay); null: DISTRAIN_CLUSTER_WAIT_SECONDS if set, else a cluster that is too small is refused at once",
    )


class TrainConfig(_Section):
    """One training run."""

    data: DataConfig = Field(description="The rows")
    model: ModelConfig = Field(ModelConfig(), description="The model", json_schema_extra=_or_its_name)
    loss: LossConfig = Field(LossConfig(), description="The loss", json_schema_extra=_or_its_name)
    penalty: PenaltyConfig = Field(PenaltyConfig(), description="L1 and L2 penalties on the weights")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer", json_schema_extra=_or_its_name)
    schedule: ScheduleConfig | None = Field(
        None, description="The learning rate's schedule; null: constant", json_schema_extra=_or_its_name
    )
    clip: ClipConfig | None = Field(None, description="Gradient clipping; null: none")
    gradient_noise: GradientNoiseConfig | None = Field(
        None, description="Simulated annealing: noise on the gradient that cools; null: none"
    )
    averaging: AveragingConfig | None = Field(None, description="Average the weights over the updates; null: no")
    batch_size: BatchSize = Field(
        256, description="Rows of a step, over all workers: the global minibatch. full: all of them, one step an epoch"
    )
    max_forward_rows: Count | None = Field(
        None, description="Rows of a forward pass at most; a larger microbatch is computed in pieces, added up in "
                          "order. null: no limit, with batch_size: full 4096")  # fmt: skip
    epochs: Count = Field(3, description="Passes over the training rows")
    max_steps: Count | None = Field(None, description="End after so many steps, if that is sooner")
    max_seconds: Positive | None = Field(
        None, description="End after so many seconds of training, validations included, if that is sooner; a resumed "
                          "run counts anew"
    )  # fmt: skip
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A microbatch whose loss or gradient is not finite ends the run (exit code 4), or is "
                            "skipped: its rows do not count"
    )  # fmt: skip
    max_skipped: Count = Field(10, description="on_nonfinite: skip: more skipped microbatches than this end the run")
    shards: Count | None = Field(None, description="Equal spans of an epoch's rows; decides the weights' bits, unlike "
                                 "the worker count. null: workers.count")  # fmt: skip
    seed: Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**63)] = Field(
        0, description="Of initial weights, shuffling and dropout"
    )
    workers: WorkersConfig = Field(WorkersConfig(), description="Who computes gradients")
    server: ServerConfig = Field(ServerConfig(), description="Who averages and updates")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What is kept on disk")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")
    diagnostics: DiagnosticsConfig = Field(DiagnosticsConfig(), description="A look at the layers")
    validation: ValidationConfig = Field(ValidationConfig(), description="When to validate")
    early_stopping: EarlyStoppingConfig | None = Field(None, description="Stop on validation; null: never")
    convergence: ConvergenceConfig | None = Field(None, description="Stop when nothing moves; null: never")
    target: TargetConfig | None = Field(None, description="Stop when validation is good enough; null: never")
    sweep: SweepConfig | None = Field(None, description="What distrain sweep tries; nothing else looks at it")
    restarts: Count | None = Field(
        None, description="Train so often, with seeds from seed on, and keep the run that validates best (by "
                          "early_stopping.metric, else by loss): side by side where there is room. null: once"
    )  # fmt: skip
    resume: Literal["auto"] | None = Field(
        None, description="auto: go on from the last checkpoint of the run called tracking.run_name, where there is one"
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Which Ray cluster")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if problems := [*self._unfit_run(), *self._unfit_server(), *self._unfit_data()]:
            raise config_file.Unfit(problems)
        return self

    def _unfit_run(self) -> Iterator[tuple[str, str]]:
        """What does not go together of workers, validation, optimizer and tracking: (key, what)."""
        workers = self.workers
        if workers.max is not None and workers.max < workers.count:
            yield "workers.max", f"{workers.max} is less than workers.count, {workers.count}"
        if workers.min > workers.count:
            yield "workers.min", f"{workers.min} is more than workers.count, {workers.count}"
        if workers.gpu_count is not None and not workers.gpus:
            yield "workers.gpu_count", f"{workers.gpu_count}, and workers.gpus is 0: give them a share"
        if self.data.validation is None:
            for key, value in (
                ("early_stopping", self.early_stopping),
                ("target", self.target),
                ("validation.every_steps", self.validation.every_steps),
                ("restarts", self.restarts),
            ):
                if value is not None:
                    yield key, "needs data.validation"
        if self.resume == "auto" and self.tracking.run_name is None:
            yield "resume", "auto needs tracking.run_name, by which the run is found again"
        own_rate = self.schedule.own_rate if self.schedule is not None else None
        if self.optimizer.scale_lr != "none" and self.schedule is not None and own_rate is not None:
            yield (
                "optimizer.scale_lr",
                f"scales optimizer.lr, and {self.schedule.name} goes by its own {own_rate}",
            )
        if self.restarts is not None and self.tracking.registered_model_name is not None:
            yield (
                "tracking.registered_model_name",
                "restarts register no model: leave it out, and register the best run's in MLflow",
            )

    def _unfit_server(self) -> Iterator[tuple[str, str]]:
        """What the server cannot do together: (key, what)."""
        server, shards = self.server, self.resolved_shards
        is_free = server.mode == "async" or server.quorum is not None
        if is_free and self.batch_size != "full" and shards > self.batch_size:
            yield (
                "batch_size",
                f"{self.batch_size} rows for {shards} shards: with server.mode: async or server.quorum a step needs a "
                "row for each (raise batch_size, or lower shards or workers.count)",
            )
        if server.mode == "sync" and server.staleness is None:
            yield "server.staleness", "null, any number, which only server.mode: async allows"
        if server.mode == "sync" and server.delay_compensation:
            yield "server.delay_compensation", "needs server.mode: async"
        if server.mode == "async" and server.slices > 1:  # it needs the whole vector in one place
            yield "server.slices", f"{server.slices}, and server.mode: async works with one slice only"
        if server.wire_dtype != "fp32":  # they need the parameters that the server has
            for key, is_set in (("server.mode: async", server.mode == "async"), ("averaging", self.averaging)):
                if is_set:
                    yield "server.wire_dtype", f"{server.wire_dtype}, and {key} works with fp32 only"
        if server.mode == "async" and server.quorum is not None:
            yield "server.quorum", "needs server.mode: sync, since async waits for nobody"
        if server.quorum is not None and server.quorum > shards:
            yield "server.quorum", f"{server.quorum} is more than the {shards} shards of a step"

    def _unfit_data(self) -> Iterator[tuple[str, str]]:
        """What does not go together of data, model and loss: (key, what)."""
        data, model = self.data, self.model
        if model.name == "logistic" and self.loss.kind == "numbers":
            yield (
                "model.name",
                f"logistic gives logits, which {self.loss.name} does not take; use cross_entropy or "
                "binary_cross_entropy, or model: linear",
            )
        if data.standardize and data.transform is not None:
            yield "data.standardize", "has no features to measure with data.transform; leave one of them out"
        is_ragged = data.ragged or model.name == "text"
        if is_ragged and data.standardize:
            yield "data.standardize", "has no fixed features to measure where rows differ in length"
        if is_ragged and data.transform is not None:
            yield "data.transform", "makes the model's inputs itself: data.ragged and model: text go without it"
        if data.ragged and model.name not in ("text", None):
            yield (
                "data.ragged",
                f"model: {model.name} takes rows of one length; data.ragged goes with text or a factory",
            )

    @property
    def resolved_shards(self) -> int:
        """The number of shards: `shards`, else the worker count."""
        return self.shards or self.workers.count

    def step_rows(self, num_rows: int) -> int:
        """The rows of a step, of so many that there are."""
        return num_rows if self.batch_size == "full" else self.batch_size

    @property
    def forward_rows(self) -> int | None:
        """The rows of a forward pass at most; None: no limit."""
        return self.max_forward_rows or (_FULL_FORWARD_ROWS if self.batch_size == "full" else None)

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], overrides: Sequence[str] = (), check: Check | None = None
    ) -> TrainConfig:
        """Build from nested values and `dotted.key=value` overrides; `check` may find further problems. Raises
        ConfigError with every problem."""
        return _build(config_file.Document(dict(values)), overrides, check)

    def changed(self, overrides: Sequence[str]) -> TrainConfig:
        """The same configuration, credentials and all, with `dotted.key=value` overrides. Raises ConfigError with every
        problem."""
        return self.from_mapping(self.model_dump(mode="json"), overrides)

    @property
    def without_credentials(self) -> list[str]:
        """The keys in use whose URI has lost its credentials: it came out of `to_mapping`."""
        uris = {
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "checkpoint.dir": self.checkpoint.dir,
            "tracking.uri": self.tracking.uri if self.tracking.enabled else None,
        }
        return [key for key, uri in uris.items() if HIDDEN in str(uri)]

    @property
    def without_effect(self) -> list[str]:
        """What is set and counts for nothing, a line each."""
        model = self.model
        which = "the model of a factory" if model.name is None else f"model: {model.name}"
        lines = [
            f"model.{key} counts for nothing: {which} has none"
            for key in _set_without_effect(model, _MODEL_OPTIONS, model.name)
        ]
        if model.name == "text":
            lines += [
                f"model.{key} counts for nothing: encoder: {model.encoder} has none"
                for key in _set_without_effect(model, _ENCODER_OPTIONS, model.encoder)
            ]
        own_rate = self.schedule.own_rate if self.schedule is not None else None
        if own_rate is not None and self.optimizer.lr != OptimizerConfig.model_fields["lr"].default:
            lines.append(f"optimizer.lr counts for nothing: the schedule goes by its own {own_rate}")
        if self.schedule is not None and self.schedule.name == "ReduceLROnPlateau" and self.data.validation is None:
            lines.append("schedule counts for nothing: ReduceLROnPlateau goes by data.validation, and there is none")
        return lines

    def in_folder(self, folder: Path) -> TrainConfig:
        """The same configuration with relative paths taken from `folder`: of the data, checkpoints, and tracking's
        database."""
        data = {"train": _from(folder, self.data.train), "validation": _from(folder, self.data.validation)}
        uri = self.tracking.uri
        if uri.startswith("sqlite:///"):
            uri = f"sqlite:///{_from(folder, uri.removeprefix('sqlite:///'))}"
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=data),
                "checkpoint": self.checkpoint.model_copy(update={"dir": _from(folder, self.checkpoint.dir)}),
                "tracking": self.tracking.model_copy(update={"uri": uri}),
            }
        )

    def to_mapping(self) -> dict[str, Any]:
        """The resolved configuration as nested JSON-able values, without credentials, in the order of the keys."""
        return redacted(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that reads back as the same, but for credentials."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, default_flow_style=None, width=100)

    def sha256(self) -> str:
        """Fingerprint of the resolved configuration."""
        canonical = json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


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
    except ValidationError as error:
        problems += config_file.explain(error, TrainConfig, document)
    if check is not None:
        optimizer = _valid(OptimizerConfig, document.values.get("optimizer", {}))
        found = check(optimizer, _valid(ScheduleConfig, document.values.get("schedule")))
        problems += [document.say(key, text) for key, text in found]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _valid(kind: type[S], value: Any) -> S | None:
    """A section, where its form is right, whatever is wrong with others."""
    try:
        return kind.model_validate(value)
    except ValidationError:  # said already, with all others
        return None


def _from(folder: Path, path: Any) -> Any:
    """A path, or each of a list, from `folder` on where it is relative. URIs are not."""
    if isinstance(path, list):
        return [_from(folder, each) for each in path]
    if path is None or (urlsplit(path).scheme and "://" in path):
        return path
    return str(folder / Path(path).expanduser())
