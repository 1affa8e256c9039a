"""Models by name or from the user's factory, always float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
_IMAGE_NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),  # over channels and pixels at once
    "group": lambda channels: nn.GroupNorm(_groups(channels), channels),
}
_MOST_GROUPS = 32  # as in Wu and He 2018


def _groups(units: int) -> int:
    """The most groups, of equal size, that so many units can be cut into."""
    return next(count for count in range(min(_MOST_GROUPS, units), 0, -1) if units % count == 0)


def hidden_layers(
    width: int, hidden: list[int], activation: str, dropout: float, normalization: str | None
) -> tuple[list[nn.Module], int]:
    """Linear layers, each with its normalization, activation and dropout; and the width that comes out."""
    layers: list[nn.Module] = []
    for units in hidden:
        layers.append(nn.Linear(width, units))
        if normalization is not None:
            layers.append(NORMALIZATIONS[normalization](units))
        layers.append(ACTIVATIONS[activation]())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = units
    return layers, width


class MLP(nn.Sequential):
    """A multilayer perceptron: [rows, num_features] -> [rows, num_outputs], activations between the linear layers."""

    def __init__(self, num_features: int, hidden: list[int], num_outputs: int, activation: str = "relu",
                 dropout: float = 0.0, normalization: str | None = None) -> None:  # fmt: skip
        layers, width = hidden_layers(num_features, hidden, activation, dropout, normalization)
        super().__init__(*layers, nn.Linear(width, num_outputs))


class CNN(nn.Sequential):
    """A convolutional network: flat rows [rows, channels x height x width] -> [rows, num_outputs].

    Each convolution keeps height and width, and is followed by normalization, activation and 2 x 2 max pooling as long
    as there are two pixels to pool; then hidden linear layers as in an MLP.
    """

    def __init__(self, image_shape: list[int], channels: list[int], kernel_size: int, hidden: list[int],
                 num_outputs: int, activation: str = "relu", dropout: float = 0.0,
                 normalization: str | None = None) -> None:  # fmt: skip
        depth, height, width = image_shape
        layers: list[nn.Module] = [nn.Unflatten(1, (depth, height, width))]
        for count in channels:
            layers.append(nn.Conv2d(depth, count, kernel_size, padding="same"))
            if normalization is not None:
                layers.append(_IMAGE_NORMALIZATIONS[normalization](count))
            layers.append(ACTIVATIONS[activation]())
            if min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            depth = count
        flat = depth * height * width
        hidden_part, last = hidden_layers(flat, hidden, activation, dropout, normalization)
        super().__init__(*layers, nn.Flatten(), *hidden_part, nn.Linear(last, num_outputs))


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
    model = _from_factory(config) if config.factory is not None else _by_name(config, num_features, num_outputs)
    if statistics is not None:
        model = Standardized(model, *statistics)
    return model


def _by_name(config: ModelConfig, num_features: int | None, num_outputs: int) -> nn.Module:
    if num_features is None:
        raise ConfigError('model.name: with data.transform, give the model as model.factory: "module:function"')
    if config.activation not in ACTIVATIONS:
        raise ConfigError(
            f"model.activation: no activation {config.activation!r}{_did_you_mean(config.activation, ACTIVATIONS)}; "
            f"there are {', '.join(ACTIVATIONS)}"
        )
    model: nn.Module
    if config.name in ("linear", "logistic"):
        model = nn.Linear(num_features, num_outputs)
    elif config.name == "cnn":
        assert config.image_shape is not None
        if math.prod(config.image_shape) != num_features:
            raise ConfigError(
                f"model.image_shape: {' x '.join(map(str, config.image_shape))} is {math.prod(config.image_shape)} "
                f"values, and a row has {num_features} features"
            )
        model = CNN(config.image_shape, config.channels, config.kernel_size, config.hidden, num_outputs,
                    config.activation, config.dropout, config.normalization)  # fmt: skip
    else:
        model = MLP(num_features, config.hidden, num_outputs, config.activation, config.dropout, config.normalization)
    if config.initialization is not None:
        initialize(model, config.initialization)
    return model


def initialize(model: nn.Module, name: str) -> None:
    """Fill the weights of linear and convolution layers as torch.nn.init has it, and their biases with 0.

    "he" stands for torch's "kaiming": he_normal, he_uniform; a bare "he", "xavier" or "kaiming" for its normal form.
    Raises ConfigError for another name.
    """
    found = {"he": "kaiming_normal", "kaiming": "kaiming_normal", "xavier": "xavier_normal", "glorot": "xavier_normal"}
    known = found.get(name, name.replace("he_", "kaiming_").replace("glorot_", "xavier_"))
    names = [key.removesuffix("_") for key in vars(nn.init) if key.endswith("_") and not key.startswith("_")]
    names = sorted(set(names) - _NOT_FOR_MATRICES)
    if known not in names:
        raise ConfigError(
            f"model.initialization: torch.nn.init has no {name!r}{_did_you_mean(name, names)}; there are "
            f"{', '.join(names)}"
        )
    fill = getattr(nn.init, f"{known}_")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fill(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_NOT_FOR_MATRICES = {"constant", "dirac", "eye", "sparse"}  # which need a value, or other shapes


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), 1)
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
