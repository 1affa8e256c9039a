"""Models by name or from the user's factory, always float32."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from distrain.config import ModelConfig
from distrain.errors import ConfigError
from distrain.imports import load_object

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "group": lambda units: nn.GroupNorm(_groups(units), units),
}
_MOST_GROUPS = 32  # as in Wu and He 2018


def _groups(units: int) -> int:
    """The most groups, of equal size, that so many units can be cut into."""
    return next(count for count in range(min(_MOST_GROUPS, units), 0, -1) if units % count == 0)


class MLP(nn.Sequential):
    """A multilayer perceptron: [rows, num_features] -> [rows, num_outputs], activations between the linear layers."""

    def __init__(self, num_features: int, hidden: list[int], num_outputs: int, activation: str = "relu",
                 dropout: float = 0.0, normalization: str | None = None) -> None:  # fmt: skip
        layers: list[nn.Module] = []
        width = num_features
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if normalization is not None:
                layers.append(NORMALIZATIONS[normalization](units))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = units
        super().__init__(*layers, nn.Linear(width, num_outputs))


class Standardized(nn.Module):
    """Subtracts the training rows' mean and divides by their deviation before the model, so that an exported model
    contains both. `mean` and `deviation` are float32 buffers [num_features]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model((features - self.mean) / self.deviation)


def build_model(
    config: ModelConfig,
    num_features: int | None,
    num_outputs: int,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> nn.Module:
    """Build the model that the configuration names.

    `statistics` are (mean, deviation), float32 [num_features] each, for a standardized model. Raises ConfigError for an
    unknown name, or a factory's model that distrain cannot train.
    """
    if config.factory is not None:
        model = _from_factory(config)
    else:
        if num_features is None:
            raise ConfigError('model.name: with data.transform, give the model as model.factory: "module:function"')
        if config.activation not in ACTIVATIONS:
            raise ConfigError(
                f"model.activation: no activation {config.activation!r}{_did_you_mean(config.activation)}; there are "
                f"{', '.join(ACTIVATIONS)}"
            )
        model = MLP(num_features, config.hidden, num_outputs, config.activation, config.dropout, config.normalization)
    if statistics is not None:
        model = Standardized(model, *statistics)
    return model


def _did_you_mean(name: str) -> str:
    near = get_close_matches(name, ACTIVATIONS, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _from_factory(config: ModelConfig) -> nn.Module:
    assert config.factory is not None
    model = load_object(config.factory, "model.factory")(**config.args)
    where = f"model.factory: {config.factory}"
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where} returned {type(model).__name__}, not a torch.nn.Module")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(f"{where}: {name} has no shape yet; lazy modules are not supported, give their sizes")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ConfigError(f"{where}: {name} is {tensor.dtype}; models are trained in torch.float32 (model.float())")
        if tensor.is_complex():
            raise ConfigError(f"{where}: {name} is {tensor.dtype}; only real numbers can be trained")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"{where}: the model has no trainable parameters")
    return model


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A microbatch without what only the loss takes."""
    return {name: tensor for name, tensor in batch.items() if name not in ("label", "weight")}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Run the model on a microbatch: by position where its only input is "features", else by keyword."""
    inputs = inputs_of(batch)
    return model(inputs["features"]) if inputs.keys() == {"features"} else model(**inputs)


def minimum_rows(model: nn.Module) -> int:
    """The fewest rows a training microbatch may have: batch normalization needs 2."""
    return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1
