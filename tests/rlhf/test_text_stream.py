"""Batches of whole texts."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.text_stream import Example, TextStream

EXAMPLES: list[Example] = [
    (np.arange(10 * number, 10 * number + length, dtype=np.int32), np.array([False] + [True] * (length - 1)))
    for number, length in enumerate([3, 5, 2, 4, 6, 3, 2])
]


def make(seed: int = 0, batch_texts: int = 3, max_tokens: int = 8) -> TextStream:
    return TextStream(EXAMPLES, batch_texts=batch_texts, max_tokens=max_tokens, seed=seed)


def tokens(stream: TextStream, rank: int = 0, world_size: int = 1) -> list[int]:
    """All token ids of the next batch's share, sorted."""
    batch = stream.take(rank=rank, world_size=world_size)
    return sorted(int(token) for micro_batch in batch.micro_batches for token in micro_batch.token_ids[0])


def test_an_epoch_holds_each_text_once_in_batches_of_nearly_equal_number():
    stream = make()
    assert stream.batches_per_epoch == 3
    batches = [stream.take() for _ in range(3)]
    assert sorted(batch.num_parts for batch in batches) == [2, 2, 3]
    ids = sorted(int(t) for batch in batches for m in batch.micro_batches for t in m.token_ids[0])
    assert ids == sorted(int(token) for example, _ in EXAMPLES for token in example)
    assert stream.epoch == 1.0


def test_the_next_epoch_has_another_order():
    stream = make()
    first = [tokens(stream) for _ in range(3)]
    second = [tokens(stream) for _ in range(3)]
    assert first != second and sorted(chain(*first)) == sorted(chain(*second))


def test_ranks_share_a_batch_and_count_the_same_targets():
    alone = make().take()
    shares = [make().take(rank=rank, world_size=2) for rank in range(2)]
    assert {share.num_targets for share in shares} == {alone.num_targets}
    joined = sorted(int(t) for share in shares for m in share.micro_batches for t in m.token_ids[0])
    assert joined == sorted(int(t) for m in alone.micro_batches for t in m.token_ids[0])


def test_a_text_longer_than_a_micro_batch_has_one_of_its_own():
    batch = TextStream(EXAMPLES, batch_texts=7, max_tokens=2, seed=0).take()
    assert max(micro_batch.num_tokens for micro_batch in batch.micro_batches) == 6


def test_a_stream_goes_on_where_its_state_was_taken():
    stream = make()
    tokens(stream)
    state = stream.state()
    expected = [tokens(stream) for _ in range(4)]
    other = make()
    other.load_state(state)
    assert [tokens(other) for _ in range(4)] == expected


def test_other_texts_or_another_seed_refuse_the_state():
    state = make().state()
    for other in (make(seed=1), TextStream(EXAMPLES[:-1], batch_texts=3, max_tokens=8, seed=0)):
        with pytest.raises(DataError, match="changed since the checkpoint"):
            other.load_state(state)
