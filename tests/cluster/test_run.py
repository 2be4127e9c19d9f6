"""The controller on fakes: order, what is skipped, what is closed, and how it stops."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from cluster.console import LineConsole
from cluster.preview import page, preview
from cluster.run import Outcome, exit_code, places, run
from cluster.runs import list_runs
from configs.errors import ConfigError
from configs.schema import ALIGNMENT, RankConfig, Recipe
from rlhf.errors import DataError, ScoreError
from rlhf.ports import Console, Generator
from rlhf.records import Answer, Prompt
from rlhf.store import RunStore
from tests.fakes import FakeTeam
from tests.recipes import tiny_recipe


class Rig:
    """A console that keeps what is printed, and teams that are counted."""

    def __init__(self) -> None:
        self.out = StringIO()
        self.console = LineConsole(self.out)
        self.events: list[str] = []
        self.team = FakeTeam()

    @contextmanager
    def make_team(self, recipe: Recipe, console: Console) -> Iterator[Any]:
        self.events.append("opened")
        try:
            yield self.team
        finally:
            self.events.append("closed")

    def run(self, recipe: Recipe, **options: Any) -> Outcome:
        return run(recipe, self.console, make_team=self.make_team, **options)

    def code(self, work: Callable[[], object]) -> int:
        return exit_code(self.console, "tenfold run r.yaml", lambda: (work(), None)[1])


def first_token(prompt: Prompt, answer: Answer) -> float:
    """A rule that seldom ties."""
    return answer.token_ids[0] / 300


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr("tests.fakes.VOCABULARY", 300)  # as many as the real tokenizer's, whose prompts are used
    return Rig()


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    rules = [{"name": f"{__name__}.first_token"}]
    return tiny_recipe(
        tiny_model, tmp_path, rules=rules, tracker={"mode": "disabled"}, sampling={"n": 4, "max_answer_tokens": 2}
    )


def test_all_stages_run_in_order_and_leave_their_results(rig: Rig, recipe: Recipe) -> None:
    outcome = rig.run(recipe)
    assert tuple(outcome.results) == ALIGNMENT
    assert outcome.results["sample"]["num_answers"] == 32
    assert all({"time_s", "peak_memory_gib"} <= set(found) for found in outcome.results.values())
    assert rig.events == ["opened", "closed"]
    assert outcome.places.run == str(Path(recipe.runs) / "tiny")
    assert Path(outcome.places.adapter).is_dir()


def test_what_is_done_is_skipped_and_said_and_needs_no_team(rig: Rig, recipe: Recipe) -> None:
    first = rig.run(recipe)
    again = rig.run(recipe)
    assert again.results == first.results
    assert rig.events == ["opened", "closed"]
    for stage in ALIGNMENT:
        assert f"{stage}: done before, skipped" in rig.out.getvalue()


def test_one_stage_can_be_run_alone_and_the_next_command_goes_on(rig: Rig, recipe: Recipe) -> None:
    assert set(rig.run(recipe, only=("sample",)).results) == {"sample"}
    assert set(rig.run(recipe, only=("rank",)).results) == {"rank"}
    requests = len(rig.team.generator.requests)
    rig.run(recipe, only=("sample",))
    assert len(rig.team.generator.requests) == requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"num_prompts": 500}}, "ppo.num_prompts=500"),
        ({"data": {"held_out": 0.0}}, "data.held_out=0.0"),
        ({"evaluate": {"text": "no/such/file.txt"}}, "no/such/file.txt"),
        ({"sampling": {"max_answer_tokens": 5000}}, "context has 1024"),
        ({"rules": [{"name": "complet"}]}, "complet"),
    ],
)
def test_a_recipe_that_cannot_end_well_starts_no_team(
    rig: Rig, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base: dict[str, Any] = {"rules": [{"name": "complete"}], "tracker": {"mode": "disabled"}}
    recipe = tiny_recipe(tiny_model, tmp_path, **(base | changes))
    assert rig.code(lambda: rig.run(recipe)) == 2
    assert message in rig.out.getvalue()
    assert "Traceback" not in rig.out.getvalue()
    assert rig.events == []


def interrupted_after(num: int, rig: Rig, interrupt: Callable[[], object]) -> None:
    """Lets the generator interrupt its request number `num`."""
    generator: Generator = rig.team.generator
    answer = generator.answer

    def interrupting(*values: Any) -> Any:
        if len(rig.team.generator.requests) == num:
            interrupt()
        return answer(*values)

    generator.answer = interrupting  # type: ignore[method-assign]


def raises_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("interrupt", "code"),
    [
        (raises_interrupt, 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (lambda: exec("raise SystemExit(15)"), 143),  # what Ray makes of SIGTERM
    ],
)
def test_an_interrupted_run_closes_all_keeps_what_is_committed_and_says_how_to_go_on(
    rig: Rig, recipe: Recipe, interrupt: Callable[[], object], code: int
) -> None:
    interrupted_after(1, rig, interrupt)
    before = signal.getsignal(signal.SIGTERM)
    assert rig.code(lambda: rig.run(recipe)) == code
    assert rig.events == ["opened", "closed"]
    assert "stopped; what was committed is kept; go on with `tenfold run r.yaml`" in rig.out.getvalue()
    assert signal.getsignal(signal.SIGTERM) is before
    with RunStore.open(recipe.runs, recipe) as store:  # the lock is free again
        assert len(store.groups("sample", 0)) == 4
    del rig.team.generator.answer  # type: ignore[attr-defined]
    assert rig.run(recipe).results["sample"]["num_answers"] == 32


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("prompts.jsonl, line 3: bad.", remedy="Mend it."), 2, "error: prompts.jsonl, line 3: bad. Mend it."),
        (ConfigError("r.yaml: 1 problem"), 2, "error: r.yaml: 1 problem"),
        (ValueError("surprise"), 1, "ValueError: surprise"),
    ],
)
def test_the_users_errors_are_told_in_a_message_and_ours_with_a_traceback(
    rig: Rig, error: Exception, code: int, said: str
) -> None:
    def work() -> None:
        raise error

    assert rig.code(work) == code
    assert said in rig.out.getvalue()
    assert ("Traceback" in rig.out.getvalue()) == (code == 1)


def test_a_bug_does_not_print_a_secret(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "abcd1234efgh5678")

    def work() -> None:
        raise ValueError("cannot log in with abcd1234efgh5678")

    assert rig.code(work) == 1
    assert "abcd1234efgh5678" not in rig.out.getvalue()


def test_a_stage_that_raises_loses_nothing_that_was_committed(rig: Rig, recipe: Recipe) -> None:
    def fails() -> None:
        raise ScoreError("The rule broke.")

    interrupted_after(1, rig, fails)
    assert rig.code(lambda: rig.run(recipe)) == 2
    with RunStore.open(recipe.runs, recipe) as store:
        assert not store.done("sample")
        assert len(store.groups("sample", 0)) == 4


def test_a_recipe_without_rules_can_run_the_stages_that_need_none(rig: Rig, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path, rules=[], stages=["sample"], tracker={"mode": "disabled"})
    assert rig.run(recipe).results["sample"]["num_prompts"] == 8


def test_a_reward_that_is_nan_is_told_and_what_was_committed_is_kept(
    rig: Rig, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.run(recipe, only=["sample", "rank", "reward"])
    monkeypatch.setattr(
        "tests.fakes.CountingReward.load_state", lambda self, state: setattr(self, "gain", float("nan"))
    )
    scored = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"score": "reward"})})
    assert rig.code(lambda: rig.run(scored, only=["ppo"])) == 2
    told = " ".join(rig.out.getvalue().split())
    assert "the score nan" in told and "on_bad_score=drop" in told
    with RunStore.open(recipe.runs, recipe) as store:
        assert store.done("reward") and len(store.rankings(0)) == 8


def test_the_models_that_a_run_made_are_named_among_its_places(tmp_path: Path) -> None:
    for name in ("base", "sft", "law", "policy"):
        (tmp_path / "models" / name).mkdir(parents=True)
    found = places(tmp_path)
    assert [what for what, _ in found.models] == ["pretrained model", "adapter law", "aligned model"]
    assert found.adapter == str(tmp_path / "models" / "policy")


def in_rounds(recipe: Recipe, rounds: int, **ppo: Any) -> Recipe:
    return recipe.model_copy(update={"rounds": rounds, "ppo": recipe.ppo.model_copy(update=ppo)})


def test_rounds_run_in_order_and_one_evaluation_ends_them(rig: Rig, recipe: Recipe) -> None:
    outcome = rig.run(in_rounds(recipe, 2))
    repeated = ["sample", "rank", "reward", "ppo"]
    assert list(outcome.results) == [*repeated, *(f"{stage}-1" for stage in repeated), "evaluate"]
    assert outcome.results["ppo-1"]["first"]["step"] == recipe.ppo.num_steps + 1  # type: ignore[index]
    assert dict(outcome.places.models).keys() == {"adapter policy-round-1", "adapter policy-round-2"}
    assert list_runs(Path(recipe.runs))[0]["state"] == "done"
    again = rig.run(in_rounds(recipe, 2))
    assert again.results == outcome.results and rig.events == ["opened", "closed"]
    assert "reward of round 2: done before, skipped" in rig.out.getvalue()


def test_another_round_can_be_added_and_the_evaluation_is_done_again(rig: Rig, recipe: Recipe) -> None:
    first = rig.run(recipe)
    more = rig.run(in_rounds(recipe, 2), accept=["rounds"])
    assert {key: more.results[key] for key in ("sample", "rank", "reward", "ppo")} == {
        key: first.results[key] for key in ("sample", "rank", "reward", "ppo")
    }
    assert "ppo-1" in more.results and more.results["evaluate"] != first.results["evaluate"]


def test_a_stage_alone_is_run_in_the_rounds_that_can_be_begun(rig: Rig, recipe: Recipe) -> None:
    two = in_rounds(recipe, 2)
    assert set(rig.run(two, only=["sample"]).results) == {"sample"}
    (row,) = list_runs(Path(recipe.runs))
    assert row["state"] == "stopped" and row["stage"] == "sample"
    rig.run(two, only=["rank"])
    rig.run(two, only=["reward"])
    rig.run(two, only=["ppo"])
    assert set(rig.run(two, only=["sample"]).results) == {"sample", "sample-1"}


def test_the_number_of_steps_is_fixed_once_there_are_rounds(rig: Rig, recipe: Recipe) -> None:
    rig.run(in_rounds(recipe, 2))
    more = in_rounds(recipe, 2, num_steps=recipe.ppo.num_steps + 1)
    assert rig.code(lambda: rig.run(more, accept=["ppo"])) == 2
    assert f"Set ppo.num_steps={recipe.ppo.num_steps}" in " ".join(rig.out.getvalue().split())


@pytest.mark.parametrize(
    ("desk", "why"),
    [
        ({"database": "postgresql://tenfold@127.0.0.1:1/x"}, r"tenfold@127.0.0.1:1/x cannot be read or written"),
        ({"guidelines": "no/such/guidelines.md"}, r"no/such/guidelines.md cannot be read"),
    ],
)
def test_a_desk_that_cannot_be_used_is_told_before_anything_is_sampled(
    rig: Rig, recipe: Recipe, desk: dict[str, Any], why: str
) -> None:
    asked = recipe.model_copy(update={"rank": RankConfig(judge="people"), "desk": recipe.desk.model_copy(update=desk)})
    assert rig.code(lambda: rig.run(asked)) == 2
    assert why in " ".join(rig.out.getvalue().split()) and rig.events == []


def test_rankings_that_cannot_be_learned_are_told_before_anything_is_sampled(
    rig: Rig, recipe: Recipe, tmp_path: Path
) -> None:
    file = tmp_path / "lists.jsonl"
    asked = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"rankings": str(file)})})
    assert rig.code(lambda: rig.run(asked)) == 2
    file.write_text('{"prompt": "sun?", "answers": ["moon"]}\n')
    assert rig.code(lambda: rig.run(asked)) == 2
    said = " ".join(rig.out.getvalue().split())
    assert f"{file}, line 1: " in said and "Row 1 of the rankings cannot be taken in: 'tiers' is missing" in said
    assert rig.events == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [(" ", "answer 1 is empty"), ("x" * 2000, "tokens with its prompt")],
)
def test_a_ranked_answer_that_no_model_can_learn_is_told_before_anything_is_sampled(
    rig: Rig, recipe: Recipe, tmp_path: Path, answer: str, why: str
) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps({"prompt": "sun?", "ranked_answers": ["moon", answer]}) + "\n")
    asked = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"rankings": str(file)})})
    assert rig.code(lambda: rig.run(asked)) == 2
    assert why in " ".join(rig.out.getvalue().split()) and rig.events == []


def test_a_reward_model_of_a_files_rankings_asks_for_no_prompts(rig: Rig, recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    rows = [{"prompt": f"sun {i}?", "ranked_answers": ["moon", "stone"]} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = recipe.model_dump(mode="json") | {"stages": ["reward"], "rules": [], "data": {}}
    plain["reward"]["rankings"] = str(file)
    alone = Recipe.model_validate(plain)
    shown = StringIO()
    LineConsole(shown).show(page(preview(alone)))
    assert "none are asked for" in shown.getvalue() and "()" not in shown.getvalue()
    assert rig.run(alone).results["reward"]["num_train"] == 6
    with pytest.raises(ValueError, match=r"data.prompts is missing"):
        Recipe.model_validate(plain | {"stages": ["reward", "ppo"]})
    with pytest.raises(DataError, match=r"data.prompts=\(\) holds no prompt"):
        rig.run(alone, only=["sample"])
