"""A model's weights as tensors of their own, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrain.errors import CheckpointError, TrainingError


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors of any shape and dtype, each to contiguous memory of its own.

    So parameters that are views into one buffer, or tied to each other, are each written out in full, and any reader of
    safetensors finds all of them.
    """
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's `state_dict` (parameters and persistent buffers).

    Raises TrainingError where the state holds something that is not a tensor (a module's `get_extra_state`).
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TrainingError(
                f"the model's state holds {name}, a {type(value).__name__}: only tensors can be written to a checkpoint"
            )
    return dict(state)


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint into the model, in place, so that views into shared memory stay views.

    Raises CheckpointError where names or shapes differ, naming each.
    """
    own = model.state_dict()
    problems = [f"{name}: not in the checkpoint" for name in own if name not in tensors]
    problems += [f"{name}: not in the model" for name in tensors if name not in own]
    problems += [
        f"{name}: {list(tensors[name].shape)} in the checkpoint, {list(value.shape)} in the model"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n" + "\n".join(f"  {line}" for line in problems))
    model.load_state_dict(dict(tensors))
