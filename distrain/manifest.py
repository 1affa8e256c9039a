"""The manifest of a checkpoint: one JSON file that says what the checkpoint holds, sealed with its own SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distrain import __version__
from distrain.errors import CheckpointError, CheckpointUnreadable

if TYPE_CHECKING:
    from distrain.storage import Place

FORMAT = 1  # of the checkpoint's folder; a reader refuses a newer one
MANIFEST = "manifest.json"

_NON_FINITE = "$float"  # JSON has no infinity: {"$float": "inf"} stands for one


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest as JSON text that holds its own SHA-256, taken over all the rest of it."""
    plain = _to_json({key: value for key, value in manifest.items() if key != "sha256"})
    plain["sha256"] = _sha256(plain)
    return json.dumps(plain, indent=1, allow_nan=False).encode()


def read_manifest(path: Place) -> dict[str, Any]:
    """Return the manifest in a checkpoint's folder.

    Raises CheckpointError where it is missing, unreadable, damaged, or of a newer format.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        is_newer = manifest["format"] > FORMAT
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {path} is no checkpoint, or a damaged one") from None
    except OSError as error:
        raise CheckpointUnreadable(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: not a manifest ({type(error).__name__}: {error})") from error
    if is_newer:
        raise CheckpointError(
            f"{file}: format {manifest['format']}, written by distrain {manifest.get('distrain_version')}; "
            f"this is distrain {__version__}, which reads formats up to {FORMAT}: use a newer one"
        )
    if manifest.pop("sha256", None) != _sha256(_to_json(manifest)):
        raise CheckpointError(f"{file}: damaged: its content does not match its SHA-256")
    return _from_json(manifest)


def _sha256(plain: dict[str, Any]) -> str:
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NON_FINITE: repr(float(value))}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NON_FINITE}:
            return float(value[_NON_FINITE])
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
