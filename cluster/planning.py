"""`tenfold plan`, and the plan that a run makes by itself before anything starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.command import Json, Overrides, RecipePath, leave, print_json
from cluster.console import make_console
from cluster.gpus import GPUS_PER_NODE, budget_here, budget_of, this_machine

if TYPE_CHECKING:
    from cluster.plan.budget import Budget
    from cluster.plan.search import Plan, Refusal
    from cluster.ray_session import RaySession
    from configs.schema import Recipe, Stage
    from rlhf.ports import Console

PLAN = "plan.json"  # in the run folder: what was chosen, from what


def register(app: typer.Typer) -> None:
    """Nothing; the command `plan` is one of the app's."""

    @app.command()
    def plan(
        recipe: RecipePath,
        overrides: Overrides = None,
        gpus: Annotated[
            int | None, typer.Option(min=0, max=4096, help="GPUs there are. Default: this machine's, or the recipe's.")
        ] = None,
        gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="GPUs on each node.")] = GPUS_PER_NODE,
        gpu: Annotated[str | None, typer.Option(help="Which GPUs: H100, A100-80GB, RTX-4090, ...")] = None,
        gpu_memory: Annotated[
            str | None, typer.Option(metavar="80GB", help="Their memory as on the label, if they are others.")
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(metavar="PATH", help="In the place of model.path: a folder, a config.json or a known name."),
        ] = None,
        compare: Annotated[
            str | None, typer.Option(metavar="1,2,4,8", help="Compare these numbers of GPUs, a line for each.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Say whether a recipe fits a budget of GPUs, where each role goes, and about how long a step takes."""
        console = make_console(sys.stderr if as_json else sys.stdout)
        wanted = Wanted(gpus, gpus_per_node, gpu, gpu_memory, model)
        fits = True

        def work() -> None:
            nonlocal fits
            from cluster.plan.page import comparison, page, to_json
            from cluster.plan.search import Plan
            from rlhf.errors import PlacementError

            if compare is not None and gpus is not None:
                raise PlacementError(
                    "--compare names the numbers of GPUs itself.", remedy="Leave --gpus or --compare out."
                )
            found = plans(recipe, overrides or (), wanted, numbers(compare))
            fits = any(isinstance(one, Plan) for one in found)
            if as_json:
                made = [to_json(one) for one in found]
                print_json(made if compare else made[0])
            else:
                console.show(comparison(found) if compare else page(found[0]))

        leave(console, " ".join(["tenfold", "plan", recipe, *(overrides or [])]), work)
        if not fits:
            from cluster.run import USER_ERROR

            raise typer.Exit(USER_ERROR)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says of the budget."""

    gpus: int | None
    gpus_per_node: int
    gpu: str | None
    gpu_memory: str | None
    model: str | None


def plans(path: str, overrides: Sequence[str], wanted: Wanted, compared: Sequence[int] = ()) -> list[Plan | Refusal]:
    """A plan or a refusal for the budget, or for each of the compared numbers of GPUs."""
    from cluster.plan.search import plan
    from cluster.plan.shape import shape_of
    from configs.load import load_recipe

    recipe = load_recipe(path, overrides)
    if compared or wanted.gpus is not None:
        from cluster.plan.work import opened

        recipe = opened(recipe, ["cluster.gpus"])  # the command line's number is meant
    budget = budget_for(recipe, wanted, max(compared, default=None))
    shape = shape_of(recipe, wanted.model)
    return [plan(recipe, shape, budget.of(number)) for number in compared or (budget.num_gpus,)]


def numbers(text: str | None) -> tuple[int, ...]:
    """Numbers of GPUs in `1,2,4`, in order; none of None. Raises PlacementError for another text."""
    from rlhf.errors import PlacementError

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise PlacementError(
            f"--compare {text}: these are not numbers of GPUs.", limit="1 to 4096 each.", remedy="Write 1,2,4,8."
        )
    return tuple(sorted({int(part) for part in parts}))


def planned(
    recipe: Recipe, console: Console, stages: Sequence[Stage], reach: Callable[[], RaySession | None] = lambda: None
) -> tuple[Recipe, Plan | None]:
    """(the recipe with every setting of memory and placement, the plan that they are of); says in a line what it chose.

    A run that has begun is not planned anew: what the recipe leaves open is as the run began with. Where the GPUs'
    memory is not known, and where `cluster.plan` is false, the recipe is taken as it is.

    Args:
        stages: that are asked for; the roles of all of them are placed.
        reach: gives the Ray to run on, where that is not this machine; called if a plan is to be made.

    Raises PlacementError, with what would fit, if nothing does.
    """
    resolved, found, said = _planned(recipe, stages, reach)
    if said:
        console.say(said)
    return resolved, found


def _planned(
    recipe: Recipe, stages: Sequence[Stage], reach: Callable[[], RaySession | None]
) -> tuple[Recipe, Plan | None, str]:
    """(the recipe, the plan, what is to be said of it), as `planned` has it."""
    from cluster.plan.page import line
    from cluster.plan.remedies import explained
    from cluster.plan.search import Plan, plan
    from cluster.plan.shape import shape_of
    from rlhf.errors import ModelError

    folder = Path(recipe.runs) / recipe.name
    if (folder / "manifest.json").exists():
        return as_begun(recipe, folder), None, ""
    if not recipe.cluster.plan:
        return recipe, None, ""
    budget = budget_of(recipe, reach())
    if budget is None:
        return recipe, None, "plan: what memory the GPUs have is not known; the recipe is taken as it is"
    asked = recipe.model_copy(update={"stages": tuple(dict.fromkeys((*recipe.stages, *stages)))})
    try:
        shape = shape_of(recipe)
    except ModelError:
        return recipe, None, ""  # who loads it says what is wrong
    found = plan(asked, shape, budget)
    if not isinstance(found, Plan):
        error = explained(found)
        error.remedy += " (cluster.plan=false tries it as it is.)"
        raise type(error)(error.problem, limit=error.limit, remedy=error.remedy)
    return found.recipe.model_copy(update={"stages": recipe.stages}), found, line(found)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a run here would begin with, for those who ask before."""

    recipe: Recipe  # with what the plan chooses, where one can be made
    said: str = ""  # the plan in a line
    chosen: Mapping[str, Any] = field(default_factory=dict[str, Any])  # key -> value, of what the recipe leaves open
    lacking: str = ""  # why nothing fits, and what would


def foreseen(recipe: Recipe, stages: Sequence[Stage]) -> Foreseen:
    """The recipe as a run on this machine would resolve it. Nothing is started, written or reached."""
    from cluster.preview import gpus_here
    from rlhf.errors import PlacementError

    if recipe.cluster.address is not None:
        return Foreseen(recipe, "plan: made when the cluster is reached" if recipe.cluster.plan else "")
    if recipe.cluster.gpus != "auto" and recipe.cluster.gpus > gpus_here():
        return Foreseen(recipe)  # the recipe is for another machine
    try:
        resolved, found, said = _planned(recipe, stages, lambda: None)
    except PlacementError as error:
        return Foreseen(recipe, lacking=str(error))
    return Foreseen(resolved, said, {} if found is None else found.chosen)


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what it leaves open as the run in `folder` has it, so that going on changes nothing."""
    from cluster.plan.work import KEYS, fixed
    from configs.errors import ConfigError
    from configs.load import load_recipe

    try:
        kept = load_recipe(folder / "recipe.yaml")
    except ConfigError:
        return recipe  # the store says what is wrong with it
    sections: dict[str, dict[str, Any]] = {}
    for key in KEYS:
        name, _, last = key.partition(".")
        if key not in fixed(recipe):
            sections.setdefault(name, {})[last] = getattr(getattr(kept, name), last)
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    )


def keep(found: Plan, folder: Path) -> None:
    """Writes the plan into the run folder: what was chosen, from what, and what it was thought to take."""
    from cluster.plan.page import to_json
    from rlhf.disk import write_file

    write_file(folder / PLAN, (json.dumps(to_json(found), indent=2) + "\n").encode())


def budget_for(recipe: Recipe, wanted: Wanted, most: int | None) -> Budget:
    """The budget that the command line names, or what is here."""
    from cluster.plan.budget import Budget
    from cluster.plan.devices import find_device, read_memory
    from rlhf.errors import PlacementError

    memory = None if wanted.gpu_memory is None else read_memory(wanted.gpu_memory)
    number = wanted.gpus if wanted.gpus is not None else most
    if number is None and recipe.cluster.gpus != "auto":
        number = recipe.cluster.gpus
    if wanted.gpu is None and memory is None:
        found = budget_here()
        if number is None and found is not None:
            return found
        if not number:
            return Budget(0, GPUS_PER_NODE, this_machine())
        if found is None or not found.num_gpus:
            raise PlacementError(
                f"It is not known which GPUs the {number} are.", limit="This machine has none that could be asked.",
                remedy="Say which: --gpu H100, or --gpu-memory 80GB.",
            )  # fmt: skip
        return Budget(number, wanted.gpus_per_node, found.device)
    device = find_device(wanted.gpu, memory)
    if number is None:
        raise PlacementError(
            "It is not known how many GPUs there are.", remedy="Say how many: --gpus 8, or --compare 1,2,4,8."
        )
    return Budget(number, wanted.gpus_per_node, device) if number else Budget(0, GPUS_PER_NODE, this_machine())
