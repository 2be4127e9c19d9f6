from rlhf.stages import sample
from tests.rlhf.stages.conftest import MakeContext


def test_every_prompt_gets_ten_answers_in_requests_of_the_asked_size(make_context: MakeContext) -> None:
    context = make_context()
    results = sample.run(context)
    groups = context.store.groups("sample", 0)
    assert [group.prompt.id for group in groups] == [f"p{i}" for i in range(8)]
    assert all(len(group.answers) == 10 for group in groups)
    assert [len(prompts) for prompts, _ in context.team.generator.requests] == [3, 3, 2]  # type: ignore[attr-defined]
    assert results["num_answers"] == 80


def test_what_was_committed_is_not_sampled_again(make_context: MakeContext) -> None:
    first = make_context()
    sample.run(first)
    whole = first.store.groups("sample", 0)
    second = make_context("other", sample={"num_prompts": 3})
    sample.run(second)
    third = make_context("other", sample={"num_prompts": 3})
    sample.run(third)
    assert third.team.generator.requests == []  # type: ignore[attr-defined]
    assert third.store.groups("sample", 0) == whole[:3]


def test_seeds_depend_on_the_prompt_and_not_on_the_request(make_context: MakeContext) -> None:
    small, large = make_context("a"), make_context("b", sample={"prompts_per_request": 8})
    sample.run(small)
    sample.run(large)
    pairs = [dict(zip(*request, strict=True)) for c in (small, large) for request in c.team.generator.requests]  # type: ignore[attr-defined]
    assert pairs[0] | pairs[1] | pairs[2] == pairs[3]
    assert len(set(pairs[3].values())) == 8


def test_a_batch_of_which_a_part_was_committed_is_sampled_as_a_whole_and_stands_once(make_context: MakeContext) -> None:
    whole = make_context("whole")
    sample.run(whole)
    groups = whole.store.groups("sample", 0)
    torn = make_context("torn")
    torn.store.append_groups("sample", 0, groups[:4])
    sample.run(torn)
    asked = [prompts for prompts, _ in torn.team.generator.requests]  # type: ignore[attr-defined]
    assert asked == [("p3", "p4", "p5"), ("p6", "p7")]
    assert torn.store.groups("sample", 0) == groups
