"""No group is given out beyond its quota, none is lost, and repeats come unannounced; on both databases."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from rlhf.desk.desk import Desk
from rlhf.desk.giving import repeats_due
from rlhf.desk.records import Verdict
from tests.rlhf.desk.conftest import Clock, MakeDesk
from tests.rlhf.desk.groups import BEST_FIRST, group, groups, person, rank_all, verdict

# Annotators in a process of their own: URL, then names; they rank all that they are given.
PROCESS = """
import sys
from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from tests.rlhf.desk.groups import rank_all
desk = Desk(sys.argv[1], DeskConfig(quota=2, repeats=0))
people = {one.name: one.id for one in desk.people()}
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    rank_all(desk, people[name])
"""


def test_a_group_is_given_to_as_many_people_as_the_quota_says(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(3))
    people = [person(desk, name) for name in ("ann", "bob", "eve")]
    assert len(rank_all(desk, people[0])) == 3
    assert len(rank_all(desk, people[1])) == 3
    assert rank_all(desk, people[2]) == []
    assert desk.progress().complete


def test_groups_that_somebody_ranked_are_given_first(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(4))
    ann, bob = person(desk, "ann"), person(desk, "bob")
    for _ in range(2):
        task = desk.next_task(ann)
        assert task is not None
        desk.submit(ann, task.id, Verdict(BEST_FIRST), 0)
    assert rank_all(desk, bob) == ["p000", "p001", "p002", "p003"]


def test_a_repeat_is_not_given_away_by_what_a_person_is_told_of_their_progress(make_desk: MakeDesk):
    desk = make_desk(repeats=0.25)
    desk.add_groups(groups(20))
    ann = person(desk, "ann")
    told: list[tuple[int, int]] = []
    while (task := desk.next_task(ann)) is not None:
        found = desk.own_progress(ann)
        told.append((found.num_ranked, found.num_left))
        desk.submit(ann, task.id, Verdict(BEST_FIRST), 0)
    assert desk.progress().people[0].num_repeats >= 4
    assert told == [(done, len(told) - done) for done in range(len(told))]
    assert desk.own_progress(ann).num_left == 0


def test_a_task_whose_place_was_lost_is_not_left_to_do(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    desk.next_task(ann)
    clock.pass_minutes(31)
    assert desk.own_progress(ann).num_left == 1  # nobody has taken it
    rank_all(desk, bob)
    assert desk.own_progress(ann).num_left == 0


def test_an_open_task_is_given_again_to_who_has_it(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups(groups(2))
    ann = person(desk, "ann")
    assert desk.next_task(ann) == desk.next_task(ann)


def test_an_abandoned_task_goes_to_somebody_else_when_its_lease_ends(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    clock.pass_minutes(29)
    assert desk.next_task(bob) is None
    clock.pass_minutes(1)
    theirs = desk.next_task(bob)
    assert theirs is not None and theirs.prompt_id == "p" and theirs.id != task.id
    assert desk.next_task(ann) is None


def test_each_save_renews_the_lease(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    for _ in range(3):
        clock.pass_minutes(20)
        desk.save_draft(ann, task.id, {}, 0)
        assert desk.next_task(bob) is None


def test_who_comes_back_late_goes_on_where_nobody_took_the_place(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    desk.save_draft(ann, task.id, {"far": True}, 0)
    clock.pass_minutes(600)
    again = desk.next_task(ann)
    assert again is not None and again.id == task.id and again.draft is not None
    assert desk.next_task(bob) is None


def test_a_save_after_somebody_else_took_the_place_is_kept_without_a_lease(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob, eve = (person(desk, name) for name in ("ann", "bob", "eve"))
    task = desk.next_task(ann)
    assert task is not None
    clock.pass_minutes(31)
    assert desk.next_task(bob) is not None
    desk.save_draft(ann, task.id, {"late": 1}, 0)
    assert desk.task(ann, task.id).expires == task.expires
    assert desk.next_task(ann) is None and desk.next_task(eve) is None


def test_a_ranking_that_comes_late_is_kept_and_counts(make_desk: MakeDesk, clock: Clock):
    desk = make_desk(lease_minutes=30)
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    clock.pass_minutes(31)
    theirs = desk.next_task(bob)
    assert theirs is not None
    desk.submit(bob, theirs.id, verdict((0,), (1,)), 0)
    desk.submit(ann, task.id, verdict((0,), (1,)), 0)
    assert desk.consensus(0)[0].people == ("ann", "bob")
    progress = desk.progress()
    assert (progress.num_rankings, progress.num_wanted) == (1, 1)


def test_a_group_that_is_skipped_by_enough_people_is_given_out_no_more(make_desk: MakeDesk):
    desk = make_desk(max_skips=2)
    desk.add_groups([group("p")])
    for name in ("ann", "bob"):
        one = person(desk, name)
        task = desk.next_task(one)
        assert task is not None
        desk.skip(one, task.id, "unclear", 0)
    assert desk.next_task(person(desk, "eve")) is None
    progress = desk.progress()
    assert (progress.num_closed, progress.num_wanted, progress.complete) == (1, 0, True)
    assert desk.item("p").closed


def test_what_a_withdrawn_person_ranked_is_kept_and_given_out_again(make_desk: MakeDesk):
    desk = make_desk(max_skips=1)
    desk.add_groups(groups(2))
    ann, bob = person(desk, "ann"), person(desk, "bob")
    rank_all(desk, ann)
    desk.withdraw("ann", "lea", "always the first")
    assert desk.progress().num_rankings == 0 and desk.consensus(0) == []
    assert [one.person for one in desk.submissions()] == ["ann", "ann"]
    assert desk.submissions(withdrawn=False) == []
    desk.add_groups(groups(3))
    assert desk.next_task(ann) is None
    assert rank_all(desk, bob) == ["p000", "p001", "p002"]
    desk.reinstate("ann", "lea")
    assert desk.consensus(0)[0].people == ("ann", "bob")


def test_nobody_gets_a_group_twice_but_for_repeats(make_desk: MakeDesk):
    desk = make_desk(repeats=0.25, quota=1)
    desk.add_groups(groups(20))
    ann = person(desk, "ann")
    done = Counter(rank_all(desk, ann))
    assert len(done) == 20 and sum(done.values()) == 25 and set(done.values()) == {1, 2}
    again = [one for one in desk.submissions() if one.repeat]
    assert len(again) == 5 == desk.progress().people[0].num_repeats
    assert desk.progress().num_rankings == 20
    firsts = {one.prompt_id: one.id for one in desk.submissions() if not one.repeat}
    assert all(one.id - firsts[one.prompt_id] > 3 for one in again)


def test_a_repeat_looks_like_any_task(make_desk: MakeDesk):
    desk = make_desk(repeats=0.5)
    desk.add_groups([group(f"p{i}", 10) for i in range(12)])
    ann = person(desk, "ann")
    orders: dict[str, set[tuple[int, ...]]] = {}
    while (task := desk.next_task(ann)) is not None:
        assert task.draft is None and task.submission is None
        orders.setdefault(task.prompt_id, set()).add(task.order)
        desk.submit(ann, task.id, verdict((0,), (1,)), 0)
    assert sum(len(found) == 2 for found in orders.values()) > 3
    assert desk.own_progress(ann).num_ranked == sum(len(found) for found in orders.values())


@pytest.mark.parametrize("share", [0.05, 0.1, 1 / 3, 0.5])
def test_repeats_keep_up_with_their_share_at_places_that_cannot_be_counted_out(share: float):
    due = [repeats_due(num, share, 0, "ann") for num in range(301)]
    assert due == sorted(due) and due[0] == 0
    assert all(abs(num * share - found) <= 1 for num, found in enumerate(due))
    steps = [b - a for a, b in pairwise(due)]
    at = [num for num, step in enumerate(steps) if step]
    assert len({b - a for a, b in pairwise(at)}) > 1
    assert repeats_due(1000, 0.0, 0, "ann") == 0


def test_own_progress_counts_what_is_left_for_this_person(make_desk: MakeDesk):
    desk = make_desk(quota=1)
    desk.add_groups(groups(5))
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    assert (desk.own_progress(ann).num_left, desk.own_progress(bob).num_left) == (5, 4)
    desk.submit(ann, task.id, verdict((0,), (1,)), 1500)
    found = desk.own_progress(ann)
    assert (found.num_ranked, found.num_skipped, found.num_left, found.time_ms) == (1, 0, 4, 1500)


def test_threads_that_ask_at_once_get_each_place_once(make_desk: MakeDesk):
    desk = make_desk(quota=2, real_time=True)
    desk.add_groups(groups(6))
    people = [person(desk, f"person {i}") for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        tasks = list(pool.map(desk.next_task, people))  # eight people, and twelve places
        given = Counter(task.prompt_id for task in tasks if task)
        assert sum(given.values()) == 8 and max(given.values()) <= 2
        list(pool.map(lambda one: rank_all(desk, one), people))
    assert_each_place_once(desk, 6)


@pytest.mark.engine
def test_processes_that_ask_at_once_get_each_place_once(make_desk: MakeDesk, url: str):
    desk = make_desk(quota=2, real_time=True)
    desk.add_groups(groups(12))
    names = [f"person{i}" for i in range(6)]
    for name in names:
        person(desk, name)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, *names[first : first + 2]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 2, 4)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.communicate("go\n", timeout=60)
            assert worker.returncode == 0
    finally:
        for worker in workers:
            worker.kill()
    assert_each_place_once(desk, 12)


def assert_each_place_once(desk: Desk, num_groups: int) -> None:
    said = Counter((one.prompt_id, one.person) for one in desk.submissions(every_row=True))
    assert set(said.values()) == {1}
    assert Counter(prompt for prompt, _ in said) == {f"p{i:03}": 2 for i in range(num_groups)}
    assert desk.progress().complete
