"""The loss scale of fp16 training: one for all microbatches of a step. Pure.

Gradients below fp16's smallest number, 6e-8, would become 0, so the loss is multiplied by a power of two before it is
differentiated, and gradients divided by it in float32 (Micikevicius et al. 2018, "Mixed Precision Training", section
3.2). The power follows what fp16's largest number, 65504, leaves room for: halved when a gradient overflows, whose
update is then left out, doubled after `growth_steps` updates that went well.
"""

from __future__ import annotations

import math
from typing import Any

_OF_MEAN_LOSS = 2.0**16  # what torch.amp.GradScaler begins with, too
_MOST = 2.0**24
_MOST_HALVINGS = 24  # below the first scale; a gradient that still is not finite would not be so in fp32


def first_scale(rows: int) -> float:
    """The scale to begin with where the loss is the sum over a forward pass of so many rows, and not their mean."""
    return _OF_MEAN_LOSS / 2.0 ** int(math.log2(rows))


class LossScale:
    """The scale, update by update.

    A step's scale is that after the update whose parameters it reads, which may be `staleness` updates back: a run that
    was resumed then computes the same as one that was not.
    """

    def __init__(self, first: float, staleness: int = 0, growth_steps: int = 2000) -> None:
        self._least = first / 2.0**_MOST_HALVINGS
        self._most = max(first, _MOST)
        self._staleness, self._growth_steps = staleness, growth_steps
        self._now = first
        self._good_steps = 0  # updates at the present scale since it changed
        self._after: dict[int, float] = {0: first}  # of the last `staleness` + 1 updates

    @property
    def now(self) -> float:
        return self._now

    def after(self, step: int) -> float:
        """The scale of a step that reads the parameters after update `step`."""
        return self._after.get(step, self._now)

    def applied(self, step: int, used: float) -> None:
        """Update `step` went well, with this scale."""
        self._good_steps += used == self._now
        if self._good_steps >= self._growth_steps:
            self._now, self._good_steps = min(2.0 * self._now, self._most), 0
        self._keep(step)

    def overflowed(self, step: int, used: float) -> bool:
        """The gradient of update `step` was not finite, with this scale. Returns whether a smaller one is left."""
        if used / 2.0 < self._least:
            return False
        self._now, self._good_steps = min(self._now, used / 2.0), 0
        self._keep(step)
        return True

    def skipped(self, step: int) -> None:
        """Update `step` was left out, whatever the scale."""
        self._keep(step)

    def _keep(self, step: int) -> None:
        self._after[step] = self._now
        self._after = {kept: scale for kept, scale in self._after.items() if kept >= step - self._staleness}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here; JSON-able."""
        return {"now": self._now, "good_steps": self._good_steps, "after": sorted(self._after.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now, self._good_steps = state["now"], state["good_steps"]
        self._after = {int(step): scale for step, scale in state["after"]}
