"""Named chat templates, for a base that has none."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from configs.schema import Recipe, Stage
from rlhf.chat import ChatTokenizer, first_line, read_json
from rlhf.disk import to_json, write_file
from rlhf.errors import ModelError, RecipeError
from rlhf.tokenizer import SpecialTokens


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, and what a tokenizer needs for it."""

    jinja: str
    tokens: tuple[str, ...] = ()  # special tokens that it writes, each one token id
    end: str | None = None  # which of them ends an answer; None: the tokenizer's own end of text


TEMPLATES: Mapping[str, Template] = {
    "chatml": Template(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": Template(
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() }}"
        "{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    # For a tokenizer that `pretrain` trained: it has these tokens already, and the model learns them in full alignment.
    "roles": Template(
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # No token is added, so that no embedding starts untrained: for LoRA on a base whose embeddings stay frozen.
    "plain": Template(
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['role'].capitalize() + ':\\n' + message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}",
    ),
}


@dataclass(frozen=True, slots=True)
class Given:
    """What a tokenizer got, and what its model needs for that."""

    added: tuple[str, ...]  # tokens that were not in the vocabulary before
    num_tokens: int  # V, the smallest embedding that serves the tokenizer
    num_embeddings: int  # of the model, as it is

    @property
    def num_new_embeddings(self) -> int:
        """By how many the model's embedding must grow; 0 where it has room."""
        return max(0, self.num_tokens - self.num_embeddings)


def check_template(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Nothing, if `sft` can have the template that the recipe names, as far as the recipe alone tells.

    What `pretrain` is to make before it is known so far: without `pretrain.tokenizer` it has a tokenizer of ours.
    Raises ModelError, RecipeError.
    """
    config = recipe.sft
    if config.template is not None:
        template = named_template(config.template)
        if recipe.adapter:
            raise RecipeError(
                f"adapter={recipe.adapter} with sft.template={config.template}: a named adapter leaves its base as it "
                "is, and so without a template.",
                remedy="Align the base once with that template, without `adapter`; put adapters on what comes out.",
            )
    if "pretrain" not in stages or recipe.pretrain.sizes is None or recipe.pretrain.tokenizer:
        return
    if config.template is None:
        adapter = f" A named adapter (adapter={recipe.adapter}) cannot bring one." if recipe.adapter else ""
        raise RecipeError(
            f"sft: the model that `pretrain` makes has no chat template.{adapter}",
            limit=f"Known are {', '.join(TEMPLATES)}.",
            remedy="Align the base first, with sft.template and without `adapter`, in a run of its own."
            if recipe.adapter
            else "Name one: sft.template=roles.",
        )
    added = [token for token in template.tokens if token not in SpecialTokens().all]
    if added and config.train == "lora":
        raise _untrained(config.template, added)


def refuse_untrained(name: str, given: Given, train: str) -> None:
    """Raises ModelError where LoRA would leave new tokens without an embedding that was ever learned."""
    if given.num_new_embeddings and train == "lora":
        raise _untrained(name, given.added)


def _untrained(name: str, added: Sequence[str]) -> ModelError:
    return ModelError(
        f"sft.template={name} adds the tokens {', '.join(added)}, for which the model has no embedding.",
        limit="LoRA leaves the embeddings as they are, so they would never be learned.",
        remedy="Set sft.train=full, or take the template `plain`, which adds none.",
    )


def named_template(name: str) -> Template:
    """The template of that name. Raises ModelError."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        raise ModelError(
            f"There is no chat template named {name!r}.",
            limit=f"Known are {', '.join(TEMPLATES)}.",
            remedy=f"Did you mean {near[0]}?" if near else "Name one of them.",
        )
    return TEMPLATES[name]


def give_template(tokenizer: PreTrainedTokenizerBase, name: str, num_embeddings: int) -> Given:
    """What the tokenizer got: it now has the template `name`, the tokens of it, and its end of a turn as EOS.

    `num_embeddings` is the number of tokens that the model embeds. The template writes BOS first if the tokenizer puts
    one before plain text: so the model has learned its texts. Doing it again changes nothing.

    Raises ModelError: an unknown name, another template in the tokenizer, no end of text where the template takes the
    tokenizer's, a vocabulary that is larger than the embedding before anything was added.
    """
    template = named_template(name)
    jinja = ("{{ bos_token }}" if _puts_bos(tokenizer) else "") + template.jinja
    if tokenizer.chat_template not in (None, "", jinja):
        raise ModelError(
            f"The tokenizer has a chat template of its own, so {name!r} is not written over it.",
            remedy="Name no template: the tokenizer's is taken.",
        )
    if template.end is None and tokenizer.eos_token is None:
        raise ModelError(
            f"The template {name!r} ends an answer with the tokenizer's end of text, and the tokenizer names none.",
            remedy="Set eos_token in tokenizer_config.json, or take a template with an end of its own: "
            + ", ".join(other for other, its in TEMPLATES.items() if its.end)
            + ".",
        )
    vocabulary = tokenizer.get_vocab()
    added = tuple(token for token in template.tokens if token not in vocabulary)
    if tokenizer.chat_template != jinja:
        check_vocabulary(tokenizer, num_embeddings)
    # All of them, not the missing ones alone: one that is known as plain text becomes a special token.
    tokens: list[Any] = [AddedToken(token, special=True, normalized=False) for token in template.tokens]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if template.end is not None:
        tokenizer.eos_token = template.end
    tokenizer.chat_template = jinja
    return Given(added, num_tokens(tokenizer), num_embeddings)


def write_template(base: Path, name: str, dest: Path) -> Given:
    """What the tokenizer of the folder `base` got; `dest` now holds it, for ChatTokenizer and for saving with a model.

    Beside it stand the base's config.json, as it is, and generation_config.json, which names the end of a turn and the
    base's end of text. `base` is not changed. Raises ModelError as `give_template` does, for a base without tokenizer
    or vocabulary size, and where `dest` is the base itself.
    """
    if dest.resolve() == base.resolve():
        raise ModelError(f"The template would be written into the base {base}.", remedy="Name another folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base} has no tokenizer that can be loaded: {first_line(error)}.",
            remedy="Give a folder in Hugging Face layout; `tenfold import-model SOURCE DEST` makes one.",
        ) from error
    end_of_text = tokenizer.eos_token_id
    given = give_template(tokenizer, name, _num_embeddings(base))
    dest.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(dest))
    shutil.copyfile(base / "config.json", dest / "config.json")
    generation = read_json(base / "generation_config.json")
    known = generation.get("eos_token_id")
    ends = {known} if isinstance(known, int) else set(known or ())
    generation["eos_token_id"] = sorted((ends | {end_of_text, tokenizer.eos_token_id}) - {None})
    write_file(dest / "generation_config.json", to_json(generation))
    assert tokenizer.eos_token_id in ChatTokenizer(dest).eos_ids
    return given


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """V, the smallest embedding that serves the tokenizer: ids may have gaps, so it counts to the highest one."""
    return 1 + max(tokenizer.get_vocab().values())


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raises ModelError if the tokenizer has ids that the model has no embedding for."""
    if num_tokens(tokenizer) > num_embeddings:
        raise ModelError(
            f"The tokenizer's vocabulary has {num_tokens(tokenizer)} tokens, and the model embeds {num_embeddings}.",
            limit="The embedding has to be as large as the vocabulary.",
            remedy="Use the tokenizer that the model was trained with, or a model whose embedding was enlarged for it.",
        )


def _num_embeddings(folder: Path) -> int:
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(size := part.get("vocab_size"), int):
            return size
    raise ModelError(
        f"{folder / 'config.json'} does not say how many tokens the model embeds.",
        remedy="Give a folder in Hugging Face layout whose config.json has vocab_size.",
    )


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id if tokenizer.bos_token is not None else None
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
