"""What a run would do, said before anything starts: `--dry-run`."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.placement import GroupPlan, Resources, place, place_crew
from cluster.planning import foreseen
from configs.model_stages import ConversationSource, CorpusSource
from configs.schema import MODEL_STAGES, Recipe, Stage
from rlhf.errors import TenfoldError
from rlhf.rounds import key, label, schedule

Preview = dict[str, object]


def preview(recipe: Recipe, only: Sequence[Stage] | None = None) -> Preview:
    """The plan as plain values that JSON can hold. Nothing is started, written or locked.

    What the recipe leaves open of placement and memory is as a run on this machine would choose it.
    What this machine lacks (model, data, GPUs) does not stop it: it stands under `missing`.
    Raises TenfoldError for what no machine could run, such as an unknown rule or a group that does not exist.
    """
    from rlhf.rules import RuleScorer

    if recipe.rules:
        RuleScorer(recipe.rules)
    stages, folder = only or recipe.stages, Path(recipe.runs) / recipe.name
    if "sft" in stages:
        from rlhf.templates import check_template  # transformers takes seconds to import

        check_template(recipe, stages)
    missing: list[str] = []
    ahead = foreseen(recipe, stages)
    recipe = ahead.recipe
    _look_at_texts(recipe, stages, missing)
    prompts = _prompts(recipe, missing)
    done = finished_stages(folder)
    asked = Resources(cpus=math.inf, gpus=recipe.cluster.gpus if recipe.cluster.gpus != "auto" else gpus_here())
    placement = place(recipe, asked)
    makers = [stage for stage in stages if stage in MODEL_STAGES]
    crew = place_crew(recipe, asked) if makers else None
    gpus = round(sum(bundle.get("GPU", 0.0) for bundle in placement.bundles))
    if crew:  # it has ended when the other groups start
        gpus = max(gpus, round(crew.num_workers * crew.gpus))
    if recipe.cluster.address is None and gpus > gpus_here():
        missing.append(f"GPUs: the run takes {gpus}, this machine has {gpus_here()}")
    if ahead.lacking:
        missing.append(f"memory or GPUs: {ahead.lacking}")
    return {
        "name": recipe.name,
        "run": str(folder),
        "begun": (folder / "manifest.json").exists(),
        "seed": recipe.seed,
        "stages": [
            {
                "stage": label(stage, round),
                "state": "done" if key(stage, round) in done else "run",
                "what": _what(stage, round, recipe, prompts),
            }
            for stage, round in schedule(stages, recipe.rounds)
        ],
        "model": {"path": recipe.model.path, "dtype": recipe.model.dtype, "lora_rank": recipe.lora.rank},
        "prompts": {"source": recipe.data.prompts, **prompts},
        "plan": {"said": ahead.said, "chosen": dict(ahead.chosen)},
        "crew": _group(crew, makers) if crew else None,
        "placement": {
            "kind": recipe.cluster.placement,
            "gpus": gpus,
            "groups": [_group(g, g.roles) for g in placement.groups],
        },
        "missing": missing,
    }


def finished_stages(folder: Path) -> Mapping[str, Mapping[str, object]]:
    """Stage -> its results, of the stages that a run's manifest records as done; read without taking the run's lock."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return {stage: cast(Mapping[str, object], entry["results"]) for stage, entry in manifest["stages"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def gpus_here() -> int:
    """The GPUs of this machine, counted without a driver's library: importing torch for this takes seconds."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def page(plan: Preview) -> RenderableType:
    """The plan for rich to print."""
    model, prompts = cast(Preview, plan["model"]), cast(Preview, plan["prompts"])
    grid = Table.grid(padding=(0, 2))
    grid.add_row("run", Text(f"{plan['run']} ({'begun before' if plan['begun'] else 'new'}), seed {plan['seed']}"))
    grid.add_row(
        "model", Text(f"{model['path'] or 'made by pretrain'}, {model['dtype']}, LoRA rank {model['lora_rank']}")
    )
    grid.add_row("prompts", Text(f"{prompts['source']}: {_split(prompts)}" if prompts["source"] else _split(prompts)))
    stages = Table("stage", "", "what it does", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in cast(list[dict[str, str]], plan["stages"]):
        stages.add_row(row["stage"], row["state"], Text(row["what"]))
    placement = cast(Preview, plan["placement"])
    groups = Table("group", "workers", "plays", "each takes", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    crew = cast(dict[str, object] | None, plan["crew"])
    for group in [*([crew] if crew else []), *cast(list[dict[str, object]], placement["groups"])]:
        takes = f"{group['cpus']:g} CPU" + (f", {group['gpus']:g} GPU" if group["gpus"] else "")
        groups.add_row(str(group["group"]), str(group["workers"]), ", ".join(cast(list[str], group["roles"])), takes)
    parts: list[RenderableType] = [
        Text("What would run (nothing was started)", style="bold"),
        grid,
        Padding(stages, (1, 0)),
        Text(f"Placement: {placement['kind']}, GPUs: {placement['gpus']}", style="bold"),
        groups,
    ]
    if said := cast(str, cast(Preview, plan["plan"])["said"]):
        parts.append(Text(f"\n{said}"))
    missing = cast(list[str], plan["missing"])
    if missing:
        parts += [Text("\nMissing on this machine", style="bold"), *(Text(f"  - {line}") for line in missing)]
    return Group(*parts)


def _look_at_texts(recipe: Recipe, stages: Sequence[Stage], missing: list[str]) -> None:
    """Whether the files of the stages that make a model are here and begin as they should; none is read to its end."""
    from rlhf.hub import HUB

    def of_hub(sources: Sequence[CorpusSource] | Sequence[ConversationSource]) -> bool:
        return any(source.path.startswith(HUB) for source in sources)  # a run fetches those; this starts nothing

    if "pretrain" in stages and not of_hub(recipe.pretrain.sources):
        from rlhf.corpus import check_corpus, corpus_sources

        try:
            check_corpus(corpus_sources(recipe))
        except TenfoldError as error:
            missing.append(f"the raw text: {error}")
    if "sft" in stages and not of_hub(recipe.sft.sources):
        from rlhf.conversations import check_conversations, conversation_sources

        try:
            check_conversations(conversation_sources(recipe))
        except TenfoldError as error:
            missing.append(f"the conversations: {error}")


def _prompts(recipe: Recipe, missing: list[str]) -> Preview:
    """Numbers of prompts: as the run will split them where the model's tokenizer is here, else of all rows."""
    from rlhf.sources import read_items

    lists = recipe.reward.rankings
    if lists and "reward" in recipe.stages and not Path(lists).is_file():
        missing.append(f"the rankings: there is no file reward.rankings={lists}")
    makes_model = any(stage in recipe.stages for stage in MODEL_STAGES)
    if recipe.model.path and not Path(recipe.model.path).is_dir():
        missing.append(
            f"the model: there is no folder {recipe.model.path}; `tenfold import-model SOURCE DEST` makes one"
        )
    if recipe.data.prompts in ((), ""):
        return {"total": None, "train": None, "held_out": None}
    if makes_model or not Path(recipe.model.path).is_dir():
        try:
            return {"total": sum(1 for _ in read_items(recipe.data.prompts)), "train": None, "held_out": None}
        except TenfoldError as error:
            missing.append(f"the prompts: {error}")
            return {"total": None, "train": None, "held_out": None}

    from rlhf.chat import ChatTokenizer, check_lengths  # transformers takes seconds to import
    from rlhf.data import load_prompts

    chat = ChatTokenizer(recipe.model.path)
    check_lengths(recipe.data.max_prompt_tokens, recipe.sampling.max_answer_tokens, chat)
    try:
        prompts = load_prompts(recipe.data, chat)
    except TenfoldError as error:
        missing.append(f"the prompts: {error}")
        return {"total": None, "train": None, "held_out": None}
    train, held_out = len(prompts.train), len(prompts.held_out)
    return {"total": train + held_out, "train": train, "held_out": held_out}


def _what(stage: Stage, round: int, recipe: Recipe, prompts: Preview) -> str:
    if stage in MODEL_STAGES:
        return _what_is_made(stage, recipe)
    n, train = recipe.sampling.n, cast(int | None, prompts["train"])
    tokens = recipe.sampling.max_answer_tokens
    if stage == "sample":
        num = _at_most(recipe.sample.num_prompts, train)
        writer = "newest policy" if round else "starting model"
        return f"{num} prompts, {n} answers to each, of at most {tokens} tokens, by the {writer}"
    if stage == "rank":
        return f"{recipe.rank.judge} rank the {n} answers of each prompt"
    if stage == "reward":
        reward = recipe.reward
        return f"{reward.loss} on whole groups, {reward.groups_per_batch} a batch, epochs: {reward.epochs}"
    if stage == "ppo":
        ppo = recipe.ppo
        score = (
            ppo.score if isinstance(ppo.score, str) else " + ".join(f"{w:g} {name}" for name, w in ppo.score.items())
        )
        return (
            f"{ppo.num_steps} steps of {ppo.num_prompts} prompts with {n} answers each "
            f"({ppo.num_prompts * n} answers a step), scored by {score}; "
            f"{'the next answers are written while a step trains; ' if ppo.max_staleness else ''}"
            f"epochs: {ppo.epochs}, minibatches: {ppo.num_minibatches}, advantage: {ppo.advantage}"
        )
    num = _at_most(recipe.evaluate.num_prompts, cast(int | None, prompts["held_out"]))
    return (
        f"{num} held-out prompts, {n} sampled answers and a greedy one to each, before and after, "
        f"judged by {recipe.evaluate.judge}"
    )


def _what_is_made(stage: Stage, recipe: Recipe) -> str:
    workers = recipe.cluster.workers.get("trainer", 1)
    by = f"workers: {workers}, ZeRO {recipe.learner.zero_stage}"
    if stage == "sft":
        sft = recipe.sft
        kind = (
            f"the adapter {recipe.adapter!r}"
            if recipe.adapter
            else {"lora": "LoRA, merged", "full": "whole"}[sft.train]
        )
        return (
            f"{', '.join(source.path for source in sft.sources)}: {kind}, {sft.batch_texts} conversations a step, "
            f"epochs: {sft.epochs}; {by}"
        )
    config, sizes = recipe.pretrain, recipe.pretrain.sizes
    model = (
        f"a new model, {sizes.num_layers} layers of {sizes.hidden_size}" if sizes else f"{recipe.model.path} goes on"
    )
    long = f"{config.num_steps} steps" if config.num_steps else f"epochs: {config.epochs:g}"
    return (
        f"{', '.join(source.path for source in config.sources)}: {model}, {config.batch_rows} rows of "
        f"{config.row_tokens} tokens a step, {long}; {by}"
    )


def _at_most(wanted: int | None, have: int | None) -> str:
    if wanted is None:
        return "all train" if have is None else str(have)
    return str(wanted if have is None else min(wanted, have))


def _group(group: GroupPlan, plays: Sequence[str]) -> dict[str, object]:
    return {
        "group": group.name,
        "workers": group.num_workers,
        "roles": list(plays),
        "cpus": group.cpus,
        "gpus": group.gpus,
    }


def _split(prompts: Preview) -> str:
    if prompts["total"] is None:
        return "not here" if prompts["source"] else "none are asked for"
    if prompts["train"] is None:
        return f"{prompts['total']} rows"
    return f"{prompts['train']} to train on, {prompts['held_out']} held out"
