"""What every contender's process is given, so that none is slower for the lack of it."""

from __future__ import annotations

import torch

from distrain.process import keep_freed_memory


def prepare_process() -> None:
    """One thread, and memory that is kept for the next step, as in distrain's actors."""
    torch.set_num_threads(1)
    keep_freed_memory()
