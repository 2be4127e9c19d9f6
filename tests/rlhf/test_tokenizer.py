"""The tokenizer of a base of one's own: every text comes back, and the same texts give the same tokenizer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.errors import ModelError, RecipeError
from rlhf.tokenizer import (
    Frame,
    SpecialTokens,
    frame,
    load_tokenizer,
    num_ids,
    save_tokenizer,
    text_encoder,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = [
    *(f"The quick brown fox number {n} jumps over the lazy dog, doesn't it?" for n in range(200)),
    *(f"床前明月光。疑是地上霜。舉頭望明月。低頭思故鄉。其{n}" for n in range(200)),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 340)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = text_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert all(index >= len(SpecialTokens().all) for index in ids)


@pytest.mark.parametrize(
    "text", ["The quick brown fox", "明月光", "  two  spaces \r\n\t", "emoji 👩‍👩‍👧 é e\u0301", ".", " .", "a ."]
)
def test_plain_encoding_and_decoding_keep_the_text(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_what_is_frequent_is_one_token_in_english_and_chinese():
    tokenizer = train_tokenizer(TEXTS, 1000)
    assert len(text_encoder(tokenizer).encode(" quick brown", add_special_tokens=False)) == 2
    assert len(text_encoder(tokenizer).encode("床前明月光", add_special_tokens=False)) <= 2


def test_digits_stay_apart(tokenizer: PreTrainedTokenizerFast):
    assert len(text_encoder(tokenizer).encode("1984", add_special_tokens=False)) == 4


def test_the_same_texts_give_the_same_bytes(tmp_path: Path):
    first, second = (save_tokenizer(train_tokenizer(TEXTS, 340), tmp_path / name) for name in ("a", "b"))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_special_tokens_have_the_first_ids_and_bos_stands_before_plain_text(tokenizer: PreTrainedTokenizerFast):
    special = SpecialTokens()
    assert tokenizer.convert_tokens_to_ids(list(special.all)) == list(range(6))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("fox")["input_ids"][0] == 0
    assert tokenizer.decode(tokenizer("<|user|>fox<|eos|>")["input_ids"], skip_special_tokens=True) == "fox"
    assert frame(tokenizer) == Frame(bos=0, eos=1)


def test_a_special_token_that_a_document_spells_is_plain_text(tokenizer: PreTrainedTokenizerFast):
    ids = text_encoder(tokenizer).encode("a<|eos|>b", add_special_tokens=False).ids
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a<|eos|>b"
    assert 1 in tokenizer("a<|eos|>b")["input_ids"]  # the tokenizer itself is as it was


def test_the_vocabulary_has_the_size_that_was_asked_for_or_what_the_texts_give(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer) == num_ids(tokenizer) == 340
    assert num_ids(train_tokenizer(["abc"], 5000)) == 262
    assert num_ids(train_tokenizer(TEXTS, 262)) == 262


@pytest.mark.parametrize("size", [0, 100, 261])
def test_a_vocabulary_that_is_too_small_is_refused(size: int):
    with pytest.raises(RecipeError, match=rf"{size} tokens is too small.*256 \+ 6 = 262.*Raise"):
        train_tokenizer(TEXTS, size)


def test_equal_or_empty_special_tokens_are_refused():
    for special in (SpecialTokens(bos="<x>", eos="<x>"), SpecialTokens(pad="")):
        with pytest.raises(RecipeError, match="Each is a text of its own"):
            train_tokenizer(TEXTS, 300, special)


def test_a_saved_tokenizer_is_loaded_by_transformers_and_is_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    folder = save_tokenizer(tokenizer, tmp_path / "runs" / "tokenizer")
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert loaded.decode(loaded("a .")["input_ids"], skip_special_tokens=True) == "a ."


def test_the_hash_changes_with_the_tokenizer_and_not_with_how_it_was_called(tokenizer: PreTrainedTokenizerFast):
    before = tokenizer_hash(tokenizer)
    tokenizer(TEXTS[:2], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(train_tokenizer(TEXTS, 339)) != before
    assert tokenizer_hash(train_tokenizer(TEXTS, 340, SpecialTokens(eos="</s>"))) != before


def test_an_existing_tokenizer_keeps_its_own_frame(tiny_model: Path):
    tiny = load_tokenizer(tiny_model)
    assert frame(tiny) == Frame(bos=256, eos=257)
    tiny.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    assert frame(tiny) == Frame(bos=None, eos=257)


def test_a_folder_without_a_usable_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    folder = save_tokenizer(tokenizer, tmp_path / "endless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names no end-of-sequence token"):
        load_tokenizer(folder)


def test_chinese_characters_stand_alone_where_tokens_are_characters():
    texts = ["春江潮水連海平，海上明月共潮生。\nthe moon the moon"] * 9
    tokenizer = train_tokenizer(texts, 400, merges="characters")
    pieces = [tokenizer.decode([i]) for i in tokenizer("明月，海上 the moon", add_special_tokens=False)["input_ids"]]  # type: ignore[index]
    assert pieces == ["明", "月", "，", "海", "上", " the", " moon"]
    together = train_tokenizer(texts, 400)
    assert len(together("明月，海上")["input_ids"]) < len(tokenizer("明月，海上")["input_ids"])  # type: ignore[arg-type]
