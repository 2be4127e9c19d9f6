"""What is checked of a recipe and its data before a run builds anything that costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import MODEL_STAGES, Recipe, Stage
from rlhf.errors import DataError

if TYPE_CHECKING:
    from rlhf.chat import ChatTokenizer
    from rlhf.data import Prompts
    from rlhf.store import RunStore


def check_early(recipe: Recipe, stages: Sequence[Stage], *, has_prompts: bool) -> None:
    """Nothing, if what later stages need can be found, as far as that is known before there is a model.

    `has_prompts`: the run has kept its prompts, so that their files may be gone.
    """
    from rlhf.adapters import starting_adapter
    from rlhf.conversations import check_conversations, conversation_sources, load_conversations
    from rlhf.corpus import check_corpus, corpus_sources
    from rlhf.desk.desk import read_guidelines
    from rlhf.desk.exchange import IMPORTED, check_answers, read_rows, rows_of_file
    from rlhf.remote_score import check_score_servers
    from rlhf.rules import RuleScorer
    from rlhf.sources import read_items
    from rlhf.templates import check_template

    if recipe.adapter_from and "sft" not in recipe.stages:
        starting_adapter(recipe)
    if "pretrain" in stages:
        check_corpus(corpus_sources(recipe))
    if "sft" in stages:
        check_template(recipe, stages)
        check_conversations(conversation_sources(recipe))
        if "pretrain" in stages:  # which takes long: what comes after it is read to its end now
            load_conversations(conversation_sources(recipe), recipe.sft.held_out, recipe.sft.system)
    if all(stage in MODEL_STAGES for stage in stages):
        return
    if recipe.rules:
        RuleScorer(recipe.rules)
    check_score_servers(recipe, stages)
    if recipe.rank.judge == "people":
        read_guidelines(recipe.desk.guidelines)
    if recipe.reward.rankings and "reward" in stages:
        for taken in read_rows(rows_of_file(Path(recipe.reward.rankings)), IMPORTED):
            check_answers(taken)
    if not has_prompts and recipe.asks_prompts(stages) and next(iter(read_items(recipe.data.prompts)), None) is None:
        raise DataError(f"data.prompts={recipe.data.prompts!r} holds no prompt.", limit="At least 1 is needed.")


def checked_prompts(
    recipe: Recipe, store: RunStore, kept: Prompts | None, stages: Sequence[Stage]
) -> tuple[ChatTokenizer, Prompts]:
    """The tokenizer and the prompts, the run's own where it has them (`kept`), once all is checked that needs both."""
    from rlhf.chat import ChatTokenizer
    from rlhf.data import Prompts, load_prompts
    from rlhf.desk.desk import open_desk

    chat = ChatTokenizer(recipe.model.path)
    none_named = not recipe.data.prompts and not recipe.asks_prompts(stages)
    prompts = kept or (Prompts((), (), 0) if none_named else load_prompts(recipe.data, chat))
    check(recipe, chat, prompts, stages)
    if recipe.reward.rankings and "reward" in stages:
        _check_rankings(Path(recipe.reward.rankings), chat, prompts)
    if recipe.rank.judge == "people" and "rank" in stages:
        open_desk(store.folder, recipe).close()  # a database that cannot be reached is told now
    return chat, prompts


def _check_rankings(path: Path, chat: ChatTokenizer, prompts: Prompts) -> None:
    """Nothing, if a model can be trained on the file's answers, those to the run's own prompts apart. Raises DataError.

    `reward` would find the same, after `sample` and people's work.
    """
    from rlhf.desk.exchange import IMPORTED, read_rows, rows_of_file
    from rlhf.desk.groups import tokenised
    from rlhf.desk.records import Item

    own = {prompt.id for prompt in prompts.train}
    for one in read_rows(rows_of_file(path), IMPORTED):
        if one.prompt_id not in own:
            tokenised([Item(one.prompt_id, 0, one.messages, one.answers, None, 0, 0, False)], chat)


def check(recipe: Recipe, chat: ChatTokenizer, prompts: Prompts, stages: Sequence[Stage]) -> None:
    """Nothing, if the recipe fits its data and its rules can be found. Raises TenfoldError; starts no role."""
    from rlhf.chat import check_lengths
    from rlhf.rules import RuleScorer
    from rlhf.text import text_groups

    check_lengths(recipe.data.max_prompt_tokens, recipe.sampling.max_answer_tokens, chat)
    if recipe.rules:
        RuleScorer(recipe.rules)
    if "ppo" in stages and recipe.ppo.num_prompts > len(prompts.train):
        raise DataError(
            f"ppo.num_prompts={recipe.ppo.num_prompts}: the train split has {len(prompts.train)} prompts.",
            remedy="Lower it, or bring more prompts (data.prompts, data.limit, data.held_out).",
        )
    measures = "evaluate" in stages or ("ppo" in stages and recipe.ppo.evaluate_every is not None)
    if measures and not prompts.held_out:
        raise DataError(
            f"data.held_out={recipe.data.held_out} leaves no prompt to evaluate on.",
            remedy="Raise it, bring more prompts, or leave `evaluate` and ppo.evaluate_every out.",
        )
    if "evaluate" in stages and recipe.evaluate.text:
        text_groups(recipe.evaluate.text, chat, recipe.evaluate.text_tokens)
