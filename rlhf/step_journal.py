"""What each phase of a step has finished, from the newest checkpoint on, so that it need not be done again."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.journal import Journal, Row


class StepJournal:
    """Results of phases by step, one JSON line each; on the disk when `add` returns.

    The unit of replay is one phase of one step: what stands here was finished and is used again, what does not is done
    again from its start, from the same seeds. Results may be added from several threads.
    """

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path, durable=True)
        self._changing = threading.Lock()  # a row that is added while others are dropped would be lost
        self._found = {(row["step"], row["phase"]): row["result"] for row in self._journal.rows()}

    def find(self, step: int, phase: str) -> Row | None:
        """What an earlier process finished, or None."""
        return self._found.get((step, phase))

    def add(self, step: int, phase: str, result: Mapping[str, Any]) -> None:
        """Commits a result."""
        with self._changing:
            self._journal.append([{"step": step, "phase": phase, "result": result}])

    def drop_below(self, step: int) -> None:
        """Forgets the steps below `step`: a checkpoint holds what became of them."""
        with self._changing:
            self._found = {key: result for key, result in self._found.items() if key[0] >= step}
            self._journal.keep(lambda row: row["step"] >= step)

    def clear(self) -> None:
        """Forgets everything: the steps are about to be done in another way."""
        with self._changing:
            self._found = {}
            self._journal.keep(lambda row: False)
