import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.chat import ChatTokenizer
from rlhf.desk.desk import open_desk
from rlhf.desk.exchange import rows_of_file
from rlhf.errors import DataError
from rlhf.records import Ranking
from rlhf.stages import people, rank, reward, sample
from rlhf.stages.context import Context
from tests.fakes import answer, group
from tests.rlhf.stages.annotators import Annotators, threes
from tests.rlhf.stages.conftest import MakeContext


def test_the_reward_model_learns_the_rankings_and_is_stored(make_context: MakeContext) -> None:
    context = make_context()
    sample.run(context)
    rank.run(context)
    results = reward.run(context)
    assert results["accuracy"] == 1.0 and results["tau"] == pytest.approx(1.0)
    saved = context.store.load_role("reward")
    assert saved is not None and saved.values["gain"] == results["gain"]


def test_scores_have_mean_0_and_std_1_on_the_starting_answers(make_context: MakeContext) -> None:
    context = make_context(reward={"held_out": 0.0})
    sample.run(context)
    rank.run(context)
    reward.run(context)
    scores = context.team.reward.scores(context.store.groups("sample", 0))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_a_group_stays_on_its_side_of_the_split_when_others_come() -> None:
    pairs = [(group(f"g{i}", answer(1), answer(2)), Ranking(f"g{i}", ((0,), (1,)), "rules")) for i in range(40)]
    train, held_out = reward.split(pairs, 0.25, seed=3)
    assert len(held_out) == 10 and len(train) == 30
    few = {ranking.prompt_id for _, ranking in reward.split(pairs[:20], 0.25, seed=3)[1]}
    assert few & {ranking.prompt_id for _, ranking in held_out}


def test_groups_that_are_one_big_tie_are_no_lesson(make_context: MakeContext) -> None:
    context = make_context(rank={"tie_margin": 2.0})
    sample.run(context)
    assert rank.run(context)["num_tied_groups"] == 8
    with pytest.raises(DataError, match="more than one tier"):
        reward.run(context)


def test_an_epoch_holds_every_group_once(make_context: MakeContext) -> None:
    context = make_context(reward={"epochs": 2, "groups_per_batch": 3, "held_out": 0.25})
    sample.run(context)
    rank.run(context)
    seen: list[str] = []
    fit = context.team.reward.fit

    def spy(groups, rankings):  # type: ignore[no-untyped-def]
        seen.extend(g.prompt.id for g in groups)
        return fit(groups, rankings)

    context.team.reward.fit = spy  # type: ignore[method-assign]
    reward.run(context)
    half = len(seen) // 2
    assert half >= 4 and sorted(seen[:half]) == sorted(seen[half:]) and len(set(seen)) == half
    assert torch.isfinite(context.team.reward.scores(context.store.groups("sample", 0))).all()


def rows_of(context: Context) -> list[dict[str, float]]:
    """The rows of the training without what the clock says."""
    rows = context.store.metrics("reward")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_training_that_is_repeated_leaves_its_rows_once(make_context: MakeContext) -> None:
    context = make_context()
    sample.run(context)
    rank.run(context)
    reward.run(context)
    rows = rows_of(context)
    reward.run(context)
    assert rows_of(context) == rows


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint_and_ends_the_same(make_context: MakeContext) -> None:
    changes: dict[str, Any] = {"reward": {"epochs": 3, "groups_per_batch": 3, "save_every": 2}}
    whole, halted = make_context("whole", **changes), make_context("halted", **changes)
    for context in (whole, halted):
        sample.run(context)
        rank.run(context)
    results = reward.run(whole)
    fit, calls = halted.team.reward.fit, []

    def stops_at_the_fourth(groups: Any, rankings: Any) -> dict[str, float]:
        calls.append(groups)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(groups, rankings)

    halted.team.reward.fit = stops_at_the_fourth  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        reward.run(halted)
    resumed = make_context("halted", **changes)
    assert reward.run(resumed) == results
    assert resumed.console.said == ["reward: going on from the checkpoint of batch 2"]  # type: ignore[attr-defined]
    assert rows_of(resumed) == rows_of(whole) and len(rows_of(whole)) > 4
    assert resumed.team.reward.state() == whole.team.reward.state()


def lists(path: Path, num: int) -> Path:
    """A file of ranked answers. The tiny tokenizer writes `$` as token 3, of which the fake reward model wants many."""
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}], "ranked_answers": ["$$$", f"$ {i}", f"no {i}"]}
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def chat(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_model)


def test_rankings_of_a_file_are_learned_without_any_of_the_run_itself(
    make_context: MakeContext, tmp_path: Path, chat: ChatTokenizer
) -> None:
    file = lists(tmp_path / "lists.jsonl", 10)
    context = replace(make_context(reward={"rankings": str(file)}), chat=chat)
    results = reward.run(context)
    assert (results["num_train"], results["num_held_out"], results["accuracy"]) == (8, 2, 1.0)
    assert [ranking.by for ranking in context.store.rankings(0)] == ["import"] * 10
    ranked = reward.ranked_groups(context)
    assert [chat.decode(answer.token_ids) for answer in ranked[0][0].answers] == ["$$$", "$ 0", "no 0"]
    scores = context.team.reward.scores([group for group, _ in ranked])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert people.take_in(context, file) == 10 and len(context.store.rankings(0)) == 10


def test_rankings_of_a_file_are_learned_beside_those_of_the_run(
    make_context: MakeContext, tmp_path: Path, chat: ChatTokenizer
) -> None:
    file = lists(tmp_path / "lists.jsonl", 10)
    context = replace(make_context(reward={"rankings": str(file), "held_out": 0.0}), chat=chat)
    sample.run(context)
    rank.run(context)
    own = {ranking.prompt_id for ranking in context.store.rankings(0) if len(ranking.tiers) > 1}
    results = reward.run(context)
    assert results["num_train"] == len(own) + 10
    scores = context.team.reward.scores(context.store.groups("sample", 0))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)  # normalised on what the policy writes, not on the file


def test_a_ranking_of_a_file_is_never_held_against_answers_of_the_run_to_the_same_prompt(
    make_context: MakeContext, tmp_path: Path, chat: ChatTokenizer
) -> None:
    file = tmp_path / "lists.jsonl"
    context = replace(make_context(reward={"rankings": str(file)}), chat=chat)
    sample.run(context)
    rank.run(context)
    before = reward.ranked_groups(context)
    name = context.store.groups("sample", 0)[0].prompt.id
    row = {"prompt_id": name, "prompt": "question", "answers": ["$$$", "no"], "tiers": [[1], [0]]}
    file.write_text(json.dumps(row) + "\n")
    reward.run(context)
    assert context.console.warned == [  # type: ignore[attr-defined]
        f"reward.rankings={file}: 1 groups are left out, since the run has their prompts"
    ]
    assert reward.ranked_groups(context) == before


def test_a_file_with_other_answers_to_a_prompt_on_which_people_rank_is_left_out_there(
    make_context: MakeContext, tmp_path: Path, chat: ChatTokenizer
) -> None:
    file = lists(tmp_path / "lists.jsonl", 10)
    settings = {"rank": {"judge": "people"}, "desk": {"repeats": 0.0}}
    context = replace(make_context(reward={"rankings": str(file)}, **settings), chat=chat)
    sample.run(context)
    name = context.store.groups("sample", 0)[0].prompt.id
    with file.open("a") as rows:
        row = {"prompt_id": name, "prompt": "question", "answers": ["$$$", "no"], "tiers": [[1], [0]]}
        rows.write(json.dumps(row) + "\n")
    people.rank(context, context.store.groups("sample", 0), Annotators(context, ann=threes))
    before = {ranking.prompt_id: ranking.tiers for ranking in context.store.rankings(0)}
    reward.run(context)
    (warning,) = context.console.warned  # type: ignore[attr-defined]
    assert "1 groups are left out, since the run has their prompts" in warning
    after = {ranking.prompt_id: ranking.tiers for ranking in context.store.rankings(0)}
    assert after[name] == before[name] and len(after) == len(before) + 10
    with open_desk(context.store.folder) as desk:
        assert desk.progress(0).complete  # what came ranked is not waited for


def test_what_was_taken_in_by_the_command_is_learned_too(
    make_context: MakeContext, tmp_path: Path, chat: ChatTokenizer
) -> None:
    context = make_context(rank={"judge": "people"}, desk={"repeats": 0.0}, reward={"held_out": 0.0})
    context = replace(context, chat=chat)
    sample.run(context)
    with open_desk(context.store.folder) as desk:
        desk.import_rows(rows_of_file(lists(tmp_path / "lists.jsonl", 10)), "eve")
    people.rank(context, context.store.groups("sample", 0), Annotators(context, ann=threes))
    results = reward.run(context)
    own = {group.prompt.id for group in context.store.groups("sample", 0)}
    told = [ranking for ranking in context.store.rankings(0) if len(ranking.tiers) > 1]
    assert results["num_train"] == len(told) == 10 + sum(ranking.prompt_id in own for ranking in told)
