"""A context on fakes, with a real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Prompts
from rlhf.stages.context import Context
from rlhf.store import RunStore
from tests.fakes import FakeTeam, ListTracker, SilentConsole, WordChat, prompt
from tests.recipes import merged, tiny_recipe

BASE: dict[str, Any] = {
    "rules": [{"name": "tests.rlhf.stages.scores.threes"}],
    "sampling": {"n": 10, "max_answer_tokens": 6},
    "sample": {"num_prompts": 8, "prompts_per_request": 3},
    "ppo": {"num_steps": 6, "num_prompts": 4, "score": "rules", "save_every": 1, "kl": {"beta": 0.01}},
    "evaluate": {"num_prompts": 6, "bootstrap": 200},
}

MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path) -> Iterator[MakeContext]:
    stores: list[RunStore] = []

    def make(name: str = "run", accept: Sequence[str] = (), **changes: Any) -> Context:
        recipe = tiny_recipe("no-model", tmp_path, name=name, **merged(BASE, changes))
        for store in stores:
            store.close()
        console = SilentConsole()
        store = RunStore.open(recipe.runs, recipe, console.warn, accept=accept)
        stores.append(store)
        store.take_change()
        prompts = Prompts(
            tuple(prompt(f"p{i}") for i in range(12)), tuple(prompt(f"held{i}", length=2) for i in range(6))
        )
        return Context(recipe, FakeTeam(), store, WordChat(), prompts, ListTracker(store), console)  # type: ignore[arg-type]

    yield make
    for store in stores:
        store.close()
