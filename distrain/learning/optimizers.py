"""Any optimizer of torch.optim, by its own name and keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import OptimizerConfig
from distrain.errors import ConfigError
from distrain.learning.keywords import misfits, typed

_REFUSED = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only, and workers push dense ones",
    "Optimizer": "it is the base class",
}
_WRAPPED = ("add_param_group", "state_dict", "load_state_dict")  # beside `step`
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
    refuse(check_optimizer(config))
    try:
        return _make(model, config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optimizer: {refusal(f'torch.optim.{config.name}', config.options, error)}") from error


def _make(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    kind = _bare(getattr(torch.optim, config.name))
    signature = inspect.signature(kind).parameters
    options = {**typed(kind, config.options), "lr": config.lr}
    if "weight_decay" in signature:
        options["weight_decay"] = config.weight_decay
    if "fused" in signature:
        with suppress(RuntimeError):  # not on this device
            return kind(_groups(model, config), **{**options, "fused": True})
    return kind(_groups(model, config), **options)


def _bare(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same class without torch's wrappers. Those of torch.compile load torch._dynamo, which takes a second; that of
    profilers and step hooks, between other processes' work and out of the cache, is a third of what Adam takes for
    75,000 parameters (120 of 400 microseconds)."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    step = torch.no_grad()(inspect.unwrap(kind.step))
    step.hooked = True  # or torch wraps it again
    return type(kind.__name__, (kind,), {**methods, "step": step})


def check_optimizer(config: OptimizerConfig) -> list[tuple[str, str]]:
    """What is wrong with an optimizer's name, keywords and values: (key, what), nothing where all is well. Values of
    the right type are tried out, with two updates of two weights."""
    if config.name in _REFUSED:
        return [("optimizer.name", f"{config.name} cannot be used: {_REFUSED[config.name]}")]
    names = optimizer_names()
    if config.name not in names:
        return [("optimizer.name", f"torch.optim has no optimizer {config.name!r}{did_you_mean(config.name, names)}")]
    kind = getattr(torch.optim, config.name)
    signature = set(inspect.signature(kind).parameters)
    known = {*signature - _OURS, *OptimizerConfig.model_fields}
    problems = [
        (f"optimizer.{key}", f"torch.optim.{config.name} has no such keyword{did_you_mean(key, sorted(known))}")
        for key in config.options
        if key not in known
    ]
    problems += [(f"optimizer.{key}", text) for key, text in misfits(kind, config.options).items() if key in known]
    if config.weight_decay and "weight_decay" not in signature:
        problems.append(("optimizer.weight_decay", f"torch.optim.{config.name} has no weight decay"))
    if not problems:
        try:
            optimizer = trial(config)
            for _ in range(2):
                optimizer.step()
        except Exception as error:  # what a value out of bounds raises is torch's own business
            problems.append(("optimizer", refusal(f"torch.optim.{config.name}", config.options, error)))
    return problems


def trial(config: OptimizerConfig, names: Sequence[str] = ("weight", "bias")) -> torch.optim.Optimizer:
    """The optimizer over weights of these names that have a gradient, in the groups that a model's parameters come
    in."""
    weights = nn.ParameterDict({name: torch.ones(1, 1) for name in names})  # Muon takes no others than two-dimensional
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    return _make(weights, config)


def refuse(problems: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError where there are problems, (key, what) each."""
    if problems:
        raise ConfigError("\n".join(f"{key}: {text}" for key, text in problems))


def refusal(name: str, options: Mapping[str, Any], error: Exception) -> str:
    """What to say where a class of torch raised: of long messages, the first line."""
    values = ", ".join(f"{key}={value!r}" for key, value in options.items())
    first = str(error).partition("\n")[0] or type(error).__name__
    return f"{name} refused its values{f' ({values})' if values else ''}: {first}"


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
