"""Microbatches that are left out, since their loss or gradient is not finite: counted, and capped. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distrain.errors import DivergenceError
from distrain.server.agenda import Microbatch


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was left out."""

    microbatches: int = 0
    rows: int = 0


class Skipping:
    """Adds up what a run leaves out. `most` microbatches may be; `num_rows_of` says how many rows one has."""

    def __init__(self, most: int, num_rows_of: Callable[[int, int], int], tell: Callable[[str, str], None]) -> None:
        self._most, self._num_rows_of, self._tell = most, num_rows_of, tell
        self.total = Skipped()

    def leave_out(self, skipped: Mapping[Microbatch, str]) -> Skipped:
        """An update went on without these; each comes with why. Returns their number and rows.

        Raises DivergenceError once it is too many over the whole run.
        """
        rows = sum(self._num_rows_of(*microbatch) for microbatch in skipped)
        for microbatch in sorted(skipped):
            self.total = Skipped(self.total.microbatches + 1, self.total.rows + self._num_rows_of(*microbatch))
            if self.total.microbatches > self._most:
                raise DivergenceError(
                    f"{skipped[microbatch]}; its microbatch was left out, as {self._most} before it, and max_skipped "
                    f"is {self._most}. Try a lower optimizer.lr, or clip: {{norm: 1.0}}, or look at the rows"
                )
            self._tell("skipped", f"{skipped[microbatch]}; its microbatch is skipped")
        return Skipped(len(skipped), rows)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self.total)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = Skipped(**state)
