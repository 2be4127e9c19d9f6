"""The addresses of the lead."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from rlhf.desk.desk import Desk
from rlhf.desk.records import Verdict
from tests.cluster.page.conftest import SignIn
from tests.rlhf.desk.groups import person, rank_all


@pytest.fixture
def ranked(desk: Desk) -> Desk:
    """Two people have ranked all four groups, in opposite orders."""
    rank_all(desk, person(desk, "one"))
    rank_all(desk, person(desk, "two"), ((2,), (1,), (0,)))
    return desk


def test_the_lead_sees_how_far_it_is(ranked: Desk, lead: TestClient) -> None:
    progress = lead.get("/api/lead/progress").json()
    assert (progress["num_groups"], progress["num_done"], progress["num_rankings"]) == (4, 4, 8)
    assert [one["person"]["name"] for one in progress["people"]] == ["one", "two", "lea"]
    assert lead.get("/api/lead/progress?round=9").json()["num_groups"] == 0


def test_the_lead_sees_how_far_people_agree(ranked: Desk, lead: TestClient) -> None:
    agreement = lead.get("/api/lead/agreement").json()
    assert agreement["tau"] == pytest.approx(-1)
    assert agreement["pairs"] == [{"one": "one", "other": "two", "tau": pytest.approx(-1), "num_groups": 4}]


def test_the_lead_sees_any_ranking_and_what_it_was_before(ranked: Desk, lead: TestClient) -> None:
    first = ranked.submissions(person="one")[0]
    who = next(one.id for one in ranked.people() if one.name == "one")
    ranked.submit(who, first.task_id, Verdict(((1,), (0, 2)), {1: "good"}, {0: frozenset({"unsafe"})}), 5)
    ranked.set_scores({first.prompt_id: [0.5, 0.25, -1.0]})
    group = lead.get("/api/lead/group", params={"prompt_id": first.prompt_id}).json()
    assert [answer["score"] for answer in group["answers"]] == [0.5, 0.25, -1.0]
    said = [(one["person"], one["tiers"], one["counts"]) for one in group["submissions"]]
    assert said == [
        ("one", [[0], [1], [2]], False),
        ("two", [[2], [1], [0]], True),
        ("one", [[1], [0, 2]], True),
    ]
    assert group["submissions"][2]["flags"] == {"0": ["unsafe"]} and group["submissions"][2]["grades"] == {"1": "good"}
    assert sorted(group["submissions"][0]["order"]) == [0, 1, 2]


def test_groups_come_page_by_page(ranked: Desk, lead: TestClient) -> None:
    rows = lead.get("/api/lead/groups?limit=3").json() + lead.get("/api/lead/groups?limit=3&offset=3").json()
    assert [row["prompt_id"] for row in rows] == ["p000", "p001", "p002", "p003"]
    assert rows[0] == {
        "prompt_id": "p000",
        "round": 0,
        "question": "question p000",
        "num_rankings": 2,
        "num_skips": 0,
        "closed": False,
        "imported": False,
    }


def test_what_a_person_said_is_set_aside_and_taken_back(ranked: Desk, lead: TestClient) -> None:
    after = lead.post("/api/lead/withdraw", json={"name": "two", "reason": "a robot"}).json()
    assert after["num_rankings"] == 4 and [one["person"]["withdrawn"] for one in after["people"]] == [
        False,
        True,
        False,
    ]
    group = lead.get("/api/lead/group?prompt_id=p000").json()
    assert [(one["person"], one["withdrawn"], one["counts"]) for one in group["submissions"]] == [
        ("one", False, True),
        ("two", True, False),
    ]
    assert lead.post("/api/lead/reinstate", json={"name": "two"}).json()["num_rankings"] == 8


def test_who_is_withdrawn_is_given_nothing_and_told(desk: Desk, lead: TestClient, annotator: TestClient) -> None:
    lead.post("/api/lead/withdraw", json={"name": "ann"})
    assert annotator.post("/api/tasks/next").json()["task"] is None
    assert annotator.get("/api/me").json()["withdrawn"] is True


def test_what_is_not_there_answers_404(lead: TestClient) -> None:
    assert lead.get("/api/lead/group?prompt_id=nothing").status_code == 404
    assert lead.post("/api/lead/withdraw", json={"name": "nobody"}).status_code == 404


@pytest.mark.parametrize("query", ["round=-1", f"round={10**20}", "offset=-1", "limit=0", "limit=201", "round=x"])
def test_a_query_that_does_not_fit_answers_422(lead: TestClient, query: str) -> None:
    assert lead.get(f"/api/lead/groups?{query}").status_code == 422


def test_prompt_ids_that_no_database_can_hold_are_refused(lead: TestClient, sign_in: SignIn) -> None:
    assert lead.get("/api/lead/group", params={"prompt_id": "a\x00"}).status_code == 422
    assert lead.get("/api/lead/group", params={"prompt_id": "a" * 65}).status_code == 422
