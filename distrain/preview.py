"""What a run would be, before anything starts: what `distrain plan` shows. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FilePreview:
    """One Parquet file, from its footer."""

    path: str
    num_rows: int
    num_row_groups: int
    size_bytes: int
    context: str = "training"  # or validation


@dataclass(frozen=True)
class Preview:
    """Data, steps, model, memory and resources of a run. Memory: bytes by use; the sum is the estimate."""

    files: tuple[FilePreview, ...]
    num_rows: int
    num_validation_rows: int
    num_features: int | None  # None: a transform decides, or rows differ in length
    num_outputs: int | None
    batch_size: int
    num_shards: int
    smallest_microbatch: int  # rows
    steps_per_epoch: int
    epochs: int
    total_steps: int  # max_steps taken into account
    num_parameters: int
    num_workers: int
    worker_bytes: Mapping[str, int]  # of one worker: windows, parameters, activations, ...
    server_bytes: Mapping[str, int]  # parameters, gradients, optimizer, ...
    cluster: str  # where: "a local Ray of its own", or an address
    asked: Mapping[str, float]  # Ray's names: CPU, GPU, memory (bytes)
    there: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        values = asdict(self)
        for name in ("worker_bytes", "server_bytes", "asked", "there"):
            values[name] = dict(getattr(self, name))
        return values

    @property
    def lacking(self) -> dict[str, float]:
        """What is asked for beyond what is there, by resource."""
        missing = {name: amount - self.there.get(name, 0.0) for name, amount in self.asked.items()}
        return {name: amount for name, amount in missing.items() if amount > 0}
