"""What the desk refuses. The page turns each kind into a status of its own."""

from __future__ import annotations

from rlhf.errors import TenfoldError


class DeskError(TenfoldError):
    """The desk cannot do what it was asked for."""


class NotThere(DeskError):
    """No such person, task or group; or a task of somebody else, which is not told apart."""


class BadVerdict(DeskError):
    """A verdict that does not fit its group, a draft that is too large, a reason that is empty."""


class NotAllowed(DeskError):
    """What the person's role does not allow."""
