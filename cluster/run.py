"""The controller: stage after stage, each with what the ones before it left in the run store."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cluster.console import StreamConsole
from cluster.placement import Resources
from cluster.planning import keep, planned
from cluster.preflight import check_early, checked_prompts
from cluster.tracker import sync_command
from cluster.workplace import Workplace, own_ray
from configs.errors import ConfigError
from configs.schema import MODEL_STAGES, STAGES, Recipe, Stage
from rlhf.errors import StoreError, TenfoldError
from rlhf.ports import Console, Team
from rlhf.rounds import Step, key, label, schedule
from rlhf.summary import Places

if TYPE_CHECKING:
    from cluster.ray_session import RaySession
    from cluster.stretches import MakeContext, Stretches
    from cluster.tracker import WandbTracker
    from rlhf.stages.model_context import Crew
    from rlhf.store import RunStore

OK, BUG, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left."""

    results: dict[str, dict[str, object]]  # stage (`reward-1`: of the second round) -> results, of those asked for
    places: Places


def run(
    recipe: Recipe,
    console: StreamConsole,
    *,
    only: Sequence[Stage] | None = None,
    accept: Sequence[str] = (),
    session: RaySession | None = None,
    make_team: Callable[[Recipe, Console], AbstractContextManager[Team]] | None = None,
    make_crew: Callable[[Recipe, Console], AbstractContextManager[Crew]] | None = None,
    look: Callable[[], Resources] | None = None,
) -> Outcome:
    """Runs the stages (those of the recipe, or `only` these) that the run store does not record as done.

    `accept` names keys of the recipe that may differ from those that the run was begun with. `session` is a Ray to work
    on that is there already; without it one is started, or reached, for this run. `look` says what the cluster has now,
    for a team that `make_team` makes; without it a lost worker ends the run.
    What can be checked without the team is checked before it is built. Whatever happens, the team, Ray, the
    tracker and the store are closed, in this order. Raises TenfoldError.
    """
    from rlhf.kept_prompts import read_prompts, write_prompts
    from rlhf.stages.context import Context
    from rlhf.stages.model_context import ModelContext
    from rlhf.store import RunStore

    stages = tuple(only or recipe.stages)
    with ExitStack() as stack:

        def reached() -> RaySession | None:
            """The cluster elsewhere, which is asked for its GPUs before the store opens."""
            nonlocal session
            if session is None and recipe.cluster.address is not None and make_team is None:
                session = stack.enter_context(own_ray(recipe, console))
            return session

        recipe, plan = planned(recipe, console, stages, reached)
        store = stack.enter_context(RunStore.open(recipe.runs, recipe, console.warn, stages=stages, accept=accept))
        if plan is not None:
            keep(plan, store.folder)
        stale = outdated(recipe, store, stages, console)
        todo = left_to_do(recipe, store, stages, stale, console)
        making: list[Stage] = [stage for stage, _ in todo if stage in MODEL_STAGES]
        aligning: list[Stage] = [stage for stage, _ in todo if stage not in MODEL_STAGES]
        if not todo:
            return _outcome(store, stages)
        kept = read_prompts(store.folder)
        check_early(recipe, making + aligning, has_prompts=kept is not None)
        work = Workplace(recipe, console, stack, session)
        tracker: WandbTracker | None = None
        if making:
            tracker = begin(recipe, store, stale, console, stack)
            of_model = partial(ModelContext, store=store, tracker=tracker, console=console)
            open_crew, look_now = (make_crew, None) if make_crew else (work.crew, work.look)
            crews = stretches(recipe, store, console, of_model, open_crew, look_now, makes_model=True)
            recipe = crews.run([step for step in todo if step[0] in MODEL_STAGES])
        if not aligning:
            return _outcome(store, stages, tracker)
        recipe = grounded(recipe, store)
        with console.task("prompts and checks"):
            chat, prompts = checked_prompts(recipe, store, kept, aligning)
            tracker = tracker or begin(recipe, store, stale, console, stack)
            if kept is None and recipe.data.prompts:
                write_prompts(store.folder, prompts)
        # The team places what any of these stages needs, also where a single one is run that the recipe leaves out.
        placed = recipe.model_copy(update={"stages": tuple(s for s in STAGES if s in recipe.stages or s in aligning)})
        of_roles = partial(Context, store=store, chat=chat, prompts=prompts, tracker=tracker, console=console)
        open_team, look_now = (make_team, look) if make_team else (work.team, work.look)
        teams = stretches(placed, store, console, of_roles, open_team, look_now)
        teams.run([step for step in todo if step[0] not in MODEL_STAGES])
        return _outcome(store, stages, tracker)


def stretches(
    recipe: Recipe,
    store: RunStore,
    console: Console,
    make_context: MakeContext,
    open_team: Callable[[Recipe, Console], AbstractContextManager[Crew | Team]],
    look: Callable[[], Resources] | None,
    *,
    makes_model: bool = False,
) -> Stretches:
    """What runs stages on teams of roles, or on crews that make a model; planned anew as the run was planned."""
    from cluster.replan_by_plan import planner_of
    from cluster.stretches import Stretches

    planner = planner_of(store.folder, makes_model=makes_model)
    return Stretches(recipe, store, console, open_team=open_team, make_context=make_context, look=look, planner=planner)


def begin(recipe: Recipe, store: RunStore, stale: Collection[Step], console: Console, stack: ExitStack) -> WandbTracker:
    """The tracker of a run whose work begins, closed with the stack.

    Only now is anything of it for good: until then a mistake can be mended, and the same command given again.
    """
    from cluster.tracker import WandbTracker

    store.take_change()
    store.reopen(*stale)
    tracker = WandbTracker(recipe, store, console)
    stack.callback(tracker.close)
    return tracker


def left_to_do(
    recipe: Recipe, store: RunStore, stages: Sequence[Stage], stale: Collection[Step], console: Console
) -> list[Step]:
    """The stages, and of which round, that are not done or are to be done again, in order; says which are done."""
    steps = schedule(stages, recipe.rounds)
    todo: list[Step] = [step for step in steps if step in stale or not store.done(*step)]
    for step in steps:
        if step not in todo:
            console.say(f"{label(*step)}: done before, skipped")
    # A round stands on the one before; where that is not done and not asked for, it cannot begin.
    return [step for step in todo if not step[1] or store.done("ppo", step[1] - 1) or ("ppo", step[1] - 1) in todo]


def outdated(recipe: Recipe, store: RunStore, stages: Sequence[Stage], console: Console) -> set[Step]:
    """The stages that were done and are to run again: what they left is damaged, or they now have more steps.

    Of those that are repeated it is the newest round. They go on from their newest checkpoint, and so to the same end.
    """
    from rlhf.disk import damage

    stale: set[Step] = set()
    roles: dict[Stage, str] = {"reward": "reward", "ppo": "policy"}
    for stage, role in roles.items():
        if store.done(stage) and (problem := store.damage_of_role(role)):
            console.warn(f"{store.folder}/roles/{role} is damaged ({problem}): {stage} goes on from its checkpoint")
            stale.add((stage, store.num_rounds(stage) - 1))
    made: dict[Stage, str] = {"pretrain": "base", "sft": recipe.adapter or "sft"}
    for stage, name in made.items():
        if store.done(stage) and (problem := damage(store.folder / "models" / name)):
            console.warn(f"{store.folder}/models/{name} is damaged ({problem}): {stage} writes it again")
            stale.add((stage, 0))
    num_steps = store.results("ppo").get("num_steps", recipe.ppo.num_steps)
    if num_steps != recipe.ppo.num_steps and max(recipe.rounds, store.num_rounds("ppo")) > 1:
        raise StoreError(
            f"ppo.num_steps={recipe.ppo.num_steps}: the first round was done with {num_steps} steps.",
            limit="All rounds have the same number.",
            remedy=f"Set ppo.num_steps={num_steps}, or start a run with another name.",
        )
    if num_steps < recipe.ppo.num_steps:
        console.say(f"ppo: done with {num_steps} steps before, goes on to {recipe.ppo.num_steps}")
        stale.add(("ppo", 0))
    if any(stage == "ppo" for stage, _ in stale) or ("ppo" in stages and store.num_rounds("ppo") < recipe.rounds):
        stale.add(("evaluate", 0))  # it was of the policy before
    return stale


def grounded(recipe: Recipe, store: RunStore) -> Recipe:
    """The recipe as the stages after `sft` see it: on the model, and with the adapter, that the run itself made.

    Raises StoreError where a stage that is to make them has not run.
    """
    from rlhf.lineage import base_of

    for stage in MODEL_STAGES:
        if stage in recipe.stages and not store.done(stage):
            raise StoreError(
                f"The recipe's later stages stand on what `{stage}` makes, and it has not run.",
                remedy=f"Run `tenfold {stage}` first, or take it out of the recipe's stages.",
            )
    update: dict[str, object] = {
        "model": recipe.model.model_copy(update={"path": str(base_of(store.folder.resolve(), recipe))})
    }
    if recipe.adapter and "sft" in recipe.stages:
        update["adapter_from"] = str(store.folder.resolve() / "models" / recipe.adapter)
    return recipe.model_copy(update=update)


def exit_code(console: StreamConsole, again: str, work: Callable[[], None]) -> int:
    """0, or the code that says why `work` ended early; errors that the user can mend are told without a traceback.

    `again` is the command that goes on with the same run.
    """
    kept = f"stopped; what was committed is kept; go on with `{again}`"
    terminations: list[int] = []
    try:
        with termination_interrupts(terminations):
            work()
    except (TenfoldError, ConfigError) as error:
        # Ray gives errors of actors back with the remote traceback around them; the cause is the error itself.
        console.error(str(getattr(error, "cause", None) or error))
        return USER_ERROR
    except KeyboardInterrupt:
        console.say(kept)
        return TERMINATED if terminations else INTERRUPTED
    except Exception:
        console.error(f"this is a mistake of Tenfold's, or of code that it runs for you:\n{traceback.format_exc()}")
        return BUG
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:  # Ray puts its own handler in the place of ours, which exits with the number
            raise
        console.say(kept)
        return TERMINATED
    return OK


@contextmanager
def termination_interrupts(terminations: list[int] | None = None) -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the main thread, inside the block, and is put into the list.

    Any other exception, raised while compiled code of Ray's waits, would come out of it as a SystemError.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if terminations is not None:
            terminations.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _outcome(store: RunStore, stages: Sequence[Stage], tracker: WandbTracker | None = None) -> Outcome:
    steps = schedule(stages, max(store.num_rounds(stage) for stage in stages) or 1)
    results = {key(*step): store.results(*step) for step in steps if store.done(*step)}
    if tracker is None:
        return Outcome(results, places(store.folder))
    return Outcome(results, places(store.folder, tracker.place, tracker.sync_command))


def places(folder: Path, tracker: str = "", sync: str = "") -> Places:
    """Where the parts of a run are; those that are not there are left out."""
    adapter = folder / "models" / "policy"
    offline = sorted(folder.glob("wandb/offline-run-*"))
    if not tracker and offline:
        tracker = str(offline[-1])
        sync = sync_command(folder, offline[-1].name.split("-")[3])  # offline-run-TIME-ID, and a number at times
    made = (path for path in sorted(folder.glob("models/*")) if path.is_dir() and path != adapter)
    models = tuple((_MADE.get(path.name, f"adapter {path.name}"), str(path)) for path in made)
    return Places(str(folder), str(adapter) if adapter.is_dir() else "", tracker, sync, models)


_MADE = {"base": "pretrained model", "sft": "aligned model"}  # folders under models/
