"""Any optimizer of torch.optim, by its own name and keywords."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from distrain.config import OptimizerConfig
from distrain.errors import ConfigError

_REFUSED = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only, and workers push dense ones",
    "Optimizer": "it is the base class",
}
_OURS = {"self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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
    kind = _optimizer_class(config.name)
    signature = inspect.signature(kind).parameters
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.options.items()}
    for key in options:
        if key not in signature or key in _OURS:
            near = get_close_matches(key, set(signature) - _OURS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"optimizer.{key}: torch.optim.{config.name} has no such keyword{hint}")
    options["lr"] = config.lr
    if "weight_decay" in signature:
        options["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise ConfigError(f"optimizer.weight_decay: torch.optim.{config.name} has no weight decay")
    groups = _groups(model, config)
    try:
        if "fused" in signature:
            try:
                return kind(groups, fused=True, **options)
            except RuntimeError:  # not on this device
                pass
        return kind(_groups(model, config), **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optimizer: torch.optim.{config.name} refused its values: {error}") from error


def _optimizer_class(name: str) -> Any:
    if name in _REFUSED:
        raise ConfigError(f"optimizer.name: {name} cannot be used: {_REFUSED[name]}")
    names = optimizer_names()
    if name not in names:
        near = get_close_matches(name, names, 1) or [n for n in names if n.lower() == name.lower()]
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
        raise ConfigError(f"optimizer.name: torch.optim has no optimizer {name!r}{hint}")
    return getattr(torch.optim, name)


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not config.weight_decay or config.decay_all:
        return [{"params": [p for _, p in trainable]}]
    of_norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    spared = [p for name, p in trainable if id(p) in of_norms or name.rpartition(".")[2].startswith("bias")]
    spared_ids = {id(p) for p in spared}
    decayed = [p for _, p in trainable if id(p) not in spared_ids]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
