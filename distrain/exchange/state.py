"""Tensors and plain values in one frame's payload: safetensors, whose tensor `values` is JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_VALUES = "values"


def pack_state(tensors: Mapping[str, Tensor], values: Any) -> bytes:
    """Tensors by name, and JSON-able values, as bytes."""
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return bytes(save({**{f"tensor.{name}": tensor.contiguous() for name, tensor in tensors.items()}, _VALUES: text}))


def unpack_state(payload: Any) -> tuple[dict[str, Tensor], Any]:
    """Undo `pack_state`."""
    found = load(bytes(payload))
    values = json.loads(found.pop(_VALUES).numpy().tobytes())
    return {name.removeprefix("tensor."): tensor for name, tensor in found.items()}, values
