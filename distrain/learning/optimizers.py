"""Any optimizer of torch.optim, by its own name and keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import OptimizerConfig
from distrain.errors import ConfigError

_REFUSED = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only, and workers push dense ones",
    "Optimizer": "it is the base class",
}
_OURS = {"self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"}
NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def optimizer_names() -> list[str]:
    """The names that `optimizer.name` may take."""
    return sorted(
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in _REFUSED
    )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the model's trainable parameters.

    With weight decay, biases and the parameters of normalization layers go without, unless `decay_all`. The fused
    implementation is used where torch has one for the CPU. Raises ConfigError for an unknown name, keyword or value.
    """
    problems = check_optimizer(config)
    if problems:
        raise ConfigError("\n".join(f"{key}: {text}" for key, text in problems))
    kind = getattr(torch.optim, config.name)
    signature = inspect.signature(kind).parameters
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.options.items()}
    options["lr"] = config.lr
    if "weight_decay" in signature:
        options["weight_decay"] = config.weight_decay
    groups = _groups(model, config)
    try:
        if "fused" in signature:
            try:
                return _unprofiled(kind(groups, fused=True, **options))
            except RuntimeError:  # not on this device
                pass
        return _unprofiled(kind(_groups(model, config), **options))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optimizer: torch.optim.{config.name} refused its values: {error}") from error


def _unprofiled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Take off torch's wrapper for profilers and step hooks, neither of which there are: between other processes' work,
    out of the cache, it is a third of what Adam takes for 75,000 parameters (120 of 400 microseconds)."""
    bare = optimizer.step.__wrapped__  # type: ignore[attr-defined]
    optimizer.step = MethodType(bare, optimizer)  # type: ignore[method-assign]
    return optimizer


def check_optimizer(config: OptimizerConfig) -> list[tuple[str, str]]:
    """What is wrong with an optimizer's name and keywords: (key, what), nothing where all is well."""
    if config.name in _REFUSED:
        return [("optimizer.name", f"{config.name} cannot be used: {_REFUSED[config.name]}")]
    names = optimizer_names()
    if config.name not in names:
        return [("optimizer.name", f"torch.optim has no optimizer {config.name!r}{did_you_mean(config.name, names)}")]
    signature = set(inspect.signature(getattr(torch.optim, config.name)).parameters)
    known = {*signature - _OURS, *OptimizerConfig.model_fields}
    problems = [
        (f"optimizer.{key}", f"torch.optim.{config.name} has no such keyword{did_you_mean(key, sorted(known))}")
        for key in config.options
        if key not in signature or key in _OURS
    ]
    if config.weight_decay and "weight_decay" not in signature:
        problems.append(("optimizer.weight_decay", f"torch.optim.{config.name} has no weight decay"))
    return problems


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The nearest of the names there are, or all of them."""
    same = [other for other in names if other.lower() == name.lower()]
    near = same or get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"


def is_spared(model: nn.Module) -> Callable[[str, Tensor], bool]:
    """Tells which parameters (name, parameter) go without weight decay and penalties: biases, and all of normalization
    layers."""
    of_norms = {id(p) for module in model.modules() if isinstance(module, NORMALIZATIONS) for p in module.parameters()}

    def is_without(name: str, parameter: Tensor) -> bool:
        own = name.rpartition(".")[2]  # nn.MultiheadAttention has in_proj_bias, bias_k and bias_v
        return id(parameter) in of_norms or own.startswith("bias") or own.endswith("_bias")

    return is_without


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not config.weight_decay or config.decay_all:
        return [{"params": [p for _, p in trainable]}]
    is_without = is_spared(model)
    spared = [p for name, p in trainable if is_without(name, p)]
    decayed = [p for name, p in trainable if not is_without(name, p)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
