"""Rounds on fakes: each goes on from the newest policy, and learns from the rankings of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.schema import Stage
from rlhf.desk.desk import open_desk
from rlhf.errors import StoreError
from rlhf.rounds import schedule
from rlhf.stages import people, ppo, rank, reward, sample
from rlhf.stages.context import Context
from tests.rlhf.stages.annotators import Annotators, threes
from tests.rlhf.stages.conftest import MakeContext

STAGES: dict[Stage, Callable[[Context], dict[str, object]]] = {
    "sample": sample.run,
    "rank": rank.run,
    "reward": reward.run,
    "ppo": ppo.run,
}
TWO: dict[str, Any] = {
    "stages": ["sample", "rank", "reward", "ppo"],
    "rounds": 2,
    "sample": {"num_prompts": 5},
    "ppo": {"num_steps": 3, "score": "reward"},
    "reward": {"epochs": 2, "groups_per_batch": 2, "save_every": 1},
}


def go_on(context: Context, num: int = 8) -> None:
    """Runs so many of the stages that are not done."""
    todo = [step for step in schedule(STAGES, 2) if not context.store.done(*step)]
    for stage, round in todo[:num]:
        at = Context(
            context.recipe,
            context.team,
            context.store,
            context.chat,
            context.prompts,
            context.tracker,
            context.console,
            round,
        )
        context.store.finish(stage, STAGES[stage](at), round)


def test_the_second_round_samples_other_prompts_from_the_newest_policy(make_context: MakeContext) -> None:
    context = make_context(**TWO)
    go_on(context)
    first, second = (context.store.groups("sample", round) for round in (0, 1))
    assert [group.prompt.id for group in first] == ["p0", "p1", "p2", "p3", "p4"]
    assert [group.prompt.id for group in second] == ["p5", "p6", "p7", "p8", "p9"]
    assert {answer.version for group in first for answer in group.answers} == {0}
    assert {answer.version for group in second for answer in group.answers} == {3}
    assert {ranking.round for ranking in context.store.rankings()} == {0, 1}


def test_prompts_begin_again_at_the_end_of_the_split(make_context: MakeContext) -> None:
    train = make_context().prompts.train
    assert [p.id for p in sample.prompts_of(train, 5, 2)] == ["p10", "p11", "p0", "p1", "p2"]
    assert sample.prompts_of(train, None, 3) == train == sample.prompts_of(train, 20, 3)


def test_steps_are_counted_through_and_policy_and_critic_go_on(make_context: MakeContext) -> None:
    context = make_context(**TWO)
    go_on(context)
    assert [row["step"] for row in context.store.metrics("ppo")] == [1, 2, 3, 4, 5, 6]
    assert context.team.policy.version == 6  # type: ignore[attr-defined]
    assert context.store.results("ppo", 1)["num_steps"] == 3
    assert context.store.results("ppo", 1)["first"]["step"] == 4
    steps = [row["step"] for row in context.store.metrics("reward")]
    assert steps == list(range(1, context.store.results("reward", 1)["num_steps"] + 1))
    adapters = [context.store.load_adapter(name) for name in ("policy-round-1", "policy-round-2", "policy")]
    assert [adapter.version for adapter in adapters if adapter] == [3, 6, 6]


def test_the_second_reward_model_is_trained_anew_on_the_rankings_of_both_rounds(make_context: MakeContext) -> None:
    context = make_context(**TWO)
    go_on(context, 6)
    seen: list[tuple[str, int]] = []
    release, old = context.team.release, context.team.reward

    def spy_on_the_new(*roles: Any) -> None:
        release(*roles)
        assert context.team.reward is not old and context.team.reward.weight == 0.0  # type: ignore[attr-defined]
        fit = context.team.reward.fit

        def spy(groups, rankings):  # type: ignore[no-untyped-def]
            seen.extend((ranking.prompt_id, ranking.round) for ranking in rankings)
            return fit(groups, rankings)

        context.team.reward.fit = spy  # type: ignore[method-assign]

    context.team.release = spy_on_the_new  # type: ignore[method-assign]
    go_on(context, 1)
    assert {round for _, round in seen} == {0, 1}
    results = context.store.results("reward", 1)
    assert len(set(seen)) == results["num_train"] and len(seen) == 2 * results["num_train"]


def test_the_newest_rankings_weigh_as_much_as_the_recipe_says(make_context: MakeContext) -> None:
    context = make_context(**TWO)
    go_on(context, 6)
    pairs = reward.ranked_groups(_of_round(context, 1))
    for weight in (1, 3):
        epoch = [ranking.round for _, ranking in reward.weighted(pairs, 1, weight)]
        assert epoch.count(1) == weight * sum(ranking.round == 1 for _, ranking in pairs)
        assert epoch.count(0) == sum(ranking.round == 0 for _, ranking in pairs)
    first = [pair for pair in pairs if pair[1].round == 0]
    assert reward.weighted(first, 0, 3) == first


def test_one_prompt_is_on_one_side_in_all_rounds(make_context: MakeContext) -> None:
    context = make_context(**{**TWO, "sample": {"num_prompts": 12}})
    go_on(context, 6)
    pairs = reward.ranked_groups(_of_round(context, 1))
    train, held_out = reward.split(pairs, 0.3, 0)
    sides = [{ranking.prompt_id for _, ranking in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and {ranking.round for _, ranking in held_out} == {0, 1}


@pytest.mark.parametrize("halt", range(1, 8))
def test_a_run_that_is_resumed_between_any_two_stages_ends_the_same(make_context: MakeContext, halt: int) -> None:
    whole = make_context("whole", **TWO)
    go_on(whole)
    wanted = (whole.team.policy.state(), whole.team.reward.state(), _rows(whole))
    go_on(make_context("halted", **TWO), halt)
    rest = make_context("halted", **TWO)
    go_on(rest)
    policy, model = rest.store.load_role("policy"), rest.store.load_role("reward")
    assert policy is not None and model is not None
    for name, tensor in wanted[0].tensors.items():
        assert torch.equal(policy.tensors[name], tensor)
    assert torch.equal(model.tensors["weight"], wanted[1].tensors["weight"])
    assert _rows(rest) == wanted[2]


def test_a_step_of_the_second_round_that_is_interrupted_is_done_again(make_context: MakeContext) -> None:
    whole = make_context("whole", **TWO)
    go_on(whole)
    halted = make_context("halted", **TWO)
    go_on(halted, 7)
    update, calls = halted.team.policy.update, []

    def stops_at_the_second(rollout):  # type: ignore[no-untyped-def]
        calls.append(rollout)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(rollout)

    halted.team.policy.update = stops_at_the_second  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        go_on(halted)
    rest = make_context("halted", **TWO)
    go_on(rest)
    assert torch.equal(rest.team.policy.logits, whole.team.policy.logits)  # type: ignore[attr-defined]
    assert _rows(rest) == _rows(whole)


def test_a_lost_checkpoint_between_two_rounds_is_told(make_context: MakeContext) -> None:
    context = make_context(**TWO)
    go_on(context, 7)
    for folder in (context.store.folder / "checkpoints" / "ppo").iterdir():
        for file in folder.iterdir():
            file.unlink()
    with pytest.raises(StoreError, match=r"ppo of round 2 goes on from step 3"):
        go_on(make_context(**TWO))


def test_two_rounds_with_people(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(**TWO, rank={"judge": "people"}, desk={"quota": 2, "repeats": 0.25})
    annotators = Annotators(context, ann=threes, bob=threes)
    wait = people.wait
    monkeypatch.setattr(people, "wait", lambda context, desk, sleep: wait(context, desk, annotators))
    go_on(context)
    assert context.team.rested == 2  # type: ignore[attr-defined]
    with open_desk(context.store.folder) as desk:
        assert [desk.progress(round).complete for round in (0, 1)] == [True, True]
        assert {item.round for item in desk.items()} == {0, 1}
        assert desk.agreement().with_self == pytest.approx(1)
    steps = context.store.metrics("ppo")
    assert steps[-1]["completions/mean_length"] > 0 and len(steps) == 6
    threes_now = _share_of_threes(context.store.groups("sample", 1))
    assert threes_now > _share_of_threes(context.store.groups("sample", 0))


def _of_round(context: Context, round: int) -> Context:
    return Context(
        context.recipe, context.team, context.store, context.chat, context.prompts, context.tracker, context.console,
        round,
    )  # fmt: skip


def _rows(context: Context) -> list[dict[str, float]]:
    rows = [row for stage in ("reward", "ppo") for row in context.store.metrics(stage)]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def _share_of_threes(groups: list[Any]) -> float:
    tokens = [token for group in groups for answer in group.answers for token in answer.token_ids]
    return tokens.count(3) / len(tokens)
