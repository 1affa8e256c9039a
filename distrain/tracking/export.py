"""The model as a file that needs no code of its own: torch.export's graph, without pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain.tracking.description import ModelInput

PROGRAM, INPUTS = "program.pt2", "inputs.json"


class ExportFailed(Exception):
    """torch.export does not understand the model. The message is its first line."""


def export_model(module: nn.Module, inputs: Sequence[ModelInput], folder: Path) -> Tensor:
    """Write PROGRAM and INPUTS into `folder`. Returns the outputs for the examples, [rows, ...].

    The graph is that of evaluation mode, for any number of rows, and any length of ragged ones. `module` is left in the
    mode it was in.

    Raises ExportFailed.
    """
    examples = {i.name: _large_enough(i) for i in inputs}
    rows, width = torch.export.Dim("rows"), torch.export.Dim("width")
    shapes = {i.name: {0: rows, 1: width} if i.form in ("ragged", "mask") else {0: rows} for i in inputs}
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if list(examples) == ["features"]:
                program = torch.export.export(module, (examples["features"],), dynamic_shapes=(shapes["features"],))
                outputs = module(examples["features"])
            else:
                program = torch.export.export(module, (), examples, dynamic_shapes=shapes)
                outputs = module(**examples)
            if not isinstance(outputs, Tensor):
                raise TypeError(f"the model returns a {type(outputs).__name__}, not one tensor")
            program.example_inputs = None  # they alone would be stored as a pickle
            torch.export.save(program, folder / PROGRAM)
    except Exception as error:  # it raises what it likes, errors of the user's code included
        reason = str(error).strip().splitlines() or [""]
        raise ExportFailed(f"{type(error).__name__}: {reason[0]}") from error
    finally:
        module.train(was_training)
    described = [
        {
            "name": i.name,
            "columns": [name for name, _ in i.columns] or [i.name],
            "dtype": str(i.example.dtype).removeprefix("torch."),
            "shape": list(i.example.shape[1:]),
            "form": i.form,
        }
        for i in inputs
    ]
    (folder / INPUTS).write_text(json.dumps(described))
    return outputs[: max(len(i.example) for i in inputs)]


def _large_enough(model_input: ModelInput) -> Tensor:
    """The example with two rows at least, and two values in ragged ones: torch.export takes a size of one for a
    constant."""
    example = model_input.example
    if len(example) < 2:
        example = torch.cat([example, example])
    if model_input.form in ("ragged", "mask") and example.shape[1] < 2:
        example = torch.cat([example, torch.zeros_like(example)], 1)
    return example
