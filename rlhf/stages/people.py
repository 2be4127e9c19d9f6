"""People rank: groups are put on the desk, and the stage waits until they are ranked, while it holds no GPU.

Rankings that people made elsewhere come to the desk by a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rlhf.desk.desk import Desk, open_desk
from rlhf.desk.exchange import IMPORTED, read_rows, rows_of_file
from rlhf.desk.groups import tokenised
from rlhf.desk.records import Agreement, Consensus, Item, Progress
from rlhf.errors import StoreError
from rlhf.records import AnswerGroup, Ranking
from rlhf.stages.context import Context

NAME = "people"  # by whom a ranking is that several people came to
PAGE = 200  # groups that are read from the desk at once
LOOK_S = 5.0  # between two looks at the desk
MIRROR_S = 600.0  # between two copies to the mirror while rankings come in
OUTAGE_S = 900.0  # for which a database that cannot be reached is waited for


def where_the_page_is(context: Context) -> str:
    """How people come to the page, in words."""
    folder = context.store.folder
    return f"`tenfold annotate {folder}` serves the page, `tenfold annotate {folder} --invite NAME` invites somebody"


def put_on_desk(context: Context, groups: Sequence[AnswerGroup]) -> None:
    """Puts groups where people find them. Those that are there already stay as they are."""
    with open_desk(context.store.folder, context.recipe) as desk:
        desk.add_groups(groups, context.round)


def rank(
    context: Context, groups: Sequence[AnswerGroup], sleep: Callable[[float], object] = time.sleep
) -> dict[str, object]:
    """What people came to, once every group has been ranked by as many as the quota says; their rankings are kept.

    Groups on which people agree less than `desk.min_agreement` are left out, as are those that nobody could rank.
    """
    context.team.rest()
    with open_desk(context.store.folder, context.recipe) as desk:
        desk.add_groups(groups, context.round)
        with context.store.events.around("rank", context.round, "wait for people"):
            progress = wait(context, desk, sleep)
        agreed, agreement = desk.consensus(context.round), desk.agreement(context.round)
    accepted = [one for one in agreed if one.accepted and one.tiers]
    context.store.add_rankings([Ranking(one.prompt_id, one.tiers, NAME, context.round) for one in accepted])
    results = figures(progress, agreed, accepted, agreement)
    context.store.cut_metrics("rank", context.round)
    numbers = {f"rank/{name}": float(value) for name, value in results.items() if isinstance(value, (int, float))}
    context.tracker.log("rank", context.round + 1, numbers)
    return {"judge": NAME} | results


def take_in(context: Context, path: Path) -> int:
    """How many groups of a file were ranked; they are on the desk, and what people came to is among the rankings.

    Once more, it changes nothing. Groups of prompts that the run samples itself are left out, and that is told. Raises
    DataError for a row that cannot be used.
    """
    taken = read_rows(rows_of_file(path), IMPORTED)
    own = {group.prompt.id for group in context.store.groups("sample", 0)}
    others = [one for one in taken if one.prompt_id not in own]
    if left := len(taken) - len(others):
        context.console.warn(f"reward.rankings={path}: {left} groups are left out, since the run has their prompts")
    inside = {one.prompt_id for one in others}
    with open_desk(context.store.folder, context.recipe) as desk:
        desk.take_in(others)
        agreed = [one for one in desk.consensus(0) if one.prompt_id in inside and one.accepted and one.tiers]
    context.store.add_rankings([Ranking(one.prompt_id, one.tiers, IMPORTED) for one in agreed])
    return len(agreed)


def given_groups(context: Context, round: int, prompt_ids: Collection[str]) -> dict[str, AnswerGroup]:
    """Those of these groups that came to the desk from elsewhere, as text, by prompt id."""
    if not prompt_ids:
        return {}
    items: list[Item] = []
    with open_desk(context.store.folder, context.recipe) as desk:
        while page := desk.items(round, len(items), PAGE):
            items += page
    groups = tokenised([item for item in items if item.prompt_id in prompt_ids], context.chat)
    return {group.prompt.id: group for group in groups}


def wait(context: Context, desk: Desk, sleep: Callable[[float], object]) -> Progress:
    """How far it is when nothing is waited for any more. A database that is away for a while is waited for, too."""
    console, folder = context.console, context.store.folder
    progress = desk.progress(context.round)
    if progress.complete:
        return progress
    console.say(
        f"rank: people are waited for, and no GPU is held; {where_the_page_is(context)}. Ctrl-C stops; "
        f"`tenfold resume {folder}` waits on."
    )
    told_short = False
    since_mirror, away = 0.0, 0.0
    num_wanted, before = progress.num_wanted, progress.num_rankings
    with console.task("rank: wait for people", num_wanted, "rankings", patient=True, before=before) as task:
        task.advance(0, note(progress))
        while not progress.complete:
            if progress.num_short and not told_short and progress.people:
                told_short = True
                console.warn(
                    f"rank: {progress.num_short} groups cannot get their rankings (desk.quota="
                    f"{context.recipe.desk.quota} people each) from who is invited; invite more people."
                )
            told_short = told_short and progress.num_short > 0
            sleep(LOOK_S)
            since_mirror += LOOK_S
            try:
                now = desk.progress(context.round)
            except StoreError as error:
                away += LOOK_S
                if away >= OUTAGE_S:
                    raise
                task.advance(0, f"no answer from the desk: {error.problem}")
                continue
            away = 0.0
            if now.num_rankings != progress.num_rankings and since_mirror >= MIRROR_S:
                context.store.mirror()
                since_mirror = 0.0
            if now != progress:
                task.advance(now.num_rankings - progress.num_rankings, note(now))
            progress = now
    return progress


def note(progress: Progress) -> str:
    """How many groups are done, and how many tasks people have open."""
    return f"{progress.num_done} of {progress.num_groups} groups done, {progress.num_open} open"


def figures(
    progress: Progress, agreed: Sequence[Consensus], accepted: Sequence[Consensus], agreement: Agreement
) -> dict[str, object]:
    """What the summary shows of a round."""
    return {
        "num_groups": len(accepted),
        "num_tied_groups": sum(len(one.tiers) < 2 for one in accepted),
        "num_disagreed": sum(not one.accepted for one in agreed),
        "num_closed": progress.num_closed,
        "num_people": len({name for one in agreed for name in one.people}),
        "num_rankings": sum(len(one.people) for one in agreed),
        "agreement_tau": agreement.tau,
        "agreement_alpha": agreement.alpha,
        "agreement_self": agreement.with_self,
    }
