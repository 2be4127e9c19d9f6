"""What is wrong with a recipe, one line per key: the key, its value, the limit or the nearest name."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from configs.schema import Recipe

Tree = dict[str, Any]


def validation_problems(error: ValidationError, tree: Tree) -> list[str]:
    """One line per key. The members of a union each complain: the most helpful complaint is kept."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _path(item["loc"], tree, missing=item["type"] == "missing")
        if item["type"] == "extra_forbidden":
            line = _unknown(path)
        elif item["type"] == "missing":
            line = f"{path}: is missing; add it"
        elif item["type"] == "value_error":
            line = f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])  # type: ignore[typeddict-item]
        else:
            line = f"{path}: {_short(item['input'])}: {_plain(item['msg'])}"
        if line not in lines.setdefault(path, []):
            lines[path].append(line)
    return [
        "; or ".join([found[0], *(line.removeprefix(f"{path}: ") for line in found[1:])])
        for path, found in lines.items()
        if not any(other.startswith(f"{path}.") for other in lines)  # a union's complaint about the whole
    ]


_WORDS = {
    "a valid tuple": "a list",
    "a valid string": "a text (put it in quotes)",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "Input should": "should",
}


def _plain(message: str) -> str:
    """Pydantic's message in the words of a recipe."""
    message = re.sub("a valid dictionary or instance of [A-Za-z]+", "a section with keys of its own", message)
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def _path(loc: Sequence[str | int], tree: object, *, missing: bool) -> str:
    """The dotted key in the recipe: pydantic's location without the names of union members."""
    path: list[str] = []
    node = tree
    for depth, part in enumerate(loc):
        if isinstance(node, dict) and part in node:
            node = cast(Tree, node)[cast(str, part)]
        elif isinstance(node, list) and isinstance(part, int):
            node = cast(list[object], node)[part]
        elif not (missing and depth == len(loc) - 1):
            continue
        path.append(str(part))
    return ".".join(path)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(path: str) -> str:
    above, _, name = path.rpartition(".")
    prefix = f"{above}." if above else ""
    known = _keys_at(above)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{path}: unknown key; did you mean {prefix}{near[0]}?"
    elsewhere = [key for key in _all_keys(Recipe, "") if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"{path}: unknown key here; did you mean {' or '.join(elsewhere[:3])}?"
    return f"{path}: unknown key; known {f'in {above}' if above else 'at the top'} are {', '.join(known)}"


def _keys_at(path: str) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for part in path.split(".") if path else []:
        if model is not None and not part.isdecimal():
            model = _section(model.model_fields[part].annotation) if part in model.model_fields else None
    return list(model.model_fields) if model else []


def _all_keys(model: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{path}{name}"
        inner = _section(field.annotation)
        if inner is not None and typing.get_origin(field.annotation) is not tuple:
            yield from _all_keys(inner, f"{path}{name}.")


def _section(annotation: object) -> type[BaseModel] | None:
    """The section in an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in typing.get_args(annotation) if (found := _section(inner))), None)


def silently_converted(raw: object, made: object, path: str = "") -> Iterator[str]:
    """A line per value that pydantic turned into another type: `num_steps: yes` would otherwise be 1, `"3"` be 3."""
    if isinstance(raw, Mapping) and isinstance(made, Mapping):
        inner = cast(Mapping[str, object], made)
        for key, value in cast(Mapping[str, object], raw).items():
            if key in inner:
                yield from silently_converted(value, inner[key], f"{path}.{key}" if path else key)
    elif isinstance(raw, list) and isinstance(made, list | tuple):
        for index, (one, other) in enumerate(zip(cast(list[object], raw), cast(Sequence[object], made), strict=False)):
            yield from silently_converted(one, other, f"{path}.{index}")
    elif isinstance(made, bool) != isinstance(raw, bool) or isinstance(made, str) != isinstance(raw, str):
        kind = "true or false" if isinstance(made, bool) else "a text (put it in quotes)"
        yield f"{path}: {_short(cast(object, raw))}: should be {kind if isinstance(made, bool | str) else 'a number'}"
