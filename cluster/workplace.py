"""Where the workers of a run are: one Ray, from when it is first needed until the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cluster.placement import Resources
from configs.schema import Recipe
from rlhf.ports import Console, Team

if TYPE_CHECKING:
    from cluster.ray_session import RaySession
    from rlhf.stages.model_context import Crew


class Workplace:
    """The one Ray of a run, which ends with the stack. Where its logs are is said if that fails.

    One for all stages, and no more than one for a process if it can be: a process that had shut several down was seen
    to be aborted, minutes later, in a thread that it had from an earlier one (Ray 2.60, a mutex that was gone).
    """

    def __init__(self, recipe: Recipe, console: Console, stack: ExitStack, session: RaySession | None = None) -> None:
        """`session`: a Ray that is there already, and stays."""
        self._recipe, self._console, self._stack, self._session = recipe, console, stack, session

    @property
    def session(self) -> RaySession:
        """Ray, started or reached by the first call."""
        if self._session is None:
            self._session = self._stack.enter_context(own_ray(self._recipe, self._console))
        return self._session

    def look(self) -> Resources:
        """What the cluster has now."""
        return self.session.resources

    @contextmanager
    def team(self, recipe: Recipe, console: Console) -> Iterator[Team]:
        """The roles, which are started when first asked for; nothing of them is left when the block ends."""
        from cluster.team import RayTeam

        with RayTeam(recipe, console, self.session.resources) as team:
            yield team

    @contextmanager
    def crew(self, recipe: Recipe, console: Console) -> Iterator[Crew]:
        """Workers that train a model together; nothing of them is left when the block ends."""
        from cluster.crew import RayCrew

        yield RayCrew(recipe, console, self.session.resources)


@contextmanager
def own_ray(recipe: Recipe, console: Console) -> Iterator[RaySession]:
    """Ray for as long as the block lasts; where its logs are is said if that fails."""
    from cluster.ray_session import RaySession

    session = RaySession(recipe.cluster)
    with ExitStack() as stack:
        with console.task("start Ray"):
            stack.enter_context(session)
        try:
            yield session
        except Exception:
            if session.log_dir is not None:
                console.warn(f"the logs of Ray and of its workers are in {session.log_dir}")
            raise
