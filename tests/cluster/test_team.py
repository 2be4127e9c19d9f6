"""A team on real Ray with light roles: what is started when, and the ports over groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.placement import Resources
from cluster.ray_session import RaySession
from cluster.team import RayTeam
from rlhf.errors import PlacementError
from rlhf.ports import Team
from rlhf.records import AnswerGroup, Rollout, Sampling
from rlhf.together import together
from tests.cluster.played import FACTORIES
from tests.fakes import SilentConsole, answer, group, prompt
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

WORKERS = {"trainer": 2, "generator": 2}


@pytest.fixture(scope="module")
def console() -> SilentConsole:
    return SilentConsole()


@pytest.fixture(scope="module")
def team(session: RaySession, console: SilentConsole, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayTeam]:
    """Two trainers that host four roles, and two generators, all started."""
    recipe = tiny_recipe("model", tmp_path_factory.mktemp("team"), cluster={"workers": WORKERS})
    with RayTeam(recipe, console, session.resources, factories=FACTORIES) as team:
        team.prepare("policy", "generator")
        yield team


@pytest.fixture(scope="module")
def groups() -> list[AnswerGroup]:
    """Groups of different size and length; answer i of all is made of the token i + 1."""
    lengths = [[1, 2], [6], [3, 1, 1], [4], [2, 2]]
    numbers = iter(range(1, 100))
    return [
        group(str(index), *(answer(*[next(numbers)] * length) for length in of_group))
        for index, of_group in enumerate(lengths)
    ]


def rollout(groups: list[AnswerGroup]) -> Rollout:
    empty = torch.zeros(9, 6)
    return Rollout(
        step=0, groups=tuple(groups), mask=empty.bool(), selected=torch.ones(9).bool(), sampling_logprobs=empty,
        old_logprobs=None, ref_logprobs=None, values=None, advantages=empty, returns=None, scores=torch.arange(9.0),
        beta=0.0,
    )  # fmt: skip


def test_a_team_is_what_a_stage_expects(team: RayTeam) -> None:
    as_port: Team = team
    assert as_port.policy is team.policy


def test_what_is_split_over_ranks_comes_back_in_order_and_padded(team: RayTeam, groups: list[AnswerGroup]) -> None:
    answers = [torch.tensor(answer.token_ids) for group in groups for answer in group.answers]
    expected = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    assert torch.equal(team.policy.logprobs(groups), expected)
    assert torch.equal(team.policy.logprobs(groups, temperature=2.0), 2.0 * expected)
    assert torch.equal(team.critic.values(groups), -expected)
    assert torch.equal(team.reward.scores(groups), expected.sum(1))


def test_both_ranks_had_a_part(team: RayTeam, groups: list[AnswerGroup]) -> None:
    team.policy.logprobs(groups)
    states = team.policy.group.call_all("policy", "state")
    # Tokens with the prompt: 6, 9, 8, 7, 7. Rank 0 takes 9, then 7; rank 1 takes 8, 7, then 6.
    assert [state.values["num_groups"] for state in states] == [2, 3]


def test_fewer_groups_than_ranks_are_no_trouble(team: RayTeam, groups: list[AnswerGroup]) -> None:
    assert team.policy.logprobs(groups[:1]).tolist() == [[1.0, 0.0], [2.0, 2.0]]


def test_an_update_reaches_every_rank_and_rank_0_reports(team: RayTeam, groups: list[AnswerGroup]) -> None:
    before = team.policy.adapter().version
    assert team.policy.update(rollout(groups)) == {"rank": 0.0, "scores": 36.0}
    assert team.policy.adapter().version == before + 1
    versions = [int(state.tensors["version"]) for state in team.policy.group.call_all("policy", "state")]
    assert versions == [before + 1] * 2


def test_a_state_goes_to_every_rank(team: RayTeam) -> None:
    state = team.critic.state()
    state.tensors["version"].fill_(7)
    team.critic.load_state(state)
    assert [int(s.tensors["version"]) for s in team.critic.group.call_all("critic", "state")] == [7, 7]


def test_roles_of_a_shared_group_share_process_and_base(team: RayTeam) -> None:
    policy, critic = team.policy.state().values, team.critic.state().values
    assert policy["rank"] == critic["rank"] == 0
    assert (policy["process"], policy["base"]) == (critic["process"], critic["base"])


def test_prompts_are_split_over_the_engines_by_position(team: RayTeam) -> None:
    prompts = [prompt(name) for name in "abcde"]
    groups = team.generator.answer(prompts, Sampling(n=2), seeds=[10, 11, 12, 13, 14])
    assert [group.prompt.id for group in groups] == list("abcde")
    told = [[answer.token_ids for answer in group.answers] for group in groups]
    # (seed, number, rank): the first engine has the first two prompts.
    assert told == [
        [(seed, 0, rank), (seed, 1, rank)] for seed, rank in zip(range(10, 15), (0, 0, 1, 1, 1), strict=True)
    ]
    assert team.generator.answer([], Sampling(n=2), seeds=[]) == []


def test_every_engine_gets_the_adapter(team: RayTeam) -> None:
    adapter = team.policy.adapter()
    assert team.generator.load_adapter(adapter) == {"sync/load_s": 1.0}  # of the slowest: it reports its rank
    versions = {
        answer.version
        for group in team.generator.answer([prompt("a"), prompt("b")], Sampling(n=1), seeds=[1, 2])
        for answer in group.answers
    }
    assert versions == {adapter.version}
    assert team.generator.canary_logprobs([1, 2, 3]) == ([0.0, 0.0], [-1.0, -1.0])


def test_calls_from_several_threads_reach_all_ranks_in_one_order(team: RayTeam, groups: list[AnswerGroup]) -> None:
    calls = [lambda: team.policy.logprobs(groups), lambda: team.reference.logprobs(groups)] * 4
    first, *others = together(*calls)
    assert all(torch.equal(first, other) for other in others)


def test_what_starts_is_said_once_with_its_time(team: RayTeam, console: SilentConsole) -> None:
    assert team.policy is team.policy
    ready = [line for line in console.said if line.startswith("policy: ready in ")]
    assert len(ready) == 1 and ready[0].endswith("2 workers of the group 'trainer'")


def test_workers_are_known_by_name_and_their_memory_is_told(team: RayTeam) -> None:
    names = {"trainer-0", "trainer-1", "generator-0", "generator-1"}
    assert set(team.worker_names().values()) == names
    assert set(team.stats()) == {f"memory/{name}_pss_gib" for name in names}


def test_a_role_is_built_when_asked_for_and_gone_when_released(session: RaySession, tmp_path: Path) -> None:
    recipe = tiny_recipe("model", tmp_path, stages=["ppo"], cluster={"placement": "shared"})
    with RayTeam(recipe, SilentConsole(), session.resources, factories=FACTORIES) as team:
        assert team.worker_names() == {}
        policy = team.policy
        assert list(team.worker_names().values()) == ["trainer-0"]
        team.policy.update(rollout([]))
        assert team.critic.state().values["rank"] == 0
        team.release("policy")  # the critic stays, and with it the group
        assert list(team.worker_names().values()) == ["trainer-0"]
        assert team.policy is not policy and team.policy.adapter().version == 0
        team.release("policy", "critic", "reward")
        assert team.worker_names() == {}
        assert team.policy.adapter().version == 0  # a new group in the same place


def test_a_team_that_rests_holds_nothing_and_starts_anew_when_asked(session: RaySession, tmp_path: Path) -> None:
    wants = {"placement": "shared", "cpus_per_worker": 3, "workers": {"trainer": 2, "generator": 1}}
    recipe = tiny_recipe("model", tmp_path, stages=["ppo"], cluster=wants)
    # Two such teams do not fit: the second can only start if the first gave its reservation back.
    with RayTeam(recipe, SilentConsole(), session.resources, factories=FACTORIES) as team:
        team.policy.update(rollout([]))
        team.rest()
        assert team.worker_names() == {} and team.stats() == {}
        with RayTeam(recipe, SilentConsole(), session.resources, factories=FACTORIES) as other:
            assert other.policy.adapter().version == 0
        assert team.policy.adapter().version == 0


def test_a_placement_that_the_cluster_cannot_give_ends_within_its_deadline(
    session: RaySession, team: RayTeam, tmp_path: Path
) -> None:
    # The resources are taken meanwhile: the plan was right, the cluster is full.
    wants = {"placement": "separate", "cpus_per_worker": 4, "wait_s": 1}
    recipe = tiny_recipe("model", tmp_path, stages=["ppo"], ppo={"score": "rules"}, cluster=wants)
    late = RayTeam(recipe, SilentConsole(), Resources(cpus=16), factories=FACTORIES)
    with late, pytest.raises(PlacementError, match=r"wait for 16 CPU .*the cluster has 16, of which 15 are free"):
        _ = late.policy


def test_a_placement_beyond_the_cluster_is_refused_before_anything_starts(session: RaySession, tmp_path: Path) -> None:
    recipe = tiny_recipe("model", tmp_path, cluster={"cpus_per_worker": 100})
    with pytest.raises(PlacementError, match="logical CPUs"):
        RayTeam(recipe, SilentConsole(), session.resources, factories=FACTORIES)
