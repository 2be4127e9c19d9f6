"""A run waits for people, holds nothing meanwhile, and learns what they came to."""

from __future__ import annotations

from collections.abc import Container

import pytest

from rlhf.desk.desk import Desk, open_desk
from rlhf.desk.records import Progress, Verdict
from rlhf.errors import StoreError
from rlhf.manifest import read_manifest
from rlhf.stages import people, rank, reward, sample
from rlhf.stages.context import Context
from tests.rlhf.stages.annotators import Annotators, the_other_way_round, threes
from tests.rlhf.stages.conftest import MakeContext

PEOPLE = {"rank": {"judge": "people"}, "desk": {"quota": 2, "repeats": 0.0}}


def waiting(context: Context, annotators: Annotators) -> dict[str, object]:
    return people.rank(context, context.store.groups("sample", 0), annotators)


def test_sample_puts_the_groups_on_the_desk_batch_by_batch(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    on_desk: list[int] = []
    answer = context.team.generator.answer

    def spy(*asked):  # type: ignore[no-untyped-def]
        with open_desk(context.store.folder, context.recipe) as desk:
            on_desk.append(desk.progress(0).num_groups)
        return answer(*asked)

    context.team.generator.answer = spy  # type: ignore[method-assign]
    sample.run(context)
    assert on_desk == [0, 3, 6]
    with open_desk(context.store.folder) as desk:
        items = desk.items(0)
    groups = context.store.groups("sample", 0)
    assert [(item.prompt_id, item.answers) for item in items] == [
        (group.prompt.id, tuple(answer.text for answer in group.answers)) for group in groups
    ]


def test_as_soon_as_people_can_begin_they_are_told_where_once(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    said = context.console.said  # type: ignore[attr-defined]
    (line,) = [line for line in said if "people can begin" in line]
    assert f"`tenfold annotate {context.store.folder}`" in line and "--invite NAME" in line
    by_rules = make_context("rules")
    sample.run(by_rules)
    assert not any("people" in line for line in by_rules.console.said)  # type: ignore[attr-defined]


def test_a_desk_that_lacks_groups_of_a_killed_run_gets_them(make_context: MakeContext) -> None:
    context = make_context()  # judged by rules: nothing is put on a desk
    sample.run(context)
    context = make_context(accept=["rank", "desk"], **PEOPLE)
    annotators = Annotators(context, ann=threes, bob=threes)
    assert waiting(context, annotators)["num_groups"] == 8


def test_rank_waits_for_the_quota_with_all_workers_ended_and_keeps_what_people_came_to(
    make_context: MakeContext,
) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    annotators = Annotators(context, ann=threes, bob=threes)
    found = waiting(context, annotators)
    assert context.team.rested == 1  # type: ignore[attr-defined]
    assert annotators.num_sleeps == 8
    assert (found["judge"], found["num_groups"], found["num_people"], found["num_rankings"]) == ("people", 8, 2, 16)
    assert found["agreement_tau"] == pytest.approx(1) and found["agreement_alpha"] == pytest.approx(1)
    rankings = {ranking.prompt_id: ranking for ranking in context.store.rankings(0)}
    for group in context.store.groups("sample", 0):
        counts = [answer.text.split().count("w3") for answer in group.answers]
        ranking = rankings[group.prompt.id]
        assert ranking.by == "people"
        assert [{counts[index] for index in tier} for tier in ranking.tiers] == [
            {count} for count in sorted(set(counts), reverse=True)
        ]
    said = context.console.said  # type: ignore[attr-defined]
    assert any("tenfold annotate" in line and "--invite" in line for line in said)
    (row,) = context.store.metrics("rank")
    assert row["rank/num_rankings"] == 16


def test_a_wait_that_was_stopped_goes_on_with_what_was_ranked(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    annotators = Annotators(context, ann=threes, bob=threes)

    def three_times_then_ctrl_c(seconds: float) -> None:
        if annotators.num_sleeps == 3:
            raise KeyboardInterrupt
        annotators(seconds)

    with pytest.raises(KeyboardInterrupt):
        people.rank(context, context.store.groups("sample", 0), three_times_then_ctrl_c)
    assert context.store.rankings(0) == []
    again = make_context(**PEOPLE)
    rest = Annotators(again, ann=threes, bob=threes)
    assert waiting(again, rest)["num_groups"] == 8
    assert rest.num_sleeps == 5
    assert again.console.tasks["rank: wait for people"] == (16, 6)  # type: ignore[attr-defined]


def test_rank_does_not_wait_where_all_is_ranked(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    waiting(context, Annotators(context, ann=threes, bob=threes))
    before = context.store.rankings(0)
    assert rank.run(context)["num_groups"] == 8  # sleeps in earnest if it sleeps
    assert context.store.rankings(0) == before


def test_groups_on_which_people_disagree_are_left_out(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    found = waiting(context, Annotators(context, ann=threes, bob=the_other_way_round))
    # But for groups on which both say that all answers are equal.
    assert found["num_disagreed"] == 8 - int(str(found["num_groups"])) >= 7
    assert all(len(ranking.tiers) == 1 for ranking in context.store.rankings(0))


def test_too_few_people_are_told_once(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    annotators = Annotators(context, ann=threes)
    sleeps = 0

    def then_bob_comes(seconds: float) -> None:
        nonlocal annotators, sleeps
        sleeps += 1
        if sleeps == 4:
            annotators = Annotators(context, ann=threes, bob=threes)
        annotators(seconds)

    people.rank(context, context.store.groups("sample", 0), then_bob_comes)
    (warning,) = context.console.warned  # type: ignore[attr-defined]
    assert "8 groups cannot get their rankings" in warning and "invite more" in warning


def test_too_few_people_are_told_also_where_nobody_was_there_when_the_wait_began(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    annotators: Annotators | None = None

    def ann_comes_and_then_bob(seconds: float) -> None:
        nonlocal annotators
        names = ["ann"] if annotators is None else ["ann", "bob"]
        annotators = Annotators(context, **dict.fromkeys(names, threes))
        annotators(seconds)

    people.rank(context, context.store.groups("sample", 0), ann_comes_and_then_bob)
    (warning,) = context.console.warned  # type: ignore[attr-defined]
    assert "cannot get their rankings" in warning


class Unreachable(Desk):
    """A desk whose database does not answer at the looks that are named."""

    def __init__(self, context: Context, looks: Container[int]) -> None:
        manifest = read_manifest(context.store.folder)
        url = f"sqlite:///{context.store.folder}/rankings.db"
        super().__init__(url, context.recipe.desk, seed=context.recipe.seed, run=manifest["created"])
        self._looks, self.num_looks = looks, 0

    def progress(self, round: int | None = None) -> Progress:
        self.num_looks += 1
        if self.num_looks in self._looks:
            raise StoreError("The server is away.")
        return super().progress(round)


def test_a_database_that_is_away_for_a_while_is_waited_for(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    num_away = int(people.OUTAGE_S / people.LOOK_S) - 1
    with Unreachable(context, range(3, 3 + num_away)) as desk:
        assert people.wait(context, desk, Annotators(context, ann=threes, bob=threes)).complete
        assert desk.num_looks > num_away


def test_a_database_that_stays_away_ends_the_wait(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    with Unreachable(context, range(2, 10_000)) as desk, pytest.raises(StoreError, match="away"):
        people.wait(context, desk, Annotators(context, ann=threes, bob=threes))
    assert (desk.num_looks - 1) * people.LOOK_S == people.OUTAGE_S


def test_the_reward_model_learns_from_people_and_its_scores_are_told_to_the_desk(make_context: MakeContext) -> None:
    context = make_context(**PEOPLE)
    sample.run(context)
    waiting(context, Annotators(context, ann=threes, bob=threes))
    reward.run(context)
    with open_desk(context.store.folder) as desk:
        found = desk.agreement(0)
        assert found.with_reward is not None and found.with_reward > 0.5
        ann = desk.people()[0].id
        desk.submit(ann, desk.history(ann)[0].task_id, Verdict(((0,), (1,))), 1)  # a correction, after all
        assert len(desk.submissions(every_row=True)) == 17
