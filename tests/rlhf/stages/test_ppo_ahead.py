"""Answers that are written while the step before trains: which policy writes them, and that nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rlhf.compare import differences
from rlhf.data import PromptStream
from rlhf.errors import ScoreError, SyncError
from rlhf.kl import KLController
from rlhf.records import Adapter, Rollout
from rlhf.rollout import make_rollout
from rlhf.seeds import request_seed
from rlhf.stages import ppo
from rlhf.stages.context import Context
from rlhf.step_journal import StepJournal
from tests.fakes import FakeTeam
from tests.rlhf.runs import flip_a_byte
from tests.rlhf.stages.conftest import MakeContext
from tests.rlhf.stages.scores import threes
from tests.rlhf.stages.test_ppo import interrupted, metrics_of

AHEAD: dict[str, Any] = {"ppo": {"max_staleness": 1}}
WAIT_S = 30.0  # for a thread that must come


def ahead(**ppo_changes: Any) -> dict[str, Any]:
    return {"ppo": {"max_staleness": 1, **ppo_changes}}


def by_hand(context: Context, staleness: int) -> tuple[list[Rollout], FakeTeam]:
    """The loop on a team of its own, in one thread: step s learns from what the policy of step s - staleness wrote."""
    recipe, team, rollouts = context.recipe, FakeTeam(), []
    prompts, controller = PromptStream(context.prompts.train, recipe.seed), KLController(recipe.ppo.kl)
    adapters: list[Adapter] = []
    for step in range(recipe.ppo.num_steps):
        adapters.append(team.policy.adapter())
        team.generator.load_adapter(adapters[max(step - staleness, 0)])
        batch = prompts.take(recipe.ppo.num_prompts)
        seeds = [request_seed(recipe.seed, "ppo", 0, step, prompt.id) for prompt in batch]
        groups = team.generator.answer(batch, context.sampling, seeds)
        rollout = make_rollout(
            step,
            groups,
            scores=torch.tensor([threes(group.prompt, answer) for group in groups for answer in group.answers]),
            old_logprobs=team.policy.logprobs(groups),
            ref_logprobs=team.reference.logprobs(groups),
            values=team.critic.values(groups),
            config=recipe.ppo,
            beta=controller.beta,
        )
        team.policy.update(rollout)
        team.critic.update(rollout)
        controller.update(rollout.metrics["objective/kl"], len(rollout.scores))
        rollouts.append(rollout)
    return rollouts, team


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_loop_is_the_one_that_is_worked_out_in_a_single_thread_bit_for_bit(
    make_context: MakeContext, staleness: int
) -> None:
    context = make_context(ppo={"max_staleness": staleness})
    ppo.run(context)
    expected, team = by_hand(context, staleness)
    rows = metrics_of(context)
    assert len(rows) == len(expected) == 6
    for row, rollout in zip(rows, expected, strict=True):
        assert {name: row[name] for name in rollout.metrics} == dict(rollout.metrics)
    assert torch.equal(context.team.policy.logits, team.policy.logits)  # type: ignore[attr-defined]
    assert torch.equal(context.team.critic.value, team.critic.value)  # type: ignore[attr-defined]


def test_the_first_step_learns_from_its_own_policy_and_each_later_one_from_the_policy_before(
    make_context: MakeContext,
) -> None:
    context = make_context(**AHEAD)
    ppo.run(context)
    rollouts: list[Rollout] = context.team.policy.rollouts  # type: ignore[attr-defined]
    versions = [{answer.version for group in rollout.groups for answer in group.answers} for rollout in rollouts]
    assert versions == [{0}, {0}, {1}, {2}, {3}, {4}]
    assert [row["sampling/staleness"] for row in metrics_of(context)] == [0, 1, 1, 1, 1, 1]
    assert ppo.results(context)["staleness"] == 5 / 6
    # What weighs an answer is the policy before this update over the one that wrote it.
    assert context.team.policy.rollouts[0].metrics["sampling/logp_difference_max"] < 1e-6  # type: ignore[attr-defined]
    later = rollouts[3]
    assert later.old_logprobs is not None
    weights = (later.old_logprobs - later.sampling_logprobs)[later.mask].exp().clamp(max=2.0)
    assert later.metrics["sampling/importance_ratio_mean"] == pytest.approx(float(weights.mean()), rel=1e-6)
    assert later.metrics["sampling/logp_difference_max"] > 0.1


def test_in_turns_there_is_nothing_of_it_in_metrics_and_checkpoints(make_context: MakeContext) -> None:
    context = make_context()
    results = ppo.run(context)
    names = {name for row in context.store.metrics("ppo") for name in row}
    assert not names & {"sampling/staleness", "time/wait_for_answers", "time/generate_beside"}
    assert "staleness" not in results
    folder = context.store.folder / "checkpoints" / "ppo" / "step-6"
    assert {path.name for path in folder.glob("*.safetensors")} == {"policy.safetensors", "critic.safetensors"}


def test_the_next_answers_are_written_while_a_step_trains(make_context: MakeContext) -> None:
    context = make_context(**ahead(num_steps=3))
    team, writing, trained = context.team, threading.Event(), threading.Event()
    answer, update, order = team.generator.answer, team.policy.update, []

    def answers(*values: Any) -> Any:
        order.append("answer")
        if len(order) == 2:  # of step 1: it is not there before step 0 has trained
            writing.set()
            assert trained.wait(WAIT_S)
        return answer(*values)

    def updates(rollout: Rollout) -> dict[str, float]:
        if rollout.step == 0:
            assert writing.wait(WAIT_S)  # and step 0 does not train before it is being written
        order.append("update")
        found = update(rollout)
        trained.set()
        return found

    team.generator.answer, team.policy.update = answers, updates  # type: ignore[method-assign]
    ppo.run(context)
    assert order[:3] == ["answer", "answer", "update"]
    first, second, third = context.store.metrics("ppo")
    assert {"time/wait_for_answers", "time/generate_beside", "sampling/staleness"} <= first.keys()
    assert first["time/generate_beside"] == 0 and second["time/generate_beside"] > 0
    assert third["time/step"] >= third["time/wait_for_answers"]
    assert "generate_beside" not in ppo.results(context)["times"]  # type: ignore[operator]


def test_an_adapter_is_loaded_only_while_nothing_is_written(make_context: MakeContext) -> None:
    context = make_context(**AHEAD)
    generator, at_work = context.team.generator, threading.Lock()
    answer, load_adapter = generator.answer, generator.load_adapter

    def answers(*values: Any) -> Any:
        with at_work:
            return answer(*values)

    def loads(adapter: Adapter) -> dict[str, float]:
        assert at_work.acquire(blocking=False), "an adapter came while answers were written"
        try:
            return load_adapter(adapter)
        finally:
            at_work.release()

    generator.answer, generator.load_adapter = answers, loads  # type: ignore[method-assign]
    ppo.run(context)
    assert len(metrics_of(context)) == 6


# A run that was killed


@pytest.mark.parametrize(
    ("role", "method", "at", "save_every"),
    [
        ("policy", "update", 4, 3),  # three steps, a resume and three steps
        ("policy", "update", 5, 2),
        ("critic", "values", 4, 1),
        ("generator", "answer", 2, 1),  # in the thread, before there is a checkpoint
        ("generator", "answer", 5, 2),
        ("generator", "load_adapter", 5, 3),
        ("policy", "state", 2, 2),
    ],
)
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    make_context: MakeContext, role: str, method: str, at: int, save_every: int
) -> None:
    """It has a KL coefficient that moves, too."""
    changes = ahead(save_every=save_every, kl={"beta": 0.01, "adaptive": True, "horizon": 100})
    whole = make_context("whole", **changes)
    ppo.run(whole)
    halted = make_context("halted", **changes)
    interrupted(halted, role, method, at)
    resumed = make_context("halted", **changes)
    ppo.run(resumed)
    assert metrics_of(resumed) == metrics_of(whole)
    assert torch.equal(resumed.team.policy.logits, whole.team.policy.logits)  # type: ignore[attr-defined]
    assert differences(whole.store.folder, resumed.store.folder) == []


def test_a_run_that_is_stopped_at_every_step_is_the_run_that_was_not(make_context: MakeContext) -> None:
    whole = make_context("whole", **AHEAD)
    ppo.run(whole)
    for _ in range(5):
        interrupted(make_context("halted", **AHEAD), "policy", "update", 2)
    last = make_context("halted", **AHEAD)
    ppo.run(last)
    assert metrics_of(last) == metrics_of(whole)
    assert differences(whole.store.folder, last.store.folder) == []


def test_answers_that_came_before_the_kill_are_used_and_those_that_did_not_are_written_by_the_same_adapter(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, add = threading.Event(), StepJournal.add

    def tells(self: StepJournal, step: int, phase: str, result: Mapping[str, Any]) -> None:
        add(self, step, phase, result)
        if (step, phase) == (4, "generate"):
            committed.set()

    monkeypatch.setattr(StepJournal, "add", tells)
    changes = ahead(save_every=3)
    for name, came in (("came", True), ("missed", False)):
        committed.clear()
        halted = make_context(name, **changes)
        answer, update, requests = halted.team.generator.answer, halted.team.policy.update, []

        def answers(*values: Any, answer: Any = answer, requests: Any = requests, came: bool = came) -> Any:
            requests.append(values)
            if len(requests) == 5 and not came:
                raise OSError("the node is gone")
            return answer(*values)

        def updates(rollout: Rollout, update: Any = update, came: bool = came) -> dict[str, float]:
            if rollout.step == 3:
                assert not came or committed.wait(WAIT_S)
                raise KeyboardInterrupt
            return update(rollout)

        halted.team.generator.answer, halted.team.policy.update = answers, updates  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            ppo.run(halted)
        resumed = make_context(name, **changes)
        loaded: list[int] = []
        load_adapter = resumed.team.generator.load_adapter

        def loads(adapter: Adapter, load: Any = load_adapter, loaded: list[int] = loaded) -> dict[str, float]:
            loaded.append(adapter.version)
            return load(adapter)

        resumed.team.generator.load_adapter = loads  # type: ignore[method-assign]
        ppo.run(resumed)
        # The checkpoint is of step 3, whose answers are of version 2 and were committed; those of step 4 are of 3.
        assert loaded == [3, 4, 5]
        asked = resumed.team.generator.requests  # type: ignore[attr-defined]
        assert len(asked) == (1 if came else 2)


def test_the_adapter_of_the_checkpoint_writes_what_was_in_flight(make_context: MakeContext) -> None:
    changes = ahead(save_every=3)
    whole, halted = make_context("whole", **changes), make_context("halted", **changes)
    ppo.run(whole)
    interrupted(halted, "policy", "update", 4)
    halted.store.close()
    (halted.store.folder / "journal" / "ppo.jsonl").unlink()  # as on another machine, from the mirror's checkpoint
    resumed = make_context("halted", **changes)
    loaded: list[int] = []
    load_adapter = resumed.team.generator.load_adapter

    def loads(adapter: Adapter) -> dict[str, float]:
        loaded.append(adapter.version)
        return load_adapter(adapter)

    resumed.team.generator.load_adapter = loads  # type: ignore[method-assign]
    ppo.run(resumed)
    assert loaded == [2, 3, 4, 5]
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(make_context: MakeContext) -> None:
    whole, halted = make_context("whole", **AHEAD), make_context("halted", **AHEAD)
    ppo.run(whole)
    interrupted(halted, "policy", "update", 4)
    halted.store.close()
    flip_a_byte(halted.store.folder / "checkpoints" / "ppo" / "step-3" / "generator.safetensors")
    resumed = make_context("halted", **AHEAD)
    ppo.run(resumed)
    assert "step-3 is damaged" in resumed.console.warned[0]  # type: ignore[attr-defined]
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_run_that_was_done_goes_on_to_more_steps_as_if_it_had_never_ended(make_context: MakeContext) -> None:
    whole, short = make_context("whole", **ahead(num_steps=6)), make_context("short", **ahead(num_steps=4))
    ppo.run(whole)
    ppo.run(short)
    assert len(short.team.generator.requests) == 4  # type: ignore[attr-defined]
    longer = make_context("short", accept=("ppo.num_steps",), **ahead(num_steps=6))
    ppo.run(longer)
    assert metrics_of(longer) == metrics_of(whole)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_run_may_change_over_between_the_two(make_context: MakeContext, before: int, after: int) -> None:
    halted = make_context(ppo={"max_staleness": before})
    interrupted(halted, "policy", "update", 4)
    changed = make_context(accept=("ppo.max_staleness",), ppo={"max_staleness": after})
    ppo.run(changed)
    assert [row.get("sampling/staleness") for row in metrics_of(changed)] == (
        [None, None, None, 0, 1, 1] if after else [0, 1, 1, None, None, None]
    )
    # No prompt was passed over: the batch that was in flight is asked for again.
    whole = make_context("whole", ppo={"max_staleness": after})
    ppo.run(whole)
    asked = [prompts for prompts, _ in changed.team.generator.requests]  # type: ignore[attr-defined]
    assert asked == [prompts for prompts, _ in whole.team.generator.requests][3:]  # type: ignore[attr-defined]


# What goes wrong


def test_an_answer_outside_the_window_stops_the_run(make_context: MakeContext) -> None:
    context = make_context(**AHEAD)
    context.team.generator.load_adapter = lambda adapter: {}  # type: ignore[method-assign]
    with pytest.raises(SyncError):  # the canary, where the adapter shows
        ppo.run(context)
    unseen = make_context("unseen", **AHEAD)
    generator = unseen.team.generator
    load = generator.load_adapter

    def forgets_the_third(adapter: Adapter) -> dict[str, float]:
        found = load(adapter)
        if adapter.version == 2:
            generator.version = 1  # type: ignore[attr-defined]
        return found

    generator.load_adapter = forgets_the_third  # type: ignore[method-assign]
    with pytest.raises(SyncError, match=r"version 1\. The policy is at version 3, and answers may be 1 behind it"):
        ppo.run(unseen)


def test_an_error_of_the_generator_comes_up_after_the_step_that_trained_and_nothing_of_that_is_lost(
    make_context: MakeContext,
) -> None:
    context = make_context(**AHEAD)
    answer, calls = context.team.generator.answer, []

    def breaks_at_the_third(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 3:
            raise SyncError("The generator is gone.")
        return answer(*values)

    context.team.generator.answer = breaks_at_the_third  # type: ignore[method-assign]
    with pytest.raises(SyncError, match="The generator is gone"):
        ppo.run(context)
    assert [row["step"] for row in metrics_of(context)] == [1, 2]
    context.store.close()
    assert (context.store.folder / "checkpoints" / "ppo" / "step-2").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ScoreError("It cannot be scored.")])
def test_a_step_that_fails_waits_for_no_answers_and_late_ones_are_not_committed(
    make_context: MakeContext, error: Any
) -> None:
    context = make_context(**AHEAD)
    answer, gate, writing, calls = context.team.generator.answer, threading.Event(), threading.Event(), []
    threads: list[threading.Thread] = []

    def answers(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 3:
            threads.append(threading.current_thread())
            writing.set()
            assert gate.wait(WAIT_S)
        return answer(*values)

    def updates(rollout: Rollout) -> dict[str, float]:
        if rollout.step == 1:
            assert writing.wait(WAIT_S)
            raise error
        return {}

    context.team.generator.answer, context.team.policy.update = answers, updates  # type: ignore[method-assign]
    with pytest.raises(error if isinstance(error, type) else type(error)):
        ppo.run(context)
    assert not gate.is_set() and threads[0].is_alive() and threads[0].daemon
    journal = context.store.folder / "journal" / "ppo.jsonl"
    before = journal.read_bytes()
    gate.set()
    threads[0].join(WAIT_S)
    assert not threads[0].is_alive()
    assert journal.read_bytes() == before
