from typing import Any

import pytest
import torch

from rlhf.errors import ScoreError, StoreError, SyncError
from rlhf.stages import ppo, rank, reward, sample
from rlhf.stages.context import Context
from tests.rlhf.runs import flip_a_byte
from tests.rlhf.stages.conftest import MakeContext
from tests.score_server import ScoreServer, by_length, says


def metrics_of(context: Context) -> list[dict[str, Any]]:
    """All rows of the loop without what the clock says."""
    rows = context.store.metrics("ppo")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_the_score_rises(make_context: MakeContext) -> None:
    context = make_context(ppo={"num_steps": 12})
    results = ppo.run(context)
    assert results["last"]["objective/scores"] > results["first"]["objective/scores"] + 0.2  # type: ignore[index]
    assert context.store.load_role("policy") is not None
    assert all(row["memory/trainer-0_pss_gib"] == 1.0 for row in metrics_of(context))


def test_three_steps_and_a_resume_and_three_steps_are_six_steps(make_context: MakeContext) -> None:
    whole = make_context("whole")
    ppo.run(whole)
    rows, policy = metrics_of(whole), whole.team.policy.logits.detach()  # type: ignore[attr-defined]

    halted = make_context("halted")
    update, calls = halted.team.policy.update, []

    def stops_at_the_fourth(rollout):  # type: ignore[no-untyped-def]
        calls.append(rollout)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(rollout)

    halted.team.policy.update = stops_at_the_fourth  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ppo.run(halted)
    resumed = make_context("halted")
    ppo.run(resumed)
    assert "going on from the checkpoint of step 3" in resumed.console.said[0]  # type: ignore[attr-defined]
    assert metrics_of(resumed) == rows
    assert torch.equal(resumed.team.policy.logits.detach(), policy)  # type: ignore[attr-defined]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def interrupted(context: Context, role: str, method: str, at: int) -> None:
    """Runs the loop until the role's method is called for the `at`-th time, which interrupts it."""
    target = getattr(context.team, role)
    original, calls = getattr(target, method), []

    def interrupting(*values: Any, **keywords: Any) -> Any:
        calls.append(values)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*values, **keywords)

    setattr(target, method, interrupting)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(context)


@pytest.mark.parametrize(
    ("role", "method", "at", "asked_again"),
    [
        ("generator", "answer", 5, 1),  # steps 2 and 3 are journaled, 4 was in flight
        ("policy", "update", 5, 1),  # answers and scores of step 4 are there
        ("critic", "values", 5, 1),
        ("generator", "load_adapter", 6, 1),
    ],
)
def test_what_a_step_finished_since_the_checkpoint_is_used_again_and_the_rest_is_done_again(
    make_context: MakeContext, role: str, method: str, at: int, asked_again: int
) -> None:
    changes: dict[str, Any] = {"ppo": {"save_every": 2}}
    whole = make_context("whole", **changes)
    ppo.run(whole)
    halted = make_context("halted", **changes)
    interrupted(halted, role, method, at)
    resumed = make_context("halted", **changes)
    ppo.run(resumed)
    assert metrics_of(resumed) == metrics_of(whole)
    assert torch.equal(resumed.team.policy.logits, whole.team.policy.logits)  # type: ignore[attr-defined]
    requests = [*halted.team.generator.requests, *resumed.team.generator.requests]  # type: ignore[attr-defined]
    assert requests == whole.team.generator.requests  # type: ignore[attr-defined]


def test_scores_are_not_asked_for_again_and_dropped_groups_stay_dropped(make_context: MakeContext) -> None:
    changes: dict[str, Any] = {
        "rules": [{"name": "tests.rlhf.stages.scores.breaks_on_p1"}],
        "on_bad_score": "drop",
        "ppo": {"num_prompts": 12, "save_every": 3},
    }
    whole, halted = make_context("whole", **changes), make_context("halted", **changes)
    ppo.run(whole)
    interrupted(halted, "policy", "update", 2)
    resumed = make_context("halted", **changes)
    ppo.run(resumed)
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(make_context: MakeContext) -> None:
    whole, halted = make_context("whole"), make_context("halted")
    ppo.run(whole)
    interrupted(halted, "policy", "update", 4)
    halted.store.close()
    flip_a_byte(halted.store.folder / "checkpoints" / "ppo" / "step-3" / "policy.safetensors")
    resumed = make_context("halted")
    ppo.run(resumed)
    assert "step-3 is damaged" in resumed.console.warned[0]  # type: ignore[attr-defined]
    assert resumed.console.said[0] == "ppo: going on from the checkpoint of step 2"  # type: ignore[attr-defined]
    assert metrics_of(resumed) == metrics_of(whole)


def test_answers_of_a_policy_that_differs_in_its_last_bits_are_used_and_it_is_said(make_context: MakeContext) -> None:
    halted = make_context(ppo={"save_every": 6})
    interrupted(halted, "policy", "update", 1)
    resumed = make_context(ppo={"save_every": 6})
    resumed.team.policy.logits.data += 1e-7  # type: ignore[attr-defined]
    ppo.run(resumed)
    assert "differs in its last bits" in resumed.console.warned[0]  # type: ignore[attr-defined]


def test_answers_that_were_journaled_under_another_recipe_are_not_used(make_context: MakeContext) -> None:
    halted = make_context(ppo={"save_every": 6})
    interrupted(halted, "policy", "update", 2)
    assert len(halted.team.generator.requests) == 2  # type: ignore[attr-defined]
    changed = make_context(accept=("ppo.gamma",), ppo={"save_every": 6, "gamma": 0.5})
    ppo.run(changed)
    assert len(changed.team.generator.requests) == 6  # type: ignore[attr-defined]
    elsewhere = make_context("placed", ppo={"save_every": 6})
    interrupted(elsewhere, "policy", "update", 2)
    moved = make_context("placed", accept=("cluster",), ppo={"save_every": 6}, cluster={"threads": 2})
    ppo.run(moved)
    assert len(moved.team.generator.requests) == 4  # type: ignore[attr-defined]


def test_a_fixed_kl_coefficient_is_the_recipes_and_one_that_moves_is_the_checkpoints(make_context: MakeContext) -> None:
    halted = make_context(ppo={"kl": {"beta": 0.01}})
    interrupted(halted, "policy", "update", 3)
    changed = make_context(accept=("ppo.kl.beta",), ppo={"kl": {"beta": 0.5}})
    ppo.run(changed)
    assert [row["objective/beta"] for row in metrics_of(changed)] == [0.01, 0.01, 0.5, 0.5, 0.5, 0.5]
    without = make_context("none")
    interrupted(without, "policy", "update", 3)
    zero = make_context("none", accept=("ppo.kl.beta",), ppo={"kl": {"beta": 0.0}})
    ppo.run(zero)
    assert metrics_of(zero)[-1]["objective/beta"] == 0.0


def test_a_critic_cannot_join_in_mid_run(make_context: MakeContext) -> None:
    halted = make_context(ppo={"advantage": "group", "kl": {"where": "loss"}})
    interrupted(halted, "policy", "update", 3)
    with pytest.raises(StoreError, match="the checkpoint of step 2 has no critic"):
        ppo.run(make_context(accept=("ppo",)))


def test_a_run_that_was_done_goes_on_to_more_steps_if_they_are_accepted(make_context: MakeContext) -> None:
    whole, short = make_context("whole", ppo={"num_steps": 6}), make_context("short", ppo={"num_steps": 4})
    ppo.run(whole)
    ppo.run(short)
    longer = make_context("short", accept=("ppo.num_steps",), ppo={"num_steps": 6})
    ppo.run(longer)
    assert metrics_of(longer) == metrics_of(whole)
    assert longer.console.warned == ["From here on the run has another recipe:\n  ppo.num_steps: 4 -> 6"]  # type: ignore[attr-defined]


def test_group_advantages_start_no_critic(make_context: MakeContext) -> None:
    context = make_context(ppo={"advantage": "group", "kl": {"where": "loss"}})
    del context.team.critic  # type: ignore[attr-defined]
    results = ppo.run(context)
    assert results["num_steps"] == 6
    assert context.team.policy.rollouts[0].old_logprobs is None  # type: ignore[attr-defined]


def test_the_critic_warms_up_alone(make_context: MakeContext) -> None:
    context = make_context(ppo={"critic_warmup_steps": 2})
    ppo.run(context)
    assert [rollout.step for rollout in context.team.policy.rollouts] == [2, 3, 4, 5]  # type: ignore[attr-defined]
    assert len([row for row in metrics_of(context) if "loss/value_avg" in row]) == 6


def test_without_a_reward_model_there_is_a_way_out(make_context: MakeContext) -> None:
    with pytest.raises(StoreError, match="reward"):
        ppo.run(make_context(ppo={"score": "reward"}))


def test_the_critic_can_start_from_the_reward_model(make_context: MakeContext) -> None:
    context = make_context(ppo={"score": "reward", "value_init": "reward"})
    sample.run(context)
    rank.run(context)
    reward.run(context)
    weight = context.team.reward.weight  # type: ignore[attr-defined]
    started: list[float] = []
    update = context.team.critic.update

    def spy(rollout):  # type: ignore[no-untyped-def]
        started.append(float(rollout.values[0, 0]))
        return update(rollout)

    context.team.critic.update = spy  # type: ignore[method-assign]
    ppo.run(context)
    assert started[0] == weight


def test_an_answer_of_another_version_stops_the_run(make_context: MakeContext) -> None:
    context = make_context()
    context.team.generator.load_adapter = lambda adapter: {}  # type: ignore[method-assign]
    with pytest.raises(SyncError):
        ppo.run(context)


def test_a_rule_that_raises_stops_or_drops_the_group_as_the_recipe_says(make_context: MakeContext) -> None:
    rule = [{"name": "tests.rlhf.stages.scores.breaks_on_p1"}]
    with pytest.raises(ScoreError, match="cannot read this"):
        ppo.run(make_context("stop", rules=rule, ppo={"num_prompts": 12}))
    dropping = make_context("drop", rules=rule, on_bad_score="drop", ppo={"num_prompts": 12})
    ppo.run(dropping)
    assert [row["completions/dropped_groups"] for row in metrics_of(dropping)] == [1.0] * 6


def test_the_completions_table_shows_the_best_answer_first_and_ties_share_a_rank(make_context: MakeContext) -> None:
    context = make_context(ppo={"missing_eos": "penalty", "missing_eos_penalty": 2.0})
    ppo.run(context)
    stage, step, name, rows = context.tracker.tables[0]  # type: ignore[attr-defined]
    assert (stage, step, name, len(rows)) == ("ppo", 1, "completions", 20)
    cells = [dict(zip(ppo.COLUMNS, row, strict=True)) for row in rows[:10]]
    goals = [cell["score"] - 2.0 * (cell["ended"] == "length") for cell in cells]
    assert goals == sorted(goals, reverse=True)
    assert [cell["rank"] for cell in cells] == [1 + len({g for g in goals if g > goal}) for goal in goals]


def test_an_untrained_reward_model_judges_nothing(make_context: MakeContext) -> None:
    ranking = make_context("rank", rank={"judge": "reward"})
    sample.run(ranking)
    with pytest.raises(StoreError, match=r"rank\.judge=reward asks for the reward model"):
        rank.run(ranking)
    looped = make_context("loop", evaluate={"judge": "reward"}, ppo={"evaluate_every": 1, "evaluate_prompts": 2})
    with pytest.raises(StoreError, match=r"evaluate\.judge=reward"):
        ppo.run(looped)


def test_the_judge_inside_the_loop_is_the_trained_reward_model_after_a_resume_too(make_context: MakeContext) -> None:
    changes: dict[str, Any] = {
        "evaluate": {"judge": "reward"},
        "ppo": {"evaluate_every": 1, "evaluate_prompts": 2, "num_steps": 2},
    }
    first = make_context("judged", **changes)
    sample.run(first)
    rank.run(first)
    reward.run(first)
    trained = first.team.reward.weight  # type: ignore[attr-defined]
    fresh = make_context("judged", **changes)
    assert fresh.team.reward.weight != trained  # type: ignore[attr-defined]
    ppo.run(fresh)
    assert fresh.team.reward.weight == trained  # type: ignore[attr-defined]


def test_the_shares_of_a_step_are_of_all_steps_without_evaluation(make_context: MakeContext) -> None:
    context = make_context()
    row = {"objective/scores": 1.0, "time/sync": 1.0, "time/generate": 4.0, "time/step": 10.0}
    gap = {"sampling/logp_difference_mean": 0.25, "sampling/logp_difference_max": 1.0}
    context.store.log("ppo", 1, row | {"time/step": 30.0, "time/evaluate": 20.0} | gap)
    context.store.log("ppo", 2, row | {"time/save": 0.5} | {name: 2 * value for name, value in gap.items()})
    found = ppo.results(context)
    assert (found["gap_mean"], found["gap_max"]) == (0.375, 2.0)
    assert found["sync_share"] == 2.0 / 20.0
    assert found["times"] == {"sync": 2.0, "generate": 8.0, "step": 40.0, "evaluate": 20.0, "save": 0.5}


def test_what_saving_took_stands_in_the_next_row(make_context: MakeContext) -> None:
    context = make_context(ppo={"num_steps": 2})
    ppo.run(context)
    first, second = context.store.metrics("ppo")
    assert "time/save" not in first and second["time/save"] > 0
    assert {"time/sync", "time/generate", "time/score", "time/update", "time/step"} <= first.keys()


def test_a_score_server_that_dies_stops_the_run_and_nothing_of_it_is_lost(make_context: MakeContext) -> None:
    server = ScoreServer()
    changes: dict[str, Any] = {"ppo": {"score": server.address, "num_steps": 4}, "score_server": {"tries": 1}}
    ppo.run(whole := make_context("whole", **changes))
    rows = metrics_of(whole)
    server.replies = [by_length, by_length, says(500)]  # of the third step
    with pytest.raises(ScoreError, match="HTTP 500"):
        ppo.run(make_context("halted", **changes))
    ppo.run(resumed := make_context("halted", **changes))
    server.close()
    assert metrics_of(resumed) == rows
    assert len(resumed.team.generator.requests) == 1  # type: ignore[attr-defined]  # those of the third step were kept
