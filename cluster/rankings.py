"""`tenfold rankings`: people's rankings out of a run and into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cluster.runs import find_run, load_run
from rlhf.desk.desk import open_desk
from rlhf.desk.exchange import Taken, read_rows, rows_of_file
from rlhf.disk import write_file
from rlhf.errors import DataError
from rlhf.kept_prompts import read_prompts
from rlhf.manifest import read_manifest
from rlhf.rounds import key, schedule


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

    Raises TenfoldError: no such run or file, a row that cannot be used, a prompt that the run has yet to answer.
    """
    folder = find_run(run)
    taken = read_rows(rows_of_file(source), by)
    _check_answered(folder, taken, round)
    with open_desk(folder) as desk:
        return {"file": str(source), "num_rankings": desk.take_in(taken, round)}


def _check_answered(folder: Path, taken: Sequence[Taken], round: int) -> None:
    """Nothing, unless `sample` has yet to put answers to one of these prompts on the desk. Raises DataError."""
    recipe, _ = load_run(folder)
    is_done = key("sample", round) in read_manifest(folder)["stages"]
    if recipe.rank.judge != "people" or is_done or ("sample", round) not in schedule(recipe.stages, recipe.rounds):
        return
    kept = read_prompts(folder)
    awaited = set() if kept is None else {prompt.id for prompt in kept.train}
    for one in taken:
        if one.prompt_id in awaited:
            raise DataError(
                f"The prompt {one.prompt_id} is one of the run's own, and `sample` has not answered all of them yet.",
                limit="Rankings of a run's own prompts are of the run's own answers.",
                remedy=f"Take them in once `sample` of round {round + 1} is done; learn rankings of other answers with "
                "`reward.rankings: FILE`.",
            )
