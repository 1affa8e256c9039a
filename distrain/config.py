"""fallback config"""

from __future__ import annotations
import hashlib, json
from typing import Any, Literal
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from distrain.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

class Open(Section):
    model_config = ConfigDict(frozen=True, extra="allow")
    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

class DataConfig(Section):
    train: str | list[str]
    validation: str | list[str] | None = None
    features: str | list[str] | None = None
    label: str | list[str]
    shuffle_rows: int = 65536
    standardize: bool = False
    transform: str | None = None

class ModelConfig(Section):
    name: str | None = "mlp"
    hidden: list[int] = [256, 256]
    activation: str = "relu"
    dropout: float = 0.0
    batch_norm: bool = False
    outputs: int | None = None
    factory: str | None = None
    args: dict[str, Any] = {}

class LossConfig(Section):
    name: str | None = "cross_entropy"
    factory: str | None = None
    args: dict[str, Any] = {}
    @model_validator(mode="before")
    @classmethod
    def short(cls, v: Any) -> Any:
        return {"name": v} if isinstance(v, str) else v

class OptimizerConfig(Open):
    name: str = "Adam"
    lr: float = 0.001
    weight_decay: float = 0.0
    decay_all: bool = False

class ScheduleConfig(Open):
    name: str | None = None
    warmup_steps: int = 0

class ClipConfig(Section):
    norm: float | None = None
    value: float | None = None

class WorkersConfig(Section):
    count: int = 2
    min: int = 1
    cpus: float = 1
    gpus: Literal[0] = 0
    precision: Literal["fp32"] = "fp32"
    timeout_seconds: float = 60

class ServerConfig(Section):
    mode: Literal["sync"] = "sync"
    staleness: Literal[0] = 0
    slices: Literal[1] = 1
    threads: int | None = None

class CheckpointConfig(Section):
    dir: str = "checkpoints"
    every_steps: int | None = 500
    keep: int = 3

class TrackingConfig(Section):
    uri: str = "sqlite:///mlflow.db"
    experiment: str = "distrain"
    run_name: str | None = None
    every_steps: int | None = None
    registered_model_name: str | None = None
    enabled: bool = True

class ValidationConfig(Section):
    every_steps: int | None = None
    batch_size: int | None = None

class EarlyStoppingConfig(Section):
    metric: str = "loss"
    patience: int = 3
    min_delta: float = 0.0

class ConvergenceConfig(Section):
    loss_change: float | None = None
    grad_norm: float | None = None
    window: int = 100

class ClusterConfig(Section):
    address: str | None = None

class TrainConfig(Section):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig | None = None
    clip: ClipConfig | None = None
    batch_size: int = 256
    epochs: int = 3
    max_steps: int | None = None
    shards: int | None = None
    seed: int = 0
    workers: WorkersConfig = WorkersConfig()
    server: ServerConfig = ServerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    validation: ValidationConfig = ValidationConfig()
    early_stopping: EarlyStoppingConfig | None = None
    convergence: ConvergenceConfig | None = None
    cluster: ClusterConfig = ClusterConfig()
    @property
    def resolved_shards(self) -> int:
        return self.shards or self.workers.count
