"""What goes on inside a model, layer by layer: norms of gradients and activations, dead units, how far an update goes.

A layer is a module with parameters of its own, but for normalization; the activation function that is called behind it,
by a module of torch.nn or in the model's own `forward`, belongs to it. Workers look at activations in forward passes,
the server at gradients and updates, in the same few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distrain.exchange.layout import Entry, Layout
from distrain.learning.optimizers import NORMALIZATIONS
from distrain.records import LayerLook

_FLAT_ENDS = {  # what an activation gives where its derivative is 0: a unit that gives nothing else learns nothing
    "relu": (0.0,), "relu_": (0.0,), "hardswish": (0.0,), "relu6": (0.0, 6.0), "hardsigmoid": (0.0, 1.0),
    "hardtanh": (-1.0, 1.0),
}  # fmt: skip
_ACTIVATIONS = {
    *_FLAT_ENDS, "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "tanh", "sigmoid",
}  # fmt: skip
_ROWS_TO_DIE = 32  # a unit that is 0 for fewer rows than this is not called dead

Seen = dict[str, Any]
"""What one microbatch showed of one layer: "squares" and "count" of its activations; where their function has a flat
end, "units", and "active", a bit for each of them that was not there for some row, as an integer."""


def is_look(step: int, every: int | None) -> bool:
    """Whether the plan's step, from 0, is looked at: every so many, and before the first of those at 1, 2, 4, ..."""
    return every is not None and (step % every == 0 or (step < every and step & (step - 1) == 0))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in the order of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, NORMALIZATIONS) and any(True for _ in module.parameters(recurse=False))
    }


class ActivationProbe:
    """Looks at a model's activations between `begin` and `end`: by forward hooks, and at functions as torch calls them.

    Not at functions in a model that torch.compile has made: it would compile it once more for them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = layers_of(model)
        self._functions = None if _is_compiled(model) else _Activations(self._look_behind)
        self._hooks: list[Any] = []
        self._last: str | None = None  # the layer that ran last
        self._now: dict[str, Seen] = {}
        self._seen: dict[str, Seen] = {}

    def begin(self) -> None:
        """Look at the forward passes that follow."""
        self._seen = {}
        self._hooks = [module.register_forward_hook(partial(self._look, name)) for name, module in self._layers.items()]
        self._hooks.append(self._model.register_forward_pre_hook(self._enter, prepend=True))
        self._hooks.append(self._model.register_forward_hook(self._leave, always_call=True))

    def passed(self) -> None:
        """A forward pass is over."""
        for name, now in self._now.items():
            add_seen(self._seen.setdefault(name, {"squares": 0.0, "count": 0}), now)
        self._now = {}

    def end(self) -> dict[str, Seen]:
        """Look no more. Returns what was seen, by layer."""
        for hook in self._hooks:
            hook.remove()
        return self._seen

    def _enter(self, *_: Any) -> None:
        self._last = None
        if self._functions is not None:
            self._functions.__enter__()

    def _leave(self, *_: Any) -> None:
        if self._functions is not None:
            self._functions.__exit__(None, None, None)

    def _look(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._last = name
        self._take(name, output, ())

    def _look_behind(self, output: Any, flat_ends: tuple[float, ...]) -> None:
        """An activation takes the place of what the layer itself gave."""
        if self._last is not None:
            self._take(self._last, output, flat_ends)

    def _take(self, name: str, output: Any, flat_ends: tuple[float, ...]) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        values = output.detach()
        seen: Seen = {
            "squares": float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2,
            "count": values.numel(),
        }
        if flat_ends and values.ndim > 1:
            unit = values.ndim - 1 if values.ndim == 3 else 1  # channels of images; features of rows and of tokens
            moves = values != flat_ends[0]
            for end in flat_ends[1:]:
                moves &= values != end
            active = moves.movedim(unit, 0).flatten(1).any(1).tolist()
            seen["units"], seen["active"] = len(active), sum(1 << i for i, is_active in enumerate(active) if is_active)
        self._now[name] = seen


class _Activations(TorchFunctionMode):
    """Tells `see` what each activation function gave, and its flat ends. Changes nothing of what is computed."""

    def __init__(self, see: Callable[[Any, tuple[float, ...]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ACTIVATIONS:
            ends = _FLAT_ENDS.get(name, ())
            if "min_val" in kwargs:  # hardtanh, which torch.nn.ReLU6 calls too
                ends = kwargs["min_val"], kwargs["max_val"]
            self._see(result, ends)
        return result


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def add_seen(seen: Seen, more: Seen) -> None:
    """Take in what another microbatch, or another piece, showed of the same layer."""
    seen["squares"] += more["squares"]
    seen["count"] += more["count"]
    if "units" in more:
        seen["units"], seen["active"] = more["units"], seen.get("active", 0) | more["active"]


class LayerWatch:
    """Looks at one update: `before` it, `after` it, then `looks`. Parameters that are not trained are left out."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        by_name = {entry.name: entry for entry in layout.parameters}
        self._kinds: dict[str, str] = {}
        self._entries: dict[str, list[Entry]] = {}
        for name, module in layers_of(model).items():
            trained = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
            own = [f"{name}.{key}" if name else key for key in trained]
            entries = [by_name[key] for key in own if key in by_name]  # a tied one has its first name only
            if entries:
                self._kinds[name], self._entries[name] = type(module).__name__, entries

    def before(self, gradients: Tensor, parameters: Tensor) -> None:
        """The update's gradient, flat, before clipping; and the parameters."""
        self._gradient = {name: _norm(gradients, entries) for name, entries in self._entries.items()}
        self._weights = {name: _norm(parameters, _matrices(entries)) for name, entries in self._entries.items()}
        self._parameters = parameters[: len(gradients)].clone()

    def after(self, parameters: Tensor) -> None:
        """The parameters after the update."""
        moved = self._parameters.sub_(parameters[: len(self._parameters)])
        self._moved = {name: _norm(moved, _matrices(entries)) for name, entries in self._entries.items()}

    def looks(self, seen: Iterable[Mapping[str, Seen]], rows: int) -> tuple[LayerLook, ...]:
        """What was found. `seen` are the microbatches' activations, in a fixed order; `rows` the update's."""
        total: dict[str, Seen] = {}
        for layers in seen:
            for name, more in layers.items():
                add_seen(total.setdefault(name, {"squares": 0.0, "count": 0}), more)
        return tuple(
            LayerLook(
                name or "model",
                kind,
                self._gradient[name],
                sum(entry.numel for entry in self._entries[name]),
                self._weights[name],
                self._moved[name] / self._weights[name] if self._weights[name] else None,
                _root_mean_square(total.get(name)),
                _dead_share(total.get(name), rows),
            )
            for name, kind in self._kinds.items()
        )


def _matrices(entries: list[Entry]) -> list[Entry]:
    """The weights among a layer's parameters: biases begin at 0, and move by any multiple of that."""
    return [entry for entry in entries if len(entry.shape) > 1] or entries


def _norm(vector: Tensor, entries: list[Entry]) -> float:
    parts = (vector[entry.start : entry.start + entry.numel] for entry in entries)
    return math.sqrt(sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts))


def _root_mean_square(seen: Seen | None) -> float | None:
    return math.sqrt(seen["squares"] / seen["count"]) if seen is not None and seen["count"] else None


def _dead_share(seen: Seen | None, rows: int) -> float | None:
    if seen is None or "units" not in seen or rows < _ROWS_TO_DIE:
        return None
    return 1.0 - int(seen["active"]).bit_count() / int(seen["units"])
