"""The computational graph of a job: its model and loss on the first rows that it trains on."""

from __future__ import annotations

from distrain.config import TrainConfig
from distrain.learning.task import build_task
from distrain.preparation import prepare
from distrain.study.graph import Graph, trace
from distrain.worker import Readers


def job_graph(config: TrainConfig, backward: bool = False) -> Graph:
    """Trace the configuration's model and loss. Raises what preparing a run and `trace` raise."""
    preparation = prepare(config)
    readers = Readers(preparation.train)
    try:
        batch = readers.microbatch(0, 0, 0)
    finally:
        readers.close()
    return trace(build_task(preparation.task), batch, backward)
