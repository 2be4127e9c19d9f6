"""Recipes from YAML: what is read, what is overridden, and what each mistake is told."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import absolute, difference, dump_recipe, load_recipe, make_recipe
from configs.schema import Recipe

BASE = "name: a\nmodel: {path: m}\ndata: {prompts: p.jsonl}\nrules: [{name: short}]\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "pydantic" not in message and "For further information" not in message
    return message


def test_a_recipe_is_read_and_the_rest_are_defaults(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert (recipe.name, recipe.rules[0].name, recipe.ppo.num_steps) == ("a", "short", 100)


def test_a_section_that_is_named_in_part_keeps_the_rest_of_its_default(recipe_file: Path):
    whole = load_recipe(recipe_file)
    part = load_recipe(recipe_file, ["pretrain.optimizer.lr=1e-3", "sft.optimizer.lr=1e-3", "ppo.optimizer.eps=1e-6"])
    assert part.pretrain.optimizer == whole.pretrain.optimizer.model_copy(update={"lr": 1e-3})
    assert part.sft.optimizer == whole.sft.optimizer.model_copy(update={"lr": 1e-3})
    assert part.ppo.optimizer == whole.ppo.optimizer.model_copy(update={"eps": 1e-6})
    assert whole.pretrain.optimizer.schedule == whole.sft.optimizer.schedule == "cosine"  # not AdamW's own default


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pretrain.held_out=1", "pretrain.held_out"),
        ("sft.held_out=1.0", "sft.held_out"),
        ("pretrain.sources=[{path: a, weight: 1.0e+30}]", "weight"),
        ("sft.sources=[{path: a, weight: 0}]", "weight"),
        ("lora.targets=[]", "lora.targets"),
    ],
)
def test_a_value_that_would_leave_nothing_to_train_is_refused(recipe_file: Path, override: str, told: str):
    assert told in refusal(recipe_file, override)


def test_overrides_are_yaml_and_reach_every_depth(recipe_file: Path):
    overrides = [
        "seed=7",
        "ppo.kl.beta=0.1",
        "ppo.optimizer.lr=1e-6",
        "ppo.score={reward: 1, rules: 0.5}",
        "rules.0.weight=2",
        "data.limit=null",
        "lora.targets=[q_proj, v_proj]",
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.seed == 7
    assert recipe.ppo.kl.beta == 0.1
    assert recipe.ppo.optimizer.lr == 1e-6
    assert recipe.ppo.score == {"reward": 1.0, "rules": 0.5}
    assert recipe.rules[0].weight == 2
    assert recipe.data.limit is None
    assert recipe.lora.targets == ("q_proj", "v_proj")


def test_an_unknown_key_is_told_the_nearest_name_at_its_level(recipe_file: Path):
    assert "ppo.num_step: unknown key; did you mean ppo.num_steps?" in refusal(recipe_file, "ppo.num_step=3")
    assert "rules.0.nam: unknown key; did you mean rules.0.name?" in refusal(recipe_file, "rules.0.nam=x")
    assert "ppo.kl.betta: unknown key; did you mean ppo.kl.beta?" in refusal(recipe_file, "ppo.kl.betta=1")


def test_an_unknown_key_that_stands_elsewhere_is_told_where(recipe_file: Path):
    assert "did you mean ppo.kl.beta?" in refusal(recipe_file, "beta=0.1")


def test_an_unknown_key_like_no_other_is_told_which_there_are(recipe_file: Path):
    assert "known in data are prompts, system, held_out" in refusal(recipe_file, "data.zzz=1")


def test_every_problem_is_told_at_once(recipe_file: Path):
    message = refusal(recipe_file, "sead=1", "ppo.clip_low=1.5", "rank.judge=rule")
    assert "3 problems" in message
    assert "sead: unknown key; did you mean seed?" in message
    assert "ppo.clip_low: 1.5: should be less than 1" in message
    assert "rank.judge: 'rule': should be 'rules', 'reward' or 'people'" in message


def test_contradictory_keys_are_told_in_the_words_of_the_schema(recipe_file: Path):
    message = refusal(recipe_file, "ppo.advantage=group")
    assert "ppo: advantage=group with kl.where=reward" in message
    assert "Value error" not in message


def test_a_missing_key_is_named(recipe_file: Path):
    message = refusal(recipe_file, text="name: a\ndata: {}\nrules: [{name: short}]\n")
    assert "model.path is missing" in message
    assert "data.prompts is missing" in message


def test_a_wrong_type_is_told_with_key_and_value(recipe_file: Path):
    assert "ppo: 3: should be a section" in refusal(recipe_file, "ppo=3")
    assert "seed: 'many': should be a whole number" in refusal(recipe_file, "seed=many")
    message = refusal(recipe_file, "lora.targets=7")
    assert "lora.targets: 7: should be a list; or 7: should be 'all-linear'" in message


def test_a_value_is_never_converted_silently(recipe_file: Path):
    assert "ppo.num_steps: True: should be a number" in refusal(recipe_file, "ppo.num_steps=yes")
    assert "seed: '3': should be a number" in refusal(recipe_file, "seed='3'")
    assert "ppo.whiten: 1: should be true or false" in refusal(recipe_file, "ppo.whiten=1")


def test_an_inner_mistake_of_a_choice_hides_the_outer_complaint(recipe_file: Path):
    message = refusal(recipe_file, "ppo.score={reward: 1, ruels: 2}")
    assert "1 problem" in message and "ppo.score.ruels" in message


def test_a_missing_file_is_told_its_neighbour(recipe_file: Path):
    assert f"Did you mean {recipe_file}?" in refusal(recipe_file.with_name("recipy.yaml"))
    assert "There is no recipe" in refusal(recipe_file.parent / "nowhere" / "x.yaml")
    (recipe_file.parent / "empty").mkdir()
    (recipe_file.parent / "empty" / ".pre-commit-config.yaml").touch()  # no recipe
    assert "Give the path of a YAML file" in refusal(recipe_file.parent / "empty" / "x.yaml")


def test_malformed_yaml_is_told_with_its_line(recipe_file: Path):
    assert "line 3" in refusal(recipe_file, text="name: a\nmodel: [1\ndata: 2\n")


def test_a_key_that_stands_twice_is_refused(recipe_file: Path):
    message = refusal(recipe_file, text=BASE + "name: b\n")
    assert "line 5" in message and "'name' stands twice, first in line 1" in message


@pytest.mark.parametrize(("text", "told"), [("", "is empty"), ("- a\n", "holds a list"), ("\0", "not")])
def test_a_file_that_is_no_mapping_is_refused(recipe_file: Path, text: str, told: str):
    assert told in refusal(recipe_file, text=text)


def test_a_file_that_is_not_utf8_is_refused(recipe_file: Path):
    recipe_file.write_bytes(b"name: \xff\n")
    assert "cannot be read" in refusal(recipe_file)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("ppo..x=3", "key=value"),
        ("name.x=3", "name is 'a', which has no keys"),
        ("rules.1.weight=3", "rules is a list of 1"),
        ("rules.first.weight=3", "rules is a list of 1"),
        ("seed=[1", "not YAML"),
    ],
)
def test_a_malformed_override_is_told(recipe_file: Path, override: str, told: str):
    assert told in refusal(recipe_file, override)


def test_a_dumped_recipe_is_read_back_equal(recipe_file: Path):
    recipe = load_recipe(
        recipe_file, ["ppo.score={rules: 1}", "ppo.train_on={best: 2, worst: 1}", "data.system='你好: #'"]
    )
    recipe_file.write_text(dump_recipe(recipe))
    assert load_recipe(recipe_file) == recipe


@settings(deadline=None)
@given(lr=st.floats(min_value=1e-300, max_value=1e300), beta=st.floats(min_value=0, max_value=1e10))
def test_numbers_survive_a_dump_exactly(lr: float, beta: float, tmp_path_factory: pytest.TempPathFactory):
    tree = {"name": "a", "model": {"path": "m"}, "data": {"prompts": "p"}, "rules": [{"name": "short"}]}
    recipe = make_recipe(tree | {"ppo": {"optimizer": {"lr": lr}, "kl": {"beta": beta}}}, "test")
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_difference_names_the_keys_that_differ(recipe_file: Path):
    one, other = load_recipe(recipe_file), load_recipe(recipe_file, ["ppo.kl.beta=0.5", "ppo.score={rules: 2}"])
    assert difference(one, one) == []
    assert difference(one, other) == [
        "ppo.score: reward -> (not set)",
        "ppo.kl.beta: 0.05 -> 0.5",
        "ppo.score.rules: (not set) -> 2.0",
    ]


def test_the_schema_knows_every_key_it_dumps(recipe_file: Path):
    assert set(Recipe.model_fields) == set(load_recipe(recipe_file).model_dump())


def test_paths_become_absolute_and_all_else_stays(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    sources = "[chatterbot:coding, some/*.jsonl]"
    words = ["model.path=base", f"data.prompts={sources}", "evaluate.text=missing.txt", "checkpoints.mirror=second"]
    recipe = absolute(load_recipe(recipe_file, words))
    assert recipe.model.path == str(tmp_path / "base")
    assert recipe.data.prompts == ("chatterbot:coding", str(tmp_path / "some/*.jsonl"))
    assert recipe.evaluate.text == str(tmp_path / "missing.txt")  # it may be there later
    assert recipe.checkpoints.mirror == str(tmp_path / "second")
    url = load_recipe(recipe_file, ["checkpoints.mirror=s3://bucket/runs"])
    assert absolute(url).checkpoints.mirror == "s3://bucket/runs"


def test_a_password_in_the_mirror_is_refused(recipe_file: Path):
    with pytest.raises(ConfigError, match="give them in the environment"):
        load_recipe(recipe_file, ["checkpoints.mirror=ftp://ann:secret@host/runs"])
