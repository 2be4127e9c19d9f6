"""The adapter reaches the engine, or the run stops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from rlhf.errors import SyncError
from rlhf.records import Adapter
from rlhf.sync import check_versions, sync
from tests.fakes import TableGenerator, TablePolicy, TableReference, answer, group

LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5, -2.0, 0.0, 1.5])


class SkippingGenerator(TableGenerator):
    """Says that it loaded the adapter, and does not."""

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        return {}


class NoisyGenerator(TableGenerator):
    """An engine whose arithmetic differs from the trainer's by `noise` nats; it may ignore the adapter."""

    def __init__(self, noise: float, ignores: bool = False) -> None:
        super().__init__()
        self.noise, self.ignores = noise, ignores

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        with_adapter, without = super().canary_logprobs(token_ids)
        return self._noisy(without if self.ignores else with_adapter), self._noisy(without)

    def _noisy(self, exact: list[float]) -> list[float]:
        return [value + self.noise * (-1) ** index for index, value in enumerate(exact)]


def moved_policy(scale: float = 1.0) -> TablePolicy:
    policy = TablePolicy()
    with torch.no_grad():
        policy.logits.copy_(LOGITS * scale)
    policy.version = 3
    return policy


def test_a_sync_hands_the_adapter_over_and_measures_the_canary() -> None:
    generator = TableGenerator()
    metrics = sync(moved_policy(), generator, TableReference(), canary=(0, 1, 2))
    assert generator.version == 3
    assert metrics["sync/canary_gap"] == pytest.approx(0.0, abs=1e-6)
    # By hand: without the adapter every token has log(1/8); with it, its logit less log Σ exp(logits).
    total = math.log(sum(math.exp(logit) for logit in LOGITS.tolist()))
    gap = (abs(2.0 - total + math.log(8)) + abs(-1.0 - total + math.log(8))) / 2
    assert metrics["sync/canary_gap_without"] == pytest.approx(gap, rel=1e-5)
    assert metrics["sync/canary_checked"] == 1.0


@pytest.mark.parametrize("reference", [TableReference(), None])
def test_a_sync_that_is_silently_skipped_is_caught(reference: TableReference | None) -> None:
    with pytest.raises(SyncError, match="does not use the adapter of version 3"):
        sync(moved_policy(), SkippingGenerator(), reference)


def test_an_adapter_that_changes_nothing_yet_proves_nothing_and_passes() -> None:
    metrics = sync(TablePolicy(), SkippingGenerator(), TableReference())
    assert metrics["sync/canary_checked"] == 0.0


def test_an_effect_below_the_noise_is_not_judged() -> None:
    metrics = sync(moved_policy(0.001), NoisyGenerator(noise=0.05, ignores=True), TableReference())
    assert metrics["sync/canary_checked"] == 0.0


def test_an_effect_above_the_noise_is_judged() -> None:
    assert sync(moved_policy(), NoisyGenerator(noise=0.05), TableReference())["sync/canary_checked"] == 1.0
    with pytest.raises(SyncError, match="nearer"):
        sync(moved_policy(), NoisyGenerator(noise=0.05, ignores=True), TableReference())


def test_logprobs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SyncError, match="nan"):
        sync(moved_policy(), NoisyGenerator(noise=math.nan), TableReference())


def test_answers_of_the_expected_version_pass() -> None:
    check_versions([group("a", answer(1, version=2), answer(2, version=2))], 2)


def test_an_answer_of_another_version_stops_the_run_and_is_named() -> None:
    groups = [group("a", answer(1, version=2)), group("b", answer(1, version=2), answer(2, version=1))]
    with pytest.raises(SyncError, match=r"prompt b was written by adapter version 1\. The policy is at version 2"):
        check_versions(groups, 2)


def test_where_answers_may_be_stale_the_version_before_passes_and_no_other() -> None:
    window = [group("a", answer(1, version=2)), group("b", answer(1, version=3))]
    check_versions(window, 3, max_staleness=1)
    with pytest.raises(SyncError, match=r"adapter version 2\. The policy is at version 4, and answers may be 1 behind"):
        check_versions(window, 4, max_staleness=1)
    with pytest.raises(SyncError, match=r"adapter version 3\. The policy is at version 2"):
        check_versions(window, 2, max_staleness=1)


# Continuing an adapter

START = torch.tensor([2.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, -2.0])


class StuckGenerator(NoisyGenerator):
    """Says that it loaded the adapter, and stays at the one that PPO began with."""

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        self.logits = START
        return {}


def continued_policy(moved_by: float) -> TablePolicy:
    policy = TablePolicy()
    with torch.no_grad():
        policy.logits.copy_(START + moved_by * LOGITS)
    return policy


def continued(policy: TablePolicy, generator: TableGenerator) -> dict[str, float]:
    return sync(policy, generator, TableReference(START), canary=(0, 1, 2, 3), continues=True)


def test_the_start_of_a_continued_adapter_must_be_in_use_from_the_first_step_on() -> None:
    metrics = continued(continued_policy(0.0), TableGenerator())
    assert metrics["sync/canary_checked"] == 1.0
    with pytest.raises(SyncError, match="does not use the adapter of version 0"):
        continued(continued_policy(0.0), SkippingGenerator())


def test_noise_is_measured_on_the_base_and_not_on_the_start() -> None:
    # The start is far from the base; taken for noise, its effect would hide that the adapter is not in use.
    with pytest.raises(SyncError, match="does not use the adapter"):
        continued(continued_policy(0.1), NoisyGenerator(noise=0.01, ignores=True))


def test_an_engine_that_stays_at_the_start_is_caught_once_the_policy_has_left_it() -> None:
    assert continued(continued_policy(0.01), StuckGenerator(noise=0.05))["sync/canary_checked"] == 1.0
    with pytest.raises(SyncError, match="stayed at the adapter that PPO began with"):
        continued(continued_policy(1.0), StuckGenerator(noise=0.05))
    assert continued(continued_policy(1.0), NoisyGenerator(noise=0.05))["sync/canary_checked"] == 1.0


def test_without_a_reference_a_continued_adapter_is_judged_by_the_usual_noise() -> None:
    metrics = sync(continued_policy(0.0), TableGenerator(), None, canary=(0, 1, 2, 3), continues=True)
    assert metrics["sync/canary_checked"] == 1.0
    with pytest.raises(SyncError, match="does not use the adapter"):
        sync(continued_policy(0.0), SkippingGenerator(), None, canary=(0, 1, 2, 3), continues=True)
