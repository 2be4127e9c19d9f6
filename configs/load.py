"""Recipes: read from YAML with `key=value` overrides, written back, compared."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.model_stages import ConversationSource, CorpusSource
from configs.problems import Tree, silently_converted, validation_problems
from configs.schema import Recipe

_Source = TypeVar("_Source", CorpusSource, ConversationSource)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file after overrides such as `ppo.num_steps=3`, whose values are YAML too.

    Raises ConfigError: no such file, malformed YAML (with its line), a key that is unknown (the nearest name is
    suggested), missing, of the wrong type, out of its limits, or in contradiction with another.
    """
    tree = _read(Path(path))
    for override in overrides:
        _override(tree, override)
    return make_recipe(tree, str(path))


def make_recipe(tree: Tree, source: str) -> Recipe:
    """The recipe that a tree of plain values describes; `source` is named in errors."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems = validation_problems(error, tree)
    else:
        problems = list(silently_converted(tree, recipe.model_dump()))
        if not problems:
            return recipe
    count = f"{len(problems)} problems:" if len(problems) > 1 else "1 problem:"
    raise ConfigError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe, every default included; `load_recipe` reads it back to an equal one."""
    tree = recipe.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def difference(a: Recipe, b: Recipe) -> list[str]:
    """`key: value in a -> value in b` for every key that differs, in the order of the schema."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    return [
        f"{key}: {left.get(key, '(not set)')} -> {right.get(key, '(not set)')}"
        for key in [*left, *(key for key in right if key not in left)]
        if left.get(key, _ABSENT) != right.get(key, _ABSENT)
    ]


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, whether or not anything is there now, so that it means the same everywhere."""
    return map_paths(recipe, lambda _, path: _absolute(path))


def map_paths(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """The recipe with `change(key, path)` in the place of each path that it names, but for `runs`."""
    prompts = recipe.data.prompts
    sources = (prompts,) if isinstance(prompts, str) else prompts
    found = tuple(change("data.prompts", source) for source in sources)
    text, mirror = recipe.evaluate.text, recipe.checkpoints.mirror
    guidelines, rankings = recipe.desk.guidelines, recipe.reward.rankings
    pretrain, sft = recipe.pretrain, recipe.sft

    def moved(source: _Source, key: str) -> _Source:
        return source.model_copy(update={"path": change(key, source.path)})

    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": change("model.path", recipe.model.path)}),
            "pretrain": pretrain.model_copy(
                update={
                    "sources": tuple(moved(source, "pretrain.sources") for source in pretrain.sources),
                    "tokenizer": pretrain.tokenizer and change("pretrain.tokenizer", pretrain.tokenizer),
                    "cache": pretrain.cache and change("pretrain.cache", pretrain.cache),
                }
            ),
            "sft": sft.model_copy(update={"sources": tuple(moved(source, "sft.sources") for source in sft.sources)}),
            "adapter_from": recipe.adapter_from and change("adapter_from", recipe.adapter_from),
            "data": recipe.data.model_copy(update={"prompts": found[0] if isinstance(prompts, str) else found}),
            "evaluate": recipe.evaluate.model_copy(update={"text": text and change("evaluate.text", text)}),
            "desk": recipe.desk.model_copy(update={"guidelines": guidelines and change("desk.guidelines", guidelines)}),
            "reward": recipe.reward.model_copy(update={"rankings": rankings and change("reward.rankings", rankings)}),
            "checkpoints": recipe.checkpoints.model_copy(
                update={"mirror": mirror and change("checkpoints.mirror", mirror)}
            ),
        }
    )


def is_elsewhere(path: str) -> bool:
    """Whether it is no path: a URL, or the name of a package's or a hub's data."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path))


def _absolute(path: str) -> str:
    """The path as it is seen from the root; a URL or the name of a package's data as it is."""
    return path if not path or is_elsewhere(path) else os.path.abspath(path)


_ABSENT = object()


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict) and tree:
        for key, value in cast(Tree, tree).items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key that stands twice is an error, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: dict[object, int] = {}
        for key_node, _ in node.value:
            key: object = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice, first in line {seen[key]}", problem_mark=key_node.start_mark
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe {path}.{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}. Give a YAML file in UTF-8.") from error
    try:
        tree: object = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(error, str(path))) from error
    if not isinstance(tree, dict):
        kind = "is empty" if tree is None else f"holds a {type(tree).__name__}"
        raise ConfigError(f"The recipe {path} {kind}; it must hold keys such as `name:`, `model:` and `data:`.")
    return cast(Tree, tree)


def _neighbours(path: Path) -> str:
    found = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    names = sorted(str(other) for other in found if not other.name.startswith("."))  # those are other tools'
    near = difflib.get_close_matches(str(path), names, n=1)
    if near:
        return f" Did you mean {near[0]}?"
    return f" There are: {', '.join(names)}." if names else " Give the path of a YAML file."


def _yaml_message(error: yaml.YAMLError, source: str) -> str:
    mark = cast("yaml.Mark | None", getattr(error, "problem_mark", None))
    problem = cast(str, getattr(error, "problem", None) or str(error))
    if mark is None:
        return f"{source} is not YAML: {problem}."
    return f"{source} is not a valid recipe, line {mark.line + 1}, column {mark.column + 1}: {problem}."


def _override(tree: Tree, override: str) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"The override {override!r} is not of the form key=value, such as ppo.num_steps=3.")
    try:
        value: object = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is not YAML: {error}") from error
    node: Any = tree
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        key: Any = part
        if isinstance(node, list):
            items = cast(list[Any], node)
            if not part.isdecimal() or int(part) >= len(items):
                raise ConfigError(f"The override {override!r}: {above} is a list of {len(items)}; count from 0.")
            key = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(
                f"The override {override!r}: {above} is {node!r}, which has no keys; override {above} as a whole."
            )
        branch = cast(Any, node)
        if depth == len(parts) - 1:
            branch[key] = value
        elif isinstance(node, dict) and branch.get(key) is None:
            branch[key] = {}  # a section that the file leaves out
            node = branch[key]
        else:
            node = branch[key]
