"""Any learning-rate schedule of torch.optim.lr_scheduler, after a linear warm-up."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from distrain.config import OptimizerConfig, ScheduleConfig
from distrain.errors import ConfigError
from distrain.learning.keywords import misfits, typed
from distrain.learning.optimizers import check_optimizer, did_you_mean, refusal, refuse, trial

_REFUSED = {
    "LambdaLR": "it needs a Python function",
    "MultiplicativeLR": "it needs a Python function",
    "SequentialLR": "it is made of other schedules",
    "ChainedScheduler": "it is made of other schedules",
    "LRScheduler": "it is the base class",
    "_LRScheduler": "it is the base class",
}

_ENDS = {  # the schedules for a number of updates: the keyword that says it, and what comes beyond
    "CosineAnnealingLR": ("T_max", "the learning rate rises again"),
    "OneCycleLR": ("total_steps", "it has no learning rate, which ends the run"),
    "PolynomialLR": ("total_iters", "the learning rate is 0"),
}


def has_end(config: ScheduleConfig | None) -> bool:
    """Whether a schedule is for a number of updates, and no more."""
    return config is not None and config.name in _ENDS


def what_comes_after(config: ScheduleConfig | None, num_updates: int) -> str:
    """What a person should know of a run with more updates than its schedule is for; empty where it has not. The
    schedule is one that `check_schedule` finds nothing wrong with."""
    if config is None or not has_end(config):
        return ""
    keyword, beyond = _ENDS[str(config.name)]
    options = typed(getattr(lr_scheduler, str(config.name)), config.options)
    length = options.get(keyword) or _default_length(options)
    end = config.warmup_steps + length
    if num_updates <= end:
        return ""
    with_warmup = f", {config.warmup_steps} of them warm-up," if config.warmup_steps else ""
    return (
        f"schedule: {config.name} is for {end:,} updates{with_warmup} and the run has {num_updates:,}: beyond that "
        f"{beyond}; schedule.{keyword}={num_updates - config.warmup_steps} makes it as long as the run"
    )


def _default_length(options: Mapping[str, Any]) -> int:
    """The updates of a one-cycle or polynomial schedule that does not say them in so many words, as torch has it."""
    return options.get("epochs", 1) * options["steps_per_epoch"] if "steps_per_epoch" in options else 5


class Schedule:
    """Moves the learning rate: `step` after each update, `validated` after each validation.

    During `warmup_steps` updates the rate rises linearly to the optimizer's own, then the named schedule begins.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig | None) -> None:
        self._optimizer = optimizer
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._warmup = config.warmup_steps if config is not None else 0
        self._main: Any = _build(optimizer, config) if config is not None else None
        self._started = [group["lr"] for group in optimizer.param_groups]  # as the schedule wants to begin
        self._steps = 0
        self._by_metric = isinstance(self._main, lr_scheduler.ReduceLROnPlateau)
        self._warm_up()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """One update was done."""
        self._steps += 1
        if self._steps <= self._warmup:
            self._warm_up()
        elif self._main is not None and not self._by_metric:
            try:
                self._main.step()
            except (ValueError, ArithmeticError) as error:  # past OneCycleLR's end, a power that overflows
                name = f"torch.optim.lr_scheduler.{type(self._main).__name__}"
                raise ConfigError(f"schedule: {name} has no rate for update {self._steps + 1:,}: {error}") from error

    def validated(self, loss: float) -> None:
        """One validation was done: what ReduceLROnPlateau goes by."""
        if self._by_metric and self._steps > self._warmup:
            self._main.step(loss)

    def _warm_up(self) -> None:
        """Update number n (from 1) uses n / (warmup + 1) of the rate."""
        if self._steps <= self._warmup and self._warmup:
            for group, started in zip(self._optimizer.param_groups, self._started, strict=True):
                group["lr"] = started * min(1.0, (self._steps + 1) / (self._warmup + 1))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        main = None
        if self._main is not None:
            main = {key: value for key, value in self._main.state_dict().items() if _is_plain(value)}
        return {"steps": self._steps, "lr": [group["lr"] for group in self._optimizer.param_groups], "main": main}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, or, where it holds "steps" alone, as after so many updates."""
        if "lr" not in state:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Detected call of `lr_scheduler.step", UserWarning
                )  # no update between
                for _ in range(state["steps"]):
                    self.step()
            return
        self._steps = state["steps"]
        if self._main is not None:
            self._main.__dict__.update(_from_json(self._main, state["main"]))
        for group, lr in zip(self._optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig | None) -> Schedule:
    """The schedule that the configuration names; none keeps the rate constant after the warm-up."""
    return Schedule(optimizer, config)


def schedule_names() -> list[str]:
    """The names that `schedule.name` may take."""
    kinds = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    return sorted(
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, kinds) and name not in _REFUSED
    )


def check_optimization(optimizer: OptimizerConfig | None, schedule: ScheduleConfig | None) -> list[tuple[str, str]]:
    """What is wrong with an optimizer and a schedule: (key, what), nothing where all is well. None is not looked at."""
    problems = [] if optimizer is None else check_optimizer(optimizer)
    return problems + check_schedule(schedule, None if problems else optimizer)


def check_schedule(config: ScheduleConfig | None, optimizer: OptimizerConfig | None = None) -> list[tuple[str, str]]:
    """What is wrong with a schedule's name, keywords and values: (key, what), nothing where all is well. With an
    optimizer, a good one, values of the right type are tried out on it for one update."""
    if config is None:
        return []
    name = config.name
    if name is None:
        return [(f"schedule.{key}", "a keyword of a schedule, but schedule.name names none") for key in config.options]
    if name in _REFUSED:
        return [("schedule.name", f"{name} cannot be used: {_REFUSED[name]}")]
    names = schedule_names()
    if name not in names:
        return [("schedule.name", f"torch.optim.lr_scheduler has no schedule {name!r}{did_you_mean(name, names)}")]
    kind = getattr(lr_scheduler, name)
    signature = inspect.signature(kind).parameters
    known = {*signature, *ScheduleConfig.model_fields} - {"optimizer", "last_epoch"}
    problems = [
        (f"schedule.{key}", f"torch.optim.lr_scheduler.{name} has no such keyword{did_you_mean(key, sorted(known))}")
        for key in config.options
        if key not in known
    ]
    problems += [
        (f"schedule.{key}", f"missing: torch.optim.lr_scheduler.{name} needs it")
        for key, parameter in signature.items()
        if parameter.default is parameter.empty and key != "optimizer" and key not in config.options
    ]
    problems += [(f"schedule.{key}", text) for key, text in misfits(kind, config.options).items() if key in known]
    if name == "OneCycleLR" and not {"total_steps", "steps_per_epoch"} & config.options.keys():
        problems.append(
            ("schedule.total_steps", f"missing: torch.optim.lr_scheduler.{name} needs the number of updates")
        )
    if name == "ReduceLROnPlateau" and config.options.get("mode", "min") != "min":
        problems.append(("schedule.mode", "the schedule goes by the validation loss, of which less is better: min"))
    if optimizer is not None and not problems:
        problems += _try(config, optimizer)
    return problems


def _try(config: ScheduleConfig, optimizer: OptimizerConfig) -> list[tuple[str, str]]:
    """What torch has against a schedule's values, found by one update. Lists have a value for each group: that may be a
    model's whose biases are a group of their own, or that of one without any."""
    found = []
    for names in (("weight", "bias"), ("weight",)):
        tried = trial(optimizer, names)
        try:
            schedule = _make(tried, config)
            tried.step()
            schedule.step(*((1.0,) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else ()))
            return []
        except Exception as error:  # what a value out of bounds raises is torch's own business
            found.append(refusal(f"torch.optim.lr_scheduler.{config.name}", config.options, error))
    return [("schedule", found[0])]


def _build(optimizer: torch.optim.Optimizer, config: ScheduleConfig) -> Any:
    refuse(check_schedule(config))
    if config.name is None:
        return None
    try:
        return _make(optimizer, config)
    except (TypeError, ValueError, ArithmeticError) as error:
        what = refusal(f"torch.optim.lr_scheduler.{config.name}", config.options, error)
        raise ConfigError(f"schedule: {what}") from error


def _make(optimizer: torch.optim.Optimizer, config: ScheduleConfig) -> Any:
    kind = getattr(lr_scheduler, str(config.name))
    return kind(optimizer, **typed(kind, config.options))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str)


def _from_json(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Undo what JSON does to a schedule's state: MultiStepLR counts milestones by integer keys. (Older checkpoints
    may have whole floats.)"""
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        counter = type(scheduler.milestones)
        return {**state, "milestones": counter({int(float(k)): v for k, v in state["milestones"].items()})}
    return state
