"""What to do when a part of the cluster is lost: a pure function from what is known to a decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.placement import Node, Resources
from cluster.replan import Planner
from configs.schema import Recipe
from rlhf.errors import PlacementError


class Move(Enum):
    """What is decided."""

    RETRY = "retry"  # the same placement, with new workers
    SHRINK = "shrink"  # a narrower one, on what is left
    RAISE = "raise"


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known when a worker was lost."""

    what: str  # the problem, in words
    nodes: tuple[Node, ...]  # that were there and are gone; none: the worker was lost alone
    left: Resources
    num: int  # how often that happened since the run last came forward, this time included


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and with which recipe."""

    move: Move
    recipe: Recipe
    error: PlacementError | None = None  # to be raised


def decide(recipe: Recipe, loss: Loss, planner: Planner) -> Decision:
    """RETRY or SHRINK if what is left has a place for the run, and it did not fail too often; else RAISE."""
    limit = recipe.cluster.max_failures
    again = "then run `tenfold resume` on it: it goes on from what was committed."
    if loss.num > limit:
        error = PlacementError(
            f"{_lost(loss)} This happened {loss.num} times with no new checkpoint between.",
            limit=f"The limit is cluster.max_failures={limit}.",
            remedy=f"See why (memory, the network, the workers' logs), {again}",
        )
        return Decision(Move.RAISE, recipe, error)
    try:
        found = planner.narrowed(recipe, loss.left)
    except PlacementError as refusal:
        error = PlacementError(
            f"{_lost(loss)} What is left has no place for the run: {refusal.problem}",
            limit=refusal.limit,
            remedy=f"Bring the node back, or another one, {again}",
        )
        return Decision(Move.RAISE, recipe, error)
    return Decision(Move.RETRY if found == recipe else Move.SHRINK, found)


def missing(before: tuple[Node, ...], after: tuple[Node, ...]) -> tuple[Node, ...]:
    """Those of the nodes before that are not there any more, whatever they have: a placement group changes that."""
    there = {(node.name, node.address) for node in after}
    return tuple(node for node in before if (node.name, node.address) not in there)


def names_of(nodes: tuple[Node, ...]) -> str:
    """The nodes in words, each with its address where that is not its name."""
    return ", ".join(node.name if node.name == node.address else f"{node.name} ({node.address})" for node in nodes)


def _lost(loss: Loss) -> str:
    if not loss.nodes:
        return loss.what
    return f"The node{'s' if len(loss.nodes) > 1 else ''} {names_of(loss.nodes)} went away. {loss.what}"
