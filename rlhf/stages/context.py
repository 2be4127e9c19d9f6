"""What a stage is given."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.data import Prompts
from rlhf.ports import Console, Team, Tracker
from rlhf.records import Sampling
from rlhf.store import RunStore


@dataclass(frozen=True, slots=True)
class Context:
    """A run as a stage sees it."""

    recipe: Recipe
    team: Team
    store: RunStore
    chat: ChatTokenizer
    prompts: Prompts
    tracker: Tracker
    console: Console

    @property
    def sampling(self) -> Sampling:
        """How training answers are drawn."""
        drawn = self.recipe.sampling
        return Sampling(drawn.n, drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_answer_tokens)

    @property
    def greedy(self) -> Sampling:
        """The one most likely answer, token by token."""
        return Sampling(n=1, temperature=0.0, max_answer_tokens=self.recipe.sampling.max_answer_tokens)
