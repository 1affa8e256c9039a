"""The loss around a run: over the plane of its checkpoints, and over two random directions (Li et al. 2018,
"Visualizing the Loss Landscape of Neural Nets")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distrain.checkpoint import Checkpoint, checkpoints_of, find, load
from distrain.config import TrainConfig
from distrain.data.ragged import Batch
from distrain.errors import CheckpointError
from distrain.inference import batch_rows, open_data, restored_task, task_spec
from distrain.learning.models import forward
from distrain.learning.optimizers import is_spared
from distrain.learning.task import Task, build_task
from distrain.study.sample import sample_rows

Grid = NDArray[np.float64]
Directions = tuple[list[Tensor], list[Tensor]]

_BEYOND = 0.3  # of the path's extent, that a plane shows around it
_LEAST = 1e-12
_FORWARD_ROWS = 256  # at least so many at a time, since each of very many points pays for every call


@dataclass(frozen=True)
class Surface:
    """The loss over a plane through a run's last parameters: `loss[j, i]` at parameters + x[i] first + y[j] second."""

    x: Grid
    y: Grid
    loss: Grid
    path: Grid  # [points, 2]: where the run's parameters lie in the plane, in order; the last is (0, 0)
    shares: tuple[float, float] | None = None  # of the path's variation along each direction, for the plane of the path


@dataclass(frozen=True)
class Landscape:
    """Both surfaces of a run. `path` is None where its checkpoints span no plane; `steps` are those of the path."""

    run_name: str
    mlflow_run_id: str | None
    tracking_uri: str
    num_rows: int
    rows_of: str
    steps: tuple[int, ...]
    path: Surface | None
    random: Surface

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"run_name": self.run_name, "rows": self.num_rows, "steps": list(self.steps)}
        for name, surface in (("path", self.path), ("random", self.random)):
            values[name] = None if surface is None else {
                "x": surface.x.tolist(), "y": surface.y.tolist(), "loss": surface.loss.tolist(),
                "path": surface.path.tolist(), "shares": surface.shares,
            }  # fmt: skip
        return values


def landscape(
    reference: str,
    root: str = "checkpoints",
    data: str | None = None,
    rows: int = 1000,
    points: int = 25,
    seed: int = 0,
) -> Landscape:
    """Measure the loss around a run's newest (or the named) checkpoint, on a fixed sample of `rows` rows of `data`
    (default: the run's validation rows, else its training rows), over `points` x `points` parameters of each plane.

    The path is from the initial parameters, as the run's seed gives them, through the checkpoints that are kept. The
    model is in evaluation mode: batch normalization uses the last checkpoint's running statistics, as in the paper.
    Raises what `find` and reading the data raise.
    """
    last = load(find(reference, root).path)
    config = TrainConfig.from_mapping(last.manifest["config"])
    source = data or config.data.validation or config.data.train
    dataset = open_data(last, config, source, with_labels=True)
    batches = sample_rows(dataset, rows, max(_FORWARD_ROWS, batch_rows(config, None)), seed)
    task = restored_task(last, config)
    kept = [load(path) for path in checkpoints_of(last.path.parent) if path.name <= last.path.name]
    trail = _trail(task, last, kept)
    measure = _Loss(task, batches)
    along = plane_of_path(trail)
    path: Surface | None = None
    if along is not None:
        directions, where, shares = along
        x, y = (_span(where[:, axis], points) for axis in (0, 1))
        path = Surface(x, y, measure.over(directions, x, y), where, shares)
    x = np.linspace(-1, 1, points)
    random = filter_normalized(task.model, seed)
    return Landscape(
        run_name=str(last.manifest["run_name"]),
        mlflow_run_id=last.manifest["mlflow_run_id"],
        tracking_uri=last.manifest["tracking_uri"],
        num_rows=sum(len(batch["label"]) for batch in batches),
        rows_of=next((n for n in ("validation", "train") if source == getattr(config.data, n)), "other"),
        steps=(0, *(checkpoint.manifest["step"] for checkpoint in kept)),
        path=path,
        random=Surface(x, x, measure.over(random, x, x), np.zeros((1, 2))),
    )


def _trail(task: Task, last: Checkpoint, kept: Sequence[Checkpoint]) -> list[list[Tensor]]:
    """The trainable parameters at the start and at each checkpoint."""
    names = [name for name, p in task.model.named_parameters() if p.requires_grad]
    config = TrainConfig.from_mapping(last.manifest["config"])
    initial = dict(build_task(task_spec(last, config)).model.named_parameters())
    try:
        saved = [[checkpoint.model[name] for name in names] for checkpoint in kept]
    except KeyError as error:
        raise CheckpointError(f"{last.path.parent}: a checkpoint of another model is among them: no {error}") from error
    return [[initial[name].detach() for name in names], *saved]


def plane_of_path(trail: Sequence[list[Tensor]]) -> tuple[Directions, Grid, tuple[float, float]] | None:
    """The two directions along which a path varies most (the principal components of its points less the last), the
    points' coordinates on them, and their shares of the variation (Li et al. 2018, section 7).

    None where the points lie on a line.
    """
    matrix = np.stack([np.concatenate([_flat(value) - _flat(end) for value, end in zip(point, trail[-1], strict=True)])
                       for point in trail])  # fmt: skip
    centred = matrix - matrix.mean(0)
    # Of few points in many dimensions, by the eigenvectors of their inner products.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    first, second = values[-1], values[-2] if len(values) > 1 else 0.0
    if second <= _LEAST * max(first, _LEAST):
        return None
    axes = [centred.T @ vectors[:, i] / np.sqrt(values[i]) for i in (-1, -2)]
    where = matrix @ np.stack(axes, 1)
    total = values.clip(0).sum()
    directions = [_like(axis, trail[-1]) for axis in axes]
    return (directions[0], directions[1]), where, (float(first / total), float(second / total))


def filter_normalized(model: nn.Module, seed: int) -> Directions:
    """Two random directions, each filter (the weights of one output) scaled to the norm of the model's own; zero for
    biases and the parameters of normalization layers (Li et al. 2018, section 4)."""
    spared = is_spared(model)
    generator = torch.Generator().manual_seed(seed)
    directions: list[list[Tensor]] = [[], []]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for direction in directions:
            drawn = torch.randn(parameter.shape, generator=generator)
            if spared(name, parameter):
                direction.append(torch.zeros_like(drawn))
                continue
            filters = drawn.reshape(len(drawn), -1) if drawn.ndim > 1 else drawn.reshape(1, -1)
            own = parameter.detach().reshape(filters.shape).norm(dim=1, keepdim=True)
            scaled = filters * (own / filters.norm(dim=1, keepdim=True).clamp(min=_LEAST))
            direction.append(scaled.reshape(parameter.shape))
    return directions[0], directions[1]


class _Loss:
    """The mean loss of a task over fixed rows, at parameters other than its own."""

    def __init__(self, task: Task, batches: Sequence[Batch]) -> None:
        self._task = task
        self._batches = batches
        self._parameters = [p for p in task.model.parameters() if p.requires_grad]
        self._origin = [p.detach().clone() for p in self._parameters]

    def over(self, directions: Directions, x: Grid, y: Grid) -> Grid:
        """float64 [len(y), len(x)]; infinite where the loss is no number. The model is as it was afterwards."""
        loss = np.empty((len(y), len(x)))
        with torch.inference_mode():
            for j, i in np.ndindex(loss.shape):
                self._move(directions, float(x[i]), float(y[j]))
                loss[j, i] = self._mean()
            self._move(directions, 0.0, 0.0)
        return np.nan_to_num(loss, nan=np.inf, posinf=np.inf)

    def _move(self, directions: Directions, x: float, y: float) -> None:
        for parameter, origin, first, second in zip(self._parameters, self._origin, *directions, strict=True):
            parameter.copy_(origin + x * first + y * second)

    def _mean(self) -> float:
        total = weight = 0.0
        for batch in self._batches:
            loss, count = self._task.loss.total(forward(self._task.model, batch), batch, torch.float64)
            total, weight = total + float(loss), weight + count
        return total / weight if weight else float("nan")


def _span(values: Grid, points: int) -> Grid:
    """Evenly spaced points over the path's extent and some more on each side."""
    low, high = float(values.min()), float(values.max())
    beyond = _BEYOND * max(high - low, _LEAST)
    return np.linspace(low - beyond, high + beyond, points)


def _flat(value: Tensor) -> NDArray[np.float64]:
    return value.detach().double().flatten().numpy()


def _like(vector: NDArray[np.float64], parameters: Sequence[Tensor]) -> list[Tensor]:
    """A vector over all parameters, cut into their shapes."""
    pieces = torch.from_numpy(vector).float().split([p.numel() for p in parameters])
    return [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
