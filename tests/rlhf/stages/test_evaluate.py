import math

import pytest
import torch

from rlhf.errors import StoreError
from rlhf.stages import evaluate, ppo
from rlhf.text import bits_per_byte, text_groups
from tests.fakes import WordChat
from tests.rlhf.stages.conftest import MakeContext


def test_a_policy_that_learned_wins_on_held_out_prompts(make_context: MakeContext) -> None:
    context = make_context(ppo={"num_steps": 12})
    ppo.run(context)
    results = evaluate.run(context)
    assert results["win_rate_low"] > 0.5  # type: ignore[operator]
    before, after = results["before"], results["after"]
    assert after["judge_score"] > before["judge_score"] and after["kl"] > 0 == before["kl"]  # type: ignore[index]
    assert results["judge_trained_on"] is True


def test_before_is_the_starting_point_and_both_sides_draw_with_the_same_seeds(make_context: MakeContext) -> None:
    context = make_context()
    ppo.run(context)
    context.team.generator.requests.clear()  # type: ignore[attr-defined]
    evaluate.run(context)
    requests = context.team.generator.requests  # type: ignore[attr-defined]
    assert requests[:2] == requests[2:]
    start = evaluate.starting_point(context.team.policy.adapter())
    assert start.version == 0 and not start.tensors["lora_B"].any()


def test_evaluating_before_ppo_is_an_error(make_context: MakeContext) -> None:
    with pytest.raises(StoreError, match="ppo"):
        evaluate.run(make_context())


def test_a_judge_that_is_an_untrained_reward_model_is_refused(make_context: MakeContext) -> None:
    context = make_context(evaluate={"judge": "reward"})
    ppo.run(context)
    with pytest.raises(StoreError, match="the run has none"):
        evaluate.run(context)


def test_an_evaluation_that_is_repeated_leaves_one_row(make_context: MakeContext) -> None:
    context = make_context()
    ppo.run(context)
    evaluate.run(context)
    evaluate.run(context)
    assert len(context.store.metrics("evaluate")) == 1


def test_a_rising_reward_and_a_falling_judge_give_a_warning(make_context: MakeContext) -> None:
    context = make_context(
        rules=[{"name": "tests.rlhf.stages.scores.zeros"}],
        ppo={"evaluate_every": 1, "num_steps": 2, "evaluate_prompts": 6},
    )
    ppo.run(context)
    assert context.console.warned == []  # type: ignore[attr-defined]
    exploited = make_context(
        "exploited", rules=[{"name": "tests.rlhf.stages.scores.zeros"}], ppo={"score": "reward", "evaluate_prompts": 6}
    )
    team = exploited.team
    team.reward.weight = 1.0  # type: ignore[attr-defined]
    loop = evaluate.InLoop(exploited)
    loop.measure(0)
    team.generator.logits = torch.nn.functional.one_hot(torch.tensor(3), 8).float()  # type: ignore[attr-defined]
    loop.measure(1)
    (warning,) = exploited.console.warned  # type: ignore[attr-defined]
    assert "rose by 1.00" in warning and "(rules) fell by 1.00" in warning


def test_bits_per_byte_of_a_uniform_model_is_the_entropy_of_its_vocabulary(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "text.txt"
    path.write_text("abcdefghabcdefgh" * 100)
    groups = text_groups(str(path), WordChat(), 600)  # type: ignore[arg-type]
    lengths = [len(group.answers[0].token_ids) for group in groups]
    assert lengths == [511, 87]
    logprobs = torch.zeros(2, 511)
    for row, length in enumerate(lengths):
        logprobs[row, :length] = -math.log(8)
    assert bits_per_byte(logprobs, groups) == pytest.approx(3.0)
