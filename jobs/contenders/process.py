"""What a contender's process is given."""

from __future__ import annotations

import torch

from distrain.process import keep_freed_memory


def prepare_process(keeps_memory: bool) -> None:
    """One thread, as in distrain's actors; and memory that is kept for the next step, as in those too, if it is to be
    measured with it."""
    torch.set_num_threads(1)
    if keeps_memory:
        keep_freed_memory()
