"""YAML with line numbers, overrides, and errors in plain words that say file, line and key."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from distrain.errors import ConfigError

Key = tuple[str | int, ...]


def setting(key: str, value: Any) -> str:
    """The override that gives a dotted key this JSON-able value, whatever its characters: JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


class Unfit(ValueError):
    """Settings that do not go together: (dotted key, what is wrong) for each."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = problems


class Document:
    """Nested values, and where each key stands: in a file's line, or in an override."""

    def __init__(self, values: dict[str, Any], name: str = "", lines: dict[Key, int] | None = None) -> None:
        self.values = values
        self.problems: list[str] = []
        self._name = name
        self._lines = lines or {}
        self._overrides: dict[Key, str] = {}

    def where(self, key: Key) -> str:
        """The prefix of a message about a key: "train.yaml:4: optimizer.lr"."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._overrides:
                return f'override "{self._overrides[key[:length]]}": {dotted(key)}'
        for length in range(len(key), -1, -1):
            if key[:length] in self._lines:
                return f"{self._name}:{self._lines[key[:length]]}: {dotted(key)}".removesuffix(": ")
        return ": ".join(part for part in (self._name, dotted(key)) if part)

    def say(self, key: str, text: str) -> str:
        """A message about a dotted key, with where it stands."""
        return f"{self.where(tuple(key.split('.')))}: {text}"

    def override(self, text: str) -> list[str]:
        """Apply one `dotted.key=value`. Returns the problems."""
        name, equals, value = text.partition("=")
        key: Key = tuple(part for part in name.strip().split("."))
        if not equals or not all(key) or "[" in name:
            return [f'override "{text}": write it as dotted.key=value, such as optimizer.lr=0.01']
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
            return [f'override "{text}": {value!r} is not a YAML value: {_problem(error)}']
        section = self.values
        for part in key[:-1]:
            inner = section.get(str(part))
            # `loss: mse` is short for `loss: {name: mse}`
            inner = {"name": inner} if isinstance(inner, str) else dict(inner) if isinstance(inner, Mapping) else {}
            section[str(part)] = inner
            section = inner
        section[str(key[-1])] = parsed
        self._overrides[key] = text
        if key[-1] == "factory":
            section.pop("name", None)
        return []


def dotted(key: Key) -> str:
    """A key as a person writes it: data.train, model.hidden[1]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(path: str | Path) -> Document:
    """Read a YAML file. Raises ConfigError where it cannot be read or is no mapping."""
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(Path(path).name, _names(Path(path).parent), 1)
        hint = f"; did you mean {Path(path).parent / near[0]}?" if near else ""
        raise ConfigError(f"{name}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {_problem(error)}") from error
    if node is None:
        raise ConfigError(f"{name}: the file is empty; a configuration needs at least data.train and data.label")
    if not isinstance(values, dict):
        raise ConfigError(f"{name}:1: a configuration is a mapping of keys, this is a {type(values).__name__}")
    lines: dict[Key, int] = {}
    problems = list(_walk(node, (), lines, name))
    document = Document(values, name, lines)
    document.problems = problems
    return document


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _problem(error: yaml.YAMLError | ValueError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _walk(node: yaml.Node, key: Key, lines: dict[Key, int], name: str) -> Iterator[str]:
    """Note each key's line; yields a problem for each key that is there twice."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            inner = (*key, str(key_node.value))
            line = key_node.start_mark.line + 1
            if inner in lines:
                yield f"{name}:{line}: {dotted(inner)}: the same key stands in line {lines[inner]} already"
            lines[inner] = line
            yield from _walk(value_node, inner, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            yield from _walk(item, (*key, index), lines, name)


def explain(error: Any, model: Any, document: Document | None = None) -> list[str]:
    """A pydantic ValidationError in plain words: one line for each problem."""
    document = document or Document({})
    grouped: dict[Key, list[dict[str, Any]]] = {}
    lines = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, Unfit):
            lines += [document.say(key, text) for key, text in cause.problems]
            continue
        grouped.setdefault(_key(problem["loc"], model), []).append(problem)
    for key, problems in grouped.items():
        # A union reports each of its members; the most specific one, or all of them at once, says it best.
        deepest = [p for p in problems if p["type"] not in ("string_type", "list_type", "none_required")] or problems
        text = _words(deepest[0], key, model) if len(deepest) == 1 or len(problems) == 1 else _kinds(problems)
        where = document.where(key)
        lines.append(f"{where}: {text}" if where else text)
    return lines


def _key(loc: tuple[Any, ...], model: Any) -> Key:
    """The configuration's key of an error, without the names of union members that pydantic puts in between."""
    key: list[str | int] = []
    current = model
    for part in loc:
        if isinstance(part, int):
            key.append(part)
            continue
        fields = getattr(current, "model_fields", None)
        if fields is None:
            continue
        key.append(part)
        current = _section(fields[part].annotation) if part in fields else None
    return tuple(key)


def _section(annotation: Any) -> Any:
    """The configuration's section that a field holds, if it holds one."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if hasattr(candidate, "model_fields"):
            return candidate
    return None


def _kinds(problems: list[dict[str, Any]]) -> str:
    names = {"string_type": "a text", "list_type": "a list", "int_type": "an integer", "float_type": "a number"}
    kinds = [names[p["type"]] for p in problems if p["type"] in names]
    return f"expected {' or '.join(dict.fromkeys(kinds)) or 'another value'}, got {quoted(problems[0]['input'])}"


def _words(problem: dict[str, Any], key: Key, model: Any) -> str:
    kind, context, got = problem["type"], problem.get("ctx", {}), quoted(problem["input"])
    match kind:
        case "invalid_key":
            return f"a key must be a text, got {got}{_yaml_bool(problem['input'])}"
        case "extra_forbidden":
            return f"no such key{_did_you_mean(key, model)}"
        case "missing":
            return "missing; it has no default"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            expected = context["expected"].replace(" or ", ", ").replace("'", "")
            near = get_close_matches(str(problem["input"]), expected.split(", "), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{got} is not supported; it may be {expected}{hint}"
        case "greater_than":
            return f"must be greater than {context['gt']:g}, got {got}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}, got {got}"
        case "less_than":
            return f"must be less than {context['lt']:g}, got {got}"
        case "finite_number":
            return f"must be a finite number, got {got}"
        case "too_short":
            return "the list is empty"
        case "bool_parsing" | "bool_type":
            return f"expected true or false, got {got}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"expected an integer, got {got}"
        case "float_parsing" | "float_type":
            return f"expected a number, got {got}"
        case "string_type":
            hint = _yaml_bool(problem["input"])
            return f"expected a text, got {got}{hint}"
        case "list_type":
            return f"expected a list, got {got}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a mapping of keys, got {got}"
    return f"{problem['msg']}, got {got}"


def _yaml_bool(value: Any) -> str:
    return "; YAML reads yes, no, on and off as true and false: put quotes around it" if isinstance(value, bool) else ""


def quoted(value: Any) -> str:
    """A value as a message shows it, not too long."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(key: Key, model: Any) -> str:
    current = model
    for part in key[:-1]:
        if current is not None and part in getattr(current, "model_fields", {}):
            current = _section(current.model_fields[part].annotation)
    names = list(getattr(current, "model_fields", {}))
    near = get_close_matches(str(key[-1]), names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
