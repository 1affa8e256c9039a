"""What is wrong with a training, told from its layers, in plain words and with what to try. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrain.records import LayerLook

_VANISHED = 1e-4  # a layer's gradient over the largest of all layers, by root mean square of their entries
_EXPLODED = 100.0  # a layer's gradient norm over its weights' norm
_MOVED = 0.1  # an update over the weights: 0.001 is usual
_REPLACED = 1.0  # beyond this one look is enough
_DEAD = 0.5  # share of a layer's units
_SETTLED_STEP = 10  # before this, adaptive optimizers take large steps
_LOOKS = 3  # in a row


class Symptoms:
    """Remembers what it has said: each thing once for each layer."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._streaks: dict[str, int] = {}

    def notice(self, step: int, looks: Sequence[LayerLook], lr: float) -> list[str]:
        """Take in the layers at update `step`. Returns what is new, a warning for each kind of trouble."""
        if not looks:
            return []
        sizes = {look.name: look.grad_norm / look.num_parameters**0.5 for look in looks}
        largest = max(sizes, key=sizes.__getitem__, default="")
        found: dict[str, list[LayerLook]] = {"vanishing": [], "exploding": [], "dead": [], "rate": []}
        for look in looks:
            ratio = look.update_ratio or 0.0
            signs = {
                "vanishing": sizes[look.name] < _VANISHED * sizes[largest],
                "exploding": look.weight_norm > 0 and look.grad_norm > _EXPLODED * look.weight_norm,
                "dead": (look.dead_share or 0.0) > _DEAD,
                "rate": ratio > _MOVED and (step >= _SETTLED_STEP or ratio > _REPLACED),
            }
            for kind, shows in signs.items():
                key = f"{kind} {look.name}"
                self._streaks[key] = self._streaks.get(key, 0) + 1 if shows else 0
                is_sure = self._streaks[key] >= _LOOKS or (kind == "rate" and ratio > _REPLACED)
                if shows and is_sure and key not in self._said:
                    self._said.add(key)
                    found[kind].append(look)
        warnings = {
            "vanishing": lambda some: (
                f"gradients vanish in {_names(some)}: of {_name(some[0])}, an entry is "
                f"{sizes[some[0].name] / sizes[largest]:.1g} times one of layer {largest}. Try model.activation: relu, "
                "model.initialization: he_normal, model.normalization, or fewer layers"
            ),
            "exploding": lambda some: (
                f"gradients explode in {_names(some)}: that of {_name(some[0])} has the norm {some[0].grad_norm:.2g}, "
                f"its weights {some[0].weight_norm:.2g}. Try clip: {{norm: 1.0}}, a lower optimizer.lr, or "
                "data.standardize: true"
            ),
            "dead": lambda some: (
                f"dead units in {_names(some)}: of {_name(some[0])}, {some[0].dead_share or 0:.0%} of the units are 0, "
                "or where else their activation is flat, for every row of a step, and learn nothing. Try a lower "
                "optimizer.lr, model.activation: leaky_relu, "
                "or model.initialization: he_normal"
            ),
            "rate": lambda some: (
                f"the learning rate, {lr:g}, is too high for {_names(some)}: an update moves the weights of "
                f"{_name(some[0])} by {some[0].update_ratio or 0:.2g} of their norm, where 0.001 is usual and 0.1 a "
                f"lot. Try optimizer.lr: {lr * 0.01 / (some[0].update_ratio or 1):.0e}, or a warm-up"
            ),
        }
        return [warnings[kind](some) for kind, some in found.items() if some]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"said": sorted(self._said), "streaks": {key: n for key, n in self._streaks.items() if n}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._said, self._streaks = set(state.get("said", [])), dict(state.get("streaks", {}))


def _name(look: LayerLook) -> str:
    return f"layer {look.name} ({look.kind})"


def _names(looks: Sequence[LayerLook]) -> str:
    names = ", ".join(look.name for look in looks)
    return f"layer {names}" if len(looks) == 1 else f"layers {names}"
