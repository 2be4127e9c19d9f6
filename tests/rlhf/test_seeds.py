from __future__ import annotations

import itertools

import pytest

from rlhf.seeds import request_seed, shuffle_seed

N = 10


def test_the_seed_of_a_request_is_the_same_in_every_process():
    # SHA-256 of '["request", 7, "ppo", 0, 3, "abc"]', as sha256sum gives it, first 62 bits.
    assert request_seed(7, "ppo", 0, 3, "abc") == 0x74D1CBF480D4B82C >> 2


@pytest.mark.parametrize(
    "other",
    [(8, "ppo", 0, 3, "abc"), (7, "sample", 0, 3, "abc"), (7, "ppo", 1, 3, "abc"), (7, "ppo", 0, 4, "abc"),
     (7, "ppo", 0, 3, "abd")],
)  # fmt: skip
def test_every_part_of_a_request_shapes_its_seed(other: tuple[int, str, int, int, str]):
    assert request_seed(*other) != request_seed(7, "ppo", 0, 3, "abc")


def test_the_seeds_of_all_answers_fit_in_int64():
    seeds = [request_seed(0, "ppo", 0, step, "p") for step in range(10_000)]
    assert min(seeds) >= 0
    assert max(seeds) + 1_000 < 2**63


def test_answers_of_neighbouring_requests_never_share_a_seed():
    seeds = [
        request_seed(run, "ppo", 0, step, f"prompt-{prompt}")
        for run, step, prompt in itertools.product(range(3), range(50), range(64))
    ]
    gaps = [right - left for left, right in itertools.pairwise(sorted(seeds))]
    assert min(gaps) > N


def test_answers_of_one_step_differ_even_where_a_generator_sees_the_low_32_bits_only():
    for step in range(20):
        low = sorted(request_seed(0, "ppo", 0, step, f"prompt-{prompt}") % 2**32 for prompt in range(64))
        assert min(right - left for left, right in itertools.pairwise(low)) >= N


def test_parts_that_read_the_same_when_joined_have_different_seeds():
    assert request_seed(1, "ppo", 12, 3, "x") != request_seed(1, "ppo", 1, 23, "x")
    assert shuffle_seed(0, "a1", 1) != shuffle_seed(0, "a", 11)


def test_every_epoch_and_kind_of_data_has_an_order_of_its_own():
    seeds = {shuffle_seed(0, what, step, epoch) for what in "ab" for step in range(20) for epoch in range(20)}
    assert len(seeds) == 2 * 20 * 20
    assert shuffle_seed(0, "a", 1, 2) == shuffle_seed(0, "a", 1, 2)
