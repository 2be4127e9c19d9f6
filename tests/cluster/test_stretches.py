"""Losses and other sizes in mid-run, on fakes: what goes on from where, and to the same end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from cluster.console import LineConsole
from cluster.failures import WorkerLost
from cluster.placement import Node, Resources
from cluster.run import exit_code, run
from cluster.scale import Request, answer_to, ask, parse, withdraw
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.compare import differences
from rlhf.ports import Console
from rlhf.records import Answer, Prompt
from tests.fakes import FakeTeam
from tests.recipes import tiny_recipe

EAST, WEST = Node("east", "10.0.0.1", {"CPU": 2.0}), Node("west", "10.0.0.2", {"CPU": 1.0})


class Cluster:
    """Nodes that may go, and teams that are built on them."""

    def __init__(self) -> None:
        self.nodes = [EAST, WEST]
        self.out = StringIO()
        self.built: list[dict[str, int]] = []  # the workers of each team
        self.teams: list[FakeTeam] = []
        self.disturb: Callable[[int, FakeTeam], None] = lambda number, team: None
        self.ended: Callable[[int], None] = lambda number: None

    @contextmanager
    def make_team(self, recipe: Recipe, console: Console) -> Iterator[Any]:
        team = FakeTeam()
        self.built.append({str(name): number for name, number in recipe.cluster.workers.items()})
        self.teams.append(team)
        self.disturb(len(self.teams), team)
        number = len(self.teams)
        yield team
        self.ended(number)

    def code(self, recipe: Recipe) -> int:
        console = LineConsole(self.out)
        look = lambda: Resources.of(self.nodes)  # noqa: E731
        return exit_code(console, "again", lambda: (run(recipe, console, make_team=self.make_team, look=look), None)[1])


def first_token(prompt: Prompt, answer: Answer) -> float:
    return answer.token_ids[0] / 300


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr("tests.fakes.VOCABULARY", 300)
    monkeypatch.setattr("cluster.stretches.GRACE_S", 0.0)
    return Cluster()


@pytest.fixture
def make_recipe(tiny_model: Path, tmp_path: Path) -> Any:
    """Five steps of PPO with checkpoints after every second, on three workers of one CPU each."""

    def make(name: str, **changes: Any) -> Recipe:
        base: dict[str, Any] = {
            "stages": ["ppo"],
            "ppo": {"num_steps": 5, "score": "rules", "save_every": 2},
            "rules": [{"name": f"{__name__}.first_token"}],
            "tracker": {"mode": "disabled"},
            "sampling": {"n": 4, "max_answer_tokens": 2},
            "cluster": {"gpus": 0, "cpus_per_worker": 1, "workers": {"trainer": 2}, "max_failures": 1},
        }
        return tiny_recipe(tiny_model, tmp_path, name=name, **{**base, **changes})

    return make


def losing(cluster: Cluster, at: dict[int, int], node: Node | None = None) -> Callable[[int, FakeTeam], None]:
    """Lets the team of a number lose a worker, and the cluster the node, in an update of its policy."""

    def disturb(number: int, team: FakeTeam) -> None:
        update = team.policy.update
        left = at.get(number, 0)

        def lost(rollout: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if node in cluster.nodes:
                    cluster.nodes.remove(node)
                error = WorkerLost("Worker 1 of 2 of the group 'trainer' is gone.")
                error.host = node.address if node else EAST.address
                raise error
            return update(rollout)

        team.policy.update = lost  # type: ignore[method-assign]

    return disturb


def whole(cluster: Cluster, recipe: Recipe) -> Path:
    assert cluster.code(recipe) == 0
    cluster.built.clear()
    cluster.teams.clear()
    return Path(recipe.runs) / recipe.name


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["what"] == what]


def test_a_run_that_loses_a_node_goes_on_with_what_is_left_to_the_same_end(cluster: Cluster, make_recipe: Any) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    cluster.disturb = losing(cluster, {1: 4}, WEST)  # in the fourth step: the second has the newest checkpoint
    recipe = make_recipe("loses")
    assert cluster.code(recipe) == 0
    folder = Path(recipe.runs) / "loses"
    assert cluster.built == [{"trainer": 2}, {"trainer": 1}]
    assert differences(undisturbed, folder) == []
    # What was finished of steps 3 and 4 is used again: the second team writes answers for step 5 alone.
    assert [len(team.generator.requests) for team in cluster.teams] == [4, 1]
    assert "the node west (10.0.0.2) went away; going on" in " ".join(cluster.out.getvalue().split())
    assert [(event["nodes"], event["move"]) for event in events(folder, "lost")] == [(["west"], "shrink")]
    assert load_recipe(folder / "recipe.yaml").cluster.workers == {"trainer": 2}  # what was asked for stays


def test_a_worker_that_is_lost_alone_is_started_again_on_the_same_placement(cluster: Cluster, make_recipe: Any) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    cluster.disturb = losing(cluster, {1: 4, 2: 3})  # the second time there is a newer checkpoint: it counts anew
    recipe = make_recipe("loses")
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}] * 3
    assert differences(undisturbed, Path(recipe.runs) / "loses") == []


def test_a_run_that_comes_no_further_stops(cluster: Cluster, make_recipe: Any) -> None:
    cluster.disturb = losing(cluster, {1: 4, 2: 1})
    assert cluster.code(make_recipe("loses")) == 2
    assert "2 times with no new checkpoint between" in " ".join(cluster.out.getvalue().split())
    assert len(cluster.built) == 2


def test_a_loss_that_leaves_no_place_stops_with_the_nodes_name_and_can_be_resumed(
    cluster: Cluster, make_recipe: Any
) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    cluster.disturb = losing(cluster, {1: 4}, EAST)
    recipe = make_recipe("loses")
    assert cluster.code(recipe) == 2
    told = " ".join(cluster.out.getvalue().split())
    assert "The node east (10.0.0.1) went away." in told and "Traceback" not in told
    cluster.nodes = [EAST, WEST]
    assert cluster.code(recipe) == 0
    assert differences(undisturbed, Path(recipe.runs) / "loses") == []


def asking(folder: Path, request: Request, step: int) -> Callable[[int, FakeTeam], None]:
    """Lets somebody ask for another size while the first team's policy makes this update."""

    def disturb(number: int, team: FakeTeam) -> None:
        update = team.policy.update

        def asked(rollout: Any) -> Any:
            if number == 1 and rollout.step == step:
                ask(folder, request)
            return update(rollout)

        team.policy.update = asked  # type: ignore[method-assign]

    return disturb


def test_a_run_that_is_asked_for_another_size_saves_after_its_step_and_ends_the_same(
    cluster: Cluster, make_recipe: Any
) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    recipe, request = make_recipe("scaled"), parse(None, "trainer=1,generator=2")
    folder = Path(recipe.runs) / "scaled"
    cluster.disturb = asking(folder, request, step=2)
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}, {"trainer": 1, "generator": 2}]
    assert differences(undisturbed, folder) == []
    # Steps 1 to 3 by the first team, and nothing of them again.
    assert [len(team.generator.requests) for team in cluster.teams] == [3, 2]
    assert answer_to(request, folder) == ("taken", "")
    assert not (folder / "scale.json").exists()
    assert load_recipe(folder / "recipe.yaml").cluster.workers == {"trainer": 1, "generator": 2}


def test_a_size_that_the_cluster_cannot_give_is_refused_and_the_run_goes_on(cluster: Cluster, make_recipe: Any) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    recipe, request = make_recipe("scaled"), parse(None, "9")
    folder = Path(recipe.runs) / "scaled"
    cluster.disturb = asking(folder, request, step=2)
    assert cluster.code(recipe) == 0
    assert len(cluster.built) == 1 and differences(undisturbed, folder) == []
    answer = answer_to(request, folder)
    assert answer is not None and answer[0] == "refused" and "15 are missing" in answer[1]
    assert "cannot be had" in cluster.out.getvalue()


@pytest.mark.parametrize("instead", [None, "trainer=1,generator=2"])
def test_a_request_that_is_taken_back_or_replaced_while_the_team_leaves_is_not_taken(
    cluster: Cluster, make_recipe: Any, instead: str | None
) -> None:
    undisturbed = whole(cluster, make_recipe("whole"))
    recipe, request = make_recipe("scaled"), parse(None, "1")
    folder = Path(recipe.runs) / "scaled"
    cluster.disturb = asking(folder, request, step=2)
    newer = None if instead is None else parse(None, instead)

    def ended(number: int) -> None:
        if number == 1:
            assert withdraw(folder, request)
            if newer is not None:
                ask(folder, newer)

    cluster.ended = ended
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}, {"trainer": 2} if newer is None else {"trainer": 1, "generator": 2}]
    assert differences(undisturbed, folder) == []
    assert answer_to(request, folder) is None
    assert ("not asked for any more" in cluster.out.getvalue()) == (newer is None)
    if newer is not None:
        assert answer_to(newer, folder) == ("taken", "")


def test_a_request_that_is_none_is_put_aside(cluster: Cluster, make_recipe: Any) -> None:
    recipe = make_recipe("scaled")
    folder = Path(recipe.runs) / "scaled"

    def disturb(number: int, team: FakeTeam) -> None:
        (folder / "scale.json").write_text('{"gpus": "many"}')

    cluster.disturb = disturb
    assert cluster.code(recipe) == 0
    assert (folder / "scale.json.damaged").exists() and not (folder / "scale.json").exists()


def test_a_request_in_the_last_step_is_taken_when_the_run_goes_on(cluster: Cluster, make_recipe: Any) -> None:
    recipe, request = make_recipe("scaled"), parse(None, "trainer=1")
    folder = Path(recipe.runs) / "scaled"
    cluster.disturb = asking(folder, request, step=4)
    assert cluster.code(recipe) == 0
    assert answer_to(request, folder) is None
    longer = make_recipe("scaled", ppo={"num_steps": 6, "score": "rules", "save_every": 2})
    console = LineConsole(cluster.out)
    run(
        longer, console, make_team=cluster.make_team, look=lambda: Resources.of(cluster.nodes), accept=["ppo.num_steps"]
    )
    assert cluster.built == [{"trainer": 2}, {"trainer": 1}]
    assert answer_to(request, folder) == ("taken", "")


def test_every_stage_that_has_steps_leaves_between_two_of_them(cluster: Cluster, make_recipe: Any) -> None:
    changes: dict[str, Any] = {
        "stages": ["sample", "rank", "reward"],
        "sample": {"num_prompts": 8, "prompts_per_request": 2},
        "reward": {"epochs": 2, "groups_per_batch": 2},
    }
    undisturbed = whole(cluster, make_recipe("whole", **changes))
    recipe = make_recipe("scaled", **changes)
    folder = Path(recipe.runs) / "scaled"

    def disturb(number: int, team: FakeTeam) -> None:
        answer, fit = team.generator.answer, team.reward.fit

        def asked(*values: Any) -> Any:
            if number == 1 and len(team.generator.requests) == 1:
                ask(folder, parse(None, "trainer=1"))
            return answer(*values)

        def asked_again(*values: Any) -> Any:
            if number == 2:
                ask(folder, parse(None, "trainer=2"))
            return fit(*values)

        team.generator.answer, team.reward.fit = asked, asked_again  # type: ignore[method-assign]

    cluster.disturb = disturb
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}, {"trainer": 1}, {"trainer": 2}]
    assert [len(team.generator.requests) for team in cluster.teams] == [2, 2, 0]
    assert differences(undisturbed, folder) == ["checkpoints/reward: the newest steps are none and 1"]


def test_with_answers_written_ahead_a_loss_and_another_size_change_nothing(cluster: Cluster, make_recipe: Any) -> None:
    ahead = {"ppo": {"num_steps": 6, "score": "rules", "save_every": 2, "max_staleness": 1}}
    undisturbed = whole(cluster, make_recipe("whole", **ahead))
    recipe = make_recipe("disturbed", **ahead)
    folder = Path(recipe.runs) / "disturbed"
    lose, scale = losing(cluster, {2: 2}, WEST), asking(folder, parse(None, "trainer=2,generator=1"), step=2)

    def disturb(number: int, team: FakeTeam) -> None:
        lose(number, team)
        scale(number, team)

    cluster.disturb = disturb
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}, {"trainer": 2, "generator": 1}, {"trainer": 1, "generator": 1}]
    assert differences(undisturbed, folder) == []


def test_a_size_that_no_longer_fits_after_a_loss_is_refused(cluster: Cluster, make_recipe: Any) -> None:
    recipe, request = make_recipe("scaled"), parse(None, "trainer=2,generator=1")
    folder = Path(recipe.runs) / "scaled"

    def disturb(number: int, team: FakeTeam) -> None:
        if number == 1:  # asked for in the second step, whose checkpoint cannot be written: there is a loss before
            state = team.policy.state

            def lost() -> Any:
                cluster.nodes.remove(WEST)
                team.policy.state = state  # type: ignore[method-assign]
                error = WorkerLost("Worker 0 of 2 of the group 'trainer' is gone.")
                error.host = WEST.address
                raise error

            team.policy.state = lost  # type: ignore[method-assign]
            asking(folder, request, step=1)(number, team)

    cluster.disturb = disturb
    assert cluster.code(recipe) == 0
    assert cluster.built == [{"trainer": 2}, {"trainer": 1}]
    answer = answer_to(request, folder)
    assert answer is not None and answer[0] == "refused"
