"""Named templates in tokenizers that have none: what is added, how answers end, how much the model must grow."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.chat import ChatTokenizer
from rlhf.errors import ModelError, RecipeError
from rlhf.formats import Conversation
from rlhf.masks import tokenise
from rlhf.records import Message
from rlhf.templates import TEMPLATES, check_template, check_vocabulary, give_template, num_tokens, write_template
from tests.recipes import merged, tiny_recipe
from tests.rlhf.test_chat import id_of
from tests.tiny import BOS, EOS, ROLES, make_tiny_tokenizer

SIZE = 256 + 3 + len(ROLES)  # bytes, BOS, EOS, PAD, roles
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
TALK = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))


def bare():
    """The tiny tokenizer without a template, as a base has it."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def make_base(folder: Path, tokenizer=None, **config: object) -> Path:
    (tokenizer or bare()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": SIZE, "max_position_embeddings": 64} | config))
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            f"{BOS}<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("plain", f"{BOS}System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nHello{EOS}\n\nUser:\nWhy?\n\nAssistant:\n"),
    ],
)
def test_a_named_template_writes_a_conversation_as_it_is_known(tmp_path: Path, name: str, text: str):
    write_template(make_base(tmp_path / "base"), name, tmp_path / "given")
    chat = ChatTokenizer(tmp_path / "given")
    assert chat._tokenizer.decode(chat.prompt(TALK).token_ids) == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_end_with_the_templates_end_and_are_trained_up_to_it(tmp_path: Path, name: str):
    write_template(make_base(tmp_path / "base"), name, tmp_path / "given")
    chat = ChatTokenizer(tmp_path / "given")
    end = TEMPLATES[name].end or EOS
    (text,) = tokenise(Conversation((*TALK, Message("assistant", "So.")), "here"), chat)
    trained = [index for index, is_trained in zip(text.token_ids, text.trained, strict=True) if is_trained]
    assert chat._tokenizer.decode(trained) == f"Hello{end}So.{end}"
    assert trained[-1] == chat._tokenizer.eos_token_id
    assert chat.eos_ids == {trained[-1], id_of(EOS)}
    assert chat.context_tokens == 64


@pytest.mark.parametrize(("name", "num_new"), [("chatml", 2), ("llama3", 3), ("plain", 0)])
def test_what_the_model_must_grow_by_is_told(name: str, num_new: int):
    given = give_template(bare(), name, SIZE)
    assert given.added == TEMPLATES[name].tokens
    assert (given.num_tokens, given.num_new_embeddings) == (SIZE + num_new, num_new)
    assert give_template(bare(), name, SIZE + 1).num_new_embeddings == max(0, num_new - 1)
    assert give_template(bare(), name, SIZE + 100).num_new_embeddings == 0


def test_a_token_that_is_there_is_not_added_again():
    tokenizer = bare()
    tokenizer.add_tokens(["<|im_end|>"])  # as plain text
    given = give_template(tokenizer, "chatml", SIZE + 1)
    assert (given.added, given.num_tokens) == (("<|im_start|>",), SIZE + 2)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize("name", TEMPLATES)
def test_giving_it_again_changes_nothing(tmp_path: Path, name: str):
    write_template(make_base(tmp_path / "base"), name, tmp_path / "once")
    again = write_template(tmp_path / "once", name, tmp_path / "twice")
    assert (again.added, again.num_embeddings) == ((), SIZE)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_a_tokenizer_that_puts_no_bos_before_texts_gets_a_template_without_one(tmp_path: Path):
    tokenizer = bare()
    tokenizer.backend_tokenizer.post_processor = None
    write_template(make_base(tmp_path / "base", tokenizer), "chatml", tmp_path / "given")
    chat = ChatTokenizer(tmp_path / "given")
    assert chat.bos_id is not None and chat.bos_id not in chat.prompt(TALK).token_ids


def test_the_base_stays_as_it_is_and_its_ends_of_text_are_kept(tmp_path: Path):
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.6}))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    write_template(base, "chatml", tmp_path / "given")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "given")
    generation = json.loads((tmp_path / "given" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, id_of(EOS), tokenizer.eos_token_id], "temperature": 0.6}
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", BOS)


def test_a_template_of_its_own_is_not_overwritten():
    with pytest.raises(ModelError, match=r"template of its own.*'chatml'.*Name no template"):
        give_template(make_tiny_tokenizer(), "chatml", SIZE)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ModelError, match=r"'chatlm'.*Known are chatml, llama3, roles, plain.*Did you mean chatml\?"):
        give_template(bare(), "chatlm", SIZE)


def test_an_embedding_smaller_than_the_vocabulary_is_refused_with_both_numbers(tmp_path: Path):
    with pytest.raises(ModelError, match=rf"has {SIZE} tokens, and the model embeds {SIZE - 1}\."):
        write_template(make_base(tmp_path / "base", vocab_size=SIZE - 1), "plain", tmp_path / "given")
    tokenizer = bare()
    given = give_template(tokenizer, "chatml", SIZE)
    assert num_tokens(tokenizer) == given.num_tokens
    check_vocabulary(tokenizer, SIZE + 2)
    with pytest.raises(ModelError, match=f"has {SIZE + 2} tokens, and the model embeds {SIZE}"):
        check_vocabulary(tokenizer, SIZE)


def test_a_template_that_ends_with_the_end_of_text_needs_one():
    tokenizer = bare()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"'plain' ends an answer.*names none.*: chatml, llama3\."):
        give_template(tokenizer, "plain", SIZE)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        write_template(tmp_path, "plain", tmp_path / "given")
    base = make_base(tmp_path / "base", vocab_size=None)
    with pytest.raises(ModelError, match=r"config\.json does not say how many tokens"):
        write_template(base, "plain", tmp_path / "given")
    with pytest.raises(ModelError, match="written into the base"):
        write_template(base, "plain", tmp_path / "given" / ".." / "base")


def test_the_size_of_a_model_with_more_than_text_is_found(tmp_path: Path):
    base = make_base(tmp_path / "base", vocab_size=None, text_config={"vocab_size": SIZE})
    assert write_template(base, "plain", tmp_path / "given").num_embeddings == SIZE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sft": {"template": "role"}}, "no chat template named 'role'.*Did you mean roles"),
        ({"sft": {}}, "has no chat template.*sft.template=roles"),
        ({"sft": {}, "adapter": "law"}, "adapter=law.*a run of its own"),
        ({"sft": {"template": "roles"}, "adapter": "law"}, "leaves its base as it is"),
        (
            {"sft": {"template": "chatml", "train": "lora"}},
            r"adds the tokens <\|im_start\|>.*sft.train=full",
        ),
        ({"sft": {"template": "roles", "train": "lora"}}, None),
        ({"sft": {"template": "chatml", "train": "full"}}, None),
        ({"sft": {}, "pretrain": {"tokenizer": "elsewhere"}}, None),
    ],
)
def test_what_a_template_lacks_after_pretraining_is_told_before_it(
    tmp_path: Path, changes: dict[str, Any], told: str | None
):
    texts = {"sources": [{"path": "texts.jsonl"}]}
    recipe = tiny_recipe(
        "",
        tmp_path,
        stages=["pretrain", "sft"],
        **merged({"pretrain": {"sizes": SIZES} | texts, "sft": texts}, changes),
    )
    if told is None:
        check_template(recipe, recipe.stages)
        return
    with pytest.raises((ModelError, RecipeError), match=told):
        check_template(recipe, recipe.stages)
