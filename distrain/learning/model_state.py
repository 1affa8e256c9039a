"""A model's weights as tensors of their own, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrain.errors import CheckpointError, TrainingError

TRANSIENT = "buffer."  # how the names of the buffers begin that a checkpoint holds beside the model


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


def transient_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the model's `state_dict` leaves out: those with `persistent=False`."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint into the model, in place, so that views into shared memory stay views.

    `beside` is what it holds beside the model; of that, the buffers whose names begin with `TRANSIENT` are taken. Of
    those that `state_dict` leaves out, the ones that are not in the checkpoint stay as they were built.

    Raises CheckpointError where names or shapes differ, naming each.
    """
    own, transient = model.state_dict(), transient_buffers(model)
    changed = {n.removeprefix(TRANSIENT): tensor for n, tensor in beside.items() if n.startswith(TRANSIENT)}
    saved = {**tensors, **changed}
    problems = [f"{name}: not in the checkpoint" for name in own if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in own and name not in transient]
    problems += [
        f"{name}: {list(saved[name].shape)} in the checkpoint, {list(value.shape)} in the model"
        for name, value in (own | transient).items()
        if name in saved and saved[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n" + "\n".join(f"  {line}" for line in problems))
    model.load_state_dict({name: saved[name] for name in own})
    for name, buffer in transient.items():
        if name in saved:
            buffer.copy_(saved[name])
