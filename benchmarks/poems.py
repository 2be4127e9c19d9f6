"""How many poems keep to their form after pretraining, alignment and PPO, on the same held-out titles.

    python -m benchmarks.poems runs/tang-poems [--samples 4] [--json FILE]

Loads the models of a run of configs/recipes/tang_poems.yaml as anybody would, with plain transformers and peft, lets
write poems at the recipe's temperature, and prints the share that is well-formed (number and length of clauses,
rhyme, nothing repeated, ended by itself) with a 95 % interval (bootstrap over titles), the real poems' share beside it;
then the share of each of these parts alone, which says what the rest fail by, the shares of the four forms, and how far
the poems differ, since one rhyme for all of them is in form as well. Ten poems of each model go into poems.md of the
run folder. The pretrained model is asked twice: in the words that the others get, which it has never seen, and by a
title as it stands in its corpus.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.writer import Writer, Written
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.kept_prompts import read_prompts
from rlhf.poems import FORMS, asked_form, asked_title, clauses, is_well_formed
from rlhf.records import Prompt
from rlhf.rhymes import num_rhyming, rhyme
from rlhf.seeds import shuffle_seed
from rlhf.statistics import bootstrap_interval

REAL = Path("data/tang/real.jsonl")
SHOWN = 10
KINDS = {
    "parts": "what is right, each by itself",
    "forms": "well-formed, of those asked for",
    "variety": "different characters, commonest rhyme",
}
PARTS = ("form", "rhyme", "different", "ended")


class Poem(Written):
    """What was written for a title."""

    __slots__ = ()

    @property
    def is_well_formed(self) -> bool:
        return is_well_formed(self.prompt, self.text, self.ended)

    @property
    def ends(self) -> list[str]:
        """The last characters of the even clauses."""
        return [clause[-1:] for clause in clauses(self.text)[1::2]]

    @property
    def parts(self) -> dict[str, bool]:
        """Whether each part of a well-formed one is right: clauses, rhyme, nothing repeated, end."""
        form, said, ends = asked_form(self.prompt), clauses(self.text), self.ends
        return {
            "form": form is not None and [len(clause) for clause in said] == [form.length] * form.num_clauses,
            "rhyme": len(ends) > 1 and num_rhyming(ends) == len(ends),
            "different": len(set(said)) == len(said),
            "ended": self.ended,
        }


def main() -> int:
    """0 if each share is clearly above the one before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="poems per title and model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.yaml")
    prompts = read_prompts(options.run)
    if prompts is None:
        raise SystemExit(f"{options.run} has no prompts yet: run the recipe's stages first.")
    titles = prompts.held_out[: recipe.evaluate.num_prompts]
    rows = [row(name, poems, recipe.seed) for name, poems in all_poems(options.run, recipe, titles, options.samples)]
    temperature = recipe.sampling.temperature
    print(f"\n{len(titles)} held-out titles, {options.samples} poems each at temperature {temperature:g}\n")
    print("\n".join(table(rows)))
    write_samples(options.run / "poems.md", rows)
    print(f"\nten poems of each: {options.run / 'poems.md'}")
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    climbing = rows[1:4]  # without the pretrained model in unknown words, and the ceiling
    return int(any(above["low"] <= below["high"] for below, above in pairwise(climbing)))


def all_poems(run: Path, recipe: Recipe, titles: Sequence[Prompt], num: int) -> Iterator[tuple[str, list[Poem]]]:
    """(who wrote them, poems in order of titles) for each model, worst first, and the real ones."""
    base, sft = run / "models" / "base", run / "models" / "sft"
    words = [prompt.messages[-1].content for prompt in titles]
    seed = shuffle_seed(recipe.seed, "poems")

    def poems(writer: Writer, asked: Sequence[Sequence[int]]) -> list[Poem]:
        return [Poem(one.prompt, one.text, one.ended) for one in writer.write(words, asked, num, seed)]

    plain = Writer(base, recipe.sampling)
    yield "pretrained, asked in the same words", poems(plain, [plain.encode(f"{text}\n") for text in words])
    headed = [plain.encode(f"《{asked_title(text)}》\n") for text in words]
    yield "pretrained, given the title as in its corpus", poems(plain, headed)
    asked = [prompt.token_ids for prompt in titles]
    yield "aligned (SFT)", poems(Writer(sft, recipe.sampling), asked)
    yield "aligned, then PPO", poems(Writer(sft, recipe.sampling, run / "models" / "policy"), asked)
    if REAL.exists():
        found = {made["prompt"]: made["completion"] for made in map(json.loads, REAL.read_text().splitlines())}
        yield "Tang poets", [Poem(text, found[text], True) for text in words]


def row(name: str, poems: Sequence[Poem], seed: int) -> dict[str, Any]:
    """The figures of one writer."""
    by_title: dict[str, list[float]] = {}
    for poem in poems:
        by_title.setdefault(poem.prompt, []).append(float(poem.is_well_formed))
    shares = torch.tensor([sum(found) / len(found) for found in by_title.values()])
    low, high = bootstrap_interval(shares, num=2000, seed=seed)
    first = {poem.prompt: poem.text for poem in reversed(poems)}
    return {
        "name": name,
        "share": float(shares.mean()),
        "low": low,
        "high": high,
        "parts": {part: mean(poem.parts[part] for poem in poems) for part in PARTS},
        "forms": {
            form.name: mean(poem.is_well_formed for poem in poems if asked_form(poem.prompt) == form) for form in FORMS
        },
        "variety": variety(poems),
        "poems": [[prompt, first[prompt]] for prompt in list(by_title)[:SHOWN]],
    }


def variety(poems: Sequence[Poem]) -> dict[str, float | None]:
    """How far they differ: the share of different characters in a poem, and of the commonest rhyme among all poems.

    Who always writes the same rhyme is well-formed, too. Of poems whose even clauses rhyme at all.
    """
    characters = [[char for clause in clauses(poem.text) for char in clause] for poem in poems]
    different = [len(set(found)) / len(found) for found in characters if found]
    rhymes = Counter(rhyme(poem.ends) for poem in poems)
    del rhymes[None]
    return {
        "different": sum(different) / len(different) if different else None,
        "one rhyme": max(rhymes.values()) / rhymes.total() if rhymes else None,
    }


def mean(values: Iterable[bool]) -> float | None:
    """Their share; None of none."""
    found = list(values)
    return sum(found) / len(found) if found else None


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines for people: the shares, then what each is made of."""
    yield f"{'written by':44} {'well-formed':>11} {'95 % interval':>17}"
    for found in rows:
        yield f"{found['name']:44} {found['share']:11.1%} {found['low']:8.1%} - {found['high']:6.1%}"
    for kind, title in KINDS.items():
        yield f"\n{title:44} " + " ".join(_right(name) for name in rows[0][kind])
        for found in rows:
            shares = ("-" if share is None else f"{share:.1%}" for share in found[kind].values())
            yield f"{found['name']:44} " + " ".join(map(_right, shares))


def _right(text: str) -> str:
    """At the right of a column; a Chinese character is two wide."""
    return " " * (9 - sum(1 if char.isascii() else 2 for char in text)) + text


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Ten poems of each writer, as Markdown."""
    parts: list[str] = []
    for found in rows:
        parts.append(f"# {found['name']}: {found['share']:.1%} well-formed\n")
        parts += [f"**{prompt}**\n\n```\n{text}\n```\n" for prompt, text in found["poems"]]
    path.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
