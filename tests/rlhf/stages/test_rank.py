import pytest

from rlhf.errors import DataError
from rlhf.stages import rank, sample
from tests.rlhf.stages.conftest import MakeContext


def test_the_best_tier_has_the_highest_score(make_context: MakeContext) -> None:
    context = make_context()
    sample.run(context)
    assert rank.run(context)["num_groups"] == 8
    group, ranking = context.store.groups("sample", 0)[0], context.store.rankings(0)
    (mine,) = [r for r in ranking if r.prompt_id == group.prompt.id]
    shares = [
        [a.token_ids.count(3) / len(a.token_ids) for a in (group.answers[i] for i in tier)] for tier in mine.tiers
    ]
    assert all(len(set(tier)) == 1 for tier in shares)
    assert [tier[0] for tier in shares] == sorted({tier[0] for tier in shares}, reverse=True)
    assert sorted(index for tier in mine.tiers for index in tier) == list(range(10))


def test_only_groups_without_a_ranking_are_ranked(make_context: MakeContext) -> None:
    context = make_context()
    sample.run(context)
    rank.run(context)
    before = context.store.rankings(0)
    rank.run(context)
    assert context.store.rankings(0) == before


def test_nothing_to_rank_is_an_error(make_context: MakeContext) -> None:
    with pytest.raises(DataError, match="sample"):
        rank.run(make_context())


def test_groups_that_were_dropped_are_not_asked_for_again(make_context: MakeContext) -> None:
    rule = [{"name": "tests.rlhf.stages.scores.breaks_on_p1"}]
    context = make_context(rules=rule, on_bad_score="drop")
    sample.run(context)
    assert rank.run(context)["num_groups"] == 7
    assert rank.run(context)["num_groups"] == 7
