"""An NVIDIA GPU (or one of AMD's, which torch calls the same) through torch.cuda: the first of those that this process
may see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from distrain.errors import ClusterError

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context


def cuda_problem() -> str | None:
    """Why this process cannot compute on a GPU; None where it can."""
    if not torch.backends.cuda.is_built():
        return f"its torch {torch.__version__} is a build without CUDA: install one with it on every node that has GPUs"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU it can use: is the driver there?"
    return None


class Cuda:
    """Device cuda:0. Raises ClusterError where it cannot be used."""

    type = "cuda"

    def __init__(self) -> None:
        problem = cuda_problem()
        if problem is not None:
            raise ClusterError(f"a worker that has a GPU cannot compute on it: {problem}")
        self._device = torch.device("cuda", 0)
        torch.cuda.set_device(self._device)
        torch.cuda.init()

    @property
    def compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self._device)

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source, non_blocking=True)

    def bring(self, tensor: Tensor) -> Tensor:
        # torch's allocator of page-locked memory keeps the detour's until the copy is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Tensor:
        fetched = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return fetched.copy_(tensor, non_blocking=True)

    def keep_for(self, stream: Any, tensor: Tensor) -> None:
        tensor.record_stream(stream)

    def page_lock(self, tensor: Tensor) -> bool:
        error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, _PORTABLE)
        if int(error) == 0:
            return True
        with suppress(RuntimeError):  # the next kernel would raise the error that is left behind; this one takes it
            torch.zeros(1, device=self._device)
        return False

    def unlock(self, tensor: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())

    def seed(self, seed: int) -> None:
        torch.cuda.default_generators[0].manual_seed(seed)
