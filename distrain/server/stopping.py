"""When a run may end early: no better validation for a while, or nothing left to gain. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from distrain.config import ConvergenceConfig, EarlyStoppingConfig, TargetConfig

HIGHER_IS_BETTER = frozenset({"accuracy", "r2"})


def better(metric: str, value: float, than: float | None, by: float = 0.0) -> bool:
    """Whether `value` of a validation metric beats `than` by more than `by`. Any number beats None, NaN nothing."""
    if than is None:
        return not math.isnan(value)
    return value > than + by if metric in HIGHER_IS_BETTER else value < than - by


def best_metric(early: EarlyStoppingConfig | None) -> str:
    """The validation metric that tells which of a run's checkpoints is the best."""
    return early.metric if early is not None else "loss"


def reached(target: TargetConfig, metrics: Mapping[str, float]) -> bool:
    """Whether validation is good enough."""
    value = metrics.get(target.metric, math.nan)  # there is no R^2 of a constant label
    return value >= target.value if target.metric in HIGHER_IS_BETTER else value <= target.value


class Stopping:
    """Watches losses, gradient norms and validations, and says why to stop.

    A target ends the run at the first validation that reaches it. Convergence (`loss_change`, `grad_norm`) looks at
    means over `window` steps; early stopping at `patience` validations in a row that did not improve the metric by
    `min_delta`. `is_best` says whether the last validation was the best so far, by however little. `ended` is why the
    run was ended, if it was: going on by the same rules, it is over.
    """

    def __init__(
        self,
        early: EarlyStoppingConfig | None,
        convergence: ConvergenceConfig | None,
        target: TargetConfig | None = None,
    ) -> None:
        self._early = early
        self._target = target
        self._convergence = convergence
        rules = {"early_stopping": early, "convergence": convergence, "target": target}
        self._rules = {name: rule.model_dump(mode="json") for name, rule in rules.items() if rule is not None}
        window = convergence.window if convergence is not None else 1
        self._losses: deque[float] = deque(maxlen=2 * window)
        self._norms: deque[float] = deque(maxlen=window)
        self._metric = best_metric(early)
        self._top: float | None = None  # the best value
        self.is_best = False
        self._best: float | None = None  # the last that counted as better
        self._stale = 0
        self.ended: str | None = None

    def stepped(self, loss: float, grad_norm: float) -> str | None:
        """Take one step's loss and gradient norm. Returns the reason to stop, if there is one."""
        return self._end(self._converged(loss, grad_norm))

    def validated(self, metrics: dict[str, float]) -> str | None:
        """Take one validation's metrics. Returns the reason to stop, if there is one."""
        value = metrics.get(self._metric, math.nan)
        self.is_best = better(self._metric, value, self._top)
        if self.is_best:
            self._top = value
        return self._end(self._at_target(metrics) or self._stalled(value))

    def _end(self, why: str | None) -> str | None:
        self.ended = why or self.ended
        return why

    def _converged(self, loss: float, grad_norm: float) -> str | None:
        rule = self._convergence
        if rule is None:
            return None
        self._losses.append(loss)
        self._norms.append(grad_norm)
        if rule.grad_norm is not None and len(self._norms) == rule.window:
            norm = sum(self._norms) / rule.window
            if norm < rule.grad_norm:
                return f"converged: the gradient norm, {norm:.3g} on average, is below {rule.grad_norm:g}"
        if rule.loss_change is not None and len(self._losses) == 2 * rule.window:
            losses = list(self._losses)
            change = abs(sum(losses[: rule.window]) - sum(losses[rule.window :])) / rule.window
            if change < rule.loss_change:
                return (
                    f"converged: the loss changed by {change:.3g} from one {rule.window} steps to the next, "
                    f"less than {rule.loss_change:g}"
                )
        return None

    def _at_target(self, metrics: Mapping[str, float]) -> str | None:
        if self._target is None or not reached(self._target, metrics):
            return None
        name = self._target.metric
        return f"validation {name} {metrics[name]:.6g} reached the target, {self._target.value:g}"

    def _stalled(self, value: float) -> str | None:
        rule = self._early
        if rule is None:
            return None
        if better(rule.metric, value, self._best, rule.min_delta):
            self._best, self._stale = value, 0
            return None
        self._stale += 1
        if self._stale < rule.patience:
            return None
        than = f"than {self._best:.6g}" if self._best is not None else "than none"
        return f"no better validation {rule.metric} {than} in {self._stale} validations"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here; JSON-able."""
        return {
            "losses": list(self._losses), "norms": list(self._norms),
            "best": self._best, "stale": self._stale, "top": self._top, "metric": self._metric,
            "ended": self.ended, "rules": self._rules,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. By other rules than then, a run that was ended is not over."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        if state.get("metric", self._metric) == self._metric:
            self._best, self._stale, self._top = state["best"], state["stale"], state.get("top")
        if state.get("rules") == self._rules:
            self.ended = state.get("ended")
