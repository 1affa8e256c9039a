"""distrain: data-parallel training of PyTorch models straight from Parquet, on any Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Result", "TrainConfig", "Trainer", "__version__"]

if TYPE_CHECKING:
    from distrain.config import TrainConfig
    from distrain.trainer import Result, Trainer

_HOME = {"Trainer": "distrain.trainer", "Result": "distrain.trainer", "TrainConfig": "distrain.config"}


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the worker imports neither Ray nor MLflow.
    if name not in _HOME:
        raise AttributeError(f"module 'distrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
