"""Rule rewards: numbers from the text of an answer alone, composed with weights, extended by dotted path.

A rule is a function `(prompt, answer, **params) -> float`. Those of this file return a number in [0, 1], 1 for the
best; an answer without a single letter or digit gets the worst of each, so that saying nothing never wins.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import math
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError

from configs.schema import RuleConfig
from rlhf.errors import RecipeError, ScoreError
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.words import content_words, words

RuleFunction = Callable[..., float]
OnBadScore = Literal["stop", "retry", "drop"]
TRIES = 3  # of `retry`
REGISTRY: dict[str, RuleFunction] = {}


def rule(name: str) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a rule of the house: in [0, 1], and never asked about an answer without words."""

    def register(function: RuleFunction) -> RuleFunction:
        assert name not in REGISTRY, f"two rules named {name}"
        REGISTRY[name] = function
        return function

    return register


@rule("complete")
def complete(prompt: Prompt, answer: Answer) -> float:
    """1 if the answer ended by itself, 0 if it was cut."""
    return float(answer.ended == "eos")


@rule("short")
def short(prompt: Prompt, answer: Answer, target: Annotated[int, Field(gt=0)] = 40) -> float:
    """1 / (1 + (words / target)²): ½ at `target` words, above it for fewer, and never flat."""
    return 1.0 / (1.0 + (len(words(answer.text)) / target) ** 2)


@rule("on_question")
def on_question(prompt: Prompt, answer: Answer, enough: Annotated[float, Field(gt=0, le=1)] = 0.5) -> float:
    """How much of the question's content words the answer takes up, times how much of the answer is new.

    Taking up the share `enough` of the question's words counts as all of them; an answer is new if half of its content
    words are not the question's. So a copy of the question gets 0. A question without content words asks for newness
    only.
    """
    asked, said = content_words(prompt.text), content_words(answer.text)
    if not said:
        return 0.0
    new = min(1.0, 2.0 * len(said - asked) / len(said))
    taken_up = min(1.0, len(said & asked) / (enough * len(asked))) if asked else 1.0
    return taken_up * new


@rule("not_repetitive")
def not_repetitive(prompt: Prompt, answer: Answer, n: Annotated[int, Field(gt=0)] = 3) -> float:
    """1 less the share of n-grams of words, or of lines, that were there before: the worse of the two."""
    said = words(answer.text)
    ngrams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    lines = [line.strip().lower() for line in answer.text.splitlines() if line.strip()]
    return min(_distinct(ngrams), _distinct(lines))


@rule("matches")
def matches(prompt: Prompt, answer: Answer, pattern: re.Pattern[str]) -> float:
    """1 if the regular expression is found anywhere in the answer."""
    return float(pattern.search(answer.text) is not None)


@rule("contains")
def contains(prompt: Prompt, answer: Answer, text: str = "", field: str = "") -> float:
    """1 if the answer contains `text`, or else what the prompt's row has in `field`; upper and lower case are one.

    Raises KeyError for a row without that field.
    """
    wanted = text or prompt.extra[field]
    return float(wanted.strip().lower() in answer.text.lower())


@rule("max_words")
def max_words(prompt: Prompt, answer: Answer, limit: Annotated[int, Field(gt=0)]) -> float:
    """1 up to `limit` words; beyond, limit / words."""
    return min(1.0, limit / max(1, len(words(answer.text))))


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule with its weight and its parameters, checked."""

    name: str
    weight: float
    function: RuleFunction
    params: dict[str, Any]
    ours: bool  # of the registry: in [0, 1], and not asked about an answer without words

    def __call__(self, prompt: Prompt, answer: Answer) -> float:
        """The rule's number. Raises whatever the rule raises, and ValueError for one that is no finite number."""
        if self.ours and not words(answer.text):
            return 0.0 if self.weight >= 0 else 1.0
        value = float(self.function(prompt, answer, **self.params))
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}")
        return value


def bind_rule(config: RuleConfig) -> BoundRule:
    """The rule that a recipe names. Raises RecipeError: an unknown name, a path without one, wrong parameters."""
    ours = config.name in REGISTRY
    function = REGISTRY[config.name] if ours else _imported(config.name)
    return BoundRule(config.name, config.weight, function, _checked_params(config, function), ours)


class RuleScorer:
    """Scores by rules: Σ weight · rule / Σ |weight|, so in [-1, 1], and in [0, 1] where no weight is below 0.

    (A rule by dotted path may have another range.) A rule that raises, or returns no finite number, stops the run with
    ScoreError, is tried again, or makes the score NaN, by `on_bad_score`.
    """

    name = "rules"

    def __init__(self, rules: Sequence[RuleConfig], on_bad_score: OnBadScore = "stop") -> None:
        self._rules = [bind_rule(config) for config in rules]
        self._on_bad_score = on_bad_score
        self._total = sum(abs(rule.weight) for rule in self._rules)
        if self._total == 0:
            raise RecipeError(
                f"rules: there are {len(rules)} rules and all their weights are 0.", remedy="Give one a weight above 0."
            )

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] float32; NaN where a rule failed and the recipe says drop."""
        pairs = [(group.prompt, answer) for group in groups for answer in group.answers]
        return torch.tensor([self._score(prompt, answer) for prompt, answer in pairs], dtype=torch.float32)

    def parts(self, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """What each rule gives one answer, before weighting: for tables and for finding out why."""
        return {rule.name: self._value(rule, prompt, answer) for rule in self._rules}

    def _score(self, prompt: Prompt, answer: Answer) -> float:
        return sum(rule.weight * self._value(rule, prompt, answer) for rule in self._rules) / self._total

    def _value(self, rule: BoundRule, prompt: Prompt, answer: Answer) -> float:
        for left in reversed(range(TRIES if self._on_bad_score == "retry" else 1)):
            try:
                return rule(prompt, answer)
            except Exception as error:  # a rule is the user's program: it may raise anything
                if left == 0 and self._on_bad_score != "drop":
                    raise ScoreError(
                        f"The rule {rule.name!r} failed on an answer to prompt {prompt.id} ({prompt.text[:60]!r}): "
                        f"{type(error).__name__}: {error}.",
                        remedy="Mend the rule, or set on_bad_score=drop to leave such groups out.",
                    ) from error
        return math.nan


def _distinct(items: Sequence[object]) -> float:
    return len(Counter(items)) / len(items) if items else 1.0


def _imported(path: str) -> RuleFunction:
    """The function at `package.module.function` or `package.module:function`; the working folder is looked at too."""
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        near = difflib.get_close_matches(path, REGISTRY, n=1)
        raise RecipeError(
            f"There is no rule {path!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
            limit=f"There are {', '.join(sorted(REGISTRY))}.",
            remedy="A rule of your own is named by its path, such as my_module.my_rule.",
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function: Any = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's module may raise anything
        raise RecipeError(
            f"The rule {path!r} cannot be imported: {type(error).__name__}: {error}.",
            remedy=f"Put {module_name.replace('.', '/')}.py into {here} or install its package.",
        ) from error
    if not callable(function):
        raise RecipeError(f"The rule {path!r} is a {type(function).__name__}.", remedy="Name a function.")
    return typing.cast(RuleFunction, function)


def _checked_params(config: RuleConfig, function: RuleFunction) -> dict[str, Any]:
    """The parameters, each turned into the type that the function's annotation asks for."""
    try:
        inspect.signature(function).bind(None, None, **config.params)
    except TypeError as error:
        raise RecipeError(
            f"The rule {config.name!r} does not take params={config.params}: {error}.",
            limit=f"It takes {_signature(function)}.",
        ) from error
    params = dict(config.params)
    for name, adapter in _adapters(function).items():
        if name not in params:
            continue
        value = params[name]
        try:
            params[name] = adapter.validate_python(value)
        except ValidationError as error:
            raise RecipeError(
                f"The rule {config.name!r}: {name}={value!r}: {error.errors()[0]['msg']}.",
                limit=f"It takes {_signature(function)}.",
            ) from error
    return params


def _adapters(function: RuleFunction) -> dict[str, TypeAdapter[Any]]:
    """A checker for each parameter whose annotation can be checked."""
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name in list(inspect.signature(function).parameters)[2:]:
        with contextlib.suppress(NameError, KeyError, PydanticUserError):  # an annotation of the user's own kind
            adapters[name] = TypeAdapter(typing.get_type_hints(function, include_extras=True)[name])
    return adapters


def _signature(function: RuleFunction) -> str:
    parameters = list(inspect.signature(function).parameters.values())[2:]
    return ", ".join(str(parameter) for parameter in parameters) or "no parameters"
