"""Packed rows: each document comes out as a pass of its own would, in an order that a resume and any ranks keep."""

import json
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.errors import DataError
from rlhf.forward import token_logprobs
from rlhf.packing import RowStream, one_pass, pack, seeded_order
from rlhf.rows import MicroBatch
from rlhf.seeds import shuffle_seed


class Lists:
    """Documents in memory."""

    def __init__(self, documents: list[list[int]], key: str = "k") -> None:
        self.documents = [np.array(ids, np.uint16) for ids in documents]
        self.key = key

    def document(self, index: int) -> np.ndarray:
        return self.documents[index]


def drawn(lengths: list[int], seed: int = 0) -> Lists:
    draw = np.random.default_rng(seed)
    return Lists([draw.integers(0, 256, length).tolist() for length in lengths])


def stream(documents: Lists, row_tokens: int = 8, seed: int = 1) -> RowStream:
    return RowStream(documents, np.arange(len(documents.documents)), row_tokens=row_tokens, seed=seed)


def assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    assert one.pieces == other.pieces
    for name in ("token_ids", "position_ids", "row", "branch", "predict", "target_ids", "answer", "step", "last"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def parts(batch: MicroBatch) -> list[list[int]]:
    return [part.tolist() for part in batch.token_ids[0].split([piece.length for piece in batch.pieces])]


MANY = [3, 20, 1, 9, 2, 8, 15, 4, 30, 5]


def test_a_row_is_laid_out_document_by_document():
    (batch,) = pack([([5, 6, 7], [False, True, True]), ([8, 9], [True, True]), ([1, 2, 3, 4], [0, 0, 1, 0])], 20)
    # The longest comes first: documents 2, 0, 1.
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.row.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert [(piece.length, piece.sees) for piece in batch.pieces] == [(4, None), (3, None), (2, None)]
    assert batch.predict.tolist() == [1, 4, 5, 7]
    assert batch.target_ids.tolist() == [3, 6, 7, 9]  # 8 is trained, but nothing comes before it
    assert batch.answer.tolist() == [2, 0, 0, 1]
    assert batch.step.tolist() == [0, 0, 1, 0]
    assert batch.last.tolist() == [3, 6, 8]
    assert batch.last_answer.tolist() == [2, 0, 1]


def test_a_token_sees_its_own_document_only():
    (batch,) = pack([([5, 6, 7], [1, 1, 1]), ([8, 9], [1, 1])], 5)
    expected = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert torch.equal(batch.mask[0, 0], expected)


@pytest.mark.parametrize("kind", ["pack", "stream"])
def test_logprobs_equal_those_of_each_document_alone(tiny_model: Path, kind: str):
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    )
    documents = drawn([7, 30, 1, 12, 2])
    if kind == "pack":
        flags = [np.arange(len(ids)) % 3 > 0 for ids in documents.documents]
        batches = pack(list(zip(documents.documents, flags, strict=True)), 40)
        assert len(batches) == 2
    else:
        batches = list(stream(documents, row_tokens=26).take(2).micro_batches)
    with torch.no_grad():
        for batch in batches:
            logprobs, _ = token_logprobs(model, batch, 1.0)
            at = 0
            for ids in parts(batch):
                logits = plain(torch.tensor([ids])).logits[0]
                alone = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
                if kind == "pack":
                    alone = alone[torch.arange(1, len(ids)) % 3 > 0]
                torch.testing.assert_close(logprobs[at : at + len(alone)], alone, atol=1e-5, rtol=0)
                at += len(alone)
            assert at == len(logprobs) > 0


def test_a_row_without_a_trained_token_predicts_nothing(tiny_model: Path):
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    (batch,) = pack([([5, 6, 7], [True, False, False])], 8)
    assert len(batch.predict) == 0
    assert token_logprobs(model, batch, 1.0)[0].shape == (0,)


def test_packing_fills_rows_and_holds_every_document_once():
    lengths = np.random.default_rng(2).integers(1, 60, 500).tolist()
    documents = drawn(lengths)
    batches = pack([(ids, np.ones(len(ids), bool)) for ids in documents.documents], 64)
    assert sorted(torch.cat([batch.last_answer for batch in batches]).tolist()) == list(range(500))
    for batch in batches:
        assert batch.num_tokens <= 64
        for ids, index in zip(parts(batch), batch.last_answer.tolist(), strict=True):
            assert ids == documents.documents[index].tolist()
    assert len(batches) <= 1.02 * sum(lengths) / 64 + 1


def test_a_document_that_no_row_holds_is_refused():
    with pytest.raises(DataError, match=r"Document 1 has 9 tokens.*holds 8.*Raise"):
        pack([([1], [True]), (list(range(9)), [True] * 9)], 8)
    assert pack([], 8) == []


def test_rows_are_full_and_an_epoch_predicts_every_token_but_the_first_of_each_document_once():
    documents = drawn(MANY)
    rows = stream(documents)
    targets = list[int]()
    while rows.epoch == 0:
        (batch,) = rows.take(1).micro_batches
        assert batch.num_tokens == 8
        targets += batch.target_ids.tolist()
    wanted = [
        int(i) for d in seeded_order(len(MANY), shuffle_seed(1, "pretrain", 0)) for i in documents.documents[d][1:]
    ]
    assert targets[: len(wanted)] == wanted


def test_every_epoch_has_another_order_and_every_seed_too():
    documents = drawn([4] * 50)

    def epochs(seed: int) -> list[list[list[int]]]:
        rows = stream(documents, seed=seed)
        return [[ids for batch in rows.take(25).micro_batches for ids in parts(batch)] for _ in range(2)]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == sorted(ids.tolist() for ids in documents.documents)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


@pytest.mark.parametrize("before", [0, 1, 2, 5, 12, 13, 29])
def test_a_resumed_stream_gives_the_same_rows(before: int):
    undisturbed, stopped, resumed = (stream(drawn(MANY)) for _ in range(3))
    if before:
        undisturbed.take(before)
        stopped.take(before)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    assert resumed.state() == stopped.state()
    for _ in range(30):
        assert_equal(resumed.take(1).micro_batches[0], undisturbed.take(1).micro_batches[0])


def test_the_state_is_small_and_plain():
    rows = stream(drawn(MANY))
    rows.take(3)
    state = rows.state()
    assert set(state) == {"epoch", "document", "offset", "data"}
    assert all(isinstance(state[name], int) for name in ("epoch", "document", "offset"))


def test_a_state_of_other_documents_weights_or_seed_is_refused():
    state = stream(drawn(MANY)).state()
    others = [
        stream(drawn(MANY), seed=2),
        stream(drawn(MANY[:-1])),
        stream(Lists([ids.tolist() for ids in drawn(MANY).documents], key="other")),
        RowStream(drawn(MANY), np.arange(10).repeat(2), row_tokens=8, seed=1),
    ]
    for other in others:
        with pytest.raises(DataError, match="changed since the checkpoint"):
            other.load_state(state)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_the_ranks_together_have_the_rows_of_one(world_size: int):
    alone = stream(drawn(MANY))
    ranks = [stream(drawn(MANY)) for _ in range(world_size)]
    for _ in range(4):
        whole = alone.take(6)
        shares = [rows.take(6, rank=rank, world_size=world_size) for rank, rows in enumerate(ranks)]
        made = [batch for share in shares for batch in share.micro_batches]
        assert len(made) == len(whole.micro_batches) == 6
        for one, other in zip(made, whole.micro_batches, strict=True):
            assert_equal(one, other)
        assert {share.num_targets for share in shares} == {sum(len(b.target_ids) for b in whole.micro_batches)}
        assert {share.num_parts for share in shares} == {sum(len(b.pieces) for b in whole.micro_batches)}
        assert {str(rows.state()) for rows in ranks} == {str(alone.state())}


def test_answers_count_the_parts_of_a_batch():
    batch = stream(drawn(MANY)).take(4)
    assert torch.cat([b.last_answer for b in batch.micro_batches]).tolist() == list(range(batch.num_parts))


def test_one_pass_predicts_every_token_once_and_ends():
    documents = drawn(MANY)
    chosen = np.array([8, 0, 1, 2])
    batches = list(one_pass(documents, chosen, 8))
    assert [token for batch in batches for token in batch.target_ids.tolist()] == [
        token for index in chosen for token in documents.documents[index][1:].tolist()
    ]
    assert all(batch.num_tokens == 8 for batch in batches[:-1])
    assert list(one_pass(documents, chosen[:0], 8)) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 20))
def test_documents_of_any_length_fill_rows_of_any_length(lengths: list[int], row_tokens: int):
    documents = drawn(lengths)
    batches = list(one_pass(documents, np.arange(len(lengths)), row_tokens))
    assert sum(len(batch.predict) for batch in batches) == sum(lengths) - len(lengths)
    rows = stream(documents, row_tokens)
    for _ in range(5):
        batch = rows.take(3)
        assert all(made.num_tokens == row_tokens for made in batch.micro_batches)
        assert batch.num_targets == sum(len(made.predict) for made in batch.micro_batches)


def test_an_order_is_a_permutation_that_never_changes():
    assert seeded_order(10, 7).tolist() == seeded_order(10, 7).tolist()
    assert sorted(seeded_order(1000, 2**62 - 1).tolist()) == list(range(1000))
    # SplitMix64 from state 0 begins with E220A8397B1DCDAF, 6E789E6AA1B965F4, 06C45D188009454F (Vigna's splitmix64.c).
    assert seeded_order(3, 0).tolist() == [2, 1, 0]


def test_packing_keeps_up_with_training():
    rows = stream(drawn([60] * 5000), row_tokens=1024)
    start = process_time()
    rows.take(200)
    assert 200 * 1024 / (process_time() - start) > 100_000


def test_several_rows_in_a_pass_are_the_rows_one_behind_the_other():
    documents = drawn([5] * 8)
    apart = stream(documents, row_tokens=4).take(6)
    joined = stream(documents, row_tokens=4).take(6, rows_per_pass=4)
    assert [m.num_tokens for m in joined.micro_batches] == [16, 8]
    assert torch.equal(
        torch.cat([m.token_ids for m in apart.micro_batches], 1),
        torch.cat([m.token_ids for m in joined.micro_batches], 1),
    )
    assert torch.equal(
        torch.cat([m.answer for m in apart.micro_batches]), torch.cat([m.answer for m in joined.micro_batches])
    )
    assert (joined.num_targets, joined.num_parts) == (apart.num_targets, apart.num_parts)
