"""What is trained: the assistant's words and ends of turns, after the very tokens that a generator would be given."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.chat import ChatTokenizer
from rlhf.errors import DataError, ModelError
from rlhf.formats import Conversation
from rlhf.masks import TrainedText, make_texts, tokenise
from rlhf.records import Message
from tests.rlhf.chats import DROPS_REASONING, FAMILIES, MOVES_SYSTEM, family_folder, tokenizer_folder
from tests.tiny import BOS, EOS

SYSTEM = Message("system", "Be brief.")
LONG_TALK = ("Hi", "Hello", "Wozu? 为什么", "Dafür: 因为 🙂\n\nEnd.", "user", "assistant")


def talk(*contents: str, system: bool = False, num_given: int = 0) -> Conversation:
    """A conversation of user and assistant in turns."""
    turns = [Message(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    return Conversation(tuple([SYSTEM] * system + turns), "here", num_given=num_given)


def trained_runs(text: TrainedText) -> list[list[int]]:
    """The ids of each answer that is trained."""
    runs = groupby(zip(text.token_ids, text.trained, strict=True), key=lambda pair: pair[1])
    return [[index for index, _ in run] for trained, run in runs if trained]


def tokens_of(ids: Sequence[int], chat: ChatTokenizer) -> list[str]:
    return chat._tokenizer.convert_ids_to_tokens(list(ids))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    """A tokenizer for each family of templates."""
    folder = tmp_path_factory.mktemp("families")
    return {name: ChatTokenizer(family_folder(folder / name.replace(" ", "-"), name)) for name in FAMILIES}


def one(conversation: Conversation, chat: ChatTokenizer) -> TrainedText:
    (text,) = tokenise(conversation, chat)
    return text


@pytest.mark.parametrize(
    ("name", "system"), [(name, system) for name in FAMILIES for system in (False, True)[: 1 + FAMILIES[name].system]]
)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_the_mask_is_the_one_that_transformers_reads_from_generation_marks(
    chats: dict[str, ChatTokenizer], name: str, num_turns: int, system: bool
):
    conversation = talk(*LONG_TALK[: 2 * num_turns], system=system)
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    oracle = chats[name]._tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [bool(value) for value in oracle["assistant_masks"]]
    num = max(index for index, trained in enumerate(mask) if trained) + 1  # what follows is the template's own
    text = one(conversation, chats[name])
    assert text.token_ids == tuple(oracle["input_ids"][:num])
    assert text.trained == tuple(mask[:num])


def words(minimum: int = 1) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=minimum, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.tuples(words(), words()), min_size=1, max_size=3))
def test_each_answer_follows_its_prompt_and_decodes_to_its_words(
    chats: dict[str, ChatTokenizer], name: str, turns: list[tuple[str, str]]
):
    chat = chats[name]
    conversation = talk(*(content for turn in turns for content in turn))
    texts = tokenise(conversation, chat)
    answers = [(text, run) for text in texts for run in trained_runs(text)]
    assert len(answers) == len(turns)
    for number, (text, run) in enumerate(answers):
        prompt = chat.prompt(conversation.messages[: 2 * number + 1]).token_ids
        assert text.token_ids[: len(prompt) + len(run)] == prompt + tuple(run)
        assert run[-1] in chat.eos_ids and not chat.eos_ids & set(run[:-1])
        assert chat.decode(run).strip() == turns[number][1].strip()
    assert sum(sum(text.trained) for text in texts) == sum(len(run) for _, run in answers)


def test_a_conversation_worked_by_hand(chats: dict[str, ChatTokenizer]):
    chat = chats["chatml"]
    text = one(talk("a", "bc", "d", "e"), chat)
    start, end = "<|im_start|>", "<|im_end|>"
    newline = "Ċ"  # as a byte-level vocabulary spells it
    user, assistant = [start, *"user", newline], [start, *"assistant", newline]
    assert tokens_of(text.token_ids, chat) == [
        *user, "a", end, newline, *assistant, "b", "c", end, newline,
        *user, "d", end, newline, *assistant, "e", end,
    ]  # fmt: skip
    first = len([*user, "a", end, newline, *assistant])
    assert text.trained == (False,) * first + (True,) * 3 + (False,) * (1 + first) + (True,) * 2


def test_bos_is_there_once_and_white_space_that_a_template_trims_is_not_trained(chats: dict[str, ChatTokenizer]):
    text = one(talk("Hi", " \n Yes. \n"), chats["llama 3"])
    assert tokens_of(text.token_ids, chats["llama 3"])[0] == BOS
    assert text.token_ids.count(text.token_ids[0]) == 1
    assert [tokens_of(run, chats["llama 3"]) for run in trained_runs(text)] == [["Y", "e", "s", ".", "<|eot_id|>"]]


def test_white_space_that_a_template_writes_before_an_answer_is_trained(chats: dict[str, ChatTokenizer]):
    text = one(talk("Hi", "Yes"), chats["mistral"])
    assert [tokens_of(run, chats["mistral"]) for run in trained_runs(text)] == [["Ġ", "Y", "e", "s", EOS]]


def test_given_answers_are_not_trained(chats: dict[str, ChatTokenizer]):
    learned = one(talk("a", "b", "c", "d"), chats["chatml"])
    only_last = one(talk("a", "b", "c", "d", num_given=3), chats["chatml"])
    assert only_last.token_ids == learned.token_ids
    assert trained_runs(only_last) == trained_runs(learned)[1:]


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder(tmp_path_factory.mktemp("r"), DROPS_REASONING, "<|im_start|>", "<|im_end|>"))


def test_reasoning_that_a_template_drops_later_is_trained_in_a_text_of_its_own(reasoning: ChatTokenizer):
    answers = ["<think>\nr1\n</think>\n\nHello", "<think>\nr2\n</think>\n\nSo."]
    conversation = talk("Hi", answers[0], "Why?", answers[1])
    first, second = tokenise(conversation, reasoning)
    for text, answer, num in ((first, answers[0], 1), (second, answers[1], 3)):
        (run,) = trained_runs(text)
        assert reasoning.decode(run) == answer
        assert text.token_ids == reasoning.prompt(conversation.messages[:num]).token_ids + tuple(run)
    assert "r1" not in reasoning.decode(second.token_ids)


def test_an_empty_passage_of_reasoning_is_not_put_before_answers_without_any(reasoning: ChatTokenizer):
    text = one(talk("Hi", "Hello", "Why?", "So."), reasoning)
    assert [reasoning.decode(run) for run in trained_runs(text)] == ["Hello", "So."]
    assert "think" not in reasoning.decode(text.token_ids)


def test_a_system_message_that_moves_gives_a_text_for_each_place(tmp_path: Path):
    chat = ChatTokenizer(tokenizer_folder(tmp_path, MOVES_SYSTEM, "[INST]", "[/INST]"))
    texts = tokenise(talk("q1", "a1", "q2", "a2", system=True), chat)
    assert ["".join(tokens_of(text.token_ids, chat)) for text in texts] == [
        f"{BOS}[INST]ĠBeĠbrief.ĊĊq1[/INST]Ġa1{EOS}",
        f"{BOS}[INST]Ġq1[/INST]Ġa1{EOS}[INST]ĠBeĠbrief.ĊĊq2[/INST]Ġa2{EOS}",
    ]
    assert [[chat.decode(run) for run in trained_runs(text)] for text in texts] == [[" a1"], [" a2"]]


def test_the_last_word_of_an_opening_may_be_part_of_the_answers_own(tmp_path: Path):
    chat = ChatTokenizer(tokenizer_folder(tmp_path, MOVES_SYSTEM, "[INST]", "[/INST]"))
    texts = tokenise(talk("INST", "INST INST", "INST", "]", system=True), chat)
    assert [[chat.decode(run) for run in trained_runs(text)] for text in texts] == [[" INST INST"], [" ]"]]


LOOP = "{{% for m in messages %}}{{{{ '<|' + m['role'] + '|>' + {content} + {end} }}}}{{% endfor %}}{opening}"
OPENING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def chat_with(folder: Path, content: str = "m['content']", end: str = "eos_token", opening: str = OPENING):
    return ChatTokenizer(tokenizer_folder(folder, LOOP.format(content=content, end=end, opening=opening)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"content": "(m['content'].upper() if m['role'] == 'assistant' else m['content'])"},
            "writes 'HELLO<|eos|>'.*answer 'Hello' as it is",
        ),
        ({"content": "'Sure: ' + m['content']"}, "writes 'Sure: Hello"),
        ({"end": "'\\n'"}, r"writes 'Hello\\n'.*then one of <\|eos\|>.*eos_token_id"),
        ({"end": "''"}, "writes 'Hello'"),
        ({"opening": ""}, r"writes '<\|assistant\|>Hello"),
        ({"opening": OPENING.replace("nt|>", "nt|><think>")}, r"generation prompt '<\|eos\|><\|assistant\|><think>'"),
        ({"content": "(m['content'] if m['role'] != 'system' else '')"}, r"leaves out the system message 'Be brief"),
        ({"content": "(m['content'] if loop.index > 2 or loop.length < 4 else '')"}, "leaves out the .* message"),
        ({"content": "(raise_exception('No system') if m['role'] == 'system' else m['content'])"}, "No system"),
    ],
)
def test_a_template_that_would_give_a_wrong_span_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, str], told: str
):
    with pytest.raises(ModelError, match=f"^here: .*{told}"):
        tokenise(talk("Hi", "Hello", "Why?", "So.", system=True), chat_with(tmp_path, **change))


@pytest.mark.parametrize("text", [f"a{EOS}", f"a{EOS}b", "<|user|>a", f"a{BOS}"])
def test_an_answer_that_holds_a_mark_of_the_template_is_refused(tmp_path: Path, text: str):
    chat = ChatTokenizer(tokenizer_folder(tmp_path, "{{ bos_token }}" + LOOP.format(
        content="m['content']", end="eos_token", opening=OPENING)))  # fmt: skip
    with pytest.raises(DataError, match=r"^here: the assistant's text .* holds <\|(eos|user|bos)\|>.*Mend or remove"):
        tokenise(talk("Hi", text), chat)


def merging_tokenizer(folder: Path, jinja: str, *, metaspace: bool = False) -> ChatTokenizer:
    """A tokenizer in which tokens span what templates and answers write: "\n\n" is one, " b" is another."""
    space = "▁" if metaspace else "Ġ"
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), space})
    merges = [("Ċ", "Ċ"), (space, "b")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([EOS])
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = jinja
    fast.save_pretrained(folder)
    return ChatTokenizer(folder)


PLAIN = "{% for m in messages %}{{ m['role'] + ':GAP' + m['content'] + eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:GAP' }}{% endif %}"
)


def test_an_answer_begins_after_the_prompts_own_tokens_even_where_a_token_would_span_the_two(tmp_path: Path):
    chat = merging_tokenizer(tmp_path, PLAIN.replace("GAP", "\\n"))
    conversation = talk("q", "\nx", "q", "y")
    first, second = tokenise(conversation, chat)
    assert tokens_of(first.token_ids, chat)[-4:] == ["Ċ", "Ċ", "x", EOS]
    assert first.token_ids[:-3] == chat.prompt(conversation.messages[:1]).token_ids
    # As a past, the same text is what a generator would be given: with the token that spans the two.
    assert "ĊĊ" in tokens_of(second.token_ids, chat)
    assert [chat.decode(run) for run in trained_runs(second)] == ["y"]


def test_a_tokenizer_that_puts_a_space_before_every_text_does_not_change_the_answer(tmp_path: Path):
    chat = merging_tokenizer(tmp_path, PLAIN.replace("GAP", ""), metaspace=True)
    text = one(talk("q", "bc", "q", " b"), chat)
    assert [tokens_of(run, chat) for run in trained_runs(text)] == [["b", "c", EOS], ["▁b", EOS]]


def test_a_boundary_that_the_tokenizer_cannot_draw_is_refused(tmp_path: Path):
    chat = merging_tokenizer(tmp_path, PLAIN.replace("GAP", " "), metaspace=True)
    with pytest.raises(ModelError, match=r"^here: .*cannot write the answer 'bc<\|eos\|>' after.*spans the two"):
        tokenise(talk("q", "bc"), chat)


def test_an_end_that_the_tokenizer_joins_with_other_text_is_refused(tmp_path: Path):
    chat = merging_tokenizer(tmp_path, PLAIN.replace("GAP", "\\n").replace("eos_token", "' b'"))
    end = chat._tokenizer.convert_tokens_to_ids("b")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(
        ModelError, match=r"^here: .*end of the answer 'x b' as the token 'Ġb'.*stops at the tokens b, <"
    ):
        tokenise(talk("q", "x"), ChatTokenizer(tmp_path))


def sizes(chat: ChatTokenizer, conversation: Conversation) -> tuple[int, int]:
    """Tokens up to the end of the first answer, and of all."""
    text = one(conversation, chat)
    return text.trained.index(False, text.trained.index(True)), len(text.token_ids)


def test_long_conversations_are_cut_after_an_answer_dropped_or_refused(chats: dict[str, ChatTokenizer]):
    chat = chats["chatml"]
    short, long, hopeless = talk("a", "b"), talk("a", "b", "c", "d" * 50), talk("a" * 200, "b")
    whole = one(short, chat)
    first, all_of_it = sizes(chat, long)
    assert first == len(whole.token_ids) < all_of_it
    for limit in (first, first + 1, all_of_it - 1):
        cut = make_texts([short, long, hopeless], chat, limit, "cut")
        assert (cut.texts, cut.num_cut, cut.num_dropped) == ((whole, whole), 1, 1)
        dropped = make_texts([short, long, hopeless], chat, limit, "drop")
        assert (dropped.texts, dropped.num_cut, dropped.num_dropped) == ((whole,), 0, 2)
        with pytest.raises(DataError, match=rf"2 of 3 texts are too long.*has {len(one(hopeless, chat).token_ids)} tok"
                           rf".*\(here\).*at most {limit} tokens"):  # fmt: skip
            make_texts([short, long, hopeless], chat, limit, "stop")
    kept = make_texts([short, long], chat, all_of_it, "stop")
    assert (len(kept.texts), kept.num_cut, kept.num_dropped) == (2, 0, 0)


@pytest.mark.parametrize("long", ["cut", "drop"])
def test_a_limit_that_leaves_nothing_is_refused(chats: dict[str, ChatTokenizer], long):
    with pytest.raises(DataError, match="1 of 1 texts are too long, and none is left"):
        make_texts([talk("a", "b")], chats["chatml"], 10, long)


def test_a_cut_never_ends_in_a_given_answer(chats: dict[str, ChatTokenizer]):
    chat = chats["chatml"]
    first, _ = sizes(chat, talk("a", "b", "c", "d"))
    with pytest.raises(DataError, match="none is left"):
        make_texts([talk("a", "b", "c", "d", num_given=3)], chat, first, "cut")
