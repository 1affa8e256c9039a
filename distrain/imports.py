"""Finds the user's code, "module:function", from the folder that the command is run in."""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches
from typing import Any

from distrain.errors import ConfigError


def load_object(reference: str, key: str) -> Any:
    """Import what `reference` ("package.module:name") names. `key` is the configuration's key that holds it.

    The current folder is from now on the first that modules are looked up in. Raises ConfigError naming the key when
    module or name is missing; what the module itself raises passes through.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise ConfigError(f'{key}: {reference!r} is not of the form "module:function"')
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise ConfigError(
            f"{key}: there is no module {error.name!r}; it is looked up from the folder the command is run in"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        near = get_close_matches(name, dir(module), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: module {module_name!r} has no {name!r}{hint}") from error
