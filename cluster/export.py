"""`tenfold export`: what a run trained last, for use elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.runs import find_run
from configs.load import load_recipe
from rlhf.errors import ModelError
from rlhf.ports import Console

NUM_TEXTS, MAX_TOKENS = 8, 64
TEXTS = (
    "The answer to a question is best when it is short, true and kind.",
    "一年有四个季节。春天花开，夏天炎热，秋天叶落，冬天下雪。",
    "def add(a, b):\n    return a + b\n",
)


def export_run(run: str, to: Path, *, merge: bool, console: Console) -> dict[str, object]:
    """What was written to the folder `to` and how it was checked, as JSON holds it.

    Raises TenfoldError: no such run, nothing trained yet, `to` holds something, or a check that failed.
    """
    from actors.export import check_dest, export
    from rlhf.lineage import trained_last

    folder = find_run(run).resolve()
    recipe = load_recipe(folder / "recipe.yaml")
    trained = trained_last(folder, recipe)
    check_dest(to)
    if merge and not trained.is_adapter:
        console.say(f"{trained.folder} is a whole model already: there is nothing to merge")
    own_base = trained.base is not None and trained.base.is_relative_to(folder)
    with console.task(f"export {trained.folder.name}"):
        done = export(
            trained,
            to,
            recipe.lora,
            check_texts(folder, trained.base or trained.folder),
            merge=merge,
            with_tokenizer=own_base,
        )
    base = str(trained.base) if trained.base else None
    return {"run": str(folder), "stage": trained.stage, "to": str(to), "base": base, **asdict(done)}


def check_texts(folder: Path, model: Path) -> list[Sequence[int]]:
    """Token ids that an export is checked on: prompts of the run in `folder`, else fixed texts."""
    from rlhf.kept_prompts import read_prompts
    from rlhf.tokenizer import load_tokenizer

    prompts = read_prompts(folder)
    if prompts is not None:
        found = [prompt.token_ids[:MAX_TOKENS] for prompt in (*prompts.train, *prompts.held_out)[:NUM_TEXTS]]
    else:
        if not model.is_dir():
            raise ModelError(f"There is no folder {model}, which the run stands on.", remedy="Bring it back.")
        tokenizer = load_tokenizer(model)
        found = [tokenizer.encode(text)[:MAX_TOKENS] for text in TEXTS]
    return [text for text in found if len(text) > 1]


def page(done: dict[str, object]) -> str:
    """The result in words."""
    lines = [f"{done['to']}: the {done['kind']} of the stage {done['stage']}, {done['dtype']}."]
    if done["kind"] == "adapter":
        lines.append(f"It stands on {done['base']}; --merge makes one model of both.")
    lines.append(
        f"Loaded by plain transformers{' and peft' if done['kind'] == 'adapter' else ''}, its logprobs of "
        f"{done['num_tokens']} tokens differ from those of what was trained by at most {done['to_trained']:.2g} nats "
        f"(the limit is {done['limit']:g})"
        + ("." if done["to_base"] is None else f", from the base's by up to {done['to_base']:.2g}.")
    )
    return "\n".join(lines)
