"""One number that says whether two models are the same to the bit."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch import nn


def parameters_sha256(model: nn.Module) -> str:
    """Return the SHA-256 (hex) over the parameters, then the buffers, in model order, as float32 little-endian bytes.

    A tied parameter counts once; integer buffers (BatchNorm's `num_batches_tracked`) are converted to float32.
    """
    digest = hashlib.sha256()
    for tensor in chain(model.parameters(), model.buffers()):
        flat = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
        digest.update(flat.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
