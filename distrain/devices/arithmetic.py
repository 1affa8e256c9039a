"""What a worker computes with: mixed precision (Micikevicius et al. 2018, "Mixed Precision Training"), deterministic
kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.learning.models import forward

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """`precision` of the forward and backward pass: fp32, bf16 or fp16. Parameters, gradients, loss and update are
    float32 in each. `deterministic`: only kernels that give the same bits each time."""

    precision: str = "fp32"
    deterministic: bool = False

    def prepare_process(self) -> None:
        """Choose this process's kernels. Has to come before it uses a GPU."""
        if not self.deterministic:
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], device_type: str) -> Tensor:
        """The model's outputs. In less than fp32 the model runs under torch.autocast, and the loss, which comes after
        it, gets float32: sums over rows and logarithms would lose too much in 8 or 11 bits."""
        low = _LOW.get(self.precision)
        if low is None:
            return forward(model, batch)
        with torch.autocast(device_type, dtype=low):
            outputs = forward(model, batch)
        return outputs.float()
