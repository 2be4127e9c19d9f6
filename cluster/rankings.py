"""`tenfold rankings`: people's rankings out of a run and into it."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.runs import find_run
from rlhf.desk.desk import open_desk
from rlhf.desk.exchange import rows_of_file
from rlhf.disk import write_file
from rlhf.errors import DataError


def export_rankings(run: str, to: Path, *, pairs: bool, round: int | None) -> dict[str, object]:
    """How many rows were written to the file `to`: one per group, or `prompt`, `chosen`, `rejected` of each pair.

    Raises TenfoldError: no such run, a file that is there already, nothing to write.
    """
    if to.exists():
        raise DataError(f"{to} is there already.", remedy="Name a file that does not exist yet.")
    if not to.parent.is_dir():
        raise DataError(f"{to}: there is no folder {to.parent}.", remedy="Make it first, or name another file.")
    with open_desk(find_run(run)) as desk:
        rows = list(desk.export_pairs(round) if pairs else desk.export_rows(round))
    if not rows:
        raise DataError(
            f"The run {run} has no {'pairs' if pairs else 'groups'} to write.",
            remedy="People rank once `sample` has put groups on the desk (rank.judge: people).",
        )
    write_file(to, b"".join(json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows))
    return {"file": str(to), "num_rows": len(rows)}


def import_rankings(run: str, source: Path, *, by: str, round: int) -> dict[str, object]:
    """How many rankings the run's desk took in of a JSONL file. All or, where a row is of no use, none.

    Raises TenfoldError: no such run or file, a row that cannot be used.
    """
    with open_desk(find_run(run)) as desk:
        return {"file": str(source), "num_rankings": desk.import_rows(rows_of_file(source), by, round)}
