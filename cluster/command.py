"""What the commands of `tenfold` have in common: arguments, JSON, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.console import StreamConsole

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of a run in ./runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and start nothing.")]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="KEY",
        help="A key (or section) of the recipe that may differ from what the run was begun with; repeatable.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output; the rest on standard error.")
]


def print_json(value: object) -> None:
    """Prints the result for a program."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def leave(console: StreamConsole, again: str, work: Callable[[], None]) -> None:
    """Does the work, and leaves with the exit code that says why it ended early; `again` goes on with it."""
    from cluster.run import exit_code

    if code := exit_code(console, again, work):
        raise typer.Exit(code)
