"""What the lead sees, and what the run is given; on both databases."""

from __future__ import annotations

import pytest

from rlhf.desk.errors import NotThere
from rlhf.desk.records import Tiers
from tests.rlhf.desk.conftest import Clock, MakeDesk
from tests.rlhf.desk.groups import group, groups, person, rank_all, verdict

UP: Tiers = ((0,), (1,), (2,))
DOWN: Tiers = ((2,), (1,), (0,))


def test_progress_says_what_is_done_what_is_open_and_who_is_where(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(quota=2, lease_minutes=10)
    desk.add_groups(groups(3))
    desk.add_groups([group("later")], round=1)
    ann, bob = person(desk, "ann"), person(desk, "bob")
    for time_ms in (1000, 3000, 8000):
        task = desk.next_task(ann)
        assert task is not None
        desk.submit(ann, task.id, verdict((0,), (1,)), time_ms)
    task = desk.next_task(bob)
    assert task is not None
    desk.submit(bob, task.id, verdict((0,), (1,)), 5000)
    desk.next_task(bob)
    found = desk.progress(0)
    assert (found.num_groups, found.num_done, found.num_rankings, found.num_wanted) == (3, 1, 4, 6)
    assert (found.num_open, found.num_closed, found.num_short, found.complete) == (1, 0, 0, False)
    mine = found.people[0]
    assert (mine.person.name, mine.num_ranked, mine.time_ms, mine.median_time_ms) == ("ann", 3, 12_000, 3000)
    assert mine.last_seen == clock.now.isoformat(timespec="milliseconds")
    assert desk.progress().num_groups == 4 and found.quota == 2
    assert desk.rounds() == (0, 1)
    assert desk.history(bob)[0].question == "question p000"
    clock.pass_minutes(11)
    assert desk.progress(0).num_open == 0


def test_groups_that_the_people_invited_cannot_finish_are_counted(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(2))
    ann = person(desk, "ann")
    assert desk.progress().num_short == 2
    bob = person(desk, "bob")
    assert desk.progress().num_short == 0
    task = desk.next_task(bob)
    assert task is not None
    desk.skip(bob, task.id, "no", 0)
    assert desk.progress().num_short == 1
    rank_all(desk, ann)
    assert desk.progress().num_short == 1
    person(desk, "lea", "lead")  # who has ranked nothing so far
    assert desk.progress().num_short == 1
    person(desk, "eve")
    assert desk.progress().num_short == 0


def test_agreement_is_of_what_counts_now(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(2))
    ann, bob = person(desk, "ann"), person(desk, "bob")
    rank_all(desk, ann, UP)
    assert desk.agreement().tau is None
    rank_all(desk, bob, DOWN)
    assert desk.agreement().tau == pytest.approx(-1)
    again = desk.history(bob)[0].task_id
    desk.submit(bob, again, verdict(*UP), 0)
    assert desk.agreement().tau == pytest.approx(0)
    desk.set_scores({"p000": [1, 2, 3], "p001": [3, 2, 1]})
    assert desk.agreement().with_reward is not None
    desk.withdraw("bob", "lea")
    assert desk.agreement().tau is None
    assert desk.agreement().with_reward == pytest.approx(0)
    assert desk.item("p000").scores == (1, 2, 3)
    with pytest.raises(NotThere, match=r"prompt 'nowhere'"):
        desk.set_scores({"nowhere": [1]})


def test_a_consensus_below_the_minimum_of_agreement_is_not_accepted(make_desk: MakeDesk):
    desk = make_desk(quota=2, min_agreement=0.5)
    desk.add_groups(groups(2))
    ann, bob = person(desk, "ann"), person(desk, "bob")
    rank_all(desk, ann, UP)
    assert [(one.accepted, one.agreement) for one in desk.consensus(0)] == [(True, None)] * 2
    rank_all(desk, bob, UP)
    desk.submit(bob, desk.history(bob)[0].task_id, verdict((0,), (2,), (1,)), 0)
    sure, unsure = desk.consensus(0)
    assert (sure.tiers, sure.accepted, sure.people) == (UP, True, ("ann", "bob"))
    # Of three pairs one is turned round: (2 - 1) / 3.
    assert (unsure.accepted, unsure.agreement) == (False, pytest.approx(1 / 3))
    assert unsure.tiers == ((0,), (1, 2))
    assert desk.consensus(1) == []
