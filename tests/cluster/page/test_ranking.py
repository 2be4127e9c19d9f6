"""The addresses of those who rank."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from cluster.page.app import make_app
from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from tests.cluster.page.conftest import SignIn
from tests.rlhf.desk.groups import groups


def next_task(client: TestClient) -> dict:
    return client.post("/api/tasks/next").json()["task"]


def test_a_task_tells_nothing_of_who_wrote_an_answer(annotator: TestClient) -> None:
    task = next_task(annotator)
    assert set(task) == {"id", "turns", "cards", "expires", "draft", "said", "reason", "created", "time_ms"}
    assert [card["label"] for card in task["cards"]] == ["A", "B", "C"]
    assert all(set(card) == {"label", "html", "text"} for card in task["cards"])


def test_a_verdict_by_labels_is_kept_by_answers(desk: Desk, annotator: TestClient) -> None:
    task = next_task(annotator)
    index = {card["label"]: int(card["text"][-1]) for card in task["cards"]}
    said = {
        "tiers": [["B"], ["A", "C"]],
        "grades": {"B": "good", "A": "bad", "C": "bad"},
        "flags": {"A": ["unsafe", "broken"], "C": []},
        "all_wrong": False,
    }
    answer = annotator.post(f"/api/tasks/{task['id']}/verdict", json=said | {"time_ms": 1234})
    assert answer.status_code == 200
    assert answer.json()["progress"] == {"num_ranked": 1, "num_skipped": 0, "num_left": 3, "time_ms": 1234}
    [kept] = desk.submissions()
    assert kept.verdict is not None and kept.person == "ann" and kept.time_ms == 1234
    assert kept.verdict.tiers == ((index["B"],), tuple(sorted((index["A"], index["C"]))))
    assert kept.verdict.grades == {index["B"]: "good", index["A"]: "bad", index["C"]: "bad"}
    assert kept.verdict.flags == {index["A"]: frozenset({"unsafe", "broken"})}
    again = annotator.get(f"/api/tasks/{task['id']}").json()
    assert again["said"]["tiers"] == [["B"], ["A", "C"]] and again["said"]["flags"] == {"A": ["broken", "unsafe"]}
    assert again["created"] == kept.created


def test_all_wrong_needs_no_ranking_and_a_partial_one_is_taken(desk: Desk, annotator: TestClient) -> None:
    for said in ({"tiers": [], "all_wrong": True}, {"tiers": [["C"], ["A"]]}):
        task = next_task(annotator)
        assert annotator.post(f"/api/tasks/{task['id']}/verdict", json=said | {"time_ms": 1}).status_code == 200
    verdicts = [one.verdict for one in desk.submissions()]
    assert verdicts[0] and verdicts[0].all_wrong and verdicts[1] and len(verdicts[1].tiers) == 2


@pytest.mark.parametrize(
    "said",
    [
        {"tiers": [["A"], ["Z"]]},
        {"tiers": [["A"], ["A"]]},
        {"tiers": [["A"]]},
        {"tiers": [["A"], []]},
        {"tiers": [["A"], ["B"]], "grades": {"A": "superb"}},
        {"tiers": [["A"], ["B"]], "grades": {"Q": "good"}},
        {"tiers": [["A"], ["B"]], "grades": {"A": "bad", "B": "good"}},
        {"tiers": [["A"], ["B"]], "flags": {"A": ["ugly"]}},
        {"tiers": [["A"], ["B"]], "more": 1},
        {"tiers": [["A"], ["B"]], "time_ms": -1},
        {"tiers": [["A"], ["B"]], "time_ms": 10**12},
        {"tiers": [["\ud83d"], ["B"]]},
        {"tiers": 1},
        {},
    ],
)
def test_a_verdict_that_does_not_fit_is_refused(desk: Desk, annotator: TestClient, said: dict) -> None:
    import json

    task = next_task(annotator)
    body = json.dumps({"time_ms": 1} | said).encode()
    headers = {"content-type": "application/json"}
    answer = annotator.post(f"/api/tasks/{task['id']}/verdict", content=body, headers=headers)
    assert answer.status_code == 422 and answer.json()["detail"]
    assert desk.submissions() == []


def test_a_draft_comes_back(annotator: TestClient, sign_in: SignIn, desk: Desk) -> None:
    task = next_task(annotator)
    body = b'{"state": {"verdict": ["\\ud83d", 1.5, null]}, "time_ms": 77}'
    kept = annotator.put(f"/api/tasks/{task['id']}/draft", content=body, headers={"content-type": "application/json"})
    assert kept.status_code == 200
    again = next_task(annotator)
    assert again["id"] == task["id"] and again["time_ms"] == 77
    assert again["draft"]["state"] == {"verdict": ["\ud83d", 1.5, None]}


def test_a_skip_has_a_reason(desk: Desk, annotator: TestClient) -> None:
    task = next_task(annotator)
    skip = f"/api/tasks/{task['id']}/skip"
    for reason in ("", "  ", "x" * 2000, "a\x00b"):
        assert annotator.post(skip, json={"reason": reason, "time_ms": 1}).status_code == 422
    assert (
        annotator.post(skip, json={"reason": "I cannot judge it", "time_ms": 1}).json()["progress"]["num_skipped"] == 1
    )
    assert desk.submissions()[0].reason == "I cannot judge it"
    assert next_task(annotator)["id"] != task["id"]
    assert annotator.get(f"/api/tasks/{task['id']}").json()["reason"] == "I cannot judge it"


def test_a_task_of_somebody_else_is_not_there(desk: Desk, annotator: TestClient, sign_in: SignIn) -> None:
    task = next_task(annotator)["id"]
    other = sign_in(desk.invite("ben"))
    said = {"tiers": [["A"], ["B"]], "time_ms": 1}
    assert other.get(f"/api/tasks/{task}").status_code == 404
    assert other.put(f"/api/tasks/{task}/draft", json={"state": {}, "time_ms": 1}).status_code == 404
    assert other.post(f"/api/tasks/{task}/verdict", json=said).status_code == 404
    assert other.post(f"/api/tasks/{task}/skip", json={"reason": "x", "time_ms": 1}).status_code == 404
    assert annotator.get("/api/tasks/999999").status_code == 404
    assert annotator.get(f"/api/tasks/{10**30}").status_code == 422


def test_the_past_can_be_gone_back_to_and_corrected(desk: Desk, annotator: TestClient) -> None:
    first = next_task(annotator)["id"]
    for tiers in ([["A"], ["B"]], [["B"], ["A"]], [["B"], ["A"]]):
        assert annotator.post(f"/api/tasks/{first}/verdict", json={"tiers": tiers, "time_ms": 1}).status_code == 200
    [past] = annotator.get("/api/tasks").json()
    assert past["task_id"] == first and past["question"].startswith("question p") and not past["skipped"]
    assert annotator.get(f"/api/tasks/{first}").json()["said"]["tiers"] == [["B"], ["A"]]
    assert len(desk.submissions(every_row=True)) == 2  # what was sent twice stands once


def test_when_all_is_done_there_is_nothing_and_that_is_no_error(annotator: TestClient) -> None:
    while (task := next_task(annotator)) is not None:
        annotator.post(f"/api/tasks/{task['id']}/verdict", json={"tiers": [["A"], ["B"]], "time_ms": 1})
    assert annotator.get("/api/tasks/progress").json()["num_left"] == 0


def test_hostile_texts_pass_through_whole(desk: Desk, annotator: TestClient, sign_in: SignIn) -> None:
    hostile = ("\ud83d\x00\u202e<script>alert(1)</script>", "x" * 100_000, "")
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(hostile))
    message = Message("user", "\x1b<b>?\udc00")
    desk.add_groups([AnswerGroup(Prompt("hostile", (message,), (1,)), answers)], 7)
    shown = []
    while (task := next_task(annotator)) is not None:
        shown += [card["text"] for card in task["cards"]]
        annotator.post(f"/api/tasks/{task['id']}/verdict", json={"tiers": [["A"], ["B"]], "time_ms": 1})
    assert {"⟦U+D83D⟧⟦U+0000⟧⟦U+202E⟧<script>alert(1)</script>", "x" * 100_000, ""} <= set(shown)
    assert "⟦U+001B⟧<b>?⟦U+DC00⟧" in {one["question"] for one in annotator.get("/api/tasks").json()}


def test_guidelines_are_markdown(annotator: TestClient) -> None:
    html = annotator.get("/api/guidelines").json()["html"]
    assert "Be just" in html and "<b>" not in html


def test_ten_answers_of_500_words_come_soon(tmp_path: object, desk: Desk) -> None:
    import time

    text = "\n\n".join(" ".join(f"**word{i}** and _more_ words" for i in range(25)) for _ in range(5))
    big = tuple(Answer((i,), (-1.0,), "eos", 0, f"{i} {text}") for i in range(10))
    with Desk(f"sqlite:///{tmp_path}/big.db", DeskConfig(repeats=0)) as another:
        another.add_groups([AnswerGroup(Prompt("p", (Message("user", "?"),), (1,)), big), *groups(300, 10)])
        client = TestClient(make_app(another, run="big"))
        client.post("/api/session", json={"token": another.invite("ann")})
        began = time.perf_counter()
        assert len(client.post("/api/tasks/next").json()["task"]["cards"]) == 10
        assert time.perf_counter() - began < 2  # on a busy machine; alone a tenth of it
