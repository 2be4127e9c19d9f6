"""The stages of a run, done in stretches: by new workers after a loss, and in another size when that is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from cluster.failures import WorkerLost
from cluster.placement import Placement, Resources, place, place_crew, workers_of
from cluster.recovery import Loss, Move, decide, missing, names_of
from cluster.replan import Planner, settled
from cluster.running import run_stage, stopping_is_said
from cluster.scale import Requests
from configs.schema import MODEL_STAGES, Recipe
from rlhf.ports import Console
from rlhf.rounds import Step
from rlhf.stages.context import Context, StageLeft

if TYPE_CHECKING:
    from rlhf.stages.model_context import ModelContext
    from rlhf.store import RunStore

GRACE_S, LOOK_S = 3.0, 0.2  # after a worker was lost, for its node to be given up too


class MakeContext(Protocol):
    """What a stage is given, of this team or crew."""

    def __call__(
        self, recipe: Recipe, workers: Any, /, *, round: int, is_to_leave: Callable[[], bool]
    ) -> Context | ModelContext: ...


class Stretches:
    """Runs stages to their end. What a lost team had not committed the next one does again, from the newest checkpoint.

    Args:
        recipe: with the stages whose roles are placed.
        open_team: the workers of a recipe: a team, or a crew.
        make_context: what a stage is given.
        look: what the cluster has now. None: it cannot be asked, and a loss ends the run.
        planner: finds the run's place again.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: RunStore,
        console: Console,
        *,
        open_team: Callable[[Recipe, Console], AbstractContextManager[Any]],
        make_context: MakeContext,
        look: Callable[[], Resources] | None,
        planner: Planner,
    ) -> None:
        self._recipe, self._store, self._console = recipe, store, console
        self._asked = recipe  # in the size that people ask for; the one in use may be narrower after a loss
        self._wanted: Recipe | None = None  # the one that it is to have next
        self._open_team, self._make_context, self._look = open_team, make_context, look
        self._planner = planner
        self._requests = Requests(store, console, self._planner, look)
        self._num_losses, self._seen = 0, ""  # since the run came forward, and how far it was

    def run(self, steps: Sequence[Step]) -> Recipe:
        """The recipe in the size that was asked for last, once all are done.

        Raises what a stage raises; PlacementError where a loss leaves no place for the run.
        """
        left = list(steps)
        while left:
            left_for, self._wanted = self._wanted, None  # meanwhile it may have been taken back, or asked otherwise
            if self._is_to_leave():
                self._resize()
            elif left_for is not None:
                self._console.say("another size is not asked for any more: goes on as before")
            before = self._look() if self._look else None
            if before is not None:
                self._recipe = settled(self._recipe, before)
            try:
                self._work(left)
            except WorkerLost as error:
                if self._look is None or before is None:
                    raise
                self._recover(error, before, self._look, makes_model=left[0][0] in MODEL_STAGES)
        return self._asked

    def _work(self, left: list[Step]) -> None:
        """Takes from `left` the stages that one team does: all, or those before it is to leave."""
        with self._open_team(self._recipe, self._console) as team, stopping_is_said(self._console):
            while left:
                stage, round = left[0]
                context = self._make_context(self._recipe, team, round=round, is_to_leave=self._is_to_leave)
                try:
                    run_stage(stage, round, context)
                except StageLeft:
                    self._store.rewind()
                    return
                del left[0]
                if left and self._is_to_leave():
                    return

    def _is_to_leave(self) -> bool:
        """Whether another size is asked for that the cluster can give."""
        if self._wanted is None:
            self._wanted = self._requests.wanted(self._asked)
        return self._wanted is not None

    def _resize(self) -> None:
        """Takes up the size that was asked for."""
        assert self._wanted is not None
        self._store.rewind()  # between two stages, too: what it holds of journals may be of files that are replaced
        self._requests.take(self._wanted)
        self._recipe = self._asked = self._wanted
        self._wanted = None
        cluster = self._recipe.cluster
        workers = ", ".join(f"{number} {name}" for name, number in cluster.workers.items()) or "as many as GPUs"
        self._console.say(f"goes on in another size: cluster.gpus={cluster.gpus}, workers: {workers}")

    def _recover(
        self, error: WorkerLost, before: Resources, look: Callable[[], Resources], *, makes_model: bool
    ) -> None:
        """Returns with the recipe to go on with and everything committed that can be."""
        after = _when_settled(error, before, look)
        self._wanted = None  # what was asked for must fit what is left
        gone = missing(before.nodes, after.nodes)
        self._store.rewind()
        progress = self._store.progress
        self._num_losses = self._num_losses + 1 if progress == self._seen else 1
        self._seen = progress
        decision = decide(self._recipe, Loss(error.problem, gone, after, self._num_losses), self._planner)
        names = [node.name for node in gone]
        self._store.events.add("lost", nodes=names, move=decision.move.value, worker=error.problem)
        if decision.error is not None:
            raise decision.error from error
        self._recipe = decision.recipe
        what = f"the node {names_of(gone)} went away" if gone else error.problem
        found = Placement((place_crew(self._recipe, after),)) if makes_model else place(self._recipe, after)
        on = (
            f"on what is left, {workers_of(found)}"
            if decision.move is Move.SHRINK
            else "with new workers in the same places"
        )
        self._console.warn(f"{what}; going on from what was committed, {on}")


def _when_settled(error: WorkerLost, before: Resources, look: Callable[[], Resources]) -> Resources:
    """What the cluster has once it is known whether the lost worker's node went with it."""
    deadline = time.monotonic() + GRACE_S
    after = look()
    while len(before.nodes) > 1 and any(node.address == error.host for node in after.nodes):
        if time.monotonic() >= deadline:
            break
        time.sleep(LOOK_S)
        after = look()
    return after
