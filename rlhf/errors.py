"""The errors that a user can cause and can mend."""

from __future__ import annotations


class TenfoldError(Exception):
    """A mistake at the boundary, told in one message: what is wrong (with the value), the limit, the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, problem: str, *, limit: str = "", remedy: str = "") -> None:
        self.problem, self.limit, self.remedy = problem, limit, remedy
        super().__init__(" ".join(part for part in (problem, limit, remedy) if part))

    def __reduce__(self) -> tuple[object, ...]:
        """Survives the way through Ray, which pickles exceptions."""
        return (_rebuild, (type(self), self.problem, self.limit, self.remedy))


def _rebuild(kind: type[TenfoldError], problem: str, limit: str, remedy: str) -> TenfoldError:
    return kind(problem, limit=limit, remedy=remedy)


class RecipeError(TenfoldError):
    """A recipe with an unknown, missing or contradictory key."""


class DataError(TenfoldError):
    """Input data that cannot be used: file and line are part of the message."""


class ModelError(TenfoldError):
    """A base model that cannot be used as it is."""


class StoreError(TenfoldError):
    """A run folder that cannot be read or written."""


class SyncError(TenfoldError):
    """The adapter did not reach the generator, or an answer came from a version outside the window."""


class ScoreError(TenfoldError):
    """A judge or reward raised, or gave a number that is not finite."""


class PlacementError(TenfoldError):
    """The cluster cannot give what the recipe asks for, or an actor did not answer before its deadline."""


class ServeError(TenfoldError):
    """An endpoint that does not start, cannot be reached, or lets nobody in."""
