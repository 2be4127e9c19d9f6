"""What a recipe may not say."""

import pytest
from pydantic import ValidationError

from configs.problems import validation_problems
from configs.schema import Recipe

BASE = {"name": "a", "model": {"path": "m"}, "data": {"prompts": "p.jsonl"}, "rules": [{"name": "short"}]}


def refusal(**sections: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(BASE | sections)
    return str(caught.value)


def test_a_recipe_needs_a_name_a_model_and_prompts_only():
    recipe = Recipe.model_validate(BASE)
    assert recipe.sampling.n == 10
    assert recipe.stages == ("sample", "rank", "reward", "ppo", "evaluate")


def test_a_recipe_is_frozen():
    recipe = Recipe.model_validate(BASE)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_an_unknown_key_is_refused():
    assert "Extra inputs" in refusal(sead=1)
    assert "Extra inputs" in refusal(ppo={"kl": {"betta": 1}})


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 20}])
def test_a_cut_distribution_is_refused_with_the_reason(sampling: dict[str, float]):
    assert "ratio" in refusal(sampling=sampling)


def test_group_advantages_with_kl_in_the_reward_are_refused():
    assert "ppo.kl.where=loss" in refusal(ppo={"advantage": "group"})
    Recipe.model_validate(BASE | {"ppo": {"advantage": "group", "kl": {"where": "loss"}}})
    Recipe.model_validate(BASE | {"ppo": {"advantage": "group", "kl": {"beta": 0}}})


def test_a_critic_warmup_without_critic_or_without_end_is_refused():
    group = {"advantage": "group", "kl": {"where": "loss"}, "critic_warmup_steps": 1}
    assert "no critic" in refusal(ppo=group)
    assert "leaves no step" in refusal(ppo={"num_steps": 3, "critic_warmup_steps": 3})


def test_stale_answers_without_importance_weights_are_refused_and_so_is_more_than_one_step():
    assert "set ppo.is_clip (2.0)" in refusal(ppo={"max_staleness": 1, "is_clip": None})
    assert "less than or equal to 1" in refusal(ppo={"max_staleness": 2})
    Recipe.model_validate(BASE | {"ppo": {"max_staleness": 1}})
    Recipe.model_validate(BASE | {"ppo": {"is_clip": None}})


def test_rules_that_are_asked_for_must_be_listed():
    assert "lists no rules" in refusal(rules=[])
    only_ppo = {"stages": ["ppo"], "ppo": {"score": "reward"}, "rules": []}
    Recipe.model_validate(BASE | only_ppo)
    assert "ppo.score" in refusal(**(only_ppo | {"ppo": {"score": {"reward": 1, "rules": 0.5}}}))


def test_zero_3_on_a_shared_base_is_refused():
    assert "ZeRO 0 to 2" in refusal(learner={"zero_stage": 3})
    Recipe.model_validate(BASE | {"learner": {"zero_stage": 3}, "cluster": {"placement": "separate"}})


def test_training_on_more_answers_than_there_are_is_refused():
    assert "6 + 5 of sampling.n=10" in refusal(ppo={"train_on": {"best": 6, "worst": 5}})


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(name: str):
    assert "name" in refusal(name=name)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(weight: float):
    assert "finite" in refusal(rules=[{"name": "short", "weight": weight}])


def test_what_would_crash_or_do_nothing_in_a_worker_is_refused_here():
    assert "weighs nothing" in refusal(ppo={"score": {}})
    assert "less than 1" in refusal(ppo={"optimizer": {"betas": [0.9, 1.0]}})
    assert "greater than 0" in refusal(ppo={"optimizer": {"eps": 0}})
    assert "stay 0" in refusal(ppo={"kl": {"adaptive": True, "beta": 0}})
    group = {"advantage": "group", "kl": {"where": "loss"}, "value_init": "reward"}
    assert "no critic to start" in refusal(ppo=group)


def test_the_reward_model_is_needed_by_the_stages_that_ask_for_it():
    recipe = Recipe.model_validate(BASE | {"ppo": {"score": "rules"}})
    assert recipe.uses_reward(["reward"])
    assert not recipe.uses_reward(["sample", "rank", "ppo", "evaluate"])
    judged = Recipe.model_validate(
        BASE | {"ppo": {"score": "rules", "evaluate_every": 1}, "evaluate": {"judge": "reward"}}
    )
    assert judged.uses_reward(["ppo"]) and judged.uses_reward(["evaluate"]) and not judged.uses_reward(["rank"])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("rewards", "should be 'reward', 'rules' or the address"),
        ("ftp://scores.example", "should be 'reward', 'rules' or the address"),
        ("http://scores.example/a b", "should be 'reward', 'rules' or the address"),
        ("http://user:secret@scores.example", "token_env"),
        ("http:///score", "names no host"),
    ],
)
def test_a_source_of_scores_that_cannot_be_one_is_refused(address: str, message: str):
    assert message in refusal(ppo={"score": address})
    assert message in refusal(ppo={"score": {address: 1.0}})
    assert message in refusal(evaluate={"judge": address})


def test_a_server_called_reward_or_rules_is_neither():
    addresses = {"http://rules.example/reward": 1.0, "https://reward.example": 0.5}
    recipe = Recipe.model_validate(
        BASE
        | {"rules": [], "rank": {"judge": "reward"}, "ppo": {"score": addresses}}
        | {"evaluate": {"judge": "http://rules.example/judge"}}
    )
    assert not recipe.uses_reward(["ppo", "evaluate"])
    assert recipe.score_servers(["ppo"]) == tuple(addresses)
    assert recipe.score_servers(["ppo", "evaluate"]) == (*addresses, "http://rules.example/judge")
    assert recipe.score_servers(["sample", "rank", "reward"]) == ()


def test_more_answers_than_there_are_letters_are_refused_where_people_rank():
    asked = {"rank": {"judge": "people"}, "sampling": {"n": 27}}
    assert "people rank at most 26" in refusal(**asked)
    Recipe.model_validate(BASE | asked | {"sampling": {"n": 26}})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:secret@host/db",
        "postgresql+pg8000://ann:@host/db",
        "postgresql://host/db?user=ann&password=secret",
        "sqlite:///secret.db",
        "mysql://secret@host/db",
        "secret",
    ],
)
def test_a_desk_database_with_a_password_or_of_another_kind_is_refused_without_showing_it(url: str):
    tree = BASE | {"desk": {"database": url}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(tree)
    (problem,) = validation_problems(caught.value, tree)
    assert "desk" in problem and "secret" not in problem
    Recipe.model_validate(BASE | {"desk": {"database": "postgresql://ann@host:5432/db"}})


def test_rounds_need_the_stages_that_they_repeat():
    assert "stages lacks rank, reward" in refusal(rounds=2, stages=["sample", "ppo"])
    Recipe.model_validate(BASE | {"rounds": 2, "stages": ["sample", "rank", "reward", "ppo"]})


def test_what_a_cluster_cannot_do_is_refused():
    assert "cpus_per_worker" in refusal(cluster={"resources": {"generator": {"CPU": 1}}})
    assert "greater than 0" in refusal(cluster={"resources": {"generator": {"fast": 0}}})
    assert "set address" in refusal(cluster={"autoscale": True, "gpus": 0})
    assert "set gpus to a number" in refusal(cluster={"autoscale": True, "address": "h:6379"})
    Recipe.model_validate(BASE | {"cluster": {"autoscale": True, "address": "h:6379", "gpus": 8}})
