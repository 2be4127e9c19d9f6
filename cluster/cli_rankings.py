"""The command `tenfold rankings`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.command import Json, RunName, leave, print_json
from cluster.console import make_console

Round = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, help="Of which round, the first being 1. Default: all; into: 1.")
]


def rankings(
    run: RunName,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write them to this new JSONL file.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Write prompt, chosen, rejected of each pair (TRL).")] = False,
    take: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Take rankings in from this JSONL file.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="NAME", help="Whose they are, where a row does not say.")] = "import",
    round: Round = None,
    as_json: Json = False,
) -> None:
    """Write what people ranked to a file, or take rankings in from one (docs/people.md)."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.rankings import export_rankings, import_rankings
        from rlhf.errors import DataError

        if (to is None) == (take is None):
            raise DataError("rankings: where to is not said.", remedy="Give one of --to FILE and --from FILE.")
        if pairs and take is not None:
            raise DataError("--pairs says what to write, and is of no use with --from.", remedy="Leave it out.")
        if to is not None:
            done = export_rankings(run, to, pairs=pairs, round=None if round is None else round - 1)
            said = f"{done['num_rows']} rows are in {to}"
        else:
            assert take is not None
            done = import_rankings(run, take, by=by, round=(round or 1) - 1)
            said = f"{done['num_rankings']} rankings were taken in from {take}"
        if as_json:
            print_json(done)
        else:
            console.say(said)

    leave(console, f"tenfold rankings {run}", work)
