"""Scores of a server elsewhere, on a real server in a thread: what it may answer, and what becomes of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from configs.schema import Recipe
from configs.scores import ScoreServerConfig
from rlhf.errors import RecipeError, ScoreError
from rlhf.judges import checked_scores, make_scorer
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from rlhf.remote_score import RemoteScorer, check_score_servers
from rlhf.rules import OnBadScore
from tests.score_server import Reply, ScoreServer, by_length, says


def group(name: str, *answers: str) -> AnswerGroup:
    prompt = Prompt(name, (Message("system", "Be brief."), Message("user", f"{name}?")), (1,), {"key": "7"})
    return AnswerGroup(prompt, tuple(Answer((1,), (0.0,), "eos", 3, text) for text in answers))


GROUPS = [group("a", "x", "yy"), group("b", "zzz"), group("c", "", "x")]
LENGTHS = [1.0, 2.0, 3.0, 0.0, 1.0]


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    made = ScoreServer()
    yield made
    made.close()


class Scorer(RemoteScorer):
    """One that notes how long it would have waited."""

    def __init__(self, address: str, on_bad_score: OnBadScore = "stop", **keys: Any) -> None:
        self.waited: list[float] = []
        config = ScoreServerConfig.model_validate({"timeout_s": 5, "tries": 3, **keys})
        super().__init__(address, config, on_bad_score, sleep=self.waited.append)


def test_a_request_holds_prompts_as_messages_and_answers_as_texts_and_scores_keep_their_order(server: ScoreServer):
    scorer = Scorer(server.address, prompts_per_request=2)
    assert scorer.scores(GROUPS).tolist() == LENGTHS
    assert scorer.scores([]).shape == (0,)
    assert [[g["id"] for g in body["groups"]] for body in server.asked] == [["a", "b"], ["c"]]
    assert server.asked[0]["version"] == 1
    assert server.asked[0]["groups"][0] == {
        "id": "a",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"}],
        "extra": {"key": "7"},
        "answers": ["x", "yy"],
        "ended": ["eos", "eos"],
    }
    assert server.tokens == [None, None]


def test_a_server_that_fails_and_then_answers_is_asked_again_with_growing_waits(server: ScoreServer):
    server.replies = [says(500), says(503, b"busy", **{"Retry-After": "4"})]
    scorer = Scorer(server.address)
    assert scorer.scores(GROUPS).tolist() == LENGTHS
    assert scorer.waited == [0.5, 4.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize("on_bad_score", ["stop", "retry"])
def test_a_server_that_goes_on_failing_stops_the_run_with_its_words(server: ScoreServer, on_bad_score: OnBadScore):
    server.replies = [says(500, b"out of memory")] * 3
    with pytest.raises(ScoreError, match=r"/score gave no scores: HTTP 500 .*out of memory.* nothing is lost"):
        Scorer(server.address, on_bad_score).scores(GROUPS)
    assert len(server.asked) == 3


def test_a_server_that_does_not_answer_in_time_is_given_up(server: ScoreServer):
    going_on = threading.Event()

    def late(body: dict[str, Any]) -> Reply:
        going_on.wait(10)
        return by_length(body)

    server.replies = [late, late]
    with pytest.raises(ScoreError, match=r"no answer within 0.2 s \(score_server.timeout_s\)"):
        Scorer(server.address, timeout_s=0.2, tries=2).scores(GROUPS)
    assert len(server.asked) == 2
    going_on.set()


def test_a_server_that_answers_byte_by_byte_is_given_up_in_time():
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not over.wait(0.05):
                connection.sendall(b" ")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(ScoreError, match=r"no answer within 0\.3 s"):
        Scorer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3, tries=1).scores(GROUPS)
    assert time.monotonic() - began < 5
    over.set()
    thread.join(5)
    listener.close()


def test_a_connection_that_is_refused_is_tried_again_and_then_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    scorer = Scorer(f"http://127.0.0.1:{port}/score")
    with pytest.raises(ScoreError, match=r"ConnectError.*refused"):
        scorer.scores(GROUPS)
    assert scorer.waited == [0.5, 1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>hello</html>", "JSONDecodeError.*<html>hello"),
        (b"[" * 100_000, "RecursionError"),
        (b"[1, 2]", "TypeError"),
        (b'{"values": []}', "KeyError: 'scores'"),
        (b'{"scores": [[1, 2], [3]]}', r"\[2, 1\] scores for groups of \[2, 1, 2\] answers"),
        (b'{"scores": [[1, 2], [3, 4], [5]]}', r"\[2, 2, 1\] scores for groups of \[2, 1, 2\] answers"),
        (b'{"scores": [[1, 2], [3], [4, "5"]]}', "'5' is no number"),
        (b'{"scores": [[1, 2], [3], [4, true]]}', "True is no number"),
        (b'{"scores": [[1, 2], [3], [4, 1' + b"0" * 400 + b"]]}", "OverflowError"),
    ],
)
def test_what_is_no_answer_stops_the_run_at_once_is_asked_for_again_or_drops_its_groups(
    server: ScoreServer, content: bytes, message: str
):
    server.replies = [says(200, content)]
    with pytest.raises(ScoreError, match=message):
        Scorer(server.address).scores(GROUPS)
    assert len(server.asked) == 1

    server.replies = [says(200, content)] * 2
    assert Scorer(server.address, "retry").scores(GROUPS).tolist() == LENGTHS
    assert len(server.asked) == 4
    server.replies = [says(200, content)] * 3
    with pytest.raises(ScoreError, match=message):
        Scorer(server.address, "retry").scores(GROUPS)

    server.asked.clear()
    server.replies = [says(200, content)]
    scores = Scorer(server.address, "drop").scores(GROUPS)
    assert scores.isnan().all() and scores.shape == (5,)
    assert len(server.asked) == 1


def test_a_score_that_is_null_or_not_finite_is_left_to_the_recipe(server: ScoreServer):
    bad = says(200, b'{"scores": [[1, null], [3], [NaN, 1e999]]}')
    server.replies = [bad]
    assert Scorer(server.address).scores(GROUPS).isfinite().tolist() == [True, False, True, False, False]

    server.replies = [bad]
    with pytest.raises(ScoreError, match="gave answer 2 to prompt a"):
        checked_scores(Scorer(server.address), GROUPS, "stop")
    server.replies = [bad]
    scores, kept, num_dropped = checked_scores(Scorer(server.address, "drop"), GROUPS, "drop")
    assert (scores.tolist(), [g.prompt.id for g in kept], num_dropped) == ([3.0], ["b"], 2)
    server.replies = [bad]
    scores, kept, num_dropped = checked_scores(Scorer(server.address, "retry"), GROUPS, "retry")
    assert (scores.tolist(), num_dropped) == (LENGTHS, 0)
    assert [g["id"] for g in server.asked[-1]["groups"]] == ["a", "c"]  # the failed ones alone


def test_drop_leaves_out_the_groups_of_the_request_that_failed_alone(server: ScoreServer):
    server.replies = [by_length, says(500), says(500), says(500)]
    scorer = Scorer(server.address, "drop", prompts_per_request=2)
    scores, kept, num_dropped = checked_scores(scorer, GROUPS, "drop")
    assert (scores.tolist(), [g.prompt.id for g in kept], num_dropped) == (LENGTHS[:3], ["a", "b"], 1)


@pytest.mark.parametrize("on_bad_score", ["stop", "retry", "drop"])
@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_wrong_address_or_token_stops_the_run_whatever_the_recipe_says(
    server: ScoreServer, status: int, on_bad_score: OnBadScore
):
    server.replies = [says(status, b"no", Location="http://127.0.0.1:9/elsewhere")]
    with pytest.raises(ScoreError, match=f"HTTP {status}.*token_env"):
        Scorer(server.address, on_bad_score).scores(GROUPS)
    assert len(server.asked) == 1


def test_the_token_comes_from_the_environment_and_stands_in_no_message(
    server: ScoreServer, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RecipeError, match="MY_TOKEN: the environment has no such variable"):
        Scorer(server.address, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "two\nlines")
    with pytest.raises(RecipeError, match="no header can"):
        Scorer(server.address, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "abc123")
    scorer = Scorer(f"{server.address}?signature=def456", token_env="MY_TOKEN")
    scorer.scores(GROUPS)
    assert server.tokens == ["Bearer abc123"]
    server.replies = [says(403)]
    with pytest.raises(ScoreError) as error:
        scorer.scores(GROUPS)
    assert "abc123" not in str(error.value) and "def456" not in str(error.value)


def recipe(address: str, **ppo: object) -> Recipe:
    base = {"name": "a", "model": {"path": "m"}, "data": {"prompts": "p"}, "rules": [{"name": "complete"}]}
    return Recipe.model_validate(
        {**base, "ppo": {"score": address, **ppo}, "score_server": {"tries": 1}, "evaluate": {"judge": address}}
    )


def test_scores_of_a_server_are_weighted_beside_rules(server: ScoreServer):
    spec = {"rules": 2.0, server.address: 0.5}
    scorer = make_scorer(spec, recipe(server.address), team=None)  # type: ignore[arg-type]
    assert torch.allclose(scorer.scores(GROUPS[:2]), torch.tensor([2.5, 3.0, 3.5]))
    assert scorer.name == f"2 rules + 0.5 {server.address}"


def test_the_servers_of_a_recipe_are_asked_before_anything_starts(server: ScoreServer):
    with_server = recipe(server.address)
    check_score_servers(with_server, ("sample", "rank", "reward"))
    assert server.asked == []
    check_score_servers(with_server, ("ppo", "evaluate"))
    assert server.asked == [{"version": 1, "groups": []}]
    server.replies = [says(404)]
    with pytest.raises(ScoreError, match="HTTP 404"):
        check_score_servers(with_server, ("evaluate",))
    server.replies = [says(200, b'{"scores": [[1]]}')]
    with pytest.raises(ScoreError, match="scores for groups of"):
        check_score_servers(with_server, ("ppo",))
