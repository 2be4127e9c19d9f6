"""What a stage is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.data import Prompts
from rlhf.errors import StoreError
from rlhf.ports import Console, Team, Tracker
from rlhf.records import RoleState, Sampling
from rlhf.store import RunStore


class StageLeft(Exception):
    """A stage was asked to leave, and left between two steps with everything committed. Run again, it goes on."""


def stay() -> bool:
    """False: nobody asks the stage to leave."""
    return False


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
    round: int = 0  # of `rounds`: each has answers, rankings, a reward model and steps of PPO of its own
    is_to_leave: Callable[[], bool] = stay  # asked between two steps; then the stage commits and raises StageLeft

    @property
    def ppo_steps(self) -> range:
        """The steps of PPO that the round does; they are counted through all rounds."""
        num = self.recipe.ppo.num_steps
        return range(self.round * num, (self.round + 1) * num)

    def load_reward(self, asked_by: str) -> RoleState:
        """The reward model's state, which the role has taken up. Raises StoreError where the run has none yet."""
        state = self.store.load_role("reward")
        if state is None:
            raise StoreError(
                f"{asked_by} asks for the reward model, and the run has none.",
                remedy="Run the stages `sample`, `rank` and `reward` first, or use rules.",
            )
        self.team.reward.load_state(state)
        return state

    @property
    def continues(self) -> bool:
        """Whether PPO goes on with an adapter, which then is its reference, instead of starting from the base."""
        return self.recipe.adapter_from is not None

    @property
    def sampling(self) -> Sampling:
        """How training answers are drawn."""
        drawn = self.recipe.sampling
        return Sampling(drawn.n, drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_answer_tokens)

    @property
    def greedy(self) -> Sampling:
        """The one most likely answer, token by token."""
        return Sampling(n=1, temperature=0.0, max_answer_tokens=self.recipe.sampling.max_answer_tokens)
