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
from distrain.learning.layers import ACTIVATIONS, IMAGE_NORMALIZATIONS, hidden_layers
from distrain.learning.text import build_text


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
                layers.append(IMAGE_NORMALIZATIONS[normalization](count))
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


class Pixels(nn.Module):
    """Turns uint8 pixels [rows, channels, height, width] into float32 of 0 to 1 before the model, flat rows for a model
    by name, so that an exported model takes decoded images as they are."""

    def __init__(self, model: nn.Module, flat: bool) -> None:
        super().__init__()
        self.model = model
        self.flat = flat

    def forward(self, features: Tensor) -> Tensor:
        scaled = features.to(self._dtype) / 255
        return self.model(scaled.flatten(1) if self.flat else scaled)

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.float32)


def build_model(
    config: ModelConfig,
    num_features: int | None,
    num_outputs: int,
    statistics: tuple[Tensor, Tensor] | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Build the model that the configuration names.

    `statistics` are (mean, deviation), float32 [num_features] each, for a standardized model; `image_shape` the
    channels, height and width of encoded images. Raises ConfigError for an unknown name, features that do not fit, or a
    factory's model that distrain cannot train.
    """
    if config.factory is not None:
        model = _from_factory(config)
    else:
        model = _by_name(config, num_features, num_outputs, image_shape)
    if image_shape is not None:
        model = Pixels(model, flat=config.factory is None)
    if statistics is not None:
        model = Standardized(model, *statistics)
    return model


def check_features(config: ModelConfig, num_features: int | None, image_shape: tuple[int, int, int] | None) -> None:
    """Raise ConfigError where a model by name cannot take such features, or has parts of unknown names."""
    if config.factory is not None:
        return
    if config.activation not in ACTIVATIONS:
        raise ConfigError(
            f"model.activation: no activation {config.activation!r}{_did_you_mean(config.activation, ACTIVATIONS)}; "
            f"there are {', '.join(ACTIVATIONS)}"
        )
    if config.initialization is not None:
        _initializer(config.initialization)
    if config.name == "text":
        return
    if num_features is None:
        raise ConfigError('model.name: with data.transform, give the model as model.factory: "module:function"')
    wanted = config.image_shape
    if config.name != "cnn":
        return
    if wanted is None and image_shape is None:
        raise ConfigError("model: cnn needs image_shape: [channels, height, width]")
    if wanted is not None and image_shape is not None and tuple(wanted) != image_shape:
        raise ConfigError(f"model.image_shape: {_by(wanted)}, and the first image of the data is {_by(image_shape)}")
    if wanted is not None and math.prod(wanted) != num_features:
        raise ConfigError(
            f"model.image_shape: {_by(wanted)} is {math.prod(wanted)} values, and a row has {num_features} features"
        )


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _by_name(
    config: ModelConfig, num_features: int | None, num_outputs: int, image_shape: tuple[int, int, int] | None
) -> nn.Module:
    check_features(config, num_features, image_shape)
    model: nn.Module
    if config.name == "text":
        model = build_text(config, num_outputs)
    else:
        assert num_features is not None
        if config.name in ("linear", "logistic"):
            model = nn.Linear(num_features, num_outputs)
        elif config.name == "cnn":
            model = CNN(config.image_shape or list(image_shape or ()), config.channels, config.kernel_size,
                        config.hidden, num_outputs, config.activation, config.dropout,
                        config.normalization)  # fmt: skip
        else:
            model = MLP(num_features, config.hidden, num_outputs, config.activation, config.dropout,
                        config.normalization)  # fmt: skip
    if config.initialization is not None:
        initialize(model, config.initialization)
    return model


def initialize(model: nn.Module, name: str) -> None:
    """Fill the weights of linear, convolution and attention layers as torch.nn.init has it, and their biases with 0.

    "he" stands for torch's "kaiming": he_normal, he_uniform; a bare "he", "xavier" or "kaiming" for its normal form.
    Raises ConfigError for another name.
    """
    fill = _initializer(name)
    for module in model.modules():
        weight: Tensor | None = None
        bias: Tensor | None = None
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight, bias = module.weight, module.bias
        elif isinstance(module, nn.MultiheadAttention):
            weight, bias = module.in_proj_weight, module.in_proj_bias
        if weight is not None:
            fill(weight)
        if bias is not None:
            nn.init.zeros_(bias)


def _initializer(name: str) -> Callable[[Tensor], Tensor]:
    found = {"he": "kaiming_normal", "kaiming": "kaiming_normal", "xavier": "xavier_normal", "glorot": "xavier_normal"}
    known = found.get(name, name.replace("he_", "kaiming_").replace("glorot_", "xavier_"))
    names = [key.removesuffix("_") for key in vars(nn.init) if key.endswith("_") and not key.startswith("_")]
    names = sorted(set(names) - _NOT_FOR_MATRICES)
    if known not in names:
        raise ConfigError(
            f"model.initialization: torch.nn.init has no {name!r}{_did_you_mean(name, names)}; there are "
            f"{', '.join(names)}"
        )
    return getattr(nn.init, f"{known}_")


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
