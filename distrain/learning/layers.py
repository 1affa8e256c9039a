"""What models by name are built of."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "group": lambda units: nn.GroupNorm(_groups(units), units),
}
IMAGE_NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
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
