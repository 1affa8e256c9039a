"""Is the model's gradient right? Reverse mode against forward mode and against central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from distrain.config import TrainConfig
from distrain.data.statistics import measure
from distrain.learning.models import forward
from distrain.learning.task import Task, build_task
from distrain.preparation import prepare
from distrain.worker import Readers, microbatch_seed

_STEP = 1e-5  # of central differences, relative to the parameters' size: the cube root of float64's precision, about
_TOLERANCE = 1e-4  # of relative differences; rounding and the differences' own error stay below 1e-6
_ENTRIES = 8  # of each parameter, checked one by one
_DIRECTIONS = 2  # random ones for each parameter

RIGHT, WRONG, KINK = "right", "wrong", "at a kink"


@dataclass(frozen=True)
class Checked:
    """One parameter: the largest relative difference of reverse mode from the others, and where.

    `forward` is None where an operation of the model has no forward mode. `entry` is the index of the worst entry.
    """

    name: str
    shape: tuple[int, ...]
    forward: float | None
    central: float
    entry: tuple[int, ...]
    verdict: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_gradients(config: TrainConfig, tolerance: float = _TOLERANCE) -> list[Checked]:
    """Check the gradient of the configuration's model and loss on the first microbatch of its data, or the
    first piece of it, in float64.

    The model is in training mode, as when it learns: every evaluation draws the same dropout, and starts from the same
    running statistics. Raises what preparing the run raises.
    """
    preparation = prepare(config)
    spec = preparation.task
    statistics = None
    if spec.needs_statistics:
        statistics = measure(preparation.train.dataset, spec.standardize, spec.num_classes)
    task = build_task(spec, statistics)
    readers = Readers(preparation.train)
    try:
        batch = readers.microbatch(0, 0, 0)
    finally:
        readers.close()
    return check_task(task, batch, microbatch_seed(config.seed, 0, 0), tolerance)


def check_task(task: Task, batch: dict[str, Tensor], seed: int, tolerance: float = _TOLERANCE) -> list[Checked]:
    """Check model and loss on a microbatch; `seed` is that of dropout. The task becomes float64."""
    model = task.model.double().train()
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(changed: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(seed)
        state = {**{name: value.clone() for name, value in buffers.items()}, **parameters, **changed}
        total, weight = task.loss.total(functional_call(_Forward(model), _prefixed(state), (batch,)), batch)
        return total / weight

    leaves = {name: value.requires_grad_(True) for name, value in parameters.items()}
    gradients = dict(
        zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True), strict=True)
    )
    parameters = {name: value.detach() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    # What a parameter's gradient is compared with, as a share: none is judged by its own rounding errors.
    scale = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=1.0)
    return [
        _check(name, value, gradients[name], parameters, loss, generator, scale, tolerance)
        for name, value in parameters.items()
    ]


class _Forward(nn.Module):
    """Calls a model with a microbatch, as training does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return forward(self.model, batch)


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in state.items()}


def _check(
    name: str,
    value: Tensor,
    gradient: Tensor | None,
    parameters: dict[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor],
    generator: torch.Generator,
    scale: float,
    tolerance: float,
) -> Checked:
    """Compare directional derivatives along random directions and single entries."""
    if gradient is None:
        gradient = torch.zeros_like(value)
    if not gradient.isfinite().all():
        return Checked(name, tuple(value.shape), None, math.inf, (), WRONG, "the gradient is not finite")
    directions: list[tuple[Tensor, tuple[int, ...]]] = []
    for _ in range(_DIRECTIONS):
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        directions.append((direction / direction.norm().clamp(min=1e-12), ()))
    picked = torch.randperm(value.numel(), generator=generator)[:_ENTRIES].tolist()
    largest = int(gradient.abs().argmax()) if value.numel() else 0
    for flat in dict.fromkeys([largest, *picked]):
        direction = torch.zeros_like(value)
        direction.view(-1)[flat] = 1.0
        directions.append((direction, tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape))))
    worst_forward: float | None = None
    worst = worst_entry = 0.0
    where: tuple[int, ...] = ()
    kinks, note = 0, ""
    for direction, entry in directions:
        reverse = float((gradient * direction).sum())
        size = max(abs(reverse), 1e-3 * scale)
        central, kink = _central(name, value, direction, loss, size, tolerance)
        difference = _finite(abs(reverse - central) / max(size, abs(central)))
        kinks += kink
        if not kink:
            worst = max(worst, difference)
            if entry and difference >= worst_entry:
                worst_entry, where = difference, entry
        if not note:
            try:
                forward_mode = _forward(name, direction, parameters, loss)
            except Exception as error:  # whatever an operation without forward mode raises
                note = f"no forward mode: {str(error).splitlines()[0][:120]}"
            else:
                off = _finite(abs(reverse - forward_mode) / max(size, abs(forward_mode)))
                worst_forward = max(worst_forward or 0.0, off)
    if max(worst, worst_forward or 0.0) > tolerance:
        return Checked(name, tuple(value.shape), worst_forward, worst, where, WRONG, note)
    verdict = KINK if kinks == len(directions) else RIGHT
    return Checked(name, tuple(value.shape), worst_forward, worst, where, verdict, note)


def _finite(difference: float) -> float:
    """What is not a number differs as much as can be: `max` would pass it over."""
    return math.inf if math.isnan(difference) else difference


def _central(
    name: str,
    value: Tensor,
    direction: Tensor,
    loss: Callable[[dict[str, Tensor]], Tensor],
    size: float,
    tolerance: float,
) -> tuple[float, bool]:
    """The central difference, and whether there is a kink close by: two step sizes then disagree."""
    found = []
    with torch.no_grad():
        for step in (_STEP, _STEP / 8):
            up, down = loss({name: value + step * direction}), loss({name: value - step * direction})
            found.append(float(up - down) / (2 * step))
    return found[1], abs(found[0] - found[1]) > 0.5 * tolerance * max(size, abs(found[1]))


def _forward(
    name: str, direction: Tensor, parameters: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor]
) -> float:
    """The same directional derivative in forward mode."""
    _, tangent, *_ = jvp(lambda changed: loss({name: changed}), (parameters[name],), (direction,))
    return float(tangent)
