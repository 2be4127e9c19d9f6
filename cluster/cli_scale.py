"""`tenfold scale`: another number of GPUs or workers for a run, also while it runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command import Json, RunName, leave, print_json
from cluster.console import StreamConsole, make_console

if TYPE_CHECKING:
    from cluster.scale import Request

LOOK_S = 0.3


def add_scale(app: typer.Typer) -> None:
    """Nothing; the command `scale` is one of the app's."""

    @app.command()
    def scale(
        run: RunName,
        gpus: Annotated[int | None, typer.Option(metavar="N", help="GPUs, of all groups together.")] = None,
        workers: Annotated[
            str | None,
            typer.Option(
                metavar="N", help="Workers of every group; or of those that are named: trainer=2,generator=1."
            ),
        ] = None,
        detach: Annotated[bool, typer.Option("--detach", help="Ask, and do not wait for the run's answer.")] = False,
        as_json: Json = False,
    ) -> None:
        """Give a run another size: one that runs saves at its next step and goes on so, another takes it when resumed.

        What is learnt from in a step stays the same.
        """
        console = make_console(sys.stderr if as_json else sys.stdout)

        def work() -> None:
            done = scaled(run, gpus, workers, console, detach=detach)
            if as_json:
                print_json(done)

        with console:
            leave(console, f"tenfold scale {run}", work)


def scaled(
    run: str, gpus: int | None, workers: str | None, console: StreamConsole, *, detach: bool = False
) -> dict[str, object]:
    """The run's folder, the answer (taken, asked or at_rest) and, where it is known, the size it has now.

    Raises PlacementError where the run refuses; StoreError where there is no such run.
    """
    from cluster.replan_by_plan import planner_of
    from cluster.runs import find_run, is_done
    from cluster.scale import ask, change_at_rest, is_running, parse
    from configs.load import load_recipe
    from rlhf.manifest import RECIPE, read_manifest

    request = parse(gpus, workers)
    folder = find_run(run)
    read_manifest(folder)
    recipe = load_recipe(folder / RECIPE)
    planner = planner_of(folder)
    planner.scaled(recipe, request.size, None)  # what no cluster could give is refused here
    answer = "at_rest"
    if is_running(folder):
        ask(folder, request)
        answer = "asked" if detach else _answer(folder, request, console)
    if answer == "asked":
        console.say("asked: the run takes it at its next step, or when it is resumed")
        return {"run": str(folder), "answer": answer}
    if answer == "at_rest":
        change_at_rest(folder, request, planner)
        if is_done(folder):
            console.say("the run is done; it has the new size if it is made longer (--accept)")
        else:
            console.say(f"`tenfold resume {folder}` goes on in the new size")
    else:
        console.say("taken: the run saved, and goes on in the new size")
    size = load_recipe(folder / RECIPE).cluster
    return {"run": str(folder), "answer": answer, "gpus": size.gpus, "workers": dict(size.workers)}


def _answer(folder: Path, request: Request, console: StreamConsole) -> str:
    """Taken once the run took it; at_rest if the run ended before."""
    from cluster.scale import REFUSED, TAKEN, answer_to, is_running, pending, withdraw
    from rlhf.errors import PlacementError

    try:
        with console.task("wait for the end of the run's step"):
            while True:
                runs = is_running(folder)
                if found := answer_to(request, folder):
                    answer, why = found
                    if answer == REFUSED:
                        raise PlacementError(f"The run refused: {why}")
                    return TAKEN
                standing = pending(folder)
                if standing is not None and standing.id != request.id:
                    raise PlacementError("Somebody else asked for another size before the run took this one.")
                if not runs and withdraw(folder, request):
                    return "at_rest"
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        withdraw(folder, request)
        raise
