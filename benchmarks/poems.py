"""How many poems keep to their form after pretraining, alignment and PPO, on the same held-out titles.

    python -m benchmarks.poems runs/tang-poems [--samples 4] [--json FILE]

Loads the models of a run of configs/recipes/tang_poems.yaml as anybody would, with plain transformers and peft, lets
write poems at the recipe's temperature, and prints the share that is well-formed (number and length of clauses,
rhyme, nothing repeated, ended by itself) with a 95 % interval (bootstrap over titles), the real poems' share beside it;
then the share of each of these parts alone, which says what the rest fail by, and the shares of the four forms.
Ten poems of each model go into poems.md of the run folder. The pretrained model is asked twice: in the words that the
others get, which it has never seen, and by a title as it stands in its corpus.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.import_model import quiet_transformers
from rlhf.kept_prompts import read_prompts
from rlhf.poems import FORMS, asked_form, asked_title, clauses, is_well_formed
from rlhf.records import Prompt
from rlhf.rhymes import num_rhyming
from rlhf.seeds import shuffle_seed
from rlhf.statistics import bootstrap_interval

REAL = Path("data/tang/real.jsonl")
AT_ONCE = 256  # poems that are written side by side
SHOWN = 10
PARTS = ("form", "rhyme", "different", "ended")


@dataclass(frozen=True, slots=True)
class Poem:
    """What was written for a title."""

    prompt: str
    text: str
    ended: bool  # by itself

    @property
    def is_well_formed(self) -> bool:
        return is_well_formed(self.prompt, self.text, self.ended)

    @property
    def parts(self) -> dict[str, bool]:
        """Whether each part of a well-formed one is right: clauses, rhyme, nothing repeated, end."""
        form, said = asked_form(self.prompt), clauses(self.text)
        ends = [clause[-1:] for clause in said[1::2]]
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
    plain = Writer(base, recipe)
    yield "pretrained, asked in the same words", plain.write(words, [plain.encode(f"{text}\n") for text in words], num)
    headed = [plain.encode(f"《{asked_title(text)}》\n") for text in words]
    yield "pretrained, given the title as in its corpus", plain.write(words, headed, num)
    asked = [list(prompt.token_ids) for prompt in titles]
    aligned = Writer(sft, recipe)
    yield "aligned (SFT)", aligned.write(words, asked, num)
    yield "aligned, then PPO", Writer(sft, recipe, run / "models" / "policy").write(words, asked, num)
    if REAL.exists():
        found = {made["prompt"]: made["completion"] for made in map(json.loads, REAL.read_text().splitlines())}
        yield "Tang poets", [Poem(text, found[text], True) for text in words]


class Writer:
    """A model of a run with its tokenizer, as others load them."""

    def __init__(self, folder: Path, recipe: Recipe, adapter: Path | None = None) -> None:
        with quiet_transformers():
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, str(adapter))
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._recipe = recipe

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what stands before each text."""
        return self._tokenizer(text)["input_ids"]

    def write(self, words: Sequence[str], asked: Sequence[list[int]], num: int) -> list[Poem]:
        """`num` poems for each of the token ids `asked`, side by side; `words` are the prompts for people."""
        poems: list[Poem] = []
        jobs = [(text, ids) for text, ids in zip(words, asked, strict=True) for _ in range(num)]
        torch.manual_seed(shuffle_seed(self._recipe.seed, "poems"))
        for first in range(0, len(jobs), AT_ONCE):
            poems += self._some(jobs[first : first + AT_ONCE])
            print(f"\r{len(poems)}/{len(jobs)} poems", end="", flush=True)
        print("\r", end="")
        return poems

    def _some(self, jobs: Sequence[tuple[str, list[int]]]) -> list[Poem]:
        longest = max(len(ids) for _, ids in jobs)
        pad = self._tokenizer.pad_token_id or 0
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids in jobs])
        seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in jobs])
        sampling = self._recipe.sampling
        with torch.no_grad():
            made = self._model.generate(
                input_ids=padded,
                attention_mask=seen,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                max_new_tokens=sampling.max_answer_tokens,
                pad_token_id=pad,
            )
        return [self._poem(text, row[longest:].tolist()) for (text, _), row in zip(jobs, made, strict=True)]

    def _poem(self, text: str, ids: list[int]) -> Poem:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return Poem(text, self._tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)


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
        "poems": [[prompt, first[prompt]] for prompt in list(by_title)[:SHOWN]],
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
    for kind, title in (("parts", "what is right, each by itself"), ("forms", "well-formed, of those asked for")):
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
