"""What is handed over the desk is kept, by whom it was; on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from rlhf.desk.errors import BadVerdict, DeskError, NotThere
from rlhf.desk.records import Verdict
from rlhf.errors import StoreError
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from tests.rlhf.desk.conftest import Clock, MakeDesk
from tests.rlhf.desk.groups import group, groups, person, rank_all, verdict

# People


def test_a_person_signs_in_with_the_token_of_the_invitation_and_no_other(make_desk: MakeDesk):
    desk = make_desk()
    ann, lea = desk.invite("ann"), desk.invite("lea", "lead")
    found = desk.sign_in(ann)
    assert found is not None and (found.name, found.role, found.withdrawn) == ("ann", "annotator", False)
    assert (one := desk.sign_in(lea)) is not None and one.role == "lead"
    assert desk.sign_in(ann + "x") is None and desk.sign_in("") is None and desk.sign_in("\ud83d") is None
    assert [one.name for one in desk.people()] == ["ann", "lea"]


def test_no_token_is_kept(make_desk: MakeDesk, url: str):
    token = make_desk().invite("ann")
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+pg8000:"))
    with engine.connect() as connection:
        row = connection.execute(sa.text("select * from persons")).one()
    engine.dispose()
    assert not any(token in str(value) for value in row)


def test_a_new_token_ends_the_old_one(make_desk: MakeDesk):
    desk = make_desk()
    old = desk.invite("ann")
    new = desk.renew_token("ann")
    assert desk.sign_in(old) is None and desk.sign_in(new) is not None
    with pytest.raises(NotThere, match=r"no 'bob'.*There are ann"):
        desk.renew_token("bob")


@pytest.mark.parametrize("name", ["", " ", " ann", "a\nb", "a\u202eb", "x" * 101])
def test_a_name_that_cannot_be_shown_is_refused(make_desk: MakeDesk, name: str):
    with pytest.raises(DeskError, match="cannot be a person's name"):
        make_desk().invite(name)


def test_a_name_is_given_once(make_desk: MakeDesk):
    desk = make_desk()
    desk.invite("安 🙂")
    with pytest.raises(DeskError, match="invited before"):
        desk.invite("安 🙂")


# What is shown


def test_each_person_sees_an_order_of_their_own_that_hangs_on_the_recorded_seed(make_desk: MakeDesk):
    desk = make_desk(quota=3, seed=7)
    desk.add_groups([group("p", 10)])
    tasks = [desk.next_task(person(desk, name)) for name in ("ann", "bob", "eve")]
    orders = {task.order for task in tasks if task}
    assert len(orders) == 3
    for task in tasks:
        assert task is not None
        assert [card.label for card in task.cards] == list("ABCDEFGHIJ")
        assert sorted(task.order) == list(range(10))
        assert all(card.text == f"p answer {card.index}" for card in task.cards)
        again = make_desk(quota=3, seed=7).next_task(1)
        assert again is not None and again.order == tasks[0].order  # type: ignore[union-attr]


def test_what_no_column_of_text_holds_comes_back_as_it_was(make_desk: MakeDesk):
    awkward = "nul \0, half a pair \ud83d, right to left \u202e, <script>, 你好"
    answers = tuple(Answer((1,), (-1.0,), "eos", 0, text) for text in (awkward, "x" * 100_000))
    desk = make_desk()
    desk.add_groups([AnswerGroup(Prompt("p", (Message("system", awkward), Message("user", awkward)), (1,)), answers)])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    assert task.messages == (Message("system", awkward), Message("user", awkward))
    assert {card.text for card in task.cards} == {awkward, "x" * 100_000}
    assert desk.save_draft(ann, task.id, {"note": awkward}, 5).state == {"note": awkward}
    assert desk.skip(ann, task.id, awkward, 5).reason == awkward


def test_groups_are_put_on_the_desk_once_and_other_answers_to_a_prompt_are_refused(make_desk: MakeDesk):
    desk = make_desk()
    assert desk.add_groups(groups(3)) == 3
    assert desk.add_groups(groups(5)) == 2
    assert desk.add_groups(groups(2), round=1) == 2
    with pytest.raises(DeskError, match="other answers"):
        desk.add_groups([group("p000", 4)])
    with pytest.raises(DeskError, match=r"27 answers.*2 to 26"):
        desk.add_groups([group("big", 27)])
    assert [item.prompt_id for item in desk.items(0, offset=1, limit=2)] == ["p001", "p002"]


# Drafts and verdicts


def test_a_draft_lasts_and_comes_with_the_task(make_desk: MakeDesk, clock: Clock):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None and task.draft is None
    desk.save_draft(ann, task.id, {"good": [1]}, 1000)
    clock.pass_minutes(1)
    kept = desk.save_draft(ann, task.id, {"good": [1, 0]}, 61_000)
    desk.close()
    again = make_desk().next_task(ann)
    assert again is not None and again.id == task.id and again.draft == kept
    assert kept.state == {"good": [1, 0]} and kept.time_ms == 61_000


@pytest.mark.parametrize(("state", "why"), [({"x": "y" * 200_000}, "at most 200000"), ({"x": float("nan")}, "JSON")])
def test_a_draft_that_cannot_be_kept_is_refused(make_desk: MakeDesk, state: dict[str, object], why: str):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    with pytest.raises(BadVerdict, match=why):
        desk.save_draft(ann, task.id, state, 0)


def test_a_verdict_is_kept_whole(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p", 4)])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    said = Verdict(
        ((2,), (0, 1)), {2: "good", 0: "fair", 1: "fair", 3: "unusable"}, {3: frozenset({"unsafe", "broken"})}, True
    )
    kept = desk.submit(ann, task.id, said, 61_000)
    assert (kept.verdict, kept.time_ms, kept.order, kept.person) == (said, 61_000, task.order, "ann")
    found = desk.task(ann, task.id)
    assert found.submission == kept
    assert desk.history(ann) == [kept] == desk.submissions(prompt_id="p")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (Verdict(((0,), (3,))), r"answer 3 is not one of 0 to 2"),
        (Verdict(((0,), (1, 0))), r"answer 0 stands in two places"),
        (Verdict(((0, 1), ())), r"a tier is empty"),
        (Verdict(((0,),)), r"1 answers are ranked; rank at least 2"),
        (Verdict(()), r"all are wrong, or skip"),
        (Verdict(((0,), (1,)), {0: "fine"}), r"'fine' is not one of good"),  # type: ignore[dict-item]
        (Verdict(((0,), (1,)), {0: "bad", 1: "good"}), r"answer 1 is good, and stands below answer 0, which is bad"),
        (Verdict(((0,), (2,), (1,)), {0: "bad", 1: "good"}), r"answer 1 is good"),
        (Verdict(((0,), (1,)), {}, {5: frozenset({"unsafe"})}), r"answer 5 is not"),
        (Verdict(((0,), (1,)), {}, {0: frozenset({"odd"})}), r"'odd' is not one of unsafe"),  # type: ignore[dict-item]
    ],
)
def test_a_verdict_that_does_not_fit_is_refused_and_nothing_is_kept(make_desk: MakeDesk, said: Verdict, why: str):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    with pytest.raises(BadVerdict, match=why):
        desk.submit(ann, task.id, said, 0)
    assert desk.history(ann) == []


def test_all_are_wrong_needs_no_order(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    desk.submit(ann, task.id, Verdict((), all_wrong=True), 0)
    assert desk.progress().complete


@pytest.mark.parametrize("time_ms", [-1, 7 * 24 * 3_600_000 + 1])
def test_a_time_that_cannot_be_is_refused(make_desk: MakeDesk, time_ms: int):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    with pytest.raises(BadVerdict, match="time_ms"):
        desk.submit(ann, task.id, verdict((0,), (1,)), time_ms)


def test_a_correction_is_a_new_row_and_the_newest_counts(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    first = desk.submit(ann, task.id, verdict((0,), (1, 2)), 10)
    second = desk.submit(ann, task.id, verdict((2,), (1, 0)), 20)
    assert desk.submissions() == [second]
    assert desk.submissions(every_row=True) == [first, second]
    assert desk.consensus(0)[0].tiers == ((2,), (0, 1))
    desk.skip(ann, task.id, "on second thoughts", 30)
    assert desk.consensus(0) == []


def test_the_same_verdict_once_more_is_the_same_row(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    first = desk.submit(ann, task.id, verdict((0,), (2, 1)), 10)
    assert desk.submit(ann, task.id, verdict((0,), (1, 2)), 99) == first
    assert len(desk.submissions(every_row=True)) == 1


def test_a_task_of_somebody_else_is_not_there(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None
    for asked in (
        lambda: desk.task(bob, task.id),
        lambda: desk.save_draft(bob, task.id, {}, 0),
        lambda: desk.submit(bob, task.id, verdict((0,), (1,)), 0),
        lambda: desk.skip(bob, task.id, "no", 0),
        lambda: desk.next_task(99),
    ):
        with pytest.raises(NotThere):
            asked()


def test_a_skip_says_why_and_gives_the_group_to_somebody_else(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups([group("p")])
    ann, bob = person(desk, "ann"), person(desk, "bob")
    task = desk.next_task(ann)
    assert task is not None and desk.next_task(bob) is None
    with pytest.raises(BadVerdict, match="reason"):
        desk.skip(ann, task.id, " ", 0)
    desk.skip(ann, task.id, "not my subject", 0)
    assert desk.next_task(ann) is None
    assert desk.next_task(bob) is not None


def test_history_has_the_newest_first_and_drafts_of_corrections_are_kept(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups(groups(4))
    ann = person(desk, "ann")
    done = rank_all(desk, ann)
    assert [one.prompt_id for one in desk.history(ann, limit=3)] == done[::-1][:3]
    back = desk.history(ann)[-1].task_id
    desk.save_draft(ann, back, {"again": True}, 5)
    task = desk.task(ann, back)
    assert task.draft is not None and task.draft.state == {"again": True} and task.submission is not None
    desk.submit(ann, back, verdict((2,), (1,)), 7)
    assert desk.history(ann)[0].task_id == back


# The database


def test_a_database_holds_one_run(make_desk: MakeDesk):
    make_desk(run="a").close()
    make_desk(run="a").close()
    make_desk().close()
    with pytest.raises(StoreError, match=r"another run \(a; this one is b\)"):
        make_desk(run="b")


def test_a_server_that_cannot_be_reached_is_told_without_the_password():
    from rlhf.desk.desk import Desk

    with pytest.raises(StoreError, match=r"tenfold:\*\*\*@127") as caught:
        Desk("postgresql://tenfold:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_an_empty_group_of_people_has_nothing_to_agree_on(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups(groups(2))
    found = desk.agreement()
    assert (found.tau, found.alpha, found.alpha_grades, found.with_reward, found.with_self) == (None,) * 5
    assert (found.pairs, found.people, found.num_groups) == ((), (), 0)
