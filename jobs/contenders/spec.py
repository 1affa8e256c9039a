"""What a contender is told: data, model, how long to train."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import nn


@dataclass(frozen=True)
class Spec:
    """One measurement. `batch_size` is a worker's; `seconds` are measured after `warmup_steps`. `keeps_memory`: with
    distrain's settings of malloc, which a script by hand does not have."""

    folder: str
    features: str  # "list": one list column `pixels`; "columns": f0..f31
    num_features: int
    hidden: tuple[int, ...]
    num_outputs: int
    loss: str  # cross_entropy or mse
    batch_size: int
    seconds: float
    num_workers: int = 2
    shuffle_rows: int = 65_536
    warmup_steps: int = 20
    keeps_memory: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        values = json.loads(text)
        return cls(**{**values, "hidden": tuple(values["hidden"])})

    @property
    def label(self) -> str:
        return "label" if self.loss == "cross_entropy" else "y"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        widths = [self.num_features, *self.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.num_outputs))

    def loss_of(self, outputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if self.loss == "cross_entropy":
            return nn.functional.cross_entropy(outputs, label)
        return nn.functional.mse_loss(outputs.squeeze(-1), label)
