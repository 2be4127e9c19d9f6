"""Chat templates: one BOS, every end of a turn, nothing dropped in silence."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf.chat import ChatTokenizer, check_lengths, prompt_id
from rlhf.errors import DataError, ModelError
from rlhf.records import Message
from tests.tiny import BOS, EOS, PAD, make_tiny_tokenizer

HI = (Message("user", "Hi"),)


def tokenizer_with(folder: Path, template: str | None, **generation: object) -> Path:
    """A folder with the tiny tokenizer and another template."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_prompt_is_the_template_with_the_generation_prompt_and_one_bos(tiny_model: Path):
    chat = ChatTokenizer(tiny_model)
    prompt = chat.prompt(HI, {"source": "x"})
    tokens = make_tiny_tokenizer().convert_ids_to_tokens(list(prompt.token_ids))
    assert tokens == [BOS, "<|user|>", "H", "i", EOS, "<|assistant|>"]
    assert prompt.text == "Hi"
    assert prompt.extra == {"source": "x"}
    assert chat.decode(prompt.token_ids) == "Hi"


def test_a_template_that_writes_bos_twice_still_gives_one(tmp_path: Path):
    twice = "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = ChatTokenizer(tokenizer_with(tmp_path, twice))
    assert chat.prompt(HI).token_ids.count(chat.bos_id or -1) == 1


def test_a_template_without_bos_gets_none(tmp_path: Path):
    chat = ChatTokenizer(tokenizer_with(tmp_path, "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"))
    assert chat.bos_id not in chat.prompt(HI).token_ids


def test_plain_text_has_the_bos_of_the_tokenizer(tiny_model: Path):
    chat = ChatTokenizer(tiny_model)
    assert chat.encode("ab")[0] == chat.bos_id
    assert len(chat.encode("ab")) == 3


def id_of(token: str) -> int:
    found = make_tiny_tokenizer().convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def test_eos_is_a_set_from_config_tokenizer_and_end_of_turn(tmp_path: Path):
    # Turns end with <|system|> here, the tokenizer says <|eos|>, and the generation config names two more.
    template = "{% for m in messages %}{{ m['content'] + '<|system|>\\n' }}{% endfor %}"
    chat = ChatTokenizer(tokenizer_with(tmp_path, template, eos_token_id=[3, 5]))
    assert chat.eos_ids == {3, 5, id_of("<|system|>"), id_of(EOS)}


def test_pad_is_not_among_the_eos_ids(tiny_model: Path):
    assert ChatTokenizer(tiny_model).eos_ids == {id_of(EOS)}
    assert id_of(PAD) != id_of(EOS)


def test_a_turn_that_ends_in_plain_text_adds_no_eos(tmp_path: Path):
    chat = ChatTokenizer(tokenizer_with(tmp_path, "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"))
    assert chat.eos_ids == {id_of(EOS)}


def test_a_base_without_a_chat_template_is_refused_with_a_remedy(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no chat template.*instruct"):
        ChatTokenizer(tokenizer_with(tmp_path, None))


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, exists: bool):
    folder = tmp_path / "model"
    if exists:
        folder.mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded|there is no such folder"):
        ChatTokenizer(folder)


def test_a_template_that_refuses_system_messages_is_told(tmp_path: Path):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    chat = ChatTokenizer(tokenizer_with(tmp_path, strict))
    with pytest.raises(ModelError, match=r"System role not supported.*Leave data.system out"):
        chat.prompt([Message("system", "Be brief."), *HI])


def test_a_template_that_drops_system_messages_is_caught(tmp_path: Path):
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = ChatTokenizer(tokenizer_with(tmp_path, deaf))
    with pytest.raises(ModelError, match=r"leaves out the system message 'Be brief\.'"):
        chat.prompt([Message("system", "Be brief."), *HI])


def test_a_system_message_that_is_dropped_is_caught_where_the_user_says_the_same_words(tmp_path: Path):
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = ChatTokenizer(tokenizer_with(tmp_path, deaf))
    with pytest.raises(ModelError, match="leaves out the system message 'Be brief'"):
        chat.prompt([Message("system", "Be brief"), Message("user", "Be brief, will you?")])
    heard = ChatTokenizer(tokenizer_with(tmp_path, deaf.replace(" if m['role'] != 'system'", "")))
    heard.prompt([Message("system", "Be brief"), Message("user", "Be brief, will you?")])


def test_a_template_that_cannot_be_parsed_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match="fails on messages"):
        ChatTokenizer(tokenizer_with(tmp_path, "{% for m in messages %}"))


def test_a_damaged_generation_config_is_told(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        ChatTokenizer(folder)


def test_an_id_is_a_hash_of_roles_and_contents():
    assert prompt_id(HI) == prompt_id([Message("user", "Hi")])
    assert len(prompt_id(HI)) == 16 and int(prompt_id(HI), 16) >= 0
    others = [
        [Message("system", "Hi")],
        [Message("user", "Hi "), *HI],
        [Message("user", "H"), Message("user", "i")],
    ]
    assert len({prompt_id(HI), *map(prompt_id, others)}) == 4


def test_an_id_stays_the_same_across_versions():
    assert prompt_id(HI) == "d7760b4ba3077c46"


def test_prompt_and_answer_must_fit_the_context(tiny_model: Path):
    chat = ChatTokenizer(tiny_model)
    assert chat.context_tokens == 1024
    check_lengths(1000, 24, chat)
    with pytest.raises(DataError, match=r"make 1025 tokens.*has 1024.*Lower"):
        check_lengths(1000, 25, chat)
